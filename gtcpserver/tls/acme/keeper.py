"""In the server's process: looks whether there is something to do, and starts the helper process for it.

Every worker has such a task. The lock lets one of them, in all servers that share the folder, start a helper.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
import gevent.socket

from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import ConfigError
from gtcpserver.process.children import is_reaped
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import close_in_children

from .folder import Folder, read_json
from .schedule import State
from .settings import ACMESettings

if TYPE_CHECKING:
    from ..credentials import Credentials

log = own_logger("gtcpserver.tls")

#: Seconds between two looks at the folder: a stat(2), and a file of 300 bytes. 0.1 ms.
LOOK_SECONDS = 10.0

#: Seconds that a helper may take: an order has 300, and some requests precede and follow it.
HELPER_SECONDS = 600.0

#: Seconds until a helper that ended without a result is started again, and the longest such pause.
FIRST_PAUSE = 60.0
LONGEST_PAUSE = 3600.0

LONGEST_OUTPUT = 256 * 1024  # bytes; a look has some lines

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING}

#: Seconds for the end of a helper that was killed: a millisecond, unless it waits for a disk.
KILL_SECONDS, KILL_ATTEMPTS = 1.0, 100

# With the path of this process: the command line's -m would search the current directory first.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from gtcpserver.tls.acme.helper import main; main()"


class HelperFailed(Exception):
    """The helper process has ended without a result."""


def keep_certificate(credentials: Credentials, settings: ACMESettings) -> None:
    """Keep a certificate for as long as the server runs: a task of the server (`Server.spawn`)."""
    if settings.is_staging:
        log.warning(
            "ACME: certificates for %s come from Let's Encrypt's staging environment, and no browser trusts them; if "
            "all works, use directory 'production'",
            ", ".join(settings.names),
        )
    keeper = Keeper(credentials, settings)
    while True:
        keeper.look()
        gevent.sleep(LOOK_SECONDS)


class Keeper:
    """Looks after one certificate."""

    def __init__(self, credentials: Credentials, settings: ACMESettings) -> None:
        self._credentials = credentials
        self._settings = settings
        self._folder = Folder(settings)
        self._failures = 0
        self._not_before = 0.0
        self._complaint = ""

    def look(self) -> None:
        """Start a helper, if something is due and nobody else does it, and wait for its end. Raise nothing."""
        if time.monotonic() < self._not_before:
            return
        try:
            changed = self._look()
        except Exception as error:
            self._failures += 1
            pause = min(FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE)
            self._not_before = time.monotonic() + pause
            complaint = str(error) if isinstance(error, (OSError, ConfigError, HelperFailed)) else repr(error)
            if complaint != self._complaint:
                self._complaint = complaint
                log.error("ACME: no certificates can be ordered: %s; the next attempt is in %.0f s", complaint, pause)
            return
        self._failures, self._complaint = 0, ""
        if changed:
            try:
                self._credentials.reload()
            except Exception as error:
                log.error("ACME: the new certificate cannot be used, the old one stays: %s", error)

    def _look(self) -> bool:
        if not self._is_due():
            return False
        self._folder.prepare()
        lock = self._folder.lock()
        if lock is None:
            return False
        try:
            is_due = self._is_due()
        except BaseException:
            close_descriptor(lock)  # or nobody would ever order again
            raise
        if not is_due:
            close_descriptor(lock)
            return False
        return run_helper(self._settings, lock)

    def _is_due(self) -> bool:
        state = State.from_json(read_json(self._folder.state))
        return state.is_due(self._settings.names, os.path.exists(self._folder.certificate), time.time())


def run_helper(settings: ACMESettings, lock: int, work: str = "look") -> bool:
    """Run a helper process to its end, and log what it says. Waits in gevent; ends it if this greenlet is ended.

    Args:
        lock: descriptor of the lock. The helper gets a copy, so that nobody else begins before it has ended, and this
            one is closed at once: a handler's child, which would have it too, may live for long.
        work: "look" or "roll_over".

    Returns:
        whether there is a new certificate.

    Raises:
        HelperFailed: it has failed; the log may say why.
        OSError: it cannot be started.
    """
    ours, helper = _start(lock)
    try:
        with suppress(ConnectionError):  # it has ended already: that shows below
            ours.sendall(json.dumps({"settings": settings.to_json(), "work": work}).encode())
            ours.shutdown(socket.SHUT_WR)
        return _listen(ours)
    finally:
        ours.close()
        _end(helper)


def _start(lock: int) -> tuple[Any, int]:
    """Start a helper; return a socket to it, and its process ID. Close the lock. Raise OSError and HelperFailed."""
    try:
        ours, theirs = gevent.socket.socketpair()
        try:
            close_in_children(ours)
            os.set_blocking(theirs.fileno(), True)
            return ours, _spawn(theirs.fileno(), lock)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
    finally:
        close_descriptor(lock)


def _spawn(channel: int, lock: int) -> int:
    if not sys.executable:
        raise HelperFailed("this program does not know its Python interpreter (sys.executable)")
    program = _PROGRAM.format(path=[one or os.getcwd() for one in sys.path])
    # The lock under another number, since a copy under the same one would be closed by the exec.
    copies = ((channel, 0), (channel, 1), (lock, 3 if lock != 3 else 4))
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, old, new) for old, new in copies],
        setsid=True,  # Ctrl-C is for the server
        setsigmask=(),
    )


def _listen(ours: Any) -> bool:
    """Log what the helper says, until its result."""
    until = time.monotonic() + HELPER_SECONDS
    held, size, said = b"", 0, ""
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise HelperFailed(f"the helper process has not ended within {HELPER_SECONDS:.0f} s")
        ours.settimeout(left)
        try:
            more = ours.recv(4096)
        except TimeoutError:
            continue
        except ConnectionError:
            more = b""  # it has ended without reading its input
        size += len(more)
        if not more or size > LONGEST_OUTPUT:
            raise HelperFailed(said or "the helper process has ended without a result")
        *lines, held = (held + more).split(b"\n")
        for line in lines:
            message = _message(line)
            if "changed" in message:
                return bool(message["changed"])
            level, said = message.get("level"), str(message.get("text", ""))
            if level in _LEVELS:  # an error is raised
                log.log(_LEVELS[level], "ACME: %s", said)


def _message(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _end(helper: int) -> None:
    """Kill a helper that is still there, and reap it."""
    for attempt in range(KILL_ATTEMPTS):
        if is_reaped(helper):
            return
        if not attempt:
            os.kill(helper, signal.SIGKILL)  # it is not reaped, so this is its ID
        gevent.sleep(KILL_SECONDS / KILL_ATTEMPTS)
