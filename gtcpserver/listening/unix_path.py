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

from gtcpserver.process.descriptors import close_descriptor

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")
_sleep = monkey.get_original("time", "sleep")

LOCK_SECONDS = 0.5
"""How long to wait for the directory's lock. Servers hold it for microseconds; past this somebody else uses it."""


def bind_unix(
    sock: socket.socket, path: str, mode: int | None, backlog: int, owner: tuple[int, int] = (-1, -1)
) -> tuple[int, int] | None:
    """Bind and listen.

    Args:
        path: a path, or "@name" for an abstract socket, which has no file (unix(7)).
        mode: the path's permission bits; None: 0o777 less the umask.
        backlog: for listen(2).
        owner: user and group that the path is given to; -1: as it is.

    Returns:
        The path's device and inode, by which `remove_if_ours` knows it again; None for an abstract socket.

    Raises:
        OSError: EADDRINUSE if another server answers there, or something that is no socket has the path.
    """
    if path.startswith("@"):
        try:
            sock.bind("\0" + path[1:])
        except OSError as exc:
            raise OSError(exc.errno, f"unix:{path}: {exc.strerror or exc}") from exc  # without: the path is too long
        sock.listen(backlog)
        return None
    try:
        with _folder(path) as folder:
            name = os.path.basename(path)
            if mode is not None:
                # The path gets the socket's own mode, less the umask (unix_bind in net/unix/af_unix.c): there is no
                # moment at which it has another one.
                os.fchmod(sock.fileno(), mode)
            try:
                sock.bind(path)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                _remove_stale(path, name, folder)
                sock.bind(path)
            made = os.stat(name, dir_fd=folder, follow_symlinks=False)
            try:
                # Nobody can connect before listen, so nobody is refused who is to get in.
                if owner != (-1, -1) or (mode is not None and stat.S_IMODE(made.st_mode) != mode):
                    _change(name, folder, made, mode, owner)
                sock.listen(backlog)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
    except OSError as exc:
        prefix = f"unix:{path}"
        text = exc.strerror or str(exc)
        raise OSError(exc.errno, text if text.startswith(prefix) else f"{prefix}: {text}") from exc
    return made.st_dev, made.st_ino


def remove_if_ours(path: str, identity: tuple[int, int]) -> bool:
    """Remove the path of a socket, unless another server has put its own there since."""
    name = os.path.basename(path)
    try:
        with _folder(path) as folder:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if (found.st_dev, found.st_ino) != identity or not stat.S_ISSOCK(found.st_mode):
                return False
            os.unlink(name, dir_fd=folder)
    except OSError:
        return False
    return True


def _change(name: str, folder: int, made: os.stat_result, mode: int | None, owner: tuple[int, int]) -> None:
    """Give the path its owner, and back what the umask took of its mode."""
    # By a descriptor, and not by its path: another user's folder may have a link there by now.
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(fd)
        if stat.S_ISSOCK(found.st_mode) and (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
            if owner != (-1, -1):
                try:
                    os.chown(f"/proc/self/fd/{fd}", *owner)
                except OSError as exc:
                    raise OSError(exc.errno, f"cannot be given to user and group {owner}: {exc.strerror}") from exc
            if mode is not None:
                os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        close_descriptor(fd)


def _remove_stale(path: str, name: str, folder: int) -> None:
    if not stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise OSError(errno.EADDRINUSE, f"unix:{path}: the path exists and is no socket; it was left alone")
    with _socket_class(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # Nobody listens: the file of a server that is gone.
            os.unlink(name, dir_fd=folder)
            return
        except OSError as exc:
            # EAGAIN: its queue is full; EPROTOTYPE: a datagram socket; EACCES: another user's.
            raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use ({exc.strerror})") from exc
        pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use by another server (pid {pid})")


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    """Within the block, the folder of a path is open, and locked.

    What is looked at and what is removed are then in the same folder, whatever is done to the path meanwhile. The lock
    keeps two servers that start at once from removing each other's socket between bind and listen, and leaves no file
    behind. It is a courtesy among servers, and no condition: where it cannot be had, they go on without.
    """
    name = os.path.dirname(path) or "."
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be searched, and not read
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
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
        yield fd
    finally:
        close_descriptor(fd)
