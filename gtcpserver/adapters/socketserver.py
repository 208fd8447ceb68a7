"""Run handler classes of the standard library's socketserver unchanged."""

from __future__ import annotations

import logging
import socket
import socketserver
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from weakref import WeakSet

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import NonBlockingHandler, own_logger
from gtcpserver.errors import ConfigError
from gtcpserver.server.outcome import is_client_error
from gtcpserver.server.time_limits import HandlerTimedOut

log = own_logger("gtcpserver.http")

#: Most characters of a log line of http.server; the length of the longest usual URLs.
LONGEST_LINE = 2000


class SocketServerHandler:
    """Serves each connection with an instance of a ``socketserver`` handler class; see :func:`from_socketserver`.

    Example::

        import socketserver
        from gtcpserver import Server
        from gtcpserver.adapters import SocketServerHandler

        class Echo(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    self.wfile.write(line)

        server = Server("127.0.0.1:5000", SocketServerHandler(Echo))
    """

    def __init__(self, handler_class: type[socketserver.BaseRequestHandler], server: Any = None) -> None:
        _check(handler_class, server)
        self.handler_class = handler_class
        self._class = _with_idle(handler_class) if issubclass(handler_class, BaseHTTPRequestHandler) else handler_class
        self._server = server
        self._running: WeakSet[Any] = _make_stoppable(server)

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        server = self._server
        if server is None:
            server = _Standin(self.handler_class, conn)
        else:
            self._running.add(conn.server)
        # The constructor does everything: setup(), handle(), finish().
        self._class(conn, conn.client_address, server)


def _check(handler_class: Any, server: Any) -> None:
    if isinstance(handler_class, type) and issubclass(handler_class, socketserver.BaseServer):
        raise ConfigError(
            f"handler_class must be a handler class, got the server class {handler_class.__name__}: its "
            "work is done by ours"
        )
    if not (isinstance(handler_class, type) and issubclass(handler_class, socketserver.BaseRequestHandler)):
        raise ConfigError(f"handler_class must be a subclass of socketserver.BaseRequestHandler, got {handler_class!r}")
    if issubclass(handler_class, socketserver.DatagramRequestHandler):
        raise ConfigError(
            f"handler_class must be made for TCP, got {handler_class.__name__}: a DatagramRequestHandler is for UDP"
        )
    if getattr(server, "socket_type", None) == socket.SOCK_DGRAM:
        raise ConfigError(f"server must be made for TCP, got {server!r}, which is for UDP")


class _Stoppable(socketserver.BaseServer):
    """The part of a ``server`` of the program's that differs: the original waits for a serve_forever() not running."""

    gtcpserver_running: WeakSet[Any]

    def shutdown(self) -> None:
        """Begin a stop of all servers that have served its connections. Return at once, as _Standin's."""
        for server in list(self.gtcpserver_running):
            gevent.spawn(server.stop)


def _make_stoppable(server: Any) -> WeakSet[Any]:
    """Make ``server.shutdown()`` stop ours, unless its class has a shutdown() of its own; return the set of ours.

    Another handler may have the same ``server``: then both have the same set.
    """
    kind = type(server)
    if isinstance(server, _Stoppable):
        return server.gtcpserver_running
    running: WeakSet[Any] = WeakSet()
    if isinstance(server, socketserver.BaseServer) and kind.shutdown is socketserver.BaseServer.shutdown:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        server.__class__ = type(kind.__name__, (_Stoppable, kind), names)
        vars(server)["gtcpserver_running"] = running
    return running


class _Standin:
    """The part of a ``server`` that handlers use: mostly its address, and shutdown()."""

    def __init__(self, handler_class: type[Any], conn: Connection) -> None:
        self.RequestHandlerClass = handler_class
        self.socket = conn
        self.server_address = address = conn.server_address
        if isinstance(address, tuple):
            self.server_name, self.server_port = address[0], address[1]
        else:
            self.server_name, self.server_port = str(address), 0

    def shutdown(self) -> None:
        """Begin a stop. Return at once: the stop waits for this handler, too."""
        server = self.socket.server
        assert server is not None
        gevent.spawn(server.stop)


