# How places.py is compiled.
cdef object _NO_LIMIT


cdef class Places:
    cdef public Py_ssize_t size, taken
    cdef public object links
    cdef bint _notifying

    cpdef bint locked(self) except -1
    cpdef bint acquire(self, bint blocking=*, timeout=*) except -1
    cpdef release(self)
    cdef bint _wait(self, timeout) except -1
    cpdef tell(self)
