"""Gate: who may come in, who they are, where they may go; and the way there.

The protocols (SOCKS, HTTP) ask it three times: `admit` when a client has connected, `authenticate` when it says who it
is, `open` when it says where it wants to go.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
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

from .dial import dial
from .errors import TTL_EXPIRED, LimitReached
from .limits import LimitKeeper, TokenBucket
from .record import AccessRecord, Result
from .resolve import Resolver, ResolveTimeout
from .rules import ClientRule, Decision, DestinationRule, RuleMatch, decide_client, decide_destination
from .source import is_better_source
from .target import IPAddress, Target, addresses_meant
from .this_host import ThisHost
from .upstream import Upstream, UpstreamError, UpstreamRule, UpstreamUnreachable, choose_upstream


class Denied(GtcpServerError):
    """A rule does not allow it; the message names the rule, for the log and not for the client."""


class Authenticator(Protocol):
    """Knows who clients are.

    One that knows them by their certificate has ``identify(certificate) -> str | None`` instead of `check`: the user of
    a certificate as ``ssl.SSLSocket.getpeercert`` decodes it, None if it is nobody's.
    """

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        """Whether this is the user's password. May wait; takes as long for unknown users as for known ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds, by stage.

    Attributes:
        negotiate: until the client has said what it wants, however slowly its bytes come.
        authenticate: until an authenticator has said whether a password is right.
        connect: until the destination is connected, over all of its addresses and the upstream proxies on the way.
        idle: in which nothing moves through a tunnel; None: for ever.
        half_closed: the same, when one side of a tunnel has ended; None: as before.
        lifetime: of a tunnel, whatever moves; None: for ever.
        answer: until an HTTP origin's answer begins; also in which nothing of an answer or of a request's body moves.
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


#: From which address destinations are connected. "auto": from the one the client has connected to, so that a host with
#: several answers from the one that was asked, if it is public or is on the interface by which the destination is
#: reached; "same": from that one in any case; "system": as the routes say.
External = Literal["auto", "same", "system"]

