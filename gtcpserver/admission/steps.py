"""Stage: connections that have something to do before a handler gets them, without a greenlet for each.

A PROXY header that is read, a TLS handshake: neither is a handler, and a client that connects and says nothing must not
hold a place in the pool. So they run as event callbacks, bounded in time and number.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection

log = logging.getLogger("gtcpserver")

#: Seconds until those who are overdue are ended if that has failed.
AGAIN_SECONDS = 1.0


class Stage:
    """What is under way, of one kind.

    Args:
        what: it is, for messages: "TLS handshake".
        seconds: how long one may take.
        most: how many may be under way; when another comes, the oldest is dropped.
        make: makes the Step of a connection.
        done: called in the hub with a connection that has passed.
        failed: called in the hub with a connection that has not, and the kind of the failure: what the step calls it,
            "crowded_out", "stopped", or "not_begun" (no memory to begin with).
        failures: counts them by kind.
    """

    def __init__(
        self,
        what: str,
        seconds: float,
        most: int,
        make: Callable[[Connection], Step],
        done: Callable[[Connection], Any],
        failed: Callable[[Connection, str], Any],
        failures: Counter[str],
    ) -> None:
        self.what = what
        self._seconds = seconds
        self._most = most
        self._make = make
        self._under_way: dict[Step, None] = {}
        self._timer: Any = None
        self.done = done
        self.failed = failed
        self.failures = failures

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, connection: Connection) -> None:
        """Take a new connection. Only from the hub.

        Raises:
            Exception: it could not be begun, and has failed.
        """
        step = None
        try:
            step = self._make(connection)
            step.stage = self
            step.until = monotonic() + self._seconds
            self._under_way[step] = None
            # Afterwards: while one goes and another comes, the stage is never seen empty.
            if len(self._under_way) > self._most:
                oldest = next(iter(self._under_way))
                oldest.fail(TimeoutError(f"too many at once, this {self.what} was the oldest"), kind="crowded_out")
            step.wait(connection.stream.reading or connection.stream.make_read_watcher())
            if self._timer is None:
                self._start_timer(self._seconds)
        except BaseException:
            if step is not None:
                self._under_way.pop(step, None)
                step.let_go()
            self.note_failure(connection, "not_begun")
            raise

    def end_all(self) -> None:
        """Drop all that is under way."""
        for step in list(self._under_way):
            step.fail(TimeoutError("the server stops"), kind="stopped")

    def left_in_child(self) -> None:
        """In a forked child: close them there."""
        for step in self._under_way:
            step.connection.left_by_child()
        self._under_way = {}
        self._timer = None

    def leave(self, step: Step) -> None:
        del self._under_way[step]

    def note_failure(self, connection: Connection, kind: str) -> None:
        try:
            self.failures[kind] += 1
        finally:
            self.failed(connection, kind)

    def _start_timer(self, seconds: float) -> None:
        # It comes again if there was no memory for what it was to do.
        timer = get_hub().loop.timer(seconds, AGAIN_SECONDS, ref=False)
        timer.start(self._end_overdue, update=True)
        if self._timer is not None:
            self._timer.close()
        self._timer = timer

    def _end_overdue(self) -> None:
        now = monotonic()
        # All have the same time, so they are overdue in the order they came.
        for step in list(self._under_way):
            if step.until > now:
                self._start_timer(step.until - now)
                return
            step.fail(TimeoutError(f"no {self.what} within {self._seconds:g} s"))
        self._timer.close()
        self._timer = None


class Step:
    """One connection in a stage. A subclass defines `advance` and `kind_of`.

    Attributes:
        stage, until: given by the stage; monotonic time at which it is overdue.
    """

    __slots__ = ("connection", "stage", "until")

    stage: Stage
    until: float

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def advance(self) -> Any:
        """Go on as far as it goes without waiting; returns the io watcher to wait for, None at the end. May raise."""
        raise NotImplementedError

    def kind_of(self, error: BaseException) -> str:
        """What a failure is called in the counters. May send the client a last word."""
        raise NotImplementedError

    def run(self) -> None:
        """In the event loop, when something has come."""
        try:
            watcher = self.advance()
            if watcher is not None:
                self.wait(watcher)
                return
            self.connection.stream.take_back()
        except Exception as error:
            self.fail(error)
            return
        self.stage.leave(self)
        self.stage.done(self.connection)

    def wait(self, watcher: Any) -> None:
        """Run again when this watcher says so, and no other."""
        stream = self.connection.stream
        for other in (stream.reading, stream.writing):
            if other is not None and other is not watcher:
                other.stop()
        if watcher.callback is None:
            watcher.start(self.run)
        else:
            watcher.callback = self.run

    def let_go(self) -> None:
        """Leave the watchers stopped: the connection is about to be closed."""
        stream = self.connection.stream
        for watcher in (stream.reading, stream.writing):
            if watcher is not None:
                watcher.stop()

    def throw(self, error: BaseException) -> None:
        """As a greenlet's: its connection cannot be watched."""
        self.fail(error)

    def fail(self, error: BaseException, kind: str | None = None) -> None:
        """It did not work out."""
        stage, connection = self.stage, self.connection
        stage.leave(self)
        self.let_go()
        try:
            kind = kind or self.kind_of(error)
        except Exception:
            kind = "other"
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s with %s failed (%s): %s", stage.what, connection.client_address, kind, error)
        stage.note_failure(connection, kind)
