"""A handler that does next to nothing between its idle blocks: what is measured around them shows most."""

from __future__ import annotations

from gtcpserver import Connection

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n" + bytes(1024)


def handle(conn: Connection) -> None:
    while True:
        with conn.idle():
            request = conn.recv(8192)
        if not request:
            return
        conn.sendall(ANSWER)
