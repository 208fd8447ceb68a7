"""Rules: who may use which listener, and who may reach what. No I/O.

A client rule:

    allow|deny from CLIENT to LISTENER [with auth NAME]
    allow|deny CLIENT                                          short for: from CLIENT to any

A destination rule:

    allow|deny from CLIENT [user USER] [via LISTENER|AUTH] [command COMMANDS] to DESTINATION
    allow|deny DESTINATION                                     short for: from any to DESTINATION

CLIENT is "any", an address or a network. COMMANDS are some of connect, bind, udp and forward, separated by commas.
DESTINATION is one of these, followed by ":PORTS" to restrict it to some ports (443 or 80,443 or 8000-8999):

    any                                    everything but the special kinds of addresses
    10.0.0.0/8, 192.0.2.1, [2001:db8::/32] a network or address, also of names that resolve to it
    example.com                            this name
    .example.com                           this name and all names below it
    loopback, this-host, private, ...      a kind of address (see target.KINDS)

The first rule that matches decides; after the last one the default is deny. Special kinds of addresses (loopback,
this-host, link-local, private, shared, metadata, multicast, broadcast, unspecified, reserved) are only reachable
through a rule that names them: the kind, or a network within it. "allow any" and ".example.com" do not count: the first
would open the proxy's own network to its clients, the second would open it to the owner of that domain's name server.
An address of this host is this-host before it is link-local, private or the like; only the kind or the address itself
names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Network
from typing import Any, Literal, get_args

from gtcpserver.networks import parse_network

from .errors import BadTarget, RuleError
from .target import (
    KINDS,
    THIS_HOST,
    IPAddress,
    IPNetwork,
    addresses_meant,
    canonical_name,
    kind_of,
    parse_address,
    unmapped,
)

Action = Literal["allow", "deny"]

#: What clients may request: CONNECT of SOCKS and HTTP, BIND and UDP ASSOCIATE of SOCKS, and HTTP requests to forward
#: ("GET http://...").
Command = Literal["connect", "bind", "udp", "forward"]
COMMANDS: tuple[Command, ...] = get_args(Command)

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DESTINATION = re.compile(r"(\[[^]]*\]|[^:]*)(?::(.*))?")


@dataclass(frozen=True, slots=True)
class Destinations:
    """What a destination rule applies to; at most one of kind, network and name is set.

    Attributes:
        kind: kind of special addresses, a key of target.KINDS.
        network: addresses.
        name: a host name; with a leading dot also the names below it.
        ports: ranges, both ends included; () for all.
    """

    kind: str | None = None
    network: IPNetwork | None = None
    name: str | None = None
    ports: tuple[tuple[int, int], ...] = ()

    @property
    def is_any(self) -> bool:
        """Return whether it covers every host; the ports may be limited."""
        return self.kind is None and self.network is None and self.name is None

    def has_port(self, port: int) -> bool:
        return not self.ports or any(first <= port <= last for first, last in self.ports)

    def has_name(self, name: str) -> bool:
        if self.name is None:
            return False
        return name == self.name or (self.name.startswith(".") and (name.endswith(self.name) or name == self.name[1:]))

    def has_address(self, ip: IPAddress, own: bool = False) -> bool:
        """Return whether it covers an address; `own`: the address is one of this host's."""
        if self.kind is not None:
            return self.kind in (kind_of(ip), kind_of(ip, own))
        return self.network is not None and ip.version == self.network.version and ip in self.network

    def opens(self, ip: IPAddress, own: bool = False) -> bool:
        """Return whether it names the special kind of an address, so that a rule with it may allow the address."""
        kind = kind_of(ip, own)
        if kind is None or self.kind == kind:
            return True
        network: Any = self.network
        if network is None:
            return False
        if kind == THIS_HOST:  # a network does not open this host
            return bool(network.prefixlen == network.max_prefixlen and network.network_address == ip)
        return any(network.version == special.version and network.subnet_of(special) for special in KINDS[kind])


