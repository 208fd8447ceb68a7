# How poller.py is compiled.
cimport cython

from gtcpserver.c.epoll cimport control, create, epoll_event, fetch
from gtcpserver.c.greenlet_api cimport getcurrent, greenlet, import_greenlet, switch_to
from gtcpserver.c.system_calls cimport get_ident

cdef object ENDED, FREE, INPUT
cdef unsigned int _END, _WATCHED
cdef int _ADD, _DEL, _MOD, MOST
cdef Poller _last


@cython.final
cdef class Poller:
    cdef object __weakref__
    cdef readonly object hub
    cdef object _watcher, _thrown
    cdef list _states
    cdef epoll_event[256] _events
    cdef int _alarm, _at, _count, _fd, _watched
    cdef unsigned long _thread
    # Of the form that is not compiled.
    cdef object _epoll, _poll

    @cython.locals(is_new=cython.bint)
    cpdef add(self, int fd)
    @cython.locals(states=list)
    cdef _make_room(self, int fd)
    @cython.locals(states=list)
    cpdef forget(self, int fd)
    @cython.locals(states=list)
    cpdef leave(self, int fd)
    cpdef forget_dropped(self, int fd)
    cpdef ask_again(self, int fd)
    cpdef note_empty(self, int fd)
    cpdef note_input(self, int fd)
    @cython.locals(states=list)
    cpdef waiter(self, int fd)
    cdef bint _register(self, int fd) except -1
    cdef _control(self, int operation, int fd)
    @cython.locals(states=list, me=greenlet)
    cpdef bint wait(self, int fd) except -1
    cpdef throw_into(self, waiter, int fd, error)
    @cython.locals(states=list, fd=int, events=cython.uint)
    cdef _next(self)
    cdef _serve(self)

@cython.locals(last=Poller)
cpdef Poller poller_of(hub)
