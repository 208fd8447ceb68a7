"""Places: the limit on running handlers, and the queue for a free place."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from gevent.hub import Waiter, get_hub
from gevent.timeout import Timeout

from gtcpserver.checks import check_whole_number

_NO_LIMIT = sys.maxsize


class Places:
    """The places of a pool: a counter with the interface of ``gevent.lock.Semaphore`` and a size that can change.

    gevent's servers register with ``rawlink`` for one notification of a free place; greenlets wait in ``acquire``.
    Waiters are served in order of arrival.
    """

    def __init__(self, size: int | None) -> None:
        self.size = _NO_LIMIT if size is None else size
        self.taken = 0
        self.links: deque[Callable[[Any], Any]] = deque()
        self._notifying = False

    def resize(self, size: int | None) -> None:
        self.size = _NO_LIMIT if size is None else size
        self.tell()

    def locked(self) -> bool:
        return self.taken >= self.size

    @property
    def counter(self) -> int:
        return max(0, self.size - self.taken)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a place; return False if none is free (in time)."""
        # Waiters come first, unless the caller would not wait anyway.
        if self.taken < self.size and not self.links:
            self.taken += 1
            return True
        if not blocking:
            if self.taken < self.size:
                self.taken += 1
                return True
            return False
        if not self._wait(timeout):
            return False
        self.taken += 1
        return True

    def release(self) -> None:
        """Give a place back."""
        self.taken -= 1
        if self.links:
            self.tell()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until a place is free, without taking it; return the number of free places."""
        if self.locked():
            self._wait(timeout)
        return self.counter

    def rawlink(self, callback: Callable[[Any], Any]) -> None:
        """Call ``callback(self)`` once, in the hub, when a place is free."""
        self.links.append(callback)
        self.tell()

    def unlink(self, callback: Callable[[Any], Any]) -> None:
        if callback in self.links:
            self.links.remove(callback)

    def _wait(self, timeout: float | None) -> bool:
        waiter = Waiter()
        self.rawlink(waiter.switch)
        try:
            with Timeout._start_new_or_dummy(timeout) as timer:  # noqa: SLF001 - as gevent's own Semaphore
                waiter.get()
                return True
        except Timeout as expired:
            if expired is not timer:
                raise
            return False
        finally:
            self.unlink(waiter.switch)

    def tell(self) -> None:
        """Notify the waiters soon, if a place is free."""
        if self.links and not self._notifying and self.taken < self.size:
            get_hub().loop.run_callback(self._notify)
            self._notifying = True

    def _notify(self) -> None:
        self._notifying = False
        # A link that takes a place does so before it returns; a link that takes none leaves it to the next.
        while self.links and self.taken < self.size:
            link = self.links.popleft()
            try:
                link(self)
            except BaseException:
                get_hub().handle_error(link, *sys.exc_info())


def check_size(size: int | None) -> None:
    """Raise ConfigError unless ``size`` is None or a whole number from 0."""
    check_whole_number("pool size", size, least=0, none="for no limit")
