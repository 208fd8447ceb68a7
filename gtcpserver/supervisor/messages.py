"""Messages between master and workers: one JSON object per packet. No I/O here.

A worker runs the user's program and talks to strangers, so the master does not trust its messages: fields of the wrong
type, and numbers that are not finite or too large, count as absent (`Message`, `checked_stats`, `checked_table`).

| from a worker | means |
| --- | --- |
| ready | it accepts connections; `handover`: it can take them from other workers; `ends`: it has `max_accepts` |
| failed | it could not start; `error` is the reason, `details` a traceback, `status` an exit status |
| beat | its loop runs, `lag` seconds late |
| stats | `stats` are its counters, `rss` its bytes of memory; each if available |
| retire | it asks for a successor; `why` is the reason |
| enough | the workers together have accepted `max_accepts` connections; counts only with `ends` |
| dumped | its stacks are in the log |
| connections | its table of connections |
| selected | the answer to `select` with this `number`: `rows`, how many were `found`, how many `ended` |
| moved | it leaves, and `moved` connections have moved to other workers; `staying` counts the rest by reason |
| shared | it has given the connections that it was told to give; `moved` counts all that it has ever given |
| alone | it leaves, and has connections that could move, but no line to a worker that takes them |
| drained | its listening sockets are drained and closed |
| reopen | the descriptor of the new log file did not arrive: send it again |
| names | the files that its options name: `read` and `append` are lists of paths (`lending`) |
| unprivileged | it is another user from now on, and may name no more files |
| borrow | it asks for a descriptor of the file `path`; `number` identifies the question |
| stopped | all is done; `finished` and `ended` count connections, `stats` are the last counters |

| from the master | means |
| --- | --- |
| retire | a successor serves the same sockets: leave them, finish the connections within `timeout` seconds |
| stop | drain the slot's sockets for good, with `all` also the shared ones; finish within `timeout` seconds |
| hasten | finish within `timeout` seconds from now (to a worker that is leaving) |
| pair | a line to a worker comes along: connections leave on it (`gives`; `share`: so many), or come from `giver` |
| halt | end every connection now |
| unready | a stop is near: tell balancers, but serve on |
| report | send stats |
| connections | send a table of connections, as one of `of` workers |
| select | send the connections of `user`, `client`, `destination`, `ids`, or `end` them; `number` names the question |
| reopen | the descriptor of a new log file comes with the packet |
| lent | the descriptor for the question `number` comes with the packet; or `error` is an errno, and `why` a text |

With `moves`, "retire" and "stop" are followed by "pair": connections move to other workers (`pairing`).
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

#: Maximum characters of one text in a message. Longer ones lose their beginning: the end of a traceback says more.
MAX_TEXT = 48 * 1024

#: Characters that every text keeps, however many texts a message has.
LEAST_TEXT = 1024

#: Larger numbers count nothing real. Sums of smaller ones stay finite, and short enough for Python to print.
MAX_NUMBER = 2**63

#: Maximum names in one table of counters, such as a handler's own: a label in Prometheus should have tens of values.
MAX_NAMES = 1000

#: Maximum characters of a name.
MAX_NAME = 200

#: Maximum rows in a table of connections (`monitoring.connection_table`).
MAX_ROWS = 500

#: Maximum frames of the stack of one connection.
MAX_FRAMES = 100

#: What a `Watch` knows of a worker's certificates.
CERTIFICATES = ("certificates", "certificate_expires_at")

#: Counters of a worker that are tables; all others are numbers. "latency" and "cpu_seconds" come from a `Watch`.
TABLES = (*(field.name for field in dataclasses.fields(ServerStats) if "dict" in str(field.type)), "latency")
NUMBERS = (
    *(field.name for field in dataclasses.fields(ServerStats) if field.name not in TABLES),
    *("cpu_seconds", *CERTIFICATES),
)

ROW = ("peer", "age", "bytes_received", "bytes_sent", "idle", "tls", "server_name")  # and "where"

WORKER_KINDS = frozenset(
    {
        *(
            "ready",
            "failed",
            "beat",
            "stats",
            "retire",
            "dumped",
            "connections",
            "selected",
            "drained",
            "reopen",
            "stopped",
        ),
        *("names", "unprivileged", "borrow", "enough", "moved", "alone", "shared"),
    }
)
MASTER_KINDS = frozenset(
    {"retire", "stop", "hasten", "halt", "unready", "report", "connections", "select", "reopen", "lent", "pair"}
)
#: Between two masters (`upgrade`).
HANDOVER_KINDS = frozenset({"ready", "failed", "pair", "more"})


class MessageError(ValueError):
    """The packet is no valid message."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its kind and its fields."""

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
    """Encode one packet. Long texts lose their beginning.

    Raises:
        MessageError: the message is too large, or cannot be written as JSON.
    """
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
    """Decode one packet.

    Raises:
        MessageError: the bytes are no message of these kinds.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}") from None
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise MessageError(f"expected one of {', '.join(sorted(kinds))}, got {data[:80]!r}")
    return Message(fields.pop("kind"), fields)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number of reasonable size, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER


def checked_stats(value: Any) -> dict[str, Any]:
    """Return the well-formed counters of a worker; leave out the rest.

    Args:
        value: the result of `Watch.stats`, or a `ServerStats`, by way of JSON; or anything else.
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


#: Fields of a row of `gtcpserver ctl connections` (`monitoring.selection`): texts, texts or None, numbers; and "idle".
SELECTED_TEXTS = ("id", "client", "listener")
SELECTED_OPTIONS = ("user", "destination", "upstream")
SELECTED_NUMBERS = ("age", "bytes_received", "bytes_sent")


def checked_rows(value: Any) -> list[dict[str, Any]]:
    """Return the well-formed rows of connections that were asked for (`monitoring.selection`)."""
    rows = value[:MAX_ROWS] if isinstance(value, list) else []
    names = (*SELECTED_TEXTS, *SELECTED_OPTIONS, *SELECTED_NUMBERS, "idle")
    return [{name: row.get(name) for name in names} for row in rows if isinstance(row, dict) and _is_selected(row)]


def _is_selected(row: dict[str, Any]) -> bool:
    return (
        all(isinstance(row.get(name), str) for name in SELECTED_TEXTS)
        and all(isinstance(row.get(name), (str, type(None))) for name in SELECTED_OPTIONS)
        and all(is_number(row.get(name)) for name in SELECTED_NUMBERS)
        and isinstance(row.get("idle"), bool)
    )


def checked_counts(value: Any) -> dict[str, int]:
    """Return the well-formed counts of a worker, by name; leave out the rest."""
    if not isinstance(value, dict):
        return {}
    good = [(key, int(count)) for key, count in value.items() if len(key) <= MAX_NAME and is_number(count)]
    return dict(good[:MAX_NAMES])


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
    return {**checked, "where": [frame for frame in where[:MAX_FRAMES] if isinstance(frame, str)]}
