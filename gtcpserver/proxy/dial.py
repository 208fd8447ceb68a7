"""Connect to the first of several addresses that answers: happy eyeballs (RFC 8305)."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any

import gevent
from gevent.queue import SimpleQueue

from ..connection import Connection
from ..errors import DeadlineExceeded
from .target import IPAddress

#: Seconds until the next address is tried beside the one that has not answered yet (RFC 8305 section 5: 250 ms).
STAGGER = 0.25

# linux/in.h; Python's socket module does not have it.
IP_BIND_ADDRESS_NO_PORT = 24
TCP_FASTOPEN_CONNECT = 30


def dial(
    addresses: Sequence[IPAddress],
    port: int,
    *,
    timeout: float,
    source: Callable[[IPAddress], IPAddress | None] = lambda ip: None,
    fast_open: bool = False,
) -> tuple[Connection, IPAddress]:
    """Connect to the first address that accepts.

    Each next one is tried when the one before has failed, or 250 ms later.

    Args:
        addresses: at least one, in the order of preference; all of them may be connected to.
        timeout: seconds for all of it.
        source: gives the address to come from, for each destination; None: the system's choice.
        fast_open: where the other side has given us a cookie before, connect with the first data that is written (TCP
            Fast Open): whether it accepts is known only then.

    Returns:
        The connection, with TCP_NODELAY and keep-alive, and the address it leads to. The caller closes it.

    Raises:
        TimeoutError: not connected in time.
        OSError: of the first address that failed.
    """

    def connect(ip: IPAddress) -> Connection:
        return _connect(ip, port, source(ip), fast_open)

    if len(addresses) == 1:
        ip = addresses[0]
        return _connect(ip, port, source(ip), fast_open, timeout), ip
    with gevent.Timeout(timeout, TimeoutError(f"not connected within {timeout:g} seconds")):
        return _race(addresses, connect)


def _race(addresses: Sequence[IPAddress], connect: Callable[[IPAddress], Connection]) -> tuple[Connection, IPAddress]:
    ended: SimpleQueue[Any] = SimpleQueue()

    def attempt(ip: IPAddress) -> None:
        try:
            connection = connect(ip)
        except OSError as error:
            ended.put((None, ip, error))
        else:
            ended.put((connection, ip, None))

    waiting = list(addresses)
    running: list[Any] = []
    errors: dict[IPAddress, OSError] = {}
    won: Connection | None = None
    try:
        while waiting or len(errors) < len(running):
            if waiting:
                running.append(gevent.spawn(attempt, waiting.pop(0)))
            try:
                connection, ip, error = ended.get(timeout=STAGGER if waiting else None)
            except gevent.queue.Empty:
                continue
            if connection is not None:
                won = connection
                return connection, ip
            errors[ip] = error
    finally:
        gevent.killall(running, block=False)
        # One that connected as well, at the same moment.
        while not ended.empty():
            connection = ended.get()[0]
            if connection is not None and connection is not won:
                connection.close()
    raise errors[next(ip for ip in addresses if ip in errors)]


def _connect(
    ip: IPAddress, port: int, source: IPAddress | None, fast_open: bool, timeout: float | None = None
) -> Connection:
    # Hot: once a connection. By the socket beneath, and not by gevent's methods: 20 us and 3 system calls less.
    family = socket.AF_INET6 if isinstance(ip, IPv6Address) else socket.AF_INET
    connection = Connection(family, socket.SOCK_STREAM)
    sock = connection._sock
    try:
        connection.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if source is not None:
            # The port is chosen when the destination is known: 28,000 connections to each, and not in all (ip(7)).
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((str(source), 0))
        if fast_open:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        error = sock.connect_ex((socket.inet_ntop(family, ip.packed), port))  # str(ip) takes 1 us longer
        if error == errno.EINPROGRESS:
            if timeout is None:
                connection._stream.wait_writable()
            else:
                with connection.deadline(timeout):
                    connection._stream.wait_writable()
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))  # which makes a ConnectionRefusedError of ECONNREFUSED
    except DeadlineExceeded:
        connection.close()
        raise TimeoutError(f"not connected within {timeout:g} seconds") from None
    except BaseException:
        connection.close()
        raise
    return connection


def is_of_this_host(ip: IPAddress) -> bool:
    """Whether an address is one of ours: the way to it then begins there. 20 us."""
    family = socket.AF_INET6 if isinstance(ip, IPv6Address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(ip), 9))  # sends nothing
        except OSError:
            return False
        return bool(ip_address(probe.getsockname()[0].partition("%")[0]) == ip)
