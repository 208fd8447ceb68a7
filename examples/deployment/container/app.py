"""What the container serves: put your own in its place."""

from gtcpserver import Connection, EarlyEOF


def handle(conn: Connection) -> None:
    conn.settimeout(300)
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\n", 1024)
        except EarlyEOF:
            return
        conn.sendall(line)
