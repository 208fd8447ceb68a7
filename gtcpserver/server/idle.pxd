# How idle.py is compiled.
from gtcpserver.connection.blocks cimport Idle
from gtcpserver.connection.stream cimport Stream
from gtcpserver.server.capacity cimport Capacity
from gtcpserver.server.state cimport ServerState


cdef class PlacelessIdle(Idle):
    cdef ServerState _state
    cdef Capacity _capacity
    cdef Stream _stream
