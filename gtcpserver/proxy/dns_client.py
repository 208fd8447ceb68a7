"""Ask name servers for the addresses of names: a stub resolver (RFC 1034 section 5.3.1) with gevent's sockets.

Each question has a socket, and so a port, and an ID of its own, both unpredictable (RFC 5452 section 9.2); the socket
is connected, so that the kernel drops what other addresses send. Questions have no EDNS: answers over UDP have up to
512 bytes and are not fragmented, longer ones come over TCP.
"""

from __future__ import annotations

import errno
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
import gevent.socket

from gtcpserver.errors import CAPACITY_ERRNOS
from gtcpserver.process.forked import close_in_children

from .dns_message import (
    LARGEST_ANSWER,
    NOERROR,
    NXDOMAIN,
    BadMessage,
    OtherMessage,
    RecordType,
    Reply,
    question,
    read_reply,
)
from .name_files import ResolvConf

#: Messages that are not the answer, after which a question is repeated over TCP: somebody guesses its ID.
MOST_WRONG = 8

#: Questions without an answer after which a server is asked last, until it answers again.
MOST_MISSED = 3

#: This host lacks a resource: no fault of a name server, and the next question may succeed.
_LOCAL = CAPACITY_ERRNOS | {errno.EAGAIN, errno.EADDRNOTAVAIL}


class NoReply(TimeoutError):
    """No name server answered in time."""


class ServersFailed(OSError):
    """Each name server failed, or refused to answer."""


class NameServers:
    """The name servers of this host.

    Args:
        conf: returns the current resolv.conf.
        timeout: seconds for one question, over all servers and attempts.
        servers: the servers to ask, as for ``socket.connect``; (): those of `conf`.
    """

    def __init__(self, conf: Callable[[], ResolvConf], timeout: float, servers: Sequence[Any] = ()) -> None:
        self._conf = conf
        self._timeout = timeout
        self._servers = tuple(servers)
        self._missed: Counter[Any] = Counter()  # answers in a row

    def ask(self, name: str, kind: RecordType) -> Reply:
        """Ask for addresses of a name; the reply is positive, NXDOMAIN or without addresses.

        Raises:
            NoReply: no server answered in time.
            ServersFailed: each of them failed.
            OSError: this host lacks a resource.
        """
        conf = self._conf()
        until = monotonic() + self._timeout
        servers = self._servers or conf.servers
        waiting = sorted(servers, key=lambda server: self._missed[server] >= MOST_MISSED)
        why = "no name server"
        for attempt in range(conf.attempts):
            for server in tuple(waiting):
                seconds = min(conf.timeout * 2**attempt, until - monotonic())
                if seconds <= 0:
                    raise NoReply(f"no answer about {name}")
                try:
                    reply = self._ask(server, question(name, kind, secrets.randbits(16)), seconds, conf.by_tcp)
                except TimeoutError:
                    self._missed[server] += 1
                    continue
                except (OSError, BadMessage) as error:
                    if isinstance(error, OSError) and error.errno in _LOCAL:
                        raise
                    why = str(error)
                else:
                    del self._missed[server]
                    if reply.code in (NOERROR, NXDOMAIN):
                        return reply
                    why = f"response code {reply.code}"
                waiting.remove(server)  # it would say the same again
        if waiting:
            raise NoReply(f"no answer about {name}")
        raise ServersFailed(errno.EIO, why)

    def _ask(self, server: Any, asked: bytes, seconds: float, by_tcp: bool) -> Reply:
        until = monotonic() + seconds
        reply = None if by_tcp else _by_udp(server, asked, seconds)
        if reply is None or reply.truncated:
            reply = _by_tcp(server, asked, until - monotonic())
        if reply.truncated:
            raise BadMessage("truncated over TCP")
        return reply


def _by_udp(server: Any, asked: bytes, seconds: float) -> Reply | None:
    """Return the reply; None: somebody guesses, and TCP is safer."""
    until = monotonic() + seconds
    with _socket(server, socket.SOCK_DGRAM) as sock:
        sock.settimeout(seconds)
        sock.connect(server)
        sock.send(asked)
        for _ in range(MOST_WRONG):
            left = until - monotonic()
            if left <= 0:
                raise TimeoutError
            sock.settimeout(left)
            try:
                return read_reply(asked, sock.recv(LARGEST_ANSWER + 1))
            except OtherMessage:
                continue
    return None


def _by_tcp(server: Any, asked: bytes, seconds: float) -> Reply:
    with gevent.Timeout(max(seconds, 0.001), TimeoutError()), _socket(server, socket.SOCK_STREAM) as sock:
        sock.connect(server)
        sock.sendall(len(asked).to_bytes(2, "big") + asked)
        size = int.from_bytes(_exactly(sock, 2), "big")
        if size > LARGEST_ANSWER:
            raise BadMessage(f"answer of {size} bytes, more than {LARGEST_ANSWER}")
        return read_reply(asked, _exactly(sock, size))


def _socket(server: Any, kind: int) -> Any:
    # The zone of an IPv6 address makes a tuple of four.
    sock = gevent.socket.socket(socket.AF_INET6 if ":" in server[0] else socket.AF_INET, kind)
    close_in_children(sock)
    return sock


def _exactly(sock: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise BadMessage("answer cut short")
        data += more
    return data
