"""SOCKS5 messages (RFC 1928, RFC 1929): bytes to values and back. No I/O.

A ``parse_...`` function takes the bytes received so far. It returns the message and its size, or None if more bytes are
needed; a message has at most 262 (greeting), 513 (password) or 262 (request) bytes. Surplus bytes belong to the next
message, or to the destination.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from .errors import TTL_EXPIRED, BadTarget, ProtocolError
from .target import IPAddress, Target, make_target

VERSION = 5
AUTHENTICATION_VERSION = 1  # of RFC 1929's messages, not 5


class Method(IntEnum):
    """How a client may authenticate (RFC 1928 section 3)."""

    NONE = 0x00
    PASSWORD = 0x02
    NOT_ACCEPTABLE = 0xFF


class Command(IntEnum):
    CONNECT = 1
    BIND = 2
    UDP_ASSOCIATE = 3


_COMMANDS = {int(command): command for command in Command}


class AddressType(IntEnum):
    IPV4 = 1
    NAME = 3
    IPV6 = 4


class Reply(IntEnum):
    """RFC 1928 section 6."""

    SUCCEEDED = 0
    GENERAL_FAILURE = 1
    NOT_ALLOWED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    CONNECTION_REFUSED = 5
    TTL_EXPIRED = 6
    COMMAND_NOT_SUPPORTED = 7
    ADDRESS_TYPE_NOT_SUPPORTED = 8


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client's name and password; bytes as they came (RFC 1929 specifies no character set)."""

    user: bytes
    password: bytes


@dataclass(slots=True)
class Request:
    command: Command
    target: Target


# -- from the client ---------------------------------------------------------------------------------------------------


def parse_greeting(data: bytes) -> tuple[frozenset[int], int] | None:
    """Return the methods that a client offers. Raise ProtocolError."""
    _check_version(data)
    if len(data) < 2:
        return None
    end = 2 + data[1]
    if not data[1]:
        raise ProtocolError("the client offers no authentication method", choose(Method.NOT_ACCEPTABLE))
    return (frozenset(data[2:end]), end) if len(data) >= end else None


def parse_password(data: bytes) -> tuple[Credentials, int] | None:
    """Return user name and password, 1 to 255 bytes each. Raise ProtocolError."""
    if data and data[0] != AUTHENTICATION_VERSION:
        raise ProtocolError(f"version of the authentication must be 1, got {data[0]}", authentication_answer(False))
    if len(data) < 2:
        return None
    if not data[1]:
        raise ProtocolError("the user name is empty", authentication_answer(False))
    name_end = 2 + data[1]
    if len(data) <= name_end:
        return None
    if not data[name_end]:
        raise ProtocolError("the password is empty", authentication_answer(False))
    end = name_end + 1 + data[name_end]
    if len(data) < end:
        return None
    return Credentials(data[2:name_end], data[name_end + 1 : end]), end


def parse_request(data: bytes) -> tuple[Request, int] | None:
    """Return a command and its destination.

    Raises:
        ProtocolError: with the reply to send: 07 for an unknown command, 08 for an unknown address type.
    """
    _check_version(data)
    if len(data) < 4:
        return None
    if data[2]:
        raise ProtocolError(f"the reserved byte must be 0, got {data[2]}", reply(Reply.GENERAL_FAILURE))
    found = _parse_address(data, 3)
    if found is None:
        return None
    host, port, end = found
    command = _COMMANDS.get(data[1])
    if command is None:
        raise ProtocolError(f"unknown command {data[1]}", reply(Reply.COMMAND_NOT_SUPPORTED))
    try:
        target = make_target(host, port, least_port=1 if command is Command.CONNECT else 0)
    except BadTarget as error:
        raise ProtocolError(str(error), reply(Reply.GENERAL_FAILURE)) from None
    return Request(command, target), end


def _check_version(data: bytes) -> None:
    if data and data[0] != VERSION:
        raise ProtocolError(f"SOCKS version must be 5, got {data[0]}")


def _parse_address(data: bytes, at: int) -> tuple[str, int, int] | None:
    """Return (host, port, end) of an address that begins with its type at ``at``."""
    kind = data[at]
    if kind == AddressType.NAME:
        if len(data) < at + 2:
            return None
        if not data[at + 1]:
            raise ProtocolError("the host name is empty", reply(Reply.GENERAL_FAILURE))
        start, size = at + 2, data[at + 1]
    elif kind in (AddressType.IPV4, AddressType.IPV6):
        start, size = at + 1, 4 if kind == AddressType.IPV4 else 16
    else:
        raise ProtocolError(f"unknown address type {kind}", reply(Reply.ADDRESS_TYPE_NOT_SUPPORTED))
    end = start + size + 2
    if len(data) < end:
        return None
    raw = data[start : start + size]
    try:
        host = raw.decode() if kind == AddressType.NAME else _text_of(raw)
    except UnicodeDecodeError:
        raise ProtocolError("the host name is not UTF-8", reply(Reply.GENERAL_FAILURE)) from None
    return host, int.from_bytes(data[end - 2 : end], "big"), end


