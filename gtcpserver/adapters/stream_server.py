"""StreamServer: a drop-in replacement for gevent's that loses no connections."""

from __future__ import annotations

import logging
import ssl
import sys
from collections import Counter, deque
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

import gevent
from gevent.event import Event
from gevent.hub import get_hub
from gevent.lock import Semaphore
from gevent.timeout import Timeout
from greenlet import GreenletExit, getcurrent

from gtcpserver.admission.steps import Stage
from gtcpserver.admission.tls_handshake import HandshakeStep
from gtcpserver.connection.connection import Connection
from gtcpserver.connection.lingering import LOOK_SECONDS, Linger
from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.listening.listener import Listener
from gtcpserver.pool.pool import HandlerPool
from gtcpserver.process.forked import close_in_child, close_in_children, end_process, keep, runs_handler
from gtcpserver.process.standard_descriptors import open_standard_descriptors
from gtcpserver.server.acceptor import FATAL_ERRNOS, Acceptor
from gtcpserver.server.drain import LONGEST_DRAIN, LONGEST_DRAIN_OF_DEFERRED, drain_and_close
from gtcpserver.server.outcome import COUNTER, log_client_error, log_fault, outcome_of
from gtcpserver.tls import Credentials, classify_handshake_error
from gtcpserver.tls.config import DEFAULT_MAX_HANDSHAKES

from .sigterm import DieGracefully
from .stream_server_tls import StreamServerTLS

log = logging.getLogger("gtcpserver")


