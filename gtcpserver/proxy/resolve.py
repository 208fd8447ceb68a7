"""Resolver: host names to addresses, without one slow name server holding up everybody.

Look-ups are the system's own (getaddrinfo(3)), so that /etc/hosts, search domains and whatever else the operator has
set up count. They run in native threads of their own: gevent's default pool has 10 for everything, and names whose
server does not answer (5 s and more each) fill it at once. Clients that ask for the same name share one look-up.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Any, Literal, get_args

from gevent import monkey
from gevent.threadpool import ThreadPool

from ..errors import ConfigError
from ..options import check_number
from .target import IPAddress, unmapped

Family = Literal["any", "ipv4", "ipv6", "prefer-ipv4"]

_getaddrinfo: Any = monkey.get_original("socket", "getaddrinfo")

#: Look-ups at once. A thread costs some 100 KiB; names that are not cached are few even in a busy proxy.
THREADS = 32

#: getaddrinfo does not tell how long an answer holds. So long we believe it, seconds: what browsers do (Chromium: 60).
KEEP = 60.0
KEEP_FAILURE = 5.0

#: Names remembered; beyond it the one longest not asked for is forgotten. 200 bytes each.
MOST_NAMES = 10_000


@dataclass(slots=True)
class _Answer:
    found: tuple[IPAddress, ...]
    error: socket.gaierror | None
    until: float


class Resolver:
    """Finds the addresses of names.

    Args:
        family: "any" interleaves IPv6 and IPv4, IPv6 first (RFC 8305 section 4); "prefer-ipv4" the other way round;
            "ipv4" and "ipv6" know no others.
        timeout: seconds a client waits for a look-up; the look-up goes on and serves the next one.

    Raises:
        ConfigError: an option that cannot work.
    """

    def __init__(self, family: Family = "any", timeout: float = 10.0) -> None:
        if family not in get_args(Family):
            raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, got {family!r}")
        check_number("timeout", timeout, above=0)
        self._family = family
        self._timeout = timeout
        self._known: OrderedDict[str, _Answer] = OrderedDict()
        self._under_way: dict[str, Any] = {}
        self._threads: ThreadPool | None = None

    def resolve(self, name: str) -> tuple[IPAddress, ...]:
        """The addresses of a name, in the order in which they should be tried.

        Raises:
            socket.gaierror: there are none, or the name server failed.
            TimeoutError: no answer in time.
        """
        answer = self._known.get(name)
        if answer is not None and answer.until > monotonic():
            self._known.move_to_end(name)
        else:
            answer = self._ask(name)
        if answer.error is not None:
            raise answer.error
        return answer.found

    def _ask(self, name: str) -> _Answer:
        asked = self._under_way.get(name)
        if asked is None:
            if self._threads is None:
                self._threads = ThreadPool(THREADS)
            asked = self._under_way[name] = self._threads.spawn(_look_up, name)
            asked.rawlink(lambda result: self._note(name, result))
        asked.wait(self._timeout)
        if not asked.ready():
            raise TimeoutError(f"no answer about {name} within {self._timeout:g} seconds")
        return self._answer(asked)

    def _note(self, name: str, result: Any) -> None:
        self._under_way.pop(name, None)
        self._known[name] = self._answer(result)
        self._known.move_to_end(name)
        while len(self._known) > MOST_NAMES:
            self._known.popitem(last=False)

    def _answer(self, result: Any) -> _Answer:
        now = monotonic()
        if isinstance(result.exception, socket.gaierror):
            return _Answer((), result.exception, now + KEEP_FAILURE)
        if result.exception is not None:  # UnicodeError: no name that DNS has
            error = socket.gaierror(socket.EAI_NONAME, str(result.exception))
            return _Answer((), error, now + KEEP_FAILURE)
        found = in_order(result.value, self._family)
        if not found:
            none = socket.gaierror(socket.EAI_NONAME, f"no {self._family} address")
            return _Answer((), none, now + KEEP_FAILURE)
        return _Answer(found, None, now + KEEP)

    def close(self) -> None:
        """End the threads, when the look-ups under way have ended."""
        if self._threads is not None:
            self._threads.kill()
            self._threads = None


def _look_up(name: str) -> list[IPAddress]:
    # In a native thread.
    return [
        ip_address(sockaddr[0].split("%")[0])
        for _, _, _, _, sockaddr in _getaddrinfo(name, None, 0, socket.SOCK_STREAM)
    ]


def in_order(found: Sequence[IPAddress], family: Family) -> tuple[IPAddress, ...]:
    """Addresses in the order in which they should be tried: one family after the other, in turn."""
    known = dict.fromkeys(map(unmapped, found))
    v4: list[IPAddress] = [ip for ip in known if isinstance(ip, IPv4Address)] if family != "ipv6" else []
    v6: list[IPAddress] = [ip for ip in known if isinstance(ip, IPv6Address)] if family != "ipv4" else []
    first, second = (v4, v6) if family == "prefer-ipv4" else (v6, v4)
    ordered: list[IPAddress] = []
    for place in range(max(len(first), len(second))):
        ordered += first[place : place + 1] + second[place : place + 1]
    return tuple(ordered)
