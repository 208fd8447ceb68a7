"""Departures: notice clients that give up while the proxy waits for others on their behalf; and idle origins that end.

While a name is looked up, a destination connects or an origin is silent, nobody reads the client's connection. Once a
second all clients in that state are polled for errors and ends; a request that is answered sooner costs two operations
on a dict.

A reset is a departure. An end (FIN) may be half-close: the client has sent its request, and still reads. Whether it
does is only known by sending it something: the system of a client that is gone answers with a reset. There is something
to send that changes nothing: an interim response of HTTP, a leading zero of the next chunk's size, the first byte of
SOCKS's reply, which is the same whatever the reply says. Over TLS there is nothing: such clients do not end before they
are served, except for one that has sent all of its data ahead.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from gevent import monkey
from gevent.hub import get_hub
from greenlet import getcurrent

from gtcpserver.connection.connection import Connection
from gtcpserver.linux import MSG_NOSIGNAL, POLLRDHUP, TCP_KEEPIDLE, TCP_KEEPINTVL

from .errors import Cut

_poll: Any = monkey.get_original("select", "poll")

#: Seconds between two looks at the clients.
INTERVAL = 1.0

#: Seconds until the next look after a client was sent something: the reset takes a round trip.
ROUND_TRIP = 0.25

#: Seconds that a client may have ended before it counts as gone, where ends are departures: scripts that send all they
#: have and then only read are served if the destination connects in this time, which survives one lost SYN (RFC 6298:
#: 1 s).
GRACE = 2.0

#: RFC 2518 section 10.1: the request is accepted, and takes its time. HTTP/1.1 clients must accept interim responses
#: (RFC 9110 section 15.2).
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"

#: The beginning of the next chunk's size, which may have leading zeros (RFC 9112 section 7.1).
ZERO = b"0"

#: Seconds between TCP keep-alive probes to a client that has ended. Linux forgets a connection that its program has
#: closed after 60 seconds (tcp_fin_timeout, tcp(7)), and answers probes with a reset from then on.
_PROBES = ((TCP_KEEPIDLE, 10), (TCP_KEEPINTVL, 10))

_LOST = select.POLLERR | select.POLLHUP


class Idle(Protocol):
    """What waits for its next use: an `http_origin.Origin`."""

    connection: Connection


class Presence:
    """The ``with`` block in which a client's departure raises Cut. Reusable; the blocks of a client do not nest.

    Attributes:
        probe: bytes that can be sent now without changing what the client gets (see `rest_of`); b"": nothing, so that a
            half-closed client is believed; None: a client does not end before it is served.
        sent: number of bytes of the probe that were sent.
    """

    __slots__ = ("_departures", "conn", "ended_at", "greenlet", "probe", "sent", "was_probed")

    def __init__(self, departures: Departures, conn: Connection, probe: bytes | None = None) -> None:
        self._departures = departures
        self.conn = conn
        self.probe = probe
        self.ended_at: float | None = None
        self.was_probed = False
        self.sent = 0
        self.greenlet: Any = None

    def __enter__(self) -> Presence:
        # Hot: once or twice per request, 0.35 us with __exit__.
        self.greenlet = getcurrent()
        departures = self._departures
        if not departures.looks:
            departures.look_later()
        departures.awaited[self] = None
        return self

    def rest_of(self, answer: bytes) -> bytes:
        """Return what is left to send of an answer whose beginning is the probe."""
        sent, self.sent = self.sent, 0
        return answer[sent:]

    def __exit__(self, *error: object) -> None:
        self._departures.awaited.pop(self, None)
        self.greenlet = None

    def dismiss(self, why: Cut) -> bool:
        """Raise `why` in the block, if one is open; return whether. Call in the hub only."""
        if self._departures.awaited.pop(self, self) is self:
            return False
        self.greenlet.throw(why)
        return True


class Departures:
    """The clients for whom the proxy waits, and idle connections to origins.

    Attributes:
        awaited: clients to look at, in the order of their arrival.
        idle: idle connections to origins, with what to call when something arrives on one, even if that is its end: it
            would stay in CLOSE-WAIT until the client's next request.
        looks: a look is scheduled.
    """

    def __init__(self) -> None:
        self.awaited: dict[Presence, None] = {}
        self.idle: dict[Idle, Callable[[Any], object]] = {}
        self.looks = False
        self._timer: Any = None

    def note_idle(self, origin: Idle, ended: Callable[[Any], object]) -> None:
        """Look at an idle connection to an origin, too."""
        if not self.looks:
            self.look_later()
        self.idle[origin] = ended

    def look_later(self, seconds: float | None = None) -> None:
        """Schedule the next look."""
        if self._timer is not None:
            self._timer.close()
        self._timer = get_hub().loop.timer(INTERVAL if seconds is None else seconds)
        self._timer.start(self._look)
        self.looks = True

    def _look(self) -> None:
        # In the hub. No client needs more looks when none is awaited; a failed poll (ENOMEM) is repeated.
        self.looks = False
        if not self.awaited and not self.idle:
            return
        seconds = INTERVAL
        try:
            for presence, events in self._found():
                if presence in self.awaited:  # unless the previous one's end has ended it
                    seconds = min(seconds, self._judge(presence, events))
            for origin in self._ended():
                ended = self.idle.pop(origin, None)
                if ended is not None:
                    ended(origin)
        except (OSError, MemoryError):
            pass
        finally:
            self.look_later(seconds)

    def _found(self) -> list[tuple[Presence, int]]:
        by_fd = {presence.conn.fileno(): presence for presence in self.awaited}
        by_fd.pop(-1, None)  # closed meanwhile
        poll = _poll()
        for fd in by_fd:
            poll.register(fd, POLLRDHUP)
        return [(by_fd[fd], events) for fd, events in poll.poll(0)]

    def _ended(self) -> list[Idle]:
        by_fd = {origin.connection.fileno(): origin for origin in self.idle}
        by_fd.pop(-1, None)
        poll = _poll()
        for fd in by_fd:
            poll.register(fd, select.POLLIN | POLLRDHUP)
        return [by_fd[fd] for fd, _ in poll.poll(0)]

    def _judge(self, presence: Presence, events: int) -> float:
        """Decide about a client that has ended or was reset; return in how many seconds to look again."""
        if events & select.POLLNVAL:
            return INTERVAL
        if events & _LOST:
            self._dismiss(presence, "reset by the client")
            return INTERVAL
        if presence.ended_at is None:
            presence.ended_at = monotonic()
            _probe_often(presence.conn)
        conn = presence.conn
        if presence.probe is None or conn.stream.tls is not None:
            if monotonic() - presence.ended_at >= GRACE and (conn.stream.tls is not None or not _has_more(conn)):
                self._dismiss(presence, "closed by the client")
        elif presence.probe and not presence.was_probed and conn.stream.writer() is None:
            presence.was_probed = True
            sent = _send(conn, presence.probe)
            if sent is not None:
                presence.sent = sent
                return ROUND_TRIP
            self._dismiss(presence, "reset by the client")
        return INTERVAL

    def _dismiss(self, presence: Presence, why: str) -> None:
        del self.awaited[presence]
        presence.greenlet.throw(Cut("client_left", why))


def _has_more(conn: Connection) -> bool:
    """Return whether a client that has ended has sent data that was not read yet."""
    try:
        return bool(conn.peeked or conn.stream.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _send(conn: Connection, probe: bytes) -> int | None:
    """Send a probe; return its size, or 0 if it has to wait; None: the client does not get all it is sent."""
    stream = conn.stream
    try:
        sent: int = stream.sock.send(probe, socket.MSG_DONTWAIT | MSG_NOSIGNAL)
    except BlockingIOError:
        return 0  # the data before it, which is still on its way, does the same
    except OSError:
        return None
    stream.bytes_sent += sent
    return sent if sent == len(probe) else None


def _probe_often(conn: Connection) -> None:
    if conn.family == socket.AF_UNIX:
        return  # whose system tells half-close from a close
    try:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _PROBES:
            conn.setsockopt(socket.IPPROTO_TCP, option, seconds)
    except OSError:
        pass  # reset meanwhile: the next look finds it
