"""What master and workers tell each other: one JSON object a packet. No I/O in here.

| from a worker | means |
| --- | --- |
| ready | it accepts connections |
| failed | it could not start; `error` says why, `details` is a traceback, `status` an exit status |
| beat | its loop runs; `lag` is by how many seconds it was late, `stats` its counters (in some), `rss` its bytes |
| retire | it wants a successor; `why` |
| dumped | its stacks are in the log |
| connections | its table of them |
| drained | its listening sockets are drained and closed |
| stopped | all done; `finished`, `ended` connections, last `stats` |

| from the master | means |
| --- | --- |
| retire | a successor serves the same sockets: leave them, finish the connections within `timeout` seconds |
| stop | drain the slot's sockets for good, and with `all` those that workers share; finish within `timeout` |
| hasten | it is leaving: within `timeout` seconds, from now on |
| halt | end every connection now |
| unready | a stop is near: tell balancers so, but go on |
| report | send a beat with stats |
| connections | send a table of them, as one of `of` workers |
| reopen | a new log file comes with the packet |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 128 * 1024
"""Bytes of a packet. A unix socket's send buffer, which a packet must fit into, is 208 KiB (net.core.wmem_default)."""

MAX_TEXT = 48 * 1024
"""Characters of one text in a message; the end of a traceback says more than its beginning."""

LEAST_TEXT = 1024  # what is left of a text at least

WORKER_KINDS = frozenset({"ready", "failed", "beat", "retire", "dumped", "connections", "drained", "stopped"})
MASTER_KINDS = frozenset({"retire", "stop", "hasten", "halt", "unready", "report", "connections", "reopen"})
HANDOVER_KINDS = frozenset({"ready", "failed"})


class MessageError(ValueError):
    """A packet that is no message."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind, and what else it says."""

    kind: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        value = self.fields.get(name, "")
        return value if isinstance(value, str) else ""

    def number(self, name: str) -> float:
        value = self.fields.get(name, 0)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0

    def seconds(self, name: str) -> float | None:
        """A time-out: None is for ever."""
        return None if self.fields.get(name) is None else self.number(name)


def encode(kind: str, **fields: Any) -> bytes:
    """One packet. Long texts lose their beginning. Raises MessageError for what is too big all the same."""
    longest = MAX_TEXT
    while True:
        for name, value in fields.items():
            if isinstance(value, str) and len(value) > longest:
                fields[name] = "..." + value[-longest:]
        data = json.dumps({"kind": kind, **fields}).encode()
        if len(data) <= MAX_BYTES:
            return data
        longest //= 2  # a character takes up to twelve bytes
        if longest < LEAST_TEXT:
            raise MessageError(f"a {kind} message must have at most {MAX_BYTES} bytes, got {len(data)}")


def decode(data: bytes, kinds: frozenset[str]) -> Message:
    """Reads one packet. Raises MessageError for any bytes that are no message of these kinds."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.get("kind") not in kinds:
        raise MessageError(f"expected one of {', '.join(sorted(kinds))}, got {data[:80]!r}")
    return Message(fields.pop("kind"), fields)
