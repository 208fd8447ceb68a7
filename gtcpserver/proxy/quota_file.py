"""The file in which quotas are counted: SQLite, which all worker processes share.

A `Ledger` is used by one thread at a time, beside the event loop: disks may be slow.

Bytes are charged to the day or month of the clock. A clock that steps back comes to a period that is known, and goes on
with its bytes; or to one that is older than the file itself: then the newest known one is charged. So no period is
granted twice, and a clock that was wrong once (in the year 2100, say) locks nobody out: the real periods are as they
were.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress

from gevent.monkey import get_original

#: Seconds to wait for other processes, which write for some milliseconds each.
BUSY_SECONDS = 5.0

#: Seconds between two questions whether a folder is free. SQLite asks at such distances, too.
_PAUSE = 0.02

#: Periods whose bytes are kept, the newest.
MOST_PERIODS = 100

#: How the file can fail.
FAILURES = (sqlite3.Error, OSError)

#: gevent's would make the thread an event loop.
_sleep = get_original("time", "sleep")

#: No write-ahead log: its index is mapped into memory, and a process that reads there after somebody has truncated that
#: file, or the disk has failed, is killed by SIGBUS, with all its connections. A write takes some milliseconds every
#: other second, in a thread. A crash of the system loses no more than one of the process.
_SETTINGS = "PRAGMA journal_mode = TRUNCATE; PRAGMA synchronous = FULL; PRAGMA mmap_size = 0;"

_TABLES = """
CREATE TABLE IF NOT EXISTS periods (period TEXT PRIMARY KEY, charged_to TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS usage (
    period TEXT, user TEXT, bytes INTEGER NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (period, user)
);
CREATE INDEX IF NOT EXISTS changed ON usage (period, version);
"""

_ADD = """
INSERT INTO usage (period, user, bytes, version) VALUES (?, ?, ?, ?)
ON CONFLICT (period, user) DO UPDATE SET version = excluded.version, bytes =
"""
_SUM, _LARGER = "bytes + excluded.bytes", "max(bytes, excluded.bytes)"


class Ledger:
    """The file of one service.

    Args:
        path: the file; it is made if it is missing, readable by its owner alone.

    Attributes:
        set_aside: why and where damaged files were set aside; for the log, which threads do not write.
    """

    def __init__(self, path: str) -> None:
        self.set_aside: list[str] = []
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what is open, or was tried
        self._charged: str | None = None
        self._seen = 0  # the last version that was read
        self._knows_more = False  # the file is another one than before: what was in that is not there

    def sync(self, period: str, moved: Mapping[str, int], known: Mapping[str, int]) -> tuple[str, dict[str, int]]:
        """Add what users have moved; return the period that was charged, and the bytes of users that have changed.

        A damaged file is set aside, and another one made, with what is known.

        Args:
            period: that of the clock, as "2026-11-30" or "2026-11".
            known: the bytes of users that earlier calls have returned, of the same period.

        Raises:
            sqlite3.Error, OSError: nothing was added.
        """
        try:
            return self._sync(period, moved, known)
        except sqlite3.DatabaseError as error:
            self.close()
            # Its subclasses are other failures: a full disk, a lock, a folder that may not be written.
            if type(error) is not sqlite3.DatabaseError:
                raise
            self._set_aside(error)
            return self._sync(period, moved, known)

    def close(self) -> None:
        """Close the file; `sync` opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _sync(self, period: str, moved: Mapping[str, int], known: Mapping[str, int]) -> tuple[str, dict[str, int]]:
        db = self._open()
        charged = _charged_to(db, period)
        if charged is None or moved or self._knows_more:
            with _transaction(db):
                charged = charged or _begin_period(db, period)
                version = _next_version(db)
                if self._knows_more and self._charged in (None, charged):
                    db.executemany(_ADD + _LARGER, _rows(charged, version, known))
                db.executemany(_ADD + _SUM, _rows(charged, version, moved))
            self._knows_more = False
        if charged != self._charged:
            self._charged, self._seen = charged, 0
        rows = db.execute(
            "SELECT user, bytes, version FROM usage WHERE period = ? AND version > ?", (charged, self._seen)
        ).fetchall()
        self._seen = max((version for _, _, version in rows), default=self._seen)
        return charged, {user: size for user, size, _ in rows}

    def _open(self) -> sqlite3.Connection:
        try:
            found: tuple[int, int] | None = _identity(self._path)
        except FileNotFoundError:
            found = None
        if self._db is not None and found == self._file:
            return self._db
        if self._file not in (None, found):
            self._knows_more = True  # noted before it is closed: then the next file may have its inode
        self.close()
        # One after another: of several that make a file, or its tables, at the same time some would fail.
        with _alone_in(os.path.dirname(self._path) or "."):
            return self._open_alone()

    def _open_alone(self) -> sqlite3.Connection:
        try:
            found = _identity(self._path)
        except FileNotFoundError:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            found = _identity(self._path)
        self._file, self._seen = found, 0
        db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.executescript(_SETTINGS + _TABLES)
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = f"{self._path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        with _alone_in(os.path.dirname(self._path) or "."):
            # Another process may have done it: then this is a good one.
            if _identity(self._path) != self._file:
                return
            # Its journal first, which SQLite would apply to the next file.
            with suppress(FileNotFoundError):
                os.rename(self._path + "-journal", aside + "-journal")
            os.rename(self._path, aside)
        self.set_aside.append(f"the quota file {self._path} is damaged ({error}): it is now {aside}")


def read_usage(path: str, period: str) -> dict[str, int]:
    """Return the bytes of all users in a period.

    Raises:
        sqlite3.Error, OSError: the file cannot be read.
    """
    os.stat(path)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
        db.execute("PRAGMA query_only = 1")
        charged = _charged_to(db, period) or period
        return dict(db.execute("SELECT user, bytes FROM usage WHERE period = ?", (charged,)).fetchall())


def _rows(period: str, version: int, sizes: Mapping[str, int]) -> list[tuple[str, str, int, int]]:
    return [(period, _text(user), size, version) for user, size in sizes.items()]


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _text(user: str) -> str:
    """Return a name that SQLite takes: without lone surrogates, which certificates may have."""
    return user.encode("utf-8", "backslashreplace").decode()


def _charged_to(db: sqlite3.Connection, period: str) -> str | None:
    found = db.execute("SELECT charged_to FROM periods WHERE period = ?", (period,)).fetchone()
    return None if found is None else str(found[0])


def _begin_period(db: sqlite3.Connection, period: str) -> str:
    """Note a period that the clock has come to; return the one to charge."""
    found = _charged_to(db, period)  # another process may have noted it meanwhile
    if found is not None:
        return found
    # Days and months differ in length.
    oldest, newest = db.execute(
        "SELECT min(period), max(charged_to) FROM periods WHERE length(period) = ?", (len(period),)
    ).fetchone()
    charged = newest if oldest is not None and period < oldest else period
    db.execute("INSERT INTO periods VALUES (?, ?)", (period, charged))
    db.execute(
        "DELETE FROM usage WHERE period NOT IN (SELECT charged_to FROM periods ORDER BY period DESC LIMIT ?)",
        (MOST_PERIODS,),
    )
    return str(charged)


def _next_version(db: sqlite3.Connection) -> int:
    found = db.execute("SELECT max(version) FROM usage").fetchone()[0]
    return (found or 0) + 1


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


@contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Keep other processes from opening, or setting aside, a file in this folder.

    Raises:
        OSError: ETIMEDOUT: another process keeps it locked, which any user may do who can read it.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + BUSY_SECONDS
        while not _locked(number):
            if time.monotonic() > until:
                raise OSError(errno.ETIMEDOUT, "another process keeps the folder locked", folder)
            _sleep(_PAUSE)
        yield
    finally:
        os.close(number)


def _locked(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
