"""TimedIdle: the idle block of a server with observers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .observers import Observers

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (timed_idle.pxd).
    from time import monotonic

    from .idle import PlacelessIdle

if TYPE_CHECKING:
    from types import TracebackType

    from gtcpserver.connection.connection import Connection

    from .capacity import Capacity
    from .state import ServerState


class TimedIdle(PlacelessIdle):
    """An idle block that measures the time between two idle blocks, for observers."""

    __slots__ = ("_began", "_observers", "_times")

    def __init__(self, connection: Connection, state: ServerState, capacity: Capacity, observers: Observers) -> None:
        PlacelessIdle.__init__(self, connection, state, capacity)
        self._observers = observers
        self._began = 0.0
        self._times = 1

    # The bodies repeat those of PlacelessIdle: calling them would cost as much as their work.

    def __enter__(self) -> None:
        if self._began:
            self.end_of_request()
        self.active = True
        places = self._capacity.places
        places.taken -= 1
        try:
            if places.links:
                places.tell()
            wants_idle = self._state.wants_idle
            if wants_idle is not None:
                wants_idle(self.connection)
        except BaseException:
            self.active = False
            places.taken += 1
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        stream = self._stream
        if stream.ending or stream.at_eof or kind is not None:  # no request has come
            PlacelessIdle.__exit__(self, kind, error, where)
            return
        observers = self._observers
        try:
            if observers.left:
                observers.left -= 1
            else:
                self._began = monotonic()
                self._times = every = observers.every
                observers.left = every - 1
        except Exception:
            self._began = 0.0  # lose a figure, but not the place
        places = self._capacity.places
        if places.taken < places.size and not places.links:
            self.active = False
            places.taken += 1
        else:
            PlacelessIdle.__exit__(self, kind, error, where)

    def end_of_request(self) -> None:
        """Report the time of a request that was answered, or whose connection ends; do nothing if none was measured."""
        began, self._began = self._began, 0.0
        if began:
            self._observers.request_ended(monotonic() - began, self._times)
