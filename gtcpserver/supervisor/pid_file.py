"""The master's PID file: replaced in one step, locked while the master lives, removed only by its owner."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from gtcpserver.errors import ConfigError
from gtcpserver.files.trusted_path import UntrustedPath, trusted_place
from gtcpserver.linux import holder_of_lock, lock_file
from gtcpserver.process.descriptors import close_descriptor

#: Mode of the file: monitoring tools read it.
MODE = 0o644


class PidFile:
    """A file with this process's id in it.

    A lock tells a running master from a stale file whose number belongs to another process by now. It is a write lock
    of fcntl(2), which needs a writable descriptor: any user who may read the file could take a read lock, or flock(2),
    and keep the next master from starting. The lock belongs to the open file (F_OFD_SETLK), so that other code in this
    process that opens and closes the file does not drop it.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._fd = -1

    def check(self) -> None:
        """Check that the file can be written.

        Raises:
            OSError: EEXIST: a running process has locked it.
            ConfigError: it is a device or a folder.
            UntrustedPath: another user could change where the path leads.
        """
        with _named(self.path), trusted_place(self.path, follow=False) as place:
            try:
                mode = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False).st_mode
                if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                    # Root would replace the host's /dev/null by a file. (Other users cannot make devices, and so cannot
                    # keep us from starting with one.)
                    raise ConfigError(f"PID file {self.path} must be a file, it is a device; left alone")
                if stat.S_ISDIR(mode):
                    raise ConfigError(f"PID file {self.path} must be a file, it is a folder")
                # O_NONBLOCK: it may be a FIFO.
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(place.name, flags, dir_fd=place.folder)
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return  # no master writes a symbolic link: it is replaced, and not followed
                raise
        try:
            # A file of another user may have been put there to keep us from starting.
            ours = os.fstat(fd).st_uid in (0, os.geteuid())
            holder = holder_of_lock(fd) if ours else None
            if holder is not None:
                said = os.read(fd, 32).decode("ascii", "replace").strip()
                raise OSError(errno.EEXIST, f"{self.path}: process {holder or said} is running")
        finally:
            close_descriptor(fd)

    def write(self) -> None:
        """Write this process's id to the file, replacing any other. Raises OSError and UntrustedPath."""
        with _named(self.path), trusted_place(self.path, follow=False) as place:
            temporary = f"{place.name}.{os.getpid()}"
            with contextlib.suppress(FileNotFoundError):  # left by a process with the same id that failed here
                os.unlink(temporary, dir_fd=place.folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            # Nobody else may open it before it is locked.
            fd = os.open(temporary, flags, 0o600, dir_fd=place.folder)
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    lock_file(fd)
                content = f"{os.getpid()}\n".encode()
                if os.write(fd, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fchmod(fd, MODE & ~_umask())
                os.rename(temporary, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
            except BaseException:
                close_descriptor(fd)
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=place.folder)
                raise
        self.close()
        self._fd = fd

    def remove(self) -> None:
        """Remove the file if it is still this process's."""
        if self._fd < 0:
            return
        try:
            with trusted_place(self.path, follow=False) as place:
                ours = os.fstat(self._fd)
                there = os.stat(place.name, dir_fd=place.folder, follow_symlinks=False)
                if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                    os.unlink(place.name, dir_fd=place.folder)
        except (OSError, UntrustedPath):
            pass
        self.close()

    def close(self) -> None:
        """Close the descriptor. A forked child must do so, since it shares the lock."""
        if self._fd >= 0:
            close_descriptor(self._fd)
            self._fd = -1


def _umask() -> int:
    # It can only be read by setting it. This is the main thread, at the start.
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except UntrustedPath as error:
        raise UntrustedPath(f"PID file {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"PID file {path}: {error.strerror}") from None
