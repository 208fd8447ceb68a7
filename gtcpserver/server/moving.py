"""Moving: what the handover of connections to other workers needs of a server.

Which connections may leave, how one is taken over and served, and that each is counted once.
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from socket import getdefaulttimeout
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from gevent.hub import get_hub

from gtcpserver.connection.blocks import Idle
from gtcpserver.connection.connection import Connection, session_of
from gtcpserver.connection.lifecycle import make
from gtcpserver.connection.moving import BUSY, GREENLET, drop, give_state, state_of, why_not
from gtcpserver.connection.tunnels import add_relay, drop_relay, end_relay, give_relay, kind_in, kind_of, relay_of
from gtcpserver.connection.tunnels import why_not as why_not_tunnel
from gtcpserver.process.descriptors import close_descriptor

from .acceptor import make as make_any
from .idle import PlacelessIdle
from .observers import Observers
from .state import ServerState, State
from .timed_idle import TimedIdle

if TYPE_CHECKING:
    from gtcpserver.transfer.relay import Relay

    from .capacity import Capacity
    from .options import Options
    from .time_limits import TimeLimits

#: Reasons for which a server does not take a connection over. Those for which it might later are in FOR_NOW.
FULL, STOPPING, STATE, DESCRIPTORS, LISTENER = "full", "stopping", "state", "descriptors", "listener"
FOR_NOW = frozenset({BUSY, FULL, STOPPING, DESCRIPTORS, "client_connections", "time", "gone"})

#: Descriptors that stay free for clients of its own, and for the program's files, or a tenth of RLIMIT_NOFILE.
LEAST_FREE = 32

#: Seconds between two looks at RLIMIT_NOFILE.
LIMIT_SECONDS = 1.0


class Refused(Exception):
    """This server does not take a connection over.

    Attributes:
        why: the reason, a word.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Mover(Protocol):
    """Moves the connections of a server that stops to other workers; set by the worker as ``Server.mover``."""

    def began_relay(self, connection: Connection) -> None:
        """Move a connection whose handler is about to wait for a relay, if this server leaves."""

    def takes(self, connection: Connection) -> bool:
        """Return whether the mover sees to an idle connection, which must not be ended as idle."""

    def became_idle(self, connection: Connection) -> bool:
        """Move a connection that becomes idle, in its handler's greenlet; may wait. As `takes` if it stays.

        Raises:
            HandedOver: it has moved.
        """

    def staying(self) -> dict[str, int]:
        """Return the open connections of a server that leaves, by the reason why they have not moved; else {}."""

    def is_moving(self) -> bool:
        """Return whether a connection was given away that no other worker has said to serve."""

    def hasten(self) -> None:
        """Leave connections that no worker takes to the stop, which ends them."""

    def stop(self) -> None:
        """Move no more."""


class MovableIdle(PlacelessIdle):
    """An idle block that knows whether its wait was given bytes: then a request has begun."""

    __slots__ = ("_kept", "_received")

    def __enter__(self) -> None:
        stream = self.connection.stream
        self._received = stream.bytes_received
        self._kept = stream.kept
        PlacelessIdle.__enter__(self)

    def was_given_bytes(self) -> bool:
        stream = self.connection.stream
        # recv_until takes what was read ahead into its own hands while it waits for more.
        return bool(stream.bytes_received != self._received or stream.kept != self._kept)


class MovableTimedIdle(TimedIdle):
    """The same of a server with observers."""

    __slots__ = ("_kept", "_received")

    def __enter__(self) -> None:
        stream = self.connection.stream
        self._received = stream.bytes_received
        self._kept = stream.kept
        TimedIdle.__enter__(self)

    def was_given_bytes(self) -> bool:
        stream = self.connection.stream
        return bool(stream.bytes_received != self._received or stream.kept != self._kept)


def make_idle(connection: Connection, state: ServerState, capacity: Capacity, observers: Observers) -> Idle:
    """Make the idle block of a connection that may move."""
    if observers.all:
        return MovableTimedIdle(connection, state, capacity, observers)
    return MovableIdle(connection, state, capacity)


