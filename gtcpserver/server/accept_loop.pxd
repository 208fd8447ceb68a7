# How accept_loop.py is compiled.
cimport cython

from gtcpserver.c.system_calls cimport accept, accepted_address, socket_error
from gtcpserver.connection.lifecycle cimport make, stream_of

cdef int _SO_ERROR, _SOL_SOCKET


cdef class AcceptLoop:
    cdef object _acceptor, _connection_class, _sock
    cdef bint _is_direct, _is_plain
    cdef tuple _kind
    cdef public bint behind
    cdef public int failures

    cpdef accept(self)
    @cython.locals(fd=int)
    cdef _accept(self, hub, timeout)
    cpdef bint has_left(self, connection) except -1
