"""Bind a unix socket to a path, past the file that a server which crashed has left, and remove the path at close."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator

from gevent import monkey

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")
_sleep = monkey.get_original("time", "sleep")

LOCK_SECONDS = 0.5
"""How long to wait for the directory's lock. Servers hold it for microseconds; past this somebody else uses it."""


def bind_unix(sock: socket.socket, path: str, mode: int | None, backlog: int) -> tuple[int, int] | None:
    """Bind and listen.

    Args:
        path: a path, or "@name" for an abstract socket, which has no file (unix(7)).
        mode: the path's permission bits; None: 0o777 less the umask.
        backlog: for listen(2).

    Returns:
        The path's device and inode, by which `remove_if_ours` knows it again; None for an abstract socket.

    Raises:
        OSError: EADDRINUSE if another server answers there, or something that is no socket has the path.
    """
    if path.startswith("@"):
        try:
            sock.bind("\0" + path[1:])
        except OSError as exc:
            raise OSError(exc.errno, f"unix:{path}: {exc.strerror}") from exc
        sock.listen(backlog)
        return None
    with _directory_lock(path):
        try:
            try:
                sock.bind(path)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(path)
                sock.bind(path)
            # Nobody can connect before listen, so nobody gets past the mode.
            if mode is not None:
                os.chmod(path, mode)
            made = os.lstat(path)
            sock.listen(backlog)
        except OSError as exc:
            prefix = f"unix:{path}"
            text = exc.strerror or ""
            raise OSError(exc.errno, text if text.startswith(prefix) else f"{prefix}: {text}") from exc
    return made.st_dev, made.st_ino


def remove_if_ours(path: str, identity: tuple[int, int]) -> bool:
    """Remove the path of a socket, unless another server has put its own there since."""
    with _directory_lock(path):
        try:
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) != identity or not stat.S_ISSOCK(found.st_mode):
                return False
            os.unlink(path)
        except OSError:
            return False
    return True


def _remove_stale(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EADDRINUSE, f"unix:{path}: the path exists and is no socket; it was left alone")
    with _socket_class(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # Nobody listens: the file of a server that is gone.
            os.unlink(path)
            return
        except OSError as exc:
            # EAGAIN: its queue is full; EPROTOTYPE: a datagram socket; EACCES: another user's.
            raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use ({exc.strerror})") from exc
        pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use by another server (pid {pid})")


@contextlib.contextmanager
def _directory_lock(path: str) -> Iterator[None]:
    """Keep two servers that start at once from removing each other's socket between bind and listen.

    A lock on the directory leaves no file behind. It is a courtesy among servers, and no condition: where it cannot be
    had, they go on without.
    """
    try:
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno == errno.EWOULDBLOCK and time.monotonic() < deadline:
                    _sleep(0.005)
                    continue
            break
        yield
    finally:
        os.close(fd)
