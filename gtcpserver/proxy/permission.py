"""Permission: where a client may go, by the rules. The second layer of `Visitor`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from .errors import Cut, Denied
from .gate import remember
from .identity import Identity
from .resolve import Found, Resolver
from .rules import Command, Decision, RuleMatch, decide_destination, names_to_look_up
from .target import IPAddress, Target, addresses_meant
from .upstream import Upstream
from .upstream_group import UpstreamGroup
from .upstream_rules import choose_upstream

#: By the command in a record; HTTP's methods are "forward".
_COMMAND_OF: dict[str, Command] = {"CONNECT": "connect", "BIND": "bind", "UDP_ASSOCIATE": "udp"}

#: A destination, the address that was chosen (None: another proxy has looked up its name), and all of its addresses,
#: which know the name that was looked up: the arguments of `Permission.decide`.
Opened = tuple[Target, IPAddress | None, Sequence[IPAddress]]


@dataclass(slots=True, eq=False)
class Permission(Identity):
    """A client that names destinations.

    Attributes:
        found: the addresses of the destination whose name was looked up last.
        opened: what it is connected to.
        claim: the address of a transparent listener's client, with the name that it claims (`believe`); None: none.
    """

    found: Sequence[IPAddress] = ()
    opened: Opened | None = None
    claim: Found | None = None

    def follow(self) -> bool:
        """Follow to the gate of the last reload; return whether there was one since the last call.

        Its rules may not admit the client any more; the limits that count it stay the old ones.
        """
        old = self.gate
        gate = old.latest
        if gate is old:
            return False
        self.gate = gate
        if self.entered:
            gate.tenure.enter()
            if self in old.tenure.tunnels:
                gate.tenure.tunnels[self] = old.tenure.tunnels.pop(self)
        self._pace = self._bucket = None
        self._presence = None
        if self.admitted:
            self._be_judged_again()
        if self.entered:
            old.tenure.leave()
        return True

    def why_forbidden(self) -> Cut | None:
        """Return why the rules do not allow what it has opened; None: they do."""
        record = self.record
        if not self.admitted:
            return Cut(record.result, record.detail)
        knows = getattr(self.gate.authenticators.get(self.auth or ""), "knows", None)
        user = record.user
        if self.auth is not None and (user is None or (knows is not None and not knows(user))):
            return Cut("authentication_failed", f"user {user} after a reload")
        command = self._command
        if command not in self.gate.commands:
            return Cut("command_denied", f"{command} is not among the commands")
        if self.opened is None:
            return None
        try:
            decision = self.decide(*self.opened)
        except OSError:
            return None  # a failure of the system is no reason to end it
        return None if decision.allowed else Cut("destination_denied", decision.rule)

    @property
    def _command(self) -> Command:
        return _COMMAND_OF.get(self.record.command, "forward")

    def _match(self, target: Target) -> RuleMatch:
        auth = self.auth if self.record.user is not None else None
        return RuleMatch(self.client, self.gate.listener, auth, self.record.user, target.port, self._command)

    def decide(self, target: Target, ip: IPAddress | None, found: Sequence[IPAddress] = ()) -> Decision:
        """Decide whether it may reach one address of a target; None: another proxy looks the name up.

        Args:
            found: result of the lookup, which knows the name that was looked up.

        Raises:
            OSError: whether the address is this host's cannot be determined.
        """
        gate = self.gate
        name, also = (found.name or None, found.also) if isinstance(found, Found) else (target.name, ())
        if ip is None:
            return decide_destination(gate.destination_rules, self._match(target), name, ip)
        meant = addresses_meant(ip, gate.nat64)
        own = tuple(filter(gate.this_host.has, meant))
        if self._is_the_proxy(meant, own, target.port):
            return Decision(False, "this is the proxy itself")
        key = (self.record.client, self.auth, self.record.user, self._command, target.host, target.port, own)
        is_address_alone = name is None and not also
        known = gate.known_destinations.get(key) if is_address_alone else None
        if known is None:
            known = decide_destination(
                gate.destination_rules, self._match(target), name, ip, nat64=gate.nat64, own=own, also=also
            )
            if is_address_alone:
                remember(gate.known_destinations, key, known)
        return known

    def _is_the_proxy(self, meant: Sequence[IPAddress], own: Sequence[IPAddress], port: int) -> bool:
        own_ports = self.gate.own_ports
        if port not in own_ports:
            if own_ports and 0 not in own_ports:
                return False
            if self.own is None or port != self.own[1]:
                return False
        here = self.own
        return bool(own) or any((here and ip == here[0]) or ip.is_loopback or ip.is_unspecified for ip in meant)

    def allowed_addresses(self, target: Target, found: Sequence[IPAddress] | None = None) -> list[IPAddress]:
        """Return the addresses of a target that the client may reach, in the order in which to try them.

        Args:
            found: all of them; None: they have not been looked up yet.

        Raises:
            Denied: none of them is allowed.
            OSError: the name cannot be resolved.
        """
        if found is None:
            found = self.addresses_of(target)
        decisions = [(ip, self.decide(target, ip, found)) for ip in found]
        allowed = [ip for ip, decision in decisions if decision.allowed]
        if not allowed:
            raise Denied(decisions[0][1].rule)
        return allowed

    def addresses_of(self, target: Target, by_rules: bool = True) -> Sequence[IPAddress]:
        """Return all addresses of a target, allowed or not.

        A name that the rules deny whatever its addresses is not looked up: its owner would learn of it, and a client
        could send data that way.

        Args:
            by_rules: False: for ourselves, the rules for clients do not apply.

        Raises:
            Denied: the rules deny every name that may be meant.
            OSError: the name cannot be resolved.
        """
        if target.ip is not None:
            if by_rules and self.claim is not None:
                self.found = self.claim
                return self.claim
            return (target.ip,)
        names, denied = self._names_of(target) if by_rules else (None, "")
        began = monotonic()
        resolver = self.gate.resolver
        try:
            if not isinstance(resolver, Resolver):
                return resolver.resolve(target.host)  # it knows nothing of clients
            found = resolver.resolve(target.host, self.client, names)
            if by_rules:
                self.found = found
            return found
        except socket.gaierror:
            # Without a dot it hardly means anything but what was denied; with one it may be a mistaken name.
            if denied and "." not in target.host:
                raise Denied(denied) from None
            raise
        finally:
            self.record.resolved = (self.record.resolved or 0.0) + monotonic() - began

    def knows(self, target: Target) -> bool:
        """Return whether `addresses_of` would not wait. Raise Denied."""
        if target.ip is not None:
            return True
        resolver, names = self.gate.resolver, self._names_of(target)[0]
        return isinstance(resolver, Resolver) and resolver.is_known(target.host, names)

    def _candidates(self, target: Target) -> Sequence[str]:
        """Return the absolute names that a target may mean, without final dots."""
        if target.ip is not None:
            return ()
        resolver = self.gate.resolver
        return resolver.candidates(target.host) if isinstance(resolver, Resolver) else (target.host.removesuffix("."),)

    def _names_of(self, target: Target) -> tuple[tuple[str, ...] | None, str]:
        """Return the names that may be looked up for a target, None if these are all, and the first rule that denies
        one whatever its addresses. Raise Denied if it denies all."""
        gate, candidates = self.gate, self._candidates(target)
        key = (self.record.client, self.auth, self.record.user, self._command, target.host, target.port, *candidates)
        known = gate.known_names.get(key)
        if known is None:
            match = self._match(target)
            match.port = match.port or 1  # BIND without a port: rules about ports do not concern it
            known = names_to_look_up(gate.destination_rules, match, candidates, target.host.removesuffix("."))
            remember(gate.known_names, key, known)
        if known[0] == ():
            raise Denied(known[1])
        return known

    def upstream_to(self, target: Target) -> tuple[Upstream | UpstreamGroup | None, Sequence[IPAddress] | None]:
        """Return the proxy that leads to a target, and the target's addresses if the rules needed them.

        Returns:
            (None: a direct connection; None: not looked up yet.) The caller must use these addresses: another lookup
            may find others, to which another way leads.

        Raises:
            Denied: a rule needs the addresses of a name that must not be looked up.
            OSError: a rule needs the addresses, and they cannot be looked up. The right way is then unknown, and a
                guess may show the name to those who must not see it.
        """
        gate = self.gate
        if not gate.upstream_rules:
            return None, None
        found: Sequence[IPAddress] | None = None

        def addresses() -> Sequence[IPAddress]:
            nonlocal found
            if found is None:
                found = self.addresses_of(target)
            return found

        match, candidates = self._match(target), self._candidates(target)
        name = target.name if self.claim is None else self.claim.name or None
        chosen = choose_upstream(gate.upstream_rules, match, name, addresses, gate.this_host.has, candidates)
        return gate.upstreams.get(chosen), found

    def believe(self, target: Target, named: Target) -> None:
        """Take the name that a transparent listener's client claims for its destination into account, as far as rules
        may believe it.

        A client can claim any name. Rules that deny the name count. Those that allow it, or lead it through an
        upstream, count only if the name has the address, which is looked up only if there are such rules.

        Args:
            target: the address and port that it has connected to.
            named: the name, with the same port.
        """
        assert target.ip is not None
        assert named.name is not None
        found: Sequence[IPAddress] = ()
        if self._may_matter(named):
            try:
                found = self.addresses_of(named)
            except (Denied, OSError):
                pass  # what the name means is not known, or not to be asked: it is not believed
        self.claim = claim = Found((target.ip,))
        claim.name, claim.also, claim.key = "", (named.name,), named.host
        if not set(addresses_meant(target.ip, self.gate.nat64)).isdisjoint(found):
            known = isinstance(found, Found)
            claim.name, claim.also = (found.name, found.also) if known else (named.name, ())  # type: ignore[attr-defined]

    def _may_matter(self, named: Target) -> bool:
        """Return whether a rule allows a name, or one that it may mean, or leads it through an upstream."""
        gate = self.gate
        match = self._match(named)
        rules = [rule for rule in gate.destination_rules if rule.action == "allow"]
        rules += [rule.match for rule in gate.upstream_rules]
        about_names = [rule.destinations for rule in rules if rule.destinations.name is not None and match.fits(rule)]
        names = (named.name or "", *self._candidates(named)) if about_names else ()
        return any(what.has_name(name) for what in about_names for name in names)
