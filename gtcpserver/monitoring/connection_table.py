"""The table of connections: each peer, its age, and where its handler stands."""

from __future__ import annotations

from typing import Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.server.describe import describe
from gtcpserver.server.server import Server

#: Rows of the table, over all workers. Nobody reads more; the page and the packets stay small.
MOST = 500

#: Rows made without a pause: 10 us each, during which the event loop does nothing else.
AT_ONCE = 50


def table_of(server: Server, most: int = MOST) -> list[dict[str, Any]]:
    """Return the connections of a server, oldest first. Yields to the event loop regularly, so that the server goes on.

    Returns:
        one dictionary per connection: its peer, age in seconds, bytes_received, bytes_sent, whether it is idle, the
        TLS version (None without TLS), the TLS server_name, and where its handler stands, innermost call last.
    """
    rows = []
    connections = server.connections()
    for number, (connection, worker) in enumerate(list(connections.items())[:most], 1):
        # The connection may have ended during a pause.
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
