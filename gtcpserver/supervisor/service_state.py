"""Tell systemd the state of one server in this process, as a master does of its workers (sd_notify(3))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

import gevent

from .systemd import Notifier, notify, watchdog_interval

if TYPE_CHECKING:
    from gtcpserver.server.server import Server

#: Seconds between two attempts while the manager's queue is full. A unix datagram socket that is not connected cannot
#: be waited for (unix(7)): poll(2) says nothing about the receiver's queue.
RETRY_SECONDS = 0.05

#: Seconds that the end of the process waits for room in the queue; as long as a worker's last message.
LAST_WORDS_SECONDS = 2.0


@contextmanager
def service_state_told(server: Server) -> Iterator[None]:
    """Notify systemd during the block, which runs ``serve_forever``.

    READY=1 is sent once the server listens, STOPPING=1 when its stop begins, and WATCHDOG=1 as often as the unit asks.
    """
    teller = _Teller(server)
    greenlet = gevent.spawn(teller.run)
    try:
        yield
    finally:
        greenlet.kill()
        teller.finish()


class _Teller:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._notifier = Notifier()
        self._ready = self._stopping = False
        self._watchdog = watchdog_interval()
        self._watchdog_at = 0.0

    def run(self) -> None:
        while self._server.state.value == "new":  # the server is looking up the address of a name
            gevent.sleep(RETRY_SECONDS)
        self._ready = True
        self._notifier.say("READY=1")
        while not self._server.stopping_event.wait(self._turn()):
            pass
        self._say_stopping()
        # A stop may take longer than the watchdog allows.
        while (pause := self._turn()) is not None:
            gevent.sleep(pause)

    def _turn(self) -> float | None:
        """Send what is due; return the seconds until the next turn, None if there is none."""
        done = self._notifier.flush()
        now = monotonic()
        if self._watchdog is not None and now >= self._watchdog_at:
            if notify("WATCHDOG=1"):
                self._watchdog_at = now + self._watchdog
            else:
                done = False
        if not done:
            return RETRY_SECONDS
        return None if self._watchdog is None else max(0.0, self._watchdog_at - now)

    def _say_stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._notifier.say("STOPPING=1")

    def finish(self) -> None:
        """Send the rest. A manager that reads nothing delays the end for LAST_WORDS_SECONDS."""
        if self._ready:
            self._say_stopping()
        give_up = monotonic() + LAST_WORDS_SECONDS
        while not self._notifier.flush() and monotonic() < give_up:
            gevent.sleep(RETRY_SECONDS)
