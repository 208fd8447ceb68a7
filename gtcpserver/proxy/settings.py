"""The settings of the proxy, as in the file: a table is a class, a key a field. docs/proxy.md explains all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from gtcpserver.connection.proxy_header import ProxyVersion
from gtcpserver.store.settings import DEFAULT_TIMEOUT, OnStoreFailure

from .gate import Timeouts
from .handler import Speaks
from .http_fields import ForwardedField, ForwardedMode
from .passwords import REMEMBER
from .resolve import Family, Kind
from .rules import COMMANDS, Command
from .transparent import NAME_TIMEOUT, ConnectTo
from .upstream import Resolve
from .upstream_group import Kind as CheckKind
from .upstream_group import Strategy

DEFAULT_LISTEN = "127.0.0.1:1080"

#: Clients admitted when there is no rule: this host.
DEFAULT_CLIENTS = ("allow 127.0.0.0/8", "allow ::1")
DEFAULT_DESTINATIONS = ("allow any",)


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class ListenerTable(_Table):
    """One listener.

    Attributes:
        name: for rules and the log.
        listen: address to listen on.
        speaks: the protocols.
        tproxy: "transparent" gets connections by TPROXY, too (IP_TRANSPARENT).
        connect_to, name_timeout: for "transparent" (`transparent.Interception`).
        commands: what clients may request.
        external: the address to connect from, or one of each family; or "auto", "same", "system" (`gate.External`).
        tls_certfile, tls_keyfile: PEM files: clients speak TLS with this listener.
        acme, acme_email, acme_directory, acme_folder, acme_ca_file: names of a certificate that is ordered, in place of
            those files, and the other arguments of `TLSConfig.acme`.
        tls_client_ca: PEM file of the CAs for client certificates.
        tls_client_auth: whether a client certificate is required.
        proxy_protocol: networks of balancers that send PROXY headers (:class:`gtcpserver.ProxyProtocol`).
    """

    name: str = "default"
    listen: str = DEFAULT_LISTEN
    speaks: Speaks = "mixed"
    tproxy: bool = False
    connect_to: ConnectTo = "address"
    name_timeout: float = NAME_TIMEOUT
    commands: list[Command] = msgspec.field(default_factory=lambda: list(COMMANDS))
    external: str | list[str] = "auto"
    tls_certfile: str | None = None
    tls_keyfile: str | None = None
    acme: list[str] = []
    acme_email: str | None = None
    acme_directory: str | None = None
    acme_folder: str | None = None
    acme_ca_file: str | None = None
    tls_client_ca: str | None = None
    tls_client_auth: Literal["required", "optional"] = "required"
    proxy_protocol: list[str] = []
    proxy_protocol_timeout: float = 5.0


class RulesTable(_Table):
    """Rules, as parsed by `rules` and `upstream`; a missing key is the default, an empty list allows nothing.

    Attributes:
        nat64: prefixes of the network's own NAT64 gateways.
    """

    clients: list[str] | None = None
    destinations: list[str] | None = None
    upstreams: list[str] = []
    nat64: list[str] = []

    @property
    def client_rules(self) -> Sequence[str]:
        return DEFAULT_CLIENTS if self.clients is None else self.clients

    @property
    def destination_rules(self) -> Sequence[str]:
        return DEFAULT_DESTINATIONS if self.destinations is None else self.destinations


class AuthTable(_Table):
    """A user database.

    Attributes:
        users: names and hashed passwords.
        htpasswd: a file with more of them, reloaded when it changes.
        command: a program to ask instead, with the protocol of squid's basic helpers; with its arguments.
        processes: number of processes of the command, asked in parallel.
        timeout: seconds for one answer of the command.
        remember: seconds for which a correct password is accepted without asking again.
        certificate: identify clients by their certificates instead.
        certificate_users: which of these users are admitted; missing: everybody with a valid certificate.
    """

    users: dict[str, str] = {}
    htpasswd: str | None = None
    command: list[str] = []
    processes: int = 4
    timeout: float = 10.0
    remember: float = REMEMBER
    certificate: bool = False
    certificate_users: list[str] | None = None


class UpstreamTable(_Table):
    """Another proxy (see `upstream.Upstream`), or a group of them (see `upstream_group.UpstreamGroup`).

    Attributes:
        url: socks5://[user:password@]host:port and others (`upstream_url`); None for a group.
        members: names of the upstreams in a group.
        strategy: how to choose one of them; missing: "first".
        weights: their shares.
        fall, rise: failures until a member is down, successful checks until it is up.
        check_every: seconds between two checks.
        check: how all members are checked; missing: those that are down are connected to.
        check_target: host:port to connect to through a member, for check = "connect".
        through: name of the upstream through which to reach it.
        resolve: who looks up names.
        send_proxy: send it the client's address in a PROXY header of this version.
        tls_ca: PEM file of the CAs for https; missing: the system's.
        tls_name: the name that the certificate must have; missing: the host in the URL.
    """

    url: str | None = None
    members: list[str] = []
    strategy: Strategy | None = None
    weights: list[int] = []
    fall: int | None = None
    rise: int | None = None
    check_every: float | None = None
    check: CheckKind | None = None
    check_target: str | None = None
    through: str | None = None
    resolve: Resolve = "here"
    send_proxy: ProxyVersion | None = None
    tls_ca: str | None = None
    tls_name: str | None = None


class LimitsTable(_Table):
    """See `limits.Limits`."""

    connections: int | None = None
    client_connections: int | None = None
    user_connections: int | None = None
    connect_attempts: int | None = None
    client_connect_attempts: int | None = None
    udp_associations: int | None = None
    client_udp_associations: int | None = None
    new_per_second: float | None = None
    rate: float | None = None
    user_rate: float | None = None
    request_body: int | None = None


class QuotaTable(_Table):
    """See `quota.Quota`.

    Attributes:
        bytes: of each user in a period.
        users: the same of some users; "none": no limit.
        period: a day or month of UTC.
        file: where to count.
    """

    bytes: int | None = None
    users: dict[str, int | Literal["none"]] = {}
    period: Literal["day", "month"] = "month"
    file: str | None = None


class TimeoutsTable(_Table):
    """See `gate.Timeouts`."""

    negotiate: float = Timeouts.negotiate
    authenticate: float = Timeouts.authenticate
    connect: float = Timeouts.connect
    idle: float | None = Timeouts.idle
    half_closed: float | None = Timeouts.half_closed
    lifetime: float | None = Timeouts.lifetime
    answer: float = Timeouts.answer
    keep_alive: float = Timeouts.keep_alive


class ResolverTable(_Table):
    """See `resolve.Resolver`."""

    family: Family = "any"
    timeout: float = 10.0
    kind: Kind | None = None
    servers: list[str] = []


class UdpTable(_Table):
    """See `udp.Udp`.

    Attributes:
        advertise: an address, or one of each family.
        ports: "FIRST-LAST".
    """

    advertise: str | list[str] = []
    ports: str | None = None
    full_cone: bool = False


class HttpTable(_Table):
    """Settings of HTTP.

    Attributes:
        forwarded: how to treat fields in which a client says for whom it asks.
        forwarded_field: the field that names the client.
        pseudonym: the name of this proxy in Via.
        via: add Via to requests and responses.
        pac: serve a script for browsers at /proxy.pac.
        pac_direct: destinations that it sends past this proxy.
    """

    forwarded: ForwardedMode = "remove"
    forwarded_field: ForwardedField = "x-forwarded-for"
    pseudonym: str | None = None
    via: Literal["on", "off"] = "on"
    pac: bool = False
    pac_direct: list[str] = []


class LogTable(_Table):
    """The access log.

    Attributes:
        style: style of a line.
        at: when a tunnel gets its line: at its end, or also when it is connected.
        file: append the lines to this file instead of standard error; it is reopened after a rename.
        redact: leave destinations out.
    """

    style: Literal["text", "json"] = "text"
    at: Literal["end", "both"] = "end"
    file: str | None = None
    redact: bool = False


class ReloadTable(_Table):
    """What a reload does to what is open.

    Attributes:
        end_forbidden: end tunnels that the new rules do not allow.
    """

    end_forbidden: bool = False


class ProxyConfig(_Table):
    """The whole file; see the tables.

    Attributes:
        shared_limits, on_store_failure, store_timeout: as of Server: limits and bans that hold for several machines.
    """

    listener: list[ListenerTable] = []
    rules: RulesTable = msgspec.field(default_factory=RulesTable)
    auth: dict[str, AuthTable] = {}
    upstream: dict[str, UpstreamTable] = {}
    limits: LimitsTable = msgspec.field(default_factory=LimitsTable)
    quota: QuotaTable = msgspec.field(default_factory=QuotaTable)
    timeouts: TimeoutsTable = msgspec.field(default_factory=TimeoutsTable)
    resolver: ResolverTable = msgspec.field(default_factory=ResolverTable)
    udp: UdpTable = msgspec.field(default_factory=UdpTable)
    http: HttpTable = msgspec.field(default_factory=HttpTable)
    log: LogTable = msgspec.field(default_factory=LogTable)
    reload: ReloadTable = msgspec.field(default_factory=ReloadTable)
    shared_limits: str | None = None
    on_store_failure: OnStoreFailure = "local"
    store_timeout: float = DEFAULT_TIMEOUT
    show_bound_address: bool = True
    fast_open: bool = False
    allow_open: bool = False
