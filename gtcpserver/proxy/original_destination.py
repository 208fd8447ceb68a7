"""Where a client wanted to go whose connection the firewall has sent to a listener of ours."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from gtcpserver.linux import IP6T_SO_ORIGINAL_DST, SO_ORIGINAL_DST
from gtcpserver.networks import as_ip

from .target import IPAddress, unmapped

_SOCKADDR_IN = struct.Struct("!2xH4s8x")  # ip(7); the family is in the host's byte order, and known
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")  # ipv6(7)


def original_destination(sock: Any) -> tuple[tuple[IPAddress, int], bool]:
    """Find the address that a client has connected to, before the firewall sent it here.

    With REDIRECT (and DNAT on this host) the address was replaced, and connection tracking knows it; with TPROXY the
    socket itself still has it (getsockname(2)).

    Returns:
        Address and port; and whether the firewall has replaced them. Of a client that has connected to us directly they
        are the listener's own.

    Raises:
        OSError: the socket failed.
    """
    host, port = sock.getsockname()[:2]
    here = as_ip(host), port
    try:
        before = _before_nat(sock, here[0].version)
    except OSError:
        # ENOENT: the connection is not tracked. ENOPROTOOPT: no connection is. Whatever it is, what the socket says
        # holds: another destination than that is not known.
        return here, False
    return before, before != here


def _before_nat(sock: Any, version: int) -> tuple[IPAddress, int]:
    # An IPv4 client of an IPv6 socket ("::ffff:192.0.2.1") has an IPv4 address in connection tracking.
    if version == 4:
        data = sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, _SOCKADDR_IN.size)
        port, packed = _SOCKADDR_IN.unpack(data)
        return IPv4Address(packed), port
    data = sock.getsockopt(socket.IPPROTO_IPV6, IP6T_SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
    port, packed = _SOCKADDR_IN6.unpack(data)
    return unmapped(IPv6Address(packed)), port
