"""requests in a handler: pages of a backend web server, over persistent connections.

    python examples/requests_client.py [ADDRESS], then: printf '/\\n' | nc -N 127.0.0.1 5000

For each path the handler answers with the status and the size of the page. requests and urllib3 are plain Python on
sockets: ``patch_all`` is all they need. One session for all handlers keeps connections to the web server open; its
adapter limits them, and ``pool_block`` makes handlers wait for one instead of opening more. BACKEND names the web
server, by default http://127.0.0.1:8000. Needs ``pip install requests``.
"""
# ruff: noqa: E402

from gevent import monkey

monkey.patch_all()

import os
import sys

import requests
from requests.adapters import HTTPAdapter

from gtcpserver import Connection, EarlyEOF, run

BACKEND = os.environ.get("BACKEND", "http://127.0.0.1:8000").rstrip("/")
CONNECTIONS = 50

#: Seconds to connect, and to wait for the next bytes.
TIMEOUT = (3, 10)


def handle(conn: Connection) -> None:
    session: requests.Session = conn.context
    while True:
        try:
            with conn.idle():
                path = conn.recv_until(b"\n", 2048).decode("ascii").strip()
            if not path.startswith("/"):
                raise ValueError(f"expected a path that begins with a slash, got {path!r}")
            status, size = fetch(session, path)
            conn.sendall(f"{status} {size} bytes\n".encode())
        except EarlyEOF:
            return
        except (requests.RequestException, ValueError) as problem:
            conn.sendall(f"ERROR {problem}\n".encode())
            return


def fetch(session: requests.Session, path: str) -> tuple[int, int]:
    """Return status and size of a page, which is never in memory as a whole. Blocks, but only this handler."""
    # Redirects are not followed: they could lead to a server other than ours.
    with session.get(BACKEND + path, timeout=TIMEOUT, stream=True, allow_redirects=False) as answer:
        return answer.status_code, sum(map(len, answer.iter_content(65536)))


def make_session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS, pool_block=True))
    return session


if __name__ == "__main__":
    run(handle, *sys.argv[1:], context=make_session())
