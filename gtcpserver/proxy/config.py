"""The proxy's configuration: one TOML file, or what the command line says, and what is made of it.

    [[listener]]
    name = "office"
    listen = "0.0.0.0:1080"
    speaks = "mixed"

    [rules]
    clients = ["allow from 10.0.0.0/8 to office with auth staff"]
    destinations = ["deny .example.com", "allow any"]

    [auth.staff]
    htpasswd = "/etc/proxy/htpasswd"

Every mistake is told with its line and what was expected, and a key that does not exist is a mistake.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal

import msgspec

from ..address import Address, parse_address
from ..errors import ConfigError
from ..tls import Credentials, TLSConfig
from .authenticate import CommandAuthenticator, HashedUsers
from .gate import Authenticator, Gate, Timeouts
from .handler import ProxyHandler, Speaks
from .http_fields import Forwarded
from .resolve import Family, Resolver
from .rules import ClientRule, parse_client_rule, parse_destination_rule
from .target import unmapped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_LISTEN = "127.0.0.1:1080"

#: Who may use the proxy when no rule says so: this host.
DEFAULT_CLIENTS = ("allow 127.0.0.0/8", "allow ::1")
DEFAULT_DESTINATIONS = ("allow any",)


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class ListenerTable(_Table):
    """One listener.

    Attributes:
        name: for rules and the log.
        listen: where.
        speaks: the protocols.
        source: the address to connect from.
        tls_certfile, tls_keyfile: PEM files: clients speak TLS with this listener.
    """

    name: str = "default"
    listen: str = DEFAULT_LISTEN
    speaks: Speaks = "mixed"
    source: str | None = None
    tls_certfile: str | None = None
    tls_keyfile: str | None = None


class RulesTable(_Table):
    clients: list[str] = []
    destinations: list[str] = []


class AuthTable(_Table):
    """Who knows the users.

    Attributes:
        users: names and hashed passwords.
        htpasswd: a file with more of them, which is read again when it changes.
        command: a program that is asked instead, in the protocol of squid's basic helpers; with its arguments.
    """

    users: dict[str, str] = {}
    htpasswd: str | None = None
    command: list[str] = []


class TimeoutsTable(_Table):
    negotiate: float = Timeouts.negotiate
    connect: float = Timeouts.connect
    idle: float | None = Timeouts.idle
    answer: float = Timeouts.answer
    keep_alive: float = Timeouts.keep_alive


class ResolverTable(_Table):
    family: Family = "any"
    timeout: float = 10.0


class HttpTable(_Table):
    forwarded: Forwarded = "off"
    pseudonym: str | None = None


class LogTable(_Table):
    style: Literal["text", "json"] = "text"
    redact: bool = False


class ProxyConfig(_Table):
    """The whole file; see the tables."""

    listener: list[ListenerTable] = []
    rules: RulesTable = msgspec.field(default_factory=RulesTable)
    auth: dict[str, AuthTable] = {}
    timeouts: TimeoutsTable = msgspec.field(default_factory=TimeoutsTable)
    resolver: ResolverTable = msgspec.field(default_factory=ResolverTable)
    http: HttpTable = msgspec.field(default_factory=HttpTable)
    log: LogTable = msgspec.field(default_factory=LogTable)
    show_bound_address: bool = True
    allow_open: bool = False


# -- reading -----------------------------------------------------------------------------------------------------------


def read_config(path: str) -> ProxyConfig:
    """Read a file.

    Raises:
        ConfigError: with the file, the line, and what was expected.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be UTF-8") from None
    return parse_config(text, path)


