"""What master and workers tell each other: one JSON object a packet. No I/O in here.

A worker runs the user's program and talks to strangers, so the master believes nothing of what one says: fields of
another type, and numbers that are none or beyond all measure, count as absent (`Message`, `checked_stats`,
`checked_table`).

| from a worker | means |
| --- | --- |
| ready | it accepts connections |
| failed | it could not start; `error` says why, `details` is a traceback, `status` an exit status |
| beat | its loop runs; `lag` is by how many seconds it was late |
| stats | `stats` are its counters, `rss` its bytes of memory; each if it can be had |
| retire | it wants a successor; `why` |
| dumped | its stacks are in the log |
| connections | its table of them |
| drained | its listening sockets are drained and closed |
| reopen | the descriptor of the new log file did not arrive: send it again |
| names | the files that its options name: `read` and `append` are lists of paths (`lending`) |
| unprivileged | it is another user from now on, and what it names does not count any more |
| borrow | it needs a descriptor of the file `path`; `number` is that of the question |
| stopped | all done; `finished`, `ended` connections, last `stats` |

| from the master | means |
| --- | --- |
| retire | a successor serves the same sockets: leave them, finish the connections within `timeout` seconds |
| stop | drain the slot's sockets for good, and with `all` those that workers share; finish within `timeout` |
| hasten | it is leaving: within `timeout` seconds, from now on |
| halt | end every connection now |
| unready | a stop is near: tell balancers so, but go on |
| report | send stats |
| connections | send a table of them, as one of `of` workers |
| reopen | a new log file comes with the packet |
| lent | the file of the question `number` comes with the packet; or `error` is an errno, and `why` a text |
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from gtcpserver.server.stats import ServerStats

#: Maximum bytes of a packet. A unix socket's send buffer, which must hold the packet, is 208 KiB
#: (net.core.wmem_default).
MAX_BYTES = 128 * 1024

#: Maximum characters of one text in a message; the end of a traceback says more than its beginning.
MAX_TEXT = 48 * 1024

LEAST_TEXT = 1024  # what is left of a text at least

MAX_NUMBER = 2**63
"""Numbers beyond are no counts of anything. Sums of these stay finite, and short enough for Python to print."""

MAX_NAMES = 1000
"""Names in one table of counters, such as a handler's own: a label's values in Prometheus should be tens."""

MAX_NAME = 200  # characters of one

MAX_ROWS = 500  # of connections, as many as a table has (`monitoring.connection_table`)
MAX_PLACES = 100  # of the stack of one

#: Counters of a worker that are tables; all others are numbers. "latency" and "cpu_seconds" are a `Watch`'s.
TABLES = (*(field.name for field in dataclasses.fields(ServerStats) if "dict" in str(field.type)), "latency")
NUMBERS = (*(field.name for field in dataclasses.fields(ServerStats) if field.name not in TABLES), "cpu_seconds")

ROW = ("peer", "age", "bytes_received", "bytes_sent", "idle", "tls", "server_name")  # and "where"

WORKER_KINDS = frozenset(
    {
        *("ready", "failed", "beat", "stats", "retire", "dumped", "connections", "drained", "reopen", "stopped"),
        *("names", "unprivileged", "borrow"),
    }
)
MASTER_KINDS = frozenset({"retire", "stop", "hasten", "halt", "unready", "report", "connections", "reopen", "lent"})
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
        return value if is_number(value) else 0

    def count(self, name: str) -> int:
        return max(0, int(self.number(name)))

    def seconds(self, name: str) -> float | None:
        """Return a timeout in seconds; None for no limit."""
        return None if self.fields.get(name) is None else self.number(name)


def encode(kind: str, **fields: Any) -> bytes:
    """One packet. Long texts lose their beginning. Raises MessageError for what is too big, or not JSON."""
    longest = MAX_TEXT
    while True:
        for name, value in fields.items():
            if isinstance(value, str) and len(value) > longest:
                fields[name] = "..." + value[-longest:]
        try:
            data = json.dumps({"kind": kind, **fields}, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageError(f"a {kind} message cannot be written as JSON: {error}") from None
        if len(data) <= MAX_BYTES:
            return data
        longest //= 2  # a character takes up to twelve bytes
        if longest < LEAST_TEXT:
            raise MessageError(f"a {kind} message must have at most {MAX_BYTES} bytes, got {len(data)}")


def decode(data: bytes, kinds: frozenset[str]) -> Message:
    """Decode one packet. Raises MessageError for any bytes that are no message of these kinds."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise MessageError(f"expected one of {', '.join(sorted(kinds))}, got {data[:80]!r}")
    return Message(fields.pop("kind"), fields)


def is_number(value: Any) -> bool:
    """Whether it is an ordinary number: no bool, no NaN, not beyond all measure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def checked_stats(value: Any) -> dict[str, Any]:
    """Return what is well-formed of a worker's counters; the rest is left out.

    Args:
        value: what `Watch.stats` or `ServerStats` becomes in JSON, or anything else.
    """
    if not isinstance(value, dict):
        return {}
    stats: dict[str, Any] = {name: value[name] for name in NUMBERS if is_number(value.get(name))}
    if "pool_size" in value and value["pool_size"] is None:
        stats["pool_size"] = None  # no limit
    for name in TABLES:
        table = value.get(name)
        if isinstance(table, dict):
            good = [(key, number) for key, number in table.items() if len(key) <= MAX_NAME and is_number(number)]
            stats[name] = dict(good[:MAX_NAMES])
    return stats


def checked_table(value: Any) -> list[dict[str, Any]]:
    """Return the well-formed rows of a worker's table of connections (`monitoring.connection_table`)."""
    rows = value[:MAX_ROWS] if isinstance(value, list) else []
    return [row for row in map(_checked_row, rows) if row is not None]


def _checked_row(row: Any) -> dict[str, Any] | None:
    if not isinstance(row, dict):
        return None
    where = row.get("where")
    checked = {name: row.get(name) for name in ROW}
    if not (
        isinstance(checked["peer"], str)
        and all(is_number(checked[name]) for name in ("age", "bytes_received", "bytes_sent"))
        and isinstance(checked["idle"], bool)
        and all(isinstance(checked[name], (str, type(None))) for name in ("tls", "server_name"))
        and isinstance(where, list)
    ):
        return None
    return {**checked, "where": [place for place in where[:MAX_PLACES] if isinstance(place, str)]}
