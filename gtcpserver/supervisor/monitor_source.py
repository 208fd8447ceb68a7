"""FromMaster: the source of a monitor process, which asks the master in lines of JSON (see `monitor`)."""

from __future__ import annotations

import json
from time import monotonic
from typing import Any

import gevent
from gevent.event import AsyncResult, Event

from gtcpserver.monitoring.source import Health, SourceError, Status

#: Seconds of silence after which the master, which sends a line every second, must be stopped or blocked.
SILENCE = 5.0

#: Seconds to wait for an answer. A table of connections takes one second if a worker is blocked.
ANSWER = 4.0


class FromMaster:
    """The monitor's side of the line.

    Args:
        line: a connected socket.

    Attributes:
        knows: set when the master has sent its health.
        ended: set when the master is gone, or told this process to end.
    """

    def __init__(self, line: Any) -> None:
        self._line = line
        self.knows = Event()
        self.ended = Event()
        self._health = Health(True, False, "starting")
        self._heard_at = monotonic()
        self._waiting: dict[str, AsyncResult] = {}
        gevent.spawn(self._read)

    def say(self, line: str) -> None:
        try:
            self._line.sendall(line.encode() + b"\n")
        except OSError:
            self.ended.set()

    def health(self) -> Health:
        silent = monotonic() - self._heard_at
        if silent > SILENCE:
            return Health(False, False, f"the master has said nothing for {silent:.0f} s")
        return self._health

    def status(self) -> Status:
        return self._ask("status")

    def connections(self) -> Status:
        return self._ask("connections")

    def _ask(self, what: str) -> Status:
        # Concurrent askers share one question and its answer: the master gets one question at a time.
        result = self._waiting.get(what)
        if result is None:
            result = self._waiting[what] = AsyncResult()
            self.say(what)
        try:
            answer: Status = result.get(timeout=ANSWER)
        except gevent.Timeout:
            raise SourceError(f"the master has not answered for {ANSWER:.0f} s") from None
        return answer

    def _read(self) -> None:
        lines = self._line.makefile("rb")
        try:
            for line in lines:
                self._hear(json.loads(line))
        except (OSError, ValueError):
            pass  # the master ended in the middle of a line
        self.ended.set()

    def _hear(self, said: dict[str, Any]) -> None:
        self._heard_at = monotonic()
        for what, value in said.items():
            if what == "health":
                self._health = Health(True, value["ready"] is True, str(value["word"]))
                self.knows.set()
                self.say("well")  # this process is not blocked
            elif what == "leave":
                self.ended.set()
            elif (result := self._waiting.pop(what, None)) is not None:
                result.set(value)
