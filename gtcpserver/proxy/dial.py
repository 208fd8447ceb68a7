"""Connect to the first of several addresses that answers: happy eyeballs (RFC 8305).

An attacker may choose how many addresses a name has, and whether they answer: only a few are tried (resolve), fewer at
the same time, and the limits of the proxy count the attempts.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any

import gevent
from gevent.queue import SimpleQueue

from gtcpserver.connection.connect import connect
from gtcpserver.connection.connection import Connection
from gtcpserver.errors import DeadlineExceeded
from gtcpserver.linux import (
    IP_BIND_ADDRESS_NO_PORT,
    IPV6_RECVERR,
    NO_OPTION,
    TCP_FASTOPEN_CONNECT,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    error_queue,
)
from gtcpserver.listening.config import ListenConfig

from .errors import TTL_EXPIRED, LimitReached
from .limits import Attempts
from .target import IPAddress

#: Seconds until the next address is tried in parallel with one that has not answered (RFC 8305 section 5: 250 ms).
STAGGER = 0.25

#: Simultaneous attempts to reach one destination. Browsers, curl and Go use two, one of each family; with four, three
#: silent addresses cost less than a second.
MOST_AT_ONCE = 4

# linux/errqueue.h.
SO_EE_ORIGIN_ICMP = 2
SO_EE_ORIGIN_ICMP6 = 3

#: Origin and type in struct sock_extended_err (ip(7)): "time exceeded" of ICMP and ICMPv6.
_TIME_EXCEEDED = (bytes((SO_EE_ORIGIN_ICMP, 11)), bytes((SO_EE_ORIGIN_ICMP6, 3)))

# A dead destination host is noticed as soon as a dead client host.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, TCP_KEEPIDLE, ListenConfig.keepalive_idle),
    (socket.IPPROTO_TCP, TCP_KEEPINTVL, ListenConfig.keepalive_interval),
    (socket.IPPROTO_TCP, TCP_KEEPCNT, ListenConfig.keepalive_count),
)


#: Errors of this system: it has no route to the address, or no address of that family.
_NO_WAY = frozenset((errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT))


def dial(
    addresses: Sequence[IPAddress],
    port: int,
    *,
    timeout: float,
    source: Callable[[IPAddress], IPAddress | None] = lambda ip: None,
    fast_open: bool = False,
    attempts: Attempts | None = None,
) -> tuple[Connection, IPAddress]:
    """Connect to the first address that accepts.

    Each next one is tried when the previous one has failed, or after 250 ms; at most MOST_AT_ONCE at the same time. If
    there are more addresses than that, each has its share of the time, so that the last ones get their turn, too.

    Args:
        addresses: at least one, in the order of preference; all of them may be connected to.
        timeout: seconds for everything together.
        source: returns the source address for each destination; None: the system's choice.
        fast_open: if the other side has given us a cookie before, connect with the first data that is written (TCP Fast
            Open): whether it accepts is known only then.
        attempts: counts attempts, and refuses those beyond a limit; None: no limit.

    Returns:
        The connection, with TCP_NODELAY and the keep-alive settings of clients (ListenConfig), and its remote address.
        The caller closes it.

    Raises:
        TimeoutError: not connected in time.
        LimitReached: not a single attempt may be made now.
        OSError: the error that says most about the destination (`_telling`); `errors.TTL_EXPIRED` if a router reported
            so.
    """
    if len(addresses) == 1:
        ip = addresses[0]
        if attempts is None:
            return _connect(ip, port, source(ip), fast_open, timeout), ip
        attempts.begin()
        try:
            return _connect(ip, port, source(ip), fast_open, timeout), ip
        finally:
            attempts.end()
    share = None if len(addresses) <= MOST_AT_ONCE else timeout * MOST_AT_ONCE / len(addresses)

    def connect_one(ip: IPAddress) -> Connection:
        return _connect(ip, port, source(ip), fast_open, share)

    with gevent.Timeout(timeout, TimeoutError(f"not connected within {timeout:g} seconds")):
        return _race(addresses, connect_one, attempts)


def _race(
    addresses: Sequence[IPAddress], connect: Callable[[IPAddress], Connection], attempts: Attempts | None
) -> tuple[Connection, IPAddress]:
    ended: SimpleQueue[Any] = SimpleQueue()

    def attempt(ip: IPAddress) -> None:
        try:
            connection = connect(ip)
        except OSError as error:
            ended.put((None, ip, error))
        else:
            ended.put((connection, ip, None))

    waiting = list(addresses)
    started: list[Any] = []
    under_way = 0
    errors: dict[IPAddress, OSError] = {}
    won: Connection | None = None
    try:
        while waiting or under_way:
            if waiting and under_way < MOST_AT_ONCE:
                try:
                    if attempts is not None:
                        attempts.begin()
                except LimitReached:
                    if not under_way:
                        raise
                    # Attempts in progress may succeed; there may be room later.
                else:
                    under_way += 1
                    started.append(gevent.spawn(attempt, waiting.pop(0)))
            try:
                connection, ip, error = ended.get(timeout=STAGGER if waiting and under_way < MOST_AT_ONCE else None)
            except gevent.queue.Empty:
                continue
            under_way -= 1
            if attempts is not None:
                attempts.end()
            if connection is not None:
                won = connection
                return connection, ip
            errors[ip] = error
    finally:
        gevent.killall(started, block=False)
        # Not in the greenlets: one that is killed before it has started never runs.
        if attempts is not None:
            for _ in range(under_way):
                attempts.end()
        # Another one that connected at the same moment.
        while not ended.empty():
            connection = ended.get()[0]
            if connection is not None and connection is not won:
                connection.close()
    raise min((errors[ip] for ip in addresses if ip in errors), key=_telling)


def _telling(error: OSError) -> int:
    """Rank errors by what they say about a destination; of the same rank the first address counts.

    A host without IPv6 has no way to the IPv6 address of a name: that says nothing about the service, which may refuse
    connections by IPv4.
    """
    if error.errno == errno.ECONNREFUSED:
        return 0
    return 2 if error.errno in _NO_WAY else 1


def _connect(
    ip: IPAddress, port: int, source: IPAddress | None, fast_open: bool, timeout: float | None = None
) -> Connection:
    # Hot: once per connection. Uses the underlying socket, not gevent's methods: 20 us and 3 system calls less.
    family = socket.AF_INET6 if isinstance(ip, IPv6Address) else socket.AF_INET
    connection = Connection(family, socket.SOCK_STREAM)
    sock = connection.stream.sock
    try:
        connection.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if source is not None:
            # Choose the port when the destination is known: 28,000 connections to each, not in total (ip(7)).
            if IP_BIND_ADDRESS_NO_PORT != NO_OPTION:
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((str(source), 0))
        if family == socket.AF_INET6 and IPV6_RECVERR != NO_OPTION:
            # Without it the kernel discards ICMPv6 errors (IPv4 errors are kept anyway).
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        if fast_open:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        error = sock.connect_ex((socket.inet_ntop(family, ip.packed), port))  # str(ip) takes 1 us longer
        if error == errno.EINPROGRESS:
            if timeout is None:
                connection.stream.wait_writable()
            else:
                with connection.deadline(timeout):
                    connection.stream.wait_writable()
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error == errno.EHOSTUNREACH and _has_expired(sock):
            raise OSError(TTL_EXPIRED, "TTL expired in transit")
        if error:
            raise OSError(error, os.strerror(error))  # which makes a ConnectionRefusedError of ECONNREFUSED
        if family == socket.AF_INET6 and IPV6_RECVERR != NO_OPTION:
            # Left on, router errors would end an established connection, which may recover from them (RFC 5461).
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 0)
    except DeadlineExceeded:
        connection.close()
        raise TimeoutError(f"not connected within {timeout:g} seconds") from None
    except BaseException:
        connection.close()
        raise
    return connection


def dial_unix(path: str) -> Connection:
    """Connect to a Unix socket. Raise OSError.

    Args:
        path: an abstract name begins with "@".
    """
    return connect(f"unix:{path}")


def keep_alive(sock: Any) -> None:
    """Enable the same keep-alive probes as for clients; accepted connections inherit theirs from the listener."""
    for level, option, value in _KEEP_ALIVE:
        if option != NO_OPTION:
            sock.setsockopt(level, option, value)


def _has_expired(sock: Any) -> bool:
    """Return whether ICMP's "time exceeded" has ended an attempt to connect (ip(7), IP_RECVERR)."""
    try:
        messages = error_queue(sock)
    except OSError:
        return False  # the system itself detected the error
    return any(data[4:6] in _TIME_EXCEEDED for _, _, data in messages)


def way_out(ip: IPAddress) -> IPAddress:
    """Return the address that the system would connect from. 20 us. Raise OSError: there is no route."""
    family = socket.AF_INET6 if isinstance(ip, IPv6Address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(ip), 9))  # connecting a UDP socket sends nothing
        return ip_address(probe.getsockname()[0].partition("%")[0])
