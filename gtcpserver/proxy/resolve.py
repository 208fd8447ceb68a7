"""Resolver: look up host names without letting one slow name server delay everybody.

The search list of resolv.conf(5) is applied here, so that the rules see the name that is looked up. A name is looked
for in /etc/hosts, and then in one of two ways:

- "dns" asks the name servers (`dns_client`): addresses of each family apart and at the same time, kept by their TTL;
- "system" asks the system's resolver (`system_names`), which knows all that nsswitch.conf(5) leads to.

Clients that ask for the same name share one lookup (`questions`). docs/proxy.md has what was measured
(loadtests/bench/resolvers.py).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from time import monotonic
from typing import Any, Literal, get_args

import gevent

from gtcpserver.admission.client_limits import client_key
from gtcpserver.checks import check_number
from gtcpserver.connection.connect import MOST_ADDRESSES
from gtcpserver.errors import ConfigError

from .dns_client import NameServers, NoReply, ServersFailed
from .dns_message import NXDOMAIN, RecordType
from .errors import BadTarget
from .name_files import (
    HOSTS,
    NSSWITCH_CONF,
    RESOLV_CONF,
    ResolvConf,
    WatchedFile,
    parse_hosts,
    parse_nsswitch,
    parse_resolv_conf,
)
from .questions import Answer, Outcome, Question, Questions, Remembered, Shares, answer_for
from .system_names import THREADS, SystemNames, Wanted
from .target import IPAddress, parse_authority, unmapped

Family = Literal["any", "ipv4", "ipv6", "prefer-ipv4"]
Kind = Literal["dns", "system"]

#: Questions to name servers at once, two for a name. Each has a descriptor.
MOST_QUESTIONS = 2048

#: How many of these may be about names of one domain: usually one name server that does not answer.
MOST_OF_A_DOMAIN = 128

#: The same for lookups in threads.
THREADS_OF_A_DOMAIN = 32

#: Names that one client may wait for at once; an IPv6 client is its /64. Eight clients fill all places.
MOST_OF_A_CLIENT = 128

#: Seconds for which the addresses of one family wait for the other's, since both were asked for. RFC 8305 section 3 has
#: 50 ms, for programs that go on with what comes later.
SECOND_FAMILY = 0.5


#: A host name; with the candidates that may be looked up, if those are not all.
_Key = str | tuple[str, ...]


class ResolveTimeout(TimeoutError):
    """A name server did not answer in time."""


class Found(tuple[IPAddress, ...]):
    """Addresses of a name, in the order in which to try them.

    Attributes:
        name: the absolute name that has them, without its final dot: what rules that allow must match.
        also: other names that the client may have meant: rules that deny them count, too.
        key: what was asked for.
    """

    name: str
    also: tuple[str, ...]
    key: _Key


class _Result:
    """What came of the lookup of a name, and the time until which it holds."""

    __slots__ = ("found", "outcome", "until")

    def __init__(self, found: Found | None, answer: Answer) -> None:
        self.found = found
        self.outcome = answer.outcome
        self.until = answer.until


class Resolver:
    """Find the addresses of names.

    Args:
        family: "any" interleaves IPv6 and IPv4, IPv6 first (RFC 8305 section 4); "prefer-ipv4" the other way round;
            "ipv4" and "ipv6" only look for their family.
        timeout: seconds a client waits for a lookup; one in progress goes on and serves the next client.
        kind: "dns" or "system"; None: "system" if nsswitch.conf has services that DNS does not cover.
        servers: name servers for "dns", such as "192.0.2.53" or "[2001:db8::53]:5353"; (): those of resolv.conf.

    Raises:
        ConfigError: an invalid option.

    Example::

        from gtcpserver.proxy.resolve import Resolver

        resolver = Resolver("ipv4", timeout=5, kind="system")
        print(resolver.resolve("localhost"))  # ...127.0.0.1...
        resolver.close()
    """

    def __init__(
        self, family: Family = "any", timeout: float = 10.0, kind: Kind | None = None, servers: Sequence[str] = ()
    ) -> None:
        if family not in get_args(Family):
            raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, got {family!r}")
        if kind is not None and kind not in get_args(Kind):
            raise ConfigError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        check_number("timeout", timeout, above=0)
        self._family = family
        self._timeout = timeout
        self._conf: WatchedFile[ResolvConf] = WatchedFile(RESOLV_CONF, parse_resolv_conf)
        self._hosts = WatchedFile(HOSTS, parse_hosts)
        others = WatchedFile(NSSWITCH_CONF, parse_nsswitch).read()
        self.kind: Kind = kind or ("system" if others and not servers else "dns")
        asked = tuple(map(parse_server, servers))
        if asked and self.kind == "system":
            raise ConfigError('servers are for kind = "dns"')
        self._results: Remembered[_Key, _Result] = Remembered()
        self._clients: Shares[Any] = Shares(MOST_OF_A_CLIENT)
        self._system = SystemNames()
        self._questions: Questions[Any]
        self._kinds: tuple[Any, ...]
        if self.kind == "dns":
            self._servers = NameServers(self._conf.read, timeout, asked)
            self._questions = Questions(self._ask_servers, MOST_QUESTIONS, MOST_OF_A_DOMAIN)
            kinds: tuple[RecordType, ...] = ("AAAA", "A")
            self._kinds = {"ipv4": kinds[1:], "ipv6": kinds[:1]}.get(family, kinds)
        else:
            self._questions = Questions(self._system.look_up, THREADS, THREADS_OF_A_DOMAIN)
            wanted: Wanted = "any" if family == "prefer-ipv4" else family
            self._kinds = (wanted,)
        self._suffix = "" if self.kind == "dns" else "."
        # The system's resolver may know a name by another service than DNS, which takes no final dot.
        self._tries_relative = self.kind == "system" and others

    def candidates(self, host: str) -> Sequence[str]:
        """Return the absolute names that a host name may mean, without final dots, in the order of the lookups."""
        return self._conf.read().candidates(host)

    def is_known(self, host: str, names: Sequence[str] | None = None) -> bool:
        """Return whether `resolve` would not wait."""
        return self._results.get(_key(host, names)) is not None

    def resolve(self, host: str, client: IPAddress | None = None, names: Sequence[str] | None = None) -> Found:
        """Return the addresses of a host name.

        Args:
            host: in lower case ASCII, with a final dot if it is absolute.
            client: who asks; only so many lookups of one client are in progress at once.
            names: those of its `candidates` that may be looked up; None: all.

        Raises:
            socket.gaierror: there are none, or the name server failed.
            ResolveTimeout: no answer in time.
        """
        # Hot: once per connection.
        key = host if names is None else _key(host, names)
        result = self._results.get(key)
        if result is None:
            until = monotonic() + self._timeout
            if client is None:
                result = self._resolve(host, until, names)
            else:
                with self._clients.hold(client_key(client), self._timeout) as held:
                    if not held:
                        raise ResolveTimeout("too many lookups of this client")
                    result = self._results.get(key) or self._resolve(host, until, names)
            if result.found is not None:
                result.found.key = key
            if result.until > monotonic():
                self._results.put(key, result)
        if result.found is None:
            raise self._error_of(host, result.outcome)
        return result.found

    def forget(self, found: Found) -> None:
        """Look a name up again soon: none of its addresses could be connected to."""
        result = self._results.get(found.key)
        if result is not None and result.found is found:
            for kind in self._kinds:
                self._questions.forget(found.name + self._suffix, kind)
            self._results.forget(found.key)

    def close(self) -> None:
        """End what is in progress."""
        self._questions.close()
        self._system.close()

    # -- one name ----------------------------------------------------------------------------------------------------

    def _resolve(self, host: str, until: float, names: Sequence[str] | None) -> _Result:
        name = host.removesuffix(".")
        own = in_order(self._hosts.read().get(name, ()), self._family) or in_order(_special(name), self._family)
        if own:
            return self._result(host, name, answer_for("found", own))
        if name == "invalid" or name.endswith(".invalid"):  # RFC 6761 section 6.4
            return _Result(None, answer_for("no-name"))
        return self._search(host, until, self.candidates(host) if names is None else names)

    def _search(self, host: str, until: float, candidates: Sequence[str]) -> _Result:
        """Look for the first candidate that has addresses, as glibc does (res_search in resolv/res_query.c)."""
        nothing = Answer("no-name", (), float("inf"))
        for candidate in candidates:
            answer = self._addresses(candidate + self._suffix, until)
            answer.until = min(answer.until, nothing.until)
            if answer.outcome == "found":
                return self._result(host, candidate, answer)
            if answer.outcome in ("silent", "broken"):
                return _Result(None, answer)  # what the name means is not known
            # Even without addresses another candidate may have them; that servers failed is the last thing to say.
            nothing = answer if nothing.outcome != "failed" else Answer("failed", (), answer.until)
        if self._tries_relative and nothing.outcome != "failed" and not host.endswith("."):
            answer = self._addresses(host, until)
            if answer.outcome == "found":
                return self._result(host, host, answer, self.candidates(host))
        return _Result(None, nothing)

    def _addresses(self, name: str, until: float) -> Answer:
        """Return the answers about a name's addresses of the wanted families, as one."""
        questions = self._questions
        answers = {kind: questions.known(name, kind) for kind in self._kinds}
        asked = {kind: questions.ask(name, kind) for kind, answer in answers.items() if answer is None}
        got = [answer for answer in answers.values() if answer is not None]
        waiting = list(asked.values())
        for question in waiting:
            question.waiting += 1
        try:
            while waiting and not any(answer.outcome == "no-name" for answer in got):
                seconds = until - monotonic()
                if any(answer.outcome == "found" for answer in got):
                    seconds = min(seconds, waiting[0].began + SECOND_FAMILY - monotonic())
                if seconds <= 0:
                    break
                gevent.wait([question.answered for question in waiting], seconds, 1)
                got += [_answer_of(question) for question in waiting if question.answered.is_set()]
                waiting = [question for question in waiting if not question.answered.is_set()]
        finally:
            for question in asked.values():
                question.waiting -= 1
        return self._merge(got, bool(waiting))

    def _merge(self, answers: Sequence[Answer], incomplete: bool) -> Answer:
        found = in_order([ip for answer in answers for ip in answer.found], self._family)
        outcomes = {answer.outcome for answer in answers}
        until = 0.0 if incomplete else min(answer.until for answer in answers)
        if found:
            return Answer("found", found, until)
        if "no-name" in outcomes:  # whatever the type of record that was asked for
            return Answer("no-name", (), min(answer.until for answer in answers))
        if incomplete:
            return Answer("silent", (), until)
        order: tuple[Outcome, ...] = ("broken", "silent", "failed", "no-address")
        return Answer(next((one for one in order if one in outcomes), "no-address"), (), until)

    def _result(self, host: str, name: str, answer: Answer, also: Sequence[str] = ()) -> _Result:
        found = Found(answer.found)
        found.name = name
        found.also = tuple(other for other in (host.removesuffix("."), *also) if other != name)
        return _Result(found, answer)

    def _error_of(self, host: str, outcome: Outcome) -> OSError:
        # Made anew each time: one that is raised repeatedly would keep every frame alive.
        if outcome == "silent":
            return ResolveTimeout(f"no answer about {host} within {self._timeout:g} seconds")
        if outcome == "no-name":
            return socket.gaierror(socket.EAI_NONAME, "no such name")
        if outcome == "no-address":
            return socket.gaierror(socket.EAI_NONAME, f"no {self._family} address")
        return socket.gaierror(socket.EAI_AGAIN, "the name servers failed")

    def _ask_servers(self, name: str, kind: RecordType) -> Answer:
        try:
            reply = self._servers.ask(name, kind)
        except NoReply:
            return answer_for("silent")
        except ServersFailed:
            return answer_for("failed")
        except OSError:
            return answer_for("broken")
        if reply.found:
            return answer_for("found", in_order(reply.found, "any"), reply.ttl)
        return answer_for("no-name" if reply.code == NXDOMAIN else "no-address", ttl=reply.ttl)


def _key(host: str, names: Sequence[str] | None) -> _Key:
    return host if names is None else (host, *names)


def _answer_of(question: Question) -> Answer:
    return answer_for("broken") if question.answer is None else question.answer


def _special(name: str) -> tuple[IPAddress, ...]:
    """Return the addresses of a name that has them everywhere (RFC 6761 section 6.3)."""
    if name == "localhost" or name.endswith(".localhost"):
        return IPv6Address("::1"), IPv4Address("127.0.0.1")
    return ()


def parse_server(text: str) -> tuple[str, int]:
    """Parse the address of a name server, with or without a port. Raise ConfigError."""
    try:
        target = parse_authority(text, 53)
    except BadTarget as error:
        raise ConfigError(f"servers must be addresses of name servers, got {text!r} ({error})") from None
    if target.ip is None:
        raise ConfigError(f"servers must be addresses of name servers, got {text!r}")
    return str(target.ip), target.port


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
