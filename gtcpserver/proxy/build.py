"""Build the objects of a proxy from its settings: authenticators, upstreams, rules, and finally the handlers.

Each function takes the settings of one object, and raises ConfigError if they are wrong.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from gtcpserver.address import Address, parse_address
from gtcpserver.checks import check_number
from gtcpserver.errors import ConfigError
from gtcpserver.files.lent import read_file
from gtcpserver.networks import as_ip
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.shared.column import Column
from gtcpserver.store.settings import StoreSettings, check_store_options
from gtcpserver.store.store import Store
from gtcpserver.tls import Credentials, TLSConfig

from .authenticate import CertificateUsers, CommandAuthenticator, HashedUsers
from .departures import Departures
from .errors import BadTarget
from .gate import Authenticator, External, Gate, Timeouts
from .handler import ProxyHandler, Speaks
from .limits import LimitKeeper, Limits
from .loops import Loops
from .moving import was_intercepted
from .resolve import Resolver
from .rules import COMMANDS, ClientRule, Command, DestinationRule, parse_client_rule, parse_destination_rule
from .settings import (
    AuthTable,
    LimitsTable,
    ListenerTable,
    ProxyConfig,
    TimeoutsTable,
    UdpTable,
)
from .succession import Tenure
from .target import IPAddress, parse_authority, parse_nat64, unmapped
from .this_host import ThisHost
from .transparent import Interception
from .udp import Udp
from .upstream import UnixPath, Upstream
from .upstream_group import HealthCheck, Kind, UpstreamGroup
from .upstream_rules import DIRECT, UpstreamRule, parse_upstream_rule
from .upstream_url import make_tls_context, parse_upstream

if TYPE_CHECKING:
    from .quota import Quota


def make_external(listener: ListenerTable) -> External | list[IPAddress]:
    given = listener.external
    if listener.speaks == "transparent" and given in ("auto", "same"):
        if given == "same":
            raise ConfigError('external cannot be "same" for speaks = "transparent": the address is the destination\'s')
        return "system"
    if given == "auto" and not _may_be_public(parse_address(listener.listen)):
        return "system"  # which costs no lookup per connection
    if isinstance(given, str) and given in get_args(External):
        return given  # type: ignore[return-value]
    texts = [given] if isinstance(given, str) else given
    found = _one_of_each_family(texts)
    if not found:
        raise ConfigError(
            'external must be an address, or one of each family, or "auto", "same" or "system", '
            f"got {', '.join(map(repr, texts)) or 'none'}"
        )
    return found


def _one_of_each_family(texts: Sequence[str]) -> list[IPAddress]:
    """Return addresses, [] if they are not."""
    try:
        found = [unmapped(ip_address(text)) for text in texts]
    except ValueError:
        return []
    return found if len({ip.version for ip in found}) == len(found) else []


def make_udp(table: UdpTable) -> Udp:
    return Udp(
        advertise=make_advertise(table.advertise),
        ports=None if table.ports is None else make_ports(table.ports),
        full_cone=table.full_cone,
    )


def make_advertise(given: str | Sequence[str]) -> list[IPAddress]:
    texts = [given] if isinstance(given, str) else given
    found = _one_of_each_family(texts)
    if len(found) < len(texts) or any(ip.is_unspecified or ip.is_multicast for ip in found):
        raise ConfigError(
            "udp.advertise must be an address that clients reach, or one of each family, "
            f"got {', '.join(map(repr, texts))}"
        )
    return found


def make_ports(text: str) -> range:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        raise ConfigError(f'udp.ports must be a range of ports such as "50000-50999", got {text!r}')
    return range(first, last + 1)


#: The commands of each protocol.
_COMMANDS_OF: dict[Speaks, frozenset[Command]] = {
    "mixed": frozenset(COMMANDS),
    "socks": frozenset(("connect", "bind", "udp")),
    "http": frozenset(("connect", "forward")),
    "transparent": frozenset(("connect",)),
}


def make_commands(listener: ListenerTable) -> frozenset[Command]:
    has = _COMMANDS_OF[listener.speaks]
    commands = has.intersection(listener.commands)
    if not commands:
        raise ConfigError(
            f"commands must have one of {', '.join(name for name in COMMANDS if name in has)} for a listener that "
            f"speaks {listener.speaks!r}, got {', '.join(listener.commands) or 'none'}"
        )
    return commands


def make_interception(listener: ListenerTable) -> Interception:
    """Check the settings of a transparent listener, and that another one has none."""
    if listener.speaks != "transparent":
        for field in msgspec.structs.fields(ListenerTable):
            if field.name in _TRANSPARENT_ONLY and getattr(listener, field.name) != field.default:
                raise ConfigError(f'{field.name} is for speaks = "transparent", got speaks = "{listener.speaks}"')
        return Interception()
    for name in ("tls_certfile", "acme", "proxy_protocol"):
        if getattr(listener, name):
            raise ConfigError(f'{name} is not for speaks = "transparent": clients do not know of the proxy')
    if parse_address(listener.listen).kind == "unix":
        raise ConfigError(f'speaks = "transparent" needs a TCP address, got listen = "{listener.listen}"')
    return Interception(connect_to=listener.connect_to, tproxy=listener.tproxy, name_timeout=listener.name_timeout)


_TRANSPARENT_ONLY = frozenset(("tproxy", "connect_to", "name_timeout"))


def check_not_asked(config: ProxyConfig) -> None:
    """Check that rules ask no passwords of transparent listeners' clients."""
    transparent = [listener for listener in _listeners(config) if listener.speaks == "transparent"]
    names = {listener.name for listener in transparent}
    for rule in make_client_rules(config):
        if rule.auth is not None and (rule.listener in names or (rule.listener is None and names)):
            name = rule.listener or transparent[0].name
            raise ConfigError(
                f"the clients of the transparent listener {name!r} cannot be asked who they are: name other listeners "
                f'in {rule.text!r}, and allow them by address: "allow from NETWORK to {name}"'
            )


