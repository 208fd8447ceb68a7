"""What Linux alone has, and what is used in its place elsewhere, such as on a Mac of a developer.

The rest of the package takes these names from here, not from ``os``, ``socket``, ``select`` and ``fcntl``, which do not
have them on every system. Files in /proc and /sys are opened where they are needed: each reader gets by without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Collection
from typing import Any

from gevent import monkey

#: Whether numbers that Python's modules lack mean what Linux's headers say: those of socket options, for example.
IS_LINUX = os.uname().sysname == "Linux"

#: A socket option that no system has: getsockopt(2) and setsockopt(2) fail (ENOPROTOOPT).
NO_OPTION = -1


def _option(name: str) -> int:
    return int(getattr(socket, name, NO_OPTION))


def _number(number: int) -> int:
    return number if IS_LINUX else NO_OPTION


# -- sockets -----------------------------------------------------------------------------------------------------------

# Flags; 0 where there are none.
SOCK_NONBLOCK = int(getattr(socket, "SOCK_NONBLOCK", 0))
SOCK_CLOEXEC = int(getattr(socket, "SOCK_CLOEXEC", 0))
MSG_CMSG_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
MSG_MORE = int(getattr(socket, "MSG_MORE", 0))
#: Of Unix sockets that keep packets apart. macOS has none: process/packets.py does it.
PACKETS = int(socket.SOCK_SEQPACKET) if IS_LINUX else int(socket.SOCK_STREAM)
#: Without it nothing is missing: Python ignores SIGPIPE.
MSG_NOSIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
POLLRDHUP = int(getattr(select, "POLLRDHUP", 0))

#: Elsewhere a family that no system has: socket(2) fails (EAFNOSUPPORT).
AF_NETLINK = int(getattr(socket, "AF_NETLINK", 255))

SO_BINDTODEVICE = _option("SO_BINDTODEVICE")
SO_PROTOCOL = _option("SO_PROTOCOL")
TCP_CONGESTION = _option("TCP_CONGESTION")
TCP_DEFER_ACCEPT = _option("TCP_DEFER_ACCEPT")
TCP_FASTOPEN = _option("TCP_FASTOPEN")
TCP_INFO = _option("TCP_INFO")
#: macOS calls it TCP_KEEPALIVE (tcp(4)).
TCP_KEEPIDLE = _option("TCP_KEEPIDLE") if hasattr(socket, "TCP_KEEPIDLE") else _option("TCP_KEEPALIVE")
TCP_KEEPINTVL = _option("TCP_KEEPINTVL")
TCP_KEEPCNT = _option("TCP_KEEPCNT")
TCP_USER_TIMEOUT = _option("TCP_USER_TIMEOUT")

# linux/in.h, in6.h, tcp.h and asm-generic/socket.h; Python's socket module does not have them.
IP_FREEBIND = _number(15)
IP_TRANSPARENT = _number(19)
IP_MINTTL = _number(21)
IP_BIND_ADDRESS_NO_PORT = _number(24)
IPV6_RECVERR = _number(25)
IPV6_MINHOPCOUNT = _number(73)
TCP_FASTOPEN_CONNECT = _number(30)
SO_ATTACH_FILTER = _number(26)
SO_DETACH_FILTER = _number(27)
SO_ATTACH_REUSEPORT_CBPF = _number(51)
SO_DETACH_REUSEPORT_BPF = _number(68)
# linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h.
SO_ORIGINAL_DST = IP6T_SO_ORIGINAL_DST = _number(80)

_TCP_CLOSE = 7  # net/tcp_states.h


def error_queue(sock: Any) -> list[tuple[int, int, bytes]]:
    """Return the ancillary data of a socket's error queue (MSG_ERRQUEUE, recv(2)). Raises OSError: there is none."""
    flag = getattr(socket, "MSG_ERRQUEUE", None)
    if flag is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    found: list[tuple[int, int, bytes]] = sock.recvmsg(0, 512, flag)[1]
    return found


