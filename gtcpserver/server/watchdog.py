"""Watchdog: checks once a second that every accept loop is armed, and restarts one that is not at two looks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from .state import ServerState, State

if TYPE_CHECKING:
    from .acceptor import Acceptor

log = logging.getLogger("gtcpserver")

#: Seconds between two looks.
WATCHDOG_SECONDS = 1.0


class Watchdog:
    """Watches the accept loops of a server.

    Its timer also keeps the event loop running while no accept loop can be watched: gevent ends a loop that waits for
    nothing (LoopExit), and the program with it.

    Args:
        state: the state of the server.
        also: called first at each look.
    """

    def __init__(self, state: ServerState, also: Callable[[], None]) -> None:
        self._state = state
        self._also = also
        self._deaf: set[Acceptor] = set()
        self._timer: Any = get_hub().loop.timer(WATCHDOG_SECONDS, WATCHDOG_SECONDS)
        self._timer.start(self._look)

    def _look(self) -> None:
        self._also()
        if self._state.now is not State.SERVING:
            return
        deaf = {acceptor for acceptor in self._state.acceptors if acceptor.is_deaf()}
        for acceptor in deaf & self._deaf:
            log.error("%s had stopped accepting without a reason; accepting again", acceptor.listener.address)
            acceptor.stop_accepting()
            acceptor.resume()
        self._deaf = deaf

    def stop(self) -> None:
        self._timer.close()