def check_tproxy(config: ProxyConfig) -> None:
    """Check that connections by TPROXY have one listener, since the address of their sockets names none."""
    seen: set[int] = set()
    for listener in _listeners(config):
        versions = _versions(parse_address(listener.listen)) if listener.tproxy else set()
        if seen & versions:
            raise ConfigError(f"only one listener can have tproxy = true for IPv{min(seen & versions)}")
        seen |= versions


def _versions(address: Address) -> set[int]:
    """Return the versions of IP that a listener may take, in TPROXY's place."""
    try:
        return {ip_address(address.host).version}
    except ValueError:
        return {4, 6}


def _may_be_public(address: Address) -> bool:
    if address.kind == "unix":
        return False
    try:
        ip = unmapped(ip_address(address.host))
    except ValueError:
        return True
    return ip.is_unspecified or ip.is_global


def make_balancers(listener: ListenerTable) -> ProxyProtocol | None:
    if not listener.proxy_protocol:
        return None
    try:
        return ProxyProtocol(listener.proxy_protocol, listener.proxy_protocol_timeout)
    except ConfigError as error:
        name, _, message = str(error).partition(" ")
        raise ConfigError(f"proxy_protocol{'' if name == 'trusted' else '_' + name} {message}") from None


def make_upstreams(config: ProxyConfig, name: str) -> Upstream | UpstreamGroup:
    """Make an upstream, or a group."""
    table = config.upstream[name]
    options = {key: getattr(table, key) for key in ("strategy", "fall", "rise", "check_every")}
    check = {key: getattr(table, key) for key in ("check", "check_target")}
    given = [key for key, value in (options | check).items() if value is not None] + ["weights"] * bool(table.weights)
    if not table.members:
        if given:
            raise ConfigError(f"{given[0]} is for groups, with members (upstream {name!r} has none)")
        return make_upstream(config, name)
    for key in ("url", "through", "send_proxy", "tls_ca", "tls_name"):
        if getattr(table, key) is not None:
            raise ConfigError(f"a group has members and no {key}, got both for {name!r}")
    if table.resolve != "here":
        raise ConfigError(f"resolve is for the members of a group, got {table.resolve!r} for {name!r}")
    for one in table.members:
        if one not in config.upstream:
            raise ConfigError(f"there is no upstream {one!r}, a member of {name!r}")
        if config.upstream[one].members:
            raise ConfigError(f"members of a group must not be groups, got {one!r} in {name!r}")
        if table.members.count(one) > 1:
            raise ConfigError(f"members must differ (weights give one a larger share), got {one!r} twice in {name!r}")
    _check_upstream_name(name)
    members = [make_upstream(config, one) for one in table.members]
    chosen = {key: value for key, value in options.items() if value is not None}
    return UpstreamGroup(name, members, weights=table.weights, check=make_check(**check), **chosen)


