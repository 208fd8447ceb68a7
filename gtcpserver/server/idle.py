"""PlacelessIdle: a connection that waits between two requests, and holds no place in the pool meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gtcpserver.connection.connection import Connection, Idle

if TYPE_CHECKING:
    from types import TracebackType

    from .server import Server


class PlacelessIdle(Idle):
    """An idle connection of a server: it holds no place in the pool."""

    # Once a request where a handler uses it, so all it needs is at hand: 0.5 us with the way back.
    __slots__ = ("_server", "_stream")

    def __init__(self, connection: Connection, server: Server) -> None:
        super().__init__(connection)
        self._server = server
        self._stream = connection.stream

    def __enter__(self) -> None:
        self.active = True
        server = self._server
        places = server.places
        places.taken -= 1
        try:
            if places.links:
                places.tell()
            if server._idle_wanted:
                server._became_idle(self.connection)
        except BaseException:
            # The block does not begin, and __exit__ will not be called.
            self.active = False
            places.taken += 1
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.active = False
        places = self._server.places
        stream = self._stream
        if stream.ending or stream.at_eof or kind is not None:
            # It ends, for which it must not wait until busy ones have given up a place.
            self._server._counters.idle_closed += stream.ended
            stream.ending = False
            places.taken += 1
            return
        if places.taken < places.size and not places.links:
            places.taken += 1
            return
        try:
            places.acquire()
        except BaseException:
            # Killed while it waited for a place: the pool will release one for this worker all the same.
            places.taken += 1
            raise
