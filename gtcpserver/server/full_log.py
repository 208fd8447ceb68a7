"""FullLog: say in the log that a server is full. Otherwise it only looks slow: new connections wait in the kernel."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gtcpserver.diagnostics.logs import FaultLimiter, also

if TYPE_CHECKING:
    from .options import Options
    from .state import ServerState

log = logging.getLogger("gtcpserver")

#: Seconds between two lines, however often the server becomes full.
INTERVAL = 10.0

#: What happens to new connections, by `on_full`.
_THEN = {
    "wait": "new connections wait",
    "reject": "new connections are closed",
    "close_idle": "idle connections are closed to make room",
}


class FullLog:
    """The log lines of one server."""

    def __init__(self, options: Options, state: ServerState) -> None:
        self._pool = options.pool
        self._most = options.max_connections
        self._on_full = options.on_full
        self._connections = state.connections
        self._limiter = FaultLimiter(burst=1, interval=INTERVAL)

    def note(self) -> None:
        """Note that a connection has come for which there is no room."""
        left_out = self._limiter.allow("full")
        if left_out is None:
            return
        has_places = self._pool.places.taken < self._pool.places.size
        # Others, with whom this process shares the limit, may have the rest.
        if self._most is not None and (has_places or len(self._connections) >= self._most):
            limit, then = f"max_connections ({self._most})", _THEN[self._on_full]
        else:
            # Idle connections hold no place: closing them would make no room.
            limit, then = f"pool ({self._pool.size})", _THEN["reject" if self._on_full == "reject" else "wait"]
        # Who has chosen "close_idle" expects it.
        level = logging.INFO if then == _THEN["close_idle"] else logging.WARNING
        log.log(level, "the server is full: %s is reached, %s%s", limit, then, also(left_out))