def make_check(check: Kind | None, check_target: str | None) -> HealthCheck | None:
    if check is None and check_target is None:
        return None
    try:
        target = None if check_target is None else parse_authority(check_target)
    except BadTarget as error:
        raise ConfigError(f"check_target must be host:port, got {check_target!r} ({error})") from None
    return HealthCheck(check or "tcp", target)


def _check_upstream_name(name: str) -> None:
    if name == DIRECT or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise ConfigError(f'the name of an upstream must be a word, and not "direct", got {name!r}')


def make_upstream(config: ProxyConfig, name: str) -> Upstream:
    table = config.upstream[name]
    chain = [name]
    # Starting with the one to connect to.
    while (through := config.upstream[chain[-1]].through) is not None:
        if through not in config.upstream:
            raise ConfigError(f"there is no upstream {through!r}, through which {chain[-1]!r} is to be reached")
        if config.upstream[through].members:
            raise ConfigError(f"through must name an upstream, not a group, got {through!r} for {chain[-1]!r}")
        if through in chain:
            raise ConfigError(f"the upstreams {', '.join(chain)} lead through each other")
        chain.append(through)
    _check_upstream_name(name)
    made: Upstream | None = None
    for one in reversed(chain):
        table = config.upstream[one]
        if table.url is None:
            raise ConfigError(f"an upstream needs a url, or members, got neither for {one!r}")
        tls = None
        if table.tls_ca is not None:
            tls = make_tls_context(_read_ca(table.tls_ca))
        made = parse_upstream(one, table.url, made, table.resolve, table.send_proxy, tls, table.tls_name)
    assert made is not None
    first = made.first.target
    if isinstance(first, UnixPath):
        if first.path in _own_paths(config):
            raise ConfigError(f"the upstream {made.first.name!r} is this proxy itself")
        return made
    on_this_host = first.name == "localhost" or (first.ip is not None and first.ip.is_loopback)
    if on_this_host and first.port in _own_ports(config):
        raise ConfigError(f"the upstream {made.first.name!r} is this proxy itself")
    return made


def _read_ca(path: str) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ConfigError(f'tls_ca "{path}" cannot be read: {error.strerror}; expected a PEM file') from None


def _own_ports(config: ProxyConfig) -> frozenset[int]:
    listening = [parse_address(listener.listen) for listener in _listeners(config)]
    return frozenset(address.port for address in listening if address.kind == "tcp")


def _own_paths(config: ProxyConfig) -> frozenset[str]:
    listening = [parse_address(listener.listen) for listener in _listeners(config)]
    return frozenset(address.path for address in listening if address.kind == "unix")


def make_resolver(config: ProxyConfig) -> Resolver:
    table = config.resolver
    return Resolver(table.family, table.timeout, table.kind, table.servers)


def make_store_settings(config: ProxyConfig) -> StoreSettings | None:
    """Check where limits are shared."""
    check_store_options(config.on_store_failure, config.store_timeout)
    if config.shared_limits is None:
        return None
    return StoreSettings(url=config.shared_limits, on_failure=config.on_store_failure, timeout=config.store_timeout)


def make_quota(config: ProxyConfig) -> Quota | None:
    table = config.quota
    if table.file is None:
        if table.bytes is not None or table.users:
            raise ConfigError('quota.file must name a file to count in, such as "/var/lib/gtcpserver/quota"')
        return None
    if not config.auth:
        raise ConfigError("quota is about users, and there is no [auth.NAME]")
    try:
        from .quota import Quota
    except ModuleNotFoundError as missing:
        raise ConfigError(f"quota needs {missing.name}, which this build of Python does not have") from None
    users = {name: None if most == "none" else most for name, most in table.users.items()}
    return Quota(table.file, most=table.bytes, users=users, period=table.period)


