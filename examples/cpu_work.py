"""Computing in a handler: what it does to the others, and its cure.

    python examples/cpu_work.py, then: printf 'PING\\nTHREAD 2\\nPING\\n' | nc 127.0.0.1 5000

All handlers share one thread. One that computes for 2 s (``HERE 2``) makes everybody wait for 2 s: no server on an
event loop can help that. A thread of gevent's pool (``THREAD 2``) leaves the loop free; the interpreter then switches
between the threads every few milliseconds. Work in C that releases the GIL (hashing, compression) runs beside.
"""

import sys
import time

from gevent import get_hub
from serve import serve

from gtcpserver import Connection, EarlyEOF

LONGEST = 10.0


def compute(seconds: float) -> int:
    """Keep a CPU busy."""
    rounds = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        rounds += 1
    return rounds


def handle(conn: Connection) -> None:
    while True:
        try:
            with conn.idle():
                words = conn.recv_until(b"\n", 64).decode().split()
        except EarlyEOF:
            return
        match words:
            case ["PING"]:
                conn.sendall(b"PONG\n")
            case ["HERE" | "THREAD" as where, number] if number.replace(".", "", 1).isdigit():
                seconds = min(float(number), LONGEST)
                if where == "HERE":
                    compute(seconds)  # nobody else is served meanwhile
                else:
                    get_hub().threadpool.apply(compute, (seconds,))
                conn.sendall(b"DONE\n")
            case _:
                conn.sendall(b"ERROR expected PING, HERE seconds or THREAD seconds\n")
                return


if __name__ == "__main__":
    sys.exit(serve(handle))
