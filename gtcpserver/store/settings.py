"""StoreSettings: where Redis is, and what holds while it is away; checked at the start, before anything connects."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from gtcpserver.checks import check_number
from gtcpserver.errors import ConfigError

#: What holds while Redis is away: "local": the limits of this machine alone; "allow": no limits of connections and
#: rates; "refuse": nobody new is admitted whose client has a limit.
OnStoreFailure = Literal["local", "allow", "refuse"]

#: Seconds for an answer. In one data centre it takes 0.2 to 1 ms, a pause of Redis (a fork, a slow command) some 20.
DEFAULT_TIMEOUT = 0.05

#: IANA has none for Redis; these are its defaults.
REDIS_PORT = 6379
SENTINEL_PORT = 26379

#: Options in the URL, as redis-py calls those of TLS.
_OPTIONS = frozenset(
    {"prefix", "db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
    | {"sentinel_username", "sentinel_password"}
)

_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "unix")


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """The store of limits that machines share.

    Args:
        url: "redis://[[user]:password@]host[:port][/db]", "rediss://..." with TLS, "unix:///path?db=0", or, by
            sentinels, "redis+sentinel://[[user]:password@]host[:port],host[:port]/service[/db]". In the query:
            ``prefix`` of all keys (services with different ones do not count together), ``ssl_ca_certs``,
            ``ssl_certfile``, ``ssl_keyfile`` (PEM files), ``ssl_cert_reqs=none``, ``ssl_check_hostname=false``,
            ``sentinel_username``, ``sentinel_password``.
        on_failure: what holds while Redis is away.
        timeout: seconds for an answer; after that Redis is away.

    Attributes:
        hosts: the servers, or the sentinels.
        service: the name that sentinels know the master by; "": no sentinels.
        options: the options of the query.

    Raises:
        ConfigError: one of them is invalid, or redis-py is not installed.
    """

    url: str = field(repr=False)
    on_failure: OnStoreFailure = "local"
    timeout: float = DEFAULT_TIMEOUT
    hosts: tuple[tuple[str, int], ...] = field(init=False)
    path: str = field(init=False, default="")
    db: int = field(init=False, default=0)
    service: str = field(init=False, default="")
    tls: bool = field(init=False, default=False)
    username: str | None = field(init=False, default=None)
    password: str | None = field(init=False, default=None, repr=False)
    options: dict[str, str] = field(init=False, repr=False, compare=False)  # it is in the URL, too

    def __post_init__(self) -> None:
        check_store_options(self.on_failure, self.timeout)
        if not isinstance(self.url, str):
            raise ConfigError(f"shared_limits must be a URL, such as redis://host:6379/0, got {self.url!r}")
        self._parse()
        if find_spec("redis") is None:
            raise ConfigError("shared_limits needs the package redis: pip install 'gtcpserver[redis]'")

    @property
    def prefix(self) -> str:
        """The beginning of all keys."""
        return self.options.get("prefix", "gtcpserver")

    def _parse(self) -> None:
        # The message leaves out what may be a password.
        scheme, separator, _ = self.url.partition("://")
        if not separator or scheme not in _SCHEMES:
            known = ", ".join(f"{name}://" for name in _SCHEMES)
            raise _wrong(f"a URL that begins with one of {known}", scheme if separator else "another one")
        try:
            parts = urlsplit(self.url)
        except ValueError:  # whose text may have the password in it
            raise _wrong("a URL", "one that cannot be read: what is special in a password is written as %XX") from None
        if scheme != "unix" and "@" in parts.path:
            raise _wrong("a URL in whose password / is written %2F", "another one")
        if parts.fragment:
            raise _wrong("a URL without #", "one with it: as part of a password it is written %23")
        credentials, _, where = parts.netloc.rpartition("@")
        user, colon, password = credentials.partition(":")
        values: dict[str, Any] = {"options": _options(parts.query), "tls": scheme.startswith("rediss")}
        values["username"] = unquote(user) or None
        values["password"] = unquote(password) if colon else None
        path = unquote(parts.path)
        if scheme == "unix":
            if where or not path.startswith("/"):
                raise _wrong("unix:///path", f"unix://{where}{path}")
            values["path"], values["hosts"], database = path, (), ""
        else:
            names = path.strip("/").split("/") if path.strip("/") else []
            if scheme.endswith("+sentinel"):
                if not names:
                    raise _wrong("a URL with the name of the service, such as redis+sentinel://a,b,c/mymaster", where)
                values["service"] = names.pop(0)
            elif "," in where:
                raise _wrong("a URL with one host (several are for redis+sentinel://)", where)
            port = SENTINEL_PORT if "service" in values else REDIS_PORT
            values["hosts"] = tuple(_host(one, port) for one in where.split(","))
            database = names.pop(0) if names else ""
            if names:
                raise _wrong("a URL that ends with the number of a database", path)
        values["db"] = _database(database or values["options"].get("db", "0"))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        """Return where it is, without the password."""
        if self.path:
            return self.path
        where = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{self.service} of {where}" if self.service else where


def check_store_options(on_failure: Any, timeout: Any) -> None:
    """Raise ConfigError for options that are wrong without a URL, too."""
    if on_failure not in get_args(OnStoreFailure):
        known = ", ".join(map(repr, get_args(OnStoreFailure)))
        raise ConfigError(f"on_store_failure must be one of {known}, got {on_failure!r}")
    check_number("store_timeout", timeout, above=0)


def _wrong(expected: str, given: str) -> ConfigError:
    return ConfigError(f"shared_limits must be {expected}, got {given!r}")


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            shown = name if "@" not in query else "another one"  # perhaps the rest of a password with a ?
            raise _wrong(f"a URL with options among {', '.join(sorted(_OPTIONS))}", shown)
    for name, allowed in (("ssl_cert_reqs", ("required", "none")), ("ssl_check_hostname", ("true", "false"))):
        if options.get(name, allowed[0]) not in allowed:
            raise _wrong(f"a URL whose {name} is {' or '.join(allowed)}", options[name])
    return options


def _host(text: str, port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:\s]+))(?::([0-9]{1,5}))?", text)
    if match is None or not 0 < int(match[3] or port) < 65536:
        raise _wrong("a URL with a host, and a port of 1 to 65535", text)
    return unquote(match[1] or match[2]), int(match[3] or port)


def _database(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise _wrong("a URL whose database is a number", text)
    return int(text)
