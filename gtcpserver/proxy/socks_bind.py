"""BIND: wait for a connection from the destination (RFC 1928 section 6), as needed by active FTP."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import gevent
import gevent.socket
from gevent.event import Event
from greenlet import GreenletExit

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.connection.moving import session_made
from gtcpserver.process.forked import close_in_children

from .dial import keep_alive, way_out
from .errors import Denied
from .target import IPAddress, Target, unmapped
from .visitor import Visitor, result_of

#: Strangers may connect first, and are turned away. More than this many are an attack.
MOST_STRANGERS = 16

#: Bytes a client may send before the peer connects. Beyond that we stop reading, and miss its close, until then.
MOST_EARLY = 64 * 1024

Peer = tuple[IPAddress, int]

#: Makes the protocol's reply: the error (None: success), and the address to report.
Answer = Callable[[Exception | None, Peer | None], bytes]


class NobodyCame(OSError):
    """The destination did not connect in time, or strangers did instead."""


class ClientLeft(OSError):
    """The client did not wait for the destination."""


def serve_bind(conn: Connection, visitor: Visitor, target: Target, answer: Answer) -> Connection | None:
    """Listen, tell the client where, and wait for the destination.

    Args:
        target: who may connect: every address of it that the client may reach. The port does not matter: it is not
            known before (RFC 1928: "evaluate" the address).
        answer: called for each of the two replies.

    Returns:
        The destination's connection, which the caller closes; None: the client was told that there is none.
    """
    record = visitor.record
    record.asked = str(target)
    presence = visitor.presence
    presence.probe = answer(None, None)[:1]
    try:
        visitor.check_limits()
        with presence:
            upstream, found = visitor.upstream_to(target)
            if upstream is not None:
                raise Denied("the other proxy is not asked for BIND")
            # Any port: rules about ports concern what clients connect to.
            expected = visitor.allowed_addresses(Target(target.host, target.port or 1, target.ip), found)
        with _listen(visitor, visitor.in_reach(expected)[0]) as listening:
            host, port = listening.getsockname()[:2]
            conn.sendall(presence.rest_of(answer(None, (unmapped(ip_address(host)), port))))
            connection, peer = _wait_for(conn, listening, set(expected), visitor.gate.timeouts.connect)
    except Denied as error:
        record.result, record.detail = "destination_denied", str(error)
        conn.sendall(presence.rest_of(answer(error, None)))
        return None
    except ClientLeft as error:
        record.result, record.detail = "client_left", str(error)
        return None
    except OSError as error:
        record.result = "connect_timeout" if isinstance(error, NobodyCame) else result_of(error)
        record.detail = error.strerror or str(error)
        conn.sendall(presence.rest_of(answer(error, None)))
        return None
    record.connected = str(Target(str(peer[0]), peer[1], peer[0]))
    visitor.opened = Target(target.host, target.port or 1, target.ip), peer[0], visitor.found
    record.note_opened()
    try:
        conn.sendall(answer(None, peer))
    except BaseException:
        connection.close()
        raise
    return connection


def _listen(visitor: Visitor, peer: IPAddress) -> Any:
    """Return a listening socket on the address from which the proxy would connect to the peer."""
    source = visitor.source_to(peer) or way_out(peer)
    listening = gevent.socket.socket(
        socket.AF_INET6 if isinstance(peer, IPv6Address) else socket.AF_INET, socket.SOCK_STREAM
    )
    close_in_children(listening)
    try:
        # Accepted sockets inherit the options of the listening socket.
        keep_alive(listening)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind((str(source), 0))
        listening.listen(MOST_STRANGERS)
    except BaseException:
        listening.close()
        raise
    return listening


def _wait_for(conn: Connection, listening: Any, expected: set[IPAddress], timeout: float) -> tuple[Connection, Peer]:
    """Return the first connection from an expected address.

    Raises:
        NobodyCame, ClientLeft. OSError: it cannot be accepted.
    """
    early: list[bytes] = []
    session = session_made(conn)
    session.stays = "bind"  # for operators: neither a tunnel nor a request that ends soon
    coming = gevent.spawn(_accept, listening, expected)
    leaving = gevent.spawn(_read_early, conn, early)
    try:
        gevent.wait([coming, leaving], timeout, count=1)
    except BaseException:
        coming.kill()
        if isinstance(coming.value, tuple):
            coming.value[0].close()
        raise
    finally:
        # Until they have ended: data that arrives from now on is the relay's.
        gevent.killall([coming, leaving])
        conn.unread(b"".join(early))
        session.stays = ""
    came: tuple[Connection, Peer] | BaseException = coming.value
    if isinstance(came, tuple):
        return came
    if isinstance(came, OSError):
        raise came
    if isinstance(leaving.value, GreenletExit):  # it was still reading
        raise NobodyCame(f"nobody connected within {timeout:g} seconds")
    raise ClientLeft("the client left")


def _accept(listening: Any, expected: set[IPAddress]) -> tuple[Connection, Peer] | OSError:
    # An error is returned instead of raised: gevent would print it.
    try:
        for _ in range(MOST_STRANGERS):
            accepted, address = listening.accept()
            # Not getpeername(): a peer that resets at once no longer has a name.
            ip = unmapped(ip_address(address[0].partition("%")[0]))
            if ip in expected:
                family = accepted.family
                return Connection(family, socket.SOCK_STREAM, 0, accepted.detach()), (ip, address[1])
            accepted.close()
    except OSError as error:
        return error
    return NobodyCame("only strangers connected")


def _read_early(conn: Connection, early: list[bytes]) -> None:
    """Read what a client sends before the peer connects; return when it has left.

    Over TLS, and behind unread bytes, an end is only noticed by reading.
    """
    room = MOST_EARLY
    while room > 0:
        try:
            data = conn.recv(min(room, READ_AHEAD))
        except TimeoutError:
            continue  # the server's request to end idle clients: this one waits
        except OSError:
            return
        if not data:
            return
        early.append(data)
        room -= len(data)
    Event().wait()


def ipv4_only(address: Peer | None) -> tuple[IPv4Address, int] | None:
    """Return what SOCKS4 can report of an address."""
    if address is None or not isinstance(address[0], IPv4Address):
        return None
    return address[0], address[1]
