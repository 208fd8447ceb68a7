"""The parent that started and watches this process: a terminal, or a service manager that watches only one process."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from gevent import monkey

_getsignal: Callable[[int], Any] = monkey.get_original("signal", "getsignal")

HANGUP_SECONDS = 2.0
"""How long after the loss of the terminal a SIGHUP is its: the kernel sends it at once, a shell that passes it
on to its jobs (bash(1), "SIGNALS") a little later."""

WATCHERS = frozenset(
    {
        *("supervisord", "circusd", "runsv", "supervise", "s6-supervise", "perpd"),
        *("foreman", "honcho", "overmind", "hivemind", "goreman"),
    }
)
"""Service managers that start a process and know it by its number: its end is the end of the service, whatever another
process does. As the names of their processes, /proc/PID/comm."""


class Terminal:
    """Tells a SIGHUP of a closed terminal from one that asks for a reload (termios(3), "hang up").

    Args:
        has_terminal: whether this process has one now.
    """

    def __init__(self, has_terminal: Callable[[], bool]) -> None:
        self._has_terminal = has_terminal
        self._is_there = has_terminal()
        # nohup(1)
        self._matters = _getsignal(signal.SIGHUP) is not signal.SIG_IGN
        self._lost_at: float | None = None

    def look(self, now: float) -> None:
        """Call a few times a second."""
        if self._is_there and not self._has_terminal():
            self._is_there = False
            self._lost_at = now

    def hung_up(self, now: float) -> bool | None:
        """Return whether a SIGHUP received now is the terminal's. None: it is, but must be ignored, as by nohup(1)."""
        self.look(now)
        if self._lost_at is None or now - self._lost_at > HANGUP_SECONDS:
            return False
        return True if self._matters else None


def has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        # ENXIO: there is none. Others, such as EMFILE, are no news of it.
        return error.errno not in _NO_TERMINAL
    return True


_NO_TERMINAL = frozenset({errno.ENXIO, errno.EIO, errno.ENOENT, errno.EACCES})  # the last two: a sandbox


def who_ends_with_us() -> str:
    """Why this process must not leave its place to another: "" or a sentence.

    systemd knows of the new one where the unit has Type=notify.
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
