"""connect: open a Connection to another server."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from typing import Any

import gevent
import gevent.socket

from gtcpserver.address import parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.process.event_loop import check_event_loop
from gtcpserver.signatures import ConnectionT

from .connection import Connection

#: Addresses tried per host name, of both families if it has both. The owner of the name decides how many there are:
#: some thousand fit into one answer of a name server, and each may be silent. Large sites have 2 to 8.
MOST_ADDRESSES = 8

#: Seconds until a Unix socket whose queue is full is tried again.
FULL_PAUSE = 0.01


def connect(
    address: str | tuple[Any, ...],
    timeout: float | None = None,
    *,
    source_address: tuple[str, int] | None = None,
    connection_class: type[ConnectionT] = Connection,  # type: ignore[assignment]
) -> ConnectionT:
    """Connect and return the kind of socket that a handler gets, such as an upstream for :func:`relay`.

    Args:
        address: "host:port", "[IPv6]:port", "unix:/path", "unix:@name", or a tuple (host, port). A host name's
            addresses are tried in the order the resolver gives them (RFC 6724), one after the other; at most 8.
        timeout: seconds for the whole call, including the name look-up; None waits as long as the system does. It
            applies to this call only: the connection has no timeout until ``settimeout`` sets one.
        source_address: (host, port) to connect from.
        connection_class: Connection or a class derived from it.

    Returns:
        The connection, with TCP_NODELAY set. The caller closes it.

    Raises:
        ConfigError: not an address to connect to.
        TimeoutError: not connected within ``timeout``.
        OSError: from the last address tried; socket.gaierror: no such host.

    Example::

        from gtcpserver import connect, relay

        def handle(conn):
            with connect("10.0.0.5:7000", timeout=5) as backend:
                relay(conn, backend)
    """
    check_event_loop()
    parsed = parse_address(address)
    if parsed.kind == "fd" or parsed.host == "*" or (parsed.kind == "tcp" and not parsed.port):
        raise ConfigError(f'address to connect to must be "host:port" or "unix:/path", got {address!r}')
    with gevent.Timeout(timeout, TimeoutError(f"not connected to {parsed} within {timeout} seconds")):
        if parsed.kind == "unix":
            path = "\0" + parsed.path[1:] if parsed.path.startswith("@") else parsed.path
            return _connect(connection_class, socket.AF_UNIX, path, None)
        failed: OSError | None = None
        for family, sockaddr in _resolve(parsed.host, parsed.port):
            try:
                return _connect(connection_class, family, sockaddr, source_address)
            except TimeoutError as error:
                if error.errno is None:  # ours, not the system's ETIMEDOUT
                    raise
                failed = error
            except OSError as error:
                failed = error
        try:
            raise failed or OSError(f"no address found for {parsed.host}")
        finally:
            del failed  # its traceback has this frame: a cycle


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    # A literal address needs no look-up, which gevent does in a thread (0.1 ms). One with a zone does: "fe80::1%eth0".
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    found = gevent.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return _some([(family, sockaddr) for family, _, _, _, sockaddr in found])


def _some(found: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return at most MOST_ADDRESSES of them in the same order: the first ones of each family."""
    found = list(dict.fromkeys(found))
    seen: Counter[int] = Counter()
    ranks = []
    for place, (family, _) in enumerate(found):
        ranks.append((seen[family], place))
        seen[family] += 1
    return [found[place] for place in sorted(place for _, place in sorted(ranks)[:MOST_ADDRESSES])]


def _connect(
    connection_class: type[ConnectionT], family: int, sockaddr: Any, source_address: tuple[str, int] | None
) -> ConnectionT:
    connection = connection_class(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(None)
        if family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source_address is not None:
                connection.bind(source_address)
            connection.connect(sockaddr)
        else:
            _connect_unix(connection, sockaddr)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_unix(connection: Connection, path: str) -> None:
    # While the queue of the listening socket is full, connect(2) fails with EAGAIN, and poll(2) says that the socket is
    # ready: gevent's connect() would try again without a pause.
    while True:
        error = connection.stream.sock.connect_ex(path)
        if error != errno.EAGAIN:
            break
        gevent.sleep(FULL_PAUSE)
    if error:
        raise OSError(error, os.strerror(error))
