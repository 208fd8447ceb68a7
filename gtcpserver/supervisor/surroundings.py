"""The parent that started and watches this process: a terminal, or a service manager that watches only one process."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from gevent import monkey

_getsignal: Callable[[int], Any] = monkey.get_original("signal", "getsignal")

#: Seconds after the loss of the terminal in which a SIGHUP is due to that: the kernel sends it at once, a shell that
#: passes it on to its jobs (bash(1), "SIGNALS") a little later.
HANGUP_SECONDS = 2.0

#: Service managers that know a service by the id of the process they started: the end of that process is the end of the
#: service, whatever other processes do. Names of processes, as in /proc/PID/comm.
WATCHERS = frozenset(
    {
        *("supervisord", "circusd", "runsv", "supervise", "s6-supervise", "perpd"),
        *("foreman", "honcho", "overmind", "hivemind", "goreman"),
    }
)


class Terminal:
    """Tells a SIGHUP of a closed terminal from one that asks for a reload (termios(3), "hang up").

    Args:
        has_terminal: returns whether this process has a terminal now.
    """

    def __init__(self, has_terminal: Callable[[], bool]) -> None:
        self._has_terminal = has_terminal
        self._is_there = has_terminal()
        # nohup(1) ignores it.
        self._matters = _getsignal(signal.SIGHUP) is not signal.SIG_IGN
        self._lost_at: float | None = None

    def look(self, now: float) -> None:
        """Note the loss of the terminal. Call a few times a second."""
        if self._is_there and not self._has_terminal():
            self._is_there = False
            self._lost_at = now

    def hung_up(self, now: float) -> bool | None:
        """Return whether a SIGHUP received now comes from the terminal; None: it does, but nohup(1) ignores it."""
        self.look(now)
        if self._lost_at is None or now - self._lost_at > HANGUP_SECONDS:
            return False
        return True if self._matters else None


def has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # ENXIO: there is none. Other errors, such as EMFILE, say nothing about it.
        return error.errno not in _NO_TERMINAL
    return True


_NO_TERMINAL = frozenset({errno.ENXIO, errno.EIO, errno.ENOENT, errno.EACCES})  # the last two: a sandbox


def who_ends_with_us() -> str:
    """Return why this process must not hand over to another: "" or a sentence.

    With Type=notify, systemd learns which process goes on.
    """
    if os.getpid() == 1:
        return "this is process 1, whose end is the end of its container: reload, or replace the container"
    if os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid()) and not os.environ.get("NOTIFY_SOCKET"):
        return "systemd ends a unit with the process that it started: reload, or let the unit have Type=notify"
    name = "supervisord" if "SUPERVISOR_ENABLED" in os.environ else _parent()
    if name in WATCHERS:
        return (
            f"{name} knows the process that it started, and would start another beside the new one: reload, or restart"
        )
    return ""


def _parent() -> str:
    try:
        with open(f"/proc/{os.getppid()}/comm") as file:
            return file.read().strip()
    except (OSError, UnicodeError):
        return ""
