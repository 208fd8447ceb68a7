"""Existing code on our server: classes made for the standard library's socketserver, and WSGI applications.

    Server("127.0.0.1:8000", from_socketserver(http.server.SimpleHTTPRequestHandler)).serve_forever()
    Server("127.0.0.1:8000", from_wsgi(app)).serve_forever()

They run as they are, each connection in a greenlet. Patch the standard library first (``gevent.monkey.patch_all()``;
``gtcpserver serve`` does), so that what they call waits on the event loop.
"""

from __future__ import annotations

import logging
import socketserver
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from gevent import pywsgi

from .connection import Connection
from .errors import ConfigError
from .logs import FaultLimiter, also, fault_key

log = logging.getLogger("gtcpserver.wsgi")


# -- socketserver ------------------------------------------------------------------------------------------------------


class SocketServerHandler:
    """Serves each connection with an instance of a ``socketserver`` handler class; see :func:`from_socketserver`."""

    def __init__(self, handler_class: type[socketserver.BaseRequestHandler], server: Any = None) -> None:
        if not (isinstance(handler_class, type) and issubclass(handler_class, socketserver.BaseRequestHandler)):
            raise ConfigError(
                f"handler_class must be a subclass of socketserver.BaseRequestHandler, got {handler_class!r}"
            )
        self.handler_class = handler_class
        self._class = _with_idle(handler_class) if issubclass(handler_class, BaseHTTPRequestHandler) else handler_class
        self._server = server

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        server: Any = self._server if self._server is not None else _Standin(self.handler_class, conn)
        # It does everything in its constructor: setup(), handle(), finish().
        self._class(conn, conn.client_address, server)


class _Standin:
    """What handlers ask their ``server`` for: its address, mostly."""

    def __init__(self, handler_class: type[Any], conn: Connection) -> None:
        self.RequestHandlerClass = handler_class
        self.socket = conn
        self.server_address = address = conn.server_address
        is_tcp = isinstance(address, tuple)
        self.server_name: str = address[0] if is_tcp else str(address)
        self.server_port: int = address[1] if is_tcp else 0


def _with_idle(handler_class: type[Any]) -> type[Any]:
    """The same, but that it tells when it waits for the next request: a stop may close the connection then."""

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

    Handler.__name__, Handler.__qualname__ = handler_class.__name__, handler_class.__qualname__
    Handler.__module__ = handler_class.__module__
    return Handler


def from_socketserver(
    handler_class: type[socketserver.BaseRequestHandler], server: Any = None
) -> Callable[[Connection], None]:
    """A handler for :class:`Server` that runs a ``socketserver`` handler class, unchanged.

    Args:
        handler_class: a subclass of ``socketserver.BaseRequestHandler`` or ``StreamRequestHandler``, such as
            ``http.server.SimpleHTTPRequestHandler``.
        server: what instances get as ``self.server``; None: an object with ``server_address``, ``server_name``,
            ``server_port`` and ``RequestHandlerClass``. Handlers that want more of it, as those of ``xmlrpc.server``,
            get theirs: ``SimpleXMLRPCServer(("", 0), bind_and_activate=False)``, with its functions registered.

    Its ``timeout`` holds (seconds in which nothing moves). Exceptions go where those of any handler go.

    Raises:
        ConfigError: it is no such class.
    """
    return SocketServerHandler(handler_class, server)


# -- WSGI --------------------------------------------------------------------------------------------------------------


class _WSGIHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """gevent's, but that the connection stays ours to close, and that it tells when it waits for a request."""

    def _log_error(self, kind: Any, error: Any, trace: Any) -> None:
        # gevent's goes to the hub, which prints it.
        left_out = self.server.faults.allow(fault_key(kind, trace))
        if left_out is not None:
            log.error("application failed%s", also(left_out), exc_info=(kind, error, trace))

    def handle(self) -> None:
        conn = self.socket
        while True:
            try:
                with conn.idle():
                    more = self.rfile.peek(1)
            except TimeoutError:
                return
            if not more:
                return
            result = self.handle_one_request()
            if result is True and not conn.server.stopping:
                continue
            if isinstance(result, tuple):
                self.status, answer = result
                conn.sendall(answer)
            return


class WSGIHandler:
    """Serves each connection with a WSGI application; see :func:`from_wsgi`."""

    def __init__(self, application: Callable[..., Any], access_log: bool = False) -> None:
        if not callable(application):
            raise ConfigError(f"application must be callable, got {application!r}")
        self._faults = FaultLimiter()
        # It is never started: it holds what its handlers ask for.
        self._server = pywsgi.WSGIServer(
            ("127.0.0.1", 0), application, log=log if access_log else None, error_log=log, handler_class=_WSGIHandler
        )

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        server = self._server
        handler = _WSGIHandler(conn, conn.client_address, _ForConnection(server, conn, self._faults))
        try:
            handler.handle()
        finally:
            handler.rfile.close()


class _ForConnection:
    """A WSGIServer as one connection sees it: with the address that the client has connected to."""

    def __init__(self, server: Any, conn: Connection, faults: FaultLimiter) -> None:
        self._server = server
        self._conn = conn
        self.faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = self._server.get_environ()
        address = self._conn.server_address
        name, port = (address[0], address[1]) if isinstance(address, tuple) else ("localhost", 0)
        environ["SERVER_NAME"], environ["SERVER_PORT"] = name, str(port)
        environ["wsgi.url_scheme"] = "http" if self._conn.tls is None else "https"
        return environ


def from_wsgi(application: Callable[..., Any], *, access_log: bool = False) -> Callable[[Connection], None]:
    """A handler for :class:`Server` that runs a WSGI application (PEP 3333), by ``gevent.pywsgi``.

    Args:
        application: called with the environment and ``start_response``.
        access_log: write a line for each request to the logger "gtcpserver.wsgi".

    A stop finishes the requests that are under way and closes connections that wait for another.

    Raises:
        ConfigError: it is not callable.
    """
    return WSGIHandler(application, access_log)
