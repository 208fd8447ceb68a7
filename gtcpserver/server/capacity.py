"""Capacity: how many connections may be served at once, which ones wait for room, and which one is woken first.

Connections wait in two queues: in the kernel's, before they are accepted, and in ours (`ServerState.waiting`), which
holds connections that passed admission, and those that a stop took out of the kernel's queue. One rule wakes both
(`let_in`): our queue first, in order, then the accept loops go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

from .idle import end_if_idle

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (capacity.pxd).
    from .state import ServerState

from .state import State

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection

    from .fleet_room import FleetRoom
    from .options import Options
    from .service_room import ServiceRoom


class Capacity:
    """The room of one server: places in its pool, and ``max_connections``.

    Attributes:
        places: the places of the pool.
        service: the room that all worker processes share; None: this process counts for itself.
        fleet: the room that several machines share; None: this one counts for itself.
    """

    def __init__(self, options: Options, state: ServerState) -> None:
        self._pool = options.pool
        self.places = options.pool.places
        self._max_connections = options.max_connections
        self._on_full = options.on_full
        self._state = state
        self._connections = state.connections
        self._is_linked = False
        self.service: ServiceRoom | None = None
        self.fleet: FleetRoom | None = None

    def full(self) -> bool:
        """Return whether the accept loops must pause. Called before each accept: 0.2 us."""
        if self.service is not None and not self.service.has_room():
            return self._on_full != "reject"
        if self.fleet is not None and not self.fleet.has_room():
            return self._on_full != "reject"
        places = self.places
        if places.taken < places.size and (
            self._max_connections is None or len(self._connections) < self._max_connections
        ):
            return False
        return self._on_full != "reject"

    def has_room(self) -> bool:
        """Return whether another connection may be served."""
        if self.service is not None and not self.service.has_room():
            return False
        if self.fleet is not None and not self.fleet.has_room():
            return False
        places = self.places
        return places.taken < places.size and (
            self._max_connections is None or len(self._connections) < self._max_connections
        )

    def is_asking(self) -> bool:
        """Return whether there is room will be known in a moment."""
        return self.fleet is not None and self.fleet.is_asking

    # -- wait for room -----------------------------------------------------------------------------------------------

    def wait(self, connection: Connection, then: Callable[[Connection], Any]) -> None:
        """Queue a connection; ``then(connection)`` is called in the hub when there is room and it is first in line.

        If ``then`` raises it must have closed the connection; one that is open is tried again.
        """
        waiting = self._state.waiting
        waiting.append((connection, then))
        if len(waiting) == 1:
            try:
                self.want_room()
            except BaseException:
                waiting.clear()
                raise

    def want_room(self) -> None:
        """Let in connections that wait, in our queue or the kernel's, as soon as there is room."""
        places = self.places
        if places.taken >= places.size:
            if not self._is_linked:
                places.rawlink(self._place_is_free)
                self._is_linked = True
        elif self.has_room():
            get_hub().loop.run_callback(self.let_in)
        elif self._on_full == "close_idle" and not self.is_asking():
            self._close_an_idle_one()
        # max_connections is reached: the end of a connection makes room.

    def _close_an_idle_one(self) -> None:
        # Room appears when its handler returns. If no connection is idle, or the one told to end just got a request,
        # the next one that becomes idle makes us look again.
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
        """Use the room of a connection that ended, when ``max_connections`` was reached. Called in its greenlet."""
        if self.service is not None:
            self.service.tell()
        if self.fleet is not None:
            try:
                self.fleet.freed()
            except MemoryError:
                pass  # it gives the place back when it renews
        if self._state.waiting:
            get_hub().loop.run_callback(self.let_in)
        else:
            self._resume_accepting()

    def let_in(self) -> None:
        """Let in the connections in our queue while there is room, then those in the kernel's. Call in the hub only."""
        waiting = self._state.waiting
        untouched = False
        try:
            while waiting and self.has_room():
                one = waiting.popleft()
                connection, then = one
                try:
                    then(connection)
                except BaseException:
                    # Nobody knows of the connection if there was no memory for the call. Put it back first, which takes
                    # none, then ask.
                    waiting.appendleft(one)
                    untouched = True
                    if connection.closed:
                        waiting.popleft()
                        untouched = False
                    raise
        finally:
            if untouched:
                pass  # `look` tries again: at once there would be no more memory than now
            elif waiting:  # the next one may be served even if this one could not
                self.want_room()
            else:
                self._state.note_if_nobody_is_connected()
                self._resume_accepting()

    def take_out(self, then: Callable[[Connection], Any]) -> list[Connection]:
        """Take those connections out of the queue that were to be passed to `then`."""
        waiting = self._state.waiting
        found = [connection for connection, their in waiting if their == then]
        for one in [one for one in waiting if one[1] == then]:
            waiting.remove(one)
        return found

    def look(self) -> None:
        """Let in connections that were missed because memory ran out. Called once a second."""
        places = self.places
        if self._state.waiting and (self.has_room() or (places.taken >= places.size and not self._is_linked)):
            self.let_in()

    def _resume_accepting(self) -> None:
        if self._state.now is State.SERVING:
            for acceptor in self._state.acceptors:
                acceptor.resume()

    def left_in_child(self) -> None:
        """Forget all that wait. Called in a forked child."""
        self._pool.left_in_child()
        self.places = self._pool.places
        self._connections = self._state.connections
        self._is_linked = False
        self.service = self.fleet = None