#: What clients may ask for: CONNECT of SOCKS and HTTP, BIND and UDP ASSOCIATE of SOCKS, and the HTTP requests that a
#: proxy forwards ("GET http://...").
Command = Literal["connect", "bind", "udp", "forward"]
COMMANDS: tuple[Command, ...] = get_args(Command)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What all connections of a listener have in common.

    Attributes:
        listener: its name, for rules and the log.
        commands: those that clients may use; others are refused before anything is looked up.
        client_rules, destination_rules: see `rules`.
        authenticators: by name.
        upstreams: other proxies, by name.
        upstream_rules: which of them leads where; see `upstream`.
        nat64: prefixes of the network's own NAT64 gateways: the IPv4 addresses behind them are looked at, too.
        this_host: knows the addresses of this host.
        limits: keeps them, for all listeners that are given it.
        own_ports: of all listeners of this proxy, 0 for one that the system has chosen: who is sent there, on this
            host, comes back.
        external: the addresses to connect from, one of each family (destinations of the other family are then out of
            reach); or how they are found.
        fast_open: send HTTP requests in the SYN to origins that have given us a cookie before (TCP Fast Open, RFC 7413;
            tcp(7)). Tunnels are not begun so: what a client is told of them must be known first.
        show_bound_address: tell SOCKS clients from where the destination is connected.
    """

    listener: str = "default"
    commands: Collection[Command] = frozenset(COMMANDS)
    client_rules: Sequence[ClientRule] = ()
    destination_rules: Sequence[DestinationRule] = ()
    authenticators: Mapping[str, Authenticator] = field(default_factory=dict)
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)
    upstream_rules: Sequence[UpstreamRule] = ()
    resolver: Resolver = field(default_factory=Resolver)
    timeouts: Timeouts = Timeouts()
    nat64: tuple[IPv6Network, ...] = ()
    this_host: ThisHost = field(default_factory=ThisHost)
    limits: LimitKeeper = field(default_factory=LimitKeeper)
    own_ports: frozenset[int] = frozenset()
    external: External | Sequence[IPAddress] = "auto"
    fast_open: bool = False
    show_bound_address: bool = True
    # Decisions that were made: rules do not change, and a look takes a tenth of the time.
    _clients: dict[str, tuple[IPAddress, str, Decision]] = field(default_factory=dict, init=False, repr=False)
    known_destinations: dict[Any, Decision] = field(default_factory=dict, init=False, repr=False)

    def admit(self, conn: Connection) -> Visitor:
        """A client has connected; `Visitor.leave` must be called at its end."""
        address = network_address(conn)
        host = host_of(address)
        known = self._clients.get(host)
        if known is None:
            client = as_ip(host)
            known = client, str(client), decide_client(self.client_rules, client, self.listener)
            _remember(self._clients, host, known)
        client, text, decision = known
        visitor = Visitor(self, client, AccessRecord(text, self.listener), decision.auth, conn, address)
        if not decision.allowed:
            visitor.turn_away("client_denied", decision.rule)
        else:
            exceeded = self.limits.enter(address)
            if exceeded:
                visitor.turn_away("limit", exceeded)
            else:
                visitor.entered = True
        return visitor


def host_of(address: Any) -> str:
    """The host in an address as ``accept`` names it. Who comes by a unix socket is on this one."""
    return address[0] if isinstance(address, tuple) else "127.0.0.1"


#: What a gate remembers of clients and of destinations, each.
MOST_REMEMBERED = 4096


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= MOST_REMEMBERED:
        known.clear()
    known[key] = value


@dataclass(slots=True)
class Visitor:
    """One client of a gate.

    Attributes:
        auth: the authenticator it has to satisfy; None: nobody asks who it is.
        conn: its connection.
        address: where it comes from, as ``accept`` names it.
        admitted: it may use this listener.
        certified: the user that its certificate says it is; None: none does.
        entered: the limits count it.
        entered_users: the users that it is counted as.
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
    _bucket: TokenBucket | None = None
    _pace: tuple[str | None, Callable[[int], float] | None] | None = None

    @property
    def own(self) -> tuple[IPAddress, int] | None:
        """The address and port of the proxy to which it has connected; None for a unix socket. A system call."""
        here: Any = self.conn.server_address
        return (as_ip(here[0]), here[1]) if isinstance(here, tuple) else None

    def turn_away(self, result: Result, why: str) -> None:
        """It may not use this listener, and will be told in the words of its protocol."""
        self.admitted = False
        self.record.result, self.record.detail = result, why

    def leave(self) -> None:
        """Its connection has ended."""
        if self.entered:
            self.gate.limits.leave(self.address)
            self.entered = False
        while self.entered_users:
            self.gate.limits.leave_user(self.entered_users.pop())

    def may_use(self, command: Command) -> bool:
        """Whether its listener has a command; the record is told if not."""
        if command in self.gate.commands:
            return True
        self.record.result, self.record.detail = "command_denied", f"{command} is not among the commands"
        return False

    def new_record(self) -> AccessRecord:
        """For the next request of the same client."""
        self.record = AccessRecord(self.record.client, self.record.listener, user=self.certified)
        return self.record

    # -- who it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_password(self) -> bool:
        """Whether it has to say who it is."""
        return self.auth is not None and self.certified is None

    def show_certificate(self, tls: ConnectionTLS | None) -> None:
        """See who it is by its certificate, if that is what counts here."""
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
        """Whether the client is who it says; afterwards the record and the rules know."""
        assert self.auth is not None
        authenticator = self.gate.authenticators[self.auth]
        name = user.decode("utf-8", "backslashreplace")
        right = None
        began = monotonic()
        with gevent.Timeout(self.gate.timeouts.authenticate, False):
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
        if name not in self.entered_users and not self.gate.limits.enter_user(name):
            self.entered_users.add(name)

    @property
    def pace(self) -> Callable[[int], float] | None:
        """What slows its transfers down (`limits`)."""
        user = self.record.user
        if self._pace is None or self._pace[0] != user:
            if self._pace is None:
                self._bucket = self.gate.limits.make_bucket()
            self._pace = (user, self.gate.limits.pace(user, self._bucket))
        return self._pace[1]

    # -- where it goes -----------------------------------------------------------------------------------------------

    def _match(self, target: Target) -> RuleMatch:
        auth = self.auth if self.record.user is not None else None
        return RuleMatch(self.client, self.gate.listener, auth, self.record.user, target.port)

    def decide(self, target: Target, ip: IPAddress | None) -> Decision:
        """Whether it may reach one address of a target; None: another proxy looks the name up.

        Raises:
            OSError: it cannot be found out whether the address is this host's.
        """
        gate = self.gate
        name = None if target.ip is not None else target.host
        if ip is None:
            return decide_destination(gate.destination_rules, self._match(target), name, ip)
        meant = addresses_meant(ip, gate.nat64)
        own = tuple(filter(gate.this_host.has, meant))
        if self._is_the_proxy(meant, own, target.port):
            return Decision(False, "this is the proxy itself")
        key = (self.record.client, self.auth, self.record.user, target.host, target.port, own)
        known = gate.known_destinations.get(key) if name is None else None
        if known is None:
            known = decide_destination(gate.destination_rules, self._match(target), name, ip, nat64=gate.nat64, own=own)
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
        """Those addresses of a target that the client may reach, in the order in which they should be tried.

        Args:
            found: all of them; None: they have not been looked up yet.

        Raises:
            Denied: none of them.
            OSError: the name cannot be resolved.
        """
        if found is None:
            found = self.addresses_of(target)
        decisions = [(ip, self.decide(target, ip)) for ip in found]
        allowed = [ip for ip, decision in decisions if decision.allowed]
        if not allowed:
            raise Denied(decisions[0][1].rule)
        return allowed

    def addresses_of(self, target: Target) -> Sequence[IPAddress]:
        """All addresses of a target, allowed or not. Raises OSError: the name cannot be resolved."""
        if target.ip is not None:
            return (target.ip,)
        began = monotonic()
        try:
            return self.gate.resolver.resolve(target.host)
        finally:
            self.record.resolved = (self.record.resolved or 0.0) + monotonic() - began

    def upstream_to(self, target: Target) -> tuple[Upstream | None, Sequence[IPAddress] | None]:
        """The proxy that leads there, and the addresses of the target if the rules have asked for them.

        Returns:
            (None: the way is direct; None: they have not been looked up.) Who goes on takes these addresses: another
            look-up may find others, to which another way leads.

        Raises:
            OSError: a rule asks for the addresses, and they cannot be looked up. Which way is the right one is not
                known then, and to guess may show the name to those who must not see it.
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

        name = None if target.ip is not None else target.host
        chosen = choose_upstream(gate.upstream_rules, self._match(target), name, addresses, gate.this_host.has)
        return gate.upstreams.get(chosen), found

    def open(self, target: Target) -> Connection:
        """Connect to a target. The addresses that were checked are the ones connected to.

        Raises:
            Denied: a rule does not allow it.
            LimitReached: its user has too many connections, or too many attempts to connect are under way.
            OSError: it cannot be reached.
        """
        return self._open(target, for_request=False)[0]

    def open_for_request(self, target: Target) -> tuple[Connection, Upstream | None]:
        """Connect to where an HTTP request to a target is sent: there, or an HTTP proxy that forwards it.

        Raises: as `open`.
        """
        return self._open(target, for_request=True)

    def _open(self, target: Target, for_request: bool) -> tuple[Connection, Upstream | None]:
        record = self.record
        record.asked = str(target)
        forwarding: Upstream | None = None
        try:
            self.check_limits()
            upstream, found = self.upstream_to(target)
            if upstream is None:
                connection, ip = self._dial(self.allowed_addresses(target, found), target.port, for_request)
                record.connected = record.asked if ip is target.ip else str(Target(str(ip), target.port, ip))
            else:
                record.upstream = upstream.name
                # It may look a name up again, and find another address than the one that was checked.
                finds_the_same = upstream.resolve == "there" or target.ip is not None
                forwarding = upstream if for_request and upstream.scheme == "http" and finds_the_same else None
                connection = self._go_through(upstream, target, found, forwarding is not None)
        except Denied as error:
            record.result, record.detail = "destination_denied", str(error)
            raise
        except OSError as error:
            record.result, record.detail = result_of(error), error.strerror or str(error)
            raise
        record.note_opened()
        return connection, forwarding

    def check_limits(self) -> None:
        """Count it for its user. Raises LimitReached."""
        user = self.record.user
        if user is not None and user not in self.entered_users:
            exceeded = self.gate.limits.enter_user(user)
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

    def _go_through(
        self, upstream: Upstream, target: Target, found: Sequence[IPAddress] | None, only_to_it: bool
    ) -> Connection:
        if upstream.resolve == "there" and target.ip is None:
            decision = self.decide(target, None)
            if not decision.allowed:
                raise Denied(decision.rule)
            targets = [target]
        else:
            targets = [Target(str(ip), target.port, ip) for ip in self.allowed_addresses(target, found)]

        def dial_first(proxy: Target) -> Connection:
            return self._dial(self.addresses_of(proxy), proxy.port, False)[0]

        seconds = self.gate.timeouts.connect
        if only_to_it:
            with gevent.Timeout(seconds, _not_connected(seconds)):
                return upstream.reach(dial_first, self.conn)
        until = monotonic() + seconds
        for left in range(len(targets), 0, -1):
            one = targets[-left]
            # Each has its share of what is left, so that one that does not answer leaves time for the others.
            share = max(0.0, until - monotonic()) / left
            try:
                with gevent.Timeout(share, _not_connected(seconds)):
                    connection = upstream.connect(one, dial_first, self.conn)
            except (UpstreamError, TimeoutError) as error:
                if left == 1 or isinstance(error, UpstreamUnreachable):
                    raise
            else:
                self.record.connected = str(one)
                return connection
        raise AssertionError("a target is left")  # pragma: no cover

    # -- from which address ------------------------------------------------------------------------------------------

    def in_reach(self, addresses: Sequence[IPAddress]) -> Sequence[IPAddress]:
        """Those that can be reached from the addresses in `external`. Raises OSError: none."""
        external = self.gate.external
        if isinstance(external, str):
            return addresses
        versions = {own.version for own in external}
        reached = [ip for ip in addresses if ip.version in versions]
        if not reached:
            raise OSError(errno.ENETUNREACH, "no address of the families in external")
        return reached

    def source_to(self, ip: IPAddress) -> IPAddress | None:
        """The address from which it is connected to another one; None: the system's choice."""
        external = self.gate.external
        if not isinstance(external, str):
            return next((own for own in external if own.version == ip.version), None)
        if external == "system" or (found := self.own) is None:
            return None
        own = found[0]
        if own.version != ip.version or own.is_unspecified:
            return None
        return own if external == "same" or own.is_global or is_better_source(own, ip) else None


def _not_connected(seconds: float) -> TimeoutError:
    return TimeoutError(f"not connected within {seconds:g} seconds")


def result_of(error: OSError) -> Result:
    """What a failure to connect is called in the record."""
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
    if error.errno == errno.EADDRNOTAVAIL:
        return "no_port"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, TTL_EXPIRED):
        return "unreachable"
    return "failed"
