"""Existing blocking code in a handler, in a monkey-patched program: an HTTP client and sqlite3.

    python examples/blocking_code.py [ADDRESS], then: printf 'http://127.0.0.1:8000/\\n' | nc -N 127.0.0.1 5000

For each URL the handler fetches the page with the standard library, notes it in a database, and answers how often the
URL was requested. While one handler waits for its web server the others run: ``patch_all`` makes the standard library's
sockets wait on the event loop. sqlite3 waits in C, where nothing can be patched: it runs in a thread of gevent's pool.
"""
# ruff: noqa: E402

# Before anything that uses sockets, threads or time is imported. (`gtcpserver serve` does this for you.)
from gevent import monkey

monkey.patch_all()

import sqlite3
import sys
import tempfile
import urllib.request
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

import gevent

from gtcpserver import Connection, EarlyEOF, run

#: Seconds for a page in total. urlopen's own timeout restarts with each byte.
FETCH_SECONDS = 10.0
LARGEST_PAGE = 1 << 20


def handle(conn: Connection) -> None:
    while True:
        try:
            with conn.idle():
                url = conn.recv_until(b"\n", 2048).decode().strip()
            size = fetch(url)
            times = gevent.get_hub().threadpool.apply(count, (conn.context, url))
            conn.sendall(f"{size} bytes, asked for {times} times\n".encode())
        except EarlyEOF:
            return
        except (HTTPException, OSError, ValueError) as problem:
            conn.sendall(f"ERROR {problem}\n".encode())
            return


def fetch(url: str) -> int:
    """Return the size of a page. Blocks, but only this handler."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"expected an http:// or https:// URL, got {url!r}")
    too_late = TimeoutError(f"not fetched within {FETCH_SECONDS:g} seconds")
    with gevent.Timeout(FETCH_SECONDS, too_late), urllib.request.urlopen(url) as page:
        return len(page.read(LARGEST_PAGE))


def count(database: str, url: str) -> int:
    """Note one more request for the URL; return their number. Blocks its thread."""
    with closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        connection.execute("INSERT INTO seen VALUES (?, 1) ON CONFLICT (url) DO UPDATE SET times = times + 1", (url,))
        return int(connection.execute("SELECT times FROM seen WHERE url = ?", (url,)).fetchone()[0])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder, "seen.db"))
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("CREATE TABLE seen (url TEXT PRIMARY KEY, times INTEGER)")
        run(handle, *sys.argv[1:], context=database)
