"""Quotas: how many bytes a user may move in a day or a month.

Bytes are counted in memory, and written to a file (`quota_file`) every other second, beside the event loop. Then the
bytes that other worker processes have written are known, too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from time import monotonic, time
from typing import Any, Literal

import gevent
from gevent.hub import get_hub
from gevent.lock import BoundedSemaphore
from gevent.threadpool import ThreadPool
from greenlet import getcurrent

from gtcpserver.checks import check_whole_number
from gtcpserver.errors import ConfigError

from .errors import QuotaUsedUp
from .quota_file import FAILURES, Ledger

log = logging.getLogger("gtcpserver")

Period = Literal["day", "month"]

#: Seconds between two writes: what a killed process loses.
WRITE_SECONDS = 2.0

#: Seconds that a client waits for the file. A disk that takes longer holds nobody up: users are then served by what is
#: known.
PATIENCE = 1.0

#: Seconds to write the last bytes when the server has stopped.
CLOSE_SECONDS = 5.0

#: Seconds between two log lines about a file that cannot be used.
LOG_SECONDS = 60.0


def period_at(period: Period, at: float) -> str:
    """Return the name of the day or month (UTC) of a time."""
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d" if period == "day" else "%Y-%m")


def end_of_period(period: Period, at: float) -> datetime:
    """Return when the day or month of a time ends."""
    day = datetime.fromtimestamp(at, timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day + timedelta(days=1)
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1)


class Quota:
    """The quotas of all users, and what they have moved.

    Args:
        file: the file to count in.
        most: bytes of each user in a period, both directions together; None: no limit, bytes are only counted.
        users: the same of users who have another quota.
        period: "day" or "month", of UTC.

    Raises:
        ConfigError: an argument is invalid, or there is no folder for the file.

    Example::

        from gtcpserver.proxy.gate import Gate
        from gtcpserver.proxy.quota import Quota

        gate = Gate(quota=Quota("quota", most=10**9, users={"backup": None}, period="day"))
    """

    def __init__(
        self,
        file: str,
        *,
        most: int | None = None,
        users: Mapping[str, int | None] | None = None,
        period: Period = "month",
    ) -> None:
        check_whole_number("quota.bytes", most, least=0, none="for no limit")
        for name, value in (users or {}).items():
            check_whole_number(f"quota.users.{name}", value, least=0, none="for no limit")
        folder = os.path.dirname(file) or "."
        if not file or not os.path.isdir(folder):
            raise ConfigError(f"quota.file must be in a folder that is there, got {file!r}")
        self._most = most
        self._users = dict(users or {})
        self._period: Period = period
        self._ledger = Ledger(file)
        self._name = file
        self._threads: ThreadPool | None = None
        self._lock = BoundedSemaphore(1)
        #: Bytes by user: as the file has them, and not yet written.
        self._used: dict[str, int] = {}
        self._moved: dict[str, int] = {}
        self._charged = ""
        self._newest = ""  # the newest period of the clock
        self._later: Any = None
        self._syncing: Any = None
        self._synced = -WRITE_SECONDS
        self._is_slow = False
        self._logged = -LOG_SECONDS
        self._is_closed = False

    def most_of(self, user: str) -> int | None:
        """Return a user's quota in bytes; None: no limit."""
        return self._users.get(user, self._most)

    def used_by(self, user: str) -> int:
        """Return the bytes that a user has moved in this period, as far as they are known here."""
        return self._used.get(user, 0) + self._moved.get(user, 0)

    def charge(self, user: str, size: int) -> bool:
        """Count bytes that a user has moved; return whether the quota is used up."""
        # Hot: once a piece, 0.6 us.
        self._moved[user] = self._moved.get(user, 0) + size
        if self._later is None:
            self._write_later()
        most = self._users.get(user, self._most)
        return most is not None and self._used.get(user, 0) + self._moved[user] >= most

    def check(self, user: str) -> None:
        """Check whether a user may begin something. May wait for the file.

        Raises:
            QuotaUsedUp: it may not.
        """
        if monotonic() - self._synced >= WRITE_SECONDS:
            self._read()
        most = self.most_of(user)
        if most is not None and self.used_by(user) >= most:
            raise self.used_up(user)

    def used_up(self, user: str) -> QuotaUsedUp:
        """Return the error of a user whose quota is used up, with the reason for the log."""
        until = end_of_period(self._period, time())
        return QuotaUsedUp(f"{self.most_of(user)} bytes a {self._period}, until {until:%Y-%m-%dT%H:%M:%SZ}", until)

    def close(self) -> None:
        """Write what is not yet written, after the last connection has ended."""
        if getcurrent() is get_hub():
            gevent.spawn(self._close)
        else:
            self._close()

    def _close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._moved:
            with gevent.Timeout(CLOSE_SECONDS, False):
                self._sync()
        if self._threads is not None:
            with gevent.Timeout(CLOSE_SECONDS, False):
                self._in_thread(self._ledger.close)
                self._threads.kill()

    # -- the file ----------------------------------------------------------------------------------------------------

    def _write_later(self) -> None:
        self._later = gevent.spawn_later(WRITE_SECONDS, self._write)

    def _write(self) -> None:
        if self._is_closed:
            return  # then it was written
        try:
            self._sync()
        finally:
            self._later = None
        if self._moved:
            self._write_later()

    def _read(self) -> None:
        """Learn what other processes have written: nothing was read for a while."""
        if self._syncing is None:
            self._syncing = gevent.spawn(self._sync)
        if not self._is_slow:
            self._syncing.join(PATIENCE)
            self._is_slow = self._syncing is not None

    def _sync(self) -> None:
        """Write, and read. Not to be interrupted: whether it was written would be unknown."""
        with self._lock:
            period, moved = period_at(self._period, time()), dict(self._moved)
            try:
                charged, changed = self._in_thread(self._ledger.sync, period, moved, dict(self._used))
            except (*FAILURES, RuntimeError, MemoryError) as error:  # no thread can be started, say
                self._go_on_without(period, error)
            else:
                self._note(charged, changed, moved)
            finally:
                self._newest = max(self._newest, period)
                self._synced = monotonic()
                self._syncing, self._is_slow = None, False
            while self._ledger.set_aside:
                log.error("%s; counting goes on in a new file, with what is known here", self._ledger.set_aside.pop())

    def _note(self, charged: str, changed: Mapping[str, int], moved: Mapping[str, int]) -> None:
        if charged != self._charged:
            self._charged, self._used = charged, {}
        self._used.update(changed)
        for user, size in moved.items():
            self._moved[user] -= size
            if not self._moved[user]:
                del self._moved[user]

    def _go_on_without(self, period: str, error: Exception) -> None:
        """Count in memory, until the file can be used again."""
        if self._newest and period > self._newest:
            self._used, self._moved = {}, {}  # a new period, which the file cannot tell
        if monotonic() - self._logged >= LOG_SECONDS:
            self._logged = monotonic()
            log.error("the quota file %s cannot be used: %s; each worker counts by itself meanwhile", self._name, error)

    def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._threads is None:
            self._threads = ThreadPool(1)
        return self._threads.apply(function, args)
