# How lifecycle.py is compiled.
cimport cython

from gtcpserver.c.methods cimport bound
from gtcpserver.c.slots cimport get, instance_of, offset_of, put
from gtcpserver.c.system_calls cimport monotonic
from gtcpserver.connection.accepted cimport AcceptedSocket
from gtcpserver.connection.lingering cimport Linger
from gtcpserver.connection.stream cimport Stream

cdef object _Connection, _drop_ref_on_close, _get_lingerer, _new, _RawSocket, _recv, _sendall, _set_recv, _set_sendall
cdef set _direct
cdef Py_ssize_t _sock_at, _hub_at, _io_refs_at, _closed_at, _stream_at, _recv_at, _sendall_at, _idle_block_at
cdef Py_ssize_t _address_at, _server_at, _context_at, _accepted_at_at
cdef int _SHUT_WR, _SOL_SOCKET, _SO_LINGER

@cython.locals(accepted=AcceptedSocket)
cpdef make(connection_class, tuple kind, int fd, hub, timeout)
cdef bint _is_direct(connection) except -1
@cython.locals(stream=Stream, methods=object)
cpdef begin(connection, sock, int fd, hub, timeout)
@cython.locals(stream=Stream)
cpdef Stream stream_of(connection)
cpdef set_address(connection, address)
cpdef set_owner(connection, server, context)
cpdef forget_idle_block(connection)
@cython.locals(stream=Stream)
cpdef end(connection)
@cython.locals(stream=Stream)
cpdef drop(connection, sock)
@cython.locals(accepted=AcceptedSocket)
cdef _close(connection, sock)
@cython.locals(lingerer=Linger)
cdef bint _lingers(connection, Stream stream, owner, sock) except -1
cdef bint _linger_alone(connection, Stream stream, sock) except -1
cdef bint _end_shared(connection, Stream stream, owner, sock) except -1
