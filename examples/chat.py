"""A chat room: every line goes to everybody else. A member who does not read loses lines, not the others their time.

    python examples/chat.py, then in two terminals: nc 127.0.0.1 5000

One greenlet reads from a connection while another writes to it.
"""

import sys

import gevent
from gevent.queue import Full, Queue
from serve import serve

from gtcpserver import Connection, EarlyEOF

LONGEST_LINE = 1024

#: Lines that wait for a slow member; what comes beyond is left out for him.
LONGEST_QUEUE = 100

members: dict[str, "Queue[bytes]"] = {}


def tell(line: str, but: str = "") -> None:
    for name, lines in members.items():
        if name != but:
            try:
                lines.put_nowait(line.encode() + b"\n")
            except Full:
                pass


def handle(conn: Connection) -> None:
    conn.sendall(b"Your name? ")
    try:
        name = read_line(conn)
    except EarlyEOF:
        return
    if not name or name in members:
        conn.sendall(b"This name is taken, or none.\n")
        return
    lines: Queue[bytes] = Queue(LONGEST_QUEUE)
    tell(f"* {name} has come")
    members[name] = lines
    writer = gevent.spawn(write_lines, conn, lines)
    try:
        while True:
            with conn.idle():
                line = read_line(conn)
            tell(f"{name}: {line}", but=name)
    except (EarlyEOF, OSError):
        pass
    finally:
        writer.kill()
        del members[name]
        tell(f"* {name} has left")


def read_line(conn: Connection) -> str:
    return conn.recv_until(b"\n", LONGEST_LINE).decode(errors="replace").strip()


def write_lines(conn: Connection, lines: "Queue[bytes]") -> None:
    try:
        while True:
            conn.sendall(lines.get())
    except OSError:
        pass  # the reader sees it too, and cleans up


if __name__ == "__main__":
    sys.exit(serve(handle))