class Moving:
    """The server's side of handovers.

    Args:
        serve: runs a connection's handler in the greenlet that calls it, and ends the connection.
        end_idle: ends an idle connection as a stop does.

    Attributes:
        moved, taken_over, tunnels: as in ServerStats.
        leaves: whether this server gives all its connections away, and takes none.
        expected: number of connections taken over whose handlers have not begun: a stop waits for them, too.
    """

    def __init__(
        self,
        server: Any,
        options: Options,
        state: ServerState,
        capacity: Capacity,
        serve: Callable[[Connection], Any],
        time_limits: TimeLimits,
        end_idle: Callable[[Connection], Any],
    ) -> None:
        self._server = server
        self._options = options
        self._state = state
        self._capacity = capacity
        self._serve = serve
        self._time_limits = time_limits
        #: Ends an idle connection as a stop does.
        self.end_idle = end_idle
        self.moved = self.taken_over = self.tunnels = 0
        self.leaves = False
        self.expected = 0
        self._look_at = self._descriptors = 0.0

    # -- connections that leave --------------------------------------------------------------------------------------

    def connections(self) -> list[Connection]:
        return list(self._state.connections)

    def why_not(self, connection: Connection, me: Any = None) -> str:
        """Return why a connection cannot move now; "" if it can.

        Args:
            me: the greenlet that is about to wait for it, if it does not yet.
        """
        worker = self._state.connections.get(connection)
        if worker is None or connection.closed:
            return BUSY
        session = session_of(connection)
        if session is not None and session.stays:
            return session.stays
        relay = relay_of(connection)
        if relay is not None:
            return why_not_tunnel(connection, relay, worker)
        why = why_not(connection, worker)
        if why:
            return why
        block = connection.idle_block
        if not (isinstance(block, (MovableIdle, MovableTimedIdle)) and block.active):
            return BUSY
        if me is not None:
            return "" if me is worker else GREENLET
        if connection.stream.reader() is not worker or block.was_given_bytes():
            return BUSY
        return ""

    def note_relay(self, connection: Connection, before: Relay | None, relay: Relay | None) -> None:
        """Note the relay that would move with a connection from now on, and the one before; None: none."""
        self.tunnels += (relay is not None) - (before is not None)
        if relay is not None and self._server.mover is not None:
            with suppress(MemoryError):  # the mover looks again; the tunnel goes on here
                self._server.mover.began_relay(connection)

    def may_move(self, connection: Connection) -> bool:
        """Return whether it waits where a connection may move from: it is idle, or a tunnel, which can move now."""
        return (connection.is_idle or relay_of(connection) is not None) and not self.why_not(connection)

    def worker_of(self, connection: Connection) -> Any:
        """Return the greenlet of its handler; None: it has ended."""
        return self._state.connections.get(connection)

    def state_of(self, connection: Connection) -> dict[str, Any]:
        """Return its state, JSON values but for what the program has put into it."""
        state = state_of(connection)
        left = self._time_limits.left(connection)
        if left is not None:
            state["handler_left"] = left
        admission = self._state.admission
        if admission is not None and (counted_as := admission.counted_as(connection)) is not None:
            state["counted_as"] = list(counted_as)
        state["kind"] = kind_of(connection)
        relay = relay_of(connection)
        if relay is not None:
            add_relay(state, connection, relay)
        return state

    def given_away(self, connection: Connection) -> None:
        """Note that it is another worker's now: it counts there, and its line in the access log is written there."""
        state = self._state
        if state.admission is not None:
            state.admission.left(connection)
        if self._options.access_log is not None:
            self._options.access_log.forget(connection)
        self.moved += 1
        state.unserved += 1  # the report of a stop leaves it out: it has not finished here

    # -- connections that come ---------------------------------------------------------------------------------------

    def take(self, state: Mapping[str, Any], fds: list[int], returns: bool = False) -> Connection:
        """Make a connection of another worker's descriptors; it counts here from now on. Call in the hub.

        Args:
            state: as `state_of` returned it, by way of JSON.
            fds: the descriptors, which belong to the connection from now on; closed if that fails.
            returns: this server gave it away itself, and nobody has it: no limit applies.

        Raises:
            Refused: this server cannot have it.
        """
        try:
            return self._take(state, fds, returns)
        finally:
            while fds:
                close_descriptor(fds.pop())

    def _take(self, state: Mapping[str, Any], fds: list[int], returns: bool) -> Connection:
        try:
            if not returns:
                self._check_room(max(fds), tunnel="relay" in state)
            kind = kind_in(state["kind"])
        except Exception as error:
            raise error if isinstance(error, Refused) else Refused(STATE) from None
        connection_class = self._options.connection_class
        # Its descriptor does not block: the flag belongs to the socket, not to the process.
        if connection_class is Connection:
            connection = make(connection_class, kind, fds.pop(0), get_hub(), getdefaulttimeout())
        else:
            connection = make_any(connection_class, kind, fds.pop(0))
        try:
            connection.server = self._server
            connection.context = self._options.context
            give_state(connection, state)
            if not returns:
                self._check_handler(connection)
            self._count(connection, state, returns)
            if "relay" in state:
                give_relay(connection, state, fds)
        except Exception as error:
            if self._state.admission is not None:
                self._state.admission.left(connection)
            drop(connection)
            raise error if isinstance(error, Refused) else Refused(STATE) from None
        self.expected += 1
        return connection

    def _check_room(self, fd: int, tunnel: bool) -> None:
        state, most, places = self._state, self._options.max_connections, self._capacity.places
        # Two that leave would give a tunnel to each other for ever, as fast as they can.
        if self.leaves or state.now is not State.SERVING:
            raise Refused(STOPPING)
        # The handler of a tunnel keeps its place.
        if state.waiting or places.taken + (self.expected if tunnel else 0) >= places.size:
            raise Refused(FULL)
        # Where all workers count together, a connection that moves is in the count.
        if self._capacity.service is None and most is not None and len(state.connections) + self.expected >= most:
            raise Refused(FULL)
        if fd >= self._most_descriptors():  # the kernel gives the lowest number that is free
            raise Refused(DESCRIPTORS)

    def _check_handler(self, connection: Connection) -> None:
        may_take_over = getattr(self._server.handler, "may_take_over", None)
        if may_take_over is not None and not may_take_over(connection):
            raise Refused(LISTENER)

    def _most_descriptors(self) -> float:
        now = monotonic()
        if now >= self._look_at:  # 1 us for each connection otherwise
            self._look_at = now + LIMIT_SECONDS
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            self._descriptors = inf if limit == resource.RLIM_INFINITY else limit - max(LEAST_FREE, limit // 10)
        return self._descriptors

    def _count(self, connection: Connection, state: Mapping[str, Any], returns: bool) -> None:
        admission = self._state.admission
        if admission is not None:
            refusal = admission.resume(connection, state.get("counted_as"), returns)
            if refusal is not None:
                raise Refused(refusal)
        left = state.get("handler_left")
        if left is not None:
            self._time_limits.resume(connection, float(left))

    def drop(self, connection: Connection) -> None:
        """Let go of a connection that was taken and is served by another process: close only the descriptor."""
        self.expected -= 1
        if self._state.admission is not None:
            self._state.admission.left(connection)
        drop_relay(connection)
        drop(connection)

    def begin(self, connection: Connection, returns: bool = False) -> None:
        """Begin its handler as soon as there is room. Call in the hub."""
        state = self._state
        self.expected -= 1
        # What was moved elsewhere was counted there.
        state.bytes_received -= connection.bytes_received
        state.bytes_sent -= connection.bytes_sent
        state.unserved -= 1  # as if it had been accepted
        self.moved -= returns
        self.taken_over += not returns
        state.note_somebody_comes()
        places = self._capacity.places
        # A tunnel waits for no place that another client has taken meanwhile: both its sides would be silent.
        if places.taken < places.size or connection.relayed_to is not None:
            self._run(connection)
        else:
            self._capacity.wait(connection, self._run)

    def _run(self, connection: Connection) -> None:
        try:
            self._options.pool.run_one(self._serve, connection)
        except BaseException:
            if not connection.closed:  # memory ran out: a reset tells the client
                end_relay(connection)
                connection.abort()
                if self._state.admission is not None:
                    self._state.admission.left(connection)
                self._state.note_unserved()
            raise


def with_hooks_once(options: Options) -> Options:
    """Return the options with hooks that are called once in the life of a connection, wherever it moves.

    The last one also ends a relay that has come with a connection, and that its handler has not gone on with.
    """
    on_connect, on_disconnect = options.on_connect, options.on_disconnect

    def connected(connection: Connection) -> bool | None:
        return True if connection.resumed or on_connect is None else on_connect(connection)

    def disconnected(connection: Connection) -> None:
        end_relay(connection)
        session = session_of(connection)
        if on_disconnect is not None and not (session is not None and session.moved):
            on_disconnect(connection)

    return dataclasses.replace(
        options,
        on_connect=None if on_connect is None else connected,
        on_disconnect=disconnected,
    )
