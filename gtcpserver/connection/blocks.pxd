# How blocks.py is compiled.
cimport cython

from gtcpserver.c.system_calls cimport monotonic
from gtcpserver.connection.stream cimport Stream


cdef class Deadline:
    cdef Stream _stream
    cdef double _seconds, _until


cdef class Idle:
    cdef public bint active
    cdef public object connection
