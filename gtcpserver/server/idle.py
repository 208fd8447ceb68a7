"""PlacelessIdle: a connection that waits between two requests, and holds no place in the pool meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtcpserver.connection.connection import Connection, Idle

if TYPE_CHECKING:
    from types import TracebackType

    from .capacity import Capacity
    from .state import ServerState


class PlacelessIdle(Idle):
    """An idle connection of a server: it holds no place in the pool."""

    # Once a request where a handler uses it, so all it needs is at hand: 0.5 us with the way back.
    __slots__ = ("_capacity", "_state", "_stream")

    def __init__(self, connection: Connection, state: ServerState, capacity: Capacity) -> None:
        super().__init__(connection)
        self._state = state
        self._capacity = capacity
        self._stream = connection.stream

    def __enter__(self) -> None:
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
            # The block does not begin, and __exit__ will not be called.
            self.active = False
            places.taken += 1
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.active = False
        places = self._capacity.places
        stream = self._stream
        if stream.ending or stream.at_eof or kind is not None:
            # It ends, for which it must not wait until busy ones have given up a place.
            self._state.counters.idle_closed += stream.ended
            stream.ending = False
            places.taken += 1
            return
        if places.taken < places.size and not places.links:
            places.taken += 1
            return
        try:
            places.acquire()
        except BaseException:
            # Killed while it waited for a place: the pool will release one for this greenlet all the same.
            places.taken += 1
            raise


def end_if_idle(connection: Connection) -> None:
    """End a connection, unless it has got a request meanwhile. Only from the hub."""
    if connection.is_idle and not connection.closed:
        connection.end_idle()