def _with_idle(handler_class: type[Any]) -> type[Any]:
    """Return a subclass that marks the wait for the next request as idle: a stop may then close the connection.

    If our log never waits for its reader, the subclass logs there instead of to stderr, which may block.
    """
    has_own_log = handler_class.log_message is not BaseHTTPRequestHandler.log_message
    has_own_errors = handler_class.log_error is not BaseHTTPRequestHandler.log_error

    class Handler(handler_class):  # type: ignore[misc]
        def handle_one_request(self) -> None:
            conn = self.connection
            if isinstance(conn, Connection):
                try:
                    with conn.idle():
                        more = self.rfile.peek(1)
                except TimeoutError:
                    more = b""
                if not more:
                    self.close_connection = True
                    return
            super().handle_one_request()

        def log_message(self, format: str, *args: Any) -> None:
            if has_own_log or not _log_never_waits():
                super().log_message(format, *args)
            else:
                # A request line has up to 64 KiB.
                log.info("%s %.*s", self.address_string(), LONGEST_LINE, format % args)

        def log_error(self, format: str, *args: Any) -> None:
            # http.server attributes every TimeoutError to the client, even one from within do_GET(), and logs it here.
            for one in args:
                if isinstance(one, TimeoutError) and not _is_clients(one, self.connection):
                    raise one
            if has_own_log or has_own_errors or not _log_never_waits():
                super().log_error(format, *args)
            else:
                # The request's log line, which follows, has the status.
                log.debug("%s %.*s", self.address_string(), LONGEST_LINE, format % args)

    Handler.__name__, Handler.__qualname__ = handler_class.__name__, handler_class.__qualname__
    Handler.__module__ = handler_class.__module__
    return Handler


def _is_clients(error: TimeoutError, conn: Any) -> bool:
    return not isinstance(error, HandlerTimedOut) and isinstance(conn, Connection) and is_client_error(error, conn)


def _log_never_waits() -> bool:
    return any(isinstance(handler, NonBlockingHandler) for handler in logging.getLogger().handlers)


def from_socketserver(
    handler_class: type[socketserver.BaseRequestHandler], server: Any = None
) -> Callable[[Connection], None]:
    """Return a handler for :class:`Server` that runs a ``socketserver`` handler class unchanged.

    Args:
        handler_class: a subclass of ``socketserver.BaseRequestHandler`` or ``StreamRequestHandler``, such as
            ``http.server.SimpleHTTPRequestHandler``.
        server: value of ``self.server`` in instances; None: an object with ``server_address``, ``server_name``,
            ``server_port`` and ``RequestHandlerClass``. Handlers that need more, such as those of ``xmlrpc.server``,
            get their own server object: ``SimpleXMLRPCServer(("", 0), bind_and_activate=False)``, with its functions
            registered. Only the handlers use it: its own methods (``process_request``, ``verify_request``) are not
            called.

    The class's ``timeout`` applies (seconds without progress). Exceptions are treated as those of any handler.
    ``self.server.shutdown()`` begins a stop of the :class:`Server` (in a worker process, of that one) and returns.
    Lines that ``http.server`` would write to stderr go to the logger "gtcpserver.http" where ``configure_logging`` was
    called, as ``gtcpserver serve`` does.

    Raises:
        ConfigError: not such a class, or one for UDP.

    Example::

        import socketserver
        from gtcpserver import Server, from_socketserver

        class Echo(socketserver.StreamRequestHandler):
            def handle(self):
                for line in self.rfile:
                    self.wfile.write(line)

        server = Server("127.0.0.1:5000", from_socketserver(Echo))
    """
    return SocketServerHandler(handler_class, server)
