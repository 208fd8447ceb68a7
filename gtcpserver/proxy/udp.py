"""UDP towards clients: which address they are told, from which ports, and how many associations they may have.

`socks_udp` relays the datagrams.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from random import randrange
from typing import Any

import gevent.socket

from gtcpserver.admission.client_limits import ClientKey, key_of_host, text_of
from gtcpserver.admission.shared_clients import SharedClients
from gtcpserver.process.forked import close_in_children
from gtcpserver.shared.column import Column

from .errors import LimitReached
from .target import IPAddress

#: Ports of a range that are tried for one socket, so that a full range of 64,000 ports holds up nobody: bind(2) takes
#: 1 to 2 us.
MOST_PORTS_TRIED = 1000

_ALL = b"proxy associations"


@dataclass(frozen=True, kw_only=True)
class Udp:
    """How UDP associations are offered.

    Attributes:
        advertise: addresses that clients are told instead of the one that they have connected to, at most one of each
            family: those of a NAT gateway or a balancer before this host.
        ports: ports for the datagrams of clients, which a firewall has to let in; with `full_cone`, for those of
            destinations, too. None: the system's choice (net.ipv4.ip_local_port_range).
        full_cone: pass on datagrams from all addresses that the client may reach, not only from those that it has sent
            to (endpoint-independent filtering, RFC 4787 section 5).

    Example::

        from ipaddress import ip_address

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.udp import Udp

        gate = Gate(udp=Udp(advertise=[ip_address("203.0.113.7")], ports=range(50000, 51000)))
    """

    advertise: Sequence[IPAddress] = ()
    ports: range | None = None
    full_cone: bool = False

    def told(self, address: IPAddress) -> IPAddress:
        """Return what a client is told instead of an address of ours."""
        return next((one for one in self.advertise if one.version == address.version), address)


def udp_socket(address: IPAddress, ports: range | None = None) -> Any:
    """Return a socket for datagrams, bound to an address and to a port of the range. Raise OSError."""
    sock = gevent.socket.socket(
        socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET, socket.SOCK_DGRAM
    )
    close_in_children(sock)
    try:
        _bind(sock, str(address), ports)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: Any, host: str, ports: range | None) -> None:
    if ports is None:
        sock.bind((host, 0))
        return
    # From any port on, so that the next port is not known to those who send datagrams from forged addresses.
    first = randrange(len(ports))
    for number in range(min(len(ports), MOST_PORTS_TRIED)):
        try:
            sock.bind((host, ports[(first + number) % len(ports)]))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRNOTAVAIL, "all of udp.ports are in use")


class Associations:
    """Limit the UDP associations of all clients, and of each.

    Args:
        most: of all clients at once; None: no limit.
        most_of_client: of one client at once; None: no limit.

    Attributes:
        open: those of this process.
    """

    def __init__(self, most: int | None = None, most_of_client: int | None = None) -> None:
        self._most = most
        self._most_of_client = most_of_client
        self.open = 0
        self._by_client: Counter[ClientKey] = Counter()
        # In a worker process:
        self._all_of_all: SharedClients | None = None
        self._clients_of_all: SharedClients | None = None

    def share(self, column: Column) -> None:
        """Count together with all processes that have a column. Call before the first association."""
        if self._most is not None:
            self._all_of_all = SharedClients(column, self._most, None, 1)
        if self._most_of_client is not None:
            self._clients_of_all = SharedClients(column, self._most_of_client, None, 1)

    def enter(self, address: Any) -> None:
        """Count an association; `leave` must be called at its end.

        Args:
            address: its client's, as returned by ``accept`` of an Internet socket.

        Raises:
            LimitReached: with the name of the limit.
        """
        client = key_of_host(address[0])
        if self._is_full():
            raise LimitReached(errno.EUSERS, "udp_associations")
        if self._client_is_full(client):
            if self._all_of_all is not None:
                self._all_of_all.leave(_ALL)
            raise LimitReached(errno.EUSERS, "client_udp_associations")
        self.open += 1
        self._by_client[client] += 1

    def _is_full(self) -> bool:
        if self._all_of_all is not None:
            return self._all_of_all.enter(_ALL) is not None
        return self._most is not None and self.open >= self._most

    def _client_is_full(self, client: ClientKey) -> bool:
        if self._clients_of_all is not None:
            return self._clients_of_all.enter(_key_of(client)) is not None
        return self._most_of_client is not None and self._by_client[client] >= self._most_of_client

    def leave(self, address: Any) -> None:
        """Count off an association that has ended."""
        client = key_of_host(address[0])
        if self._all_of_all is not None:
            self._all_of_all.leave(_ALL)
        if self._clients_of_all is not None:
            self._clients_of_all.leave(_key_of(client))
        self.open -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]


def _key_of(client: ClientKey) -> bytes:
    return b"proxy associations " + text_of(client).encode()
