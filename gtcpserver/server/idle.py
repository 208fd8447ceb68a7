"""PlacelessIdle: the idle block of a server. A connection between two requests holds no place in the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (idle.pxd).
    from gtcpserver.connection.blocks import Idle

if TYPE_CHECKING:
    from types import TracebackType

    from gtcpserver.connection.connection import Connection
    from gtcpserver.connection.stream import Stream

    from .capacity import Capacity
    from .state import ServerState


class PlacelessIdle(Idle):
    """An idle block that gives the place back to the pool, and takes one again at its end."""

    # Runs once per request where a handler uses it, so it has all it needs in slots: 0.5 us for both ends.
    __slots__ = ("_capacity", "_state", "_stream")

    def __init__(self, connection: Connection, state: ServerState, capacity: Capacity) -> None:
        Idle.__init__(self, connection)
        self._state = state
        self._capacity = capacity
        self._stream: Stream = connection.stream

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
            # The connection ends, and must not wait for a place before it does.
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
            # Killed while waiting for a place: the pool releases one for this greenlet at its end anyway.
            places.taken += 1
            raise


def end_if_idle(connection: Connection) -> None:
    """End a connection if it is still idle. Call in the hub only."""
    if connection.is_idle and not connection.closed:
        connection.end_idle()
