"""The state of a server, which its parts share: where in its life it is, who is connected, what was counted.

Nothing here decides anything. What a part writes is said at the attribute.
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
    """The life of a server."""

    NEW = "new"
    SERVING = "serving"
    STOPPING = "stopping"
    STOPPED = "stopped"


#: Every change of state there is, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
STATE_CHANGES = {
    (State.NEW, State.SERVING): "`start()`, or `serve_forever()`",
    (State.NEW, State.STOPPED): "`stop()` before the start",
    (State.SERVING, State.STOPPING): "`stop()`, a signal, the last of `max_accepts`, or the loss of a listening socket",
    (State.STOPPING, State.STOPPED): "nobody is connected, or the time of the stop is over and handlers were ended",
    (State.SERVING, State.STOPPED): "fork in a handler: nothing of the server is in the child",
}


@dataclass(slots=True)
class Counters:
    """What a server counts while it runs; :class:`ServerStats` says what each is."""

    accepted: int = 0
    peak: int = 0
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
    bytes_received: int = 0
    bytes_sent: int = 0
    queue_wait_samples: int = 0
    queue_wait_total: float = 0.0
    queue_wait_max: float = 0.0
    proxy_header_failures: Counter[str] = field(default_factory=Counter)
    handshake_failures: Counter[str] = field(default_factory=Counter)
    tls_floods: Counter[str] = field(default_factory=Counter)


class ServerState:
    """Shared by the parts of one server.

    Attributes:
        now: where in its life it is; changed by :meth:`become`.
        started_at: monotonic; 0.0 before the start.
        groups: the listening sockets of each address (Server).
        acceptors: the accept loops that are open (Server, Stopping).
        counters: written by every part.
        unserved: accepted connections that left before a handler got them; written by :meth:`note_unserved`.
        connections: those that have a handler, in the order they came, and its greenlet (Serving).
        waiting: those that wait for room, in the order they came, and what is called with each when there is some
            (Capacity).
        admission: those that have something to do before a handler gets them; None: there is nothing to do.
        nobody_connected: set while there are none of these three.
        wants_idle: called with a connection that becomes idle; None: nobody wants to know (Capacity, Stopping).
        stopping_event: set when a stop begins (Stopping, as the next three).
        listening_ended: set when the listening sockets are closed.
        stopped: set when all has ended.
        hurry: set when a stop is to wait for nobody any more.
    """

    EVENTS = ("stopping_event", "listening_ended", "stopped", "hurry", "nobody_connected")

    def __init__(self) -> None:
        self.now = State.NEW
        self.started_at = 0.0
        self.groups: list[list[Listener]] = []
        self.acceptors: list[Acceptor] = []
        self.counters = Counters()
        self.unserved = 0
        self.connections: dict[Connection, Any] = {}
        self.waiting: deque[tuple[Connection, Callable[[Connection], Any]]] = deque()
        self.admission: Admission | None = None
        self.wants_idle: Callable[[Connection], Any] | None = None
        self.stopping_event = Event()
        self.listening_ended = Event()
        self.stopped = Event()
        self.hurry = Event()
        self.nobody_connected = Event()
        self.nobody_connected.set()

    def become(self, state: State) -> None:
        """Go on to a state that may follow (:data:`STATE_CHANGES`)."""
        assert (self.now, state) in STATE_CHANGES, (self.now, state)
        self.now = state

    @property
    def stopping(self) -> bool:
        """True from the moment a stop has begun."""
        return self.now in (State.STOPPING, State.STOPPED)

    def somebody_is_connected(self) -> bool:
        return bool(self.connections or self.waiting or self.admission)

    def note_if_nobody_is_connected(self) -> None:
        if not (self.connections or self.waiting or self.admission):
            self.nobody_connected.set()

    def note_unserved(self) -> None:
        """An accepted connection has left before a handler got it."""
        self.unserved += 1
        self.note_if_nobody_is_connected()

    @property
    def begun(self) -> int:
        """Handlers begun since the start. Derived, so that it costs a connection nothing."""
        under_way = len(self.admission) if self.admission is not None else 0
        return self.counters.accepted - self.unserved - under_way - len(self.waiting)

    def idle_connections(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.is_idle]

    def left_in_child(self, own: Connection | None) -> None:
        """In a forked child: nobody is connected there but the one whose handler has forked, and all has ended."""
        for connection in (*self.connections, *(one for one, _ in self.waiting)):
            if connection is not own:
                connection.left_by_child()
        keep(self.connections, self.waiting)
        self.connections, self.waiting = {}, deque()
        self.wants_idle = None
        self.now = State.STOPPED
        for name in self.EVENTS:
            keep(getattr(self, name))  # who waits for it is a copy
            event = Event()
            event.set()
            setattr(self, name, event)
