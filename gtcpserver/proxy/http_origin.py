"""Connections to origin servers: used for one request after another, and kept while idle."""

from __future__ import annotations

import re
import socket
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import gevent
import h11

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.http1.head import Header, HttpError, options_of

from .departures import Departures
from .errors import Denied
from .http_body import OriginFailed, RequestBody
from .permission import Opened
from .succession import Tenure
from .target import Target
from .upstream import Upstream
from .visitor import Visitor, result_of

#: Bytes of the head of a response, including interim responses before it. nginx as a proxy accepts 4 or 8 KiB, haproxy
#: 16, curl 300.
LONGEST_ANSWER_HEAD = 64 * 1024

#: Fields of a head. haproxy, Envoy and Python's http.client accept 100. Parsing one takes 2 us, in which no other
#: client is served: 65,000 took 145 ms.
MOST_ANSWER_FIELDS = 256

# Lines of responses may end with LF alone (RFC 9112 section 2.2).
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_TO_TIDY = (b"\n ", b"\n\t", b":  ", b": \t", b":\t")
_SPACES_BEFORE_COLON = re.compile(rb"^([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]+:", re.MULTILINE)
_IDENTITY = re.compile(rb"^transfer-encoding:[ \t]*identity[ \t]*\r?\n", re.MULTILINE | re.IGNORECASE)
_VERSION = re.compile(rb"http/(?:1\.[0-9]|[2-9](?:\.[0-9])?)(?= )", re.IGNORECASE)
_SPACES_BEFORE_VALUE = re.compile(rb"^([^:\n]*:)[ \t]+", re.MULTILINE)

