"""Access lists of other proxies, as rules of ours. No I/O.

Others have one list, whose first matching entry decides; an entry may also name what it does not apply to. Here client
rules decide who is admitted, and whether with a password, and destination rules decide the rest. What cannot be
expressed is decided so that nobody gains: an entry that allows is left out or narrowed, one that denies is widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from itertools import product
from typing import Any

from gtcpserver.errors import ConfigError

from .rules import COMMANDS, parse_destination_rule
from .target import IPNetwork

#: Most rules that a file may become. "deny !whitelist" doubles those after it.
MOST_RULES = 5_000

Ports = tuple[tuple[int, int], ...]
ALL_PORTS: Ports = ((1, 65535),)

#: The users of an entry that applies to everybody with a password.
ANY_USER: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file that is imported, for messages."""

    path: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.path} line {self.number}"


class NotHere(Exception):
    """There is no rule of ours that applies to this."""


@dataclass(frozen=True, slots=True)
class Match:
    """What an entry applies to; None: all.

    Attributes:
        users: names of users; ANY_USER: all that have a password.
        destinations: as in our rules: networks, names, .domains.
        commands: as in our rules.
        listener: name of a listener.
    """

    clients: tuple[IPNetwork, ...] | None = None
    users: tuple[str, ...] | None = None
    destinations: tuple[str, ...] | None = None
    ports: Ports | None = None
    commands: frozenset[str] | None = None
    listener: str | None = None

    @property
    def is_about_clients(self) -> bool:
        """Return whether it can be decided before a client asks for anything."""
        return self.destinations is None and self.ports is None and self.commands is None


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of an access list.

    Attributes:
        line: where it was.
        excluded: what it does not apply to.
        upstream: for an entry that allows: the upstream that its requests go through, or "direct".
    """

    line: Line
    allow: bool
    match: Match = Match()
    excluded: tuple[Match, ...] = ()
    upstream: str | None = None


# -- what two conditions have in common --------------------------------------------------------------------------------


def both(one: Match, other: Match) -> Match | None:
    """Return what both apply to; None: nothing. Raise NotHere."""
    found: dict[str, Any] = {}
    for name, common in _COMMON.items():
        left, right = getattr(one, name), getattr(other, name)
        if left is None or right is None:
            found[name] = right if left is None else left
            continue
        found[name] = common(left, right)
        if found[name] is None:
            return None
    return Match(**found)


def _common_networks(left: tuple[IPNetwork, ...], right: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...] | None:
    found = dict.fromkeys(_narrower(one, two) for one, two in product(left, right) if one.overlaps(two))
    return tuple(found) or None


def _narrower(one: IPNetwork, other: IPNetwork) -> IPNetwork:
    return one if one.prefixlen >= other.prefixlen else other


def _common_users(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...] | None:
    if ANY_USER in (left, right):
        return left or right
    return tuple(name for name in left if name in right) or None


def _common_destinations(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...] | None:
    found: dict[str, None] = {}
    for pair in product(left, right):
        networks = [as_network(one) for one in pair]
        one, other = networks
        if one is not None and other is not None:
            if one.overlaps(other):
                found[word_of(_narrower(one, other))] = None
        elif one is None and other is None:
            found.update(dict.fromkeys(name for name, by in (pair, pair[::-1]) if _is_below(name, by)))
        else:
            raise NotHere("a name and a network cannot both be conditions of one rule")
    return tuple(found) or None


def as_network(destination: str) -> IPNetwork | None:
    """Return the network that a destination names; None: it is a name."""
    try:
        return ip_network(destination)
    except ValueError:
        return None


def word_of(network: IPNetwork) -> str:
    """Return a network, or the only address in it, as in our rules."""
    return str(network.network_address if network.num_addresses == 1 else network)


def _is_below(name: str, domain: str) -> bool:
    return name == domain or (domain.startswith(".") and (name.endswith(domain) or name == domain[1:]))


def _common_ports(left: Ports, right: Ports) -> Ports | None:
    pairs = ((max(one[0], two[0]), min(one[1], two[1])) for one, two in product(left, right))
    return tuple(sorted({(first, last) for first, last in pairs if first <= last})) or None


_COMMON: dict[str, Callable[[Any, Any], Any]] = {
    "clients": _common_networks,
    "users": _common_users,
    "destinations": _common_destinations,
    "ports": _common_ports,
    "commands": lambda left, right: (left & right) or None,
    "listener": lambda left, right: left if left == right else None,
}


def other_ports(ports: Ports) -> Ports | None:
    """Return all ports but these; None: there is none."""
    found, first = [], 1
    for low, high in sorted(ports):
        if low > first:
            found.append((first, low - 1))
        first = max(first, high + 1)
    if first <= 65535:
        found.append((first, 65535))
    return tuple(found) or None


# -- entries without exceptions ----------------------------------------------------------------------------------------

#: Called with an entry that is narrower or wider here, and why.
Less = Callable[[Line, str], object]


def without_exceptions(entries: Sequence[Entry], less: Less) -> list[Entry]:
    """Return entries that decide the same, none with `excluded`. The last one must apply to everything.

    What an entry does not apply to is decided by those behind it: they come first, restricted to that.
    """
    found: list[Entry] = []
    for entry in reversed(entries):
        plain = [replace(entry, excluded=())]
        before: list[Entry] = []
        for excluded in entry.excluded:
            try:
                inner = both(entry.match, excluded)
            except NotHere as why:
                # Who is denied beyond that is denied here; who is allowed, is not.
                less(entry.line, str(why))
                plain = plain if not entry.allow else []
                continue
            if inner is not None:
                before += _restricted(found, inner, less)
        found = _without_unreached([*before, *plain, *found])
        if len(found) > MOST_RULES:
            raise ConfigError(f"{entry.line}: this would be more than {MOST_RULES} rules")
    return found


def _restricted(entries: Iterable[Entry], to: Match, less: Less) -> Iterator[Entry]:
    for entry in entries:
        try:
            match = both(entry.match, to)
        except NotHere as why:
            less(entry.line, str(why))
            if entry.allow:
                continue
            match = both(replace(entry.match, destinations=None), to)
        if match is not None:
            yield replace(entry, match=match)


def _without_unreached(entries: list[Entry]) -> list[Entry]:
    found, seen = [], set()
    for entry in entries:
        if entry.match not in seen:
            found.append(entry)
        if entry.match == Match():
            break
        seen.add(entry.match)
    return found


# -- the rules ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rules:
    """The texts of rules, as in the file."""

    clients: list[str] = field(default_factory=list)
    destinations: list[str] = field(default_factory=list)
    upstreams: list[str] = field(default_factory=list)


def make_rules(
    entries: Sequence[Entry], auth: str | None, less: Less, more: Less, *, challenges: bool = False
) -> Rules:
    """Make rules from entries without exceptions.

    Args:
        auth: name of the authenticator; None: no entry may name users.
        less, more: called with entries for which these rules allow less or more.
        challenges: clients of an entry that comes after one about users are asked for a password there, too.
    """
    rules = Rules()
    kept = [entry for entry in entries if _is_possible(entry, less, more)]
    rules.clients = list(dict.fromkeys(_client_rules(kept, auth, less, challenges)))
    while rules.clients and rules.clients[-1].startswith("deny"):
        rules.clients.pop()  # the default
    groups = [(entry, list(_texts(entry, auth))) for entry in kept]
    while groups and not groups[-1][0].allow:
        groups.pop()
    for entry, texts in groups:
        action = "allow" if entry.allow else "deny"
        rules.destinations += [f"{action} {text}" for text in texts]
        if entry.allow and entry.upstream is not None:
            rules.upstreams += [f"through {entry.upstream} {text}" for text in texts]
    if len(rules.destinations) + len(rules.clients) > MOST_RULES:
        raise ConfigError(f"{groups[-1][0].line.path}: this would be more than {MOST_RULES} rules")
    return rules


def _is_possible(entry: Entry, less: Less, more: Less) -> bool:
    wrong = [name for name in entry.match.users or () if '"' in name or not name.isprintable() or not name]
    if wrong:
        (less if entry.allow else more)(entry.line, f"a user's name must be printable, without quotes: {wrong[0]!r}")
    return not wrong


def _client_rules(entries: Sequence[Entry], auth: str | None, less: Less, challenges: bool) -> Iterator[str]:
    for place, entry in enumerate(entries):
        match = entry.match
        if not entry.allow and (match.users is not None or not match.is_about_clients):
            continue
        for network in match.clients or (None,):
            who = "any" if network is None else word_of(network)
            text = f"{'allow' if entry.allow else 'deny'} from {who} to {match.listener or 'any'}"
            if entry.allow:
                before = list(_about_users(entries[:place], network, match.listener))
                after = not match.is_about_clients and any(_about_users(entries[place + 1 :], network, match.listener))
                asked = challenges and any(_has_all(one.match, network) for one in before)
                if match.users is None and not asked and (before or after):
                    less(entry.line, f"clients from {who} need a password for all, as another rule is about users")
                if match.users is not None or before or after:
                    text += f" with auth {auth}"
            yield text
            if match.listener is None and network is None and match.is_about_clients and match.users is None:
                return


def _about_users(entries: Iterable[Entry], network: IPNetwork | None, listener: str | None) -> Iterator[Entry]:
    """Yield the entries about users that may apply to some of these clients."""
    for entry in entries:
        match = entry.match
        if match.users is None or (None not in (listener, match.listener) and listener != match.listener):
            continue
        if network is None or match.clients is None or any(network.overlaps(one) for one in match.clients):
            yield entry


def _has_all(match: Match, network: IPNetwork | None) -> bool:
    """Return whether a condition is about clients, and applies to all of these."""
    if not match.is_about_clients or match.clients is None:
        return match.is_about_clients
    return network is not None and any(
        network.version == one.version and network.subnet_of(one)  # type: ignore[arg-type]
        for one in match.clients
    )


def ports_text(ports: Ports | None) -> str:
    """Return what follows a destination."""
    if ports in (None, ALL_PORTS):
        return ""
    return ":" + ",".join(f"{low}-{high}" if low < high else str(low) for low, high in ports or ())


def _texts(entry: Entry, auth: str | None) -> Iterator[str]:
    match = entry.match
    ports = ports_text(match.ports)
    via = match.listener or (auth if match.users == ANY_USER else None)
    middle = f" via {via}" if via else ""
    if match.commands is not None and match.commands != frozenset(COMMANDS):
        middle += " command " + ",".join(name for name in COMMANDS if name in match.commands)
    for network, user, destination in product(
        map(word_of, match.clients) if match.clients else ("any",),
        match.users or (None,),
        match.destinations or ("any",),
    ):
        named = f' user "{user}"' if user is not None else ""
        where = f"[{destination}]" if ":" in destination else destination
        text = f"{where}{ports}"
        if (network, named, middle) != ("any", "", ""):
            text = f"from {network}{named}{middle} to {text}"
        parse_destination_rule(f"allow {text}")
        yield text
