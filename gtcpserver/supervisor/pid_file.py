"""The master's PID file: replaced in one step, locked while the master lives, removed by its owner alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os


class PidFile:
    """A file with this process's id in it.

    The lock (flock(2)) tells a running master from a stale file whose number another process has got since.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd = -1

    def check(self) -> None:
        """Raises OSError (EEXIST) if a running process has the file."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode("ascii", "replace").strip()
            raise OSError(errno.EEXIST, f"{self.path}: process {pid} is running") from None
        except OSError:
            pass  # a file system without locks
        finally:
            os.close(fd)

    def write(self) -> None:
        """Puts this process's id there in place of any other. Raises OSError."""
        temporary = f"{self.path}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, f"{os.getpid()}\n".encode())
            os.rename(temporary, self.path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._fd = fd

    def remove(self) -> None:
        """Removes the file if it is still this process's."""
        if self._fd < 0:
            return
        try:
            ours, there = os.fstat(self._fd), os.lstat(self.path)
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                os.unlink(self.path)
        except OSError:
            pass
        self.close()

    def close(self) -> None:
        """Closes the descriptor: a forked child must, as the lock goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
