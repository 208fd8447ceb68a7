"""The shortest server: send back what comes. ``python examples/echo.py [ADDRESS]``, then ``nc 127.0.0.1 5000``."""

import sys

from gtcpserver import Connection, Server


def echo(conn: Connection) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


if __name__ == "__main__":
    server = Server(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:5000", echo)
    server.start()
    print(f"listening on {server.address}", flush=True)
    server.serve_forever()