@lru_cache(maxsize=4096)
def _text_of(packed: bytes) -> str:
    return str(ip_address(packed))


# -- to the client -----------------------------------------------------------------------------------------------------


def choose(method: Method) -> bytes:
    """Return the answer to a greeting. After NOT_ACCEPTABLE the client has to close (RFC 1928 section 3)."""
    return bytes((VERSION, method))


def authentication_answer(accepted: bool) -> bytes:
    """Return the answer to a password; after a refusal the connection must be closed (RFC 1929 section 2)."""
    return bytes((AUTHENTICATION_VERSION, 0 if accepted else 1))


def reply(code: Reply, bound: tuple[IPAddress, int] | None = None) -> bytes:
    """Return the answer to a request.

    Args:
        bound: the address from which the proxy connects to the destination; None: undisclosed, all zeros.
    """
    ip, port = bound or (IPv4Address(0), 0)
    return bytes((VERSION, code, 0)) + _address_bytes(ip, port)


def _address_bytes(ip: IPAddress, port: int) -> bytes:
    kind = AddressType.IPV6 if isinstance(ip, IPv6Address) else AddressType.IPV4
    return bytes((kind,)) + ip.packed + port.to_bytes(2, "big")


# -- as a client of another proxy --------------------------------------------------------------------------------------


def greeting(methods: Sequence[int]) -> bytes:
    """Return a greeting with the methods that we offer."""
    return bytes((VERSION, len(methods), *methods))


#: The private method (RFC 1928 section 3) of one hop. Servers choose one they know.
_FIRST_HOP = 0xD0
_MOST_HOPS = 16


def method_of_hops(hops: int) -> int:
    """Return the method with which a greeting says through how many proxies it has come."""
    return _FIRST_HOP + min(hops, _MOST_HOPS)


def hops_in(offered: frozenset[int]) -> int:
    """Return what such a method says; 0 without one."""
    return max((method - _FIRST_HOP for method in offered if 0 < method - _FIRST_HOP <= _MOST_HOPS), default=0)


def password(user: bytes, password: bytes) -> bytes:
    """Return user name and password, 1 to 255 bytes each (RFC 1929)."""
    return b"%c%c%b%c%b" % (AUTHENTICATION_VERSION, len(user), user, len(password), password)


def connect_request(target: Target) -> bytes:
    """Return a request for a connection."""
    head = bytes((VERSION, Command.CONNECT, 0))
    if target.ip is not None:
        return head + _address_bytes(target.ip, target.port)
    name = target.host.encode()
    return head + bytes((AddressType.NAME, len(name))) + name + target.port.to_bytes(2, "big")


# -- UDP (RFC 1928 section 7) ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Datagram:
    target: Target
    data: bytes


def parse_datagram(packet: bytes) -> Datagram | None:
    """Return what a client wants to send; None for a fragment, which is dropped as the RFC allows.

    Raises:
        ProtocolError: it must be dropped, too: there is no answer to a datagram.
    """
    if len(packet) < 5 or packet[:2] != b"\0\0":
        raise ProtocolError("not a SOCKS datagram")
    if packet[2]:
        return None
    found = _parse_address(packet, 3)
    if found is None:
        raise ProtocolError("the datagram's header is cut off")
    host, port, end = found
    try:
        return Datagram(make_target(host, port), packet[end:])
    except BadTarget as error:
        raise ProtocolError(str(error)) from None


def datagram(ip: IPAddress, port: int, data: bytes) -> bytes:
    """Return a datagram from an address, for the client."""
    return b"\0\0\0" + _address_bytes(ip, port) + data


# -- errors ------------------------------------------------------------------------------------------------------------

_REPLY_OF_ERRNO = {
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EAFNOSUPPORT: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Reply.HOST_UNREACHABLE,
    # RFC 1928 has no reply for a timeout. Not TTL_EXPIRED: only routers report that.
    errno.ETIMEDOUT: Reply.HOST_UNREACHABLE,
    TTL_EXPIRED: Reply.TTL_EXPIRED,
    errno.EACCES: Reply.NOT_ALLOWED,  # a local firewall
    errno.EPERM: Reply.NOT_ALLOWED,
    errno.EDQUOT: Reply.NOT_ALLOWED,  # a user's quota of bytes
}


def reply_of(error: OSError) -> Reply:
    """Return the reply code for a failure to connect."""
    if isinstance(error, (socket.gaierror, TimeoutError)):
        return Reply.HOST_UNREACHABLE
    return _REPLY_OF_ERRNO.get(error.errno or 0, Reply.GENERAL_FAILURE)
