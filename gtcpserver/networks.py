"""IP addresses and networks in one form, so that clients can be compared with configurations.

An IPv4 client of a socket for both families has an IPv4-mapped IPv6 address (::ffff:192.0.2.1; RFC 4291 section
2.5.5.2), and a configuration may name it so: both are IPv4 here. A zone ("fe80::1%eth0") is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


def unmapped(ip: IPAddress) -> IPAddress:
    """Return the IPv4 address that an IPv4-mapped IPv6 address stands for; return others unchanged."""
    return (ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else ip


@lru_cache(maxsize=4096)
def as_ip(host: str) -> IPAddress:
    """Parse an address as returned by sockets; drop its zone and unmap it. Raise ValueError."""
    return unmapped(ip_address(host.partition("%")[0]))


def parse_network(text: str) -> IPNetwork:
    """Parse "10.0.0.0/8" or an address, mapped or not.

    Raises:
        ValueError: it is neither, has bits set beyond its prefix, or a zone.
    """
    text = str(text)
    if "%" in text:
        raise ValueError(f"{text!r} has a zone, by which clients are not told apart")
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((mapped, network.prefixlen - 96))
    return network


def is_in(ip: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    """Return whether an address from `as_ip` is in one of the networks."""
    return any(ip in network for network in networks if network.version == ip.version)