@dataclass(frozen=True, slots=True)
class ClientRule:
    """Who may use a listener; ``auth`` names the authenticator that must confirm the user, None: none.

    Example::

        from gtcpserver.proxy.rules import parse_client_rule

        rule = parse_client_rule("deny 192.0.2.0/24")
        print(rule.clients, rule.auth)  # 192.0.2.0/24 None
    """

    text: str
    action: Action
    clients: IPNetwork | None
    listener: str | None
    auth: str | None


@dataclass(frozen=True, slots=True)
class DestinationRule:
    """Who may reach what, by which commands; None matches everything.

    Example::

        from gtcpserver.proxy.rules import parse_destination_rule

        rule = parse_destination_rule("allow from 10.0.0.0/8 to any:443")
        print(rule.clients, rule.user)  # 10.0.0.0/8 None
    """

    text: str
    action: Action
    clients: IPNetwork | None
    user: str | None
    via: str | None
    destinations: Destinations
    commands: frozenset[str] | None = None


@dataclass(slots=True)
class RuleMatch:
    """Who asks, through which listener, and for which port: what rules compare before the destination itself.

    Attributes:
        client: the client's address.
        listener: name of its listener.
        auth: name of the authenticator that knows the user, if any.
        user: the user, if known.
        port: port of the destination.
        command: what it asks for.
    """

    client: IPAddress
    listener: str
    auth: str | None
    user: str | None
    port: int
    command: Command = "connect"

    def fits(self, rule: DestinationRule) -> bool:
        return (
            _is_from(rule.clients, self.client)
            and rule.user in (None, self.user)
            and rule.via in (None, self.listener, self.auth)
            and (rule.commands is None or self.command in rule.commands)
            and rule.destinations.has_port(self.port)
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict of the rules.

    Attributes:
        allowed: yes or no.
        rule: the rule as written; or why no rule was consulted.
        auth: for a client rule, the authenticator that must confirm the user.
    """

    allowed: bool
    rule: str
    auth: str | None = None


# -- parsing -----------------------------------------------------------------------------------------------------------


_WORD = re.compile(r'"([^"]+)"(?!\S)|(\S+)')


class _Words:
    """The words of a rule, taken from the left. A word in double quotes may contain spaces."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._words: list[str] = []
        for quoted, word in _WORD.findall(text):
            if '"' in word:
                raise RuleError(f"a quote without its partner, {word!r} in {text!r}")
            self._words.append(quoted or word)

    def peek(self) -> str | None:
        return self._words[0] if self._words else None

    def take(self, expected: str) -> str:
        if not self._words:
            raise RuleError(f"{expected} expected at the end of {self.text!r}")
        return self._words.pop(0)

    def take_word(self, *words: str) -> str:
        expected = " or ".join(f'"{word}"' for word in words)
        word = self.take(expected)
        if word not in words:
            raise RuleError(f"{expected} expected, got {word!r} in {self.text!r}")
        return word

    def skip(self, word: str) -> bool:
        if self.peek() == word:
            self._words.pop(0)
            return True
        return False

    def take_name(self, what: str) -> str:
        word = self.take(what)
        if not _NAME.fullmatch(word):
            raise RuleError(f"{what} expected, got {word!r} in {self.text!r}")
        return word

    def end(self) -> None:
        if self._words:
            raise RuleError(f"nothing more expected, got {self._words[0]!r} in {self.text!r}")


def parse_client_rule(text: str) -> ClientRule:
    """Parse a client rule. Raise RuleError.

    Example::

        from gtcpserver.proxy.rules import parse_client_rule

        rule = parse_client_rule("allow from 10.0.0.0/8 to any with auth staff")
        print(rule.action, rule.clients, rule.auth)  # allow 10.0.0.0/8 staff
    """
    words = _Words(text)
    action: Any = words.take_word("allow", "deny")
    if not words.skip("from"):
        clients = _clients(words)
        words.end()
        return ClientRule(text, action, clients, None, None)
    clients = _clients(words)
    words.take_word("to")
    listener = _or_any(words.take_name('the name of a listener, or "any",'))
    auth = None
    if words.skip("with"):
        words.take_word("auth")
        auth = words.take_name("the name of an authenticator")
        if action == "deny":
            raise RuleError(f'"with auth" is for rules that allow, in {text!r}')
    words.end()
    return ClientRule(text, action, clients, listener, auth)


def parse_destination_rule(text: str) -> DestinationRule:
    """Parse a destination rule. Raise RuleError.

    Example::

        from gtcpserver.proxy.rules import parse_destination_rule

        rule = parse_destination_rule("deny .example.com:25")
        print(rule.action, rule.text)  # deny deny .example.com:25
    """
    words = _Words(text)
    return _parse_match(words, words.take_word("allow", "deny"))


def parse_way(text: str) -> tuple[str, DestinationRule]:
    """Parse a rule that chooses an upstream; return the upstream's name and what the rule applies to. Raise
    RuleError."""
    words = _Words(text)
    words.take_word("through")
    upstream = words.take_name('the name of an upstream, or "direct",')
    return upstream, _parse_match(words, "allow")


def _parse_match(words: _Words, action: Any) -> DestinationRule:
    text = words.text
    clients = user = via = commands = None
    if words.skip("from"):
        clients = _clients(words)
        if words.skip("user"):
            user = words.take("the name of a user")
        if words.skip("via"):
            via = words.take_name("the name of a listener or authenticator")
        if words.skip("command"):
            commands = _commands(words)
        words.take_word("to")
    destinations = _destinations(words.take("a destination"), text)
    words.end()
    return DestinationRule(text, action, clients, user, via, destinations, commands)


def _or_any(word: str) -> str | None:
    return None if word == "any" else word


def _commands(words: _Words) -> frozenset[str]:
    word = words.take("commands")
    commands = frozenset(word.split(","))
    if not commands <= frozenset(COMMANDS):
        raise RuleError(f"commands ({', '.join(COMMANDS)}) expected, got {word!r} in {words.text!r}")
    return commands


def _clients(words: _Words) -> IPNetwork | None:
    word = words.take('a network, an address or "any"')
    if word == "any":
        return None
    try:
        return parse_network(word.strip("[]"))
    except ValueError as error:
        raise RuleError(f'a network, an address or "any" expected, got {word!r} in {words.text!r} ({error})') from None


def _destinations(word: str, text: str) -> Destinations:
    host, ports_text = word, None
    if word.count(":") < 2 or word.startswith("["):
        match = _DESTINATION.fullmatch(word)
        if match is None:
            raise RuleError(f"a destination expected, got {word!r} in {text!r}")
        host, ports_text = match.groups()
    ports = _ports(ports_text, text) if ports_text is not None else ()
    host = host.strip("[]")
    if host == "any":
        return Destinations(ports=ports)
    if host in KINDS:
        return Destinations(kind=host, ports=ports)
    try:
        return Destinations(network=parse_network(host), ports=ports)
    except ValueError as error:
        if "/" in host or ":" in host:
            raise RuleError(f"a network expected, got {host!r} in {text!r} ({error})") from None
    try:
        if parse_address(host) is not None:
            # 127.1 or 010.0.0.1: parsers disagree on their meaning.
            raise RuleError(f"an address in four decimal numbers expected, got {host!r} in {text!r}")
        name = host.removeprefix("*")
        return Destinations(name="." * name.startswith(".") + canonical_name(name.removeprefix(".")), ports=ports)
    except BadTarget as error:
        raise RuleError(f"a destination expected, got {host!r} in {text!r} ({error})") from None


def _ports(text: str, rule: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        numbers = [first, last] if dash else [first, first]
        if not all(number.isascii() and number.isdigit() and 1 <= int(number[:6]) <= 65535 for number in numbers):
            raise RuleError(f"ports from 1 to 65535 expected, got {part!r} in {rule!r}")
        if int(numbers[0]) > int(numbers[1]):
            raise RuleError(f"the lower port first expected, got {part!r} in {rule!r}")
        ranges.append((int(numbers[0]), int(numbers[1])))
    return tuple(ranges)


# -- deciding ----------------------------------------------------------------------------------------------------------


def decide_client(rules: Sequence[ClientRule], client: IPAddress, listener: str) -> Decision:
    """Decide whether a client may use a listener, and with which authenticator."""
    client = unmapped(client)
    for rule in rules:
        if _is_from(rule.clients, client) and rule.listener in (None, listener):
            return Decision(rule.action == "allow", rule.text, rule.auth)
    return Decision(False, "no client rule matches")


def decide_destination(
    rules: Sequence[DestinationRule],
    asked: RuleMatch,
    name: str | None,
    ip: IPAddress | None,
    *,
    nat64: tuple[IPv6Network, ...] = (),
    own: Collection[IPAddress] = (),
    also: Sequence[str] = (),
) -> Decision:
    """Decide whether a client may reach one address.

    Must be asked for every address of a name, and the connection must go to that address: resolving the name again may
    return another one.

    Args:
        asked: who asks, and for which port.
        name: the host name that was looked up, in its canonical form without a final dot; None for an address.
        ip: the address; None: another proxy looks the name up, and only rules about names can match.
        nat64: prefixes of NAT64 gateways, as for `target.addresses_meant`.
        own: those addresses meant by `ip` that are this host's.
        also: other names that may be meant, such as the requested one, below which a search domain was appended. Rules
            that deny one of them count; rules that allow it do not.
    """
    meant: tuple[IPAddress, ...]
    if ip is not None:
        meant = addresses_meant(ip, nat64)
    elif name is not None and (name == "localhost" or name.endswith(".localhost")):
        # Wherever it is looked up, it means the proxy there (RFC 6761 section 6.3).
        meant = (IPv4Address("127.0.0.1"),)
    else:
        meant = ()
    special = [one for one in meant if kind_of(one, one in own) is not None]
    for rule in rules:
        if not asked.fits(rule):
            continue
        what = rule.destinations
        matches = (
            what.is_any
            or (name is not None and what.has_name(name))
            or any(what.has_address(one, one in own) for one in meant)
        )
        if rule.action == "deny":
            # By the address, and by each address that a gateway may turn it into.
            if matches or any(map(what.has_name, also)):
                return Decision(False, rule.text)
        elif matches and all(what.opens(one, one in own) for one in special):
            return Decision(True, rule.text)
    if special:
        kind = kind_of(special[-1], special[-1] in own)
        return Decision(False, f"{kind} addresses are denied unless a rule names them")
    return Decision(False, "no destination rule matches")


def names_to_look_up(
    rules: Sequence[DestinationRule], asked: RuleMatch, candidates: Sequence[str], requested: str
) -> tuple[tuple[str, ...] | None, str]:
    """Return which names may be looked up: all but those that are denied whatever their addresses.

    Args:
        asked: who asks, and for which port.
        candidates: names that the requested one may mean.
        requested: the requested name, without its final dot.

    Returns:
        The names, None for all; and the rule that denies the first of the others.
    """
    names, first = [], ""
    for name in candidates:
        rule = _denies_name(rules, asked, name, requested)
        if rule is None:
            names.append(name)
        else:
            first = first or rule
    return (tuple(names) if first else None), first


def _denies_name(rules: Sequence[DestinationRule], asked: RuleMatch, name: str, requested: str) -> str | None:
    """Return the rule that denies a name whatever its addresses; None: they decide."""
    for rule in rules:
        what = rule.destinations
        if not asked.fits(rule):
            continue
        if rule.action == "allow":
            if what.network is not None or what.kind is not None or what.is_any or what.has_name(name):
                return None
        elif what.is_any or what.has_name(name) or what.has_name(requested):
            return rule.text
    return "no destination rule matches"


def _is_from(clients: IPNetwork | None, client: IPAddress) -> bool:
    return clients is None or (clients.version == client.version and client in clients)
