"""Stopping: requests finish, idle clients are let go, handlers that take too long are cut and reported. And two hooks.

    python examples/graceful.py [ADDRESS], then: nc 127.0.0.1 5000, type WORK 3, and Ctrl-C in the server's terminal

``WORK seconds`` is a slow request. ``WATCH`` is endless: it sends the server's counters each second. A second Ctrl-C
ends everything at once.
"""

import sys
from collections import Counter

import gevent

from gtcpserver import Connection, EarlyEOF, run

#: Seconds for handlers to finish after the signal.
STOP_SECONDS = 10.0

#: So that one client cannot take all places in the pool.
MOST_FROM_ONE_ADDRESS = 20

WATCH_SECONDS = 1.0

connected: Counter[str] = Counter()


def handle(conn: Connection) -> None:
    while True:
        try:
            # A client that waits here is let go at once. A request in progress is finished first.
            with conn.idle():
                words = conn.recv_until(b"\n", 64).split()
        except EarlyEOF:
            return
        match words:
            case [b"WORK", seconds] if seconds.isdigit():
                work(conn, int(seconds))
            case [b"WATCH"]:
                watch(conn)
            case _:
                conn.sendall(b"ERROR expected WORK seconds or WATCH\n")
                return


def work(conn: Connection, seconds: int) -> None:
    try:
        gevent.sleep(seconds)
    except gevent.GreenletExit:
        # The handler is cut. Like any exception, this can be caught, and runs `finally` blocks.
        conn.sendall(b"SORRY, the server has stopped\n")
        raise
    conn.sendall(b"DONE\n")


def watch(conn: Connection) -> None:
    server = conn.server
    assert server is not None
    while True:
        stats = server.stats()
        conn.sendall(b"%d accepted, %d open, %d idle\n" % (stats.accepted, stats.active, stats.idle))
        # Endless work checks whether the server stops, or every stop would have to cut it.
        if server.stopping_event.wait(WATCH_SECONDS):
            conn.sendall(b"BYE\n")
            return


def admit(conn: Connection) -> bool:
    host = host_of(conn)
    connected[host] += 1
    return connected[host] <= MOST_FROM_ONE_ADDRESS


def forget(conn: Connection) -> None:
    # Called for every connection that `admit` was called for.
    host = host_of(conn)
    connected[host] -= 1
    if not connected[host]:
        del connected[host]


def host_of(conn: Connection) -> str:
    # The address of a client on a Unix socket has no host: usually "".
    address = conn.client_address
    return address[0] if isinstance(address, tuple) else "unix"


if __name__ == "__main__":
    # The report is also logged, with a line for each connection that was cut.
    report = run(handle, *sys.argv[1:], stop_timeout=STOP_SECONDS, on_connect=admit, on_disconnect=forget)
    sys.exit(1 if report.ended else 0)
