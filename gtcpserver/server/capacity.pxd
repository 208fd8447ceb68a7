# How capacity.py is compiled.
cimport cython

from gtcpserver.pool.places cimport Places
from gtcpserver.server.state cimport ServerState


cdef class Capacity:
    cdef public Places places
    cdef object _max_connections, _on_full, _pool
    cdef public object service, fleet
    cdef ServerState _state
    cdef dict _connections
    cdef bint _is_linked

    cpdef bint full(self) except -1
    cpdef bint has_room(self) except -1
