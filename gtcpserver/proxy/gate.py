"""Gate: what all clients of a listener have in common: its rules, authenticators, upstreams, limits and time-outs.

`Visitor` is one client of a gate. It has three layers: who it is (`identity`), where it may go (`permission`), and how
to get there (`visitor`). The protocols (SOCKS, HTTP) ask it three times: `admit` when a client has connected,
`authenticate` when it gives its name, `open` when it names its destination.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Network
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.networks import as_ip

from .departures import Departures
from .dial import dial, dial_unix
from .limits import LimitKeeper
from .loops import Loops
from .resolve import Resolver
from .rules import COMMANDS, ClientRule, Command, Decision, DestinationRule, decide_client
from .succession import Tenure
from .target import IPAddress, Target
from .this_host import ThisHost
from .udp import Udp
from .upstream import Place, UnixPath, Upstream
from .upstream_group import HealthCheck, UpstreamGroup
from .upstream_rules import UpstreamRule

if TYPE_CHECKING:
    from .quota import Quota  # needs sqlite3, which some builds of Python do not have


class Authenticator(Protocol):
    """Check who clients are.

    One that has a list of users may have ``knows(user: str) -> bool``: a reload then finds those that were removed.

    One that identifies clients by certificate has ``identify(certificate) -> str | None`` instead of `check`: it
    returns the user of a certificate as decoded by ``ssl.SSLSocket.getpeercert``, None for no user.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.rules import parse_client_rule

        class OneUser:
            def check(self, user, password, client):
                return (user, password) == (b"ada", b"secret")

        rule = parse_client_rule("allow from any to any with auth staff")
        gate = Gate(client_rules=[rule], authenticators={"staff": OneUser()})
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

    Example::

        from gtcpserver.proxy.gate import Gate, Timeouts

        gate = Gate(timeouts=Timeouts(connect=10, idle=600))
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
        loops: finds loops of transparent listeners.
        tenure: counts the clients that use this configuration.
        own_ports: ports this proxy listens on (0: chosen by the system); such a destination on this host would loop
            back to us.
        external: addresses to connect from, one of each family (destinations of the other family are then out of
            reach); or how to choose them.
        fast_open: send HTTP requests in the SYN to origins that have given us a cookie before (TCP Fast Open, RFC 7413;
            tcp(7)). Not used for tunnels: what a client is told about them must be known first.
        show_bound_address: tell SOCKS clients which address the proxy connects from.
        udp: how UDP associations are offered.
        quota: counts the bytes of users; None: nothing does.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule

        gate = Gate(
            commands={"connect"},
            client_rules=[parse_client_rule("allow 10.0.0.0/8")],
            destination_rules=[parse_destination_rule("allow .example.com:443")],
        )
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
    loops: Loops = field(default_factory=Loops)
    tenure: Tenure = field(default_factory=Tenure)
    own_ports: frozenset[int] = frozenset()
    external: External | Sequence[IPAddress] = "auto"
    fast_open: bool = False
    show_bound_address: bool = True
    udp: Udp = field(default_factory=Udp)
    quota: Quota | None = None
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
        with gevent.Timeout(seconds, not_connected(seconds)):
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
            remember(self._clients, host, known)
        return known


def host_of(address: Any) -> str:
    """Return the host in an address as returned by ``accept``. A client on a Unix socket is on this host."""
    return address[0] if isinstance(address, tuple) else "127.0.0.1"


#: Number of clients, and of destinations, that a gate remembers.
MOST_REMEMBERED = 4096


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep a decision; forget all when there are too many."""
    if len(known) >= MOST_REMEMBERED:
        known.clear()
    known[key] = value


def not_connected(seconds: float) -> TimeoutError:
    """Return the error of a connection that took too long."""
    return TimeoutError(f"not connected within {seconds:g} seconds")
