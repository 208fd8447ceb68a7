"""Capacity: how many connections may be served at once, who waits for room, and who is woken when there is some.

Connections wait in two queues: in the kernel's, before they are accepted, and behind that in `ServerState.waiting`,
where those are that have passed admission, and those that a stop has taken out of the kernel's. There is one rule for
both (`let_in`): those in our queue come first, in their order, then the accept loops go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from .idle import end_if_idle
from .state import ServerState, State

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection

    from .options import Options


class Capacity:
    """The room of one server.

    Attributes:
        places: the pool's.
    """

    def __init__(self, options: Options, state: ServerState) -> None:
        self._pool = options.pool
        self.places = options.pool.places
        self._max_connections = options.max_connections
        self._on_full = options.on_full
        self._state = state
        self._connections = state.connections
        self._is_linked = False

    def full(self) -> bool:
        """Asked before each accept. Hot for new connections: 0.2 us."""
        places = self.places
        if places.taken < places.size and (
            self._max_connections is None or len(self._connections) < self._max_connections
        ):
            return False
        return self._on_full != "reject"

    def has_room(self) -> bool:
        """Whether another connection may be served."""
        places = self.places
        return places.taken < places.size and (
            self._max_connections is None or len(self._connections) < self._max_connections
        )

    # -- wait for room -----------------------------------------------------------------------------------------------

    def wait(self, connection: Connection, then: Callable[[Connection], Any]) -> None:
        """Have ``then(connection)`` called, in the hub, when there is room and none has waited longer."""
        waiting = self._state.waiting
        waiting.append((connection, then))
        if len(waiting) == 1:
            try:
                self.want_room()
            except BaseException:
                waiting.clear()
                raise

    def want_room(self) -> None:
        """Let in connections that wait, in our queue or the kernel's, when there is room."""
        places = self.places
        if places.taken >= places.size:
            if not self._is_linked:
                places.rawlink(self._place_is_free)
                self._is_linked = True
        elif self.has_room():
            get_hub().loop.run_callback(self.let_in)
        elif self._on_full == "close_idle":
            self._close_an_idle_one()
        # max_connections is reached: the end of a connection makes room.

    def _close_an_idle_one(self) -> None:
        # There is room when its handler has returned. If none is idle, or the one told to end has just got a request,
        # the next that becomes idle makes us look again.
        if self._state.now is State.SERVING:
            self._state.wants_idle = self._became_idle
        for connection in self._connections:
            if connection.is_idle and not connection.stream.ending:
                get_hub().loop.run_callback(end_if_idle, connection)
                return

    # -- room --------------------------------------------------------------------------------------------------------

    def _place_is_free(self, _places: Any) -> None:
        # Called in the hub, once a link.
        self._is_linked = False
        self.let_in()

    def _became_idle(self, _connection: Connection) -> None:
        self._state.wants_idle = None
        get_hub().loop.run_callback(self.let_in)

    def made_room(self) -> None:
        """A connection has ended, and there were ``max_connections``. Called in its greenlet."""
        if self._state.waiting:
            get_hub().loop.run_callback(self.let_in)
        else:
            self._resume_accepting()

    def let_in(self) -> None:
        """There may be room: let in those who wait in our queue, then those in the kernel's. Only from the hub."""
        waiting = self._state.waiting
        try:
            while waiting and self.has_room():
                connection, then = waiting.popleft()
                then(connection)
        finally:
            if waiting:  # if one could not be served, the next may be
                self.want_room()
            else:
                self._state.note_if_nobody_is_connected()
                self._resume_accepting()

    def look(self) -> None:
        """Once a second: let in connections that were missed because memory ran out."""
        places = self.places
        if self._state.waiting and (self.has_room() or (places.taken >= places.size and not self._is_linked)):
            self.let_in()

    def _resume_accepting(self) -> None:
        if self._state.now is State.SERVING:
            for acceptor in self._state.acceptors:
                acceptor.resume()

    def left_in_child(self) -> None:
        """In a forked child: nobody waits there."""
        self._pool.left_in_child()
        self.places = self._pool.places
        self._connections = self._state.connections
        self._is_linked = False
