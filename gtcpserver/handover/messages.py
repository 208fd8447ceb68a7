"""The packets of a line between two workers. No I/O here.

A packet is a JSON object: `version`, and any of these lists. Numbers identify a connection on this line.

| from the old worker | means |
| --- | --- |
| offer | pairs of number and state; the descriptors come with the packet, in this order |
| go | serve these |
| withdrawn | forget these: they stay |

| from the new worker | means |
| --- | --- |
| ready | they have their places here |
| refused | pairs of number and reason: they stay with the old worker |
| serving | their handlers have begun |

Each connection has one descriptor, or as many as `descriptors` in its state says: a tunnel.

A worker of another version refuses each offer ("version"), so every version keeps the names above, and an offer's pairs
begin with the number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1

#: Most bytes of a packet. A unix socket's send buffer, which must hold the packet, is 208 KiB (net.core.wmem_default).
MAX_BYTES = 128 * 1024

#: Most bytes of one connection's state: its session and what was read ahead.
MAX_STATE = 64 * 1024

#: Most connections in one packet. The kernel passes 253 descriptors at once (SCM_MAX_FD in net/scm.h); these are about
#: a millisecond of work, in which other connections wait.
MAX_OFFERS = 32

#: Most descriptors of one connection: of a tunnel two sockets, and both ends of a pipe for each direction.
MAX_DESCRIPTORS = 6

#: A reason is a word.
MAX_REASON = 100

_encode: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class PacketError(ValueError):
    """Not a packet of this line."""


@dataclass(frozen=True, slots=True)
class Packet:
    """What a packet says; a packet of another version has only the numbers of its offers."""

    version: int
    offer: Sequence[tuple[int, Mapping[str, Any]]] = ()
    go: Sequence[int] = ()
    withdrawn: Sequence[int] = ()
    ready: Sequence[int] = ()
    refused: Sequence[tuple[int, str]] = ()
    serving: Sequence[int] = ()


def encode_offers(offers: Sequence[tuple[int, Mapping[str, Any]]], version: int = VERSION) -> bytes:
    """Write a packet of offers, each a number and the state of a connection.

    Raises:
        TypeError, ValueError, RecursionError: a state cannot be written as JSON.
    """
    return _encode({"version": version, "offer": offers}).encode()


def encode(**lists: Sequence[Any]) -> bytes:
    """Write any other packet."""
    return _encode({"version": VERSION, **{name: one for name, one in lists.items() if one}}).encode()


def decode(data: bytes) -> Packet:
    """Read a packet.

    Raises:
        PacketError: it is none.
    """
    try:
        fields = json.loads(data)
        version = _number(fields["version"])
        if version != VERSION:
            return Packet(version, [(_number(pair[0]), {}) for pair in fields.get("offer", ())])
        offers = [(_number(number), state) for number, state in fields.get("offer", ())]
        if not all(isinstance(state, dict) and 0 < count_of(state) <= MAX_DESCRIPTORS for _, state in offers):
            raise TypeError("a state must be an object")
        refused = [(_number(number), str(why)[:MAX_REASON]) for number, why in fields.get("refused", ())]
        lists = {name: list(map(_number, fields.get(name, ()))) for name in ("go", "withdrawn", "ready", "serving")}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise PacketError(f"{type(error).__name__}: {error}") from None
    return Packet(version, offers, refused=refused, **lists)


def count_of(state: Mapping[str, Any]) -> int:
    """Return the number of descriptors of a connection."""
    return _number(state.get("descriptors", 1))


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"not a number: {value!r}")
    return value