def make_limits(config: ProxyConfig) -> Limits:
    return Limits(**{name: getattr(config.limits, name) for name in LimitsTable.__struct_fields__})


def close_authenticator(authenticator: Any) -> None:
    close = getattr(authenticator, "close", None)
    if close is not None:
        close()


def check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be more than 0 seconds, got {value}")


def make_client_rules(config: ProxyConfig) -> list[ClientRule]:
    return [make_client_rule(config, text) for text in config.rules.client_rules]


def make_client_rule(config: ProxyConfig, text: str) -> ClientRule:
    rule = parse_client_rule(text)
    if rule.listener is not None and rule.listener not in {listener.name for listener in _listeners(config)}:
        raise ConfigError(f"there is no listener {rule.listener!r}, in {rule.text!r}")
    if rule.auth is not None and rule.auth not in config.auth:
        raise ConfigError(f"there is no authenticator {rule.auth!r}, in {rule.text!r}")
    return rule


def make_destination_rules(config: ProxyConfig) -> list[DestinationRule]:
    return [make_destination_rule(config, text) for text in config.rules.destination_rules]


def make_destination_rule(config: ProxyConfig, text: str) -> DestinationRule:
    rule = parse_destination_rule(text)
    _check_via(config, rule.via, text)
    return rule


def make_upstream_rules(config: ProxyConfig) -> list[UpstreamRule]:
    return [make_upstream_rule(config, text) for text in config.rules.upstreams]


def make_upstream_rule(config: ProxyConfig, text: str) -> UpstreamRule:
    rule = parse_upstream_rule(text)
    if rule.upstream != DIRECT and rule.upstream not in config.upstream:
        raise ConfigError(f"there is no upstream {rule.upstream!r}, in {text!r}")
    _check_via(config, rule.match.via, text)
    return rule


def _check_via(config: ProxyConfig, via: str | None, text: str) -> None:
    if via is not None and via not in {listener.name for listener in _listeners(config)} | set(config.auth):
        raise ConfigError(f"there is no listener or authenticator {via!r}, in {text!r}")


def make_nat64(config: ProxyConfig) -> tuple[IPv6Network, ...]:
    try:
        return tuple(map(parse_nat64, config.rules.nat64))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_tls(listener: ListenerTable) -> TLSConfig | None:
    options: dict[str, Any] = {
        "client_ca": listener.tls_client_ca,
        "client_auth": "none" if listener.tls_client_ca is None else listener.tls_client_auth,
    }
    if listener.acme:
        return _make_acme(listener, options)
    for name in _OF_ACME.values():
        if getattr(listener, name):
            raise ConfigError(f"{name} needs acme")
    if listener.tls_certfile is None:
        if listener.tls_keyfile is not None:
            raise ConfigError("tls_keyfile needs tls_certfile")
        if listener.tls_client_ca is not None:
            raise ConfigError("tls_client_ca needs tls_certfile or acme")
        return None
    config = TLSConfig(listener.tls_certfile, listener.tls_keyfile, **options)
    Credentials(config)  # reads the files
    return config


#: Keys of a listener, by argument of `TLSConfig.acme`.
_OF_ACME = {name: f"acme_{name}" for name in ("email", "directory", "folder", "ca_file")}


def key_of_tls(listener: ListenerTable) -> str:
    """Return the key that a mistake in a listener's TLS is told at."""
    return next((key for key in ("acme", *_OF_ACME.values()) if getattr(listener, key)), "tls_certfile")


def _make_acme(listener: ListenerTable, options: dict[str, Any]) -> TLSConfig:
    for name in ("tls_certfile", "tls_keyfile"):
        if getattr(listener, name) is not None:
            raise ConfigError(f"{name} cannot be used together with acme")
    given = {name: getattr(listener, key) for name, key in _OF_ACME.items() if getattr(listener, key) is not None}
    try:
        return TLSConfig.acme(listener.acme, **given, **options)
    except ConfigError as error:
        name, _, message = str(error).partition(" ")
        key = "acme" if name == "names" else _OF_ACME.get(name)
        raise (error if key is None else ConfigError(f"{key} {message}")) from None


