"""The shortest server: send back what comes. ``python examples/echo.py [ADDRESS]``, then ``nc 127.0.0.1 5000``."""

import sys

from serve import serve

from gtcpserver import Connection


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    sys.exit(serve(echo))
