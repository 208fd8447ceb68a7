"""Open and read files below a directory, and none outside it."""

from __future__ import annotations

import errno
import os
import stat
import struct
import weakref
from collections.abc import Sequence

from gevent.monkey import get_original

from gtcpserver.linux import RWF_NOWAIT, open_beneath
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.transfer.disk import in_thread

#: O_NONBLOCK: opening a FIFO must not wait for a writer.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

# openat2(2), Linux 5.6; linux/openat2.h.
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_HOW = struct.pack("=QQQ", _FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
#: openat2(2) fails with EAGAIN when anything on the system is renamed while it follows a "..": one open in 50, next to
#: a program that does nothing but rename. An attempt takes 1 us.
_TRIES = 200

# A computing thread makes the event loop wait for the interpreter's lock, 5 ms each time. So the thread that lists a
# directory sleeps after this many entries (0.5 ms), for this many seconds.
_ENTRIES_IN_A_ROW = 500
_REST = 0.0001
_sleep = get_original("time", "sleep")

# preadv2(2): fail instead of waiting for the disk.
_NOWAIT = RWF_NOWAIT


class Directory:
    """The directory whose files are served.

    Args:
        path: of the directory. It is opened once: a symbolic link is followed now.
        follow_symlinks: also follow symbolic links that lead outside it. Those that stay below it are always followed,
            except on Linux before 5.6, where none is.

    Raises:
        OSError: it cannot be opened, or is not a directory.
    """

    def __init__(self, path: str | os.PathLike[str], follow_symlinks: bool = False) -> None:
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._follow = follow_symlinks
        #: Closes the descriptor: :meth:`close`, or the end of the last reference.
        self._closed = weakref.finalize(self, close_descriptor, self._fd)
        # File systems that do not support _NOWAIT, by st_dev: overlayfs on some kernels, tmpfs.
        self._cannot_tell: set[int] = set()

    def close(self) -> None:
        self._closed()

    def open(self, segments: Sequence[bytes]) -> int:
        """Open a file or directory for reading; return the descriptor, which the caller closes.

        Args:
            segments: segments of its path, without "" and "..": [b"a", b"b.txt"]; empty for the directory itself.

        Raises:
            OSError: ENOENT, EACCES ...; EXDEV for a path that leads outside.
        """
        path = b"/".join(segments) or b"."
        if self._follow:
            return os.open(path, _FLAGS, dir_fd=self._fd)
        # Resolved by the kernel in one step: no link can be put into the path between a check and the opening.
        for _ in range(_TRIES):
            try:
                return open_beneath(self._fd, path, _HOW)
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.EPERM):  # an old kernel, another system, or a container that
                    return self._open_step_by_step(segments)  # filters unknown system calls
                if error.errno != errno.EAGAIN:
                    raise
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _open_step_by_step(self, segments: Sequence[bytes]) -> int:
        fd = os.dup(self._fd)
        for number, segment in enumerate(segments, 1):
            kind = os.O_DIRECTORY if number < len(segments) else 0
            try:
                following = os.open(segment, _FLAGS | os.O_NOFOLLOW | kind, dir_fd=fd)
            finally:
                close_descriptor(fd)
            fd = following
        return fd

    def read(self, fd: int, device: int, offset: int, count: int) -> bytes | bytearray:
        """Read a part of a file; in a thread if it is not in memory, so that other connections are not delayed.

        Args:
            fd: of a regular file, from :meth:`open`.
            device: its ``st_dev``.

        Returns:
            ``count`` bytes, or less if the file ends earlier.
        """
        if not _NOWAIT or device in self._cannot_tell:
            return os.pread(fd, count, offset)
        data = bytearray(count)
        try:
            if os.preadv(fd, [data], offset, _NOWAIT) == count:
                return data
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._cannot_tell.add(device)
            return os.pread(fd, count, offset)
        rest: bytes = in_thread(os.pread, fd, count, offset)
        return rest


def list_directory(fd: int, hidden: bool, most: int) -> tuple[list[str], bool]:
    """Return the names in an open directory. Runs in a thread: it waits for the disk.

    Args:
        hidden: include those that begin with a dot.
        most: maximum number of names, in the order of the file system.

    Returns:
        Those of directories, with a slash, and then the others, each sorted; and whether there are more.
    """
    directories: list[str] = []
    others: list[str] = []
    more = False
    with os.scandir(fd) as found:
        for number, entry in enumerate(found):
            if number % _ENTRIES_IN_A_ROW == 0:
                _sleep(_REST)
            if hidden or not entry.name.startswith("."):
                more = len(directories) + len(others) == most
                if more:
                    break
                try:
                    if entry.is_dir():
                        directories.append(f"{entry.name}/")
                    else:
                        others.append(entry.name)
                except OSError:
                    continue  # it is gone
    for names in (directories, others):
        # Sorted twice by strings: 3 ms for 10,000 names, against 40 by a tuple of both.
        names.sort()
        names.sort(key=str.lower)
    return directories + others, more


def is_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


def is_directory(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)