def check_ordered(config: ProxyConfig) -> None:
    """Check that listeners which share a certificate's folder order the same certificate."""
    seen: dict[tuple[str, str], TLSConfig] = {}
    for listener in _listeners(config):
        tls = make_tls(listener) if listener.acme else None
        if tls is None or tls.managed is None:
            continue
        first = seen.setdefault((tls.managed.folder, tls.managed.names[0]), tls)
        if first.managed != tls.managed:
            raise ConfigError(
                f"listeners whose first name in acme is {tls.managed.names[0]!r} need the same acme keys, or another "
                f"acme_folder, got {', '.join(listener.acme)} for {listener.listen}"
            )


def make_authenticator(table: AuthTable) -> Authenticator:
    kinds = [table.certificate, bool(table.command), bool(table.users or table.htpasswd is not None)]
    if sum(kinds) != 1:
        raise ConfigError("an authenticator needs users or an htpasswd file, or a command, or certificate = true")
    check_number("remember", table.remember, least=0)
    if table.certificate_users is not None and not table.certificate:
        raise ConfigError("certificate_users needs certificate = true")
    if table.certificate:
        return CertificateUsers(table.certificate_users)
    if table.command:
        return CommandAuthenticator(
            table.command, processes=table.processes, timeout=table.timeout, remember=table.remember
        )
    users = {name.encode(): kept for name, kept in table.users.items()}
    return HashedUsers(users, table.htpasswd, remember=table.remember)


def check_names(config: ProxyConfig) -> None:
    """Check that rules can tell listeners and authenticators apart."""
    # Several listeners may share a name: rules are then about all of them.
    for name in (listener.name for listener in _listeners(config)):
        if name == "any" or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise ConfigError(f'the name of a listener must be a word, and not "any", got {name!r}')
        if name in config.auth:
            raise ConfigError(f"a listener and an authenticator must not have the same name, got {name!r}")


def check_places(config: ProxyConfig) -> None:
    """Check that no two listeners have the same address."""
    seen = set()
    for listener in _listeners(config):
        place = _place(parse_address(listener.listen))
        if place in seen:
            raise ConfigError(f"two listeners must not have the same address, got {listener.listen!r} twice")
        seen.add(place)


def check_certificates(config: ProxyConfig) -> None:
    """Check that listeners whose rules ask for a certificate can receive one."""
    asked = {listener.name for listener in _listeners(config) if listener.tls_client_ca is not None}
    for rule in make_client_rules(config):
        if rule.auth is not None and config.auth[rule.auth].certificate:
            if rule.listener is not None and rule.listener not in asked:
                raise ConfigError(f"the listener {rule.listener!r} needs tls_client_ca, for {rule.text!r}")
            if not asked:
                raise ConfigError(f"a listener needs tls_client_ca, for {rule.text!r}")


def check_closed(config: ProxyConfig, elsewhere: bool = False) -> None:
    """Check that the proxy is not open: an open one is found within hours, and abused in its owner's name.

    Args:
        elsewhere: it listens on other sockets than those of the configuration, which may be public.
    """
    if config.allow_open:
        return
    reachable = {listener.name for listener in _listeners(config) if elsewhere or not _is_local(listener)}
    for rule in make_client_rules(config):
        everybody = rule.clients is None or rule.clients.prefixlen == 0
        concerned = bool(reachable) if rule.listener is None else rule.listener in reachable
        if concerned and everybody and rule.action == "allow" and rule.auth is None:
            raise ConfigError(
                f'{rule.text!r} opens the proxy to everybody who can reach it: name networks, add "with auth NAME", '
                "or say allow_open = true"
            )


def _is_local(listener: ListenerTable) -> bool:
    address = parse_address(listener.listen)
    if listener.proxy_protocol or address.kind == "fd":
        return False  # balancers may pass on clients from anywhere; what a descriptor listens on is not known yet
    if address.kind == "unix":
        return True
    try:
        return unmapped(ip_address(address.host)).is_loopback
    except ValueError:
        return address.host == "localhost"


