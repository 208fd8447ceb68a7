"""TimeLimits: ends handlers that take too long, and handlers of clients that drip.

A periodic look at the open connections, instead of a timer for each, costs nothing on the path of a connection.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from gevent.hub import get_hub

from gtcpserver.connection.connection import Connection
from gtcpserver.errors import DeadlineExceeded

#: Number of looks at a connection within ``min_rate_window``. It counts as slow only if its handler was waiting for the
#: client at every look: the client is not blamed for a handler that computes or asks a database.
LOOKS_A_WINDOW = 4

#: Seconds between two looks for ``handler_timeout``: a tenth of it, within these bounds.
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.05, 1.0


class HandlerTimedOut(DeadlineExceeded):
    """Raised in a handler that has used up ``handler_timeout``."""


class TooSlow(TimeoutError):
    """Raised in a handler whose client moves fewer bytes than ``min_rate``."""


class TimeLimits:
    """The time limits of one server's connections.

    Args:
        connections: open connections in order of arrival, each with its greenlet.
        handler_timeout: seconds; None for no limit.
        min_rate: bytes per second; None for no limit.
        window: seconds over which ``min_rate`` is measured.
    """

    def __init__(
        self,
        connections: dict[Connection, Any],
        handler_timeout: float | None,
        min_rate: float | None,
        window: float,
    ) -> None:
        self._connections = connections
        self._handler_timeout = handler_timeout
        self._least_bytes = None if min_rate is None else min_rate * window
        self._window = window
        self._timers: list[Any] = []
        self._look_interval = 0.0
        self._until: dict[Connection, float] = {}

    def start(self) -> None:
        if self._handler_timeout is not None:
            self._look_interval = min(LONGEST_INTERVAL, max(SHORTEST_INTERVAL, self._handler_timeout / 10))
            self._every(self._look_interval, self._end_long_ones)
        if self._least_bytes is not None:
            self._every(self._window / LOOKS_A_WINDOW, self._end_slow_ones)

    def stop(self) -> None:
        for timer in self._timers:
            timer.close()
        self._timers.clear()

    def left(self, connection: Connection) -> float | None:
        """Return the seconds that its handler has left; None: no limit, or it has just begun."""
        until = self._until.get(connection)
        return None if until is None else until - monotonic()

    def resume(self, connection: Connection, left: float) -> None:
        """Give the handler of a connection that comes from another worker the seconds that it had left there."""
        if self._handler_timeout is not None:
            self._until[connection] = monotonic() + min(left, self._handler_timeout)

    def left_in_child(self) -> None:
        self._timers = []

    def _every(self, seconds: float, look: Any) -> None:
        timer = get_hub().loop.timer(seconds, seconds, ref=False)
        timer.start(look)
        self._timers.append(timer)

    def _end_long_ones(self) -> None:
        assert self._handler_timeout is not None
        now = monotonic()
        ends = self._until
        for connection in [gone for gone in ends if gone not in self._connections]:
            del ends[connection]
        for connection, worker in list(self._connections.items()):
            until = ends.get(connection)
            if until is None:
                # Its handler began after the last look, although it may have been accepted long before.
                age = min(now - connection.accepted_at, self._look_interval)
                until = ends[connection] = now - age + self._handler_timeout
            if now >= until:
                # A handler that swallows the exception gets it again later.
                ends[connection] = now + self._handler_timeout
                worker.throw(HandlerTimedOut(f"the handler has run for more than {self._handler_timeout:g} s"))

    def _end_slow_ones(self) -> None:
        assert self._least_bytes is not None
        for connection in list(self._connections):
            stream = connection.stream
            waiter = stream.reader() or stream.writer()
            if waiter is None or connection.is_idle:
                stream.progress = None
                continue
            moved = stream.bytes_received + stream.bytes_sent
            progress = stream.progress
            if progress is None:
                stream.progress = (moved, 1)
            elif progress[1] < LOOKS_A_WINDOW:
                stream.progress = (progress[0], progress[1] + 1)
            elif moved - progress[0] >= self._least_bytes:
                stream.progress = (moved, 1)
            else:
                stream.progress = None
                few = f"{moved - progress[0]} bytes in {self._window:g} s, at least {self._least_bytes:g} wanted"
                waiter.throw(stream.note(TooSlow(few)))
