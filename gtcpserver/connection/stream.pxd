# How stream.py is compiled. Its __slots__ and these attributes are the same: tests/test_compiled.py.
# What programs pass is a Py_ssize_t, not an int: Cython would round a float to an int.
cimport cython

from gtcpserver.c.greenlet_api cimport getcurrent, greenlet, import_greenlet, switch_to
from gtcpserver.c.system_calls cimport monotonic, receive, transmit
from gtcpserver.connection.accepted cimport AcceptedSocket
from gtcpserver.connection.poller cimport Poller, poller_of

cdef double inf
cdef Py_ssize_t FULL_READS_IN_A_ROW, MOST_DIRECT
cdef int _PEEK, _WAITALL, _DONTWAIT
cdef object _closed


cdef class Stream:
    cdef object __weakref__
    cdef public object hub, io, mark, progress, reading, sock, timeout, tls, writing
    cdef public object deadline
    cdef public bytes kept
    cdef public tuple deadlines
    cdef public bint at_eof, drained, ended, ending, shut_for_writing
    cdef public int fd, shared
    cdef public long long bytes_received, bytes_sent
    cdef readonly Poller poller
    cdef readonly object _timer
    cdef double _read_until, _timer_at, _write_until
    cdef int _full_reads
    cdef bint _short_is_all

    cpdef set_up(self, sock, int fd, hub, timeout)
    cpdef wait_readable(self)
    cdef _wait_for_more(self)
    cpdef wait_for_input(self)
    cpdef note_input(self)
    @cython.locals(poller=Poller)
    cdef _watch_input(self)
    cdef _watched_by(self, Poller poller)
    cdef bint _bound_read(self) except -1
    cpdef forget_bounds(self)
    cdef double _end_of_wait(self) except? -1.0
    cpdef make_read_watcher(self)
    @cython.locals(me=greenlet, until=cython.double)
    cpdef wait_writable(self)
    cpdef make_write_watcher(self)
    cpdef get_hub(self)
    cpdef reader(self)
    cpdef writer(self)
    cpdef lend(self)
    cpdef leave_poller(self)
    cpdef take_back(self)
    cdef _stop_timer(self)
    cpdef _start_timer(self, double until)
    @cython.locals(now=cython.double)
    cpdef on_timer(self)
    cdef bint _has_input(self) except -1
    cdef _io_object(self)
    cpdef timeout_error(self, double now)
    cpdef note(self, error)
    cpdef bint has_raised(self, error) except -1
    cpdef _get_mark(self)
    cpdef share_mark(self, Stream other)
    cdef _note_thrown(self, error)
    @cython.locals(data=bytes, size=Py_ssize_t, watched=cython.bint)
    cpdef recv(self, Py_ssize_t bufsize, Py_ssize_t flags=*)
    cpdef recv_into(self, buffer, Py_ssize_t nbytes=*, Py_ssize_t flags=*)
    cdef _read_was_full(self)
    @cython.locals(poller=Poller)
    cdef _watch_before_wait(self)
    cdef _note_end(self)
    @cython.locals(data=bytes)
    cdef _recv_with_care(self, Py_ssize_t bufsize, Py_ssize_t flags)
    cdef _recv_rest(self, bytes data, Py_ssize_t bufsize)
    @cython.locals(data=bytes, buffer=bytearray)
    cpdef recv_exactly(self, Py_ssize_t n)
    cpdef bint goes_on(self) except -1
    @cython.locals(sent=Py_ssize_t)
    cpdef send(self, data, Py_ssize_t flags=*)
    @cython.locals(sent=Py_ssize_t)
    cpdef sendall(self, data, Py_ssize_t flags=*)
    cpdef close(self)
    cpdef leave_event_loop(self)
    cpdef left_by_child(self)
