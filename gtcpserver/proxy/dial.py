"""Connect to the first of several addresses that answers: happy eyeballs (RFC 8305).

How many addresses a name has, and whether they answer, may be an attacker's choice: a few are tried (resolve), fewer at
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

from gtcpserver.connection.connection import Connection
from gtcpserver.errors import DeadlineExceeded
from gtcpserver.listening.config import ListenConfig

from .errors import TTL_EXPIRED, LimitReached
from .limits import Attempts
from .target import IPAddress

#: Seconds until the next address is tried beside the one that has not answered yet (RFC 8305 section 5: 250 ms).
STAGGER = 0.25

#: Attempts at once to reach one destination. Browsers, curl and Go have two, one of each family; with four, three
#: addresses that are silent cost less than a second.
MOST_AT_ONCE = 4

# linux/in.h, in6.h, tcp.h and errqueue.h; Python's socket module does not have them.
IP_BIND_ADDRESS_NO_PORT = 24
IPV6_RECVERR = 25
TCP_FASTOPEN_CONNECT = 30
SO_EE_ORIGIN_ICMP = 2
SO_EE_ORIGIN_ICMP6 = 3

#: Of struct sock_extended_err (ip(7)): who says it, and of which type that is: ICMP's and ICMPv6's "time exceeded".
_TIME_EXCEEDED = (bytes((SO_EE_ORIGIN_ICMP, 11)), bytes((SO_EE_ORIGIN_ICMP6, 3)))

# A destination whose host has vanished is noticed as soon as a client whose host has.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ListenConfig.keepalive_idle),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ListenConfig.keepalive_interval),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ListenConfig.keepalive_count),
)


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

    Each next one is tried when the one before has failed, or 250 ms later; no more than MOST_AT_ONCE at the same time.
    Where there are more addresses than that, each has its share of the time: the last ones have their turn, too.

    Args:
        addresses: at least one, in the order of preference; all of them may be connected to.
        timeout: seconds for all of it.
        source: gives the address to come from, for each destination; None: the system's choice.
        fast_open: where the other side has given us a cookie before, connect with the first data that is written (TCP
            Fast Open): whether it accepts is known only then.
        attempts: counts them, and refuses those beyond a limit; None: there is none.

    Returns:
        The connection, with TCP_NODELAY and the keep-alive of clients (ListenConfig), and the address it leads to. The
        caller closes it.

    Raises:
        TimeoutError: not connected in time.
        LimitReached: not a single attempt may be made now.
        OSError: of the first address that failed; `errors.TTL_EXPIRED` where a router has said so.
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

    def connect(ip: IPAddress) -> Connection:
        return _connect(ip, port, source(ip), fast_open, share)

    with gevent.Timeout(timeout, TimeoutError(f"not connected within {timeout:g} seconds")):
        return _race(addresses, connect, attempts)


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
                    # Those under way may do; there may be room later.
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
        # Not by the greenlets: of one that is killed before it has begun to run nothing runs.
        if attempts is not None:
            for _ in range(under_way):
                attempts.end()
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
    sock = connection.stream.sock
    try:
        connection.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if source is not None:
            # The port is chosen when the destination is known: 28,000 connections to each, and not in all (ip(7)).
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((str(source), 0))
        if family == socket.AF_INET6:
            # Without it the system forgets what routers have said; of IPv4 it keeps it in any case.
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
        if family == socket.AF_INET6:
            # With it what a router says would end a connection that is established, and may get over it (RFC 5461).
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 0)
    except DeadlineExceeded:
        connection.close()
        raise TimeoutError(f"not connected within {timeout:g} seconds") from None
    except BaseException:
        connection.close()
        raise
    return connection


def keep_alive(sock: Any) -> None:
    """Have a connection probed as those of clients are; one that a listening socket accepts is as that is."""
    for level, option, value in _KEEP_ALIVE:
        sock.setsockopt(level, option, value)


def _has_expired(sock: Any) -> bool:
    """Whether it was ICMP's "time exceeded" that has ended an attempt to connect (ip(7), IP_RECVERR)."""
    try:
        messages = sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)[1]
    except OSError:
        return False  # the system has found it out by itself
    return any(data[4:6] in _TIME_EXCEEDED for _, _, data in messages)


def way_out(ip: IPAddress) -> IPAddress:
    """The address from which the system connects to another one. 20 us. Raises OSError: there is no way to it."""
    family = socket.AF_INET6 if isinstance(ip, IPv6Address) else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((str(ip), 9))  # of a UDP socket it sends nothing
        return ip_address(probe.getsockname()[0].partition("%")[0])
