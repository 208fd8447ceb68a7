"""The two protocols of systemd that need no library: inherited sockets and notifications.

sd_listen_fds(3) and sd_notify(3) describe them; other supervisors use them too.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque

from gevent import monkey

from gtcpserver.errors import CAPACITY_ERRNOS, ConfigError

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

#: SD_LISTEN_FDS_START.
FIRST_FD = 3


def promises_sockets() -> bool:
    """Return whether `take_listen_fds` would find descriptors, and has not been called yet."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS", "0") != "0"


def take_listen_fds() -> list[int]:
    """Return the descriptors that systemd opened for this process; a second call returns none.

    They become close-on-exec, and the variables are removed, so that processes started later do not mistake them for
    their own.

    Raises:
        ConfigError: the variables promise a descriptor that is not open.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not (pid.isascii() and pid.isdigit() and int(pid) == os.getpid() and count.isascii() and count.isdigit()):
        return []
    fds = list(range(FIRST_FD, FIRST_FD + int(count)))
    for fd in fds:
        try:
            os.set_inheritable(fd, False)
        except OSError:
            raise ConfigError(f"LISTEN_FDS is {count}, but descriptor {fd} is not open") from None
    return fds


#: Errors that may pass soon: the manager's queue is full, or memory or descriptors ran out here.
PASSING = CAPACITY_ERRNOS | {errno.EAGAIN}

#: Maximum number of waiting notifications: one line for each change of state.
MOST_WAITING = 64


class Notifier:
    """Sends notifications in order, and repeats them while the manager cannot be reached for a passing reason.

    READY=1 must not be lost: systemd waits for it at the start. Nor must MAINPID=, without which systemd ends the new
    master with the old one.
    """

    def __init__(self) -> None:
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)

    def say(self, state: str) -> None:
        self._waiting.append(state)
        self.flush()

    def flush(self) -> bool:
        """Send what waits; return False if some still does."""
        while self._waiting:
            if not notify(self._waiting[0]):
                return False
            self._waiting.popleft()
        return True


def notify(state: str) -> bool:
    """Notify the service manager, if there is one.

    Args:
        state: lines of NAME=value.

    Returns:
        False if the manager cannot be reached now (`PASSING`); True if it was, or if there is none.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return True
    try:
        with _socket_class(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
    except OSError as error:
        return error.errno not in PASSING
    except MemoryError:
        return False
    return True


def reloading() -> str:
    """Return the notification that begins a reload; the time is for Type=notify-reload."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def watchdog_interval() -> float | None:
    """Return the seconds between two WATCHDOG=1: half of the unit's WatchdogSec= (sd_watchdog_enabled(3))."""
    pid, microseconds = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds) > 0):
        return None
    if pid and pid != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
