"""Gate: who may come in, who they are, where they may go; and the way there.

The protocols (SOCKS, HTTP) ask it three times: `admit` when a client has connected, `authenticate` when it says who it
is, `open` when it says where it wants to go.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Protocol

from ..connection import Connection
from ..errors import GtcpServerError
from .dial import dial
from .record import AccessRecord, Result
from .resolve import Resolver
from .rules import ClientRule, Decision, DestinationRule, decide_client, decide_destination
from .target import IPAddress, Target, unmapped


class Denied(GtcpServerError):
    """A rule does not allow it; the message names the rule, for the log and not for the client."""


class Authenticator(Protocol):
    """Knows who clients are."""

    def check(self, user: bytes, password: bytes, client: IPAddress) -> bool:
        """Whether this is the user's password. May wait; takes as long for unknown users as for known ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds, by stage.

    Attributes:
        negotiate: until the client has said what it wants, however slowly its bytes come.
        connect: until the destination is connected, over all of its addresses.
        idle: in which nothing moves through a tunnel; None: for ever.
        answer: until an HTTP origin's answer begins, and then between its pieces.
        keep_alive: between two HTTP requests.
    """

    negotiate: float = 30.0
    connect: float = 30.0
    idle: float | None = None
    answer: float = 120.0
    keep_alive: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What all connections of a listener have in common.

    Attributes:
        listener: its name, for rules and the log.
        client_rules, destination_rules: see `rules`.
        authenticators: by name.
        own_ports: of all listeners of this proxy: who is sent there, on this host, comes back.
        source: the address to connect from; None: the system's choice.
        show_bound_address: tell SOCKS clients from where the destination is connected.
    """

    listener: str = "default"
    client_rules: Sequence[ClientRule] = ()
    destination_rules: Sequence[DestinationRule] = ()
    authenticators: Mapping[str, Authenticator] = field(default_factory=dict)
    resolver: Resolver = field(default_factory=Resolver)
    timeouts: Timeouts = Timeouts()
    own_ports: frozenset[int] = frozenset()
    source: IPAddress | None = None
    show_bound_address: bool = True

    def admit(self, conn: Connection) -> Visitor:
        """A client has connected.

        Raises:
            Denied: it may not use this listener.
        """
        address: Any = conn.client_address
        # Who comes by a unix socket is on this host.
        client = (
            unmapped(ip_address(address[0].split("%")[0])) if isinstance(address, tuple) else ip_address("127.0.0.1")
        )
        decision = decide_client(self.client_rules, client, self.listener)
        here: Any = conn.server_address
        own = (unmapped(ip_address(here[0].split("%")[0])), here[1]) if isinstance(here, tuple) else None
        visitor = Visitor(self, client, AccessRecord(str(client), self.listener), decision.auth, own)
        if not decision.allowed:
            visitor.record.result, visitor.record.detail = "client_denied", decision.rule
        return visitor


@dataclass(slots=True)
class Visitor:
    """One client of a gate.

    Attributes:
        auth: the authenticator it has to satisfy; None: nobody asks who it is.
        own: the address and port of the proxy to which it has connected; None for a unix socket.
    """

    gate: Gate
    client: IPAddress
    record: AccessRecord
    auth: str | None
    own: tuple[IPAddress, int] | None = None

    @property
    def admitted(self) -> bool:
        return self.record.result != "client_denied"

    def authenticate(self, user: bytes, password: bytes) -> bool:
        """Whether the client is who it says; afterwards the record and the rules know."""
        assert self.auth is not None
        authenticator = self.gate.authenticators[self.auth]
        name = user.decode("utf-8", "backslashreplace")
        if not authenticator.check(user, password, self.client):
            self.record.result, self.record.detail = "authentication_failed", f"user {name}"
            return False
        self.record.user = name
        return True

    def decide(self, target: Target, ip: IPAddress) -> Decision:
        """Whether it may reach one address of a target."""
        gate = self.gate
        if self._is_the_proxy(ip, target.port):
            return Decision(False, "this is the proxy itself")
        return decide_destination(
            gate.destination_rules,
            client=self.client,
            listener=gate.listener,
            auth=self.auth if self.record.user is not None else None,
            user=self.record.user,
            name=None if target.ip is not None else target.host,
            ip=ip,
            port=target.port,
        )

    def _is_the_proxy(self, ip: IPAddress, port: int) -> bool:
        own_ip, own_port = self.own or (None, 0)
        return (port == own_port or port in self.gate.own_ports) and (
            ip == own_ip or ip.is_loopback or ip.is_unspecified
        )

    def allowed_addresses(self, target: Target) -> list[IPAddress]:
        """Those addresses of a target that the client may reach, in the order in which they should be tried.

        Raises:
            Denied: none of them.
            OSError: the name cannot be resolved.
        """
        found = (target.ip,) if target.ip is not None else self.gate.resolver.resolve(target.host)
        decisions = [(ip, self.decide(target, ip)) for ip in found]
        allowed = [ip for ip, decision in decisions if decision.allowed]
        if not allowed:
            raise Denied(decisions[0][1].rule)
        return allowed

    def open(self, target: Target) -> Connection:
        """Connect to a target. The addresses that were checked are the ones connected to.

        Raises:
            Denied: a rule does not allow it.
            OSError: it cannot be reached.
        """
        record, gate = self.record, self.gate
        record.asked = str(target)
        try:
            connection, ip = dial(
                self.allowed_addresses(target), target.port, timeout=gate.timeouts.connect, source=gate.source
            )
        except Denied as error:
            record.result, record.detail = "destination_denied", str(error)
            raise
        except OSError as error:
            record.result, record.detail = result_of(error), error.strerror or str(error)
            raise
        record.connected = str(Target(str(ip), target.port, ip))
        record.note_opened()
        return connection


def result_of(error: OSError) -> Result:
    """What a failure to connect is called in the record."""
    if isinstance(error, socket.gaierror):
        return "unresolved"
    if isinstance(error, TimeoutError):
        return "connect_timeout"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL):
        return "unreachable"
    return "failed"
