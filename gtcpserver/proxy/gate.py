"""Gate: who is admitted, who they are, where they may go; and how to get there.

The protocols (SOCKS, HTTP) ask it three times: `admit` when a client has connected, `authenticate` when it gives its
name, `open` when it names its destination.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Network
from time import monotonic
from typing import Any, Literal, Protocol, get_args

import gevent

from gtcpserver.admission.proxy_header import network_address
from gtcpserver.connection.connection import Connection
from gtcpserver.errors import GtcpServerError
from gtcpserver.networks import as_ip
from gtcpserver.tls import ConnectionTLS

from .departures import Departures, Presence
from .dial import dial, dial_unix
from .errors import TTL_EXPIRED, Cut, LimitReached, UpstreamError, UpstreamUnreachable
from .limits import LimitKeeper, TokenBucket
from .record import AccessRecord, Result
from .resolve import Found, Resolver, ResolveTimeout
from .rules import ClientRule, Decision, DestinationRule, RuleMatch, decide_client, decide_destination, names_to_look_up
from .source import is_better_source
from .succession import Tenure
from .target import IPAddress, Target, addresses_meant
from .this_host import ThisHost
from .upstream import MOST_HOPS, SUSPICIOUS, Dial, Place, UnixPath, Upstream
from .upstream_group import HealthCheck, UpstreamGroup
from .upstream_rules import UpstreamRule, choose_upstream


class Denied(GtcpServerError):
    """A rule denies it; the message names the rule, for the log and not for the client."""


class Authenticator(Protocol):
    """Check who clients are.

    One that has a list of users may have ``knows(user: str) -> bool``: a reload then finds those that were removed.

    One that identifies clients by certificate has ``identify(certificate) -> str | None`` instead of `check`: it
    returns the user of a certificate as decoded by ``ssl.SSLSocket.getpeercert``, None for no user.
    """

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        """Return whether this is the user's password. May wait; takes as long for unknown users as for known ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Timeouts in seconds, by stage.

    Attributes:
        negotiate: until the client has stated its request, no matter how slowly its bytes arrive.
        authenticate: until an authenticator has checked a password.
        connect: until the destination is connected, over all of its addresses and the upstream proxies on the way.
        idle: without any data through a tunnel; None: no limit.
        half_closed: the same, when one side of a tunnel has ended; None: as before.
        lifetime: of a tunnel, busy or not; None: no limit.
        answer: until an HTTP origin's response begins; also without any progress of a response or a request body.
        keep_alive: between two HTTP requests.
    """

    negotiate: float = 30.0
    authenticate: float = 15.0
    connect: float = 30.0
    idle: float | None = None
    half_closed: float | None = 300.0
    lifetime: float | None = None
    answer: float = 120.0
    keep_alive: float = 300.0


#: Source address of connections to destinations. "auto": the one the client has connected to, so that a host with
#: several addresses uses the one that was asked, if that is public or is on the interface that leads to the
#: destination; "same": that one in any case; "system": chosen by the routing table.
External = Literal["auto", "same", "system"]

#: What clients may request: CONNECT of SOCKS and HTTP, BIND and UDP ASSOCIATE of SOCKS, and HTTP requests to forward
#: ("GET http://...").
Command = Literal["connect", "bind", "udp", "forward"]
COMMANDS: tuple[Command, ...] = get_args(Command)

#: By the command in a record; HTTP's methods are "forward".
_COMMAND_OF: dict[str, Command] = {"CONNECT": "connect", "BIND": "bind", "UDP_ASSOCIATE": "udp"}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What all connections of a listener have in common.

    Attributes:
        listener: its name, for rules and the log.
        commands: commands that clients may use; others are refused before anything is looked up.
        client_rules, destination_rules: see `rules`.
        authenticators: by name.
        upstreams: other proxies, and groups of them, by name.
        upstream_rules: rules that choose an upstream for a destination; see `upstream`.
        nat64: prefixes of the network's own NAT64 gateways: the IPv4 addresses behind them are checked, too.
        this_host: knows the addresses of this host.
        limits: enforces the limits, for all listeners that share it.
        departures: notices clients that give up while they wait.
        tenure: counts the clients that use this configuration.
        own_ports: ports this proxy listens on (0: chosen by the system); such a destination on this host would loop
            back to us.
        external: addresses to connect from, one of each family (destinations of the other family are then out of
            reach); or how to choose them.
        fast_open: send HTTP requests in the SYN to origins that have given us a cookie before (TCP Fast Open, RFC 7413;
            tcp(7)). Not used for tunnels: what a client is told about them must be known first.
        show_bound_address: tell SOCKS clients which address the proxy connects from.
    """

    listener: str = "default"
    commands: Collection[Command] = frozenset(COMMANDS)
    client_rules: Sequence[ClientRule] = ()
    destination_rules: Sequence[DestinationRule] = ()
    authenticators: Mapping[str, Authenticator] = field(default_factory=dict)
    upstreams: Mapping[str, Upstream | UpstreamGroup] = field(default_factory=dict)
    upstream_rules: Sequence[UpstreamRule] = ()
    resolver: Resolver = field(default_factory=Resolver)
    timeouts: Timeouts = Timeouts()
    nat64: tuple[IPv6Network, ...] = ()
    this_host: ThisHost = field(default_factory=ThisHost)
    limits: LimitKeeper = field(default_factory=LimitKeeper)
    departures: Departures = field(default_factory=Departures)
    tenure: Tenure = field(default_factory=Tenure)
    own_ports: frozenset[int] = frozenset()
    external: External | Sequence[IPAddress] = "auto"
    fast_open: bool = False
    show_bound_address: bool = True
    # Cached decisions: rules do not change, and a lookup takes a tenth of the time.
    _clients: dict[str, tuple[IPAddress, str, Decision]] = field(default_factory=dict, init=False, repr=False)
    known_destinations: dict[Any, Decision] = field(default_factory=dict, init=False, repr=False)
    known_names: dict[Any, tuple[tuple[str, ...] | None, str]] = field(default_factory=dict, init=False, repr=False)
    #: Connections that are being opened, by upstream and target.
    under_way: Counter[tuple[str, Target]] = field(default_factory=Counter, init=False, repr=False)

    _successor: list[Gate] = field(default_factory=list, init=False, repr=False)

    @property
    def groups(self) -> list[UpstreamGroup]:
        """Return the groups among the upstreams."""
        return [upstream for upstream in self.upstreams.values() if isinstance(upstream, UpstreamGroup)]

    def check_upstream(self, upstream: Upstream, check: HealthCheck) -> None:
        """Check whether an upstream works. Raise OSError if it does not."""
        seconds = self.timeouts.connect
        with gevent.Timeout(seconds, _not_connected(seconds)):
            check.run(upstream, self._dial_for_check)

    def _dial_for_check(self, place: Place) -> Connection:
        if isinstance(place, UnixPath):
            return dial_unix(place.path)
        addresses = self.resolver.resolve(place.host) if place.ip is None else (place.ip,)
        return dial(addresses, place.port, timeout=self.timeouts.connect, source=self.fixed_source)[0]

    def fixed_source(self, ip: IPAddress) -> IPAddress | None:
        """Return the address in `external` from which to connect to another one; None: it has none."""
        external = self.external
        return None if isinstance(external, str) else next((own for own in external if own.version == ip.version), None)

    @property
    def latest(self) -> Gate:
        """Return the gate of the last reload: this one if there was none."""
        gate = self
        while gate._successor:
            gate = gate._successor[0]
        return gate

    def replace_by(self, successor: Gate) -> None:
        """Let the clients of this gate follow to another one (a reload)."""
        self._successor.append(successor)

    def decide_client(self, address: Any) -> tuple[IPAddress, str, Decision]:
        """Return a client's IP address, its text, and whether the client may use this listener.

        Args:
            address: as returned by ``accept``.
        """
        host = host_of(address)
        known = self._clients.get(host)
        if known is None:
            client = as_ip(host)
            known = client, str(client), decide_client(self.client_rules, client, self.listener)
            _remember(self._clients, host, known)
        return known

    def admit(self, conn: Connection) -> Visitor:
        """Register a client that has connected; `Visitor.leave` must be called at its end."""
        address = network_address(conn)
        client, text, decision = self.decide_client(address)
        visitor = Visitor(self, client, AccessRecord(text, self.listener), decision.auth, conn, address)
        if not decision.allowed:
            visitor.turn_away("client_denied", decision.rule)
        else:
            exceeded = self.limits.enter(address)
            if exceeded:
                visitor.turn_away("limit", exceeded)
            else:
                visitor.entered = True
                self.tenure.enter()
        return visitor


