"""A SOCKS client's connection, from its first byte to the end of the tunnel."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.errors import HandedOver
from gtcpserver.networks import as_ip
from gtcpserver.transfer import relay

from . import rules, socks4, socks5
from .errors import Denied
from .limits import rest
from .moving import check_tunnel, note_tunnel
from .record import Result
from .socks5 import Command, Method, Reply
from .socks_bind import Answer, ipv4_only, serve_bind
from .socks_udp import serve_udp
from .succession import OpenTunnel
from .target import IPAddress, Target
from .visitor import Visitor

Message = TypeVar("Message")


class ClientLeft(Exception):
    """The client closed before it had stated its request."""


class _Reader:
    """Read messages from a connection, regardless of the pieces they arrive in."""

    def __init__(self, conn: Connection, data: bytes) -> None:
        self._conn = conn
        self._data = data

    def read(self, parse: Callable[[bytes], tuple[Message, int] | None]) -> Message:
        """Return the next message.

        Raises:
            ProtocolError: it violates the protocol. ClientLeft: it will not come.
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
        """Put bytes behind the last message back: they are for the destination."""
        if self._data:
            self._conn.unread(self._data)
            self._data = b""


def negotiate_socks5(conn: Connection, visitor: Visitor, data: bytes) -> Callable[[], None] | None:
    """Read the request of a SOCKS5 client (RFC 1928).

    Args:
        data: the bytes received so far.

    Returns:
        A function that serves the request; None: it was refused.

    Raises:
        ProtocolError, ClientLeft, DeadlineExceeded, OSError.
    """
    visitor.record.protocol = "socks5"
    reader = _Reader(conn, data)
    request = _negotiate_socks5(conn, visitor, reader)
    if request is None:
        return None
    reader.give_back()
    visitor.record.command = request.command.name
    if not visitor.may_use(_NAMES[request.command]):
        conn.sendall(socks5.reply(Reply.COMMAND_NOT_SUPPORTED))
        return None
    return partial(_SERVE[request.command], conn, visitor, request.target)


def _serve_udp(conn: Connection, visitor: Visitor, target: Target) -> None:
    serve_udp(conn, visitor, target)


def _serve_bind(conn: Connection, visitor: Visitor, target: Target) -> None:
    def answer(error: Exception | None, address: tuple[IPAddress, int] | None) -> bytes:
        return socks5.reply(Reply.SUCCEEDED if error is None else _reply5(error), address)

    _bind(conn, visitor, target, answer)


def _serve_connect(conn: Connection, visitor: Visitor, target: Target) -> None:
    _connect(conn, visitor, target, socks5.reply, Reply.SUCCEEDED, _reply5)


#: Names of commands, as in `commands` of a listener.
_NAMES: dict[Command, rules.Command] = {Command.CONNECT: "connect", Command.BIND: "bind", Command.UDP_ASSOCIATE: "udp"}

_SERVE = {Command.CONNECT: _serve_connect, Command.BIND: _serve_bind, Command.UDP_ASSOCIATE: _serve_udp}


def _negotiate_socks5(conn: Connection, visitor: Visitor, reader: _Reader) -> socks5.Request | None:
    offered = reader.read(socks5.parse_greeting)
    visitor.hops = socks5.hops_in(offered)
    # Some clients with a user name configured offer nothing else; without users any password is right.
    only_password = Method.NONE not in offered and Method.PASSWORD in offered
    wanted = Method.PASSWORD if visitor.needs_password or only_password else Method.NONE
    if not visitor.admitted or wanted not in offered:
        if visitor.admitted:
            visitor.record.result = "authentication_failed" if visitor.needs_password else "bad_request"
            visitor.record.detail = f"the client does not offer {wanted.name}"
        conn.sendall(socks5.choose(Method.NOT_ACCEPTABLE))
        return None
    conn.sendall(socks5.choose(wanted))
    given: socks5.Credentials | None = None
    if wanted is Method.PASSWORD:
        given = reader.read(socks5.parse_password)
        if visitor.needs_password:
            accepted = visitor.authenticate(given.user, given.password)
        else:
            accepted, visitor.record.claimed = True, given.user.decode("utf-8", "backslashreplace")
        conn.sendall(socks5.authentication_answer(accepted))
        if not accepted:
            return None
    request = reader.read(socks5.parse_request)
    if visitor.follow() and not _is_still_welcome(visitor, given):
        conn.sendall(socks5.reply(Reply.NOT_ALLOWED))
        return None
    return request


