"""Sessions that survive a reload: clients stay connected, logged in, and in their database.

    gtcpserver serve examples/moving_sessions.py:handle --workers 2 --handover --control /tmp/sessions.sock
    nc 127.0.0.1 5000, then in another terminal: gtcpserver ctl --control /tmp/sessions.sock reload

or, as a single process, which has nowhere to move connections to: python examples/moving_sessions.py [ADDRESS]

Requests: ``LOGIN name``, ``SELECT number``, ``WHO``, ``QUIT``. Answers: ``OK``, ``name database``, ``ERROR reason``.
"""

import sys

from gtcpserver import Connection, EarlyEOF, LimitExceeded, run

LONGEST_LINE = 256

#: Seconds between two requests.
SILENT_SECONDS = 300.0


def handle(conn: Connection) -> None:
    if not conn.resumed:  # otherwise another worker has said so, and the client is in the middle of its session
        conn.settimeout(SILENT_SECONDS)
        conn.session.update(user="nobody", database=0)
        conn.sendall(b"HELLO\n")
    while True:
        try:
            # When this worker leaves, the connection moves from here to another one, which calls handle() anew.
            with conn.idle():
                line = conn.recv_until(b"\n", LONGEST_LINE)
        except EarlyEOF:
            return  # the client has closed
        except LimitExceeded:
            conn.sendall(b"ERROR line too long\n")
            return
        if not answer(conn, line.decode(errors="replace").split()):
            return


def answer(conn: Connection, words: list[str]) -> bool:
    """Serve one request; return False to end the connection."""
    session = conn.session
    match words:
        case ["LOGIN", name]:
            session["user"] = name
            conn.sendall(b"OK\n")
        case ["SELECT", number] if number.isdecimal() and len(number) < 3:
            session["database"] = int(number)
            conn.sendall(b"OK\n")
        case ["WHO"]:
            conn.sendall(f"{session['user']} {session['database']}\n".encode())
        case ["QUIT"]:
            return False
        case _:
            conn.sendall(b"ERROR expected LOGIN name, SELECT number (up to 99), WHO or QUIT\n")
    return True


if __name__ == "__main__":
    run(handle, *sys.argv[1:], handover=True)
