"""Takes from Python's modules what Linux has and macOS has not, before anything else is imported.

Nobody runs these tests on a Mac. What a Mac has and Linux has not (kqueue, other layouts of structures, other errors)
is not here: this shows only that nothing of Linux is needed. What the kernel does by itself stays Linux's.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from typing import Any

#: Beginnings of names, by module: those that Darwin's headers lack.
NAMES: dict[str, tuple[str, ...]] = {
    "errno": ("EBADFD", "ECHRNG", "ECOMM", "EKEYEXPIRED", "ENOKEY", "ENOMEDIUM", "ENONET", "ENOTUNIQ", "EREMOTEIO"),
    "fcntl": (
        "F_ADD_SEALS",
        "F_GETPIPE_SZ",
        "F_GET_SEALS",
        "F_NOTIFY",
        "F_OFD_",
        "F_SEAL_",
        "F_SETPIPE_SZ",
        "F_SETSIG",
    ),
    "mmap": ("MADV_DONTDUMP", "MADV_DONTFORK", "MADV_HUGEPAGE", "MAP_POPULATE"),
    "os": (
        "CLONE_",
        "EFD_",
        "GRND_",
        "MFD_",
        "O_LARGEFILE",
        "O_NOATIME",
        "O_PATH",
        "O_RSYNC",
        "O_TMPFILE",
        "POSIX_FADV_",
        "P_PIDFD",
        "RWF_",
        "SCHED_BATCH",
        "SCHED_IDLE",
        "SPLICE_",
        "XATTR_",
        "copy_file_range",
        "eventfd",
        "getrandom",
        "getresgid",
        "getresuid",
        "getxattr",
        "memfd_create",
        "pidfd_open",
        "pipe2",
        "posix_fadvise",
        "posix_fallocate",
        "sched_getaffinity",
        "sched_setaffinity",
        "sched_setscheduler",
        "setns",
        "setresgid",
        "setresuid",
        "setxattr",
        "splice",
        "unshare",
        "waitid",
    ),
    "resource": ("RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_OFILE", "RLIMIT_RTPRIO", "RLIMIT_SIGPENDING", "prlimit"),
    "select": ("EPOLL", "POLLRDHUP", "epoll"),
    "signal": ("SIGCLD", "SIGPOLL", "SIGPWR", "SIGRT", "SIGSTKFLT", "pidfd_send_signal", "sigtimedwait", "sigwaitinfo"),
    "socket": (
        "AF_ALG",
        "AF_CAN",
        "AF_NETLINK",
        "AF_PACKET",
        "AF_QIPCRTR",
        "AF_RDS",
        "AF_TIPC",
        "AF_VSOCK",
        "IP_BIND_ADDRESS_NO_PORT",
        "IP_TRANSPARENT",
        "IPPROTO_MPTCP",
        "IPPROTO_UDPLITE",
        "MSG_CMSG_CLOEXEC",
        "MSG_CONFIRM",
        "MSG_ERRQUEUE",
        "MSG_FASTOPEN",
        "MSG_MORE",
        "MSG_NOSIGNAL",
        "NETLINK_",
        "PF_PACKET",
        "SCM_CREDENTIALS",
        "SOCK_CLOEXEC",
        "SOCK_NONBLOCK",
        "SO_BINDTODEVICE",
        "SO_DOMAIN",
        "SO_INCOMING_CPU",
        "SO_MARK",
        "SO_PASSCRED",
        "SO_PASSSEC",
        "SO_PEERCRED",
        "SO_PEERSEC",
        "SO_PRIORITY",
        "SO_PROTOCOL",
        "TCP_CONGESTION",
        "TCP_CORK",
        "TCP_DEFER_ACCEPT",
        "TCP_INFO",
        "TCP_KEEPIDLE",
        "TCP_LINGER2",
        "TCP_QUICKACK",
        "TCP_SYNCNT",
        "TCP_USER_TIMEOUT",
        "TCP_WINDOW_CLAMP",
    ),
    "time": ("CLOCK_BOOTTIME", "CLOCK_TAI", "pthread_getcpuclockid"),
}

#: Functions of the C library.
FUNCTIONS = frozenset({"malloc_trim", "prctl", "process_vm_readv"})  # Darwin has syscall(2), with numbers of its own

#: Folders in which the package, and nobody else, finds nothing.
HIDDEN = ("/proc", "/sys")


def take_away() -> None:
    """Do it, in this process and, by the environment, those that it starts."""
    for module in (_socket, errno, fcntl, mmap, os, resource, select, signal, socket, time):
        beginnings = NAMES[module.__name__.removeprefix("_")]
        for name in [name for name in vars(module) if name.startswith(beginnings)]:
            delattr(module, name)
    socket.__all__[:] = [name for name in socket.__all__ if hasattr(socket, name)]
    _take_packets()
    _take_sendfile()
    _take_functions()
    _take_name()
    sys.addaudithook(_hide)
    os.environ.setdefault("GTCPSERVER_PURE", "1")  # as it is installed there


def _take_packets() -> None:
    """Darwin's Unix sockets are streams and datagrams."""
    make = _socket.socketpair

    def socketpair(family: int = socket.AF_UNIX, type: int = socket.SOCK_STREAM, proto: int = 0) -> Any:
        if type == socket.SOCK_SEQPACKET:
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
        return make(family, type, proto)

    _socket.socketpair = socketpair


def _take_sendfile() -> None:
    """Darwin's sends to sockets alone."""
    send = os.sendfile

    def sendfile(out_fd: int, in_fd: int, offset: int, count: int) -> int:
        if not stat.S_ISSOCK(os.fstat(out_fd).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        return send(out_fd, in_fd, offset, count)

    os.sendfile = sendfile  # type: ignore[assignment]


def _take_functions() -> None:
    find = ctypes.CDLL.__getattr__

    def without(self: ctypes.CDLL, name: str) -> Any:
        if name in FUNCTIONS:
            raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
        return find(self, name)

    ctypes.CDLL.__getattr__ = without  # type: ignore[method-assign]


def _take_name() -> None:
    linux = os.uname()
    darwin = os.uname_result(("Darwin", linux.nodename, "24.0.0", "Darwin Kernel Version 24.0.0", linux.machine))
    os.uname = lambda: darwin


def _hide(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    path = arguments[0]
    if isinstance(path, str) and path.startswith(HIDDEN):
        module = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001 - Python's name for it
        if module.partition(".")[0] == "gtcpserver":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
