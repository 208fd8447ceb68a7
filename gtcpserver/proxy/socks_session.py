"""A SOCKS client's connection, from its first byte to the end of the tunnel."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address
from typing import TypeVar

from ..connection import READ_AHEAD, Connection
from ..errors import DeadlineExceeded
from ..transfer import relay
from . import socks4, socks5
from .errors import ProtocolError
from .gate import Denied, Visitor
from .record import Result
from .socks5 import Command, Method, Reply
from .socks_bind import Answer, ipv4_only, serve_bind
from .socks_udp import serve_udp
from .target import IPAddress, Target, unmapped

Message = TypeVar("Message")


class ClientLeft(Exception):
    """The client closed before it had said what it wants."""


class _Reader:
    """Messages from a connection, whatever the pieces they come in."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._data = b""

    def read(self, parse: Callable[[bytes], tuple[Message, int] | None]) -> Message:
        """The next message.

        Raises:
            ProtocolError: it breaks the protocol. ClientLeft: it will not come.
        """
        while (found := parse(self._data)) is None:
            more = self._conn.recv(READ_AHEAD)
            if not more:
                raise ClientLeft
            self._data += more
        message, size = found
        self._data = self._data[size:]
        return message

    def give_back(self) -> None:
        """What came behind the last message is for the destination."""
        self._conn.unread(self._data)
        self._data = b""


def serve_socks5(conn: Connection, visitor: Visitor) -> None:
    """Serve a client that speaks SOCKS5 (RFC 1928)."""
    visitor.record.protocol = "socks5"
    reader = _Reader(conn)
    request = _negotiate(conn, visitor, lambda: _negotiate_socks5(conn, visitor, reader))
    if request is None:
        return
    visitor.record.command = request.command.name
    reader.give_back()
    if request.command is Command.UDP_ASSOCIATE:
        serve_udp(conn, visitor, request.target)
        return
    if request.command is Command.BIND:
        _bind(
            conn,
            visitor,
            request.target,
            lambda granted, address: socks5.reply(Reply.SUCCEEDED if granted else Reply.GENERAL_FAILURE, address),
        )
        return
    _connect(conn, visitor, request.target, socks5.reply, Reply.SUCCEEDED, _reply5)


def _negotiate_socks5(conn: Connection, visitor: Visitor, reader: _Reader) -> socks5.Request | None:
    offered = reader.read(socks5.parse_greeting)
    wanted = Method.PASSWORD if visitor.needs_password else Method.NONE
    if not visitor.admitted or wanted not in offered:
        if visitor.admitted:
            visitor.record.result = "authentication_failed" if visitor.needs_password else "bad_request"
            visitor.record.detail = f"the client does not offer {wanted.name}"
        conn.sendall(socks5.choose(Method.NOT_ACCEPTABLE))
        return None
    conn.sendall(socks5.choose(wanted))
    if wanted is Method.PASSWORD:
        given = reader.read(socks5.parse_password)
        accepted = visitor.authenticate(given.user, given.password)
        conn.sendall(socks5.authentication_answer(accepted))
        if not accepted:
            return None
    return reader.read(socks5.parse_request)


def serve_socks4(conn: Connection, visitor: Visitor) -> None:
    """Serve a client that speaks SOCKS4 or SOCKS4a."""
    visitor.record.protocol = "socks4"
    reader = _Reader(conn)
    request = _negotiate(conn, visitor, lambda: reader.read(socks4.parse_request))
    if request is None:
        return
    record = visitor.record
    record.protocol = "socks4a" if request.is_4a else "socks4"
    record.command = request.command.name
    if not visitor.admitted:
        conn.sendall(socks4.reply(socks4.Reply.REJECTED))
    elif visitor.needs_password:
        # A user id is a claim, not a proof.
        record.result, record.detail = "authentication_failed", "SOCKS4 has no password"
        conn.sendall(socks4.reply(socks4.Reply.REJECTED))
    elif request.command is socks4.Command.BIND:
        reader.give_back()
        _bind(
            conn,
            visitor,
            request.target,
            lambda granted, address: _socks4_reply(socks4.Reply.GRANTED if granted else socks4.Reply.REJECTED, address),
        )
    else:
        reader.give_back()
        _connect(conn, visitor, request.target, _socks4_reply, socks4.Reply.GRANTED, lambda _: socks4.Reply.REJECTED)


def _negotiate(conn: Connection, visitor: Visitor, negotiate: Callable[[], Message | None]) -> Message | None:
    """What the client wants; None if it will not get it, and has been told."""
    record = visitor.record
    try:
        with conn.deadline(visitor.gate.timeouts.negotiate):
            found = negotiate()
    except ProtocolError as error:
        record.result, record.detail = "bad_request", str(error)
        if error.reply:
            conn.sendall(error.reply)
        return None
    except ClientLeft:
        record.result, record.detail = "bad_request", "the client left"
        return None
    except DeadlineExceeded:
        record.result = "negotiation_timeout"
        return None
    record.note_negotiated()
    return found


def _bind(conn: Connection, visitor: Visitor, target: Target, answer: Answer) -> None:
    upstream = serve_bind(conn, visitor, target, answer)
    if upstream is not None:
        with upstream:
            tunnel(conn, upstream, visitor)


def _connect(
    conn: Connection,
    visitor: Visitor,
    target: Target,
    write: Callable[..., bytes],
    granted: object,
    failed: Callable[[Exception], object],
) -> None:
    try:
        upstream = visitor.open(target)
    except (Denied, OSError) as error:
        conn.sendall(write(failed(error)))
        return
    with upstream:
        bound = _bound_address(upstream) if visitor.gate.show_bound_address else None
        conn.sendall(write(granted, bound))
        tunnel(conn, upstream, visitor)


def tunnel(conn: Connection, upstream: Connection, visitor: Visitor) -> None:
    """Relay until both sides have ended, and note what was moved."""
    record, timeouts = visitor.record, visitor.gate.timeouts
    pace = visitor.pace
    result = relay(
        conn,
        upstream,
        idle_timeout=timeouts.idle,
        half_closed_timeout=timeouts.half_closed,
        lifetime=timeouts.lifetime,
        pace=None if pace is None else lambda direction, size: pace(size),
    )
    record.sent, record.received = result.bytes_a_to_b, result.bytes_b_to_a
    record.result, record.detail = _ENDS[result.reason]


_ENDS: dict[str, tuple[Result, str]] = {
    "closed": ("ok", ""),
    "idle": ("idle", ""),
    "half_closed": ("half_closed", ""),
    "lifetime": ("lifetime", ""),
    "reset_a": ("reset", "by the client"),
    "reset_b": ("reset", "by the destination"),
}


def _reply5(error: Exception) -> Reply:
    return socks5.reply_of(error) if isinstance(error, OSError) else Reply.NOT_ALLOWED


def _socks4_reply(code: socks4.Reply, bound: tuple[IPAddress, int] | None = None) -> bytes:
    return socks4.reply(code, ipv4_only(bound))


def _bound_address(upstream: Connection) -> tuple[IPAddress, int]:
    host, port = upstream.getsockname()[:2]
    return unmapped(ip_address(host)), port
