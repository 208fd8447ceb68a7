"""Observers: who is told how long the requests of a server take.

Where a handler uses ``conn.idle()``, a request lasts from the end of one such block to the begin of the next, or to the
end of the connection; where it does not, the whole connection counts as one. The wait for a place in the pool, after
the request has come, is part of it.

A server that nobody observes measures nothing: its connections get the plain idle block (:mod:`.idle`).
"""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Is registered by :meth:`Server.add_observer`.

    Attributes:
        every: one request in this many is measured.
    """

    every: int

    def request_ended(self, seconds: float, times: int) -> None:
        """Note a request's duration, and how many requests it stands for. Must neither wait nor raise."""


class Observers:
    """The observers of a server, and which requests are measured for them.

    Attributes:
        all: the observers.
        left: requests to leave out until the next is measured.
    """

    __slots__ = ("all", "left")

    def __init__(self) -> None:
        self.all: tuple[Observer, ...] = ()
        self.left = 0

    def add(self, observer: Observer) -> None:
        """Tell it too, of connections that are idle for the first time from now on."""
        self.all = (*self.all, observer)

    def remove(self, observer: Observer) -> None:
        """Tell it no more; does nothing for one that is not registered."""
        self.all = tuple(one for one in self.all if one is not observer)

    @property
    def every(self) -> int:
        """One request in this many is measured: as the most modest observer wants it."""
        return max((observer.every for observer in self.all), default=1)

    def request_ended(self, seconds: float, times: int = 1) -> None:
        for observer in self.all:
            observer.request_ended(seconds, times)
