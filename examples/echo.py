"""The shortest server: send everything back.

    python examples/echo.py [ADDRESS], then: nc 127.0.0.1 5000

``recv`` and ``sendall`` only block this handler: each connection runs in its own greenlet. A stop of the server waits
until the client has left, 30 s at most; line_protocol.py shows how to let idle clients go at once.
"""

import sys

from gtcpserver import Connection, run


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    run(echo, *sys.argv[1:])  # the address; default: 127.0.0.1:5000
