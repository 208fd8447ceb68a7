"""Relay every connection to another server, with splice(2).

    TARGET=127.0.0.1:6379 python examples/port_forwarder.py [ADDRESS], then: redis-cli -p 5000

That is all; `gtcpserver forward` adds more targets, health checks, and load balancing.
"""

import logging
import os
import sys

from gtcpserver import Connection, connect, relay, run

log = logging.getLogger("port_forwarder")

TARGET = os.environ.get("TARGET", "127.0.0.1:6379")


def forward(conn: Connection) -> None:
    try:
        upstream = connect(TARGET, timeout=5)
    except OSError as error:
        log.warning("%s: %s", TARGET, error)
        conn.abort()  # the client sees a failure instead of an empty answer
        return
    with upstream:
        result = relay(conn, upstream, idle_timeout=300)
    log.info("%d bytes there, %d back: %s", result.bytes_a_to_b, result.bytes_b_to_a, result.reason)


if __name__ == "__main__":
    run(forward, *sys.argv[1:])
