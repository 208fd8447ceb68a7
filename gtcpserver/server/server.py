"""Server: listening sockets, accept loops, pool and connections as one object, from start to stop.

Its parts, each in a module of its own, share a `ServerState`:

- `options`: the arguments, checked once;
- `capacity`: whether there is room, which connections wait for it, which one is woken first;
- `serving`: a connection from accept to close;
- `moving`: which connections can move to another worker, and how one is taken over;
- `stopping`: the steps of the stop; `watchdog` checks that the accept loops are armed.

This module puts them together, starts them, and has the public methods.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import gevent
from gevent.event import Event
from gevent.hub import get_hub
from greenlet import getcurrent

from gtcpserver.admission.admission import Admission
from gtcpserver.admission.client_limits import ClientLimits
from gtcpserver.checks import check_number
from gtcpserver.connection.blocks import Idle
from gtcpserver.connection.connection import Connection
from gtcpserver.connection.lingering import Linger
from gtcpserver.connection.poller import poller_of
from gtcpserver.errors import ConfigError, GtcpServerError
from gtcpserver.listening.listener import ListenConfig, Listener, open_listeners
from gtcpserver.pool.pool import DEFAULT_SIZE, HandlerPool
from gtcpserver.process.event_loop import check_event_loop
from gtcpserver.process.forked import register
from gtcpserver.process.garbage import freeze_garbage_collector
from gtcpserver.process.standard_descriptors import open_standard_descriptors
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.shared.column import Column
from gtcpserver.signatures import ConnectionT, Handler, OnFull
from gtcpserver.store.settings import DEFAULT_TIMEOUT, OnStoreFailure, StoreSettings
from gtcpserver.store.store import Store, close_store, open_store
from gtcpserver.tls import Credentials

from .acceptor import Acceptor
from .access_log import AccessLog
from .background import end_background_work, threads_of_handlers_are_no_daemons
from .capacity import Capacity
from .certificates import Certificates, credentials_of
from .fleet_room import FleetRoom
from .full_log import FullLog
from .moving import Mover, Moving, make_idle, with_hooks_once
from .observers import Observer
from .options import Options
from .service_room import ServiceRoom
from .serving import Serving
from .signals import StopSignals
from .snapshot import snapshot
from .state import ServerState, State
from .stats import ServerStats, StopReport
from .stopping import Stopping
from .tasks import Tasks
from .time_limits import TimeLimits
from .watchdog import Watchdog

if TYPE_CHECKING:
    import ssl
    from types import TracebackType

    from typing_extensions import Self, Unpack, overload  # which type checkers have

    from gtcpserver.address import ListenAddress
    from gtcpserver.signatures import ServerOptions
    from gtcpserver.tls import HandshakeFailure, TLSConfig

log = logging.getLogger("gtcpserver")

DEFAULT_STOP_TIMEOUT = 30.0

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

__all__ = ["DEFAULT_STOP_TIMEOUT", "Server", "State"]


class Server:
    """A TCP server: each connection runs ``handler(connection)`` in a greenlet of its own, then it is closed.

    Args:
        address: where to listen: "127.0.0.1:5000", "[::1]:443", ``"*:80"`` (IPv4 and IPv6), "name:80",
            "unix:/run/x.sock", "fd:3", a port (on 127.0.0.1), a (host, port) tuple, a listening socket; or a list of
            these.
        handler: called with the :class:`Connection`. It may block: reads, writes, sleeps and, in a monkey-patched
            program, everything else cooperate. Its return value is ignored. Async functions, generators and classes are
            refused. An object may also have ``server_stopped()``, called when the server has stopped, and
            ``counters`` and ``gauges``, mappings of names to whole numbers that appear in :meth:`stats`: counts since
            the start, and values of the moment.
        listen: options of the listening sockets.
        accept_loops: number of listening sockets, each with an accept loop, for every TCP address. One is best in one
            process: measured, more make no connection faster, and each has a queue of its own to drain at a stop.
        pool: a HandlerPool (which several servers may share), or the number of handlers that may run at once, or None
            for no limit.
        on_full: when the pool (or ``max_connections``) is full: "wait" leaves new connections in the kernel's queue,
            "reject" accepts and closes them, "close_idle" closes the oldest connection that is idle
            (:meth:`Connection.idle`) when ``max_connections`` is reached, and otherwise waits.
        max_connections: most connections open at once, idle ones included; None for no limit. With workers, of all
            workers together.
        max_accepts: serve exactly this many connections, then stop; None for no limit. With workers: all together; each
            of them may serve one more.
        timeout: seconds without a byte after which a read or write raises TimeoutError; ``settimeout`` of each new
            connection. None waits forever.
        handler_timeout: seconds a handler may run in all; then DeadlineExceeded is raised in it, wherever it waits.
            None for no limit.
        min_rate: bytes per second (both directions together). A handler that waited for its client all through
            ``min_rate_window`` while fewer bytes moved is ended: clients that drip cannot hold places. None for no
            limit.
        min_rate_window: seconds over which ``min_rate`` is measured.
        tls: a TLSConfig or ssl.SSLContext: every connection is encrypted before the handler gets it.
        proxy_protocol: trust balancers that name their clients in PROXY headers (:class:`ProxyProtocol`); None: expect
            no headers.
        client_limits: which clients may connect, how many connections each may have and how fast it may open them
            (:class:`ClientLimits`); None: no limits.
        shared_limits: URL of a Redis in which several machines count ``max_connections`` and the limits of clients
            together, and the proxy its own: "redis://host:6379/0", "rediss://..." with TLS,
            "redis+sentinel://host,host/service"; None: each machine counts alone. Needs the extra ``redis``.
        on_store_failure: what holds while Redis is away: "local": the limits of this machine; "allow": of these only
            ``max_connections``; "refuse": nobody is admitted whom a limit concerns.
        store_timeout: seconds for an answer of Redis; after that it is away.
        linger: seconds that a peer gets to close its side of a closed connection, so that everything written reaches
            it; 0 closes at once. A stop does not wait for a peer that has acknowledged everything and is silent.
        handover: when a worker leaves (reload, upgrade, recycling, fewer workers), its connections move to another
            worker as soon as they are idle (:meth:`Connection.idle`), where ``handler(connection)`` begins anew, with
            ``connection.resumed`` True and its ``connection.session``; here the wait ends by :class:`HandedOver`. For a
            handler that can begin again at its idle point. Relays move at any time (``relay(..., handover=True)``).
        connection_class: the subclass of Connection that handlers get.
        context: any object; each connection has it as ``connection.context``.
        access_log: write a line when a connection has ended: "text", "json", or an :class:`AccessLog` for a file. None:
            no lines, and no cost.
        freeze_gc: before the first connection, exempt all objects that exist from the cyclic garbage collector, and let
            it run less often. It applies to the whole process; docs/performance.md says what it gains.
        on_connect: called first in the connection's greenlet; if it returns False, the connection is closed unserved.
        on_disconnect: called in the connection's greenlet when the handler has ended, before the connection is closed.
        on_error: called with (connection, exception) for every exception that left the handler, instead of the log;
            :func:`is_client_error` says whether the client is to blame.
        on_start: called with this server when it listens, before the first connection is accepted; clients wait in the
            kernel's queue. If it raises, the server does not start.
        on_stop: called with this server at a stop, when the last connection has ended, to end helpers and flush their
            data. It has what is left of the stop's time, and at least a second.

    Raises:
        ConfigError: an invalid option; the message names it.

    Example::

        from gtcpserver import Server

        def echo(conn):
            while data := conn.recv(65536):
                conn.sendall(data)

        with Server("127.0.0.1:5000", echo, pool=500, timeout=60) as server:
            server.serve_forever(stop_timeout=10)  # until SIGTERM or SIGINT
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
        handover: bool = False,
        tls: TLSConfig | ssl.SSLContext | Credentials | None = None,
        proxy_protocol: ProxyProtocol | None = None,
        client_limits: ClientLimits | None = None,
        shared_limits: str | None = None,
        on_store_failure: OnStoreFailure = "local",
        store_timeout: float = DEFAULT_TIMEOUT,
        connection_class: type[ConnectionT] = Connection,  # type: ignore[assignment]
        context: Any = None,
        access_log: AccessLog | Literal["text", "json"] | None = None,
        freeze_gc: bool = False,
        on_connect: Callable[[ConnectionT], bool | None] | None = None,
        on_disconnect: Callable[[ConnectionT], None] | None = None,
        on_error: Callable[[ConnectionT, BaseException], None] | None = None,
        on_start: Callable[[Server], None] | None = None,
        on_stop: Callable[[Server], None] | None = None,
    ) -> None:
        open_standard_descriptors()
        check_event_loop()
        options = Options.checked(
            address,
            handler=handler,
            listen=listen,
            accept_loops=accept_loops,
            pool=pool,
            on_full=on_full,
            max_connections=max_connections,
            max_accepts=max_accepts,
            timeout=timeout,
            handler_timeout=handler_timeout,
            min_rate=min_rate,
            min_rate_window=min_rate_window,
            linger=linger,
            handover=handover,
            tls=tls,
            proxy_protocol=proxy_protocol,
            client_limits=client_limits,
            shared_limits=shared_limits,
            on_store_failure=on_store_failure,
            store_timeout=store_timeout,
            connection_class=connection_class,
            context=context,
            access_log=access_log,
            freeze_gc=freeze_gc,
            on_connect=on_connect,
            on_disconnect=on_disconnect,
            on_error=on_error,
            on_start=on_start,
            on_stop=on_stop,
        )
        self._options = options = with_hooks_once(options) if handover else options
        self._state = state = ServerState()
        self._capacity = Capacity(options, state)
        self._certificates = Certificates(self.spawn)
        self._full_log = FullLog(options, state)
        self._serving = Serving(self, options, state, self._capacity)
        self._time_limits = TimeLimits(state.connections, handler_timeout, min_rate, min_rate_window)
        self._tasks = Tasks()
        self._stopping = Stopping(self, options, state, self._time_limits, self._tasks, self._admit_drained)
        if options.tls is not None or proxy_protocol is not None or client_limits is not None:
            state.admission = Admission(
                proxy_protocol,
                client_limits,
                options.tls,
                self._serving.admitted,
                state.note_unserved,
                state.counters.proxy_header_failures,
                state.counters.handshake_failures,
                options.access_log.write_unserved if options.access_log is not None else None,
            )
        # For this package: what a handover needs of this server; None without ``handover``. A worker sets the mover.
        self.moving: Moving | None = None
        self.mover: Mover | None = None
        if handover:
            self.moving = Moving(
                self,
                options,
                state,
                self._capacity,
                self._serving.serve,
                self._time_limits,
                self._stopping.end_idle,
            )
        self.pool = options.pool
        #: Certificates and keys; None without TLS. ``reload_tls`` reads them again.
        self.tls = options.tls
        self.lingerer = Linger(linger)
        #: The access log, or None.
        self.access_log = options.access_log
        #: The error of a listening socket that stopped the server, or None.
        self.fatal_error: OSError | None = None
        #: Seconds that handlers get when the listening socket is lost; set by ``serve_forever``.
        self.stop_timeout: float | None = DEFAULT_STOP_TIMEOUT
        #: Whether clients should go elsewhere: from the beginning of ``drain_delay``, or of a stop, on. HTTP answers of
        #: `from_wsgi`, `StaticFiles` and the proxy then say "Connection: close". A handler whose protocol has such a
        #: word sends it; a program with a drain delay of its own sets this, and stops the server later. A reload in
        #: which connections move (``handover``) leaves it False.
        self.draining = False
        self._ends_background_work = False
        self._starting = False
        self._column: Column | None = None
        self._store: Store | None = None
        # For this package: called by ``serve_forever`` once it listens and signals begin graceful stops.
        self.when_serving: Callable[[Server], object] | None = None

    def _want_room(self) -> None:
        # Called in the hub when the server is full and a connection is queued.
        if not self._capacity.is_asking():
            self._full_log.note()
        self._capacity.want_room()

    def note_rejected(self, connection: Connection) -> None:
        """Log that the server is full, and tell a handler that has a log of its own. For this package.

        :meta private:
        """
        self._full_log.note()
        rejected = getattr(self.handler, "connection_rejected", None)
        if callable(rejected):
            rejected(connection)

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind, listen and accept. Returns at once; connections are served while this greenlet waits.

        Raises:
            OSError: the address is not available; the message names it and, if known, the process that has it.
            GtcpServerError: the server was started before, or stopped in ``on_start``.
        """
        if self.state is not State.NEW or self._starting:
            raise GtcpServerError(
                f"a server starts once; this one is {'starting' if self._starting else self.state.value}"
            )
        self._starting = True
        try:
            self._start()
        finally:
            self._starting = False

    def _start(self) -> None:
        state, options = self._state, self._options
        listeners: list[Listener] = []
        try:
            for address in options.addresses:
                group = open_listeners(address, options.listen, options.accept_loops)
                state.groups.append(group)
                listeners += group
            for listener in listeners:
                acceptor = Acceptor.on(
                    listener,
                    self._serving.admit,
                    full=self._capacity.full,
                    place_wanted=self._want_room,
                    on_fatal=self._listener_is_gone,
                    connection_class=options.connection_class,
                )
                state.acceptors.append(acceptor)
            poller_of(get_hub())  # now, while there are descriptors
            register(self)
            self._open_store()
            if options.on_start is not None:
                options.on_start(self)
                if state.now is not State.NEW:
                    raise GtcpServerError("the server was stopped while it started")
            if options.freeze_gc:
                freeze_garbage_collector()
            for acceptor in state.acceptors:
                acceptor.start()
        except BaseException:
            for acceptor in state.acceptors:
                acceptor.close()
            for listener in listeners:
                listener.close()
            state.acceptors.clear()
            state.groups.clear()
            self._tasks.end(monotonic(), state.hurry, for_good=False)
            self.leave_store()
            raise
        state.become(State.SERVING)
        state.started_at = monotonic()
        self._time_limits.start()
        self._stopping.watchdog = Watchdog(state, self._look)
        self._certificates.keep(self._credentials())

    def _credentials(self) -> list[Credentials]:
        return [*([] if self.tls is None else [self.tls]), *credentials_of(self.handler)]

    def _look(self) -> None:
        self._stopping.look()
        self._capacity.look()

    def _admit_drained(self, connection: Connection, address: Any) -> None:
        self._serving.admit(connection, address, drained=True)

    def _listener_is_gone(self, error: OSError) -> None:
        self.fatal_error = error
        if self.state is State.SERVING:
            self._stopping.begin(self.stop_timeout)

    def serve_forever(self, stop_timeout: float | None = DEFAULT_STOP_TIMEOUT) -> StopReport:
        """Serve until stopped; start first if need be.

        In any greenlet of the main thread, SIGTERM and SIGINT begin a graceful ``stop(stop_timeout)`` of all servers
        there; a second signal is ``halt()``.

        Called by the main thread itself, and not by a greenlet, it assumes that the program ends when it returns: work
        that handlers left to threads, executors, greenlets and processes gets what is left of ``stop_timeout``, then it
        is cut, and the log and the report name it. The interpreter's exit no longer waits for it.

        Args:
            stop_timeout: seconds that handlers, and then background work, get to finish; None waits forever.

        Returns:
            the report of the stop.

        Raises:
            OSError: as for :meth:`start`, or the listening socket was lost.
        """
        check_number("stop_timeout", stop_timeout, least=0, none="to wait forever")
        self.stop_timeout = stop_timeout
        is_main = threading.current_thread() is threading.main_thread() and getcurrent().parent is None
        if is_main:
            threads_of_handlers_are_no_daemons()
        # Handle signals before anyone can connect: the default, to die, would lose connections.
        with StopSignals(lambda number: self._stopping.by_signal(number, stop_timeout)):
            if self.state is State.NEW:
                self.start()
                self._stopping.obey_early_signal(stop_timeout)
            try:
                if self.when_serving is not None:
                    self.when_serving(self)
                self._state.stopped.wait()
            except BaseException:
                self.halt()
                raise
            report = self._wait_for_report()
            if is_main:
                report = self._stopping.report = replace(report, background=self.end_background_work())
        if self.fatal_error is not None:
            raise self.fatal_error
        return report

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop(DEFAULT_STOP_TIMEOUT)

    # -- properties --------------------------------------------------------------------------------------------------

    @property
    def handler(self) -> Handler[Any]:
        """The handler. A new one that is assigned serves new connections."""
        return self._serving.handler

    @handler.setter
    def handler(self, handler: Handler[Any]) -> None:
        settings = None if self._options.store is not None else getattr(handler, "store_settings", None)
        if isinstance(settings, StoreSettings) and (self._store is None or self._store.settings != settings):
            log.warning("shared_limits: only a restart, or a reload of worker processes, can change it")
        self._share_store_with(handler)
        had = credentials_of(self._serving.handler)
        self._serving.handler = handler
        if (had or credentials_of(handler)) and self.state is State.SERVING:
            self._certificates.keep(self._credentials())

    @property
    def state(self) -> State:
        """The state of the server."""
        return self._state.now

    @property
    def context(self) -> Any:
        """The ``context`` that each connection gets."""
        return self._options.context

    @property
    def timeout(self) -> float | None:
        """Seconds without a byte until a read or write of a new connection raises TimeoutError; None: no limit."""
        return self._options.timeout

    @property
    def max_connections(self) -> int | None:
        """Most connections open at once; None: no limit."""
        return self._options.max_connections

    @property
    def max_accepts(self) -> int | None:
        """Number of connections to serve in all; None: no limit."""
        return self._options.max_accepts

    @property
    def on_full(self) -> OnFull:
        """What happens to a new connection when the server is full."""
        return self._options.on_full

    @property
    def connection_class(self) -> type[Connection]:
        """The class of the connections that handlers get."""
        return self._options.connection_class

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses where the server listens, with real ports: ("127.0.0.1:5000",)."""
        seen = dict.fromkeys(listener.address for group in self._state.groups for listener in group)
        return tuple(seen)

    @property
    def address(self) -> str:
        """The first of :attr:`addresses`.

        Raises:
            GtcpServerError: the server has not been started.
        """
        if not self._state.groups:
            raise GtcpServerError("the server has no address before it is started")
        return self.addresses[0]

    @property
    def port(self) -> int:
        """The port of the first address; 0 for a unix socket.

        Raises:
            GtcpServerError: the server has not been started.
        """
        if not self._state.groups:
            raise GtcpServerError("the server has no port before it is started")
        sockaddr = self._state.groups[0][0].sockaddr
        return sockaddr[1] if isinstance(sockaddr, tuple) else 0

    @property
    def stopping(self) -> bool:
        """True from the beginning of a stop."""
        return self._state.stopping

    @property
    def stopping_event(self) -> Event:
        """Set when a stop begins, for handlers that loop forever."""
        return self._state.stopping_event

    @property
    def listening_ended(self) -> Event:
        """Set when the listening sockets are drained and closed; handlers may run on."""
        return self._state.listening_ended

    @property
    def active_connections(self) -> int:
        """Number of connections open now, idle ones included."""
        return len(self._state.connections)

    @property
    def accepted_connections(self) -> int:
        """Number of connections accepted since the start."""
        return self._state.accepted

    @property
    def accept_loops(self) -> int:
        """Number of accept loops open now."""
        return len(self._state.acceptors)

    def listeners(self) -> list[Listener]:
        """Return the listening sockets. For this package.

        :meta private:
        """
        return [listener for group in self._state.groups for listener in group]

    def connections(self) -> Mapping[Connection, Any]:
        """Return a live view of the open connections, oldest first, and the greenlet of each. For this package.

        :meta private:
        """
        return MappingProxyType(self._state.connections)

    def __repr__(self) -> str:
        where = ", ".join(self.addresses) or ", ".join(map(str, self._options.addresses))
        return f"<{type(self).__name__} {where} {self.state.value}, {self.active_connections} connections>"

    def reload_tls(self) -> None:
        """Read certificates and keys again, for new handshakes; open connections are not affected.

        Raises:
            ConfigError: the server has no TLSConfig, or a file is unusable; everything stays as it was.
        """
        if self.tls is None:
            raise ConfigError("reload_tls needs a server with tls, this one has none")
        self.tls.reload()

    def spawn(
        self, function: Callable[Parameters, Returned], *arguments: Parameters.args, **named: Parameters.kwargs
    ) -> gevent.Greenlet[Parameters, Returned]:
        """Run a function in a greenlet of its own that ends with the server: a cleaner, a reporter, a subscriber.

        At a stop, when the last connection has ended and before ``on_stop`` is called, it is ended by GreenletExit,
        so that its ``finally`` blocks run; these have what is left of the stop's time, and at least a second. One that
        wants to know earlier waits for :attr:`stopping_event`. If it raises, the error is logged, and the server serves
        on; it is not started again.

        Args:
            function: called with the other arguments; its result is that of the greenlet.

        Returns:
            the greenlet.

        Raises:
            GtcpServerError: the server has stopped.
        """
        task: gevent.Greenlet[Parameters, Returned] = self._tasks.spawn(function, *arguments, **named)
        return task

    # -- limits that hold for all workers ----------------------------------------------------------------------------

    def share(self, column: Column, enough: Callable[[], Any]) -> None:
        """Have the limits hold for all processes that have a column. For this package; call it before the start.

        Args:
            column: the column of this process.
            enough: called when they have accepted `max_accepts` connections.

        :meta private:
        """
        self._column, options = column, self._options
        if options.client_limits is not None:
            options.client_limits.share(column, "clients")
        if options.max_connections is not None or options.max_accepts is not None:
            self._stopping.ends_after_last = False
            self._capacity.service = ServiceRoom(
                column, options.max_connections, options.max_accepts, self._state, self._capacity.let_in, enough
            )
        share_limits = getattr(self.handler, "share_limits", None)
        if share_limits is not None:
            share_limits(column)

    # -- limits that hold for all machines ---------------------------------------------------------------------------

    def _open_store(self) -> None:
        """Have the limits hold for all machines. Waits a second at most."""
        settings = self._options.store or getattr(self.handler, "store_settings", None)
        if not isinstance(settings, StoreSettings):
            return
        options = self._options
        if (
            options.client_limits is None
            and options.max_connections is None
            and not hasattr(self.handler, "share_store")
        ):
            log.warning("shared_limits: there are no limits that it could share")
            return
        store = self._store = open_store(settings, self._column)
        if options.client_limits is not None:
            options.client_limits.share_store(store, "clients")
        if options.max_connections is not None:
            answered = self._serving.fleet_answered
            self._capacity.fleet = FleetRoom(store, options.max_connections, self._state, answered)
        self._share_store_with(self.handler)

    def _share_store_with(self, handler: Any) -> None:
        share_store = getattr(handler, "share_store", None)
        if self._store is not None and share_store is not None:
            share_store(self._store)

    def leave_store(self) -> None:
        """Have what is open here count no more on other machines. For this package.

        :meta private:
        """
        store, self._store = self._store, None
        fleet, self._capacity.fleet = self._capacity.fleet, None
        try:
            if fleet is not None:
                fleet.leave()
        finally:
            if store is not None:
                close_store(store)

    # -- observers ---------------------------------------------------------------------------------------------------

    def add_observer(self, observer: Observer) -> None:
        """Tell an observer how long requests take, for monitors. Several may observe one server.

        :meta private:
        """
        self._serving.observers.add(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Remove an observer; do nothing if it is not registered.

        :meta private:
        """
        self._serving.observers.remove(observer)

    # -- what a connection needs (connection/owner.py) ----------------------------------------------------------

    def make_idle(self, connection: Connection) -> Idle:
        """Make the ``with`` block of :meth:`Connection.idle`. For this package.

        :meta private:
        """
        if self.moving is not None:
            return make_idle(connection, self._state, self._capacity, self._serving.observers)
        return self._serving.make_idle(connection)

    def client_named(self, connection: Connection) -> None:
        """Count the client that a balancer named. For this package.

        :meta private:
        """
        self._serving.client_named(connection)

    def count_failed_handshake(self, kind: HandshakeFailure) -> None:
        """Count a failed ``start_tls``. For this package.

        :meta private:
        """
        self._state.counters.handshake_failures[kind] += 1

    def count_tls_flood(self, kind: str) -> None:
        """Count a client that sent too many TLS records without data. For this package.

        :meta private:
        """
        self._state.counters.tls_floods[kind] += 1

    # -- stop --------------------------------------------------------------------------------------------------------

    def stop(self, timeout: float | None = None, *, leave_listening: bool = False, patient: bool = False) -> StopReport:
        """Accept no new connections, serve those the kernel has queued, and wait for the handlers.

        Idle connections (:meth:`Connection.idle`) are ended at once, except those that have not sent a byte yet: they
        get a second from accept (two over TLS) for their first request. Handlers that still run after ``timeout`` are
        ended by GreenletExit, so that their ``finally`` blocks run; a handler that swallows it gets it again, and its
        socket is shut.

        A second call waits for the same stop. A handler cannot wait for its own end: called in one, this begins the
        stop and returns an empty report at once.

        Args:
            timeout: seconds; None waits forever, 0 ends handlers at once (after the queue was emptied).
            leave_listening: leave the listening sockets and their queues to another process, which goes on with them.
            patient: do not hurry, since another process serves new clients: connections that have not sent a byte get
                as long as ``timeout`` and their own timeouts allow, so that no first request is lost.

        Returns:
            how many handlers finished and how many were ended, with what each of the latter was doing.
        """
        check_number("timeout", timeout, least=0, none="to wait forever")
        state = self._state
        if state.now is State.NEW:
            state.become(State.STOPPED)
            self._stopping.report = StopReport(0, 0)
            state.stopping_event.set()
            self._tasks.end(None if timeout is None else monotonic() + timeout, state.hurry)
            state.listening_ended.set()
            state.stopped.set()
        if state.now is State.SERVING:
            self._stopping.begin(timeout, leave_listening, patient)
        return self._wait_for_report()

    def hasten(self, timeout: float) -> None:
        """Limit a stop that is under way: end connections still open after ``timeout`` seconds.

        A patient stop (see :meth:`stop`) is patient no longer: connections that have not sent a byte have a second.
        """
        check_number("timeout", timeout, least=0)
        if self.stopping:  # also while it only waits for background work
            self._stopping.hasten()
            gevent.spawn_later(timeout, self.halt)

    def halt(self) -> StopReport:
        """Close the listening sockets and end every handler now. Connections in the kernel's queue are reset."""
        if self.state is State.NEW:
            return self.stop()
        if self.state is State.SERVING:
            self._stopping.begin(0.0)
        self._state.hurry.set()
        return self._wait_for_report()

    def end_background_work(self) -> tuple[str, ...]:
        """Give background work the rest of the stop's time, then cut it.

        Call it after the stop, at the end of the process. If the stop had no time limit, :attr:`stop_timeout` applies.
        docs/how-to/deployment.md says what counts as background work.

        Returns:
            the name of each job that was cut.
        """
        until = self._stopping.until
        if until is None and self.stop_timeout is not None:
            until = monotonic() + self.stop_timeout
        self._ends_background_work = True
        try:
            return end_background_work(until, self._state.hurry)
        finally:
            self._ends_background_work = False

    def _wait_for_report(self) -> StopReport:
        if self._stopping.report is None and getcurrent() in self._state.connections.values():
            return StopReport(0, 0)
        self._state.stopped.wait()
        assert self._stopping.report is not None
        return self._stopping.report

    def wait_stopped(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped; return False if it has not after ``timeout`` seconds."""
        return bool(self._state.stopped.wait(timeout))

    def close_accept_loop(self, index: int) -> None:
        """Close one of several accept loops while the others stay; no connection is lost.

        New connections are steered to the remaining sockets, the queue of this one is drained, then it is closed.

        Args:
            index: position among the open accept loops.

        Raises:
            GtcpServerError: there is no such loop, or it is the only one on its address.
        """
        self._stopping.close_accept_loop(index)

    # -- a fork in this process (see process/forked.py) --------------------------------------------------------------

    def serves(self) -> bool:
        # Background work may fork too, and both processes would wait for it.
        return self.state in (State.SERVING, State.STOPPING) or self._starting or self._ends_background_work

    def connection_of(self, me: Any) -> Connection | None:
        """Return the connection whose handler runs in this greenlet: a handler forks."""
        return next((conn for conn, greenlet in self._state.connections.items() if greenlet is me), None)

    def left_in_child(self, own: Connection | None) -> None:
        """Let go of everything. Called in a forked child; does nothing before the start."""
        if not self.serves():
            return
        for listener in self.listeners():
            listener.close()
        for acceptor in self._state.acceptors:
            acceptor.left_in_child()
        self._state.left_in_child(own)
        self.lingerer.left_in_child()
        if self._state.admission is not None:
            self._state.admission.left_in_child()
        self._time_limits.left_in_child()
        self._capacity.left_in_child()
        self._certificates.left_in_child()
        if self._store is not None:
            self._store.left_in_child()
            self._store = None
        self._stopping.left_in_child()
        self._tasks.left_in_child()
        self._serving.left_in_child()

    # -- counters ----------------------------------------------------------------------------------------------------

    def stats(self) -> ServerStats:
        """Return a snapshot of the counters. Costs 0.1 us per open connection, to add up their bytes."""
        return snapshot(self._state, self._options, self.handler, len(self.lingerer), self.moving, self.mover)
