"""Run WSGI applications (PEP 3333) with gevent.pywsgi on our sockets, pool and TLS.

gevent.pywsgi answers. This module reads the request, by the rules of http1/head.py and http1/chunks.py: pywsgi's parser
accepts heads that a proxy in front reads differently, which allows request smuggling.
"""

from __future__ import annotations

import http
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from gevent import pywsgi
from greenlet import GreenletExit

from gtcpserver.callables import check_application
from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key, own_logger
from gtcpserver.http1.head import (
    MOST_EMPTY_LINES,
    Fields,
    Head,
    HttpError,
    check_head,
    find_end_of_head,
    remembered,
    size_of_empty_lines,
)
from gtcpserver.process.forked import end_process, runs_handler
from gtcpserver.server.describe import peer
from gtcpserver.server.outcome import is_client_error
from gtcpserver.server.time_limits import HandlerTimedOut, TooSlow

from .wsgi_body import BodyError, RequestBody

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = own_logger("gtcpserver.wsgi")

#: Seconds from the first byte of a request's head to its end; the same as in the static file server.
HEAD_TIMEOUT = 30.0


def _variables_of(fields: Fields) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in fields.headers:
        if b"_" in name:
            continue  # "X_User" would pass for "X-User", which a proxy in front may have checked
        key = "HTTP_" + name.decode().upper().replace("-", "_")
        text = value.decode("latin-1")
        if key in found:
            found[key] += ("; " if key == "HTTP_COOKIE" else ",") + text
        else:
            found[key] = text
    if found.pop("HTTP_CONTENT_LENGTH", None):
        found["CONTENT_LENGTH"] = fields.values(b"content-length")[0].decode()
    if found.pop("HTTP_CONTENT_TYPE", None) is not None:
        found["CONTENT_TYPE"] = fields.values(b"content-type")[0].decode("latin-1")
    return found


def _forked_in_application(variables: Mapping[str, Any], in_child: bool) -> None:
    # An application answers by its return value, so its child does not get the connection.
    if in_child:
        handler: _WSGIHandler = variables["self"]
        handler.forked()


