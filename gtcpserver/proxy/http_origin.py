"""Connections to origin servers: used for one request after another, and kept while idle."""

from __future__ import annotations

import re
import socket
from collections import OrderedDict
from dataclasses import replace

import gevent

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.http1.head import HttpError

from .departures import Departures
from .errors import Denied
from .http_answer import LONGEST_ANSWER_HEAD, MOST_ANSWER_FIELDS, Answer, AnswerReader, BadAnswer, read_plain
from .http_body import OriginFailed, RequestBody
from .http_messages import OriginRequest, written
from .permission import Opened
from .succession import Tenure
from .target import Target
from .upstream import Upstream
from .visitor import Visitor, result_of

# Lines of responses may end with LF alone (RFC 9112 section 2.2).
_END_OF_HEAD = re.compile(rb"\n\r?\n")

_LOOK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

#: Idle origin connections of one client. Browsers keep one connection to a proxy per host, libraries one for all.
MOST_IDLE = 4


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
        self.asked = str(key[0])
        self.connection = connection
        self.connected = connected
        self.patience = patience
        self.forwarding = forwarding
        self.upstream = upstream
        self.opened = opened
        connection.settimeout(patience)

    def ask(self, request: OriginRequest, body: RequestBody) -> None:
        """Send a request."""
        if self.forwarding is not None:
            request = _for_proxy(request, self.key[0], self.forwarding)
        self._request = request
        self._heard = False
        self._behind = b""
        self._room_for_heads = LONGEST_ANSWER_HEAD
        self._reader: AnswerReader | None = None
        try:
            body.begin(self.connection, request.to_bytes())
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
        request = self._request
        answer = read_plain(head, request.method)
        if answer is None:
            if self._reader is None:
                self._reader = AnswerReader(request.method, request.upgrade)
            try:
                answer = self._reader.read(head)
            except BadAnswer as error:
                raise OriginFailed(f"not an HTTP answer: {error}") from None
        is_last = answer.status >= 200 or answer.status == 101
        # What can only be of its body stays here, for `at_hand`. Anything else goes back, where `is_alive` finds it.
        if self._behind and is_last and (answer.framing != "length" or len(self._behind) > answer.length):
            self.connection.unread(self._behind)
            self._behind = b""
        return answer

    def _next_head(self, body: RequestBody) -> bytes:
        """Return the bytes of the next head. Keep surplus bytes."""
        data: bytes | bytearray = self._behind or self._hear(body)
        searched = 0
        while (end := _END_OF_HEAD.search(data, searched)) is None:
            if data[0] <= 0x20:  # such as a TLS alert: no more will come
                raise OriginFailed("not an HTTP answer")
            if len(data) > self._room_for_heads:
                break
            searched = max(0, len(data) - 2)
            if not isinstance(data, bytearray):
                data = bytearray(data)
            data += self._hear(body)
        if end is None or end.end() > self._room_for_heads:
            raise OriginFailed(f"its heads are longer than {LONGEST_ANSWER_HEAD} bytes")
        self._behind = bytes(data[end.end() :])
        return bytes(data[: end.end()])

    def _hear(self, body: RequestBody) -> bytes:
        more = self._more(body)
        if not more:
            raise OriginFailed("closed without an answer", mute=not self._heard)
        self._heard = True
        return more

    def _more(self, body: RequestBody) -> bytes:
        while True:
            pumping = body.is_pumping
            try:
                data: bytes
                if not pumping:
                    data = self.connection.recv(READ_AHEAD)
                    return data
                # Not the connection's own timeout, which is suspended while its other direction is being spliced.
                with gevent.Timeout(self.patience, TimeoutError("timed out")):
                    data = self.connection.recv(READ_AHEAD)
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
        if self._behind:
            behind, self._behind = self._behind, b""
            return behind
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
            (self.connection if stream.tls is None else stream.sock).recv(1, _LOOK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Close it; the rest of the response is not wanted."""
        self.connection.close()


def _for_proxy(request: OriginRequest, target: Target, proxy: Upstream) -> OriginRequest:
    """Return the request in absolute form (RFC 9112 section 3.2.2), with our credentials for the next proxy."""
    path = b"" if request.target == b"*" else request.target
    fields = request.fields + written(proxy.credentials)
    return replace(request, target=b"http://" + _authority(target) + path, fields=fields)


def _authority(target: Target) -> bytes:
    text = str(target)
    return (text.removesuffix(":80")).encode()


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
