# How lingering.py is compiled.
cimport cython

from gtcpserver.c.system_calls cimport close_now, discard, shut_write
from gtcpserver.connection.accepted cimport AcceptedSocket


cdef int _AWAITED, _SHOWN


cdef class Linger:
    cdef public double seconds
    cdef object _first_look, _nobody, _timer
    cdef dict _fresh, _lingering
    cdef Py_ssize_t _awaited

    cdef _tell_if_nobody(self)
    @cython.locals(accepted=AcceptedSocket, flags=int)
    cpdef bint take(self, sock, bint awaited=*) except -1
    @cython.locals(fresh=dict, discarded=Py_ssize_t, fd=int, flags=int)
    cpdef _look_at_fresh(self)


cdef bint _shut_write(sock) except -1
cdef Py_ssize_t _discard(int fd) except -2
cdef _close(int fd)
