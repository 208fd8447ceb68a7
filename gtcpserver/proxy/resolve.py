"""Resolver: look up host names without letting one slow name server delay everybody.

Lookups use the system's resolver (getaddrinfo(3)), so that /etc/hosts, search domains and everything else that the
operator has configured apply. They run in native threads of their own: gevent's default pool has 10 for everything, and
names whose server does not answer (5 s and more each) fill it at once. The names of one domain may only use some of the
threads, so that its server does not delay other lookups. Clients that ask for the same name share one lookup, and a
name that no client waits for any more is not looked up. loadtests/bench/resolvers.py measures it; docs/proxy.md has the
figures.
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from time import monotonic
from typing import Any, Literal, get_args

import gevent
from gevent import monkey
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.threadpool import ThreadPool

from gtcpserver.checks import check_number
from gtcpserver.connection.connect import MOST_ADDRESSES
from gtcpserver.errors import ConfigError

from .target import IPAddress, unmapped

Family = Literal["any", "ipv4", "ipv6", "prefer-ipv4"]

_getaddrinfo: Any = monkey.get_original("socket", "getaddrinfo")

#: Simultaneous lookups. Threads are created on demand, and cost 25 KiB and more each.
THREADS = 256

#: How many of these may be for names with the same last two labels: usually one name server that does not answer.
THREADS_OF_A_DOMAIN = 32

#: Seconds to keep a result. getaddrinfo does not return its TTL; browsers do the same (Chromium: 60).
KEEP = 60.0
KEEP_FAILURE = 5.0

#: Names remembered; beyond that, the one longest not asked for is forgotten. 200 bytes each.
MOST_NAMES = 10_000


class ResolveTimeout(TimeoutError):
    """A name server did not answer in time."""


@dataclass(slots=True)
class _Answer:
    found: tuple[IPAddress, ...]
    error: socket.gaierror | None
    until: float


class _Question:
    """A name that is being looked up, or will be when a thread is free."""

    __slots__ = ("answer", "answered", "finder", "waiting")

    finder: Any

    def __init__(self) -> None:
        self.answer: _Answer | None = None
        self.answered = Event()
        self.waiting = 0  # clients


class _Domain:
    """Lookups in progress of names with the same last two labels."""

    __slots__ = ("free", "names")

    def __init__(self) -> None:
        self.free = Semaphore(THREADS_OF_A_DOMAIN)
        self.names = 0


class Resolver:
    """Find the addresses of names.

    Args:
        family: "any" interleaves IPv6 and IPv4, IPv6 first (RFC 8305 section 4); "prefer-ipv4" the other way round;
            "ipv4" and "ipv6" only return their family.
        timeout: seconds a client waits for a lookup; one in progress goes on and serves the next client.

    Raises:
        ConfigError: an invalid option.
    """

    def __init__(self, family: Family = "any", timeout: float = 10.0) -> None:
        if family not in get_args(Family):
            raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, got {family!r}")
        check_number("timeout", timeout, above=0)
        self._family = family
        self._timeout = timeout
        self._known: OrderedDict[str, _Answer] = OrderedDict()
        self._under_way: dict[str, _Question] = {}
        self._free = Semaphore(THREADS)
        self._domains: dict[str, _Domain] = {}
        self._threads: ThreadPool | None = None

    def resolve(self, name: str) -> tuple[IPAddress, ...]:
        """Return the addresses of a name, in the order in which to try them.

        Raises:
            socket.gaierror: there are none, or the name server failed.
            ResolveTimeout: no answer in time.
        """
        answer = self._known.get(name)
        if answer is not None and answer.until > monotonic():
            self._known.move_to_end(name)
        else:
            answer = self._ask(name)
        if answer.error is not None:
            raise answer.error.with_traceback(None)  # it is raised repeatedly, and would keep every frame alive
        return answer.found

    def _ask(self, name: str) -> _Answer:
        question = self._under_way.get(name)
        if question is None or question.finder.dead:  # dead and not answered: memory ran out when it started
            question = _Question()
            question.finder = gevent.spawn(self._find, name, question)
            self._under_way[name] = question
        question.waiting += 1
        try:
            question.answered.wait(self._timeout)
        finally:
            question.waiting -= 1
        if question.answer is None:
            raise ResolveTimeout(f"no answer about {name} within {self._timeout:g} seconds")
        return question.answer

    def _find(self, name: str, question: _Question) -> None:
        try:
            with self._place(name):
                if question.waiting:
                    question.answer = self._look_up(name)
                    self._known[name] = question.answer
                    self._known.move_to_end(name)
                    while len(self._known) > MOST_NAMES:
                        self._known.popitem(last=False)
        finally:
            self._under_way.pop(name, None)
            question.answered.set()

    @contextmanager
    def _place(self, name: str) -> Iterator[None]:
        """Hold a free thread for this name while in the block."""
        key = ".".join(name.rstrip(".").rsplit(".", 2)[-2:])
        domain = self._domains.setdefault(key, _Domain())
        domain.names += 1
        try:
            # In this order: a lookup that waits for its domain does not occupy a place that others could use.
            with domain.free, self._free:
                yield
        finally:
            domain.names -= 1
            if not domain.names:
                del self._domains[key]

    def _look_up(self, name: str) -> _Answer:
        if self._threads is None:
            self._threads = ThreadPool(THREADS)
        error = None
        found: tuple[IPAddress, ...] = ()
        try:
            answer = self._threads.spawn(_look_up, name).get()
        except Exception as failure:  # no other thread can be started
            answer = socket.gaierror(socket.EAI_AGAIN, str(failure))
        if isinstance(answer, socket.gaierror):
            error = answer
        else:
            found = in_order(answer, self._family)
        if not found and error is None:
            error = socket.gaierror(socket.EAI_NONAME, f"no {self._family} address")
        return _Answer(found, error, monotonic() + (KEEP_FAILURE if error else KEEP))

    def close(self) -> None:
        """End the threads, after the lookups in progress."""
        if self._threads is not None:
            self._threads.kill()
            self._threads = None


def _look_up(name: str) -> list[IPAddress] | socket.gaierror:
    # In a native thread, where gevent would print any exception with a traceback: for each name that does not exist.
    try:
        found = _getaddrinfo(name, None, 0, socket.SOCK_STREAM)
    except socket.gaierror as error:
        return error.with_traceback(None)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid DNS name
        return socket.gaierror(socket.EAI_NONAME, str(error))
    return [ip_address(sockaddr[0].split("%")[0]) for _, _, _, _, sockaddr in found]


def in_order(found: Sequence[IPAddress], family: Family) -> tuple[IPAddress, ...]:
    """Return at most MOST_ADDRESSES addresses in the order in which to try them: the families in turn."""
    known = dict.fromkeys(map(unmapped, found))
    v4: list[IPAddress] = [ip for ip in known if isinstance(ip, IPv4Address)] if family != "ipv6" else []
    v6: list[IPAddress] = [ip for ip in known if isinstance(ip, IPv6Address)] if family != "ipv4" else []
    first, second = (v4, v6) if family == "prefer-ipv4" else (v6, v4)
    ordered: list[IPAddress] = []
    for place in range(min(MOST_ADDRESSES, max(len(first), len(second)))):
        ordered += first[place : place + 1] + second[place : place + 1]
    return tuple(ordered[:MOST_ADDRESSES])