def parse_config(text: str, path: str = "the configuration") -> ProxyConfig:
    """Read the text of a file; errors as :func:`read_config`."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        config = msgspec.convert(data, ProxyConfig, strict=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        unknown = re.search(r"unknown field `(.*)`", message)
        keys = where.rstrip("`").lstrip(".") + (f".{unknown[1]}" if unknown else "")
        raise ConfigError(f"{path}{_line_of(text, keys.lstrip('.'))}: {_expected(message)}{_named(keys)}") from None
    for what, check in _checks(config):
        try:
            check()
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path}{_line_of(text, what)}: {error}") from None
    return config


def _expected(message: str) -> str:
    return message.replace("Object contains unknown field", "there is no").replace("`", "")


def _named(keys: str) -> str:
    return f" (at {keys.lstrip('.')})" if keys.lstrip(".") else ""


def _line_of(text: str, keys: str) -> str:
    """ " line N" of a key such as "listener[1].port"; "" if it is not found."""
    *tables, key = keys.split(".")
    table = ".".join(tables)
    key = re.sub(r"\[[0-9.]*\]$", "", key)
    seen: dict[str, int] = {}
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if header is not None:
            name = header[2]
            if header[1] == "[[":
                current = f"{name}[{seen.get(name, 0)}]"
                seen[name] = seen.get(name, 0) + 1
            else:
                current = name
            if current == keys or (not table and name == key):
                return f" line {number}"
        elif current == table and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return f" line {number}"
    return ""


def _checks(config: ProxyConfig) -> list[tuple[str, Any]]:
    """What only we know to be wrong: (the key, what raises ConfigError or ValueError)."""
    checks: list[tuple[str, Any]] = []
    for place, listener in enumerate(config.listener):
        checks += [
            (f"listener[{place}].listen", lambda one=listener: parse_address(one.listen)),
            (f"listener[{place}].tls_certfile", lambda one=listener: _tls(one)),
            (f"listener[{place}].source", lambda one=listener: one.source and ip_address(one.source)),
        ]
    checks += [("rules.clients", lambda: _client_rules(config)), ("rules.destinations", lambda: _destinations(config))]
    for name, table in config.auth.items():
        checks.append((f"auth.{name}", lambda table=table: _users(table)))
    for name in TimeoutsTable.__struct_fields__:
        checks.append((f"timeouts.{name}", lambda name=name: _check_seconds(name, getattr(config.timeouts, name))))
    checks.append(("resolver.timeout", lambda: Resolver(config.resolver.family, config.resolver.timeout)))
    checks.append(("rules.clients", lambda: _check_closed(config)))
    return checks


def _check_seconds(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be more than 0 seconds, got {value}")


def _client_rules(config: ProxyConfig) -> list[ClientRule]:
    names = {listener.name for listener in config.listener}
    rules = [parse_client_rule(text) for text in config.rules.clients or DEFAULT_CLIENTS]
    for rule in rules:
        if rule.listener is not None and rule.listener not in names:
            raise ConfigError(f"there is no listener {rule.listener!r}, in {rule.text!r}")
        if rule.auth is not None and rule.auth not in config.auth:
            raise ConfigError(f"there is no authenticator {rule.auth!r}, in {rule.text!r}")
    return rules


def _destinations(config: ProxyConfig) -> list[Any]:
    known = {listener.name for listener in config.listener} | set(config.auth)
    rules = [parse_destination_rule(text) for text in config.rules.destinations or DEFAULT_DESTINATIONS]
    for rule in rules:
        if rule.via is not None and rule.via not in known:
            raise ConfigError(f"there is no listener or authenticator {rule.via!r}, in {rule.text!r}")
    return rules


def _tls(listener: ListenerTable) -> TLSConfig | None:
    if listener.tls_certfile is None:
        if listener.tls_keyfile is not None:
            raise ConfigError("tls_keyfile needs tls_certfile")
        return None
    config = TLSConfig(listener.tls_certfile, listener.tls_keyfile)
    Credentials(config)  # reads the files
    return config


def _users(table: AuthTable) -> Authenticator:
    if table.command:
        if table.users or table.htpasswd is not None:
            raise ConfigError("an authenticator asks a command, or has users: not both")
        return CommandAuthenticator(table.command)
    if not table.users and table.htpasswd is None:
        raise ConfigError("an authenticator needs users, an htpasswd file or a command")
    return HashedUsers({name.encode(): kept for name, kept in table.users.items()}, table.htpasswd)


def _check_closed(config: ProxyConfig) -> None:
    """An open proxy is found within hours, and used for what its owner is then asked about."""
    if config.allow_open or all(map(_is_local, _listeners(config))):
        return
    for rule in _client_rules(config):
        everybody = rule.clients is None or rule.clients.prefixlen == 0
        if everybody and rule.action == "allow" and rule.auth is None:
            raise ConfigError(
                f'{rule.text!r} opens the proxy to everybody who can reach it: name networks, add "with auth NAME", '
                "or say allow_open = true"
            )


def _is_local(listener: ListenerTable) -> bool:
    address = parse_address(listener.listen)
    if address.kind != "tcp":
        return True
    try:
        return unmapped(ip_address(address.host)).is_loopback
    except ValueError:
        return address.host == "localhost"


def _listeners(config: ProxyConfig) -> Sequence[ListenerTable]:
    return config.listener or (ListenerTable(),)


# -- what is made of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """A proxy that is ready to serve.

    Attributes:
        addresses: where it listens.
        handler: for a Server on these addresses.
    """

    addresses: list[Address]
    handler: Any


def make_proxy(config: ProxyConfig) -> Proxy:
    """Make a proxy. Raises ConfigError."""
    for _, check in _checks(config):
        check()
    authenticators = {name: _users(table) for name, table in config.auth.items()}
    resolver = Resolver(config.resolver.family, config.resolver.timeout)
    timeouts = Timeouts(**{name: getattr(config.timeouts, name) for name in TimeoutsTable.__struct_fields__})
    clients, destinations = _client_rules(config), _destinations(config)
    listening = [parse_address(listener.listen) for listener in _listeners(config)]
    own_ports = frozenset(address.port for address in listening if address.kind == "tcp" and address.port)
    addresses, handlers = [], {}
    for listener in _listeners(config):
        address = parse_address(listener.listen)
        gate = Gate(
            listener=listener.name,
            client_rules=clients,
            destination_rules=destinations,
            authenticators=authenticators,
            resolver=resolver,
            timeouts=timeouts,
            own_ports=own_ports,
            source=None if listener.source is None else ip_address(listener.source),
            show_bound_address=config.show_bound_address,
        )
        addresses.append(address)
        place = address.path if address.kind == "unix" else address.port
        if place in handlers:
            raise ConfigError(f"two listeners must not have the same port, got {listener.listen!r} twice")
        handlers[place] = ProxyHandler(
            gate,
            listener.speaks,
            tls=_tls(listener),
            pseudonym=config.http.pseudonym,
            forwarded=config.http.forwarded,
            log_style=config.log.style,
            redact=config.log.redact,
        )
    return Proxy(addresses, _Dispatcher(handlers))


class _Dispatcher:
    """Gives each connection to the handler of its listener."""

    def __init__(self, handlers: dict[Any, ProxyHandler]) -> None:
        self._handlers = handlers
        self._only = next(iter(handlers.values())) if len(handlers) == 1 else None

    def __call__(self, conn: Any) -> None:
        handler = self._only
        if handler is None:
            name = conn.server_address
            handler = self._handlers[name[1] if isinstance(name, tuple) else name]
        handler(conn)
