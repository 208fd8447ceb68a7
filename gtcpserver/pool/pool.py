"""HandlerPool: the greenlets that run handlers, limited in number, resizable, and reused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from gevent import pool as gevent_pool
from gevent.event import Event
from greenlet import getcurrent

from gtcpserver.checks import check_whole_number
from gtcpserver.process.forked import keep as keep_copies

from .greenlets import HandlerGreenlet, Runner
from .places import Places, check_size

#: Default limit on running handlers: ten thousand blocked handlers take about 100 MiB with their sockets, and most
#: systems allow more descriptors than that on request. Above it, the kernel's queue holds new connections.
DEFAULT_SIZE = 10_000


class HandlerPool(gevent_pool.Pool):  # type: ignore[misc]
    """A ``gevent.pool.Pool`` that can change its size and reuses its greenlets.

    All of gevent's API works (``spawn`` makes a new ``gevent.Greenlet`` that takes a place like a handler); servers
    use :meth:`run`.

    Args:
        size: maximum number of running handlers; None for no limit.
        keep: number of idle greenlets that do not end. The others end after 5 to 10 s without work, and the next burst
            makes new ones, each at 5.6 us of CPU instead of 2.4. A kept one takes about 8 KiB.

    Raises:
        ConfigError: size or keep is negative or not a whole number.

    Example::

        from gtcpserver import HandlerPool, Server

        pool = HandlerPool(500, keep=100)  # of both servers together
        plain = Server("127.0.0.1:5000", handle, pool=pool)
        local = Server("unix:app.sock", handle, pool=pool)
    """

    def __init__(self, size: int | None = DEFAULT_SIZE, keep: int = 0) -> None:
        check_size(size)
        check_whole_number("keep", keep, least=0)
        self.keep = keep
        super().__init__(None)
        self.size = size
        self._semaphore = self.places = Places(size)
        self._make_runner()

    def _make_runner(self) -> None:
        self._runner = Runner(self.greenlets, self.dying, self.places)
        self._runner.keep = self.keep
        self.__dict__.pop("_empty_event", None)  # of gevent, or of the runner before
        #: Like :meth:`run` with one argument, which is how a server runs each connection.
        self.run_one: Callable[[Callable[[Any], Any], Any], None] = self._runner.run_one

    @cached_property
    def _empty_event(self) -> Event:
        """Return gevent's event of an empty pool, made when somebody asks: otherwise each handler would clear it."""
        event = Event()
        if not self.greenlets:
            event.set()
        self._runner.empty = event
        return event

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
        self._runner.retire(len(self._runner.waiting) if count is None else count)

    def left_in_child(self) -> None:
        """Reset the pool in a forked child, where all its greenlets are copies that do not run."""
        keep_copies(self._runner, self.greenlets, self.places)
        self.greenlets: set[Any] = set()
        # The forking greenlet takes no place and waits for none.
        self._semaphore = self.places = Places(None)
        self._make_runner()
        forker = getcurrent()
        if isinstance(forker, HandlerGreenlet):
            forker.end_process_after()


def _call(function_and_arguments: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    function, arguments = function_and_arguments
    function(*arguments)