class _WSGIHandler(pywsgi.WSGIHandler):  # type: ignore[misc]
    """gevent's handler from the application on. Reading the request, and closing the connection, are ours."""

    socket: Connection
    # For type checkers, which do not know gevent's attributes: those set for each request.
    _orig_status: str | None
    response_headers: list[tuple[bytes, bytes]]

    def __init__(self, conn: Connection, server: _ForConnection) -> None:
        # Not gevent's constructor: it makes a file, which reads beyond one request.
        self.socket = conn
        self.client_address = conn.client_address
        self.server = server
        self._body: RequestBody | None = None
        self._unsent: OSError | None = None
        self._has_raw_input = False
        # Of the last request: most have the same fields as the one before.
        self._last: Head | None = None
        self._variables: tuple[Fields | None, dict[str, str]] = None, {}

    def handle(self) -> None:
        # In a stop, a wait for the next request ends at once, unless it has arrived.
        while (head := self._next_head()) is not None:
            if not self._serve_one(head):
                return

    # -- the request -------------------------------------------------------------------------------------------------

    def _next_head(self) -> Head | None:
        """Return the head of the next request; None if there is none, or it was refused.

        Raises:
            TimeoutError: the head began, but did not arrive completely in time. The client got an answer.
        """
        conn = self.socket
        try:
            with conn.idle():
                data = conn.recv(READ_AHEAD)
        except TimeoutError:
            return None
        if not data:
            return None
        try:
            end = None if data.startswith(b"\r\n") else find_end_of_head(data)
            if end is None:
                data, end = self._rest_of_head(data)
            if end < len(data):
                conn.unread(data[end:])
                data = data[:end]
            head = check_head(data, self._last)
            self._last = remembered(head)
            return head
        except HttpError as error:
            self._note_bad_request(error)
            self._refuse(error.status, str(error))
            return None
        except TimeoutError:
            self._refuse(408, "The request took too long.")
            raise

    def _rest_of_head(self, data: bytes) -> tuple[bytes, int]:
        """Return bytes that begin with a head, and the position of its end."""
        with self.socket.deadline(HEAD_TIMEOUT):
            searched = skipped = 0
            while True:
                # A client may send empty lines before a request (RFC 9112 section 2.2).
                if empty := size_of_empty_lines(data):
                    skipped += empty
                    if skipped > 2 * MOST_EMPTY_LINES:
                        raise HttpError(400, f"There are more than {MOST_EMPTY_LINES} empty lines before the request.")
                    data, searched = data[empty:], 0
                end = find_end_of_head(data, searched)
                if end is not None:
                    return data, end
                searched = len(data)
                more = self.socket.recv(READ_AHEAD)
                if not more:
                    raise HttpError(400, "The request ended before its head did.")
                data += more

    def _refuse(self, status: int, message: str) -> None:
        self.command, self.requestline, self.headers_sent = "", "-", False
        self.time_start = self.time_finish = time.time()
        self._answer_error(status, message)
        self.log_request()

    def _note_bad_request(self, error: Exception) -> None:
        self.server.counters["bad_request"] += 1
        if log.isEnabledFor(logging.DEBUG):
            log.debug("bad request from %s: %s", peer(self.socket), error)

    def _serve_one(self, head: Head) -> bool:
        """Serve a request; return False if the connection ends with it."""
        self.command, self.path = head.method.decode(), head.target.decode()
        self.request_version = "HTTP/1.0" if head.version == b"1.0" else "HTTP/1.1"
        self.requestline = f"{self.command} {self.path} {self.request_version}"
        connection = b",".join(head.values(b"connection")).lower()
        options = [option.strip(b" \t") for option in connection.split(b",")] if connection else []
        self.close_connection = b"close" in options or (head.version == b"1.0" and b"keep-alive" not in options)
        file: Any = None
        if connection == b"upgrade" or [value.lower() for value in head.values(b"upgrade")] == [b"websocket"]:
            # The application gets the connection as a file, as from gevent. The position where it stopped reading is
            # unknown.
            file = self.socket.makefile("rb")
            self._has_raw_input = self.close_connection = True
        elif head.has_body:
            self._body = RequestBody(self.socket, head)
            file = io.BufferedReader(self._body)
        if head.method == b"CONNECT":
            self.close_connection = True  # the next bytes may belong to a tunnel
        self.environ = self._make_environ(head, file)
        self.application = self.server.application
        try:
            self._serve_application()
        finally:
            self._unsent = None
            if self._body is not None:
                self._body.fault = None  # it refers to this frame: a cycle
                self._body = None
            elif file is not None:
                file.close()
        return not self.close_connection

    def _make_environ(self, head: Head, file: Any) -> dict[str, Any]:
        env = self.server.get_environ()
        path, _, query = self.path.partition("?")
        env["REQUEST_METHOD"] = self.command
        env["PATH_INFO"] = unquote(path, "latin-1") if "%" in path else path
        env["QUERY_STRING"] = query
        env["SERVER_PROTOCOL"] = self.request_version
        env.update(self._variables_of(head))
        env["wsgi.input"] = file if file is not None else io.BytesIO()
        # gevent's key that says: the input has an end.
        env["wsgi.input_terminated"] = not self._has_raw_input
        return env

    def _variables_of(self, head: Head) -> dict[str, str]:
        """Return what the environment has of the fields."""
        fields, variables = self._variables
        if fields is not head.fields:
            variables = _variables_of(head.fields)
            self._variables = head.fields if self._last is head else None, variables
        return variables

    # -- the application ---------------------------------------------------------------------------------------------

    def _serve_application(self) -> None:
        # gevent's format_request prints the difference.
        begun = time.monotonic()
        self.time_start = time.time()
        self.status = self._orig_status = self.result = None
        self.headers_sent = self.response_use_chunked = self.connection_upgraded = False
        self.response_length = 0
        end: BaseException | None = None
        try:
            try:
                self.run_application()
                if not (self.headers_sent or self._has_raw_input):
                    raise self.ApplicationError("The application did not call start_response()")
            except BaseException as error:
                self.close_connection = True
                end = self._application_raised(error)
            if end is None:
                self._discard_body()
            else:
                raise end
        finally:
            del end  # it refers to this frame: a cycle
            self.time_finish = self.time_start + time.monotonic() - begun
            self.log_request()

    runs_handler(_serve_application, _forked_in_application)

    def _discard_body(self) -> None:
        body = self._body
        if body is None:
            return
        try:
            if not body.discard():
                self.close_connection = True
        except BodyError as error:
            self.close_connection = True
            if error.malformed:
                self._note_bad_request(error)
                self._answer_error(400, str(error))
        except OSError:
            self.close_connection = True

    def _application_raised(self, error: BaseException) -> BaseException | None:
        """Answer if possible; return the error that ends the connection, None for an orderly end."""
        fault: OSError | None = self._unsent or (self._body.fault if self._body is not None else None)
        if fault is None and self._has_raw_input and isinstance(error, OSError) and is_client_error(error, self.socket):
            fault = error
        if fault is not None and _comes_of(error, fault):
            return self._client_failed(fault)
        is_cut = isinstance(error, (GreenletExit, TooSlow))
        if is_cut:
            self._end_in_disorder()
            return error
        if isinstance(error, HandlerTimedOut):
            self._answer_error(500, "The application took too long.")
            return error
        left_out = self.server.faults.allow(fault_key(type(error), error.__traceback__))
        if left_out is not None:
            log.error("application failed%s", also(left_out), exc_info=error)
        self._answer_error(500, "Internal Server Error")
        return None

    def _client_failed(self, fault: OSError) -> OSError | None:
        """Handle an error of the connection that the application passed on: the application did not fail."""
        if isinstance(fault, BodyError):
            if fault.malformed:
                self._note_bad_request(fault)
            self._answer_error(400, str(fault))
            return None if fault.malformed else fault
        if isinstance(fault, TimeoutError):
            self._answer_error(408, "The body of the request took too long.")
        self._end_in_disorder()
        return fault

    # -- a fork in the application (see process/forked.py) -----------------------------------------------------------

    def forked(self) -> None:
        """End the child when the application returns there. It must not answer a second time."""
        self.__class__ = _WSGIHandlerInChild

    # -- the answer --------------------------------------------------------------------------------------------------

    def finalize_headers(self) -> None:
        super().finalize_headers()
        body = self._body
        if body is not None and body.awaits_100 and not body.ended:
            # No interim answer can follow now, so it is unknown whether the client will send its body.
            self.close_connection = True
        if self.command == "HEAD":
            self.response_use_chunked = False  # not even the end of a body
        elif not self._is_delimited():
            self.close_connection = True
        if self.socket.should_leave:
            # Told now, the client sends its next request elsewhere, instead of to a connection that is about to end.
            self.close_connection = True
        if self.close_connection and not self.connection_upgraded:
            kept = [header for header in self.response_headers if header[0].lower() != b"connection"]
            self.response_headers = [*kept, (b"Connection", b"close")]

    def _is_delimited(self) -> bool:
        """Return whether the client can tell the end of the answer, and whether it was cut."""
        return (
            self.response_use_chunked
            or self.command == "HEAD"
            or self.code in (204, 304)
            or any(name.lower() == b"content-length" for name, _ in self.response_headers)
        )

    def _write(self, data: bytes) -> None:
        # An application may send a body to HEAD, too: the client would read it as the next answer.
        if self.command != "HEAD":
            super()._write(data)

    def _sendall(self, data: Any) -> None:
        try:
            self.socket.sendall(data)
        except OSError as error:
            self._unsent = error
            raise
        self.response_length += len(data)

    def _answer_error(self, status: int, message: str) -> None:
        """Answer with an error, unless an answer has started; the last answer of the connection."""
        if self.headers_sent or self._unsent is not None:
            self._end_in_disorder()
            return
        self._orig_status = f"{status} {http.HTTPStatus(status).phrase}"
        text = f"{message}\n".encode()
        self.headers_sent = True
        try:
            self._sendall(
                f"HTTP/1.1 {self._orig_status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
                f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode()
                + (b"" if self.command == "HEAD" else text)
            )
        except OSError:
            pass  # the client left

    def _end_in_disorder(self) -> None:
        """Reset instead of close: a partial answer that only the close delimits must not look complete."""
        if self.headers_sent and self.response_headers is not None and not self._is_delimited():
            self.socket.abort()


