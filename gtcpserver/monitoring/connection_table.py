"""The table of connections: who is connected, since when, and where its handler stands."""

from __future__ import annotations

from typing import Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.server.describe import describe
from gtcpserver.server.server import Server

MOST = 500
"""Rows of the table, over all workers. More is nothing that somebody reads; the page and the packets stay small."""

AT_ONCE = 50
"""Rows that are made without a pause: 10 us each, in which the event loop does nothing else."""


def table_of(server: Server, most: int = MOST) -> list[dict[str, Any]]:
    """The connections of a server, the oldest first; waits between some of them, so that the server goes on.

    Returns:
        for each its peer, age in seconds, bytes_received, bytes_sent, whether it is idle, the version of TLS (None on a
        plain one), server_name (of TLS), and where its handler stands, the innermost call last.
    """
    rows = []
    connections = server.connections()
    for number, (connection, worker) in enumerate(list(connections.items())[:most], 1):
        # It may have ended while we waited.
        if connection in connections:
            rows.append(_row(connection, worker))
        if not number % AT_ONCE:
            gevent.sleep(0)
    return rows


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
