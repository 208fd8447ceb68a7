"""A chat room: one greenlet reads from a connection while another writes to it.

    python examples/chat.py [ADDRESS], then in two terminals: nc 127.0.0.1 5000

A slow reader delays nobody: each member has a queue, and only that member's writer waits for the member. When the queue
is full, the member misses lines, and is told so.
"""

import sys
from dataclasses import dataclass, field

import gevent
from gevent.queue import Full, Queue

from gtcpserver import Connection, EarlyEOF, run

LONGEST_LINE = 1024  # bytes
LONGEST_NAME = 32

#: Lines queued for a slow reader: 256 KiB at most, as much again as its socket holds.
LONGEST_QUEUE = 256


@dataclass
class Member:
    lines: "Queue[bytes]" = field(default_factory=lambda: Queue(LONGEST_QUEUE))
    missed: int = 0


room: dict[str, Member] = {}


def handle(conn: Connection) -> None:
    try:
        conn.sendall(b"Your name? ")
        name = read_line(conn)
        if not name or name in room or len(name) > LONGEST_NAME:
            conn.sendall(f"Expected a name that nobody here has, {LONGEST_NAME} letters at most.\n".encode())
            return
        chat(conn, name)
    except EarlyEOF:
        pass  # the member has left, or the server stops


def chat(conn: Connection, name: str) -> None:
    tell(f"* {name} has come")
    room[name] = member = Member()
    tell(f"* here are: {', '.join(room)}", only=name)
    writer = gevent.spawn(write_lines, conn, member)
    try:
        while True:
            line = read_line(conn)
            if line:
                tell(f"{name}: {line}", but=name)
            # The next line may be here already, and reading it would not wait: first let the writers send this one.
            gevent.sleep(0)
    finally:
        # Nothing here waits, so a handler that is killed is always removed from the room.
        del room[name]
        writer.kill(block=False)
        tell(f"* {name} has left")


def tell(line: str, *, only: str = "", but: str = "") -> None:
    """Pass a line to everybody in the room, to one member, or to all but one; never waits."""
    for name, member in room.items():
        if name != but and only in ("", name):
            try:
                member.lines.put_nowait(line.encode() + b"\n")
            except Full:
                member.missed += 1


def write_lines(conn: Connection, member: Member) -> None:
    try:
        while True:
            conn.sendall(member.lines.get())
            if member.missed and member.lines.empty():
                missed, member.missed = member.missed, 0
                conn.sendall(f"* you have missed {missed} lines\n".encode())
    except OSError:
        pass  # the reader notices it too, and leaves


def read_line(conn: Connection) -> str:
    # A silent member does not take a place in the pool, and does not delay a stop.
    with conn.idle():
        line = conn.recv_until(b"\n", LONGEST_LINE)
    # Without control characters: members must not control the terminals of others.
    return "".join(filter(str.isprintable, line.decode(errors="replace"))).strip()


if __name__ == "__main__":
    run(handle, *sys.argv[1:])
