# epoll(7), called directly: select.epoll makes a tuple of each event, 400 instructions.

from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EINTR, errno

cdef extern from "<sys/epoll.h>":
    ctypedef union epoll_data_t:
        int fd
        unsigned long long u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    enum: EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll, epoll_event* events, int most, int timeout)


cdef inline int create() except -1:
    """epoll_create1(2). Raises OSError."""
    cdef int fd = epoll_create1(EPOLL_CLOEXEC)
    if fd < 0:
        PyErr_SetFromErrno(OSError)
    return fd


cdef inline int control(int epoll, int operation, int fd, unsigned int events) except -1:
    """epoll_ctl(2). Raises OSError."""
    cdef epoll_event event
    event.events = events
    event.data.u64 = 0
    event.data.fd = fd
    if epoll_ctl(epoll, operation, fd, &event) < 0:
        PyErr_SetFromErrno(OSError)
    return 0


cdef inline int fetch(int epoll, epoll_event* events, int most) except -1:
    """Return how many events there are, at most ``most``, without waiting. Raises OSError."""
    cdef int count = epoll_wait(epoll, events, most, 0)
    if count < 0:
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        count = 0
    return count
