"""Observers: objects that are told how long the requests of a server take.

If a handler uses ``conn.idle()``, a request lasts from the end of one such block to the beginning of the next, or to
the end of the connection; otherwise the whole connection counts as one request. The wait for a place in the pool, after
the request has arrived, is part of it.

A server without observers measures nothing: its connections get the plain idle block (:mod:`.idle`).
"""

from __future__ import annotations

import logging
from typing import Protocol

from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key

log = logging.getLogger("gtcpserver")


class Observer(Protocol):
    """An object registered by :meth:`Server.add_observer`.

    Attributes:
        every: measure one request in this many.
    """

    every: int

    def request_ended(self, seconds: float, times: int) -> None:
        """Record the seconds a request took, and how many requests it stands for. Must not wait.

        What it raises is logged, and harms neither the connection nor other observers.
        """


class Observers:
    """The observers of a server, and the choice of requests to measure.

    Attributes:
        all: the observers.
        left: number of requests to leave out before the next one is measured.
    """

    __slots__ = ("_faults", "all", "left")

    def __init__(self) -> None:
        self.all: tuple[Observer, ...] = ()
        self.left = 0
        self._faults = FaultLimiter()

    def add(self, observer: Observer) -> None:
        """Add an observer, for connections that become idle for the first time from now on."""
        self.all = (*self.all, observer)

    def remove(self, observer: Observer) -> None:
        """Remove an observer; do nothing if it is not registered."""
        self.all = tuple(one for one in self.all if one is not observer)

    @property
    def every(self) -> int:
        """Measure one request in this many: the largest number an observer asks for."""
        return max((observer.every for observer in self.all), default=1)

    def request_ended(self, seconds: float, times: int = 1) -> None:
        for observer in self.all:
            try:
                observer.request_ended(seconds, times)
            except MemoryError:
                pass  # lose a figure
            except Exception as error:
                self._log(error)

    def _log(self, error: Exception) -> None:
        left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
        if left_out is not None:
            log.error("an observer of requests failed%s", also(left_out), exc_info=error)