class _WSGIHandlerInChild(_WSGIHandler):
    """What a handler becomes in a child that its application has forked."""

    def process_result(self) -> None:
        end_process()

    def _sendall(self, data: Any) -> None:
        end_process()

    def _application_raised(self, error: BaseException) -> BaseException | None:
        end_process(error)


def _comes_of(error: BaseException | None, fault: BaseException) -> bool:
    """Return whether an exception is ``fault``, or was raised because of it."""
    for _ in range(20):  # bounded, in case a program made the chain a cycle
        if error is None or error is fault:
            break
        error = error.__cause__ or error.__context__
    return error is fault


class WSGIHandler:
    r"""Serves each connection with a WSGI application; see :func:`from_wsgi`.

    Attributes:
        counters: "bad_request": requests refused, or ended, because they break the rules of HTTP.

    Example::

        from gtcpserver import Server
        from gtcpserver.adapters import WSGIHandler

        def application(environment, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"Hello\n"]

        server = Server("127.0.0.1:8000", WSGIHandler(application))
    """

    def __init__(self, application: WSGIApplication, access_log: bool = False) -> None:
        check_application(application)
        self.counters: Counter[str] = Counter()
        self._faults = FaultLimiter()
        # Never started: it holds the attributes that its handlers need.
        self._server = pywsgi.WSGIServer(("127.0.0.1", 0), application, log=log if access_log else None, error_log=log)

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        _WSGIHandler(conn, _ForConnection(self._server, conn, self._faults, self.counters)).handle()


