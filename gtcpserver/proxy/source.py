"""Choose the source address of connections, on a host that has several."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections import Counter
from ipaddress import IPv4Address, IPv6Address
from time import monotonic

from .dial import way_out
from .target import IPAddress

SIOCGIFCONF = 0x8912  # linux/sockios.h
_IFREQ = struct.Struct("16s4x4s16x")  # netdevice(7): a name, and a sockaddr_in in a union of 24 bytes

#: Seconds to cache the addresses of this host: listing them takes 30 us and more.
KEEP = 5.0

_known: tuple[float, dict[IPAddress, str], dict[IPAddress, str]] = (0.0, {}, {})


def is_better_source(own: IPAddress, destination: IPAddress) -> bool:
    """Return whether the address that a client has connected to is a better source than the system's choice.

    It is if the interface that leads to the destination has this address and others, as when a cloud maps each private
    address of an interface to a public one. With the address of another interface, such as a VPN or the inner side of a
    gateway, the packets would leave the same way, and no response would find its way back.
    """
    choices = _choices()
    interface = choices.get(own)
    if interface is None:
        return False
    try:
        return choices.get(way_out(destination)) == interface
    except OSError:
        return False  # no route: connecting will report that


def interfaces() -> dict[IPAddress, str]:
    """Return the interface of each address of this host; up to some seconds old."""
    return _look()[1]


def _choices() -> dict[IPAddress, str]:
    """Return the interface of each address that shares it with others of the same family; up to some seconds old."""
    return _look()[2]


def _look() -> tuple[float, dict[IPAddress, str], dict[IPAddress, str]]:
    global _known
    if _known[0] < monotonic():
        every = dict(_ipv4() + _ipv6())
        found = {ip: name for ip, name in every.items() if not (ip.is_loopback or ip.is_link_local)}
        beside = Counter((name, ip.version) for ip, name in found.items())
        choices = {ip: name for ip, name in found.items() if beside[name, ip.version] > 1}
        _known = (monotonic() + KEEP, every, choices)
    return _known


def _ipv4() -> list[tuple[IPAddress, str]]:
    # netdevice(7). The second and further addresses may have labels, "eth0:1".
    size = 64 * _IFREQ.size
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        while True:
            room = array.array("B", bytes(size))
            answer = fcntl.ioctl(any_socket, SIOCGIFCONF, struct.pack("iP", size, room.buffer_info()[0]))
            used = struct.unpack("iP", answer)[0]
            if used < size:
                break
            size *= 2  # they may not all have fitted
    return [
        (IPv4Address(packed), name.partition(b"\0")[0].decode().partition(":")[0])
        for name, packed in _IFREQ.iter_unpack(room[:used].tobytes())
    ]


def _ipv6() -> list[tuple[IPAddress, str]]:
    # proc(5): address, index, prefix length, scope, flags, name.
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as lines:
            words = [line.split() for line in lines]
    except OSError:
        return []  # no IPv6 here
    return [(IPv6Address(int(line[0], 16)), line[5]) for line in words]
