"""An HTTP client's connection: CONNECT, and requests that are forwarded one after another."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import gevent
import h11

from ..connection import READ_AHEAD, Connection
from ..errors import DeadlineExceeded
from .gate import Denied, Visitor, result_of
from .http_messages import (
    CHALLENGE,
    Head,
    HttpError,
    absolute_target,
    basic_credentials,
    check_head,
    check_loop,
    connect_target,
    end_to_end,
    error_body,
    find_end_of_head,
    wants_upgrade,
    with_via,
)
from .record import AccessRecord
from .socks_session import tunnel
from .target import Target

log = logging.getLogger("gtcpserver.proxy")

#: What an origin may have in its head.
LONGEST_ANSWER_HEAD = 256 * 1024

#: A method that may be repeated if its connection turns out to be dead (RFC 9110 section 9.2.2).
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))


class OriginFailed(Exception):
    """The origin closed, or sent what is no answer.

    Attributes:
        mute: it had not sent a byte.
    """

    def __init__(self, message: str, mute: bool = False) -> None:
        super().__init__(message)
        self.mute = mute


class Origin:
    """A connection to an origin server, which may serve several requests."""

    def __init__(self, target: Target, connection: Connection, record: AccessRecord) -> None:
        self.target = target
        self.connection = connection
        self.connected = record.connected
        self.upstream = record.upstream
        self.used = 0
        self.protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_ANSWER_HEAD)

    def send(self, event: Any) -> None:
        data = self.protocol.send(event)
        if data:
            self.connection.sendall(data)

    def is_alive(self) -> bool:
        """Whether an idle connection can still be used: nothing has come on it, not even its end."""
        try:
            self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def next_event(self) -> Any:
        """The next event of the answer. Raises OriginFailed, OSError."""
        while True:
            try:
                event = self.protocol.next_event()
            except h11.RemoteProtocolError as error:
                raise OriginFailed(str(error)) from None
            if event is not h11.NEED_DATA:
                return event
            data = self.connection.recv(READ_AHEAD)
            if not data and self.protocol.their_state is h11.SEND_RESPONSE:
                raise OriginFailed("closed without an answer", mute=not self.protocol.trailing_data[0])
            self.protocol.receive_data(data)


class HttpSession:
    """One client.

    Args:
        pseudonym: the name of this proxy in Via.
        write: called with the record of each request, when it is done.
    """

    def __init__(self, conn: Connection, visitor: Visitor, pseudonym: bytes, write: Any) -> None:
        self._conn = conn
        self._visitor = visitor
        self._pseudonym = pseudonym
        self._write = write
        self._origin: Origin | None = None
        self._received = b""  # from the client, not yet looked at
        self._known: bytes | None = None  # the Proxy-Authorization that was found to be right

    def serve(self) -> None:
        """Serve requests until the connection ends."""
        first = self._visitor.record
        timeouts = self._visitor.gate.timeouts
        self._conn.settimeout(timeouts.keep_alive)
        try:
            while True:
                head = self._next_head()
                if head is None:
                    return
                record = self._visitor.record
                record.protocol, record.command = "http", head.method.decode()
                keep = False
                try:
                    keep = self._serve_one(head)
                finally:
                    self._write(record)
                    self._visitor.record = AccessRecord(first.client, first.listener)
                if not keep:
                    return
        finally:
            self._drop_origin()

    def _next_head(self) -> Head | None:
        """The head of the next request; None when there is none, or it was answered already."""
        conn = self._conn
        if not self._received:
            with conn.idle():
                self._received = conn.recv(READ_AHEAD)
            if not self._received:
                return None
        record = self._visitor.record = replace_times(self._visitor.record)
        try:
            with conn.deadline(self._visitor.gate.timeouts.negotiate):
                self._received = self._received.lstrip(b"\r\n")  # RFC 9112 section 2.2
                while (end := find_end_of_head(self._received)) is None:
                    more = conn.recv(READ_AHEAD)
                    if not more:
                        raise HttpError(400, "The request ended before its head did.")
                    self._received = (self._received + more).lstrip(b"\r\n")
            raw, self._received = self._received[:end], self._received[end:]
            head = check_head(raw)
        except DeadlineExceeded:
            error = HttpError(408, "The request took too long.")
        except HttpError as found:
            error = found
        else:
            record.note_negotiated()
            return head
        record.protocol, record.result, record.detail = "http", "bad_request", str(error)
        self._answer_error(None, error)
        self._write(record)
        return None

    def _serve_one(self, head: Head) -> bool:
        """Serve a request; False if the connection ends with it."""
        record = self._visitor.record
        try:
            self._check_client(head)
            check_loop(head, self._pseudonym)
            if head.method == b"CONNECT":
                self._connect(head)
                return False
            return self._forward(head)
        except HttpError as error:
            if record.result == "failed" and error.status < 500:
                record.result, record.detail = "bad_request", str(error)
            return self._answer_error(head, error)

    def _check_client(self, head: Head) -> None:
        visitor = self._visitor
        if not visitor.admitted:
            raise HttpError(403, "You may not use this proxy.")
        if visitor.auth is None:
            return
        given = b"".join(head.values(b"proxy-authorization"))
        if self._known is not None and given == self._known:
            visitor.record.user = self._user
            return
        credentials = basic_credentials(head)
        if credentials is None or not visitor.authenticate(*credentials):
            visitor.record.result = "authentication_failed"
            raise HttpError(407, "This proxy needs your name and password.", [CHALLENGE], keep=not _has_body(head))
        self._known, self._user = given, visitor.record.user

    _user: str | None = None

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Failures to reach a destination, as the answers of a proxy."""
        try:
            yield
        except Denied:
            raise HttpError(403, "The rules of this proxy do not allow this destination.", keep=True) from None
        except OSError as error:
            status, message = {
                "unresolved": (502, "The host name of the destination is not known."),
                "connect_timeout": (504, "The destination did not answer in time."),
                "refused": (502, "The destination refused the connection."),
                "unreachable": (502, "The destination cannot be reached."),
            }.get(result_of(error), (502, "The connection to the destination failed."))
            raise HttpError(status, message, keep=True) from None

    # -- CONNECT -----------------------------------------------------------------------------------------------------

    def _connect(self, head: Head) -> None:
        target = connect_target(head)
        with self._failures():
            upstream = self._visitor.open(target)
        with upstream:
            # Neither Content-Length nor Transfer-Encoding (RFC 9110 section 9.3.6).
            self._conn.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._conn.unread(self._received)  # what came behind the head is for the destination
            self._received = b""
            tunnel(self._conn, upstream, self._visitor)

    # -- forwarding --------------------------------------------------------------------------------------------------

    def _forward(self, head: Head) -> bool:
        target, host, path = absolute_target(head)
        upgrade = wants_upgrade(head)
        request = self._request_for_origin(head, host, path, upgrade)
        client = h11.Connection(h11.SERVER)
        client.receive_data(_for_h11(head))
        client.next_event()  # the request, which we have read ourselves
        body = _Body(self, client)
        try:
            return self._exchange(head, target, request, client, body)
        finally:
            body.stop()

    def _request_for_origin(self, head: Head, host: bytes, path: bytes, upgrade: bytes | None) -> h11.Request:
        headers = [(name, value) for name, value in end_to_end(head.headers) if name.lower() != b"host"]
        headers = [(b"Host", host), *with_via(headers, head.version, self._pseudonym)]
        if head.values(b"transfer-encoding"):
            headers.append((b"Transfer-Encoding", b"chunked"))
        if upgrade is not None:
            headers += [(b"Connection", b"upgrade"), (b"Upgrade", upgrade)]
        return h11.Request(method=head.method, target=path, headers=headers)

    def _exchange(self, head: Head, target: Target, request: h11.Request, client: Any, body: _Body) -> bool:
        record = self._visitor.record
        while True:
            origin, reused = self._origin_for(target)
            try:
                with self._failures():
                    origin.send(request)
                    body.start(origin)
                answer = self._first_event(origin)
                break
            except (OriginFailed, HttpError) as error:
                self._drop_origin()
                died = isinstance(error, HttpError) or error.mute
                if reused and died and head.method in IDEMPOTENT and not _has_body(head):
                    continue  # an idle connection that the origin had given up; the next one is fresh
                record.result, record.detail = "failed", str(error)
                if isinstance(error, HttpError):
                    raise
                raise HttpError(502, "The destination closed the connection without an answer.") from None
        return self._pass_on(head, origin, client, answer, body)

    def _origin_for(self, target: Target) -> tuple[Origin, bool]:
        record, origin = self._visitor.record, self._origin
        if origin is not None and origin.target == target and origin.is_alive():
            # The rules are asked again: they may be for this user only.
            record.asked, record.connected = str(target), origin.connected
            return origin, True
        self._drop_origin()
        with self._failures():
            connection = self._visitor.open(target)
        connection.settimeout(self._visitor.gate.timeouts.answer)
        self._origin = origin = Origin(target, connection, record)
        return origin, False

    def _drop_origin(self) -> None:
        if self._origin is not None:
            self._origin.connection.close()
            self._origin = None

    def _first_event(self, origin: Origin) -> Any:
        try:
            return origin.next_event()
        except TimeoutError:
            raise HttpError(504, "The destination did not answer in time.") from None
        except OSError as error:
            raise OriginFailed(str(error), mute=True) from None

    def _pass_on(self, head: Head, origin: Origin, client: Any, event: Any, body: _Body) -> bool:
        """Send the answer to the client; False if its connection ends with it."""
        record, conn = self._visitor.record, self._conn
        try:
            while isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    self._switch(origin, event)
                    return False
                if head.version == b"1.1":  # HTTP/1.0 knows none (RFC 9110 section 15.2)
                    conn.sendall(client.send(replace_headers(event, end_to_end(event.headers.raw_items()))))
                event = origin.next_event()
            headers = with_via(end_to_end(event.headers.raw_items()), event.http_version, self._pseudonym)
            if not body.done and not _has_body(head):
                body.done = True
            conn.sendall(client.send(h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)))
            while not isinstance(event := origin.next_event(), h11.EndOfMessage):
                data = bytes(event.data)
                record.received += len(data)
                conn.sendall(client.send(h11.Data(data=data)) or b"")
            trailers = end_to_end(event.headers.raw_items())
            data = client.send(h11.EndOfMessage(headers=trailers)) if client.our_state is h11.SEND_BODY else b""
            if data:
                conn.sendall(data)
        except OriginFailed as error:
            # Part of the answer is with the client: only a reset says that it is not all.
            record.result, record.detail = "failed", str(error)
            conn.abort()
            self._drop_origin()
            return False
        except OSError as error:
            record.result, record.detail = "reset", error.strerror or str(error)
            conn.abort()
            self._drop_origin()
            return False
        record.result, record.detail = "ok", str(event and "") or ""
        record.sent = body.sent
        if not body.done:
            # The origin has answered before it had read everything; what follows belongs to no request.
            self._drop_origin()
            return False
        self._recycle(origin)
        return bool(client.our_state is h11.DONE and client.their_state is h11.DONE and not _wants_close(head))

    def _recycle(self, origin: Origin) -> None:
        protocol = origin.protocol
        if (
            protocol.our_state is h11.DONE
            and protocol.their_state is h11.DONE
            and protocol.trailing_data == (b"", False)
        ):
            protocol.start_next_cycle()
            origin.used += 1
        else:
            self._drop_origin()

    def _switch(self, origin: Origin, event: Any) -> None:
        """101: from here on it is another protocol (RFC 9110 section 15.2.2)."""
        lines = [b"HTTP/1.1 101 Switching Protocols", b"Connection: upgrade"]
        lines += [name + b": " + value for name, value in event.headers.raw_items() if name.lower() == b"upgrade"]
        lines += [name + b": " + value for name, value in end_to_end(event.headers.raw_items())]
        early = origin.protocol.trailing_data[0]
        self._conn.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + early)
        self._conn.unread(self._received)
        self._received = b""
        tunnel(self._conn, origin.connection, self._visitor)

    def _answer_error(self, head: Head | None, error: HttpError) -> bool:
        keep = error.keep and head is not None and not _has_body(head) and not _wants_close(head)
        body = error_body(error.status, str(error))
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(),
            *(name + b": " + value for name, value in error.headers),
            b"Content-Type: text/plain; charset=utf-8",
            b"Content-Length: %d" % len(body),
            b"Connection: %b" % (b"keep-alive" if keep else b"close"),
        ]
        shown = b"" if head is not None and head.method == b"HEAD" else body
        self._conn.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + shown)
        return keep


