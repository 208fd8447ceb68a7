# How timed_idle.py is compiled.
cimport cython

from gtcpserver.c.system_calls cimport monotonic
from gtcpserver.connection.stream cimport Stream
from gtcpserver.pool.places cimport Places
from gtcpserver.server.idle cimport PlacelessIdle


cdef class TimedIdle(PlacelessIdle):
    cdef double _began
    cdef object _observers
    cdef long long _times

    @cython.locals(began=cython.double)
    cpdef end_of_request(self)
