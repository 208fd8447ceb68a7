"""Computing in a handler: how it delays the others, and the fix.

    python examples/cpu_work.py [ADDRESS], then: printf 'PING\\nPROCESS 2\\nPING\\n' | nc -N 127.0.0.1 5000

All handlers share one thread. One that computes for 2 s (``HERE 2``) makes everybody wait for 2 s, as on every event
loop; ``run`` logs where. A thread of gevent's pool (``THREAD 2``) leaves the loop free: the interpreter switches
between threads every few milliseconds, and code that releases the GIL (hashing, compression) runs in parallel. For more
Python than one CPU can run, use a pool of processes (``PROCESS 2``), here with a thread that waits for the answer: in a
patched program no thread is needed, see docs/how-to/cpu-work-in-processes.md.
"""

import sys
import time
from concurrent.futures import ProcessPoolExecutor

from gevent import get_hub

from gtcpserver import Connection, EarlyEOF, run

LONGEST = 10.0

pool = ProcessPoolExecutor(2)


def handle(conn: Connection) -> None:
    while True:
        try:
            with conn.idle():
                words = conn.recv_until(b"\n", 64).split()
        except EarlyEOF:
            return
        match words:
            case [b"PING"]:
                conn.sendall(b"PONG\n")
            case [b"HERE", number] if is_decimal(number):
                compute(float(number))  # blocks every other client
                conn.sendall(b"DONE\n")
            case [b"THREAD", number] if is_decimal(number):
                get_hub().threadpool.apply(compute, (float(number),))
                conn.sendall(b"DONE\n")
            case [b"PROCESS", number] if is_decimal(number):
                get_hub().threadpool.apply(pool.submit(compute, float(number)).result)
                conn.sendall(b"DONE\n")
            case _:
                conn.sendall(b"ERROR expected PING, HERE seconds, THREAD seconds or PROCESS seconds\n")
                return


def compute(seconds: float) -> None:
    """Keep a CPU busy."""
    until = time.monotonic() + min(seconds, LONGEST)
    while time.monotonic() < until:
        pass


def is_decimal(number: bytes) -> bool:
    return number.replace(b".", b"", 1).isdigit()


if __name__ == "__main__":
    run(handle, *sys.argv[1:])
