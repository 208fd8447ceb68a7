"""A key-value store with a line protocol: framing, deadlines, idle connections.

    python examples/line_protocol.py [ADDRESS], then: printf 'SET name 5\\nAda L\\nGET name\\n' | nc -N 127.0.0.1 5000

Requests: ``GET key``; ``SET key length``, then that many bytes of any kind and a line feed; ``QUIT``.
Answers: ``VALUE length`` and the value, ``NONE``, ``OK``, ``ERROR reason``.
"""

import sys

from gtcpserver import Connection, EarlyEOF, LimitExceeded, run

LONGEST_LINE = 256
LONGEST_VALUE = 1 << 20

#: Seconds between two requests.
SILENT_SECONDS = 300.0

#: Seconds from the end of a request's first line to the end of its answer, no matter how slowly the bytes trickle in.
REQUEST_SECONDS = 5.0

store: dict[bytes, bytes] = {}


def handle(conn: Connection) -> None:
    conn.settimeout(SILENT_SECONDS)
    going_on = True
    while going_on:
        try:
            # While it waits here, the connection takes no place in the pool, and a stop of the server ends it.
            with conn.idle():
                line = conn.recv_until(b"\n", LONGEST_LINE)
            with conn.deadline(REQUEST_SECONDS):
                going_on = answer(conn, line.split())
        except EarlyEOF:
            return  # the client has closed
        except LimitExceeded:
            conn.sendall(b"ERROR line too long\n")
            return  # the start of the next request is unknown
        # Let TimeoutErrors leave the handler: the server counts them and closes; a client that slow reads no excuses.


def answer(conn: Connection, words: list[bytes]) -> bool:
    """Serve one request; return False to end the connection."""
    match words:
        case [b"GET", key]:
            value = store.get(key)
            conn.sendall(b"NONE\n" if value is None else b"VALUE %d\n%b\n" % (len(value), value))
        case [b"SET", key, length] if length.isdigit() and int(length) <= LONGEST_VALUE:
            value = conn.recv_exactly(int(length))
            if conn.recv_exactly(1) != b"\n":
                conn.sendall(b"ERROR the value is longer than it said\n")
                return False
            store[key] = value
            conn.sendall(b"OK\n")
        case [b"QUIT"]:
            return False
        case _:
            conn.sendall(b"ERROR expected GET key, SET key length (up to %d) or QUIT\n" % LONGEST_VALUE)
            return False
    return True


if __name__ == "__main__":
    run(handle, *sys.argv[1:])
