# How state.py is compiled.


cdef class ServerState:
    cdef public object now, counters, waiting, admission, wants_idle
    cdef public object stopping_event, listening_ended, stopped, hurry
    cdef object _nobody
    cdef public double started_at
    cdef public list groups, acceptors
    cdef public long long accepted, bytes_received, bytes_sent, peak, unserved
    cdef public dict connections

    cpdef note_somebody_comes(self)
    cpdef note_if_nobody_is_connected(self)
    cpdef note_unserved(self)