class _Body:
    """Brings the body of a request to the origin while the answer may already come back."""

    def __init__(self, session: HttpSession, client: Any) -> None:
        self._session = session
        self._client = client
        self._greenlet: Any = None
        self.done = False
        self.sent = 0

    def start(self, origin: Origin) -> None:
        """Send what there is; the rest in a greenlet of its own."""
        if self.done:
            origin.send(h11.EndOfMessage())
        elif self._greenlet is None:
            client = self._client
            event = client.next_event()
            if isinstance(event, h11.EndOfMessage):  # there is none
                self.done = True
                origin.send(h11.EndOfMessage())
            else:
                self._greenlet = gevent.spawn(self._pump, origin, event)

    def stop(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill()

    def _pump(self, origin: Origin, event: Any) -> None:
        session, client = self._session, self._client
        if session._received:
            client.receive_data(session._received)
            session._received = b""
        try:
            while not self.done:
                if event is h11.NEED_DATA:
                    data = session._conn.recv(READ_AHEAD)
                    client.receive_data(data)
                elif isinstance(event, h11.Data):
                    data = bytes(event.data)
                    self.sent += len(data)
                    origin.send(h11.Data(data=data))
                elif isinstance(event, h11.EndOfMessage):
                    origin.send(h11.EndOfMessage(headers=end_to_end(event.headers.raw_items())))
                    session._received = client.trailing_data[0]
                    self.done = True
                    return
                else:
                    break
                event = client.next_event()
        except (h11.ProtocolError, OSError):
            pass
        # The client broke off, or sent no body: the origin must not take what it has for the whole.
        origin.connection.abort()


def _has_body(head: Head) -> bool:
    return bool(head.values(b"transfer-encoding")) or head.values(b"content-length") not in ([], [b"0"])


def _wants_close(head: Head) -> bool:
    options = b",".join(head.values(b"connection") + head.values(b"proxy-connection")).lower()
    return b"close" in options or (head.version == b"1.0" and b"keep-alive" not in options)


def _for_h11(head: Head) -> bytes:
    """The head for h11, whose idea of the connection must be ours."""
    headers = [(name, value) for name, value in head.headers if name.lower() not in (b"connection", b"upgrade")]
    if _wants_close(head):
        headers.append((b"Connection", b"close"))
    if not head.values(b"host"):
        headers.append((b"Host", b"-"))
    lines = [head.method + b" / HTTP/" + head.version, *(name + b": " + value for name, value in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def replace_headers(event: Any, headers: Any) -> Any:
    """An informational response with other fields."""
    return h11.InformationalResponse(status_code=event.status_code, headers=headers, reason=event.reason)


def replace_times(record: AccessRecord) -> AccessRecord:
    """A record whose time begins now, with the first byte of a request."""
    return replace(AccessRecord(record.client, record.listener), result=record.result, detail=record.detail)
