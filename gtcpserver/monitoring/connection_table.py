"""The table of connections: each peer, its age, and where its handler stands; and how many stand where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.server.describe import describe, place
from gtcpserver.server.server import Server

#: Rows of the table, over all workers. Nobody reads more; the page and the packets stay small.
MOST = 500

#: Connections of a process that are looked at to count places: 5 us each.
MOST_COUNTED = 20_000

#: Places that are told, the fullest first. The others are ELSEWHERE.
MOST_PLACES = 40

#: Characters of a place: with the names of all places, a packet of a worker still has room for rows.
LONGEST_PLACE = 100

#: Connections looked at without a pause: 10 us each, during which the event loop does nothing else.
AT_ONCE = 50

#: The places of a connection that waits for a request, of one whose handler has not begun, and all small ones together.
IDLE = "idle"
NOT_STARTED = "not started"
ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Table:
    """The connections of a server.

    Attributes:
        rows: one dictionary per connection: its peer, age in seconds, bytes_received, bytes_sent, whether it is idle,
            the TLS version (None without TLS), the TLS server_name, and where its handler stands, innermost call last.
        places: number of connections by the innermost of these calls.
    """

    rows: list[dict[str, Any]]
    places: dict[str, int]


def look(server: Server, most: int = MOST) -> Table:
    """Return the connections of a server, oldest first. Yields to the event loop regularly, so that the server goes on.

    Args:
        most: number of rows; places are counted of MOST_COUNTED connections.
    """
    rows: list[dict[str, Any]] = []
    places: Counter[str] = Counter()
    connections = server.connections()
    for number, (connection, worker) in enumerate(list(connections.items())[:MOST_COUNTED], 1):
        # The connection may have ended during a pause.
        if connection in connections:
            if len(rows) < most:
                rows.append(_row(connection, worker))
            places[_place(connection, worker)] += 1
        if not number % AT_ONCE:
            gevent.sleep(0)
    return Table(rows, fullest(places))


def fullest(places: Counter[str]) -> dict[str, int]:
    """Return the fullest places, and the others as one."""
    found = dict(places.most_common(MOST_PLACES))
    rest = places.total() - sum(found.values())
    return {**found, ELSEWHERE: found.get(ELSEWHERE, 0) + rest} if rest else found


def _place(connection: Connection, worker: Any) -> str:
    if connection.is_idle:
        return IDLE
    return place(worker)[:LONGEST_PLACE] or NOT_STARTED


def _row(connection: Connection, worker: Any) -> dict[str, Any]:
    known = describe(connection, worker)
    tls = connection.tls
    return {
        "peer": known.peer,
        "age": round(known.age, 3),
        "bytes_received": known.bytes_received,
        "bytes_sent": known.bytes_sent,
        "idle": connection.is_idle,
        "tls": tls.version if tls is not None else None,
        "server_name": tls.server_name if tls is not None else None,
        "where": list(known.where),
    }
