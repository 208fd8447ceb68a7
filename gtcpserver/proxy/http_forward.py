"""Forward one request to its origin, and the response back."""

from __future__ import annotations

from time import monotonic

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.http1.head import Fields, Head, HttpError, remembered

from .http_answer import Answer
from .http_body import OriginFailed, RequestBody, send_answer, send_own_answer
from .http_fields import (
    Forwarded,
    end_to_end,
    forwards_left,
    traced,
    via,
    wanted_upgrade,
    with_client,
)
from .http_messages import (
    OriginRequest,
    absolute_target,
    basic_authorization,
    head_of_answer,
    plain_target,
    written,
)
from .http_origin import Origin, Origins, open_connection
from .limits import rest
from .socks_session import tunnel
from .succession import OpenTunnel
from .target import Target
from .visitor import Visitor

#: Methods that may be repeated if a connection turns out to be dead (RFC 9110 section 9.2.2).
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

#: An origin may send interim responses (1xx) for this many times `timeouts.answer`, an hour by default, in which its
#: client waits for a long operation (102); all heads together are limited by LONGEST_ANSWER_HEAD.
MOST_TIMES_OF_INTERIM = 30

#: Interim responses after which other clients have their turn; each takes 60 us.
INTERIM_IN_A_ROW = 8