class _ForConnection:
    """A WSGIServer as one connection sees it: with the addresses of both ends."""

    def __init__(self, server: Any, conn: Connection, faults: FaultLimiter, counters: Counter[str]) -> None:
        self.application = server.application
        self.log = server.log
        self.faults = faults
        self.counters = counters
        self._server = server
        self._conn = conn
        self._environ: dict[str, Any] | None = None

    def get_environ(self) -> dict[str, Any]:
        """Return the part of the environment common to all requests of the connection."""
        if self._environ is None:
            self._environ = self._make_environ()
        return self._environ.copy()

    def _make_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = self._server.get_environ()
        address = self._conn.server_address
        name, port = (address[0], address[1]) if isinstance(address, tuple) else ("localhost", 0)
        environ["SERVER_NAME"], environ["SERVER_PORT"] = name, str(port)
        environ["wsgi.url_scheme"] = "http" if self._conn.tls is None else "https"
        client = self._conn.client_address
        if isinstance(client, tuple):
            environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = str(client[0]), str(client[1])
        return environ


def from_wsgi(application: WSGIApplication, *, access_log: bool = False) -> Callable[[Connection], None]:
    r"""Return a handler for :class:`Server` that runs a WSGI application (PEP 3333) with ``gevent.pywsgi``.

    Args:
        application: called with the environment and ``start_response``.
        access_log: write a line for each request to the logger "gtcpserver.wsgi".

    Requests are read strictly: a request that a proxy in front could read differently is answered with 400 (or 501,
    505), which ends the connection, and counted as "bad_request". Reading from ``wsgi.input`` raises an OSError if the
    client cuts its body short or breaks its chunks; an application that lets the error propagate has not failed.

    A stop finishes the requests under way and closes connections that wait for another request.

    Raises:
        ConfigError: the application is not callable, async (made for ASGI), or takes other arguments.

    Example::

        from gtcpserver import Server, from_wsgi

        def application(environment, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b"Hello\n"]

        server = Server("127.0.0.1:8000", from_wsgi(application))
    """
    return WSGIHandler(application, access_log)
