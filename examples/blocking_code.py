"""Existing blocking code in a handler, monkey-patched: an HTTP client and sqlite3.

    python examples/blocking_code.py, then: printf 'http://127.0.0.1:8000/\\n' | nc 127.0.0.1 5000

For each URL sent it fetches the page with the standard library, notes it in a database and answers how often the URL
was asked for. While one handler waits for its web server, the others run: after ``patch_all`` sockets wait
cooperatively. sqlite3 waits in C code, where nothing can be patched: a thread of gevent's pool runs it.
"""

# Before anything that uses sockets, threads or time is imported. (`gtcpserver serve` does this by itself.)
from gevent import monkey

monkey.patch_all()

import sqlite3  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import urllib.request  # noqa: E402
from pathlib import Path  # noqa: E402

from gevent import get_hub  # noqa: E402
from serve import serve  # noqa: E402

from gtcpserver import Connection, EarlyEOF  # noqa: E402

FETCH_SECONDS = 10.0


def count(database: str, url: str) -> int:
    """Note one more request for the URL; blocks."""
    with sqlite3.connect(database, timeout=10) as connection:
        connection.execute("INSERT INTO seen VALUES (?, 1) ON CONFLICT (url) DO UPDATE SET times = times + 1", (url,))
        return int(connection.execute("SELECT times FROM seen WHERE url = ?", (url,)).fetchone()[0])


def handle(conn: Connection) -> None:
    while True:
        try:
            with conn.idle():
                url = conn.recv_until(b"\n", 2048).decode().strip()
            if not url.startswith(("http://", "https://")):
                raise ValueError("expected an http:// or https:// URL")
            with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as page:
                size = len(page.read(1 << 20))
            times = get_hub().threadpool.apply(count, (conn.context, url))
            conn.sendall(f"{size} bytes, asked for {times} times\n".encode())
        except EarlyEOF:
            return
        except (OSError, ValueError) as problem:
            conn.sendall(f"ERROR {problem}\n".encode())
            return


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "seen.db")
        with sqlite3.connect(database) as connection:
            connection.execute("CREATE TABLE seen (url TEXT PRIMARY KEY, times INTEGER)")
        sys.exit(serve(handle, context=database))
