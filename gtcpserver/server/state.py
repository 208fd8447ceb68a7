"""The state that the parts of a server share: its stage of life, its connections, its counters.

Nothing here makes decisions. Each attribute names the parts that write it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from gevent.event import Event

from gtcpserver.process.forked import keep

if TYPE_CHECKING:
    from gtcpserver.admission.admission import Admission
    from gtcpserver.connection.connection import Connection
    from gtcpserver.listening.listener import Listener

    from .acceptor import Acceptor


class State(Enum):
    """The stages in the life of a server."""

    NEW = "new"
    SERVING = "serving"
    STOPPING = "stopping"
    STOPPED = "stopped"


#: Every change of state, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
STATE_CHANGES = {
    (State.NEW, State.SERVING): "`start()`, or `serve_forever()`",
    (State.NEW, State.STOPPED): "`stop()` before the start",
    (State.SERVING, State.STOPPING): "`stop()`, a signal, the last of `max_accepts`, or the loss of a listening socket",
    (State.STOPPING, State.STOPPED): "nobody is connected, or the time of the stop is over and handlers were ended",
    (State.SERVING, State.STOPPED): "fork in a handler: nothing of the server is in the child",
}


@dataclass(slots=True)
class Counters:
    """The counters of a running server; :class:`ServerStats` explains each."""

    rejected: int = 0
    refused: int = 0
    left_in_queue: int = 0
    handler_errors: int = 0
    resets: int = 0
    timeouts: int = 0
    limits_exceeded: int = 0
    slow_clients: int = 0
    handler_timeouts: int = 0
    idle_closed: int = 0
    accept_errors: int = 0
    queue_wait_samples: int = 0
    queue_wait_total: float = 0.0
    queue_wait_max: float = 0.0
    proxy_header_failures: Counter[str] = field(default_factory=Counter)
    handshake_failures: Counter[str] = field(default_factory=Counter)
    tls_floods: Counter[str] = field(default_factory=Counter)


class ServerState:
    """The state of one server. The parts that write an attribute are in parentheses.

    Attributes:
        now: the stage of its life; changed by :meth:`become`.
        started_at: monotonic time of the start; 0.0 before.
        groups: listening sockets of each address (Server).
        acceptors: open accept loops (Server, Stopping).
        counters: written by every part.
        accepted, peak, bytes_received, bytes_sent: as in :class:`ServerStats`, the bytes without those of connections
            that are open. Apart from the other counters, as every connection changes them (Serving).
        unserved: number of accepted connections that ended before a handler got them; written by
            :meth:`note_unserved`.
        connections: connections that have a handler, in order of arrival, each with the handler's greenlet (Serving).
        waiting: connections that wait for room, in order of arrival, each with the function to call when there is room
            (Capacity).
        admission: connections in admission; None: this server needs no admission.
        wants_idle: called with each connection that becomes idle; None: nothing is called (Capacity, Stopping).
        stopping_event: set when a stop begins (Stopping, also the next three).
        listening_ended: set when the listening sockets are closed.
        stopped: set when everything has ended.
        hurry: set when a stop must not wait any longer.
    """

    EVENTS = ("stopping_event", "listening_ended", "stopped", "hurry")

    def __init__(self) -> None:
        self.now = State.NEW
        self.started_at = 0.0
        self.groups: list[list[Listener]] = []
        self.acceptors: list[Acceptor] = []
        self.counters = Counters()
        self.accepted = self.unserved = self.peak = 0
        self.bytes_received = self.bytes_sent = 0
        self.connections: dict[Connection, Any] = {}
        self.waiting: deque[tuple[Connection, Callable[[Connection], Any]]] = deque()
        self.admission: Admission | None = None
        self.wants_idle: Callable[[Connection], Any] | None = None
        self.stopping_event = Event()
        self.listening_ended = Event()
        self.stopped = Event()
        self.hurry = Event()
        # Made at the first wait: a server whose handlers do not wait is empty between two connections.
        self._nobody: Event | None = None

    def become(self, state: State) -> None:
        """Change to a state that may follow the current one (:data:`STATE_CHANGES`)."""
        assert (self.now, state) in STATE_CHANGES, (self.now, state)
        self.now = state

    @property
    def stopping(self) -> bool:
        """True from the beginning of a stop."""
        return self.now in (State.STOPPING, State.STOPPED)

    def somebody_is_connected(self) -> bool:
        return bool(self.connections or self.waiting or self.admission)

    @property
    def nobody_connected(self) -> Event:
        """Return an event that is set while nobody is connected."""
        if self._nobody is None:
            self._nobody = Event()
            self.note_if_nobody_is_connected()
        return self._nobody

    def note_somebody_comes(self) -> None:
        if self._nobody is not None:
            self._nobody.clear()

    def note_if_nobody_is_connected(self) -> None:
        if self._nobody is not None and not (self.connections or self.waiting or self.admission):
            self._nobody.set()

    def note_unserved(self) -> None:
        """Count an accepted connection that ended before a handler got it."""
        self.unserved += 1
        self.note_if_nobody_is_connected()

    @property
    def begun(self) -> int:
        """Number of handlers begun since the start. Derived, so that it costs a connection nothing."""
        under_way = len(self.admission) if self.admission is not None else 0
        return self.accepted - self.unserved - under_way - len(self.waiting)

    def idle_connections(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.is_idle]

    def left_in_child(self, own: Connection | None) -> None:
        """Stop, and let go of all connections but that of the handler that forked. Called in a forked child."""
        for connection in (*self.connections, *(one for one, _ in self.waiting)):
            if connection is not own:
                connection.left_by_child()
        keep(self.connections, self.waiting)
        self.connections, self.waiting = {}, deque()
        self.wants_idle = None
        self.now = State.STOPPED
        keep(self._nobody)
        self._nobody = None
        for name in self.EVENTS:
            keep(getattr(self, name))  # greenlets that wait for it are copies
            event = Event()
            event.set()
            setattr(self, name, event)
