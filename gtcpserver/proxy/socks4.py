"""SOCKS4 and SOCKS4a messages: bytes to values and back. No I/O.

There is no RFC: SOCKS.txt of Ying-Da Lee's "SOCKS: A protocol for TCP proxy across firewalls", and the extension
"SOCKS 4A". As in socks5.py, a parser returns a message with its size, or None if more bytes are needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address

from .errors import BadTarget, ProtocolError
from .target import Target, make_target

VERSION = 4

#: The protocol has no limits: without ours a client that sends no NUL would make the proxy buffer forever. 255 as in
#: SOCKS5, where a length octet is the limit.
LONGEST_USER = 255
LONGEST_NAME = 255


class Command(IntEnum):
    CONNECT = 1
    BIND = 2


class Reply(IntEnum):
    GRANTED = 0x5A
    REJECTED = 0x5B
    NO_IDENTD = 0x5C
    WRONG_USER = 0x5D


@dataclass(frozen=True, slots=True)
class Request:
    """A command, its destination, and the client's unverified user ID (there is no password)."""

    command: Command
    target: Target
    user: bytes
    is_4a: bool


def parse_request(data: bytes) -> tuple[Request, int] | None:
    """Read a request.

    Raises:
        ProtocolError: with the reply to send.
    """
    if data and data[0] != VERSION:
        raise ProtocolError(f"SOCKS version must be 4, got {data[0]}")
    if len(data) < 8:
        return None
    number = int.from_bytes(data[4:8], "big")
    user = _until_nul(data, 8, LONGEST_USER, "user id")
    if user is None:
        return None
    end = 8 + len(user) + 1
    is_4a = 0 < number < 256  # 0.0.0.x with x not 0
    host = str(IPv4Address(number))
    if is_4a:
        name = _until_nul(data, end, LONGEST_NAME, "host name")
        if name is None:
            return None
        end += len(name) + 1
        try:
            host = name.decode()
        except UnicodeDecodeError:
            raise ProtocolError("the host name is not UTF-8", reply(Reply.REJECTED)) from None
    try:
        command = Command(data[1])
    except ValueError:
        raise ProtocolError(f"unknown command {data[1]}", reply(Reply.REJECTED)) from None
    port = int.from_bytes(data[2:4], "big")
    try:
        target = make_target(host, port, least_port=1 if command is Command.CONNECT else 0)
    except BadTarget as error:
        raise ProtocolError(str(error), reply(Reply.REJECTED)) from None
    return Request(command, target, user, is_4a), end


# -- as a client of another proxy --------------------------------------------------------------------------------------


def connect_request(target: Target, user: bytes) -> bytes:
    """Return a request for a connection, of SOCKS4a if the target is a name. Raise ValueError: it is IPv6."""
    head = bytes((VERSION, Command.CONNECT)) + target.port.to_bytes(2, "big")
    if target.ip is None:
        return head + b"\0\0\0\1" + user + b"\0" + target.host.encode() + b"\0"
    if not isinstance(target.ip, IPv4Address):
        raise ValueError("SOCKS4 has no IPv6 addresses")
    return head + target.ip.packed + user + b"\0"


_HOP = re.compile(rb"gtcpserver hop ([1-9][0-9]?)")


def user_of_hops(hops: int) -> bytes:
    """Return a user ID that says through how many proxies a request has come; b"" for 0."""
    return b"gtcpserver hop %d" % hops if hops else b""


def hops_in(user: bytes) -> int:
    """Return what such a user ID says; 0 for any other one."""
    found = _HOP.fullmatch(user)
    return 0 if found is None else int(found[1])


def _until_nul(data: bytes, start: int, limit: int, name: str) -> bytes | None:
    end = data.find(b"\0", start, start + limit + 1)
    if end < 0:
        if len(data) > start + limit:
            raise ProtocolError(f"the {name} is longer than {limit} bytes", reply(Reply.REJECTED))
        return None
    return data[start:end]


def reply(code: Reply, bound: tuple[IPv4Address, int] | None = None) -> bytes:
    """Return the answer to a request; its first byte is 0, not 4.

    Args:
        bound: the address from which the proxy connects to the destination; None: undisclosed, or IPv6, all zeros.
    """
    ip, port = bound or (IPv4Address(0), 0)
    return bytes((0, code)) + port.to_bytes(2, "big") + ip.packed