def peer_of(sock: socket.socket) -> tuple[int, int] | None:
    """Return process id and user of a Unix socket's peer (SO_PEERCRED, unix(7)); None: the system does not tell.

    Raises:
        OSError: as getsockopt(2).
    """
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, option, 12))
    return pid, uid


def has_ended(sock: Any) -> bool:
    """Return whether the system has closed a TCP connection, by an error or because both sides have ended."""
    if TCP_INFO == NO_OPTION:
        try:
            sock.getpeername()
        except OSError as error:
            return error.errno in (errno.ENOTCONN, errno.EINVAL)
        return False
    try:
        (state,) = struct.unpack("B", sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 1))
    except OSError:
        return False  # a unix socket: it has other errors
    return bool(state == _TCP_CLOSE)


# -- event loops -------------------------------------------------------------------------------------------------------

#: Makes an epoll(7) instance; None where there is none. (Monkey patching removes it from ``select``.)
make_epoll: Callable[[], Any] | None = None
with contextlib.suppress(AttributeError):
    make_epoll = monkey.get_original("select", "epoll")


def make_alarm() -> int:
    """Return a descriptor that is readable (eventfd(2)). Raises OSError: as there, and where there is none."""
    if not hasattr(os, "eventfd"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.eventfd(1, os.EFD_CLOEXEC)


def make_pipe() -> tuple[int, int]:
    """Return both ends of a pipe, not blocking and close-on-exec. Raises OSError."""
    if hasattr(os, "pipe2"):
        return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    return ends


# -- pipes for splice(2) -----------------------------------------------------------------------------------------------

#: Whether there is splice(2). Otherwise bytes are copied.
HAS_SPLICE = hasattr(os, "splice")

if HAS_SPLICE:
    _SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE

    def splice(source: int, sink: int, size: int) -> int:
        """Move bytes between a pipe and another descriptor without waiting. Raises OSError."""
        return os.splice(source, sink, size, None, None, _SPLICE_FLAGS)

else:

    def splice(source: int, sink: int, size: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def pipe_size(fd: int) -> int:
    """Return the capacity of a pipe in bytes. Raises OSError: it is no pipe."""
    if not hasattr(fcntl, "F_GETPIPE_SZ"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def grow_pipe(fd: int, size: int) -> int:
    """Ask for another capacity; return the one it has now. Raises OSError: EPERM: over this user's limit."""
    return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)


def reopen_pipe(fd: int, access: int) -> int:
    """Open an end of a pipe anew: a file description without those who share the old one, which does not block.

    Args:
        access: O_RDONLY or O_WRONLY.

    Raises:
        OSError: ENOENT: there is no /proc. EACCES: another user has made the pipe.
    """
    return os.open(path_of_descriptor(fd), access | os.O_NONBLOCK | os.O_CLOEXEC)


# -- files and memory --------------------------------------------------------------------------------------------------

#: Opens a file or folder without any access to it. Elsewhere: for reading.
O_PATH = int(getattr(os, "O_PATH", os.O_RDONLY))

#: preadv2(2) and pwritev2(2): fail instead of waiting for the disk. 0: they cannot.
RWF_NOWAIT = int(getattr(os, "RWF_NOWAIT", 0))

_PAGE = os.sysconf("SC_PAGE_SIZE")

_SYS_OPENAT2 = 437  # asm-generic/unistd.h: one number on all architectures


def memory_file(name: str, size: int = 0, sealed: bool = False) -> int:
    """Return the descriptor of an empty file in memory (memfd_create(2)); elsewhere of one in the folder for
    temporary files, without a name.

    Args:
        name: shown in /proc/PID/fd.
        size: in bytes; the file has zeros.
        sealed: nobody can change the size any more, which would be a SIGBUS for those who have it in their memory. Only
            Linux can see to that.

    Raises:
        OSError: descriptors or memory ran out.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealed else 0))
    else:
        fd, path = tempfile.mkstemp(prefix=f"{name}-")
        os.unlink(path)
    try:
        os.ftruncate(fd, size)
        if sealed and hasattr(fcntl, "F_ADD_SEALS"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        _close(fd)
        raise
    return fd


def reserve(fd: int, size: int) -> None:
    """Take the memory of a file now: a write where memory ran out would be a SIGBUS. Raises OSError: ENOSPC."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
        return
    done = 0
    while done < size:
        done += os.pwrite(fd, bytes(min(size - done, 1 << 20)), done)


def path_of_descriptor(fd: int) -> str:
    """Return a path that opens what a descriptor has open."""
    return f"/proc/self/fd/{fd}" if IS_LINUX else f"/dev/fd/{fd}"


def read_ahead(fd: int, offset: int, size: int) -> None:
    """Have the disk read (posix_fadvise(2)). Raises OSError."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)


def open_beneath(folder: int, path: bytes, how: bytes) -> int:
    """Open by openat2(2). Raises OSError: ENOSYS before Linux 5.6, and elsewhere.

    Args:
        how: struct open_how.
    """
    if not IS_LINUX:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fd: int = _library().syscall(_SYS_OPENAT2, folder, path, how, len(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


#: struct flock, fcntl(2): l_type, l_whence, l_start, l_len, l_pid; zeros stand for the whole file.
_FLOCK = struct.Struct("hhqqi4x")


def lock_file(fd: int) -> None:
    """Take the write lock of an open file (F_OFD_SETLK, fcntl(2)), elsewhere that of flock(2). Raises OSError."""
    if hasattr(fcntl, "F_OFD_SETLK"):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def holder_of_lock(fd: int) -> int | None:
    """Return the holder of a write lock: a process id, 0 for "some process"; None if there is no lock."""
    try:
        if not hasattr(fcntl, "F_OFD_GETLK"):
            return _holder_of_flock(fd)
        # Ask as for a read lock, which does not conflict with read locks of others.
        query = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))
    except OSError:
        return None  # a file system without locks
    return None if kind == fcntl.F_UNLCK else max(0, pid)  # -1: it belongs to an open file


def _holder_of_flock(fd: int) -> int | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    fcntl.flock(fd, fcntl.LOCK_UN)
    return None


def give_back_memory() -> None:
    """Return free memory to the system (malloc_trim(3)), where the C library is glibc."""
    with contextlib.suppress(AttributeError):
        _library().malloc_trim(0)


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM, in bytes (statm in proc(5)); 0: the system does not tell.

    Raises:
        OSError: descriptors ran out.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (FileNotFoundError, ValueError, IndexError):
        return 0


# -- processes ---------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


def cpus() -> list[int]:
    """Return the numbers of the CPUs that this process may use; elsewhere of all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def stay_on(chosen: Collection[int]) -> None:
    """Use only these CPUs from now on. Does nothing where that cannot be asked. Raises OSError."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)


def become_user(uid: int, gid: int) -> None:
    """Take a user and a group for good, as root. Raises OSError."""
    if hasattr(os, "setresuid"):
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    else:
        # Where root calls them, all three ids change (setuid(2) of BSD and macOS).
        os.setgid(gid)
        os.setuid(uid)


def die_with_parent(number: int) -> str | None:
    """Have the kernel send this signal when the parent process is gone (PR_SET_PDEATHSIG, prctl(2)).

    Returns:
        Why that is not possible, or None.
    """
    return _prctl(_PR_SET_PDEATHSIG, number)


def name_process(name: bytes) -> None:
    """Set comm, the short name of this thread (PR_SET_NAME, prctl(2)). Never fails."""
    _prctl(_PR_SET_NAME, name)


def thread_clock(thread: int) -> int:
    """Return the clock of a thread's CPU time, for ``time.clock_gettime``; elsewhere that of the process.

    Args:
        thread: as ``threading.get_ident`` returns it.
    """
    if hasattr(time, "pthread_getcpuclockid"):
        return time.pthread_getcpuclockid(thread)
    return time.CLOCK_PROCESS_CPUTIME_ID


def _prctl(option: int, value: int | bytes) -> str | None:
    try:
        prctl = _library().prctl
    except AttributeError:
        return os.strerror(errno.ENOSYS)
    return None if prctl(option, value, 0, 0, 0) == 0 else os.strerror(ctypes.get_errno())


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


_close: Callable[[int], None] = monkey.get_original("os", "close")
