"""Line: one connection to Redis, on which many questions are under way at once."""

from __future__ import annotations

import select
import sys
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import get_hub
from gevent.monkey import get_original

from .connect import LONGEST_ANSWER, StoreError, connect
from .scripts import source_of
from .settings import StoreSettings

_poll: Any = get_original("select", "poll")

#: Looks whether an answer is late, in a time-out: it is noticed a quarter of that later at most.
LOOKS = 4

#: Called with the answer, None if there was none. Must neither wait nor raise.
Answered = Callable[[Any], Any]


class Line:
    """One connection. Answers come in the order of the questions, and one that is late ends the line.

    Args:
        settings: where it leads.
        failed: called once, with the error, when the line is dead; also before it was started. Must not wait.
        before_writing: called before questions are written, to add some.
    """

    def __init__(
        self, settings: StoreSettings, failed: Callable[[Exception], Any], before_writing: Callable[[], Any]
    ) -> None:
        self._settings = settings
        self._failed = failed
        self._before_writing = before_writing
        self._connection: Any = None
        self._scripts: dict[str, bytes] = {}
        self._outgoing: list[tuple[tuple[Any, ...], Answered | None]] = []
        self._in_flight: deque[tuple[float, Answered | None]] = deque()
        self._wanted = Event()
        self._timer: Any = None
        self._writer: Any = None
        self._dead = False
        self._was_late = False

    # -- before it is started: one question at a time ----------------------------------------------------------------

    def open(self, scripts: Sequence[str]) -> None:
        """Connect, and have Redis keep the scripts. Waits.

        Raises:
            StoreError, OSError, redis.RedisError: as `connect`.
        """
        self._connection = connect(self._settings)
        for script in scripts:
            self._connection.send_command("SCRIPT", "LOAD", source_of(script))
            self._scripts[script] = self._connection.read_response()

    def call(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script, and return its answer. Waits."""
        self._connection.send_command(*self._command(script, keys, arguments))
        return self._connection.read_response()

    def _command(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> tuple[Any, ...]:
        return ("EVALSHA", self._scripts[script], len(keys), *keys, *arguments)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to take questions. `read` must be running from now on."""
        seconds = self._settings.timeout
        self._connection.own_socket.settimeout(None)  # `_look` sees to it
        self._timer = get_hub().loop.timer(seconds / LOOKS, seconds / LOOKS, ref=False)
        self._writer = gevent.spawn(self._write)

    def send(self, script: str, keys: Sequence[str], arguments: Sequence[Any], answered: Answered | None) -> None:
        """Ask; the answer, or None after a failure, is passed to a function."""
        question = self._command(script, keys, arguments), answered
        self.wake()  # first: if it fails, nothing is asked
        self._outgoing.append(question)

    def wake(self) -> None:
        """Have `before_writing` called, and what there is to write written."""
        if not self._wanted.is_set():
            self._wanted.set()

    def _write(self) -> None:
        try:
            while not self._dead:
                self._wanted.wait()
                self._wanted.clear()
                self._before_writing()
                asked, self._outgoing = self._outgoing, []
                if not asked:
                    continue
                until = monotonic() + self._settings.timeout
                self._in_flight.extend([(until, answered) for _, answered in asked])
                if not self._timer.active:
                    self._timer.again(self._look)
                packed = self._connection.pack_commands([command for command, _ in asked])
                self._connection.send_packed_command(packed, check_health=False)
        except Exception as error:
            self.fail(error)

    def read(self) -> None:
        """Pass answers on until the line is dead.

        Raises:
            Exception: why it is.
        """
        while not self._dead:
            reply = self._connection.read_response()
            self._connection.own_socket.left = LONGEST_ANSWER
            self._was_late = False
            answered = self._in_flight.popleft()[1]
            if answered is not None:
                answered(reply)
        raise StoreError("closed")

    def _look(self) -> None:
        """Is an answer late? Called in the hub, as long as one is under way."""
        if not self._in_flight:
            self._timer.stop()
        elif self._in_flight[0][0] <= monotonic():
            if not self._was_late and self._is_readable():
                self._was_late = True  # we are late, not Redis: something has blocked the event loop
            else:
                self.fail(StoreError(f"no answer within {self._settings.timeout:g} s"))

    def _is_readable(self) -> bool:
        try:
            poll = _poll()
            poll.register(self._connection.own_socket.fileno(), select.POLLIN)
            return bool(poll.poll(0))
        except Exception:
            return False

    def fail(self, error: Exception) -> None:
        """End the line; every question under way gets no answer. Does not wait."""
        if not self._dead:
            self._dead = True
            try:
                self._failed(error)
            finally:
                self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.close()
        try:
            if self._connection is not None:
                self._connection.disconnect()
        finally:
            unanswered = [answered for _, answered in self._in_flight] + [answered for _, answered in self._outgoing]
            self._in_flight.clear()
            self._outgoing = []
            self._wanted.set()  # ends the writer
            for answered in unanswered:
                if answered is None:
                    continue
                try:
                    answered(None)
                except Exception:  # memory ran out: the others must hear it, too
                    get_hub().handle_error(self, *sys.exc_info())

    def left_in_child(self) -> None:
        """Let go. Called in a forked child, where the socket is closed already."""
        self._dead = True
        self._timer = self._writer = None
        self._in_flight.clear()
        self._outgoing = []
