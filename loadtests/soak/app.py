"""What loadtests/soak loads: the key-value store of examples/line_protocol.py, in a process that says how it is."""

from __future__ import annotations

import gc
import json
import os
import socket
from typing import Any

import gevent
from greenlet import greenlet

from examples import line_protocol
from gtcpserver import Connection, Server

#: A unix datagram socket; not there when the program runs by itself.
REPORT_TO = "GTCPSERVER_SOAK_REPORT_TO"
EVERY = "GTCPSERVER_SOAK_EVERY"

COUNTERS = ("accepted", "active", "idle", "lingering", "handler_errors", "resets", "timeouts", "limits_exceeded")

_server: Server | None = None


def handle(conn: Connection) -> None:
    global _server
    _server = conn.server
    line_protocol.handle(conn)


def report_for_ever(path: str, seconds: float) -> None:
    """Send a datagram with this process's figures every so many seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        while True:
            gevent.sleep(seconds)
            try:
                sock.sendto(json.dumps(figures()).encode(), path)
            except OSError:  # who watches has ended, or does not keep up
                pass


def figures() -> dict[str, Any]:
    stats = None if _server is None else _server.stats()
    return {
        "pid": os.getpid(),
        # 10 ms for 100,000 objects.
        "greenlets": sum(isinstance(thing, greenlet) for thing in gc.get_objects()),
        "counters": {name: 0 if stats is None else getattr(stats, name) for name in COUNTERS},
    }


if REPORT_TO in os.environ:
    gevent.spawn(report_for_ever, os.environ[REPORT_TO], float(os.environ[EVERY]))
