"""Ask another proxy for a connection: the client's side of SOCKS5, SOCKS4, SOCKS4a and HTTP's CONNECT.

Each function writes a request to a connection and reads the answer. What goes wrong is an UpstreamError whose message
says what the other proxy did; EarlyEOF, LimitExceeded and ConnectionError are left to the caller.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from gtcpserver.connection.connection import Connection
from gtcpserver.http1.head import Header

from . import socks4, socks5
from .errors import TTL_EXPIRED, UpstreamError
from .target import Target

#: Bytes of the head of an answer to CONNECT, interim answers before it included.
LONGEST_HEAD = 16 * 1024


def greet_socks5(connection: Connection, user: bytes, password: bytes, hops: int = 0) -> None:
    """Agree on a method, and log in (RFC 1928, RFC 1929). Raise UpstreamError.

    Args:
        user: our name there; b"": none.
        hops: number of proxies on the way so far, to tell the next one; 0: they are not counted.
    """
    methods = (socks5.Method.NONE, socks5.Method.PASSWORD) if user else (socks5.Method.NONE,)
    connection.sendall(socks5.greeting([*methods, socks5.method_of_hops(hops)] if hops else methods))
    version, method = connection.recv_exactly(2)
    if version != socks5.VERSION:
        raise UpstreamError(errno.EIO, "does not speak SOCKS5")
    if method == socks5.Method.PASSWORD and user:
        connection.sendall(socks5.password(user, password))
        if connection.recv_exactly(2)[1]:
            raise UpstreamError(errno.EIO, "does not accept our name and password")
    elif method != socks5.Method.NONE:
        raise UpstreamError(errno.EIO, "wants another way to say who we are")


def ask_socks5(connection: Connection, target: Target) -> None:
    """Have a proxy that was greeted connect to a target. Raise UpstreamError."""
    connection.sendall(socks5.connect_request(target))
    version, code, _, kind = connection.recv_exactly(4)
    if version != socks5.VERSION:
        raise UpstreamError(errno.EIO, "does not speak SOCKS5")
    if code:
        raise UpstreamError(_ERRNO_OF_REPLY.get(code, errno.EIO), f"says: {_name_of(socks5.Reply, code)}")
    size = {1: 4, 4: 16}.get(kind)
    connection.recv_exactly((connection.recv_exactly(1)[0] if size is None else size) + 2)


def ask_socks4(connection: Connection, target: Target, user: bytes, hops: int = 0) -> None:
    """Have a SOCKS4 proxy connect to an IPv4 address, or a SOCKS4a proxy to a name. Raise UpstreamError.

    Args:
        user: our user ID there, which is not proved.
        hops: as above; told in place of a user ID, if there is none.
    """
    try:
        request = socks4.connect_request(target, user or socks4.user_of_hops(hops))
    except ValueError as error:
        raise UpstreamError(errno.ENETUNREACH, f"cannot be asked: {error}") from None
    connection.sendall(request)
    version, code, *_ = connection.recv_exactly(8)
    if version:  # of the reply: 0
        raise UpstreamError(errno.EIO, "does not speak SOCKS4")
    if code != socks4.Reply.GRANTED:
        raise UpstreamError(errno.EIO, f"says: {_name_of(socks4.Reply, code)}")


def ask_http(connection: Connection, target: Target, headers: Sequence[Header]) -> None:
    """Have an HTTP proxy connect to a target (CONNECT, RFC 9110 section 9.3.6). Raise UpstreamError.

    Args:
        headers: fields beside Host.
    """
    authority = str(target).encode()
    fields = b"".join(b"%b: %b\r\n" % header for header in headers)
    connection.sendall(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (authority, authority, fields))
    # Interim answers may come first.
    room = LONGEST_HEAD
    while True:
        head = connection.recv_until(b"\r\n\r\n", room)
        room -= len(head)
        status = _status_of(head)
        if status is None:
            raise UpstreamError(errno.EIO, "does not speak HTTP")
        if 200 <= status < 300:
            return
        if status >= 200:
            raise UpstreamError(_ERRNO_OF_STATUS.get(status, errno.EIO), f"answers {status}")


_ERRNO_OF_REPLY: dict[int, int] = {
    socks5.Reply.NOT_ALLOWED: errno.EACCES,
    socks5.Reply.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    socks5.Reply.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    socks5.Reply.CONNECTION_REFUSED: errno.ECONNREFUSED,
    socks5.Reply.TTL_EXPIRED: TTL_EXPIRED,
}

_ERRNO_OF_STATUS = {403: errno.EACCES, 502: errno.EHOSTUNREACH, 503: errno.EHOSTUNREACH, 504: errno.ETIMEDOUT}


def _name_of(kind: type[socks4.Reply] | type[socks5.Reply], code: int) -> str:
    try:
        return kind(code).name.lower().replace("_", " ")
    except ValueError:
        return f"reply {code}"


def _status_of(head: bytes) -> int | None:
    # As lenient as about the answers of origins (http_origin).
    found = re.match(rb"(?i)HTTP/(?:1\.[0-9]|[2-9](?:\.[0-9])?) ([1-5][0-9][0-9])[ \r]", head)
    return None if found is None else int(found[1])