def host_of(address: Any) -> str:
    """Return the host in an address as returned by ``accept``. A client on a Unix socket is on this host."""
    return address[0] if isinstance(address, tuple) else "127.0.0.1"


#: Number of clients, and of destinations, that a gate remembers.
MOST_REMEMBERED = 4096


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= MOST_REMEMBERED:
        known.clear()
    known[key] = value


#: A destination, the address that was chosen (None: another proxy has looked up its name), and all of its addresses,
#: which know the name that was looked up: the arguments of `Visitor.decide`.
Opened = tuple[Target, IPAddress | None, Sequence[IPAddress]]


@dataclass(slots=True, eq=False)
class Visitor:
    """One client of a gate.

    Attributes:
        auth: the authenticator that must confirm it; None: no authentication.
        conn: its connection.
        address: its address as returned by ``accept``.
        admitted: it may use this listener.
        certified: the user named by its certificate; None: none.
        entered: the limits count it.
        entered_users: the users that it is counted as.
        limits: the limits that count it, those of the gate that has admitted it.
        hops: proxies of ours before this one, as far as they were counted (`upstream.MOST_HOPS`).
        announce: called with the record of a tunnel that begins; None: it is not logged before its end.
        found: the addresses of the destination whose name was looked up last.
        opened: what it is connected to.
    """

    gate: Gate
    client: IPAddress
    record: AccessRecord
    auth: str | None
    conn: Connection
    address: Any
    admitted: bool = True
    certified: str | None = None
    entered: bool = False
    entered_users: set[str] = field(default_factory=set)
    hops: int = 0
    announce: Callable[[AccessRecord], object] | None = None
    opened: Opened | None = None
    limits: LimitKeeper = field(init=False)
    _presence: Presence | None = None
    found: Sequence[IPAddress] = ()
    _bucket: TokenBucket | None = None
    _pace: tuple[str | None, Callable[[int], float] | None] | None = None

    def __post_init__(self) -> None:
        self.limits = self.gate.limits

    @property
    def own(self) -> tuple[IPAddress, int] | None:
        """Return the address and port of the proxy that it connected to; None for a Unix socket. A system call."""
        here: Any = self.conn.server_address
        return (as_ip(here[0]), here[1]) if isinstance(here, tuple) else None

    def connection_fields(self) -> dict[str, str | None]:
        """Return what `gtcpserver ctl connections` shows of it."""
        record = self.record
        return {
            "user": record.user,
            "listener": record.listener,
            "destination": record.asked or None,
            "upstream": record.upstream or None,
        }

    def turn_away(self, result: Result, why: str) -> None:
        """Deny it the use of this listener; it will be told so in its own protocol."""
        self.admitted = False
        self.record.result, self.record.detail = result, why

    def leave(self) -> None:
        """Unregister it when its connection has ended."""
        while self.entered_users:
            self.limits.leave_user(self.entered_users.pop())
        if self.entered:
            self.entered = False
            self.limits.leave(self.address)
            self.gate.tenure.leave()

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

    def _be_judged_again(self) -> None:
        was_certified, self.certified = self.certified, None
        decision = self.gate.decide_client(self.address)[2]
        self.auth = decision.auth
        if not decision.allowed:
            self.turn_away("client_denied", decision.rule)
            return
        if was_certified is not None:
            self.record.user = None
        self.show_certificate(self.conn.tls)

    def why_forbidden(self) -> Cut | None:
        """Return why the rules do not allow what it has opened; None: they do."""
        record = self.record
        if not self.admitted:
            return Cut(record.result, record.detail)
        knows = getattr(self.gate.authenticators.get(self.auth or ""), "knows", None)
        user = record.user
        if self.auth is not None and (user is None or (knows is not None and not knows(user))):
            return Cut("authentication_failed", f"user {user} after a reload")
        command = _COMMAND_OF.get(record.command, "forward")
        if command not in self.gate.commands:
            return Cut("command_denied", f"{command} is not among the commands")
        if self.opened is None:
            return None
        try:
            decision = self.decide(*self.opened)
        except OSError:
            return None  # a failure of the system is no reason to end it
        return None if decision.allowed else Cut("destination_denied", decision.rule)

    def may_use(self, command: Command) -> bool:
        """Return whether its listener allows a command; if not, note that in the record."""
        if command in self.gate.commands:
            return True
        self.record.result, self.record.detail = "command_denied", f"{command} is not among the commands"
        return False

    @property
    def presence(self) -> Presence:
        """Return the block in which its departure raises ClientGone: for waits in which nothing is read from it."""
        if self._presence is None:
            self._presence = Presence(self.gate.departures, self.conn)
        return self._presence

    def new_record(self) -> AccessRecord:
        """Return a record for the next request of the same client."""
        self.record = AccessRecord(self.record.client, self.record.listener, user=self.certified)
        return self.record

    # -- who it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_password(self) -> bool:
        """Return whether it must authenticate."""
        return self.auth is not None and self.certified is None

    def show_certificate(self, tls: ConnectionTLS | None) -> None:
        """Identify it by its certificate, if certificates are used here."""
        identify = getattr(self.gate.authenticators.get(self.auth or ""), "identify", None)
        if identify is None or not self.admitted:
            return
        user = identify(tls.peer_certificate or {}) if tls is not None else None
        if user is None:
            self.turn_away("authentication_failed", "no certificate of a user")
            return
        self.certified = user
        self._note_user(user)

    def authenticate(self, user: bytes, password: bytes) -> bool:
        """Return whether the user name and password are correct; if so, note the user for the record and the rules."""
        assert self.auth is not None
        authenticator = self.gate.authenticators[self.auth]
        name = user.decode("utf-8", "backslashreplace")
        right = None
        began = monotonic()
        with self.presence, gevent.Timeout(self.gate.timeouts.authenticate, False):
            right = authenticator.check(user, password, self.client)
        self.record.authenticated = monotonic() - began
        if not right:
            self.record.result = "authentication_failed" if right is False else "authentication_timeout"
            self.record.detail = f"user {name}"
            return False
        self._note_user(name)
        return True

    def _note_user(self, name: str) -> None:
        self.record.user = name
        if name not in self.entered_users and not self.limits.enter_user(name):
            self.entered_users.add(name)

    @property
    def pace(self) -> Callable[[int], float] | None:
        """Return the function that rate-limits its transfers (`limits`)."""
        user = self.record.user
        if self._pace is None or self._pace[0] != user:
            if self._bucket is None:
                self._bucket = self.gate.limits.make_bucket()
            self._pace = (user, self.gate.limits.pace(user, self._bucket))
        return self._pace[1]

    # -- where it goes -----------------------------------------------------------------------------------------------

    def _match(self, target: Target) -> RuleMatch:
        auth = self.auth if self.record.user is not None else None
        return RuleMatch(self.client, self.gate.listener, auth, self.record.user, target.port)

    def decide(self, target: Target, ip: IPAddress | None, found: Sequence[IPAddress] = ()) -> Decision:
        """Decide whether it may reach one address of a target; None: another proxy looks the name up.

        Args:
            found: result of the lookup, which knows the name that was looked up.

        Raises:
            OSError: whether the address is this host's cannot be determined.
        """
        gate = self.gate
        name, also = (found.name, found.also) if isinstance(found, Found) else (target.name, ())
        if ip is None:
            return decide_destination(gate.destination_rules, self._match(target), name, ip)
        meant = addresses_meant(ip, gate.nat64)
        own = tuple(filter(gate.this_host.has, meant))
        if self._is_the_proxy(meant, own, target.port):
            return Decision(False, "this is the proxy itself")
        key = (self.record.client, self.auth, self.record.user, target.host, target.port, own)
        known = gate.known_destinations.get(key) if name is None else None
        if known is None:
            known = decide_destination(
                gate.destination_rules, self._match(target), name, ip, nat64=gate.nat64, own=own, also=also
            )
            if name is None:
                _remember(gate.known_destinations, key, known)
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
        key = (self.record.client, self.auth, self.record.user, target.host, target.port, *candidates)
        known = gate.known_names.get(key)
        if known is None:
            match = self._match(target)
            match.port = match.port or 1  # BIND without a port: rules about ports do not concern it
            known = names_to_look_up(gate.destination_rules, match, candidates, target.host.removesuffix("."))
            _remember(gate.known_names, key, known)
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
        chosen = choose_upstream(gate.upstream_rules, match, target.name, addresses, gate.this_host.has, candidates)
        return gate.upstreams.get(chosen), found

    def open(self, target: Target) -> Connection:
        """Connect to a target, at the addresses that were checked.

        Raises:
            Denied: a rule does not allow it.
            LimitReached: its user has too many connections, or too many connection attempts in progress.
            OSError: it cannot be reached.
        """
        return self._open(target, for_request=False)[0]

    def open_for_request(self, target: Target) -> tuple[Connection, Upstream | None]:
        """Connect to where an HTTP request for a target is sent: the target, or an HTTP proxy that forwards it.

        Raises: as `open`.
        """
        return self._open(target, for_request=True)

    def _open(self, target: Target, for_request: bool) -> tuple[Connection, Upstream | None]:
        record = self.record
        record.asked = str(target)
        forwarding: Upstream | None = None
        self.found = ()
        try:
            self.check_limits()
            upstream, found = self.upstream_to(target)
            if upstream is None:
                connection, ip = self._dial(self.allowed_addresses(target, found), target.port, for_request)
                record.connected = record.asked if ip is target.ip else str(Target(str(ip), target.port, ip))
                self.opened = target, ip, self.found
            elif isinstance(upstream, UpstreamGroup):
                connection, forwarding = self._go_through_group(upstream, target, found, for_request)
            else:
                seconds = self.gate.timeouts.connect
                connection, forwarding = self._go_through_one(upstream, target, found, for_request, seconds)
        except Denied as error:
            record.result, record.detail = "destination_denied", str(error)
            raise
        except OSError as error:
            record.result, record.detail = result_of(error), error.strerror or str(error)
            self._forget(self.found)
            raise
        record.note_opened()
        return connection, forwarding

    def _forget(self, found: Sequence[IPAddress]) -> None:
        """Have a name that could not be connected to looked up again: its address may be an old one."""
        if isinstance(found, Found):
            self.gate.resolver.forget(found)

    def check_limits(self) -> None:
        """Count it for its user. Raise LimitReached."""
        user = self.record.user
        if user is not None and user not in self.entered_users:
            exceeded = self.limits.enter_user(user)
            if exceeded:
                raise LimitReached(errno.EUSERS, exceeded)
            self.entered_users.add(user)

    def _dial(self, addresses: Sequence[IPAddress], port: int, for_request: bool) -> tuple[Connection, IPAddress]:
        return dial(
            self.in_reach(addresses),
            port,
            timeout=self.gate.timeouts.connect,
            source=self.source_to,
            fast_open=self.gate.fast_open and for_request,
            attempts=self.gate.limits.attempts_of(self.address),
        )

    def _go_through_group(
        self, group: UpstreamGroup, target: Target, found: Sequence[IPAddress] | None, for_request: bool
    ) -> tuple[Connection, Upstream | None]:
        until = monotonic() + self.gate.timeouts.connect
        group.begin_checks(self.gate.check_upstream)
        members = group.in_order(self.client)
        for left in range(len(members), 0, -1):
            member = members[-left]
            # Each has its share of the remaining time, so that a silent one leaves time for the others.
            share = max(0.0, until - monotonic()) / left
            try:
                opened = self._go_through_one(member.upstream, target, found, for_request, share)
            except UpstreamUnreachable as error:
                group.note_unreachable(member, error)
                if left == 1:
                    raise
            else:
                group.note_reached(member)
                member.add(opened[0])
                return opened
        raise AssertionError("a member is left")  # pragma: no cover

    def _go_through_one(
        self,
        upstream: Upstream,
        target: Target,
        found: Sequence[IPAddress] | None,
        for_request: bool,
        seconds: float,
    ) -> tuple[Connection, Upstream | None]:
        self.record.upstream = upstream.name
        # It may look the name up again, and find another address than the one that was checked.
        finds_the_same = upstream.resolve == "there" or target.ip is not None
        forwarding = upstream if for_request and upstream.forwards and finds_the_same else None
        return self._go_through(upstream, target, found, forwarding is not None, seconds), forwarding

    def _go_through(
        self, upstream: Upstream, target: Target, found: Sequence[IPAddress] | None, only_to_it: bool, seconds: float
    ) -> Connection:
        if upstream.resolve == "there" and target.ip is None:
            decision = self.decide(target, None)
            if not decision.allowed:
                raise Denied(decision.rule)
            targets = [target]
            self.opened = target, None, ()
        else:
            allowed = self.allowed_addresses(target, found)
            if upstream.is_ipv4_only:
                allowed = [ip for ip in allowed if ip.version == 4]
                if not allowed:
                    raise OSError(errno.ENETUNREACH, f"no IPv4 address, for {upstream.scheme}")
            targets = [Target(str(ip), target.port, ip) for ip in allowed]
            self.opened = target, targets[0].ip, self.found

        def dial_first(proxy: Place) -> Connection:
            if isinstance(proxy, UnixPath):
                return dial_unix(proxy.path)
            addresses = self.addresses_of(proxy, by_rules=False)
            try:
                return self._dial(addresses, proxy.port, False)[0]
            except OSError:
                self._forget(addresses)
                raise

        if only_to_it:
            with gevent.Timeout(seconds, _not_connected(seconds)):
                return upstream.reach(dial_first, self.conn)
        with self._counted_hops(upstream, target) as hops:
            return self._connect_through(upstream, target, targets, dial_first, hops, seconds)

    @contextmanager
    def _counted_hops(self, upstream: Upstream, target: Target) -> Iterator[int]:
        """Count a connection to a target through an upstream; yield the hops to tell it, 0 for none.

        Raises:
            OSError: ELOOP: it has come through too many proxies.
        """
        under_way, key = self.gate.under_way, (upstream.name, target)
        hops = self.hops + 1 if self.hops or under_way[key] >= SUSPICIOUS else 0
        if hops >= MOST_HOPS:
            raise OSError(errno.ELOOP, f"a loop: it came through {self.hops} proxies")
        under_way[key] += 1
        try:
            yield hops
        finally:
            under_way[key] -= 1
            if not under_way[key]:
                del under_way[key]

    def _connect_through(
        self,
        upstream: Upstream,
        target: Target,
        targets: Sequence[Target],
        dial_first: Dial,
        hops: int,
        seconds: float,
    ) -> Connection:
        until = monotonic() + seconds
        for left in range(len(targets), 0, -1):
            one = targets[-left]
            # Each has its share of the remaining time, so that a silent one leaves time for the others.
            share = max(0.0, until - monotonic()) / left
            try:
                with gevent.Timeout(share, _not_connected(seconds)):
                    connection = upstream.connect(one, dial_first, self.conn, hops)
            except (UpstreamError, TimeoutError) as error:
                if left == 1 or isinstance(error, UpstreamUnreachable):
                    raise
            else:
                self.record.connected = str(one)
                self.opened = target, one.ip, self.found
                return connection
        raise AssertionError("a target is left")  # pragma: no cover

    # -- source addresses --------------------------------------------------------------------------------------------

    def in_reach(self, addresses: Sequence[IPAddress]) -> Sequence[IPAddress]:
        """Return the addresses that can be reached from those in `external`. Raise OSError if there are none."""
        external = self.gate.external
        if isinstance(external, str):
            return addresses
        versions = {own.version for own in external}
        reached = [ip for ip in addresses if ip.version in versions]
        if not reached:
            raise OSError(errno.ENETUNREACH, "no address of the families in external")
        return reached

    def source_to(self, ip: IPAddress) -> IPAddress | None:
        """Return the source address for a destination; None: the system's choice."""
        external = self.gate.external
        if not isinstance(external, str):
            return self.gate.fixed_source(ip)
        if external == "system" or (found := self.own) is None:
            return None
        own = found[0]
        if own.version != ip.version or own.is_unspecified:
            return None
        return own if external == "same" or own.is_global or is_better_source(own, ip) else None


def _not_connected(seconds: float) -> TimeoutError:
    return TimeoutError(f"not connected within {seconds:g} seconds")


def result_of(error: OSError) -> Result:
    """Return what the record calls a failure to connect."""
    if isinstance(error, LimitReached):
        return "limit"
    if isinstance(error, socket.gaierror):
        return "unresolved"
    if isinstance(error, ResolveTimeout):
        return "resolve_timeout"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "connect_timeout"
    if error.errno == errno.ECONNREFUSED:
        return "refused"
    if isinstance(error, UpstreamError) and error.errno in (errno.EACCES, errno.EIO):
        return "upstream_failed"
    if error.errno == errno.ELOOP:
        return "loop"
    if error.errno == errno.EADDRNOTAVAIL:
        return "no_port"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, TTL_EXPIRED):
        return "unreachable"
    return "failed"
