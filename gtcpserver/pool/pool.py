"""HandlerPool: the greenlets that run handlers, limited in number, resizable, and reused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gevent import pool as gevent_pool
from gevent.hub import get_hub
from greenlet import getcurrent

from gtcpserver.process.forked import end_process, keep

from .greenlets import HandlerGreenlet
from .places import Places, check_size

#: Seconds after which an unused greenlet ends. ultrapool's default; the next burst comes sooner or not at all.
IDLE_GREENLET_SECONDS = 5.0

#: Default limit on running handlers: ten thousand blocked handlers take about 100 MiB with their sockets, and most
#: systems allow more descriptors than that on request. Above it, the kernel's queue holds new connections.
DEFAULT_SIZE = 10_000


class HandlerPool(gevent_pool.Pool):  # type: ignore[misc]
    """A ``gevent.pool.Pool`` that can change its size and reuses its greenlets.

    All of gevent's API works (``spawn`` makes a new ``gevent.Greenlet`` that takes a place like a handler); servers
    use :meth:`run`.

    Args:
        size: maximum number of running handlers; None for no limit.

    Raises:
        ValueError: size is negative or not a whole number.
    """

    def __init__(self, size: int | None = DEFAULT_SIZE) -> None:
        check_size(size)
        super().__init__(None)
        self.size = size
        self._semaphore = self.places = Places(size)
        self._waiting: list[HandlerGreenlet] = []
        self._retire_timer: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Run ``function(*args)`` at once in a greenlet, until it first waits. Only from the hub (an event's callback).

        The caller has checked that a place is free (``full()`` is false). Exceptions of the function are reported
        through gevent's hub; a server's function raises none.

        Raises:
            MemoryError: the function was not started, and no place is taken.
        """
        if len(args) == 1:
            self.run_one(function, args[0])
        else:
            self.run_one(_call, (function, args))

    def run_one(self, function: Callable[[Any], Any], argument: Any) -> None:
        """Like :meth:`run` with one argument, which is how a server runs each connection."""
        waiting = self._waiting
        while waiting:
            greenlet = waiting.pop()
            if sys.getrefcount(greenlet) <= (self._references or self._count_references()):
                break
            greenlet.switch(None, None)
        else:
            greenlet = HandlerGreenlet(self)
            # Run to its first wait: a greenlet keeps the arguments of its first switch as long as it lives.
            greenlet.switch()
        greenlets = self.greenlets
        if not greenlets:
            self._empty_event.clear()
        # Each greenlet in the set has a place. Add it only once the greenlet exists: creating it may fail for lack of
        # memory.
        greenlets.add(greenlet)
        self.places.taken += 1
        try:
            greenlet.switch(function, argument)
        except BaseException:
            if not greenlet.working:  # it was not switched to, or it ended
                self.lost(greenlet)
            raise

    #: References to a greenlet that only the pool holds, as counted in :meth:`run`; 0: not counted yet.
    _references = 0

    @classmethod
    def _count_references(cls) -> int:
        HandlerPool._references = sys.maxsize  # prevents recursion: the pool below calls run_one() too
        try:
            HandlerPool._references = HandlerPool(1).references_of_a_waiting_one()
        except BaseException:
            HandlerPool._references = 0
            raise
        return HandlerPool._references

    def references_of_a_waiting_one(self) -> int:
        """Count references as :meth:`run_one` does. Only from the hub, on a pool made for this purpose.

        :meta private:
        """
        self.run(len, ())
        greenlet = self._waiting.pop()
        references = sys.getrefcount(greenlet)
        greenlet.switch(None, None)
        self._retire_unused()
        return references

    def resize(self, size: int | None) -> None:
        """Set the maximum number of running handlers (None: no limit).

        A larger size wakes waiters. A smaller size kills no handler; none starts until enough have ended.
        """
        check_size(size)
        self.size = size
        self.places.resize(size)

    def full(self) -> bool:
        """Return whether no further handler may start."""
        places = self.places
        return places.taken >= places.size

    def free_count(self) -> int:
        """Return the number of handlers that may start now (at least 1 if there is no limit)."""
        return max(0, self.places.size - self.places.taken) if self.size is not None else 1

    def retire_waiting(self, count: int | None = None) -> None:
        """End idle greenlets, longest idle first. Only from the hub, or where the caller may wait."""
        waiting = self._waiting
        leaving = waiting[:count] if count is not None else waiting[:]
        del waiting[: len(leaving)]
        for greenlet in leaving:
            get_hub().loop.run_callback(greenlet.switch, None, None)

    def left_in_child(self) -> None:
        """Reset the pool in a forked child, where all its greenlets are copies that do not run."""
        keep(self._waiting, self.greenlets, self.places)
        self._waiting = []
        self.greenlets: set[Any] = set()
        # The forking greenlet takes no place and waits for none.
        self._semaphore = self.places = Places(None)
        self._retire_timer = None
        forker = getcurrent()
        if isinstance(forker, HandlerGreenlet):
            forker.end_process_after()

    # -- called by the pool's greenlets ------------------------------------------------------------------------------

    def finished(self, greenlet: HandlerGreenlet) -> None:
        """Free the place of a greenlet that finished its function.

        :meta private:
        """
        # Runs once per connection: release() and wait_for_work() are inlined.
        greenlets = self.greenlets
        greenlets.discard(greenlet)
        places = self.places
        places.taken -= 1
        if not greenlets:
            self._empty_event.set()
        if self.dying:
            self.dying.discard(greenlet)
        if places.links:
            places.tell()
        if greenlet.links is not None:
            if greenlet.ends_process:
                end_process()
            # In the hub, the only place where a gevent waiter may be woken; no reuse before that.
            greenlet.loop.run_callback(greenlet.notify_links)
        elif self._retire_timer is not None:
            self._waiting.append(greenlet)
        else:
            self.wait_for_work(greenlet)

    def lost(self, greenlet: HandlerGreenlet) -> None:
        """Remove a greenlet that will do nothing more: it could not be switched to, or died.

        :meta private:
        """
        if greenlet in self._waiting:
            self._waiting.remove(greenlet)
        if greenlet in self.greenlets:
            self.greenlets.discard(greenlet)
            self.dying.discard(greenlet)
            self.places.taken -= 1
            if not self.greenlets:
                self._empty_event.set()
            self.places.tell()

    def wait_for_work(self, greenlet: HandlerGreenlet) -> None:
        """Offer a greenlet for reuse.

        :meta private:
        """
        self._waiting.append(greenlet)
        if self._retire_timer is None:
            # ref=False: idle greenlets keep no program alive.
            timer = get_hub().loop.timer(IDLE_GREENLET_SECONDS, IDLE_GREENLET_SECONDS, ref=False)
            timer.start(self._retire_unused)
            self._retire_timer = timer

    def _retire_unused(self) -> None:
        # A greenlet without work since the last call has waited for 5 to 10 s. The most recently used gets work first.
        waiting = self._waiting
        unused = 0
        while unused < len(waiting) and waiting[unused].seen == waiting[unused].runs:
            unused += 1
        self.retire_waiting(unused)
        for greenlet in waiting:
            greenlet.seen = greenlet.runs
        if not waiting:
            self._retire_timer.close()
            self._retire_timer = None


def _call(function_and_arguments: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    function, arguments = function_and_arguments
    function(*arguments)
