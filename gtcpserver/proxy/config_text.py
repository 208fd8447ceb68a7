"""Write settings of the proxy as the text of a configuration file. The inverse of `config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .settings import ListenerTable, ProxyConfig, RulesTable

#: Keys that are written even if they have their default: the beginning of any file.
_ALWAYS = {ListenerTable: ("name", "listen", "speaks"), RulesTable: ()}

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def config_text(config: ProxyConfig) -> str:
    """Return TOML (toml.io, version 1.0) that `parse_config` reads as these settings. Defaults are left out."""
    rules = config.rules
    shown = msgspec.structs.replace(
        config,
        listener=config.listener or [ListenerTable()],
        rules=msgspec.structs.replace(
            rules, clients=list(rules.client_rules), destinations=list(rules.destination_rules)
        ),
    )
    return "\n".join(_lines_of(shown)).lstrip("\n") + "\n"


def _lines_of(config: ProxyConfig) -> Iterator[str]:
    tables: list[tuple[str, Any]] = []
    for name, value in _changed(config):
        if isinstance(value, msgspec.Struct):
            tables.append((f"[{name}]", value))
        elif name == "listener":
            tables += [("[[listener]]", one) for one in value]
        elif isinstance(value, Mapping):
            tables += [(f"[{name}.{_key(one)}]", table) for one, table in value.items()]
        else:
            yield f"{name} = {_value(value)}"
    for head, table in tables:
        entries = list(_changed(table))
        if entries:
            yield ""
            yield head
            yield from (f"{name} = {_value(value)}" for name, value in entries)


def _changed(table: msgspec.Struct) -> Iterator[tuple[str, Any]]:
    """Yield the keys whose values are not their defaults."""
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if value is not None and (value != default or field.name in _ALWAYS.get(type(table), ())):
            yield field.name, value


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, which also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {_value(one)}" for name, one in value.items()) + "}"
    items = [_value(one) for one in value]
    if sum(map(len, items)) < 80:
        return f"[{', '.join(items)}]"
    return "[\n" + "".join(f"    {item},\n" for item in items) + "]"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _value(name)