def _listeners(config: ProxyConfig) -> Sequence[ListenerTable]:
    return config.listener or (ListenerTable(),)


# -- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """A proxy that is ready to serve.

    Attributes:
        addresses: addresses to listen on.
        handler: handler for a Server on these addresses.
        access_log: path of the access log file; None: it goes to the same place as other messages.
        needs_transparent: the listening sockets need ListenConfig(transparent=True), for TPROXY.
    """

    addresses: list[Address]
    handler: Any
    access_log: str | None = None
    needs_transparent: bool = False


def make_proxy(config: ProxyConfig) -> Proxy:
    """Make a proxy. Raise ConfigError."""
    check_closed(config)
    check_names(config)
    check_places(config)
    check_certificates(config)
    check_ordered(config)
    check_not_asked(config)
    check_tproxy(config)
    for name in TimeoutsTable.__struct_fields__:
        check_seconds(name, getattr(config.timeouts, name))
    authenticators = {name: make_authenticator(table) for name, table in config.auth.items()}
    resolver = make_resolver(config)
    timeouts = Timeouts(**{name: getattr(config.timeouts, name) for name in TimeoutsTable.__struct_fields__})
    clients, destinations = make_client_rules(config), make_destination_rules(config)
    upstreams = {name: make_upstreams(config, name) for name in config.upstream}
    nat64, this_host = make_nat64(config), ThisHost()
    keeper, departures, loops = LimitKeeper(make_limits(config)), Departures(), Loops()
    tenure, udp = Tenure(config.reload.end_forbidden), make_udp(config.udp)
    quota = make_quota(config)
    addresses, handlers = [], {}
    intercepting: dict[int, ProxyHandler] = {}
    for listener in _listeners(config):
        address = parse_address(listener.listen)
        gate = Gate(
            listener=listener.name,
            commands=make_commands(listener),
            client_rules=clients,
            destination_rules=destinations,
            authenticators=authenticators,
            resolver=resolver,
            timeouts=timeouts,
            own_ports=_own_ports(config),
            upstreams=upstreams,
            upstream_rules=make_upstream_rules(config),
            nat64=nat64,
            this_host=this_host,
            limits=keeper,
            departures=departures,
            loops=loops,
            tenure=tenure,
            external=make_external(listener),
            fast_open=config.fast_open,
            show_bound_address=config.show_bound_address,
            udp=udp,
            quota=quota,
        )
        addresses.append(address)
        handlers[_place(address)] = handler = ProxyHandler(
            gate,
            listener.speaks,
            tls=make_tls(listener),
            proxy_protocol=make_balancers(listener),
            pseudonym=config.http.pseudonym,
            via=config.http.via == "on",
            pac=config.http.pac_direct if config.http.pac else None,
            forwarded=config.http.forwarded,
            forwarded_field=config.http.forwarded_field,
            log_style=config.log.style,
            log_at=config.log.at,
            redact=config.log.redact,
            interception=make_interception(listener),
        )
        if listener.tproxy:
            intercepting |= dict.fromkeys(_versions(address), handler)
    dispatcher = _Dispatcher(handlers, tenure, make_store_settings(config), intercepting)
    return Proxy(addresses, dispatcher, config.log.file, bool(intercepting))


#: A listening address: address and port, (None, port) for all addresses or a name, or a Unix socket's path.
Place = tuple[IPAddress | None, int] | str


def _place(address: Address) -> Place:
    if address.kind == "unix":
        return address.path
    try:
        ip = unmapped(ip_address(address.host))
    except ValueError:
        return None, address.port
    return None if ip.is_unspecified else ip, address.port


class _Dispatcher:
    """Pass each connection to the handler of its listener."""

    def __init__(
        self,
        handlers: dict[Place, ProxyHandler],
        tenure: Tenure,
        store_settings: StoreSettings | None,
        intercepting: dict[int, ProxyHandler],
    ) -> None:
        self._handlers = handlers
        #: By version of IP: the handlers of connections by TPROXY, whose sockets have the client's destination as their
        #: own address.
        self._intercepting = intercepting
        #: Where the server that gets this handler is to share limits.
        self.store_settings = store_settings
        self._only = next(iter(handlers.values())) if len(handlers) == 1 else None
        self.counters: Counter[str] = Counter()
        for handler in handlers.values():
            handler.count_in(self.counters)
        self._tenure = tenure
        #: Makes a proxy of the same file, for a worker that a reload replaces.
        self.make_again: Callable[[], _Dispatcher] | None = None
        self._successor: _Dispatcher | None = None

    @property
    def tls_credentials(self) -> tuple[Credentials, ...]:
        """Certificates of all listeners, for monitors."""
        return tuple(one for handler in self._handlers.values() for one in handler.tls_credentials)

    @property
    def gauges(self) -> dict[str, int]:
        """Return the state of the members of all upstream groups, which the listeners share."""
        return next(iter(self._handlers.values())).gauges

    def share_limits(self, column: Column) -> None:
        """Count together with all processes that have a column."""
        for handler in self._handlers.values():
            handler.share_limits(column)

    def share_store(self, store: Store) -> None:
        """Count together with other machines."""
        for handler in self._handlers.values():
            handler.share_store(store)

    def server_stopped(self) -> None:
        for handler in self._handlers.values():
            handler.server_stopped()
        if self._successor is not None:
            self._successor.server_stopped()

    def retire(self, successor: _Dispatcher) -> None:
        """Let the clients follow to another proxy of the same listeners; shut down when none uses this one any more."""
        for place, handler in self._handlers.items():
            handler.gate.replace_by(successor._handlers[place].gate)
        self._tenure.move_tunnels()
        self._tenure.end(self.server_stopped)

    def worker_replaced(self) -> None:
        """Judge what this worker still serves by the rules of the reload that has replaced it.

        Raises:
            ConfigError, OSError: the file cannot be used; everything stays as it was.
        """
        if self.make_again is None or self._successor is not None:
            return
        successor = self.make_again()
        self.retire(successor)
        self._successor = successor

    def connection_rejected(self, conn: Any) -> None:
        (self._only or self._handler_of_socket(conn.server_address)).connection_rejected(conn)

    def __call__(self, conn: Any) -> None:
        (self._only or self._handler_of_socket(conn.server_address))(conn)

    def may_take_over(self, conn: Any) -> bool:
        """Return whether a connection of another worker has come to a listener that is here, too.

        After an upgrade it may not be: rules and users of the others are not for its clients.
        """
        places = _places_of(conn.server_address)
        if any(place in self._handlers for place in places):
            return True
        if was_intercepted(conn):  # by TPROXY
            return as_ip(conn.server_address[0]).version in self._intercepting
        if self._only is None:
            return False
        # Of any name: systemd may have opened its sockets.
        own = {_place(parse_address(one)) for one in conn.server.addresses}
        return any(place in own for place in places)

    def _handler_of_socket(self, name: Any) -> ProxyHandler:
        """Return the handler for a client's socket by its own address. Raise KeyError."""
        intercepting = self._intercepting
        if not intercepting or not isinstance(name, tuple):
            return self._handler_of(name)
        handler = intercepting.get((ip := as_ip(name[0])).version)
        if handler is None:
            return self._handler_of(name)
        try:
            return self._handler_of(name) if handler.gate.this_host.has(ip) else handler
        except KeyError:
            return handler  # TPROXY of another port of this host
        except OSError:
            return handler  # which asks again

    def _handler_of(self, name: Any) -> ProxyHandler:
        for place in _places_of(name):
            if place in self._handlers:
                return self._handlers[place]
        raise KeyError(name)


def _places_of(name: Any) -> tuple[Place, ...]:
    """Return the places to which a connection with this name (getsockname) may have come."""
    if not isinstance(name, tuple):
        # An abstract name comes as bytes that begin with NUL (unix(7)).
        return ("@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else name,)
    ip, port = as_ip(name[0]), name[1]
    # Port 0: the system has chosen one.
    return (ip, port), (None, port), (ip, 0), (None, 0)
