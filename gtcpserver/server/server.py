"""Server: puts listeners, accept loops, pool and connections together, and owns their life.

Reads in the order things happen: construct, start, admit a connection, serve it, stop.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from math import inf
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import gevent
from gevent.event import Event
from gevent.hub import get_hub
from gevent.lock import Semaphore
from greenlet import GreenletExit, getcurrent

from gtcpserver.address import check_none_twice
from gtcpserver.admission.admission import Lobby
from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.callables import check_handler, check_hook
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.connection.connection import Connection, Idle
from gtcpserver.connection.lingering import LOOK_SECONDS, Linger
from gtcpserver.diagnostics.block_detector import blocked_so_far
from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.errors import ClientRefused, ConfigError, GtcpServerError
from gtcpserver.listening.listener import (
    ListenConfig,
    Listener,
    forget_member,
    open_listeners,
    steer,
)
from gtcpserver.plural import counted
from gtcpserver.pool.places import check_size
from gtcpserver.pool.pool import DEFAULT_SIZE, HandlerPool
from gtcpserver.process.event_loop import check_event_loop
from gtcpserver.process.forked import end_process, keep, register, runs_handler
from gtcpserver.process.standard_descriptors import open_standard_descriptors
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.signatures import ConnectionT, Handler, OnFull
from gtcpserver.tls import Credentials
from gtcpserver.transfer.ends import reset_on_close

from .acceptor import Acceptor
from .access_log import AccessLog, Result
from .background import end_background_work, threads_of_handlers_are_no_daemons
from .idle import PlacelessIdle
from .observers import Observer, Observers
from .outcome import COUNTER, log_client_error, log_fault, outcome_of, system_has_failed
from .signals import StopSignals
from .stats import Counters, CutConnection, ServerStats, StopReport
from .stopping import (
    KILL_SECONDS,
    LONGEST_DRAIN,
    LONGEST_DRAIN_OF_DEFERRED,
    Steps,
    describe,
    drain_and_close,
    end_handlers,
)
from .time_limits import Overseer
from .timed_idle import TimedIdle

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

    from typing_extensions import Self, Unpack, overload  # which type checkers have

    from gtcpserver.address import ListenAddress
    from gtcpserver.signatures import ServerOptions
    from gtcpserver.tls import HandshakeFailure, TLSConfig

log = logging.getLogger("gtcpserver")

#: One accepted connection in so many has its time in the queue measured: getsockopt(TCP_INFO) costs 0.8 us.
QUEUE_WAIT_EVERY = 64

DEFAULT_STOP_TIMEOUT = 30.0

#: Above it a handler's counter is none: Python itself does not print integers of thousands of digits.
LARGEST_COUNTER = 2**63

#: Seconds between two looks whether every accept loop is armed. One that is not, at two of them, starts again.
WATCHDOG_SECONDS = 1.0

#: Seconds until a stop that waits for connections looks by itself whether there are any.
LONGEST_WITHOUT_A_LOOK = 1.0

#: Seconds that the hook on_stop gets at least, if nothing is left of the time of the stop.
ON_STOP_SECONDS = 1.0

#: Seconds from accept in which a stop leaves alone a connection that has not sent a byte: its first request is on its
#: way, and to close now would lose it. A round trip around the world takes 0.3 s; a TLS handshake takes two more.
FIRST_REQUEST = 1.0
FIRST_REQUEST_OVER_TLS = 2.0


class State(Enum):
    """The life of a server."""

    NEW = "new"
    SERVING = "serving"
    STOPPING = "stopping"
    STOPPED = "stopped"


#: Every change of state there is, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
STATE_CHANGES = {
    (State.NEW, State.SERVING): "`start()`, or `serve_forever()`",
    (State.SERVING, State.NEW): "an accept loop cannot start: everything is closed again, and the error is raised",
    (State.NEW, State.STOPPED): "`stop()` before the start",
    (State.SERVING, State.STOPPING): "`stop()`, a signal, the last of `max_accepts`, or the loss of a listening socket",
    (State.STOPPING, State.STOPPED): "nobody is connected, or the time of the stop is over and handlers were ended",
    (State.SERVING, State.STOPPED): "fork in a handler: nothing of the server is in the child",
}


class Server:
    """A TCP server: each connection runs ``handler(connection)`` in a greenlet of its own, then it is closed.

    Args:
        address: where to listen: "127.0.0.1:5000", "[::1]:443", ``"*:80"`` (IPv4 and IPv6), "name:80",
            "unix:/run/x.sock", "fd:3", a port (on 127.0.0.1), a (host, port) tuple, a listening socket; or a list of
            these.
        handler: called with the :class:`Connection`. It may block: reads, writes, sleeps and, in a monkey-patched
            program, everything else cooperate. What it returns is not used. Async functions, generators and classes are
            refused. An object may also have ``server_stopped()``, called when the server has stopped, and
            ``counters``, a mapping of names to numbers that appears in :meth:`stats`.
        listen: options of the listening sockets.
        accept_loops: listening sockets with an accept loop each, for every TCP address. One is best in one process:
            measured, more make no connection faster, and each has a queue of its own to drain at a stop.
        pool: a HandlerPool (which several servers may share), or the number of handlers that may run at once, or None
            for no limit.
        on_full: when the pool (or ``max_connections``) is full: "wait" leaves new connections in the kernel's queue,
            "reject" accepts and closes them, "close_idle" closes the oldest connection that is idle
            (:meth:`Connection.idle`) when ``max_connections`` is reached, and otherwise waits.
        max_connections: connections open at once, idle ones included; None for no limit.
        max_accepts: serve exactly so many connections, then stop; None for no limit.
        timeout: seconds in which nothing moves until a read or write raises TimeoutError; ``settimeout`` of each new
            connection. None waits for ever.
        handler_timeout: seconds a handler may take in all; then DeadlineExceeded is raised in it wherever it waits.
        min_rate: bytes a second (both directions together). A handler that has waited for its client all through
            ``min_rate_window`` while less moved is ended: clients that drip cannot hold places.
        min_rate_window: seconds.
        tls: a TLSConfig or ssl.SSLContext: every connection is encrypted before the handler gets it.
        proxy_protocol: clients come by balancers that name them (:class:`ProxyProtocol`); None: they do not.
        client_limits: who may connect, how many connections a client may have and how fast it may open them
            (:class:`ClientLimits`); None: no limits.
        linger: seconds a closed connection may take to be closed by the peer too, so that everything written reaches
            it; 0 closes at once. A stop waits no longer for a peer that has acknowledged everything and is silent.
        connection_class: a subclass of Connection for the handler to get.
        context: anything; each connection has it as ``connection.context``.
        access_log: write a line when a connection has ended: "text", "json", or an :class:`AccessLog` for a file. None:
            no lines, and no cost.
        on_connect: called first in the connection's greenlet; if it returns False the connection is closed unserved.
        on_disconnect: called in the connection's greenlet when the handler has ended, before the connection is closed.
        on_error: called with (connection, exception) for every exception that left the handler, instead of the log;
            :func:`is_client_error` tells those that the client is to blame for.
        on_stop: called with this server at a stop, when the last connection has ended, to end helpers and to flush what
            they hold. It has what is left of the stop's time, and a second at least.

    Raises:
        ConfigError: an option that cannot work; the message names it.
    """

    if TYPE_CHECKING:
        # To type checkers the handler and the hooks are for connections of connection_class.
        @overload
        def __init__(
            self, address: ListenAddress | list[Any], handler: Handler[Connection], **options: Unpack[ServerOptions]
        ) -> None: ...
        @overload
        def __init__(
            self,
            address: ListenAddress | list[Any],
            handler: Handler[ConnectionT],
            *,
            connection_class: type[ConnectionT],
            **options: Unpack[ServerOptions[ConnectionT]],
        ) -> None: ...

    def __init__(
        self,
        address: ListenAddress | list[Any],
        handler: Handler[ConnectionT],
        *,
        listen: ListenConfig | None = None,
        accept_loops: int = 1,
        pool: HandlerPool | int | None = DEFAULT_SIZE,
        on_full: OnFull = "wait",
        max_connections: int | None = None,
        max_accepts: int | None = None,
        timeout: float | None = None,
        handler_timeout: float | None = None,
        min_rate: float | None = None,
        min_rate_window: float = 10.0,
        linger: float = 2.0,
        tls: TLSConfig | ssl.SSLContext | Credentials | None = None,
        proxy_protocol: ProxyProtocol | None = None,
        client_limits: ClientLimits | None = None,
        connection_class: type[ConnectionT] = Connection,  # type: ignore[assignment]
        context: Any = None,
        access_log: AccessLog | Literal["text", "json"] | None = None,
        on_connect: Callable[[ConnectionT], bool | None] | None = None,
        on_disconnect: Callable[[ConnectionT], None] | None = None,
        on_error: Callable[[ConnectionT, BaseException], None] | None = None,
        on_stop: Callable[[Server], None] | None = None,
    ) -> None:
        open_standard_descriptors()
        check_event_loop()
        check_handler(handler)
        check_hook("on_connect", on_connect)
        check_hook("on_disconnect", on_disconnect)
        check_hook("on_error", on_error)
        check_hook("on_stop", on_stop)
        check_whole_number("accept_loops", accept_loops, least=1)
        check_whole_number("max_connections", max_connections, least=1, none="for no limit")
        check_whole_number("max_accepts", max_accepts, least=1, none="for no limit")
        check_number("timeout", timeout, above=0, none="to wait for ever")
        check_number("handler_timeout", handler_timeout, above=0, none="for no limit")
        check_number("min_rate", min_rate, above=0, none="for no limit")
        check_number("min_rate_window", min_rate_window, above=0)
        check_number("linger", linger, least=0)
        if isinstance(address, list) and not address:
            raise ConfigError("address must name at least one place to listen, got []")
        if on_full not in ("wait", "reject", "close_idle"):
            raise ConfigError(f'on_full must be "wait", "reject" or "close_idle", got {on_full!r}')
        if not (isinstance(connection_class, type) and issubclass(connection_class, Connection)):
            raise ConfigError(f"connection_class must be a subclass of Connection, got {connection_class!r}")
        if not isinstance(pool, HandlerPool):
            try:
                check_size(pool)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            if pool == 0:
                raise ConfigError("pool must have at least 1 place, or None for no limit, got 0")
            pool = HandlerPool(pool)
        if proxy_protocol is not None and not isinstance(proxy_protocol, ProxyProtocol):
            raise ConfigError(f"proxy_protocol must be a ProxyProtocol, got {proxy_protocol!r}")
        if client_limits is not None and not isinstance(client_limits, ClientLimits):
            raise ConfigError(f"client_limits must be a ClientLimits, got {client_limits!r}")
        if listen is not None and not isinstance(listen, ListenConfig):
            raise ConfigError(f"listen must be a ListenConfig, got {listen!r}")
        if access_log is not None and not isinstance(access_log, AccessLog):
            access_log = AccessLog(access_log)
        # connection_class makes every connection that they get.
        self.handler: Handler[Any] = handler
        self.pool = pool
        self.places = pool.places  # looked at once a request
        #: Certificates and keys; None on a plain server. ``reload_tls`` reads them again.
        self.tls = tls if tls is None or isinstance(tls, Credentials) else Credentials(tls)
        self.context = context
        self.timeout = timeout
        self.max_connections = max_connections
        self.max_accepts = max_accepts
        self.on_full: OnFull = on_full
        self.on_connect: Callable[[Any], bool | None] | None = on_connect
        self.on_disconnect: Callable[[Any], None] | None = on_disconnect
        self.on_error: Callable[[Any, BaseException], None] | None = on_error
        self.on_stop: Callable[[Server], None] | None = on_stop
        self.connection_class: type[Connection] = connection_class
        self.state = State.NEW
        #: Set when a stop begins. Handlers with work of their own wait on it.
        self.stopping_event = Event()
        #: Set when the listening sockets are drained and closed; handlers may run on.
        self.listening_ended = Event()
        #: The error of a listening socket that stopped the server.
        self.fatal_error: OSError | None = None
        self._asked_addresses: list[Any] = list(address) if isinstance(address, list) else [address]
        if len(self._asked_addresses) > 1:
            check_none_twice(self._asked_addresses)
        self._listen = listen if listen is not None else ListenConfig()
        self._accept_loops = accept_loops
        self._acceptors: list[Acceptor] = []
        self._groups: list[list[Listener]] = []
        self._counters = Counters()
        self._connections: dict[Connection, Any] = {}  # in the order they came -> their greenlet
        self._held: deque[Connection] = deque()  # accepted while draining, waiting for a place
        self._nobody_connected = Event()
        self._nobody_connected.set()
        self._stopped = Event()
        self._hurry = Event()
        self._closing_loops = Semaphore()
        self._client_limits = client_limits
        self._lobby: Lobby | None = None
        if self.tls is not None or proxy_protocol is not None or client_limits is not None:
            self._lobby = Lobby(
                proxy_protocol,
                client_limits,
                self.tls,
                self._serve_from_lobby,
                self._note_if_nobody_is_connected,
                self._counters.proxy_header_failures,
                self._counters.handshake_failures,
                access_log.write_unserved if access_log is not None else None,
            )
        self.lingerer = Linger(linger)
        self._observers = Observers()
        self._faults = FaultLimiter()
        self._overseer = Overseer(self._connections, handler_timeout, min_rate, min_rate_window)
        self._report: StopReport | None = None
        self._on_serving: Callable[[Server], object] | None = None  # run(): it listens, and signals are graceful stops
        self._stop_until: float | None = None  # monotonic
        self._ends_background_work = False
        self._patient = False  # the stop waits for first requests however long they take
        self._signalled_early = 0
        self._started_at = 0.0
        #: Seconds that handlers get when the listening socket is lost; ``serve_forever`` sets it to its own.
        self.stop_timeout: float | None = DEFAULT_STOP_TIMEOUT
        self._steps = Steps()
        self._stopping: Any = None
        self._spawn_stop: Callable[[], Any] = partial(gevent.spawn, int)
        self._signal_missed = 0  # there was no memory to begin a stop
        self._watchdog: Any = None
        self._deaf: set[Acceptor] = set()
        self._serve_bound = self._serve  # one bound method for all connections: 64 bytes each
        #: What writes a line when a connection has ended, or None.
        self.access_log = access_log
        if access_log is not None:
            # In the place of the others, so that it costs nothing where there is none.
            self._serve_bound = self._serve_and_log
            self._forget = self._forget_and_log  # type: ignore[method-assign]

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind, listen and accept. Returns at once; connections are served while this greenlet waits.

        Raises:
            OSError: the address cannot be had; the message names it and, where it can be known, who has it.
            GtcpServerError: the server was started before.
        """
        if self.state is not State.NEW:
            raise GtcpServerError(f"a server starts once; this one is {self.state.value}")
        listeners: list[Listener] = []
        try:
            for address in self._asked_addresses:
                group = open_listeners(address, self._listen, self._accept_loops)
                self._groups.append(group)
                listeners += group
            for listener in listeners:
                acceptor = Acceptor.on(
                    listener,
                    self._admit,
                    full=self._full,
                    place_wanted=self._wake_accept_loops_later,
                    on_fatal=self._listener_is_gone,
                    connection_class=self.connection_class,
                )
                self._acceptors.append(acceptor)
            register(self)
            self.state = State.SERVING
            self._started_at = monotonic()
            for acceptor in self._acceptors:
                acceptor.start()
        except BaseException:
            for acceptor in self._acceptors:
                acceptor.close()
            for listener in listeners:
                listener.close()
            self._acceptors.clear()
            self._groups.clear()
            self.state = State.NEW
            raise
        self._overseer.start()
        # It also keeps the event loop going while no accept loop can be watched: gevent ends one that waits for nothing
        # (LoopExit), and the program with it.
        self._watchdog = get_hub().loop.timer(WATCHDOG_SECONDS, WATCHDOG_SECONDS)
        self._watchdog.start(self._look_at_accept_loops)
        if self.tls is not None and self.tls.config is not None and self.tls.config.watch is not None:
            self.tls.watch(self.tls.config.watch)

    def serve_forever(self, stop_timeout: float | None = DEFAULT_STOP_TIMEOUT) -> StopReport:
        """Start if need be, and serve until stopped.

        In the main thread, in any of its greenlets, SIGTERM and SIGINT begin a graceful ``stop(stop_timeout)`` of all
        servers there; a second one is ``halt()``.

        Called by the main thread itself, and not by a greenlet, it takes its return for the end of the program: what
        handlers have left to threads, executors, greenlets and processes gets what is left of ``stop_timeout``, then it
        is cut, which the log and the report say. The interpreter's exit does not wait for it any more.

        Args:
            stop_timeout: seconds that handlers, and then background work, get to finish; None waits for ever.

        Returns:
            the report of the stop.

        Raises:
            OSError: as :meth:`start`, or the listening socket was lost.
        """
        check_number("stop_timeout", stop_timeout, least=0, none="to wait for ever")
        self.stop_timeout = stop_timeout
        is_main = threading.current_thread() is threading.main_thread() and getcurrent().parent is None
        if is_main:
            threads_of_handlers_are_no_daemons()
        # Signals are ours before anybody can connect: from then on the default, which is to die, would lose them.
        with StopSignals(lambda number: self._stop_by_signal(number, stop_timeout)):
            if self.state is State.NEW:
                self.start()
                if self._signalled_early:
                    self._stop_by_signal(self._signalled_early, stop_timeout)
            try:
                if self._on_serving is not None:
                    self._on_serving(self)
                self._stopped.wait()
            except BaseException:
                self.halt()
                raise
            if is_main:
                self._report = replace(self._wait_for_report(), background=self.end_background_work())
        if self.fatal_error is not None:
            raise self.fatal_error
        assert self._report is not None
        return self._report

    def _stop_by_signal(self, number: int, stop_timeout: float | None) -> None:
        name = signal.Signals(number).name
        if self.state is State.NEW:  # it waits for the address of a name
            if self._signalled_early:
                os._exit(128 + number)
            self._signalled_early = number
        elif self.state is State.STOPPING:
            log.warning("%s again: ending %s now", name, counted(len(self._connections), "handler"))
            self._hurry.set()
        elif self.state is State.STOPPED:
            log.warning("%s again: ending background work now", name)
            self._hurry.set()
        elif self.state is State.SERVING:
            log.info("%s: stopping, %s", name, counted(len(self._connections), "connection"))
            self._signal_missed = number
            self._begin_stop(stop_timeout)
            self._signal_missed = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop(DEFAULT_STOP_TIMEOUT)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the server listens, one entry an address, with the real ports, as ("127.0.0.1:5000",)."""
        seen = dict.fromkeys(listener.address for group in self._groups for listener in group)
        return tuple(seen)

    @property
    def address(self) -> str:
        """The first of :attr:`addresses`. Raises GtcpServerError before the start."""
        if not self._groups:
            raise GtcpServerError("the server has no address before it is started")
        return self.addresses[0]

    @property
    def port(self) -> int:
        """The port of the first address; 0 for a unix socket."""
        if not self._groups:
            raise GtcpServerError("the server has no port before it is started")
        sockaddr = self._groups[0][0].sockaddr
        return sockaddr[1] if isinstance(sockaddr, tuple) else 0

    @property
    def stopping(self) -> bool:
        """True from the moment a stop has begun."""
        return self.state in (State.STOPPING, State.STOPPED)

    def connections(self) -> Mapping[Connection, Any]:
        """Return the open connections as they are at each moment, the oldest first, and the greenlet of each.

        For this package.

        :meta private:
        """
        return MappingProxyType(self._connections)

    @property
    def active_connections(self) -> int:
        """Connections open now, idle ones included."""
        return len(self._connections)

    @property
    def accepted_connections(self) -> int:
        """Connections accepted since the start."""
        return self._counters.accepted

    def __repr__(self) -> str:
        where = ", ".join(self.addresses) or ", ".join(map(str, self._asked_addresses))
        return f"<{type(self).__name__} {where} {self.state.value}, {len(self._connections)} connections>"

    # -- admit a connection (in the hub) -----------------------------------------------------------------------------

    def _full(self) -> bool:
        """Asked before each accept. Hot for new connections: 0.2 us."""
        places = self.pool.places
        if places.taken < places.size and (
            self.max_connections is None or len(self._connections) < self.max_connections
        ):
            return False
        return self.on_full != "reject"

    def _close_an_idle_one(self) -> None:
        # There is room when its handler has returned, and the accept loops are told then. If none is idle, or the one
        # told to end has just got a request, the next that becomes idle makes them ask again.
        self._idle_wanted = True
        for connection in self._connections:
            if connection.is_idle and not connection.stream.ending:
                get_hub().loop.run_callback(self._end_if_idle, connection)
                return

    def _has_room(self) -> bool:
        places = self.pool.places
        return places.taken < places.size and (
            self.max_connections is None or len(self._connections) < self.max_connections
        )

    def _wake_accept_loops_later(self) -> None:
        places = self.pool.places
        if places.taken >= places.size:
            places.rawlink(self._wake_accept_loops)
        elif self.on_full == "close_idle":
            self._close_an_idle_one()
        # max_connections is reached: the end of a connection wakes them.

    def _look_at_accept_loops(self) -> None:
        """Once a second: whatever has stopped an accept loop without a reason, it starts again. So does a stop."""
        if self.state is State.STOPPING and self._stopping.dead and not self._stopped.is_set():
            self._stopping = self._spawn_stop()  # there was no memory to start its greenlet
        if self._signal_missed:
            self._stop_by_signal(self._signal_missed, self.stop_timeout)
        if self.state is not State.SERVING:
            return
        deaf = {acceptor for acceptor in self._acceptors if acceptor.is_deaf()}
        for acceptor in deaf & self._deaf:
            log.error("%s had stopped accepting without a reason; accepting again", acceptor.listener.address)
            acceptor.stop_accepting()
            acceptor.resume()
        self._deaf = deaf

    def _wake_accept_loops(self, _places: Any = None) -> None:
        if self.state is State.SERVING:
            for acceptor in self._acceptors:
                acceptor.resume()

    def _admit(self, connection: Connection, address: Any) -> None:
        """A connection was accepted: hand it to a worker, which runs until its handler first waits."""
        counters = self._counters
        if self.max_accepts is not None and counters.accepted >= self.max_accepts:
            connection.close()  # came between the last accept and the end of the loop
            return
        if self.on_full == "reject" and not self._has_room() and self.state is State.SERVING:
            counters.rejected += 1
            if self.access_log is not None:
                connection.client_address = address
                self.access_log.write_unserved(connection, "rejected")
            if not self.lingerer.take(connection.stream.sock):
                connection.close()
            return
        counters.accepted = number = counters.accepted + 1
        if not number % QUEUE_WAIT_EVERY:
            self._measure_queue_wait(connection)
        connection.client_address = address
        connection.server = self
        connection.context = self.context
        if self.timeout is not None:
            connection.timeout = self.timeout
        try:
            if self._lobby is None:
                self.pool.run_one(self._serve_bound, connection)
            else:
                self._nobody_connected.clear()
                self._lobby.enter(connection)
        except BaseException:
            # No memory to serve it with. A reset says so; an end in order would be an empty answer.
            try:
                connection.abort()
            finally:
                self._note_if_nobody_is_connected()
            raise
        finally:
            if number == self.max_accepts:
                for acceptor in self._acceptors:
                    acceptor.leaving = True
                    acceptor.stop_accepting()
                gevent.spawn(self._stop_after_last)

    def _serve_from_lobby(self, connection: Connection) -> None:
        """It has done in the lobby what there was to do."""
        waiting = self._waiting()
        if not waiting and self._has_room():
            self.pool.run_one(self._serve_bound, connection)
            return
        waiting.append(connection)
        if len(waiting) == 1:
            try:
                self._serve_waiting_later()
            except BaseException:
                waiting.clear()
                raise

    def _waiting(self) -> deque[Connection]:
        assert self._lobby is not None
        return self._lobby.waiting

    def _serve_waiting_later(self) -> None:
        places = self.pool.places
        if places.taken >= places.size:
            places.unlink(self._serve_waiting)  # once is enough
            places.rawlink(self._serve_waiting)
        elif self.on_full == "close_idle":
            self._close_an_idle_one()
        # max_connections is reached: the end of a connection wakes them.

    def _serve_waiting(self, _places: Any = None) -> None:
        waiting = self._waiting()
        assert self._lobby is not None
        try:
            while waiting and self._has_room():
                connection = waiting.popleft()
                try:
                    self.pool.run_one(self._serve_bound, connection)
                except BaseException:
                    self._lobby.not_served(connection)
                    raise
        finally:
            if waiting and self._has_room():  # one could not be served: the next may be
                get_hub().loop.run_callback(self._serve_waiting)
            elif waiting:
                self._serve_waiting_later()

    def client_named(self, connection: Connection) -> None:
        """For this package (connection/owner.py).

        :meta private:
        """
        refusal = self._lobby.named(connection) if self._lobby is not None else None
        if refusal is not None:
            self._note_end(connection, refusal)
            connection.abort()
            raise ClientRefused(refusal)

    def count_failed_handshake(self, kind: HandshakeFailure) -> None:
        """For this package (connection/owner.py).

        :meta private:
        """
        self._counters.handshake_failures[kind] += 1

    def count_tls_flood(self, kind: str) -> None:
        """For this package (connection/owner.py).

        :meta private:
        """
        self._counters.tls_floods[kind] += 1

    def _note_if_nobody_is_connected(self) -> None:
        if not (self._connections or self._held or self._lobby):
            self._nobody_connected.set()

    def reload_tls(self) -> None:
        """Read certificates and keys again; new handshakes use them, connections go on as they are.

        Raises:
            ConfigError: the server has no TLSConfig, or a file cannot be used; everything stays as it was.
        """
        if self.tls is None:
            raise ConfigError("reload_tls needs a server with tls, this one has none")
        self.tls.reload()

    def _measure_queue_wait(self, connection: Connection) -> None:
        # tcpi_last_data_sent (linux/tcp.h, milliseconds): nothing was sent yet, so it counts from the handshake.
        try:
            info = connection.stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 48)
        except OSError:
            return  # not TCP
        waited = struct.unpack_from("=I", info, 44)[0] / 1000
        counters = self._counters
        counters.queue_wait_samples += 1
        counters.queue_wait_total += waited
        counters.queue_wait_max = max(counters.queue_wait_max, waited)

    # -- serve it (in its worker) ------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        connections = self._connections
        try:
            if not connections:
                self._nobody_connected.clear()
            connections[connection] = getcurrent()
            if len(connections) > self._counters.peak:
                self._counters.peak = len(connections)
            try:
                if self.on_connect is None or self.on_connect(connection) is not False:
                    self.handler(connection)
                else:
                    self._counters.refused += 1
                    self._note_end(connection, "refused")
            except BaseException as error:
                self._handler_raised(connection, error)
            try:
                if self.on_disconnect is not None:
                    self.on_disconnect(connection)
            except BaseException as error:
                self._handler_raised(connection, error)
        finally:
            # Hooks and log handlers may wait, and be killed there.
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        """The last steps of a connection. Nothing in here waits, so a kill cannot come between; memory may be short."""
        counters = self._counters
        stream = connection.stream
        counters.bytes_received += stream.bytes_received
        counters.bytes_sent += stream.bytes_sent
        if self._observers.all:
            self._observe_end(connection)
        # It refers to the connection: no cycle for the garbage collector.
        connection.idle_block = None
        connections = self._connections
        was_full = self.max_connections is not None and len(connections) >= self.max_connections
        try:
            if not stream.closed:
                connection.end()
        finally:
            if self._client_limits is not None and self._lobby is not None:
                self._lobby.left(connection)
            try:
                del connections[connection]
            except KeyError:
                pass  # it could not be added
            try:
                if not connections:
                    self._note_if_nobody_is_connected()
            finally:
                if was_full:
                    if self._lobby is not None and self._lobby.waiting:
                        get_hub().loop.run_callback(self._serve_waiting)
                    self._wake_accept_loops()

    def _serve_and_log(self, connection: Connection) -> None:
        """:meth:`_serve`, with an access log."""
        assert self.access_log is not None
        try:
            self.access_log.begin(connection)
        except BaseException:
            Server._forget(self, connection)
            raise
        self._serve(connection)

    def _forget_and_log(self, connection: Connection) -> None:
        access_log = self.access_log
        assert access_log is not None
        try:
            fields = access_log.end(connection)
        finally:
            Server._forget(self, connection)
        access_log.write(fields)

    def _note_end(self, connection: Connection, result: Result, detail: str = "") -> None:
        if self.access_log is not None:
            self.access_log.note(connection, result, detail)

    def _handler_raised(self, connection: Connection, error: BaseException) -> None:
        """Count what left the handler; print it only if it is a fault of the handler."""
        counters = self._counters
        if isinstance(error, GreenletExit):
            self._note_end(connection, "stopped" if self.stopping else "killed")
            return
        if system_has_failed(error):
            # The client is there and waits for the rest. An end in order would make a part look like the whole.
            reset_on_close(connection)
        result, said = outcome_of(error, connection)
        setattr(counters, COUNTER[result], getattr(counters, COUNTER[result]) + 1)
        self._note_end(connection, result, said)
        if self.on_error is not None:
            try:
                self.on_error(connection, error)
                return
            except GreenletExit:
                return
            except BaseException as own:
                error, result = own, outcome_of(own, connection)[0]
        if result == "error":
            log_fault(self._faults, connection, error)
        else:
            log_client_error(connection, error)

    # -- idle connections --------------------------------------------------------------------------------------------

    def make_idle(self, connection: Connection) -> Idle:
        """For this package (connection/owner.py).

        :meta private:
        """
        observers = self._observers
        return TimedIdle(connection, self, observers) if observers.all else PlacelessIdle(connection, self)

    def add_observer(self, observer: Observer) -> None:
        """Tell an observer how long requests take, for monitors. Several may observe one server.

        :meta private:
        """
        self._observers.add(observer)

    def remove_observer(self, observer: Observer) -> None:
        """The opposite of :meth:`add_observer`; one that is not registered does no harm.

        :meta private:
        """
        self._observers.remove(observer)

    def _observe_end(self, connection: Connection) -> None:
        """Its last request ends with it, or it was one."""
        idle = connection.idle_block
        try:
            if idle is None:
                self._observers.request_ended(monotonic() - connection.accepted_at)
            elif isinstance(idle, TimedIdle):
                idle.end_of_request()
        except MemoryError:
            pass  # a figure is lost, and not the rest of the end

    def _idle_connections(self) -> list[Connection]:
        return [connection for connection in self._connections if connection.is_idle]

    #: A connection that becomes idle is to be ended, or to make room for one in the queue.
    _idle_wanted = False

    def _became_idle(self, connection: Connection) -> None:
        if self.state is not State.SERVING:
            if self._time_for_first_request(connection) > 0:
                self._end_idle_at_stop(connection)
            else:
                connection.end_idle()
        else:
            self._idle_wanted = False
            if self._lobby is not None and self._lobby.waiting:
                get_hub().loop.run_callback(self._serve_waiting)
            get_hub().loop.run_callback(self._wake_accept_loops)

    def _end_idle_connections(self) -> None:
        for connection in self._idle_connections():
            self._steps.do("end an idle connection", self._end_idle_at_stop, connection)

    def _end_silent_connections(self) -> None:
        """At the end of a patient stop: clients that never sent a request are not cut short."""
        for connection in self._idle_connections():
            get_hub().loop.run_callback(self._end_if_idle, connection)

    def _end_idle_at_stop(self, connection: Connection) -> None:
        left = self._time_for_first_request(connection)
        if left > 0 and not self._hurry.is_set():
            if left < inf:
                gevent.spawn_later(left, self._end_if_idle, connection)
        else:
            get_hub().loop.run_callback(self._end_if_idle, connection)

    def _time_for_first_request(self, connection: Connection) -> float:
        """Seconds left for the connection's first byte; 0: it has sent some, or had its time; inf: all of the stop."""
        if connection.bytes_received:
            return 0.0
        if self._patient:
            return inf
        allowed = FIRST_REQUEST if connection.tls is None else FIRST_REQUEST_OVER_TLS
        return max(0.0, connection.accepted_at + allowed - monotonic())

    def _end_if_idle(self, connection: Connection) -> None:
        if connection.is_idle and not connection.closed:
            connection.end_idle()

    # -- stop --------------------------------------------------------------------------------------------------------

    def stop(self, timeout: float | None = None, *, leave_listening: bool = False, patient: bool = False) -> StopReport:
        """Take no new connections, serve those the kernel has queued, wait for the handlers.

        Idle connections (:meth:`Connection.idle`) are ended at once, except those that have not sent a byte yet: they
        get a second from accept (over TLS two) for their first request. Handlers that still run after ``timeout`` are
        ended by GreenletExit, so that their ``finally`` blocks run; one that swallows it is told again and its socket
        is shut.

        Args:
            timeout: seconds; None waits for ever, 0 ends handlers at once (after the queue was emptied).
            leave_listening: another process goes on with the same listening sockets: leave them, and what they have
                queued, to it.
            patient: another process serves new clients, so that this one need not hurry: connections that have not sent
                a byte get as long as ``timeout`` and their own time-outs allow, so that no first request is lost.

        Returns:
            how many handlers finished and how many were ended, with what each of those was doing.
            A second call waits for the same stop. A handler cannot wait for its own end: called in one, this begins
            the stop and returns an empty report at once.
        """
        check_number("timeout", timeout, least=0, none="to wait for ever")
        if self.state is State.NEW:
            self.state = State.STOPPED
            self._report = StopReport(0, 0)
            self.stopping_event.set()
            self.listening_ended.set()
            self._stopped.set()
        if self.state is State.SERVING:
            self._patient = patient
            self._begin_stop(timeout, leave_listening)
        return self._wait_for_report()

    def hasten(self, timeout: float) -> None:
        """Bound a stop that is under way: connections that are still open after ``timeout`` seconds are ended.

        A patient stop (see :meth:`stop`) is one no longer: connections that have not sent a byte have a second.
        """
        check_number("timeout", timeout, least=0)
        if self.stopping:  # also when it only waits for background work
            self._patient = False
            self._end_idle_connections()
            gevent.spawn_later(timeout, self.halt)

    def halt(self) -> StopReport:
        """Close the listening sockets, end every handler now. What the kernel has queued is reset."""
        if self.state is State.NEW:
            return self.stop()
        if self.state is State.SERVING:
            self._begin_stop(0.0)
        self._hurry.set()
        return self._wait_for_report()

    def end_background_work(self) -> tuple[str, ...]:
        """When it has stopped and the process is to end: give background work the rest of the stop's time, then cut it.

        Without a limit for that stop, :attr:`stop_timeout` is the time. docs/how-to/deployment.md says what counts as
        background work.

        Returns:
            the name of each job that was cut.
        """
        until = self._stop_until
        if until is None and self.stop_timeout is not None:
            until = monotonic() + self.stop_timeout
        self._ends_background_work = True
        try:
            return end_background_work(until, self._hurry)
        finally:
            self._ends_background_work = False

    def _begin_stop(self, timeout: float | None, leave_listening: bool = False) -> None:
        self._stop_until = None if timeout is None else monotonic() + timeout
        # Handlers that had ended before: the report is about the others.
        ended_before = self._handled() - len(self._connections)
        self._spawn_stop = partial(gevent.spawn, self._stop, timeout, leave_listening, ended_before)
        # In a greenlet of its own: whoever asked for it may be killed, or wait no longer.
        self._stopping = self._spawn_stop()
        self.state = State.STOPPING
        self._idle_wanted = True

    def _handled(self) -> int:
        """Connections that have got as far as the handler."""
        counters = self._counters
        if self._lobby is None:
            return counters.accepted
        return counters.accepted - len(self._lobby) - self._lobby.failed

    def _wait_for_report(self) -> StopReport:
        if self._report is None and getcurrent() in self._connections.values():
            return StopReport(0, 0)
        self._stopped.wait()
        assert self._report is not None
        return self._report

    def wait_stopped(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped; False if ``timeout`` seconds were not enough."""
        return bool(self._stopped.wait(timeout))

    def close_accept_loop(self, index: int) -> None:
        """Close one of several accept loops while the others stay; no connection is lost.

        New connections are steered to the sockets that stay, what this one has queued is accepted, then it is closed.

        Args:
            index: position among the accept loops still open.

        Raises:
            GtcpServerError: there is no such loop, or no other one on its address.
        """
        if not 0 <= index < len(self._acceptors):
            raise GtcpServerError(f"accept loop must be 0 to {len(self._acceptors) - 1}, got {index}")
        acceptor = self._acceptors[index]
        # One after another: each close gives the rest of the group new places.
        with self._closing_loops:
            if acceptor in self._acceptors and self.state is State.SERVING:
                self._close_accept_loop(acceptor)

    def _close_accept_loop(self, acceptor: Acceptor) -> None:
        listener = acceptor.listener
        group = next(group for group in self._groups if listener in group)
        if len(group) < 2:
            raise GtcpServerError(f"{listener.address} has one accept loop; use stop()")
        place = group.index(listener)
        if not steer(group, [i for i in range(len(group)) if i != place]):
            log.warning("cannot steer connections away from a socket of %s; some may be reset", listener.address)
        self._drain_and_close([acceptor])
        self._acceptors.remove(acceptor)
        forget_member(group, place)
        if len(group) > 1:
            # The kernel has renumbered the group: the program must name the new places.
            steer(group, range(len(group)))

    def _drain_and_close(self, acceptors: Sequence[Acceptor], steps: Steps | None = None) -> None:
        deferred = self._listen.defer_accept or any(acceptor.listener.muted_by_ttl for acceptor in acceptors)
        longest = LONGEST_DRAIN_OF_DEFERRED if deferred else LONGEST_DRAIN
        drain_and_close(acceptors, self._admit_drained, longest, self._hurry, steps)
        for acceptor in acceptors:
            self._counters.accept_errors += acceptor.accept_errors
            self._counters.left_in_queue += acceptor.left_in_queue
            acceptor.accept_errors = acceptor.left_in_queue = 0

    def _admit_drained(self, connection: Connection, address: Any) -> None:
        """Hold it until the pool has a place: the kernel's queue, where it would have waited, is about to go."""
        if self.max_accepts is not None and self._counters.accepted + len(self._held) >= self.max_accepts:
            connection.close()
            return
        connection.client_address = address
        self._nobody_connected.clear()
        self._held.append(connection)
        if len(self._held) == 1:
            try:
                self.pool.places.rawlink(self._serve_held)
            except BaseException:
                self._held.clear()
                raise

    def _serve_held(self, places: Any) -> None:
        # Called in the hub when the pool has a place.
        try:
            while self._held and places.taken < places.size:
                connection = self._held.popleft()
                self._admit(connection, connection.client_address)
        finally:
            if self._held:
                places.rawlink(self._serve_held)
            else:
                self._note_if_nobody_is_connected()

    def _stop(self, timeout: float | None, leave_listening: bool, ended_before: int) -> None:
        """In a greenlet of its own. Each step is done, whatever has become of those before it."""
        steps = self._steps
        drain = not (leave_listening or self._hurry.is_set())
        until = None if timeout is None else monotonic() + timeout
        cut: list[CutConnection] = []
        try:
            if drain:
                for acceptor in self._acceptors:
                    steps.do("begin no new connections", acceptor.mute)
            steps.do("tell handlers", self.stopping_event.set)
            # Idle ones end now, the others when they become idle.
            steps.do("end idle connections", self._end_idle_connections)
            if drain:
                with self._closing_loops:
                    steps.do("drain", self._drain_and_close, self._acceptors, steps)
            # Also those that a failed drain has left.
            for acceptor in self._acceptors:
                steps.do("close the accept loop", acceptor.close)
                steps.do("close the listening socket", partial(acceptor.listener.close, keep_path=leave_listening))
            steps.do("tell that listening has ended", self.listening_ended.set)
            steps.do("wait for handlers", self._wait_until_nobody_is_connected, until)
            if self._patient:
                steps.do("end silent connections", self._end_silent_connections)
            # What was told to end because it is idle does so in the loop's next turn, and is not cut.
            steps.do("let idle connections end", gevent.sleep, 0)
            cut = self._end_handlers(steps)
            if self.on_stop is not None:
                steps.do("call on_stop", self._call_on_stop, until)
            if not self._hurry.is_set():
                steps.do("wait for lingering connections", self._wait_for_lingering, until)
        finally:
            steps.do("close lingering connections", self.lingerer.close_all)
            steps.do("end the overseer", self._overseer.stop)
            steps.do("end the watchdog", self._watchdog.close)
            if self.tls is not None:
                steps.do("end the watch of certificates", self.tls.stop_watching)
            steps.do("end workers", self.pool.retire_waiting)
            self._tell_handler()
            self.state = State.STOPPED
            seen = self._handled() - ended_before
            self._report = StopReport(seen - len(cut), len(cut), tuple(cut), tuple(steps.failures))
            self._stopped.set()

    def _tell_handler(self) -> None:
        stopped = getattr(self.handler, "server_stopped", None)
        if stopped is not None:
            try:
                stopped()
            except BaseException:  # SystemExit, gevent.Timeout: the stop is to be complete all the same
                log.exception("server_stopped() of the handler failed")

    def _call_on_stop(self, until: float | None) -> None:
        assert self.on_stop is not None
        at_least = monotonic() + ON_STOP_SECONDS
        called = gevent.spawn(self._guarded_on_stop, self.on_stop)
        while not called.ready():
            hurried = self._hurry.is_set()
            end = at_least if hurried else max(at_least, inf if until is None else until)
            left = min(LONGEST_WITHOUT_A_LOOK, end - monotonic())
            if left <= 0:
                break
            gevent.wait([called] if hurried else [called, self._hurry], timeout=left, count=1)
        if not called.ready():
            log.error("on_stop did not end within the time of the stop and was cut")
            called.kill(timeout=KILL_SECONDS)

    def _guarded_on_stop(self, on_stop: Callable[[Server], Any]) -> None:
        process = os.getpid()
        try:
            on_stop(self)
        except GreenletExit:
            raise
        except BaseException:  # SystemExit, which gevent would raise in the main greenlet: it waits for the stop
            if os.getpid() != process:
                raise  # of a child that it has forked, whose end this is
            log.exception("on_stop failed")

    def _wait_until_nobody_is_connected(self, until: float | None) -> None:
        # By the books, and not by the event alone: that may have failed to be set.
        while self._connections or self._held or self._lobby:
            if not self._wait_a_little(self._nobody_connected, until):
                return

    def _wait_for_lingering(self, until: float | None) -> None:
        lingerer = self.lingerer
        while not lingerer.nobody_lingers.is_set():
            if not self._wait_a_little(lingerer.nobody_lingers, until, LOOK_SECONDS):
                return
            lingerer.let_silent_peers_be()

    def _wait_a_little(self, event: Event, until: float | None, longest: float = LONGEST_WITHOUT_A_LOOK) -> bool:
        """Wait for the event, or at most so long that it is worth while to look; False when there is no more time."""
        left = longest if until is None else min(longest, until - monotonic())
        if left <= 0 or self._hurry.is_set():
            return False
        if event.is_set():  # it should not be
            gevent.sleep(min(left, 0.05))
        else:
            gevent.wait([event, self._hurry], timeout=left, count=1)
        return True

    def _end_handlers(self, steps: Steps) -> list[CutConnection]:
        cut: list[CutConnection] = []
        while self._held:
            steps.do("end a connection", self._end_held, self._held.popleft(), cut)
        if self._lobby is not None:
            while self._lobby.waiting:
                steps.do("end a connection", self._end_waiting, self._lobby.waiting.popleft(), cut)
            steps.do("end handshakes", self._lobby.end_all)
        cut += steps.do("end handlers", end_handlers, self._connections, self._nobody_connected) or []
        return cut

    def _end_held(self, connection: Connection, cut: list[CutConnection]) -> None:
        self._counters.accepted += 1
        try:
            cut.append(describe(connection, None))
            if self.access_log is not None:
                self.access_log.write_unserved(connection, "stopped")
        finally:
            connection.stream.sock.close()

    def _end_waiting(self, connection: Connection, cut: list[CutConnection]) -> None:
        assert self._lobby is not None
        try:
            cut.append(describe(connection, None))
            if self.access_log is not None:
                self.access_log.write_unserved(connection, "stopped")
        finally:
            connection.close()
            self._lobby.left(connection)
            self._note_if_nobody_is_connected()

    def _stop_after_last(self) -> None:
        self.stop(None)

    def _listener_is_gone(self, error: OSError) -> None:
        self.fatal_error = error
        if self.state is State.SERVING:
            self._begin_stop(self.stop_timeout)

    # -- a fork in this process (see forked.py) ----------------------------------------------------------------------

    def serves(self) -> bool:
        # Background work may fork as well, and this would be waited for in both processes.
        return self.state in (State.SERVING, State.STOPPING) or self._ends_background_work

    def left_in_child(self, own: Connection | None) -> None:
        """In a forked child: nothing of this server is there. One that has not been started is the child's as well."""
        if not self.serves():
            return
        for group in self._groups:
            for listener in group:
                listener.close()
        for acceptor in self._acceptors:
            acceptor.left_in_child()
        for connection in (*self._connections, *self._held):
            if connection is not own:
                connection.left_by_child()
        self.lingerer.left_in_child()
        if self._lobby is not None:
            self._lobby.left_in_child()
        self._overseer.left_in_child()
        self.pool.left_in_child()
        self.places = self.pool.places
        if self.tls is not None:
            self.tls.left_in_child()
        keep(self._connections, self._held, self._stopping)
        self._connections, self._held = {}, deque()
        self._watchdog = self._stopping = None
        self.state = State.STOPPED
        self._report = StopReport(0, 0)
        for name in ("stopping_event", "listening_ended", "_stopped", "_hurry", "_nobody_connected"):
            keep(getattr(self, name))  # who waits for it is a copy
            event = Event()
            event.set()
            setattr(self, name, event)
        # What a handler that has forked comes back to.
        self.handler = lambda _connection: end_process()
        self.on_disconnect = None
        self._handler_raised = lambda _connection, error: end_process(error)  # type: ignore
        self._forget = lambda _connection: end_process()  # type: ignore

    # -- counters ----------------------------------------------------------------------------------------------------

    def stats(self) -> ServerStats:
        """A snapshot of the counters. Costs 0.1 us for each open connection (their bytes are added up)."""
        counters = self._counters
        connections = list(self._connections)
        samples = counters.queue_wait_samples
        blocked, blocked_seconds = blocked_so_far()
        return ServerStats(
            accepted=counters.accepted,
            active=len(connections),
            idle=len(self._idle_connections()),
            lingering=len(self.lingerer),
            peak=counters.peak,
            rejected=counters.rejected,
            clients_refused=dict(self._client_limits.refused) if self._client_limits is not None else {},
            refused=counters.refused,
            left_in_queue=counters.left_in_queue + sum(acceptor.left_in_queue for acceptor in self._acceptors),
            handler_errors=counters.handler_errors,
            proxy_headers_awaited=self._lobby.headers if self._lobby is not None else 0,
            proxy_header_failures=dict(counters.proxy_header_failures),
            handshaking=self._lobby.handshakes if self._lobby is not None else 0,
            handshake_failures=dict(counters.handshake_failures),
            resets=counters.resets,
            timeouts=counters.timeouts,
            limits_exceeded=counters.limits_exceeded,
            handler_timeouts=counters.handler_timeouts,
            slow_clients=counters.slow_clients,
            idle_closed=counters.idle_closed,
            accept_errors=counters.accept_errors + sum(acceptor.accept_errors for acceptor in self._acceptors),
            bytes_received=counters.bytes_received + sum(c.bytes_received for c in connections),
            bytes_sent=counters.bytes_sent + sum(c.bytes_sent for c in connections),
            queue_wait_samples=samples,
            queue_wait_mean=counters.queue_wait_total / samples if samples else 0.0,
            queue_wait_max=counters.queue_wait_max,
            handlers=self.pool.places.taken,
            pool_size=self.pool.size,
            handler_counters=_counters_of(self.handler),
            uptime=monotonic() - self._started_at if self._started_at else 0.0,
            blocked=blocked,
            blocked_seconds=blocked_seconds,
            tls_floods=dict(counters.tls_floods),
        )


runs_handler(Server._serve, lambda variables, _in_child: variables["connection"])


def _counters_of(handler: Any) -> dict[str, int]:
    """Return what a handler counts itself. One that raises counts nothing: the server's own counters are wanted too."""
    try:
        counters = getattr(handler, "counters", None)
        # An unrelated attribute may have that name by chance.
        if not isinstance(counters, Mapping):
            return {}
        return {
            name: value
            for name, value in counters.items()
            if isinstance(name, str) and type(value) is int and abs(value) < LARGEST_COUNTER
        }
    except Exception:
        left_out = _counter_faults.allow("counters")
        if left_out is not None:
            log.exception("the handler's counters cannot be read%s", also(left_out))
        return {}


_counter_faults = FaultLimiter(burst=1, interval=60.0)
