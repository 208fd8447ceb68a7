"""BIND: wait for a connection from the destination (RFC 1928 section 6), as FTP in active mode needs it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Any

import gevent.select
import gevent.socket

from ..connection import Connection
from .gate import Denied, Visitor, result_of
from .target import IPAddress, Target, unmapped

#: Strangers may connect first, and are turned away. After so many it is an attack.
MOST_STRANGERS = 16

Answer = Callable[[bool, tuple[IPAddress, int] | None], bytes]
"""The protocol's reply: granted or not, and which address it names."""


class NobodyCame(OSError):
    """The destination did not connect in time, or the client has left."""


def serve_bind(conn: Connection, visitor: Visitor, target: Target, answer: Answer) -> Connection | None:
    """Listen, tell the client where, and wait for the destination.

    Args:
        target: who may connect: every address of it that the client may reach. The port does not count: it is not known
            before (RFC 1928: "evaluate" the address).
        answer: called for each of the two replies.

    Returns:
        The destination's connection, which the caller closes; None: the client has been told that there is none.
    """
    record = visitor.record
    record.asked = str(target)
    if visitor.upstream_to(target) is not None:
        record.result, record.detail = "destination_denied", "the other proxy is not asked for BIND"
        conn.sendall(answer(False, None))
        return None
    try:
        visitor.check_limits()
        # Any port: rules for ports are about what clients connect to.
        expected = visitor.allowed_addresses(Target(target.host, target.port or 1, target.ip))
        listening = _listen(conn, visitor, expected[0])
    except Denied as error:
        record.result, record.detail = "destination_denied", str(error)
        conn.sendall(answer(False, None))
        return None
    except OSError as error:
        record.result, record.detail = result_of(error), error.strerror or str(error)
        conn.sendall(answer(False, None))
        return None
    with listening:
        host, port = listening.getsockname()[:2]
        conn.sendall(answer(True, (unmapped(ip_address(host)), port)))
        try:
            connection = _wait_for(conn, listening, set(expected), visitor.gate.timeouts.connect)
        except NobodyCame as error:
            record.result, record.detail = "connect_timeout", str(error)
            conn.sendall(answer(False, None))
            return None
    peer = connection.getpeername()
    ip = unmapped(ip_address(peer[0]))
    record.connected = str(Target(str(ip), peer[1], ip))
    record.note_opened()
    conn.sendall(answer(True, (ip, peer[1])))
    return connection


def _listen(conn: Connection, visitor: Visitor, peer: IPAddress) -> Any:
    """A listening socket on the address from which the proxy would connect to the peer."""
    family = socket.AF_INET6 if isinstance(peer, IPv6Address) else socket.AF_INET
    source = visitor.source_to(peer)
    if source is None:
        # connect(2) of a UDP socket sends nothing, and shows which address the route would use.
        with gevent.socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(peer), 1))
            source = ip_address(probe.getsockname()[0])
    listening = gevent.socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.bind((str(source), 0))
        listening.listen(MOST_STRANGERS)
    except BaseException:
        listening.close()
        raise
    return listening


def _wait_for(conn: Connection, listening: Any, expected: set[IPAddress], timeout: float) -> Connection:
    until = monotonic() + timeout
    # Whether an encrypted connection has ended cannot be seen without reading from it.
    watched = [listening, conn] if conn.tls is None else [listening]
    for _ in range(MOST_STRANGERS):
        while True:
            ready, _, _ = gevent.select.select(watched, [], [], max(0.0, until - monotonic()))
            if not ready:
                raise NobodyCame(f"nobody connected within {timeout:g} seconds")
            if listening in ready:
                break
            try:
                if not conn.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise NobodyCame("the client left")
            except BlockingIOError:
                continue
            # It sends already; its end will be noticed when somebody has come, or the time is over.
            watched = [listening]
        accepted, peer = listening.accept()
        if unmapped(ip_address(peer[0].split("%")[0])) in expected:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            family = accepted.family
            return Connection(family, socket.SOCK_STREAM, 0, accepted.detach())
        accepted.close()
    raise NobodyCame("only strangers connected")


def ipv4_only(address: tuple[IPAddress, int] | None) -> tuple[IPv4Address, int] | None:
    """What SOCKS4 can name of an address."""
    if address is None or not isinstance(address[0], IPv4Address):
        return None
    return address[0], address[1]