class StreamServer(Acceptor):
    r"""``gevent.server.StreamServer`` with another engine: change the import, keep the program.

    Same constructor, same methods, same ``handle(socket, address)``, same kinds of ``spawn``. The handler's socket is a
    :class:`Connection`. It also avoids the losses of gevent's: answers to clients that had sent more than was read,
    connections queued at a stop, requests at SIGTERM, places taken by silent TLS clients, a whole server to
    ``sys.exit()`` in one handler, and logs full of client errors. See :meth:`stop`, :meth:`serve_forever`,
    :meth:`stats` and docs/coming-from/gevent.md.

    With special TLS arguments (``do_handshake_on_connect=False``, ``suppress_ragged_eofs``, the program's own
    ``wrap_socket`` or ``sni_callback``) the handler gets a gevent.ssl.SSLSocket, as with gevent; its handshake runs in
    the handler's greenlet.

    Example::

        from gtcpserver import StreamServer  # instead of gevent.server's

        def handle(socket, address):
            socket.sendall(socket.recv(1000))

        StreamServer(("127.0.0.1", 5000), handle).serve_forever()
    """

    #: Seconds a TLS handshake may take; None: the default of TLSConfig.
    handshake_timeout: float | None = 10.0

    #: Concurrent TLS handshakes. When another one starts, the oldest is ended.
    max_handshakes = DEFAULT_MAX_HANDSHAKES

    #: Seconds that a client may take to close a closed connection too, so that everything written reaches it. 0 closes
    #: at once.
    linger = 2.0

    ssl_args: Any
    listener: Listener

    def __init__(
        self, listener: Any, handle: Any = None, backlog: int | None = None, spawn: Any = "default", **ssl_args: Any
    ) -> None:
        open_standard_descriptors()
        self._tls = StreamServerTLS()
        self._credentials: Credentials | None = None
        self._handshakes: Stage | None = None
        self._handshake_failures: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._faults = FaultLimiter()
        self._lingerer = Linger(self.linger)
        self._open: dict[Any, Any] = {}  # connection -> the greenlet of its handler
        self._drained: set[Any] = set()  # accepted by a stop, and not served yet
        self._held: deque[tuple[str, tuple[Any, ...]]] = deque()  # wait for a place in the pool
        self._forgotten: dict[str, Any] = {}  # deleted by gevent's close(), still needed by waiting connections
        self._draining = False
        self._lost = False
        self._closing = Semaphore()
        self._stopping: set[Any] = set()  # the greenlets in stop()
        self._changed: Event | None = None
        self._forker: Any = None  # in a forked child, the greenlet of the handler that forked
        self._signal_timeout: float | None = None
        super(Acceptor, self).__init__(listener, handle, backlog, spawn, **ssl_args)

    def init_socket(self) -> None:
        given = hasattr(self, "socket")
        super().init_socket()
        self.leaving = False
        if not given or getattr(self, "listener", None) is None:
            # Another process may hold a given socket, too.
            self.listener = Listener(self.socket, address=str(self.address), owned=not given)
        _started[id(self)] = self

    def set_spawn(self, spawn: Any) -> None:
        if spawn == "default":
            # Not self.pool: gevent's stop() waits for the handlers of a pool, but not for those of the default.
            self._workers = HandlerPool(None)
            spawn = self._run_in_worker
        super().set_spawn(spawn)

    def _run_in_worker(self, function: Callable[..., Any], *args: Any) -> None:
        if get_hub() is getcurrent():
            self._workers.run(function, *args)
        else:
            gevent.spawn(function, *args)

    def stats(self) -> dict[str, Any]:
        """Return the counters since the server was created, by the names of :class:`ServerStats`.

        active, lingering, handshaking, handshake_failures (by kind), resets, timeouts (also by a ``gevent.Timeout``
        that ends a wait for the client), limits_exceeded, handler_errors, accept_errors, left_in_queue.
        """
        counters = {name: self._counts[name] for name in ("resets", "timeouts", "limits_exceeded", "handler_errors")}
        return {
            "active": len(self._open),
            "lingering": len(self._lingerer),
            "handshaking": len(self._handshakes or ()),
            "handshake_failures": dict(self._handshake_failures),
            **counters,
            "accept_errors": self.accept_errors,
            "left_in_queue": self.left_in_queue,
        }

    # -- serve a connection ------------------------------------------------------------------------------------------

    def do_handle(self, *args: Any) -> None:
        connection = args[0]
        if isinstance(connection, Connection):
            connection.client_address = args[1]
            connection.linger_with(self._lingerer)
            if self.ssl_args is not None and self._begin_handshake(connection):
                return
        self._begin(self._spawn, self._handle, args)

    def _begin(self, spawn: Any, handle: Callable[..., Any], args: tuple[Any, ...]) -> None:
        close = self.do_close
        try:
            if spawn is None:
                self._handle_and_close(handle, close, args)
            else:
                spawn(self._handle_and_close, handle, close, args)
        except BaseException:
            self._drained.discard(args[0])
            close(*args)
            raise

    def _handle_and_close(self, handle: Callable[..., Any], close: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Serve one connection, in its greenlet."""
        connection = args[0]
        self._open[connection] = getcurrent()
        try:
            return handle(*args)
        except (GreenletExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            if not isinstance(connection, Connection):
                raise  # made by the program's own do_read()
            self._handler_raised(error, args)
        finally:
            try:
                close(*args)
            finally:
                self._forget(connection)

    runs_handler(_handle_and_close, lambda variables, _in_child: variables["connection"])

    def _forget(self, connection: Any) -> None:
        if self._forker is not None and self._forker is getcurrent():
            end_process()
        self._open.pop(connection, None)
        if self._drained:
            self._drained.discard(connection)
        if self._changed is not None:
            self._changed.set()

    def _handler_raised(self, error: BaseException, args: tuple[Any, ...]) -> None:
        """Count the handler's exception; print it only if it is a fault of the handler."""
        if self._forker is not None and self._forker is getcurrent():
            end_process(error)
        connection = args[0]
        result = COUNTER[outcome_of(error, connection)[0]]
        if result != "handler_errors":
            self._counts[result] += 1
            log_client_error(connection, error)
            return
        current = getcurrent()
        self._report(error, connection, current if current is not get_hub() else (args[1:], self))

    def _report(self, error: BaseException, connection: Any, context: Any) -> None:
        """Log a fault, unless the program has customised error reporting in gevent's hub."""
        self._counts["handler_errors"] += 1
        # The hub would end the program for these two.
        if _hub_is_customised() and not isinstance(error, (SystemExit, SystemError)):
            get_hub().handle_error(context, type(error), error, error.__traceback__)
        elif isinstance(connection, Connection):
            log_fault(self._faults, connection, error)
        else:
            left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.error("%s cannot take a connection%s", self, also(left_out), exc_info=error)

    def _handle_failed(self, accepted: tuple[Any, ...]) -> None:
        # Called within the except block. spawn or the connection's class raised the exception.
        kind, error, trace = sys.exc_info()
        try:
            self._back_off()
        finally:
            if isinstance(error, KeyboardInterrupt):
                get_hub().handle_error((accepted[1:], self), kind, error, trace)
            elif error is not None and not isinstance(error, GreenletExit):
                self._report(error, accepted[0] if accepted else None, (accepted[1:], self))

    def _accept_failed(self, error: OSError) -> bool:
        self._lost = error.errno in FATAL_ERRNOS
        return super()._accept_failed(error)

    def _place_wanted(self) -> None:
        if self.pool is not None:
            places_of(self.pool).rawlink(self._start_accepting_if_started)

    # -- TLS ---------------------------------------------------------------------------------------------------------

    def _begin_handshake(self, connection: Connection) -> bool:
        """Run the handshake in a stage. False: the handler's greenlet must do it."""
        handle = self._handle
        if getattr(handle, "__func__", None) is not StreamServer.wrap_socket_and_handle:
            return False
        try:
            self._credentials = self._tls.find(self.wrap_socket, self.ssl_args)
        except Exception as error:
            # As in gevent, which rereads the files for each connection.
            self._report(error, connection, self)
            self.do_close(connection, connection.client_address)
            self._forget(connection)
            return True
        if self._credentials is None:
            return False
        if self._handshakes is None:
            timeout = self.handshake_timeout
            self._handshakes = Stage(
                "TLS handshake",
                self._credentials.handshake_timeout if timeout is None else timeout,
                self.max_handshakes,
                self._make_handshake,
                self._handshake_done,
                self._handshake_failed,
                self._handshake_failures,
            )
        self._handshakes.begin(connection)
        return True

    def _make_handshake(self, connection: Connection) -> HandshakeStep:
        assert self._credentials is not None
        return HandshakeStep(connection, self._credentials)

    def _handshake_done(self, connection: Connection) -> None:
        self._serve_or_hold("handle", (connection, connection.client_address))

    def _handshake_failed(self, connection: Connection, _kind: str) -> None:
        self.do_close(connection, connection.client_address)
        self._forget(connection)

    def wrap_socket_and_handle(self, client_socket: Any, address: Any) -> Any:
        """Serve one connection in its greenlet, with a handshake that cannot run in a stage."""
        credentials = self._tls.find(self.wrap_socket, self.ssl_args)
        handle = self._what_serves("handle")
        if credentials is None or not isinstance(client_socket, Connection):
            encrypted = self._wrapped_by_gevent(client_socket)
            if encrypted is None:
                return None
            with encrypted:
                try:
                    return handle(encrypted, address)
                except BaseException as error:
                    # Unlike a Connection, it does not mark errors.
                    if isinstance(client_socket, Connection) and _has_raised(encrypted, error):
                        client_socket.stream.note(error)
                    raise
        with client_socket:
            try:
                client_socket.start_tls(credentials, timeout=self.handshake_timeout)
            except OSError as error:
                # start_tls wrote the debug line.
                self._handshake_failures[classify_handshake_error(error)] += 1
                return None
            return handle(client_socket, address)

    def _wrapped_by_gevent(self, client_socket: Any) -> Any:
        """Return the result of ``wrap_socket``; None if it failed through the client's fault."""
        seconds = self.handshake_timeout
        try:
            with _timeout(seconds, TimeoutError(f"no TLS handshake within {seconds} s")):
                encrypted = self.wrap_socket(client_socket, **self.ssl_args)
        except (ssl.SSLError, ConnectionError, TimeoutError) as error:
            kind = classify_handshake_error(error)
            self._handshake_failures[kind] += 1
            log.debug("TLS handshake with %s failed (%s): %s", client_socket.client_address, kind, error)
            return None
        close_in_children(encrypted)
        return encrypted

    # -- wait for a place in the pool --------------------------------------------------------------------------------

    def _serve_or_hold(self, handle: str, args: tuple[Any, ...]) -> None:
        """Serve a connection at once, or when the pool has a place; ``handle`` names the attribute that does it."""
        if self.pool is None or not (self._held or self.pool.full()):
            self._serve(handle, args)
            return
        self._held.append((handle, args))
        if len(self._held) == 1:
            places_of(self.pool).rawlink(self._serve_held)

    def _serve_held(self, _places: Any = None) -> None:
        # Called in the hub when the pool has a place.
        while self._held and not self.pool.full():
            self._serve(*self._held.popleft())
        if self._held:
            places_of(self.pool).rawlink(self._serve_held)

    def _serve(self, handle: str, args: tuple[Any, ...]) -> None:
        try:
            self._begin(self._what_serves("_spawn"), self._what_serves(handle), args)
        except (GreenletExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._report(error, args[0], (args[1:], self))

    # -- a fork in this process (see process/forked.py) --------------------------------------------------------------

    def serves(self) -> bool:
        return bool(super().serves() or self._open or self._held or self._handshakes)

    def left_in_child(self, own: Any = None) -> None:
        """Leave the server in a forked child. One that does not accept yet belongs to the child as well."""
        if not self.serves():
            return
        super().left_in_child(own)
        for connection in (*self._open, *(args[0] for _, args in self._held)):
            if connection is not own:
                close_in_child(connection)
        if self._handshakes is not None:
            self._handshakes.left_in_child()
            self._handshakes = None
        self._lingerer.left_in_child()
        keep(self._open, self._held, self._changed, self._stopping)
        self._open, self._held, self._drained, self._stopping = {}, deque(), set(), set()
        self._changed = None
        if "_workers" in vars(self):
            self._workers.left_in_child()
        # A handler that forked ends the process when it returns. The child may start the server again.
        self._forker = getcurrent()

    def _what_serves(self, name: str) -> Any:
        """Return the attribute of that name, even if ``close`` deleted it."""
        if self.closed and name in self._forgotten:
            return self._forgotten[name]
        return getattr(self, name)

    # -- stop --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Accept and serve the connections queued in the kernel, stop accepting, and close the listening socket."""
        if self._draining:
            return  # called by a handler that the drain started; the drain then closes
        if self.started and not self._lost:
            self._stop_event.set()
            self.stop_accepting()
            self.drain(self._admit_drained)
        if not self.closed:
            self._forgotten = {name: getattr(self, name, None) for name in ("handle", "_handle", "_spawn")}
            if "listener" in self.__dict__:
                self.listener.unmute()  # another process may have the socket, too
        super().close()

    def drain(self, accept: Callable[[Any, Any], Any]) -> int:
        self._draining = True
        try:
            return super().drain(accept)
        finally:
            self._draining = False

    def _admit_drained(self, connection: Any, address: Any) -> None:
        """Serve or hold a connection that the kernel had queued: that queue is about to disappear."""
        self._drained.add(connection)
        if self.pool is None or self.ssl_args is not None or not self.pool.full():
            try:
                self.do_handle(connection, address)
            except (GreenletExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self._report(error, connection, ((address,), self))
            return
        if isinstance(connection, Connection):
            connection.client_address = address
            connection.linger_with(self._lingerer)
        self._serve_or_hold("_handle", (connection, address))

    def stop(self, timeout: float | None = None) -> None:
        """Stop accepting, serve the connections queued in the kernel, close the listening socket.

        Like gevent's, it waits for the handlers if ``spawn`` is a pool or a number, and ends those that still run after
        ``timeout``. Otherwise it waits only for the handlers of connections it took from the kernel's queue, and ends
        none.

        Args:
            timeout: seconds; None: :attr:`stop_timeout`. 0 closes at once.
        """
        if timeout is None:
            timeout = self.stop_timeout
        until = inf if timeout is None else monotonic() + timeout
        pool = self.pool
        may_wait = getcurrent() is not get_hub()
        if self._changed is None:
            self._changed = Event()
        if may_wait and monotonic() < until:
            self._stopping.add(getcurrent())
            try:
                self._close_gently(until)
                self._wait_while(lambda: self._owes_service(pool), until)
            finally:
                self._stopping.discard(getcurrent())
        else:
            self.close()
        if pool is None:
            return
        self._drop_waiting()
        if pool:
            pool.join(timeout=_left(until))
            pool.kill(block=True, timeout=1)
        if may_wait:
            self._wait_for_lingering(until)

    def _close_gently(self, until: float) -> None:
        with self._closing:  # a second stop waits for the first
            if not self.started:
                self.close()
                return
            self._stop_event.set()
            try:
                self.mute()
                longest = LONGEST_DRAIN_OF_DEFERRED if self.listener.muted_by_ttl else LONGEST_DRAIN
                drain_and_close([self], self._admit_drained, min(longest, until - monotonic()), Event())
            finally:
                self.close()

    def _owes_service(self, pool: Any) -> bool:
        # A handler cannot wait for its own end, nor two handlers for each other's.
        if any(self._open.get(connection) not in self._stopping for connection in self._drained):
            return True
        return pool is not None and bool(self._held or self._handshakes)

    def _drop_waiting(self) -> None:
        """Close the connections that got no place in the pool in time."""
        if self._handshakes is not None:
            self._handshakes.end_all()
        while self._held:
            _, args = self._held.popleft()
            self.do_close(*args)
            self._forget(args[0])

    def _wait_while(self, condition: Callable[[], Any], until: float) -> None:
        assert self._changed is not None
        while condition():
            self._changed.clear()
            left = _left(until)
            if left == 0 or not self._changed.wait(left):
                return

    def _wait_for_lingering(self, until: float) -> None:
        until = min(until, monotonic() + self.linger + 1)  # bounded: its timers keep no event loop alive
        while (left := until - monotonic()) > 0:
            if self._lingerer.nobody_lingers.wait(min(left, LOOK_SECONDS)):
                return
            self._lingerer.let_silent_peers_be()

    def serve_forever(self, stop_timeout: float | None = None) -> None:
        """Start if necessary, and serve until stopped.

        In the main thread of a program that leaves SIGTERM at its default, that signal stops all StreamServers of the
        thread, waits for their handlers, regardless of ``spawn``, and then ends the process as by default. A second
        SIGTERM ends it at once.

        Args:
            stop_timeout: seconds that handlers get to finish at the end; None: :attr:`stop_timeout`.
        """
        self._signal_timeout = stop_timeout
        with _sigterm.caught():
            super().serve_forever(stop_timeout)

    def finish_before_exit(self) -> None:
        """Stop because the process is about to end.

        :meta private:
        """
        timeout = self.stop_timeout if self._signal_timeout is None else self._signal_timeout
        until = inf if timeout is None else monotonic() + timeout
        self.stop(timeout)
        self._wait_while(lambda: self._open or self._held or self._handshakes, until)
        self._wait_for_lingering(until)


def places_of(pool: Any) -> Any:
    """Return the semaphore of a ``gevent.pool.Pool``, which has no public name."""
    return pool._semaphore  # noqa: SLF001 - gevent's


_timeout = Timeout._start_new_or_dummy  # noqa: SLF001 - gevent's


def _has_raised(sock: Any, error: BaseException) -> bool:
    """Return whether a method of this socket raised an error."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_locals.get("self") is sock:
            return True
        trace = trace.tb_next
    return False


def _left(until: float) -> float | None:
    return None if until == inf else max(0.0, until - monotonic())


def _hub_is_customised() -> bool:
    """Return whether the program replaced the error handling of gevent's hub (``gevent.hub.Hub.handle_error``)."""
    hub = get_hub()
    usual = ("gevent.hub", "gtcpserver.diagnostics.logs")
    methods = (hub.handle_error, hub.print_exception)
    return "exception_stream" in vars(hub) or any(getattr(one, "__module__", None) not in usual for one in methods)


# Those that were started, by their id: a program's subclass need not be hashable.
_started: WeakValueDictionary[int, StreamServer] = WeakValueDictionary()


def _finish_all() -> None:
    loop = get_hub().loop
    gevent.joinall(
        [gevent.spawn(one.finish_before_exit) for one in list(_started.values()) if one.started and one.loop is loop]
    )


_sigterm = DieGracefully(_finish_all)
