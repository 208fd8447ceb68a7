# How serving.py is compiled.
cimport cython

from gtcpserver.c.greenlet_api cimport getcurrent, import_greenlet
from gtcpserver.connection.lifecycle cimport end, forget_idle_block, set_address, set_owner, stream_of
from gtcpserver.connection.stream cimport Stream
from gtcpserver.server.capacity cimport Capacity
from gtcpserver.server.state cimport ServerState

cdef int _QUEUE_WAIT_EVERY


cdef class Serving:
    cdef object _server, _counters, _pool, _on_connect, _on_disconnect, _on_error, _access_log
    cdef object _context, _timeout, _max_accepts, _max_connections, _faults, _serve, _finish
    cdef dict _connections
    cdef Capacity _capacity
    cdef ServerState _state
    cdef bint _rejects, _limits_clients, _in_child
    cdef public object handler, observers

    @cython.locals(number=cython.longlong)
    cpdef admit(self, connection, address, bint drained=*)
    cpdef begin(self, connection)
    cpdef serve(self, connection)
    @cython.locals(stream=Stream, was_full=cython.bint)
    cpdef _end(self, connection)
