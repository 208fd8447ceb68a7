"""An HTTP client's connection: its requests, one after another, and their outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic, time

from greenlet import GreenletExit

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.http1.head import (
    END_OF_HEAD,
    LONGEST_HEAD,
    MOST_EMPTY_LINES,
    Head,
    HttpError,
    check_head,
    find_end_of_head,
    remembered,
    size_of_empty_lines,
)
from gtcpserver.server.outcome import is_client_error, was_raised_by_connection

from .departures import PROCESSING
from .errors import BadTarget, Cut, QuotaUsedUp
from .http_body import OriginFailed, RequestBody, send_own_answer
from .http_fields import CHALLENGE, REMOVED, Forwarded, basic_credentials, check_loop, hops_in
from .http_forward import Forwarder
from .http_messages import connect_target, error_body, with_ascii_target
from .http_origin import open_connection
from .limits import rest
from .pac import CONTENT_TYPE as PAC_TYPE
from .pac import PATHS, pac_script
from .record import AccessRecord
from .socks_session import tunnel
from .target import Target, parse_authority
from .visitor import Visitor

#: The methods of RFC 9110 section 9 and RFC 5789 except CONNECT; other methods are forwarded, too.
FORWARDED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"


class HttpSession:
    """One client.

    Args:
        pseudonym: the name of this proxy in Via.
        write: called with the record of each request, when it is done.
        forwarded: how origins are told for whom a request is made.
        pac: destinations that clients reach without this proxy, for the script that tells them so; None: no script.
        speaks_socks: whether clients may speak SOCKS at the same address.
        first_until: monotonic time by which the head of the first request must arrive; None: the usual timeout.
    """

    def __init__(
        self,
        conn: Connection,
        visitor: Visitor,
        pseudonym: bytes,
        write: Callable[[AccessRecord], object],
        forwarded: Forwarded = REMOVED,
        first_until: float | None = None,
        pac: Sequence[str] | None = None,
        speaks_socks: bool = False,
    ) -> None:
        self._conn = conn
        self._visitor = visitor
        self._pseudonym = pseudonym
        self._write = write
        self._first_until = first_until
        self._pac = pac
        self._speaks_socks = speaks_socks
        self._last: Head | None = None
        self._forwarder = Forwarder(conn, visitor, pseudonym, forwarded)

    def serve(self) -> None:
        """Serve requests until the connection ends."""
        try:
            while (head := self._next_head()) is not None:
                record = self._visitor.record
                record.protocol, record.command = "http", head.method.decode()
                try:
                    keep = self._serve_one(head)
                finally:
                    self._write(record)
                if not keep:
                    return
                self._visitor.new_record()
        finally:
            self._forwarder.close()

    # -- a request ---------------------------------------------------------------------------------------------------

    def _next_head(self) -> Head | None:
        """Return the head of the next request; None if there is none, or it was already answered."""
        conn, visitor = self._conn, self._visitor
        timeouts = visitor.gate.timeouts
        conn.settimeout(timeouts.keep_alive)
        with conn.idle():
            data = conn.recv(READ_AHEAD)
        if not data:
            return None
        conn.settimeout(timeouts.answer)
        record = visitor.record
        record.begin()
        try:
            head = check_head(with_ascii_target(self._read_head(data)), self._last)
        except TimeoutError:
            record.result, error = "negotiation_timeout", HttpError(408, "The request took too long.")
        except HttpError as found:
            record.result, error = "bad_request", found
        except ConnectionError as gone:
            record.protocol, record.result, record.detail = "http", "reset", gone.strerror or str(gone)
            self._write(record)
            raise
        else:
            record.note_negotiated()
            visitor.follow()
            self._last = remembered(head)
            return head
        record.protocol, record.detail = "http", str(error)
        try:
            self._answer_error(None, None, error)
        finally:
            self._write(record)
            del error  # its traceback references what was read, and this frame: a cycle
        return None

    def _time_for_head(self) -> float:
        seconds = self._visitor.gate.timeouts.negotiate
        if self._first_until is not None:
            seconds = max(0.001, min(seconds, self._first_until - monotonic()))
            self._first_until = None
        return seconds

    def _read_head(self, data: bytes) -> bytes:
        """Return the head that begins with `data`. Put surplus bytes back."""
        end = len(data) - len(END_OF_HEAD)
        if data.find(END_OF_HEAD) == end <= LONGEST_HEAD and data[0] > 0x20:
            self._first_until = None
            return data  # as most come: all of it, nothing behind it, and no empty lines before it
        with self._conn.deadline(self._time_for_head()):
            return self._read_head_in_time(data)

    def _read_head_in_time(self, data: bytes) -> bytes:
        data = self._skip_empty_lines(data)
        end = find_end_of_head(data)
        if end is not None:
            self._conn.unread(data[end:])
            return data[:end]
        pieces, searched = bytearray(data), 0
        while end is None:
            searched = len(pieces)
            pieces += self._more_of_head()
            end = find_end_of_head(pieces, searched)
        self._conn.unread(bytes(pieces[end:]))
        return bytes(pieces[:end])

    def _skip_empty_lines(self, data: bytes) -> bytes:
        """Return the beginning of the first line of a request."""
        skipped = 0
        while True:
            size = size_of_empty_lines(data)
            skipped += size
            if skipped > 2 * MOST_EMPTY_LINES:
                raise HttpError(400, f"There are more than {MOST_EMPTY_LINES} empty lines before the request.")
            data = data[size:]
            if data not in (b"", b"\r"):
                return data
            data += self._more_of_head()

    def _more_of_head(self) -> bytes:
        more: bytes = self._conn.recv(READ_AHEAD)
        if not more:
            raise HttpError(400, "The request ended before its head did.")
        return more

    def _serve_one(self, head: Head) -> bool:
        """Serve a request; return False if the connection ends with it."""
        record = self._visitor.record
        body = RequestBody(self._conn, head, self._visitor.gate.timeouts.answer)
        self._visitor.presence.probe = PROCESSING if head.version == b"1.1" else b""
        try:
            if head.target in PATHS and self._pac is not None and self._visitor.admitted:
                # Without a password: browsers have none for it, and it reveals nothing.
                return self._send_pac(head, body, self._pac)
            self._check_client(head)
            self._check_command(head)
            self._check_size(head)
            self._check_quota()
            body.pace = self._visitor.toll  # known once the user is
            check_loop(head, self._pseudonym)
            if head.method == b"CONNECT":
                self._connect(head)
                return False
            rest(body.pace, 0)
            return self._forwarder.forward(head, body) and body.consumed
        except HttpError as error:
            if record.result == "failed":
                record.detail = record.detail or str(error)
                if error.status < 500:
                    record.result = "bad_request"
                elif error.status == 508:
                    record.result = "loop"
            return self._answer_error(head, body, error)
        except OriginFailed as failure:
            # The client has a part of the response: only a reset tells it that this is not all.
            record.result, record.detail = "failed", str(failure)
            self._conn.abort()
        except OSError as error:
            self._conn.abort()
            record.detail = error.strerror or str(error)
            if is_client_error(error, self._conn):
                record.result = "reset"
            elif was_raised_by_connection(error):
                record.result = "failed"  # the destination failed
            else:
                raise  # an authenticator's error, say
        except Cut as cut:
            record.result, record.detail = cut.result, str(cut)
            self._conn.abort()
        except BaseException as error:
            if isinstance(error, GreenletExit):
                record.result, record.detail = "stopped", str(error)
            # If a response ends with the connection, a normal end would say that it was complete.
            self._conn.abort()
            raise
        return False

    def _send_pac(self, head: Head, body: RequestBody, direct: Sequence[str]) -> bool:
        """Send the script of `pac`, with the address at which the client has found this proxy."""
        if head.method not in (b"GET", b"HEAD"):
            raise HttpError(405, "This can only be read.", [(b"Allow", b"GET, HEAD")])
        own = self._visitor.own
        hosts = head.values(b"host")
        try:
            where = parse_authority(hosts[0].decode(), own[1] if own is not None else 80)
        except (IndexError, BadTarget, UnicodeDecodeError):
            if own is None:
                raise HttpError(400, "The field Host must name this proxy.") from None
            where = Target(str(own[0]), own[1], own[0])
        script = pac_script(f"{self._way()} {where}", direct)
        self._visitor.record.result = "ok"
        headers = [(b"Content-Type", PAC_TYPE), (b"Cache-Control", b"max-age=3600")]
        return send_own_answer(self._conn, head, body, 200, script, headers)

    def _way(self) -> str:
        """Return how a browser is to speak to this listener: in SOCKS where requests for "http://" are refused.

        Browsers have no passwords for SOCKS, and no TLS.
        """
        if self._conn.tls is not None:
            return "HTTPS"
        visitor = self._visitor
        if self._speaks_socks and not visitor.needs_password and "forward" not in visitor.gate.commands:
            return "SOCKS5"
        return "PROXY"

    def _check_client(self, head: Head) -> None:
        visitor = self._visitor
        if not visitor.admitted:
            if visitor.record.result == "limit":
                raise HttpError(503, "You have too many connections to this proxy.", [(b"Retry-After", b"10")])
            raise HttpError(403, "You may not use this proxy.")
        if not visitor.needs_password:
            return
        # For each request: the authenticator decides how long it remembers.
        credentials = basic_credentials(head)
        if credentials is None or not visitor.authenticate(*credentials):
            if visitor.record.result == "failed":
                visitor.record.result = "authentication_failed"
            raise HttpError(407, "This proxy needs your name and password.", [CHALLENGE], keep=True)

    def _check_quota(self) -> None:
        try:
            self._visitor.check_quota()
        except QuotaUsedUp as error:
            self._visitor.record.result, self._visitor.record.detail = "quota", error.why
            seconds = max(1, round(error.until.timestamp() - time()))
            text = f"Your quota of bytes is used up until {error.until:%Y-%m-%d %H:%M} UTC."
            raise HttpError(429, text, [(b"Retry-After", b"%d" % seconds)]) from None

    def _check_command(self, head: Head) -> None:
        # 405 has the field Allow (RFC 9110 section 15.5.6).
        if head.method == b"CONNECT":
            if not self._visitor.may_use("connect"):
                raise HttpError(405, "This proxy has no CONNECT.", [(b"Allow", FORWARDED_METHODS)])
        elif not self._visitor.may_use("forward"):
            raise HttpError(405, "This proxy forwards no requests: it only supports CONNECT.", [(b"Allow", b"CONNECT")])

    def _check_size(self, head: Head) -> None:
        most = self._visitor.gate.limits.limits.request_body
        if most is None:
            return
        if head.is_chunked:
            raise HttpError(411, "This proxy requires the length of a request's body in advance.")
        if head.length > most:
            raise HttpError(413, f"The body of a request must have at most {most} bytes here.")

    def _connect(self, head: Head) -> None:
        visitor = self._visitor
        visitor.hops = hops_in(head)
        try:
            with visitor.presence:
                upstream = open_connection(visitor, connect_target(head))[0]
        finally:
            visitor.hops = 0  # of this request alone: another one may follow a failed CONNECT
        with upstream:
            # Neither Content-Length nor Transfer-Encoding (RFC 9110 section 9.3.6). Bytes behind the head were put
            # back: the tunnel begins with them.
            self._conn.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            tunnel(self._conn, upstream, self._visitor)

    def _answer_error(self, head: Head | None, body: RequestBody | None, error: HttpError) -> bool:
        """Send the error response; return whether another request may follow."""
        text = error_body(error.status, str(error))
        return send_own_answer(self._conn, head, body, error.status, text, error.headers, keep=error.keep)