class Forwarder:
    """Forward the requests of one client, and keep its origin connections between them.

    Args:
        conn: the client.
        visitor: who it is; its record is filled in.
        pseudonym: the name of this proxy in Via.
        forwarded: how origins are told for whom a request is made.
    """

    def __init__(self, conn: Connection, visitor: Visitor, pseudonym: bytes, forwarded: Forwarded) -> None:
        self._conn = conn
        self._visitor = visitor
        self._pseudonym = pseudonym
        self._forwarded = forwarded
        self._origins = Origins(visitor.gate.departures)
        # Of the last request: most have the same fields and the same destination as the one before.
        self._authority, self._place = b"", (Target("", 0), b"")
        self._fields: Fields | None = None
        self._written = b"", b"", b""  # for its origin: version, fields, upgrade

    def close(self) -> None:
        """Close the origin connections after the client has gone."""
        self._origins.close()

    def forward(self, head: Head, body: RequestBody) -> bool:
        """Serve a request; return False if the connection ends with it.

        Raises:
            HttpError: the error response for the client.
            OSError: error of the client's connection.
        """
        target, host, path = self._target(head)
        forwards = forwards_left(head)
        if forwards == 0:
            return self._answer_as_last(head, body)
        request = self._request_for_origin(head, host, path, forwards)
        body.prepare()
        try:
            with self._visitor.presence:
                origin, answer = self._ask(head, target, request, body)
            try:
                if answer.status == 101:
                    self._switch(origin, answer)
                    return False
                keep = self._pass_on(head, body, origin, answer)
            except BaseException:
                origin.close()
                raise
        finally:
            body.stop()
        if body.done and not answer.closes:
            self._origins.keep(origin)
        else:
            origin.close()
        return keep

    def _target(self, head: Head) -> tuple[Target, bytes, bytes]:
        """Return what `absolute_target` does."""
        authority, path = plain_target(head.target)
        if authority and authority == self._authority:
            return *self._place, path
        target, host, path = absolute_target(head)
        if authority:
            self._authority, self._place = authority, (target, host)
        return target, host, path

    def _answer_as_last(self, head: Head, body: RequestBody) -> bool:
        """Answer a request whose Max-Forwards is used up."""
        self._visitor.record.result = "ok"
        if head.method == b"TRACE":
            return send_own_answer(self._conn, head, body, 200, traced(head), [(b"Content-Type", b"message/http")])
        return send_own_answer(self._conn, head, body, 200, b"", [(b"Allow", b"*")])

    # -- to the origin -----------------------------------------------------------------------------------------------

    def _request_for_origin(self, head: Head, host: bytes, path: bytes, forwards: int | None) -> OriginRequest:
        authorization = basic_authorization(head)
        if (
            head.fields is self._fields
            and forwards is None
            and authorization is None
            and head.version == self._written[0]
        ):
            _, fields, upgrade = self._written
        else:
            fields, upgrade = self._fields_for_origin(head, forwards, authorization)
            if forwards is None and authorization is None and remembered(head) is not None:
                self._fields, self._written = head.fields, (head.version, fields, upgrade)
        return OriginRequest(head.method, path, b"Host: %b\r\n%b" % (host, fields), upgrade)

    def _fields_for_origin(
        self, head: Head, forwards: int | None = None, authorization: bytes | None = None
    ) -> tuple[bytes, bytes]:
        """Return the fields as they are written, without Host, and the protocols that the client wants to switch to."""
        headers = [(name, value) for name, value in end_to_end(head.headers) if name.lower() != b"host"]
        if forwards is not None:
            headers = [(name, value) for name, value in headers if name.lower() != b"max-forwards"]
            headers.append((b"Max-Forwards", b"%d" % (forwards - 1)))
        headers = with_client(headers, self._visitor.client, self._forwarded)
        if authorization is not None:
            headers.append((b"Authorization", authorization))
        fields = written(headers) + via(head.version, self._pseudonym)
        if head.is_chunked:
            fields += b"Transfer-Encoding: chunked\r\n"
        upgrade = wanted_upgrade(head) or b""
        if upgrade:
            fields += b"Connection: upgrade\r\nUpgrade: %b\r\n" % upgrade
        return fields, upgrade

    def _ask(self, head: Head, target: Target, request: OriginRequest, body: RequestBody) -> tuple[Origin, Answer]:
        record = self._visitor.record
        while True:
            origin, reused = self._origin_for(target)
            try:
                origin.ask(request, body)
                return origin, self._final_answer(head, origin, body)
            except OriginFailed as failure:
                origin.close()
                if body.error is None and reused and failure.mute and head.method in IDEMPOTENT and body.at_hand:
                    continue  # the origin closed the idle connection at this moment; the next one is fresh
                record.detail = str(failure)
                if body.error is not None:
                    raise body.error from None
                if failure.mute:
                    message = "The destination closed the connection without an answer."
                else:
                    message = "The answer of the destination cannot be understood."
                raise HttpError(502, message, keep=True) from None
            except TimeoutError:
                origin.close()
                record.result, record.detail = "answer_timeout", "no answer in time"
                raise HttpError(504, "The destination did not answer in time.", keep=True) from None
            except BaseException:
                origin.close()
                raise

    def _origin_for(self, target: Target) -> tuple[Origin, bool]:
        """Return a connection to the destination, and whether it has served a request before."""
        record = self._visitor.record
        # Rules may allow a destination to one user and not to another, and not after a reload.
        key = (target, record.user, self._visitor.gate.tenure)
        origin = self._origins.take(key)
        if origin is not None:
            record.asked, record.connected, record.upstream = origin.asked, origin.connected, origin.upstream
            self._visitor.opened = origin.opened
            return origin, True
        connection, forwarding = open_connection(self._visitor, target, for_request=True)
        visitor = self._visitor
        patience = visitor.gate.timeouts.answer
        origin = Origin(key, connection, record.connected, patience, forwarding, record.upstream, visitor.opened)
        return origin, False

    def _final_answer(self, head: Head, origin: Origin, body: RequestBody) -> Answer:
        """Return the final response; pass on interim ones before it, except to HTTP/1.0 (RFC 9110 section 15.2)."""
        until, number = None, 0
        while True:
            answer = origin.next_answer(body)
            if answer.status == 407 and origin.forwarding is not None:
                # The client's name and password are for us, and it must not send them again.
                self._visitor.record.result = "upstream_failed"
                raise OriginFailed("the next proxy does not accept our name and password")
            if answer.status >= 200 or answer.status == 101:
                return answer
            if head.version == b"1.1":
                self._conn.sendall(head_of_answer(answer.status, answer.reason, self._fields_for_client(answer)))
            until = until or monotonic() + MOST_TIMES_OF_INTERIM * origin.patience
            if monotonic() > until:
                raise TimeoutError("only interim answers")
            number += 1
            if number % INTERIM_IN_A_ROW == 0:
                gevent.sleep(0)

    # -- to the client -----------------------------------------------------------------------------------------------

    def _fields_for_client(self, answer: Answer) -> bytes:
        return answer.fields + via(answer.version, self._pseudonym)

    def _pass_on(self, head: Head, body: RequestBody, origin: Origin, answer: Answer) -> bool:
        """Send the response to the client; return False if its connection ends with it.

        Raises:
            OriginFailed, OSError: it has begun, and cannot be completed.
        """
        fields = self._fields_for_client(answer)
        in_chunks = answer.framing in ("chunked", "close") and head.version == b"1.1"
        if in_chunks:
            fields += b"Transfer-Encoding: chunked\r\n"
        # A response before the end of the request: the rest of the request has no use any more.
        close = head.wants_close or not body.done or self._conn.should_leave
        if close:
            fields += b"Connection: close\r\n"
        record = self._visitor.record
        self._received = 0
        self._pace = body.pace
        presence = self._visitor.presence
        presence.probe = b""
        try:
            with presence, OpenTunnel(self._visitor):
                send_answer(
                    presence,
                    head_of_answer(answer.status, answer.reason, fields),
                    answer,
                    origin,
                    in_chunks=in_chunks,
                    note=self._note_received,
                    splice=body.pace is None,
                )
        finally:
            record.sent, record.received = body.sent, self._received
        record.result = "ok"
        return not close

    def _note_received(self, size: int) -> None:
        self._received += size
        if self._pace is not None:
            rest(self._pace, size)

    def _switch(self, origin: Origin, answer: Answer) -> None:
        """Switch to another protocol after a 101 (RFC 9110 section 15.2.2)."""
        fields = b"Connection: upgrade\r\n" + written(answer.upgrade) + self._fields_for_client(answer)
        self._conn.sendall(head_of_answer(101, b"Switching Protocols", fields))
        with origin.connection:
            tunnel(self._conn, origin.connection, self._visitor)
