"""The words of danted.conf: rules in braces, addresses and ports."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from .import_draft import fail, networks, number
from .import_rules import Line, Ports, other_ports
from .target import IPNetwork


@dataclass(slots=True)
class Block:
    """A rule: its kind, and the words of each of its keys."""

    line: Line
    kind: str
    keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def allow(self) -> bool:
        return self.kind.endswith("pass")


@dataclass(frozen=True, slots=True)
class Place:
    """An address of a rule. At most one of networks and name is set; neither: all."""

    networks: tuple[IPNetwork, ...] | None = None
    name: str | None = None
    ports: Ports | None = None


_OPERATORS = ("=", "eq", "!", "!=", "neq", "ne", ">", ">=", "<", "<=", "ge", "ge=", "le", "le=", "gt", "lt")


def host_and_port(line: Line, words: Sequence[str]) -> tuple[str, int]:
    place = place_of(line, words)
    if place.ports is not None and (len(place.ports) > 1 or place.ports[0][0] != place.ports[0][1]):
        fail(line, "one port expected")
    port = place.ports[0][0] if place.ports else 1080
    if place.networks is None:
        return place.name or "*", port
    return str(place.networks[0].network_address), port


def place_of(line: Line, words: Sequence[str]) -> Place:
    """Parse "ADDRESS [port [=] PORT]"."""
    if not words:
        fail(line, "an address expected")
    address, *rest = words
    ports = _ports(line, rest) if rest else None
    if address in ("0/0", "any"):
        return Place(ports=ports)
    try:
        return Place(networks=networks(line, address), ports=ports)
    except ValueError:
        return Place(name=address, ports=ports)


def _ports(line: Line, words: Sequence[str]) -> Ports | None:
    """Parse "port = 80", "port 1 - 1023", "port ge 1024"."""
    keyword, *rest = " ".join(words).replace("=", " = ").replace("-", " - ").split()
    operator = "="
    if rest and (rest[0] in _OPERATORS or rest[:2] in (["!", "="], ["<", "="], [">", "="])):
        operator = rest.pop(0)
    if operator in ("!", "<", ">", "ge", "le") and rest[:1] == ["="]:
        operator += rest.pop(0)
    if keyword.lower() != "port" or len(rest) not in (1, 3) or (len(rest) == 3 and rest[1] != "-"):
        fail(line, f"a port expected, got {' '.join(words)[:80]!r}")
    if len(rest) == 3:
        return ((_port(line, rest[0]), max(_port(line, rest[0]), _port(line, rest[2]))),)
    port = _port(line, rest[0])
    low, high = {
        "=": (port, port), "eq": (port, port), "!=": (port, port), "neq": (port, port), "ne": (port, port),
        ">=": (port, 65535), "ge": (port, 65535), "<=": (1, port), "le": (1, port),
        ">": (port + 1, 65535), "gt": (port + 1, 65535), "<": (1, port - 1), "lt": (1, port - 1),
    }[operator.rstrip() if operator in _OPERATORS else fail(line, f"no such operator: {operator!r}")]  # fmt: skip
    if low > high:
        fail(line, "there is no such port")
    if operator in ("!=", "neq", "ne"):
        return other_ports(((low, high),))
    return ((low, high),)


def _port(line: Line, text: str) -> int:
    if text.isdigit():
        return max(number(line, text, "a port", 0, 65535), 1)
    try:
        return socket.getservbyname(text)
    except (OSError, ValueError):
        fail(line, f"a port expected, got {text[:40]!r}")


def is_address(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except (OSError, ValueError):
        return False
    return True
