"""Disk: keep the event loop from waiting for one.

Regular files are always "ready" (epoll(7) refuses them), and a read of what is not in the page cache simply blocks: the
whole server then waits for the disk. So whoever is about to read asks first, and lets a thread wait.
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

from gtcpserver.process.descriptors import close_descriptor

#: Reads and writes under way at once. A pool of our own: gevent's default one also resolves host names, and those must
#: not queue behind a disk that hangs.
MOST_THREADS = 4

#: How much is looked at, and read by a thread, at a time.
WINDOW = 2 << 20

#: Distance of the looks within a window. The kernel reads ahead 128 KiB by default, so pages come and go in such lots.
STEP = 512 * 1024

#: Read at once where sendfile(2) is refused.
COPY_SIZE = 64 * 1024

#: How far ahead the disk is kept busy while a thread waits for one window.
READ_AHEAD = 2 * WINDOW

#: Some file systems cannot say what is cached (tmpfs, overlayfs). There a thread reads one window as a sample, and if
#: that took no longer than this (seconds; 0.1 ms is usual for what is cached), the next ones are taken to be like it.
FAST_READ = 0.002
TRUSTED = 4 * WINDOW

#: So little of such a file is read without a thread: one read ahead of the kernel's, and a thread costs 0.1 ms.
UNSAMPLED = 128 * 1024

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

_pools: WeakKeyDictionary[Any, ThreadPool] = WeakKeyDictionary()


def pool() -> Any:
    """This thread's pool for work that waits for a disk."""
    hub = get_hub()
    found = _pools.get(hub)
    if found is None:
        found = _pools[hub] = ThreadPool(MOST_THREADS, hub=hub)
    return found


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread; the other greenlets run meanwhile. A kill does not wait for its end."""
    return pool().apply(function, arguments)


class PageCache:
    """Sees to it that the next part of a file can be read without waiting.

    Args:
        fd: a regular file or block device.
    """

    __slots__ = ("_byte", "_can_tell", "_fd", "_trusted_until", "_was_slow")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._byte = [bytearray(1)]
        self._can_tell = _NOWAIT != 0
        self._trusted_until = 0
        self._was_slow = False

    def make_ready(self, position: int, size: int) -> int:
        """Read up to ``size`` bytes from ``position`` into the page cache, in a thread unless they are there.

        Returns:
            How many bytes are ready: at least 1 if ``size`` is.
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
            # One slow sample counts for the whole file: those after it are fast only because it was read ahead.
            self._was_slow |= in_thread(_read, self._fd, position, size) > FAST_READ
            self._trusted_until = position + TRUSTED
        return size

    def _is_cached(self, position: int, size: int) -> bool | None:
        """None: the file system does not say."""
        last = position + size - 1
        try:
            for place in range(position, last, STEP):
                os.preadv(self._fd, self._byte, place, _NOWAIT)
            os.preadv(self._fd, self._byte, last, _NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return None  # nor does a sandbox that refuses the call; an error of the disk is the sender's to meet
        return True


def _read(fd: int, position: int, size: int) -> float:
    """In a thread: wait until a part of a file is in the page cache, and let the disk go on with what follows.

    Returns:
        How long it took, in seconds.
    """
    began = monotonic()
    # The descriptor may have been closed since, and its number given to something else, if the greenlet that asked was
    # killed: then these calls fail or read what nobody sees, and do no harm.
    end = position + size
    with suppress(OSError):
        os.posix_fadvise(fd, position, size + READ_AHEAD, os.POSIX_FADV_WILLNEED)
    with suppress(OSError):
        # Into /dev/null by sendfile: the pages are waited for, but not copied (16 KiB a syscall would be by read).
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            while position < end and (moved := os.sendfile(nowhere, fd, position, end - position)):
                position += moved
        finally:
            close_descriptor(nowhere)
    # Where that is refused (a sandbox, a chroot without /dev) they are copied after all. An error of the disk is the
    # sender's to meet, where there is somebody to tell.
    with suppress(OSError):
        while position < end and (data := os.pread(fd, min(COPY_SIZE, end - position), position)):
            position += len(data)
    return monotonic() - began
