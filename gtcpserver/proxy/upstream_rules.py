"""Upstream rules: which upstream leads to a destination.

    through UPSTREAM from CLIENT [user USER] [via LISTENER|AUTH] [command COMMANDS] to DESTINATION
    through UPSTREAM DESTINATION                                short for: from any to DESTINATION

UPSTREAM is the name of an upstream, or "direct"; the other words are those of destination rules (`rules`). The first
rule that matches decides; after the last one the connection is direct. They choose the way; whether a client may go
there at all is decided by the destination rules, before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .resolve import Found
from .rules import DestinationRule, RuleMatch, parse_way
from .target import THIS_HOST, IPAddress

DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class UpstreamRule:
    """Which upstream to use; `match` is the same as in destination rules.

    Example::

        from gtcpserver.proxy.upstream_rules import parse_upstream_rule

        rule = parse_upstream_rule("through tor .onion")
        print(rule.upstream)  # tor
    """

    text: str
    upstream: str
    match: DestinationRule


def parse_upstream_rule(text: str) -> UpstreamRule:
    """Parse a rule. Raise RuleError.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.upstream_rules import parse_upstream_rule
        from gtcpserver.proxy.upstream_url import parse_upstream

        tor = parse_upstream("tor", "socks5://127.0.0.1:9050", resolve="there")
        gate = Gate(upstreams={"tor": tor}, upstream_rules=[parse_upstream_rule("through tor .onion")])
    """
    upstream, match = parse_way(text)
    return UpstreamRule(text, upstream, match)


def choose_upstream(
    rules: Sequence[UpstreamRule],
    asked: RuleMatch,
    name: str | None,
    addresses: Callable[[], Sequence[IPAddress]],
    is_own: Callable[[IPAddress], bool] = lambda ip: False,
    candidates: Sequence[str] = (),
) -> str:
    """Return the name of the upstream for a destination, or "direct".

    Args:
        asked: who asks, and for which port.
        name: the requested host name, without its final dot; None for an address.
        addresses: returns the addresses of the name; called when a rule about networks, or about one of the
            `candidates`, is reached.
        is_own: returns whether an address is this host's; called when a rule about this host is reached.
        candidates: absolute names that the requested one may mean, by the search list.
    """
    for rule in rules:
        if not asked.fits(rule.match):
            continue
        what = rule.match.destinations
        if what.is_any or (name is not None and what.has_name(name)):
            return rule.upstream
        if any(map(what.has_name, candidates)):  # which of them is meant is known after the lookup
            found = addresses()
            if isinstance(found, Found) and what.has_name(found.name):
                return rule.upstream
        if what.network is None and what.kind is None:
            continue
        if any(what.has_address(ip, what.kind == THIS_HOST and is_own(ip)) for ip in addresses()):
            return rule.upstream
    return DIRECT
