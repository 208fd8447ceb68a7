"""Disk: keep the event loop from waiting for the disk.

Regular files are always "ready" (epoll(7) refuses them), and a read of data that is not in the page cache blocks: the
whole server then waits for the disk. So callers check the page cache before they read, and let a thread wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from gevent.hub import get_hub
from gevent.threadpool import ThreadPool

from gtcpserver.linux import RWF_NOWAIT, read_ahead
from gtcpserver.process.descriptors import close_descriptor

#: Concurrent reads and writes. The pool is separate: gevent's default one also resolves host names, and look-ups must
#: not queue behind a disk that hangs.
MOST_THREADS = 4

#: Bytes checked, and read by a thread, at a time.
WINDOW = 2 << 20

#: Bytes between two checks within a window. The kernel reads ahead 128 KiB by default, so pages come and go in such
#: units.
STEP = 512 * 1024

#: Bytes read at once where sendfile(2) is refused.
COPY_SIZE = 64 * 1024

#: Bytes that the disk reads ahead while a thread waits for one window.
READ_AHEAD = 2 * WINDOW

#: Some file systems cannot tell what is cached (tmpfs, overlayfs). There a thread reads one window as a sample, and if
#: that took no longer than this (seconds; 0.1 ms is usual for cached data), the next windows are assumed cached.
FAST_READ = 0.002
TRUSTED = 4 * WINDOW

#: Bytes of such a file that are read without a thread: one read-ahead of the kernel, and a thread costs 0.1 ms.
UNSAMPLED = 128 * 1024

_pools: WeakKeyDictionary[Any, ThreadPool] = WeakKeyDictionary()


def pool() -> Any:
    """Return this thread's pool for work that waits for a disk."""
    hub = get_hub()
    found = _pools.get(hub)
    if found is None:
        found = _pools[hub] = ThreadPool(MOST_THREADS, hub=hub)
    return found


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread while the other greenlets run. A kill does not wait for the function to return."""
    return pool().apply(function, arguments)


class PageCache:
    """Makes the next part of a file readable without waiting.

    Args:
        fd: a regular file or block device.
    """

    __slots__ = ("_byte", "_can_tell", "_fd", "_trusted_until", "_was_slow")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._byte = [bytearray(1)]
        self._can_tell = RWF_NOWAIT != 0
        self._trusted_until = 0
        self._was_slow = False

    def make_ready(self, position: int, size: int) -> int:
        """Read up to ``size`` bytes from ``position`` into the page cache, in a thread unless they are cached.

        Returns:
            The number of bytes ready: at least 1 if ``size`` is.
        """
        size = min(size, WINDOW)
        if self._can_tell:
            cached = self._is_cached(position, size)
            if cached is None:
                self._can_tell = False
            else:
                if not cached:
                    in_thread(_read, self._fd, position, size)
                return size
        if size > UNSAMPLED and (self._was_slow or position >= self._trusted_until):
            # One slow sample counts for the whole file: later samples are fast only because of read-ahead.
            self._was_slow |= in_thread(_read, self._fd, position, size) > FAST_READ
            self._trusted_until = position + TRUSTED
        return size

    def _is_cached(self, position: int, size: int) -> bool | None:
        """Return whether a part of the file is cached; None if the file system does not tell."""
        last = position + size - 1
        try:
            for place in range(position, last, STEP):
                os.preadv(self._fd, self._byte, place, RWF_NOWAIT)
            os.preadv(self._fd, self._byte, last, RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return None  # nor does a sandbox that refuses the call; the sender will meet and report disk errors
        return True


def _read(fd: int, position: int, size: int) -> float:
    """Wait, in a thread, until a part of a file is in the page cache, and let the disk read ahead.

    Returns:
        The time it took, in seconds.
    """
    began = monotonic()
    # If the calling greenlet was killed, the descriptor may be closed and its number reused: then these calls fail or
    # read data that nobody sees, and do no harm.
    end = position + size
    with suppress(OSError):
        read_ahead(fd, position, size + READ_AHEAD)
    with suppress(OSError):
        # sendfile to /dev/null waits for the pages without copying them (read would copy 16 KiB a syscall).
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while position < end and (moved := os.sendfile(nowhere, fd, position, end - position)):
                position += moved
        finally:
            close_descriptor(nowhere)
    # Where that is refused (a sandbox, a chroot without /dev) the pages are copied instead. The sender will meet and
    # report disk errors.
    with suppress(OSError):
        while position < end and (data := os.pread(fd, min(COPY_SIZE, end - position), position)):
            position += len(data)
    return monotonic() - began
