"""Which system calls fail, and how: the errors that the man page of each call names and that a healthy program can get.

Left out: what only a bug gives (EBADF, EFAULT), and calls whose failure no program can do anything about (futex, brk).
"""

from __future__ import annotations

#: Limits of descriptors, of the process and of the system.
NO_DESCRIPTOR = ("EMFILE", "ENFILE")

#: seccomp(2) filters (containers, SystemCallFilter= of systemd), security modules, old kernels.
REFUSED = ("ENOSYS", "EPERM")

#: The network's own, for a connection: none of them means that the server is broken.
PEER_GONE = ("ECONNRESET", "EPIPE")

ERRORS: dict[str, tuple[str, ...]] = {
    "accept4": ("ECONNABORTED", *NO_DESCRIPTOR, "ENOBUFS", "ENOMEM", "EPROTO", "EPERM", "EINTR", "EAGAIN", "ENETDOWN"),
    "bind": ("EADDRINUSE", "EACCES", "ENOMEM"),
    "clone": ("EAGAIN", "ENOMEM"),
    "clone3": ("EAGAIN", "ENOMEM"),
    "close": ("EIO",),
    "connect": ("ECONNREFUSED", "ENETUNREACH", "ETIMEDOUT", "EADDRNOTAVAIL", "EAGAIN", "EPERM", "EINTR"),
    "dup": NO_DESCRIPTOR,
    "epoll_create1": (*NO_DESCRIPTOR, "ENOMEM"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_pwait": ("EINTR",),
    "epoll_wait": ("EINTR",),
    "eventfd2": (*NO_DESCRIPTOR, "ENOMEM"),
    "fallocate": ("EOPNOTSUPP", "ENOSPC", "EINTR"),
    "fcntl": (*REFUSED, "ENOMEM", "EAGAIN", "EBUSY"),  # no kernel gives the last two; a filter may
    "fdatasync": ("EIO", "ENOSPC"),
    "flock": ("EAGAIN", "EINTR", "ENOLCK"),
    "fork": ("EAGAIN", "ENOMEM"),
    "fstat": ("ENOMEM", "EIO"),
    "ftruncate": ("EIO", "EINTR"),
    "getdents64": ("EIO", "ENOMEM"),
    "getpeername": ("ENOTCONN", "ENOBUFS"),
    "getrandom": (*REFUSED, "EINTR", "EAGAIN"),
    "getsockname": ("ENOBUFS", "ENOMEM"),
    "getsockopt": ("ENOBUFS", "ENOMEM", "ENOPROTOOPT", "EPERM"),
    "ioctl": ("ENOTTY", "ENOMEM", "EPERM"),
    "kill": ("EPERM", "ESRCH"),
    "listen": ("EADDRINUSE", "ENOMEM"),
    "lseek": ("EINVAL",),
    "mmap": ("ENOMEM",),
    "newfstatat": ("ENOMEM", "EIO", "ENOENT"),
    "openat": (*NO_DESCRIPTOR, "ENOMEM", "EACCES", "EIO", "EINTR", "ENOENT"),
    "openat2": (*REFUSED, *NO_DESCRIPTOR, "ENOMEM", "EIO", "EAGAIN"),
    "pipe2": NO_DESCRIPTOR,
    "poll": ("EINTR", "ENOMEM"),
    "prctl": ("EINVAL", "EPERM"),
    "pread64": ("EIO", "EINTR", "ENOMEM"),
    "preadv2": ("EOPNOTSUPP", *REFUSED, "EIO", "EAGAIN", "EINTR", "ENOMEM"),
    "prlimit64": ("EPERM",),
    "pselect6": ("EINTR", "ENOMEM"),
    "read": ("EINTR", "EAGAIN", "EIO", "ENOMEM", "ECONNRESET"),
    "recvfrom": ("EINTR", "EAGAIN", "ENOMEM", "ENOBUFS", "ECONNRESET", "ETIMEDOUT"),
    # Not ECONNRESET: workers read their orders by it, and the kernel says so only where there is no master any more.
    "recvmsg": ("EINTR", "EAGAIN", "ENOMEM", "ENOBUFS"),
    "rename": ("EACCES", "EROFS", "EIO"),
    "sched_setaffinity": ("EINVAL", "EPERM"),
    "sendfile": (*REFUSED, "EINVAL", "EIO", "ENOMEM", "EAGAIN", "EINTR", *PEER_GONE),
    "sendmsg": ("EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "ETOOMANYREFS", *PEER_GONE),
    "sendto": ("EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", *PEER_GONE),
    "setresuid": ("EAGAIN", "EPERM"),
    "setsockopt": ("ENOPROTOOPT", "ENOMEM", "ENOBUFS", "EPERM", "EINVAL"),
    "shutdown": ("ENOTCONN",),
    "socket": (*NO_DESCRIPTOR, "ENOBUFS", "ENOMEM", "EACCES", "EAFNOSUPPORT"),
    "socketpair": (*NO_DESCRIPTOR, "ENOMEM"),
    "splice": (*REFUSED, "EINVAL", "EIO", "ENOMEM", "EAGAIN", "EINTR", *PEER_GONE),
    "statx": (*REFUSED, "ENOMEM", "EIO"),
    "timerfd_create": (*NO_DESCRIPTOR, "ENOMEM"),
    "timerfd_settime": ("EINVAL",),
    "unlink": ("EACCES", "EROFS", "EIO"),
    "unlinkat": ("EACCES", "EROFS", "EIO"),
    "vfork": ("EAGAIN", "ENOMEM"),
    "wait4": ("EINTR", "ECHILD"),
    "write": ("EINTR", "EAGAIN", "EIO", "ENOSPC", *PEER_GONE),
    "writev": ("EINTR", "EAGAIN", "EIO", "ENOSPC", *PEER_GONE),
}

#: The 1st, 2nd and 10th call, several in a row, and every one from the first on.
WHEN = ("1", "2", "10", "1..5", "1+")

#: "Not now": the kernel never says so always, and a loop that asks again is right.
PASSING = frozenset({"EAGAIN", "EINTR"})

#: Calls by which Python finds and reads modules, too: at a start they are not the server's.
OF_THE_INTERPRETER = frozenset(
    {"openat", "fstat", "newfstatat", "read", "lseek", "mmap", "ioctl", "getdents64", "statx"}
)


def happens(call: str, error: str, when: str) -> bool:
    """Whether that is plausible. Not always: what passes, memory, and reads of the pipes that wake an event loop."""
    return not when.endswith("+") or not (error in PASSING or call in ("mmap", "read"))
