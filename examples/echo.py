"""The shortest server: send back what comes.

    python examples/echo.py [ADDRESS], then: nc 127.0.0.1 5000

``recv`` and ``sendall`` block this handler only: each connection runs in a greenlet of its own. A stop of the server
waits for it until its client has left, 30 s at most; line_protocol.py shows how a client that waits is let go at once.
"""

import sys

from gtcpserver import Connection, run


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    run(echo, *sys.argv[1:])  # the address; by default 127.0.0.1:5000
