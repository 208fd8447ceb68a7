"""A key-value store with a line protocol: framing, deadlines, idle connections.

    python examples/line_protocol.py, then: printf 'SET name 5\\nAda L\\nGET name\\n' | nc 127.0.0.1 5000

Requests: ``GET key``, ``SET key length`` and a line feed, followed by so many bytes of value and a line feed, ``QUIT``.
Answers: ``OK``, ``VALUE length`` and the value, ``NONE``, ``ERROR reason``.
"""

import sys

from serve import serve

from gtcpserver import Connection, DeadlineExceeded, EarlyEOF, LimitExceeded

LONGEST_LINE = 256
LONGEST_VALUE = 1 << 20

#: A request must have come in full so many seconds after its first line, however slowly its bytes drip.
REQUEST_SECONDS = 5.0

store: dict[bytes, bytes] = {}


def handle(conn: Connection) -> None:
    conn.settimeout(300)  # between two requests
    while True:
        try:
            with conn.idle():
                # Here the connection holds no place in the pool, and a stop of the server ends it.
                line = conn.recv_until(b"\n", LONGEST_LINE)
            with conn.deadline(REQUEST_SECONDS):
                if not answer(conn, line.split()):
                    return
        except EarlyEOF:
            return  # the client has closed
        except LimitExceeded:
            conn.sendall(b"ERROR line too long\n")
            return  # where the next request begins is unknown
        except DeadlineExceeded:
            conn.sendall(b"ERROR too slow\n")
            return


def answer(conn: Connection, words: list[bytes]) -> bool:
    """Serve one request; False ends the connection."""
    match words:
        case [b"GET", key]:
            value = store.get(key)
            conn.sendall(b"NONE\n" if value is None else b"VALUE %d\n%b\n" % (len(value), value))
        case [b"SET", key, length] if length.isdigit() and int(length) <= LONGEST_VALUE:
            store[key] = conn.recv_exactly(int(length) + 1)[:-1]
            conn.sendall(b"OK\n")
        case [b"QUIT"]:
            return False
        case _:
            conn.sendall(b"ERROR expected GET key, SET key length or QUIT\n")
            return False
    return True


if __name__ == "__main__":
    sys.exit(serve(handle))
