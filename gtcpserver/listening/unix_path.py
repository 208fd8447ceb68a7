"""Bind a Unix socket to a path, past the file left by a crashed server, and remove the path when closing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator

from gevent import monkey

from gtcpserver.linux import O_PATH, peer_of
from gtcpserver.process.descriptors import close_descriptor

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")
_sleep = monkey.get_original("time", "sleep")

#: Seconds to wait for the directory's lock. Servers hold it for microseconds; after this something else is using it.
LOCK_SECONDS = 0.5


def bind_unix(
    sock: socket.socket, path: str, mode: int | None, backlog: int, owner: tuple[int, int] = (-1, -1)
) -> tuple[int, int] | None:
    """Bind and listen.

    Args:
        path: a path, or "@name" for an abstract socket, which has no file (unix(7)).
        mode: the path's permission bits; None: 0o777 less the umask.
        backlog: for listen(2).
        owner: user and group for the path; -1: unchanged.

    Returns:
        The path's device and inode, by which `remove_if_ours` recognizes it; None for an abstract socket.

    Raises:
        OSError: EADDRINUSE if another server listens there, or the path is something other than a socket.
    """
    if path.startswith("@"):
        try:
            sock.bind("\0" + path[1:])
        except OSError as exc:
            raise OSError(exc.errno, f"unix:{path}: {exc.strerror or exc}") from exc  # none: the path is too long
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
                # Clients cannot connect before listen, so none that should be admitted is refused.
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
    """Give the path its owner, and restore the mode bits removed by the umask."""
    # By descriptor, not by path: another user's folder may have a link there by now.
    if O_PATH == os.O_RDONLY:
        return _change_by_name(name, folder, mode, owner)
    fd = os.open(name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
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


def _change_by_name(name: str, folder: int, mode: int | None, owner: tuple[int, int]) -> None:
    """Do the same on a system that opens no sockets (macOS). No link is followed there."""
    if owner != (-1, -1):
        os.chown(name, *owner, dir_fd=folder, follow_symlinks=False)
    if mode is not None:
        os.chmod(name, mode, dir_fd=folder, follow_symlinks=os.chmod not in os.supports_follow_symlinks)


def _remove_stale(path: str, name: str, folder: int) -> None:
    if not stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise OSError(errno.EADDRINUSE, f"unix:{path}: the path exists and is no socket; it was left alone")
    with _socket_class(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            # No process listens: the file of a server that is gone.
            os.unlink(name, dir_fd=folder)
            return
        except OSError as exc:
            # EAGAIN: its queue is full; EPROTOTYPE: a datagram socket; EACCES: of another user.
            raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use ({exc.strerror})") from exc
        peer = peer_of(probe)
    pid = "unknown" if peer is None else peer[0]
    raise OSError(errno.EADDRINUSE, f"unix:{path} is already in use by another server (pid {pid})")


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    """Hold the folder of a path open, and locked, while in the block.

    So checks and removals happen in the same folder, whatever is done to the path meanwhile. The lock keeps two servers
    that start at once from removing each other's socket between bind and listen, and leaves no file behind. It is only
    a courtesy among servers: if it is not available, they continue without.
    """
    name = os.path.dirname(path) or "."
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be searched, but not read
        fd = os.open(name, O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
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