#: Idle origin connections of one client. Browsers keep one connection to a proxy per host, libraries one for all.
MOST_IDLE = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of a response.

    Attributes:
        version: b"1.1" or b"1.0".
        framing: how its body ends: there is none, it has a length, it comes in chunks, the connection closes.
        length: in bytes, if it has one.
        closes: the connection serves no other request.
    """

    status: int
    reason: bytes
    version: bytes
    headers: tuple[Header, ...]
    framing: Literal["none", "length", "chunked", "close"]
    length: int
    closes: bool


class Origin:
    """A connection to an origin server, which may serve several requests.

    Args:
        key: what it may be used for: the destination, the user, and the configuration whose rules have allowed it.
        connected: its address, for the record.
        patience: seconds that it may be silent.
        forwarding: the proxy that the connection leads to and that forwards requests; None: it leads to the origin.
        upstream: the name of the proxy on the way, for the record; "": none.
        opened: what the rules have allowed (`Visitor.opened`).
    """

    def __init__(
        self,
        key: Key,
        connection: Connection,
        connected: str,
        patience: float,
        forwarding: Upstream | None = None,
        upstream: str = "",
        opened: Opened | None = None,
    ) -> None:
        self.key = key
        self.connection = connection
        self.connected = connected
        self.patience = patience
        self.forwarding = forwarding
        self.upstream = upstream
        self.opened = opened
        connection.settimeout(patience)

    def ask(self, request: h11.Request, body: RequestBody) -> None:
        """Send a request."""
        if self.forwarding is not None:
            request = _for_proxy(request, self.key[0], self.forwarding)
        self._request = request
        self._heard = False
        self._behind = b""
        self._room_for_heads = LONGEST_ANSWER_HEAD
        self._reader, head = _make_reader(request)
        try:
            body.begin(self.connection, head)
        except OSError:
            pass  # it may have explained why before it closed

    def next_answer(self, body: RequestBody) -> Answer:
        """Return the head of the next response, which may be an interim one (1xx).

        Raises:
            OriginFailed: it closed, or sent no response, or one that is too large.
            TimeoutError: it is silent.
        """
        head = self._next_head(body)
        self._room_for_heads -= len(head)
        if head.count(b"\n") - 2 > MOST_ANSWER_FIELDS:  # without the status line and the empty one
            raise OriginFailed(f"its head has more than {MOST_ANSWER_FIELDS} lines")
        head = _tidied(head)
        try:
            event = self._parsed(head)
        except h11.RemoteProtocolError:
            self._reader = _make_reader(self._request)[0]
            try:
                event = self._parsed(_mended(head))
            except h11.RemoteProtocolError as error:
                raise OriginFailed(f"not an HTTP answer: {error}") from None
        answer = _read_answer(event, self._request.method)
        if answer.status >= 200 or answer.status == 101:
            self.connection.unread(self._behind)
        return answer

    def _parsed(self, head: bytes) -> Any:
        self._reader.receive_data(head)
        return self._reader.next_event()

    def _next_head(self, body: RequestBody) -> bytes:
        """Return the bytes of the next head. Keep surplus bytes."""
        data, searched = bytearray(self._behind), 0
        while (end := _END_OF_HEAD.search(data, searched)) is None:
            if data and data[0] <= 0x20:  # such as a TLS alert: no more will come
                raise OriginFailed("not an HTTP answer")
            if len(data) > self._room_for_heads:
                break
            searched = max(0, len(data) - 2)
            more = self._more(body)
            if not more:
                raise OriginFailed("closed without an answer", mute=not self._heard)
            self._heard = True
            data += more
        if end is None or end.end() > self._room_for_heads:
            raise OriginFailed(f"its heads are longer than {LONGEST_ANSWER_HEAD} bytes")
        self._behind = bytes(data[end.end() :])
        return bytes(data[: end.end()])

    def _more(self, body: RequestBody) -> bytes:
        while True:
            pumping = body.is_pumping
            try:
                # Not the connection's own timeout, which is suspended while its other direction is being spliced.
                with gevent.Timeout(self.patience if pumping else None, TimeoutError("timed out")):
                    data: bytes = self.connection.recv(READ_AHEAD)
                return data
            except TimeoutError:
                # The response is late if it does not follow the request. An upload may take its time, and has its own
                # timeout.
                if not pumping:
                    raise
            except OSError as error:
                raise OriginFailed(error.strerror or str(error), mute=not self._heard) from None

    def at_hand(self, most: int) -> bytes:
        """Return what was read together with the head of the response."""
        size = min(most, len(self.connection.peeked))
        data: bytes = self.connection.recv(size) if size else b""
        return data

    def recv(self, most: int) -> bytes:
        """Return more of the body; b"" at the end. Raise OriginFailed."""
        try:
            data: bytes = self.connection.recv(most)
        except TimeoutError:
            raise OriginFailed("the destination stopped in the midst of its answer") from None
        except OSError as error:
            raise OriginFailed(f"in the midst of the answer: {error.strerror or error}") from None
        return data

    def is_alive(self) -> bool:
        """Return whether an idle connection is still usable: nothing has arrived on it, not even its end."""
        stream = self.connection.stream
        if stream.tls is not None and stream.tls.pending():
            return False
        try:
            # Beneath TLS, too, which has no peeking.
            (self.connection if stream.tls is None else stream.sock).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Close it; the rest of the response is not wanted."""
        self.connection.close()


def _make_reader(request: h11.Request) -> tuple[h11.Connection, bytes]:
    """Return what parses the heads of the responses to a request, and the head of the request.

    We handle the bodies, which h11 never sees.
    """
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_ANSWER_HEAD)
    return reader, reader.send(request) or b""


def _for_proxy(request: h11.Request, target: Target, proxy: Upstream) -> h11.Request:
    """Return the request in absolute form (RFC 9112 section 3.2.2), with our credentials for the next proxy."""
    path = b"" if request.target == b"*" else request.target
    return h11.Request(
        method=request.method,
        target=b"http://" + _authority(target) + path,
        headers=[*request.headers.raw_items(), *proxy.credentials],
    )


def _authority(target: Target) -> bytes:
    text = str(target)
    return (text.removesuffix(":80")).encode()


def _tidied(head: bytes) -> bytes:
    """Return a head without folded lines (RFC 9112 section 5.2), and with one space before each value.

    On a line that does not match, h11's pattern takes time quadratic in the spaces before the value: minutes, for as
    many as a head may have.
    """
    if not any(odd in head for odd in _TO_TIDY):  # the response of most servers: 0.5 us
        return head
    line, end, fields = head.partition(b"\n")
    return line + end + _SPACES_BEFORE_VALUE.sub(rb"\1 ", _FOLD.sub(b" ", fields))


