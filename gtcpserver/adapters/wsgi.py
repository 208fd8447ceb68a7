"""WSGI applications (PEP 3333), by gevent.pywsgi on our sockets, pool and TLS."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from gevent import pywsgi

from ..connection import Connection
from ..errors import ConfigError
from ..logs import FaultLimiter, also, fault_key

log = logging.getLogger("gtcpserver.wsgi")


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
