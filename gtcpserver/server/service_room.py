"""ServiceRoom: ``max_connections`` and ``max_accepts`` of a worker process, which hold for all workers together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent.hub import get_hub

from gtcpserver.shared.column import Column

from .state import ServerState

#: Seconds between two looks whether another worker has made room. Nobody tells: that would take a message to each
#: worker for each connection that ends. 50 looks a second cost 0.1 % of a CPU.
LOOK_SECONDS = 0.02


class ServiceRoom:
    """What all workers have open, and have accepted.

    Args:
        column: the column of this process.
        max_connections, max_accepts: as of Server.
        let_in: called in the hub when there may be room again.
        enough: called, once, when the service has accepted `max_accepts` connections.
    """

    def __init__(
        self,
        column: Column,
        max_connections: int | None,
        max_accepts: int | None,
        state: ServerState,
        let_in: Callable[[], Any],
        enough: Callable[[], Any],
    ) -> None:
        self._column = column
        self._max_connections = max_connections
        self._max_accepts = max_accepts
        self._state = state
        self._let_in = let_in
        self._enough = enough
        self._said_enough = False
        # Made now: there may be no memory for it when it is needed. It repeats for the sake of `again`: a timer that
        # has fired, and is started anew, fires at once (libev).
        self._timer: Any = get_hub().loop.timer(LOOK_SECONDS, LOOK_SECONDS, ref=False)

    # -- max_connections ---------------------------------------------------------------------------------------------

    def tell(self) -> int:
        """Tell the other workers how many connections this one has; return the number."""
        own = len(self._state.connections)
        self._column.set_number("connections", own)
        return own

    def has_room(self) -> bool:
        """Return whether the service may have another connection. If not, `let_in` is called later."""
        most = self._max_connections
        if most is not None and self.tell() + self._column.number_elsewhere("connections") >= most:
            self._look_later()
            return False
        return self._max_accepts is None or not self.has_accepted_all()

    def _look_later(self) -> None:
        if not self._timer.active:
            self._timer.again(self._look)

    def _look(self) -> None:
        self._timer.stop()
        self._let_in()  # which asks again, if a connection waits

    # -- max_accepts -------------------------------------------------------------------------------------------------

    def has_accepted_all(self) -> bool:
        """Return whether the service has accepted `max_accepts` connections."""
        return self._max_accepts is not None and self._column.number("accepted") >= self._max_accepts

    def note_accepted(self) -> None:
        """Count an accepted connection."""
        self._column.add("accepted", 1)
        if self.has_accepted_all() and not self._said_enough:
            self._enough()
            self._said_enough = True