def _is_still_welcome(visitor: Visitor, given: socks5.Credentials | None) -> bool:
    """Return whether the rules of a reload during the negotiation admit the client, too."""
    if not visitor.admitted or not visitor.needs_password:
        return visitor.admitted
    if given is None:
        visitor.record.result, visitor.record.detail = "authentication_failed", "no password before a reload"
        return False
    return visitor.authenticate(given.user, given.password)


def negotiate_socks4(conn: Connection, visitor: Visitor, data: bytes) -> Callable[[], None] | None:
    """Read the request of a SOCKS4 or SOCKS4a client; as `negotiate_socks5`."""
    record = visitor.record
    record.protocol = "socks4"
    reader = _Reader(conn, data)
    request = reader.read(socks4.parse_request)
    record.protocol = "socks4a" if request.is_4a else "socks4"
    record.command = request.command.name
    record.claimed = request.user.decode("utf-8", "backslashreplace") or None
    visitor.hops = socks4.hops_in(request.user)
    visitor.follow()
    if not visitor.admitted:
        conn.sendall(socks4.reply(socks4.Reply.REJECTED))
        return None
    if visitor.needs_password:
        # A user ID is a claim, not a proof.
        record.result, record.detail = "authentication_failed", "SOCKS4 has no password"
        conn.sendall(socks4.reply(socks4.Reply.REJECTED))
        return None
    if not visitor.may_use("bind" if request.command is socks4.Command.BIND else "connect"):
        conn.sendall(socks4.reply(socks4.Reply.REJECTED))
        return None
    reader.give_back()
    serve = _serve_bind4 if request.command is socks4.Command.BIND else _serve_connect4
    return partial(serve, conn, visitor, request.target)


def _serve_bind4(conn: Connection, visitor: Visitor, target: Target) -> None:
    def answer(error: Exception | None, address: tuple[IPAddress, int] | None) -> bytes:
        return _socks4_reply(socks4.Reply.GRANTED if error is None else socks4.Reply.REJECTED, address)

    _bind(conn, visitor, target, answer)


def _serve_connect4(conn: Connection, visitor: Visitor, target: Target) -> None:
    _connect(conn, visitor, target, _socks4_reply, socks4.Reply.GRANTED, lambda _: socks4.Reply.REJECTED)


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
    presence = visitor.presence
    presence.probe = write(granted)[:1]
    try:
        with presence:
            upstream = visitor.open(target)
    except (Denied, OSError) as error:
        conn.sendall(presence.rest_of(write(failed(error))))
        return
    with upstream:
        bound = _bound_address(upstream) if visitor.gate.show_bound_address else None
        conn.sendall(presence.rest_of(write(granted, bound)))
        tunnel(conn, upstream, visitor)


def tunnel(conn: Connection, upstream: Connection, visitor: Visitor) -> None:
    """Relay until both sides have ended, and note what was moved."""
    rest(visitor.pace, 0)
    if visitor.announce is not None:
        visitor.announce(visitor.record)
    note_tunnel(visitor)
    with OpenTunnel(visitor):
        keep_urgent(conn)
        keep_urgent(upstream)
        _relay(conn, upstream, visitor)


def go_on(conn: Connection, visitor: Visitor) -> None:
    """Go on with a tunnel that has come from another worker."""
    check_tunnel(visitor)
    assert conn.relayed_to is not None
    with conn.relayed_to as upstream, OpenTunnel(visitor):
        _relay(conn, upstream, visitor)


def _relay(conn: Connection, upstream: Connection, visitor: Visitor) -> None:
    record, timeouts, pace = visitor.record, visitor.gate.timeouts, visitor.pace
    try:
        result = relay(
            conn,
            upstream,
            idle_timeout=timeouts.idle,
            half_closed_timeout=timeouts.half_closed,
            lifetime=timeouts.lifetime,
            on_bytes=(lambda direction, size: visitor.charge(size)) if visitor.has_quota else None,
            pace=None if pace is None else lambda direction, size: pace(size),
            handover=True,
        )
    except BaseException as error:
        record.sent, record.received = upstream.bytes_sent, upstream.bytes_received
        record.moved = isinstance(error, HandedOver)
        raise
    record.sent, record.received = result.bytes_a_to_b, result.bytes_b_to_a
    record.result, record.detail = _ENDS[result.reason]


def keep_urgent(conn: Connection) -> None:
    """Read urgent bytes in their place in the stream (tcp(7)): without it they would be lost, such as Telnet's DM."""
    with suppress(OSError):  # reset meanwhile; a Unix socket
        conn.stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


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


def _bound_address(upstream: Connection) -> tuple[IPAddress, int] | None:
    name = upstream.stream.sock.getsockname()
    return (as_ip(name[0]), name[1]) if isinstance(name, tuple) else None  # a Unix socket's
