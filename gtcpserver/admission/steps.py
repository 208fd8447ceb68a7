"""Stage: connections in one step of admission, without a greenlet for each.

Reading a PROXY header and doing a TLS handshake need no handler, and a client that connects and sends nothing must not
hold a place in the pool. So the steps run as event callbacks, limited in time and number.
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

#: Seconds until overdue steps are failed again, if memory ran out the first time.
AGAIN_SECONDS = 1.0


class Stage:
    """The steps of one kind that are under way.

    Args:
        what: name of the work, used in messages ("TLS handshake").
        seconds: time limit of each step.
        most: most steps under way at once; one more drops the oldest.
        make: makes the Step of a connection.
        done: called in the hub with each connection that passed.
        failed: called in the hub with each connection that failed, and the kind of failure: the result of
            `Step.kind_of`, "crowded_out", "stopped", or "not_begun" (memory ran out).
        failures: counter of failures, by kind.
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
        """Take a new connection. Call in the hub only.

        Raises:
            Exception: memory ran out. The connection has failed as "not_begun".
        """
        step = None
        try:
            step = self._make(connection)
            step.stage = self
            step.until = monotonic() + self._seconds
            self._under_way[step] = None
            # After the new step was added, so that the stage never looks empty.
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
        """Fail every step under way."""
        for step in list(self._under_way):
            step.fail(TimeoutError("the server stops"), kind="stopped")

    def left_in_child(self) -> None:
        """Close the child's copies of the connections. Called in a forked child."""
        for step in self._under_way:
            step.connection.left_by_child()
        self._under_way = {}
        self._timer = None

    def leave(self, step: Step) -> None:
        del self._under_way[step]

    def hand_over(self, step: Step) -> None:
        """It has passed."""
        under_way, connection = self._under_way, step.connection
        del under_way[step]
        try:
            self.done(connection)
        except BaseException:
            # Without memory for the call nobody knows of the connection: it stays, until it is overdue.
            under_way[step] = None
            if connection.closed:
                del under_way[step]
            raise

    def note_failure(self, connection: Connection, kind: str) -> None:
        try:
            self.failures[kind] += 1
        finally:
            self.failed(connection, kind)

    def _start_timer(self, seconds: float) -> None:
        # The timer repeats, in case memory runs out in its callback.
        timer = get_hub().loop.timer(seconds, AGAIN_SECONDS, ref=False)
        timer.start(self._end_overdue, update=True)
        if self._timer is not None:
            self._timer.close()
        self._timer = timer

    def _end_overdue(self) -> None:
        now = monotonic()
        # All steps have the same time limit, so they are overdue in the order they began.
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
        stage: the stage it is in.
        until: monotonic time at which it is overdue.
    """

    __slots__ = ("connection", "stage", "until")

    stage: Stage
    until: float

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def advance(self) -> Any:
        """Go on as far as possible without waiting.

        Returns:
            The io watcher to wait for; None: the step is complete.

        Raises:
            Exception: the step has failed; `kind_of` names the failure.
        """
        raise NotImplementedError

    def kind_of(self, error: BaseException) -> str:
        """Return the name of a failure for the counters. May send the client an error message."""
        raise NotImplementedError

    def run(self) -> None:
        """Continue after an event. Called in the hub."""
        try:
            watcher = self.advance()
            if watcher is not None:
                self.wait(watcher)
                return
            self.connection.stream.take_back()
        except Exception as error:
            self.fail(error)
            return
        self.stage.hand_over(self)

    def wait(self, watcher: Any) -> None:
        """Run again at the event of this watcher, and of no other."""
        stream = self.connection.stream
        for other in (stream.reading, stream.writing):
            if other is not None and other is not watcher:
                other.stop()
        if watcher.callback is None:
            watcher.start(self.run)
        else:
            watcher.callback = self.run

    def let_go(self) -> None:
        """Stop the watchers: the connection is about to be closed."""
        stream = self.connection.stream
        for watcher in (stream.reading, stream.writing):
            if watcher is not None:
                watcher.stop()

    def throw(self, error: BaseException) -> None:
        """Fail: the event loop cannot watch the connection (called by process/watcher.py)."""
        self.fail(error)

    def fail(self, error: BaseException, kind: str | None = None) -> None:
        """Leave the stage, which counts the failure and passes it on.

        Args:
            error: what went wrong.
            kind: name of the failure; None: ask `kind_of`.
        """
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
