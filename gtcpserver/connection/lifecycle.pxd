# How lifecycle.py is compiled.
cimport cython

from gtcpserver.c.system_calls cimport monotonic
from gtcpserver.connection.stream cimport Stream

cdef object _drop_ref_on_close, _get_lingerer, _new, _RawSocket, _set_recv, _set_sendall
cdef int _NONBLOCK, _SHUT_WR, _SOL_SOCKET, _SO_LINGER

cpdef make(connection_class, tuple kind, int fd)
@cython.locals(stream=object)
cpdef begin(connection, sock)
@cython.locals(stream=Stream)
cpdef end(connection)
@cython.locals(stream=Stream)
cpdef drop(connection, sock)
cdef bint _lingers(connection, Stream stream, owner, sock) except -1
cdef bint _linger_alone(connection, Stream stream, sock) except -1
cdef bint _end_shared(connection, Stream stream, owner, sock) except -1
