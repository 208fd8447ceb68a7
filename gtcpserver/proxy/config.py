"""The configuration of the proxy: one TOML file.

    [[listener]]
    name = "office"
    listen = "0.0.0.0:1080"
    speaks = "mixed"

    [rules]
    clients = ["allow from 10.0.0.0/8 to office with auth staff"]
    destinations = ["deny .example.com", "allow any"]

    [auth.staff]
    htpasswd = "/etc/proxy/htpasswd"

Every mistake is reported with its line and what was expected; unknown keys are mistakes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import msgspec

from gtcpserver.address import parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.files.toml_file import Lines, parse_text, read_text

from .build import (
    Proxy,
    check_certificates,
    check_closed,
    check_names,
    check_not_asked,
    check_ordered,
    check_places,
    check_seconds,
    check_tproxy,
    close_authenticator,
    key_of_tls,
    make_authenticator,
    make_balancers,
    make_client_rule,
    make_commands,
    make_destination_rule,
    make_external,
    make_interception,
    make_limits,
    make_nat64,
    make_proxy,
    make_resolver,
    make_store_settings,
    make_tls,
    make_upstream_rule,
    make_upstreams,
)
from .http_fields import check_pseudonym
from .pac import check_direct
from .resolve import parse_server
from .settings import AuthTable, ListenerTable, ProxyConfig, TimeoutsTable, UpstreamTable

__all__ = ["Proxy", "ProxyConfig", "make_proxy", "parse_config", "read_config"]

#: Report at most this many mistakes; a file with more of them is some other file.
MOST_MISTAKES = 50


def read_config(path: str) -> ProxyConfig:
    """Read a file.

    Raises:
        ConfigError: with the file and, in a line for each mistake, the line and what was expected.
    """
    return parse_config(read_text(path), path)


def parse_config(text: str, path: str = "the configuration") -> ProxyConfig:
    """Read the text of a file; raise errors as :func:`read_config`."""
    data = parse_text(text, path)
    mistakes = list(_mistakes_of_form(data, text))
    if not mistakes:
        config = msgspec.convert(data, ProxyConfig, strict=True)
        mistakes = list(_mistakes_of_meaning(config, text))
    if mistakes:
        raise ConfigError("\n".join(f"{path}{mistake}" for mistake in mistakes[:MOST_MISTAKES]))
    return config


# -- form: keys and types ----------------------------------------------------------------------------------------------


def _mistakes_of_form(data: dict[str, Any], text: str) -> Iterator[str]:
    # Table by table, since msgspec only reports the first mistake of each.
    for key, kind in (("listener", ListenerTable), ("auth", AuthTable), ("upstream", UpstreamTable)):
        tables = data.get(key)
        if isinstance(tables, list) and key == "listener":
            named = [(f"listener[{place}]", table) for place, table in enumerate(tables)]
        elif isinstance(tables, dict) and key != "listener":
            named = [(f"{key}.{name}", table) for name, table in tables.items()]
        else:
            continue
        data = {**data, key: type(tables)()}
        for name, table in named:
            yield from _mistakes_in(table, kind, name, text)
    for key, value in data.items():
        yield from _mistakes_in({key: value}, ProxyConfig, "", text)


def _mistakes_in(value: Any, kind: type[Any], name: str, text: str) -> Iterator[str]:
    entries = [{key: one} for key, one in value.items()] if isinstance(value, dict) else [value]
    try:
        msgspec.convert(value, kind, strict=True)
        return
    except msgspec.ValidationError as error:
        if "missing required" in str(error):
            yield _mistake_of_form(error, kind, name, text)
    for entry in entries:
        try:
            msgspec.convert(entry, kind, strict=True)
        except msgspec.ValidationError as error:
            if "missing required" not in str(error):
                yield _mistake_of_form(error, kind, name, text)


def _mistake_of_form(error: msgspec.ValidationError, kind: type[Any], name: str, text: str) -> str:
    message, _, where = str(error).partition(" - at `$")
    unknown = re.search(r"unknown field `(.*)`", message)
    keys = name + where.rstrip("`") + (f".{unknown[1]}" if unknown else "")
    keys = keys.lstrip(".")
    message = message.replace("Object contains unknown field", "there is no").replace("Object missing", "there is no")
    near = _near(unknown[1], kind, where.rstrip("`")) if unknown else ""
    return f"{_line_of(text, keys)}: {message.replace('`', '')}{f' (at {keys})' if keys else ''}{near}"


def _near(unknown: str, kind: Any, where: str) -> str:
    """Return a suggestion for an unknown key, in the table at ``where`` of an object of type ``kind``."""
    for word in where.strip(".").split("."):
        kind = get_type_hints(kind).get(word, None) if word else kind
        if not hasattr(kind, "__struct_fields__"):
            return ""
    near = difflib.get_close_matches(unknown.replace("-", "_"), kind.__struct_fields__, 1)
    return f"; did you mean {near[0]}?" if near else ""


# -- meaning -----------------------------------------------------------------------------------------------------------


def _mistakes_of_meaning(config: ProxyConfig, text: str) -> Iterator[str]:
    told = set()
    for keys, check, quoted in _checks(config):
        try:
            check()
        except (ConfigError, ValueError) as error:
            if str(error) in told:  # by a check of a single setting, before those of several
                continue
            told.add(str(error))
            yield f"{_line_of_quoted(text, quoted) or _line_of(text, keys)}: {error} (at {keys})"


def _checks(config: ProxyConfig) -> Iterator[tuple[str, Callable[[], object], str]]:
    """Yield the checks that only we know: the key, what raises ConfigError or ValueError, and the text in question."""
    for place, listener in enumerate(config.listener):
        name = f"listener[{place}]"
        yield f"{name}.listen", lambda one=listener: parse_address(one.listen), ""  # type: ignore[misc]
        yield f"{name}.speaks", lambda one=listener: make_interception(one), ""  # type: ignore[misc]
        yield f"{name}.commands", lambda one=listener: make_commands(one), ""  # type: ignore[misc]
        yield f"{name}.{key_of_tls(listener)}", lambda one=listener: make_tls(one), ""  # type: ignore[misc]
        yield f"{name}.external", lambda one=listener: make_external(one), ""  # type: ignore[misc]
        yield f"{name}.proxy_protocol", lambda one=listener: make_balancers(one), ""  # type: ignore[misc]
    for key, make in (
        ("clients", make_client_rule),
        ("destinations", make_destination_rule),
        ("upstreams", make_upstream_rule),
    ):
        for text in getattr(config.rules, key) or ():
            yield f"rules.{key}", lambda make=make, text=text: make(config, text), text  # type: ignore[misc]
    yield "rules.nat64", lambda: make_nat64(config), ""
    # Settings that others refer to come first: later checks may rely on them.
    for name, table in config.auth.items():
        yield f"auth.{name}", lambda one=table: close_authenticator(make_authenticator(one)), ""  # type: ignore[misc]
    for name in config.upstream:
        yield f"upstream.{name}", lambda name=name: make_upstreams(config, name), ""  # type: ignore[misc]
    yield "limits", lambda: make_limits(config), ""
    yield "shared_limits", lambda: make_store_settings(config), ""
    for name in TimeoutsTable.__struct_fields__:
        seconds = getattr(config.timeouts, name)
        yield f"timeouts.{name}", lambda name=name, s=seconds: check_seconds(name, s), ""  # type: ignore[misc]
    yield "resolver.servers", lambda: [parse_server(text) for text in config.resolver.servers], ""
    yield "resolver.timeout", lambda: make_resolver(config), ""
    yield "http.pseudonym", lambda: check_pseudonym(config.http.pseudonym), ""
    yield "http.pac_direct", lambda: check_direct(config.http.pac_direct), ""
    yield "listener", lambda: check_names(config), ""
    yield "listener", lambda: check_places(config), ""
    yield "listener", lambda: check_tproxy(config), ""
    yield "listener", lambda: check_ordered(config), ""
    yield "rules.clients", lambda: check_not_asked(config), ""
    yield "rules.clients", lambda: check_certificates(config), ""
    yield "rules.clients", lambda: check_closed(config), ""


# -- lines -------------------------------------------------------------------------------------------------------------


def _line_of_quoted(text: str, quoted: str) -> str:
    """Return " line N" of a quoted text; "" if it is not found."""
    if quoted:
        for number, line in enumerate(text.splitlines(), 1):
            if f'"{quoted}"' in line or f"'{quoted}'" in line:
                return f" line {number}"
    return ""


def _line_of(text: str, keys: str) -> str:
    """Return " line N" of a key such as "listener[1].port"; "" if it is not found."""
    line = Lines(text).of(keys)
    return "" if line is None else f" line {line}"
