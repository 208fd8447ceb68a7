"""The server's handler: lines, counted in the session."""

from __future__ import annotations

from gtcpserver import Connection, EarlyEOF


def handle(conn: Connection) -> None:
    session = conn.session
    session.setdefault("lines", 0)
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\n")
        except EarlyEOF:
            return
        session["lines"] += 1
        conn.sendall(b"%d %b" % (session["lines"], line))
