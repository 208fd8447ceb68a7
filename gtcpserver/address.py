"""Parse and print endpoints: "127.0.0.1:5000", "[::1]:443", "*:80", "unix:/run/x.sock", "unix:@name", "fd:3".

A port without a host is on LOOPBACK: a service is only open to the network if that was written.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from .errors import ConfigError

#: Bytes: sockaddr_un.sun_path holds 108 with the closing NUL, or with an abstract name's leading one; unix(7).
MAX_UNIX_PATH = 107

#: Characters of a host name as text, RFC 1035 section 2.3.4 less the length bytes of the wire form.
MAX_HOST_NAME = 253

EXPECTED = '"host:port", "[IPv6]:port", "*:port", "unix:/path", "unix:@name" or "fd:number"'

#: Not "localhost", which may have two addresses, for which port 0 would become two ports.
LOOPBACK = "127.0.0.1"


#: Result of ``accept``, ``getsockname`` and ``getpeername``: IPv4's (host, port), IPv6's (host, port, flow info, scope
#: id), or the path of a Unix socket. (Abstract names, which are rare, are bytes.)
SocketAddress = tuple[str, int] | tuple[str, int, int, int] | str


@dataclass(frozen=True, slots=True)
class Address:
    """A listening address. Created by `parse_address`, which checks it; `str` prints a form that `parse_address` reads.

    Attributes:
        kind: which of the other fields count: "tcp" (host, port), "unix" (path) or "fd" (fd).
        host: an IPv4 or IPv6 address (with "%scope" where it has one), a host name, or "*" for every address.
        port: 0 to 65535; 0 lets the kernel choose.
        path: a unix socket's path, or "@name" for an abstract one.
        fd: the number of an inherited file descriptor.

    Example::

        from gtcpserver import parse_address

        address = parse_address("[::1]:5000")
        print(address.host, address.port)  # ::1 5000
        print(address)  # [::1]:5000
    """

    kind: Literal["tcp", "unix", "fd"]
    host: str = ""
    port: int = 0
    path: str = ""
    fd: int = -1

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.fd}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


#: An address for Server to listen on, or a list of these.
ListenAddress = str | int | tuple[str, int] | tuple[str, int, int] | tuple[str, int, int, int] | Address | socket.socket


def parse_address(address: str | int | tuple[Any, ...]) -> Address:
    """Parse an address.

    Args:
        address: text in one of the forms above (":80" is ``"*:80"``); a port, as text or number, on 127.0.0.1; or a
            tuple (host, port) or (host, port, flow info, scope id) as `socket.getsockname` gives it.

    Raises:
        ConfigError: it is none of these; the message says what was given and what was expected.

    Example::

        from gtcpserver import parse_address

        print(parse_address(":80"))  # *:80
        print(parse_address("unix:/run/app.sock").path)  # /run/app.sock
    """
    if isinstance(address, str):
        return _parse_text(address)
    if isinstance(address, int) and not isinstance(address, bool):
        return Address("tcp", LOOPBACK, _check_port(address, address))
    if isinstance(address, tuple):
        return _parse_tuple(address)
    raise ConfigError(f"address must be {EXPECTED}, a port number or a tuple (host, port), got {address!r}")


def check_none_twice(addresses: Iterable[Any]) -> None:
    """Raise ConfigError if an address is given twice, or two are the same by RFC 6761: localhost is 127.0.0.1, ::1.

    What is the same only by a name's addresses, or as a part of "*", fails when it is bound.

    Args:
        addresses: as `parse_address` takes them, or sockets.
    """
    given: dict[Any, Any] = {}
    for one in addresses:
        address = one if isinstance(one, Address) or hasattr(one, "getsockname") else parse_address(one)
        keys = [address]
        if isinstance(address, Address) and address.kind == "tcp":
            if address.port == 0:
                continue
            if address.host.lower() == "localhost":
                keys = [replace(address, host=host) for host in ("127.0.0.1", "::1")]
        for key in keys:
            if key in given:
                first = given[key]
                same = "twice" if str(first) == str(one) else f'twice, the other time as "{first}"'
                raise ConfigError(f'address "{one}" is given {same}')
        given |= dict.fromkeys(keys, one)


def format_sockaddr(sockaddr: Any, family: int) -> str:
    """Return a result of `getsockname` or `getpeername` in the form that `parse_address` reads.

    An IPv4 peer of a dual-stack socket ("::ffff:192.0.2.1", RFC 4291 section 2.5.5.2) is printed as the IPv4 address
    it is; a unix socket without a name, as most clients' are, as "unix:".
    """
    if family == socket.AF_INET:
        return f"{sockaddr[0]}:{sockaddr[1]}"
    if family == socket.AF_INET6:
        host, port = sockaddr[0], sockaddr[1]
        if host.startswith("::ffff:") and "." in host:
            return f"{host[7:]}:{port}"
        if len(sockaddr) > 3 and sockaddr[3]:
            host = _with_scope(host, sockaddr[3])
        return f"[{host}]:{port}"
    if family == socket.AF_UNIX:
        if isinstance(sockaddr, bytes):
            sockaddr = os.fsdecode(sockaddr)
        return f"unix:@{sockaddr[1:]}" if sockaddr.startswith("\0") else f"unix:{sockaddr}"
    return str(sockaddr)


def _parse_text(text: str) -> Address:
    if text.startswith("unix:"):
        return Address("unix", path=_check_path(text[5:], text))
    if text.startswith("fd:"):
        number = text[3:]
        # Nine digits: a descriptor is a C int, and "fs.nr_open" stays far below that.
        if not (number.isascii() and number.isdigit() and len(number) <= 9):
            raise ConfigError(f'address "fd:number" needs a file descriptor, 0 or more, got {text!r}')
        return Address("fd", fd=int(number))
    if text.isascii() and text.isdigit():
        return Address("tcp", LOOPBACK, _check_port(text, text))
    scheme, is_url, rest = text.partition("://")
    if is_url and scheme.isalnum():
        plain = rest.partition("/")[0] or "host:port"
        raise ConfigError(f"address is written without a scheme: {plain!r}, got {text!r}")
    if text.startswith("["):
        host, bracket, port = text[1:].rpartition("]:")
        if not bracket:
            raise ConfigError(f'address must be "[IPv6]:port", got {text!r}')
        return Address("tcp", _check_ipv6(host, text), _check_port(port, text))
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ConfigError(f"address must be {EXPECTED}, got {text!r}")
    if ":" in host:
        raise ConfigError(f'an IPv6 address needs brackets, "[::1]:5000", got {text!r}')
    return Address("tcp", _check_host(host, text), _check_port(port, text))


def _parse_tuple(given: tuple[Any, ...]) -> Address:
    if len(given) not in (2, 4) or not isinstance(given[0], str) or any(type(n) is not int for n in given[1:]):
        raise ConfigError(f"address must be (host, port) or (host, port, flow info, scope id), got {given!r}")
    host = given[0]
    if len(given) == 4 and given[3] and "%" not in host:
        host = _with_scope(host, given[3])
    host = _check_ipv6(host, given) if ":" in host else _check_host(host, given)
    return Address("tcp", host, _check_port(given[1], given))


def _check_port(port: str | int, given: object) -> int:
    if isinstance(port, str):
        if not (port.isascii() and port.isdigit()):
            raise ConfigError(f"port must be a number from 0 to 65535, got {port!r} in {given!r}")
        # More digits than int() converts since CVE-2020-10735 are out of range too.
        port = int(port) if len(port) < 20 else 1 << 63
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be 0 to 65535, got {given!r}")
    return port


def _check_host(host: str, given: object) -> str:
    if host in ("", "*"):
        return "*"
    if all(character in "0123456789." for character in host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as exc:
            raise ConfigError(f"host must be an IPv4 address of four numbers, got {given!r} ({exc})") from None
    # Characters that no host name has, so that a mistaken URL or path is not taken for a name that does not resolve.
    if len(host) > MAX_HOST_NAME or any(c in "/[]@%*?#\\:\"'" or c.isspace() or not c.isprintable() for c in host):
        raise ConfigError(f"host must be an IP address, a host name or *, got {given!r}")
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigError(f"host must be a name of labels of 1 to 63 characters, got {given!r}") from None
    return host


def _check_ipv6(host: str, given: object) -> str:
    try:
        parsed = ipaddress.IPv6Address(host)
    except ValueError as exc:
        raise ConfigError(f'host must be an IPv6 address like "::1", got {given!r} ({exc})') from None
    scope = parsed.scope_id
    if scope and not (scope.isprintable() and not any(c in "[]/" or c.isspace() for c in scope)):
        raise ConfigError(f"scope must be the name or the number of an interface, got {given!r}")
    return str(parsed)


def _check_path(path: str, given: str) -> str:
    if path in ("", "@") or "\0" in path:
        raise ConfigError(f'address must be "unix:/path" or "unix:@name", got {given!r}')
    try:
        length = len(os.fsencode(path))
    except UnicodeError:
        raise ConfigError(f"path must be encodable in the file system's encoding, got {given!r}") from None
    if length > MAX_UNIX_PATH:
        raise ConfigError(f"a unix socket's path must be at most {MAX_UNIX_PATH} bytes, got {length} in {given!r}")
    return path


def _with_scope(host: str, scope: int) -> str:
    if "%" in host:
        return host
    try:
        return f"{host}%{socket.if_indextoname(scope)}"
    except (OSError, OverflowError):
        return f"{host}%{scope}"
