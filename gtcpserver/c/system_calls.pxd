# accept4(2), recv(2), send(2), shutdown(2), close(2) and clock_gettime(2), called directly: a method of a socket object costs 300 instructions more.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.errno cimport EAGAIN, EINTR, errno

cdef extern from *:
    """
    #include <errno.h>
    #include <string.h>
    #include <arpa/inet.h>
    #include <netinet/in.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>

    /* recv() puts bytes here, and makes a bytes object of the right size of them: cheaper than one of the largest size
       that is shrunk afterwards. Only while the GIL is held. */
    #define GTCPSERVER_SCRATCH 65536
    static char gtcpserver_scratch[GTCPSERVER_SCRATCH];

    static double gtcpserver_monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
    }

    static inline char *gtcpserver_put_byte(char *to, unsigned byte) {
        if (byte >= 100) *to++ = (char)('0' + byte / 100);
        if (byte >= 10) *to++ = (char)('0' + byte / 10 % 10);
        *to++ = (char)('0' + byte % 10);
        return to;
    }

    /* The peer's address of the last accept4(2). */
    static union { struct sockaddr any; struct sockaddr_in v4; struct sockaddr_in6 v6; } gtcpserver_peer;

    static inline int gtcpserver_accept(int listening) {
        socklen_t size = sizeof gtcpserver_peer;
        return accept4(listening, &gtcpserver_peer.any, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    }

    /* As the socket module has it: (host, port), of IPv6 (host, port, flow, scope). */
    static inline PyObject *gtcpserver_address(void) {
        if (gtcpserver_peer.any.sa_family == AF_INET) {
            /* inet_ntop() takes 800 instructions for it, and Py_BuildValue() 500. */
            const unsigned char *bytes = (const unsigned char *)&gtcpserver_peer.v4.sin_addr;
            char text[INET_ADDRSTRLEN], *end = text;
            PyObject *host, *port, *address;
            for (int i = 0; i < 4; i++) {
                if (i) *end++ = '.';
                end = gtcpserver_put_byte(end, bytes[i]);
            }
            host = PyUnicode_New(end - text, 127);
            if (host == NULL) return NULL;
            memcpy(PyUnicode_1BYTE_DATA(host), text, end - text);
            port = PyLong_FromLong(ntohs(gtcpserver_peer.v4.sin_port));
            address = port == NULL ? NULL : PyTuple_Pack(2, host, port);
            Py_DECREF(host);
            Py_XDECREF(port);
            return address;
        } else {
            char text[INET6_ADDRSTRLEN];
            inet_ntop(AF_INET6, &gtcpserver_peer.v6.sin6_addr, text, sizeof text);
            return Py_BuildValue("(siII)", text, (int)ntohs(gtcpserver_peer.v6.sin6_port),
                                 (unsigned)ntohl(gtcpserver_peer.v6.sin6_flowinfo),
                                 (unsigned)gtcpserver_peer.v6.sin6_scope_id);
        }
    }

    /* SO_ERROR; 0 where the kernel does not say. */
    static inline int gtcpserver_socket_error(int fd) {
        int error = 0;
        socklen_t size = sizeof error;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0 ? 0 : error;
    }
    """
    int gtcpserver_accept(int listening)
    object accepted_address "gtcpserver_address"()
    int socket_error "gtcpserver_socket_error"(int fd)
    enum: GTCPSERVER_SCRATCH
    char* gtcpserver_scratch
    double gtcpserver_monotonic()
    ssize_t c_recv "recv"(int fd, void* buffer, size_t size, int flags) nogil
    ssize_t c_send "send"(int fd, const void* data, size_t size, int flags) nogil
    int c_shutdown "shutdown"(int fd, int how) nogil
    int c_close "close"(int fd) nogil
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC, SHUT_WR


cdef inline double monotonic():
    return gtcpserver_monotonic()


cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident()


cdef inline unsigned long get_ident():
    return PyThread_get_thread_ident()


# MSG_DONTWAIT: another process that has the socket may have cleared its O_NONBLOCK, and these calls hold the GIL.
#
# EINTR: a handler of signals is Python, and may close the connection. The descriptor may be another's after it: what is
# called next must be asked of the connection again, which InterruptedError says to the caller.


cdef inline int fail(int error) except -1:
    """Raise OSError by errno. On EINTR, the handlers of signals run before."""
    global errno
    if error == EINTR:
        PyErr_CheckSignals()
        errno = error
    PyErr_SetFromErrno(OSError)


cdef inline bytes receive(int fd, Py_ssize_t size):
    """recv(2) without waiting; size: 1 to 65,536. None: there is nothing to read. Raises OSError, InterruptedError."""
    cdef ssize_t n = c_recv(fd, gtcpserver_scratch, size, MSG_DONTWAIT)
    if n >= 0:
        return PyBytes_FromStringAndSize(gtcpserver_scratch, n)
    if errno != EAGAIN:
        fail(errno)
    return None


cdef inline Py_ssize_t transmit(int fd, bytes data) except -2:
    """send(2) without waiting; -1: the socket has no room. Raises OSError, InterruptedError."""
    cdef ssize_t n = c_send(fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), MSG_NOSIGNAL | MSG_DONTWAIT)
    if n < 0 and errno != EAGAIN:
        fail(errno)
    return n


cdef inline int accept(sock) except -2:
    """accept4(2) on a listening socket for IPv4 or IPv6: a non-blocking descriptor, or -1. Raises OSError.

    accepted_address() tells whose it is until the next call.
    """
    cdef int fd
    while True:
        fd = gtcpserver_accept(sock.fileno())  # each time: a handler of signals may close it
        if fd >= 0:
            return fd
        if errno == EAGAIN:
            return -1
        if errno != EINTR:
            PyErr_SetFromErrno(OSError)
        PyErr_CheckSignals()


cdef inline bint shut_write(int fd):
    """shutdown(2) of the write side; False: it has failed."""
    return c_shutdown(fd, SHUT_WR) == 0


cdef inline void close_now(int fd):
    """close(2). An error changes nothing: the descriptor is closed all the same."""
    c_close(fd)


cdef inline Py_ssize_t discard(int fd):
    """Throw away input of a non-blocking socket, of TCP without copying it (MSG_TRUNC, tcp(7)).

    Returns its bytes; 0: at the peer's end, or on an error; -1: there is none.
    """
    cdef ssize_t n = c_recv(fd, gtcpserver_scratch, GTCPSERVER_SCRATCH, MSG_TRUNC | MSG_DONTWAIT)
    if n < 0:
        return -1 if errno == EAGAIN or errno == EINTR else 0
    return n
