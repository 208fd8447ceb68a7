"""UDP ASSOCIATE: datagrams for a client, as long as its TCP connection lives (RFC 1928 section 7)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from typing import Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.errors import DeadlineExceeded

from . import socks5
from .errors import Denied, ProtocolError
from .limits import rest
from .socks5 import Reply
from .succession import OpenTunnel
from .target import IPAddress, Target, unmapped
from .udp import udp_socket
from .visitor import Visitor, result_of

#: Destinations whose replies are let through, per client; the one longest not written to is forgotten.
MOST_PEERS = 1024

LARGEST_DATAGRAM = 65535

#: Datagrams of one socket that are read in a row: then all others have their turn, however many arrive.
MOST_IN_A_ROW = 16

#: Seconds until the next attempt when a socket cannot be read: the system lacks memory.
PAUSE = 0.1

#: Names of one client that are looked up at once, and datagrams that wait for each; others are lost, as in a network.
#: A client sends one to a name, seldom more, before it has an answer.
MOST_NAMES = 16
MOST_WAITING = 8

Peer = tuple[IPAddress, int]


def serve_udp(conn: Connection, visitor: Visitor, target: Target) -> None:
    """Relay datagrams until the client closes its TCP connection, or until the idle timeout.

    Args:
        target: where the client says that it will send from. Datagrams must come from the address of its TCP
            connection. Their port is believed if this is that address; otherwise the client does not know (0.0.0.0:0),
            or is behind NAT, which changes the port, too: it is learned from the first datagram.
    """
    record = visitor.record
    own = visitor.own
    if own is None:
        # A Unix socket: there is no address from which the client's datagrams must come.
        record.result, record.detail = "bad_request", "UDP ASSOCIATE by a unix socket"
        conn.sendall(socks5.reply(Reply.COMMAND_NOT_SUPPORTED))
        return
    try:
        visitor.check_limits()
        association = _Association(visitor, own[0], target)
    except OSError as error:
        record.result, record.detail = result_of(error), error.strerror or str(error)
        conn.sendall(socks5.reply(socks5.reply_of(error)))
        return
    try:
        conn.sendall(socks5.reply(Reply.SUCCEEDED, association.address))
        record.note_opened()
        if visitor.announce is not None:
            visitor.announce(record)
        association.start()
        with OpenTunnel(visitor):
            _wait_for_the_end(conn, visitor, association)
    finally:
        association.close()


def _wait_for_the_end(conn: Connection, visitor: Visitor, association: _Association) -> None:
    record, timeouts = visitor.record, visitor.gate.timeouts
    conn.settimeout(timeouts.idle)
    moved = -1
    if timeouts.lifetime is not None:
        # The association ends with the connection.
        conn.deadline(timeouts.lifetime).__enter__()
    while True:
        try:
            # Data that a client sends here has no meaning; its end ends the association.
            if not conn.recv(4096):
                record.result = "ok"
                return
        except DeadlineExceeded:
            record.result = "lifetime"
            return
        except TimeoutError:
            if moved == record.sent + record.received:
                record.result = "idle"
                return
            moved = record.sent + record.received


class _Association:
    """The sockets of one client: one towards it, and one towards destinations for each local address."""

    def __init__(self, visitor: Visitor, local: IPAddress, said: Target) -> None:
        self._visitor = visitor
        self._udp = visitor.gate.udp
        self._pace = visitor.toll
        self._client: Any = None  # (host, port, ...) of the client's datagrams, once known
        self._said_port = said.port
        self._knows_its_port = said.port != 0 and said.ip == visitor.client
        self._peers: OrderedDict[Peer, Any] = OrderedDict()  # with the socket through which each is reached
        self._outer: dict[IPAddress, Any] = {}
        self._greenlets: list[Any] = []
        self._waiting: dict[str, list[socks5.Datagram]] = {}  # for the addresses of a name
        self._lookups: dict[str, Any] = {}
        self._limit = visitor.limits.associations
        self._limit.enter(visitor.address)
        try:
            self._inner = udp_socket(local, self._udp.ports)
        except BaseException:
            self._limit.leave(visitor.address)
            raise

    @property
    def address(self) -> Peer:
        """Return the address for the client's datagrams."""
        host, port = self._inner.getsockname()[:2]
        return self._udp.told(unmapped(ip_address(host.split("%")[0]))), port

    def start(self) -> None:
        self._greenlets.append(gevent.spawn(self._read_from_client))

    def close(self) -> None:
        gevent.killall([*self._greenlets, *self._lookups.values()], block=False)
        self._limit.leave(self._visitor.address)
        for sock in (self._inner, *self._outer.values()):
            sock.close()

    # -- from the client ---------------------------------------------------------------------------------------------

    def _read_from_client(self) -> None:
        # Datagrams that arrive meanwhile stay in the kernel's buffer; those that do not fit are lost.
        rest(self._pace, 0)
        for packet, source in _arrivals(self._inner):
            if not self._is_the_client(source):
                continue
            try:
                datagram = socks5.parse_datagram(packet)
                if datagram is not None and not self._must_wait(datagram):
                    self._send(datagram)
            except (ProtocolError, Denied, OSError):
                continue  # there is no way to tell the client

    def _is_the_client(self, source: Any) -> bool:
        if source == self._client:
            return True
        if source[1] != self._said_port and (self._client is not None or self._knows_its_port):
            return False
        if unmapped(ip_address(source[0].split("%")[0])) != self._visitor.client:
            return False
        # The first one, or the port that the client has named, whoever was before it: others may share its address.
        self._client = source
        return True

    def _must_wait(self, datagram: socks5.Datagram) -> bool:
        """Return whether a datagram is sent later, after its name has been looked up. Others are not held up."""
        host = datagram.target.host
        waiting = self._waiting.get(host)
        if waiting is not None:
            if len(waiting) < MOST_WAITING:
                waiting.append(datagram)
            return True
        if datagram.target.ip is not None or self._visitor.knows(datagram.target):
            return False
        if len(self._waiting) < MOST_NAMES:
            self._lookups[host] = gevent.spawn(self._send_waiting, host)  # it runs later; it may fail, now
            self._waiting[host] = [datagram]
        return True

    def _send_waiting(self, host: str) -> None:
        waiting = self._waiting[host]
        try:
            while waiting:
                try:
                    self._send(waiting.pop(0))
                except (Denied, OSError):
                    continue  # there is no way to tell the client
        finally:
            del self._waiting[host], self._lookups[host]

    def _send(self, datagram: socks5.Datagram) -> None:
        visitor, target = self._visitor, datagram.target
        ip = self._way_to(target)
        if ip is None:
            return
        visitor.record.asked = visitor.record.asked or str(target)
        visitor.record.connected = visitor.record.connected or str(Target(str(ip), target.port, ip))
        peer = (ip, target.port)
        outer = self._peers.get(peer)
        if outer is None:
            outer = self._peers[peer] = self._outer_socket(ip)
            if len(self._peers) > MOST_PEERS:
                self._peers.popitem(last=False)
        else:
            self._peers.move_to_end(peer)
        _send_now(outer, datagram.data, (str(ip), target.port))
        visitor.record.sent += len(datagram.data)
        rest(self._pace, len(datagram.data))

    def _way_to(self, target: Target) -> IPAddress | None:
        """Return the address at which the client may reach a target; None: it may not. Raise Denied, OSError."""
        visitor = self._visitor
        upstream, found = visitor.upstream_to(target)
        if upstream is not None:
            return None  # our location must not be revealed there, and the other proxy does not relay datagrams
        if found is None:
            found = visitor.addresses_of(target)
        return next((one for one in visitor.in_reach(found) if visitor.decide(target, one, found).allowed), None)

    # -- from destinations -------------------------------------------------------------------------------------------

    def _outer_socket(self, ip: IPAddress) -> Any:
        source = self._visitor.source_to(ip) or ip_address("::" if isinstance(ip, IPv6Address) else "0.0.0.0")
        sock = self._outer.get(source)
        if sock is None:
            sock = self._outer[source] = udp_socket(source, self._udp.ports if self._udp.full_cone else None)
            self._greenlets.append(gevent.spawn(self._read_from_peers, sock))
        return sock

    def _read_from_peers(self, sock: Any) -> None:
        for data, source in _arrivals(sock):
            peer = (unmapped(ip_address(source[0].split("%")[0])), source[1])
            if self._client is None or not self._is_welcome(peer):
                continue
            try:
                _send_now(self._inner, socks5.datagram(*peer, data), self._client)
            except OSError:
                continue  # too long with its header, or the client's host is gone
            self._visitor.record.received += len(data)
            rest(self._pace, len(data))

    def _is_welcome(self, peer: Peer) -> bool:
        """Return whether datagrams from an address reach the client: if it has written to it; or, with `full_cone`, if
        it may."""
        if peer in self._peers or not self._udp.full_cone:
            return peer in self._peers
        ip, port = peer
        try:
            return self._way_to(Target(str(ip), port, ip)) is not None
        except (Denied, OSError):
            return False


def _arrivals(sock: Any) -> Iterator[tuple[bytes, Any]]:
    """Yield datagrams and their sources, for ever."""
    in_a_row = 0
    while True:
        in_a_row += 1
        if in_a_row >= MOST_IN_A_ROW:
            in_a_row = 0
            gevent.sleep(0)  # recvfrom lets nobody else run while there is one more
        try:
            arrived = sock.recvfrom(LARGEST_DATAGRAM)
        except ConnectionError:
            continue  # an ICMP message about one of the destinations
        except OSError:
            gevent.sleep(PAUSE)
            continue
        yield arrived


def _send_now(sock: Any, data: bytes, address: Any) -> None:
    """Send a datagram, or lose it if the socket's buffer is full, of those to a host that does not answer to ARP, say:
    others must not wait for it. Raise OSError."""
    sock.settimeout(0.0)
    try:
        sock.sendto(data, address)
    finally:
        sock.settimeout(None)