def _mended(head: bytes) -> bytes:
    """Return a tidied head that h11 has refused, without what other proxies accept.

    White space before a colon is removed (RFC 9112 section 5.1), and the transfer encoding "identity", which was none
    (RFC 2616 section 3.6). Scripts say "HTTP/2 200" of an answer whose server frames it as HTTP/1.1.
    """
    line, end, fields = head.partition(b"\n")
    version = _VERSION.match(line)
    if version is not None:
        line = (version[0].upper() if version[0][5:6] == b"1" else b"HTTP/1.1") + line[version.end() :]
    return line + end + _IDENTITY.sub(b"", _SPACES_BEFORE_COLON.sub(rb"\1:", fields))


def _read_answer(event: Any, method: bytes) -> Answer:
    status: int = event.status_code
    headers = tuple(event.headers.raw_items())
    # h11 has validated these two: a length is one number, an encoding is "chunked".
    lengths = [value for name, value in event.headers if name == b"content-length"]
    is_chunked = any(name == b"transfer-encoding" for name, value in event.headers)
    framing: Literal["none", "length", "chunked", "close"]
    if method == b"HEAD" or status < 200 or status in (204, 304):
        framing = "none"
    elif is_chunked:
        framing = "chunked"
        if lengths:
            headers = tuple(field for field in headers if field[0].lower() != b"content-length")
    else:
        framing = "length" if lengths else "close"
    # With a length beside chunks, somebody on the way may be splitting responses (RFC 9112 section 6.3): the chunks
    # count, and nothing that follows them.
    unclear = framing == "close" or (framing == "chunked" and bool(lengths))
    closes = unclear or event.http_version == b"1.0" or b"close" in options_of(headers)
    length = int(lengths[0]) if framing == "length" else 0
    return Answer(status, event.reason, event.http_version, headers, framing, length, closes)


Key = tuple[Target, str | None, Tenure]


class Origins:
    """The idle origin connections of one client.

    Args:
        departures: notices those that their origins end.
    """

    def __init__(self, departures: Departures) -> None:
        self._departures = departures
        self._idle: OrderedDict[Key, Origin] = OrderedDict()

    def take(self, key: Key) -> Origin | None:
        """Return a live idle connection to this destination, or None."""
        origin = self._idle.pop(key, None)
        if origin is None:
            return None
        self._departures.idle.pop(origin, None)
        if not origin.is_alive():
            origin.close()
            return None
        return origin

    def keep(self, origin: Origin) -> None:
        """Keep a connection that has served its request for the next one."""
        self._idle[origin.key] = origin
        self._departures.note_idle(origin, self._drop)
        if len(self._idle) > MOST_IDLE:
            self._close(self._idle.popitem(last=False)[1])

    def _drop(self, origin: Origin) -> None:
        """Close one that the origin has ended: it would stay in CLOSE-WAIT until the client's end."""
        self._idle.pop(origin.key, None)
        self._close(origin)

    def _close(self, origin: Origin) -> None:
        self._departures.idle.pop(origin, None)
        origin.close()

    def close(self) -> None:
        """Close all of them."""
        while self._idle:
            self._close(self._idle.popitem()[1])


def open_connection(visitor: Visitor, target: Target, for_request: bool = False) -> tuple[Connection, Upstream | None]:
    """Connect to a destination for an HTTP client; or, for a request, to the HTTP proxy that forwards it.

    Raises:
        HttpError: it may not, or cannot, be reached. The message reveals nothing that the client should not know.
    """
    try:
        return visitor.open_for_request(target) if for_request else (visitor.open(target), None)
    except Denied:
        raise HttpError(403, "The rules of this proxy do not allow this destination.", keep=True) from None
    except OSError as error:
        status, message = {
            "unresolved": (502, "The host name of the destination is not known."),
            "resolve_timeout": (504, "The host name of the destination could not be looked up in time."),
            "connect_timeout": (504, "The destination did not answer in time."),
            "refused": (502, "The destination refused the connection."),
            "unreachable": (502, "The destination cannot be reached."),
            "upstream_failed": (502, "The next proxy on the way does not lead there."),
            "no_port": (503, "This proxy has no free port for the destination."),
            "loop": (508, "The request has come back to this proxy."),
            "quota": (429, "Your quota of bytes is used up."),
            "limit": (429, "You have too many connections through this proxy."),
        }.get(result_of(error), (502, "The connection to the destination failed."))
        raise HttpError(status, message, keep=True) from None
