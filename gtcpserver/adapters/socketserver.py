"""Handler classes made for the standard library's socketserver, unchanged."""

from __future__ import annotations

import socketserver
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from ..connection import Connection
from ..errors import ConfigError


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
