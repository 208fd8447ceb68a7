# How accepted.py is compiled.
cimport cython

cdef int _NONBLOCK


# It refers to its socket object, which refers to nothing.
@cython.no_gc
cdef class AcceptedSocket:
    cdef bint _begun
    cdef object _made
    cdef readonly int family, fd, proto, type
    cdef readonly bint shown

    cpdef set_up(self, int family, int type, int proto, int fd)
    @cython.locals(fd=int)
    cpdef int fileno(self) except? -1
    @cython.locals(fd=int)
    cpdef int detach(self) except? -1
    cpdef close(self)
    cpdef made(self)
