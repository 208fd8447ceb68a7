"""A database in a handler: PyMySQL and a pool of connections, for MariaDB or MySQL.

    python examples/database.py [ADDRESS], then: printf 'ADD hello\\nGET 1\\n' | nc -N 127.0.0.1 5000

PyMySQL is plain Python on sockets: in a monkey-patched program a query waits on the event loop, and other handlers run.
(A driver in C, such as mysqlclient, would make all handlers wait.) A connection does one query at a time, and a
database prefers few of them, so handlers share a pool, and wait in turn when it is empty. Address and credentials of
the database are read from ~/.my.cnf, or from the file named by MY_CNF. Needs ``pip install PyMySQL``.
"""
# ruff: noqa: E402

from gevent import monkey

monkey.patch_all()

import os
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pymysql

from gtcpserver import Connection, EarlyEOF, run

MY_CNF = os.environ.get("MY_CNF", "~/.my.cnf")

#: Connections to the database.
POOL_SIZE = 50

#: Seconds to wait for one of them, and for an answer of the database.
POOL_TIMEOUT = 10
ANSWER_TIMEOUT = 30


class Pool:
    """Connections to the database, opened when they are first needed."""

    def __init__(self, size: int) -> None:
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(None)

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Yield a connection for one transaction. Raise queue.Empty if none becomes free in time."""
        connection = self._free.get(timeout=POOL_TIMEOUT)
        try:
            if connection is None:
                connection = pymysql.connect(
                    read_default_file=MY_CNF, autocommit=True, connect_timeout=5, read_timeout=ANSWER_TIMEOUT
                )
            yield connection
        except BaseException:
            # Also when the handler is ended in the middle of a query: the next one must not get its answer.
            if connection is not None:
                with suppress(pymysql.Error):  # it is already closed
                    connection.close()
            connection = None
            raise
        finally:
            self._free.put(connection)

    def ask(self, query: str, *arguments: object) -> Any:
        """Return the first row of the answer, or the ID of the inserted row."""
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute(query, arguments)
            return cursor.fetchone() or cursor.lastrowid


def handle(conn: Connection) -> None:
    pool: Pool = conn.context
    while True:
        try:
            with conn.idle():
                command, _, text = conn.recv_until(b"\n", 1024).decode().strip().partition(" ")
            match command:
                case "ADD" if text:
                    conn.sendall(b"ADDED %d\n" % pool.ask("INSERT INTO notes (text) VALUES (%s)", text))
                case "GET" if text.isascii() and text.isdigit():
                    row = pool.ask("SELECT text FROM notes WHERE id = %s", text)
                    conn.sendall(f"NOTE {row[0]}\n".encode() if row else b"NONE\n")
                case _:
                    conn.sendall(b"ERROR expected ADD text or GET number\n")
                    return
        except EarlyEOF:
            return
        except (UnicodeDecodeError, queue.Empty, pymysql.Error) as problem:
            conn.sendall(f"ERROR {problem or 'all connections to the database are busy'}\n".encode())
            return


if __name__ == "__main__":
    pool = Pool(POOL_SIZE)
    try:
        pool.ask(
            "CREATE TABLE IF NOT EXISTS notes "
            "(id INTEGER AUTO_INCREMENT PRIMARY KEY, text VARCHAR(1024)) CHARACTER SET utf8mb4"
        )
    except pymysql.Error as problem:
        sys.exit(f"no database as in {MY_CNF}: {problem.args[-1]}")
    run(handle, *sys.argv[1:], context=pool)
