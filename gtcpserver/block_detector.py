"""BlockDetector: finds what blocks the event loop: where it stands, and for how long.

All handlers share one thread. One that computes, or calls what cannot be patched (a driver written in C, a lock of the
system), makes all others wait, and nothing tells. Here a timer in the loop says that it runs, and a native thread looks
at where the loop's thread stands when the timer is late. Greenlets' switches are counted: many that hold the loop for a
short time each are load, and none of them is to blame.

gevent's own monitor thread (``gevent.config.monitor_thread``) was not taken: it does not know for how long something
has blocked, and its report, the tree of all greenlets, goes to a stream that may itself block.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterable
from time import monotonic
from types import CodeType, TracebackType
from typing import Any, NamedTuple, TypeVar

from gevent._tracer import GreenletTracer  # what gevent's monitor thread counts with; chains to one that is there
from gevent.hub import Hub, get_hub
from gevent.monkey import get_original

from .errors import GtcpServerError
from .forked import register
from .logs import FaultLimiter, also
from .options import check_number

log = logging.getLogger("gtcpserver")

DEFAULT_THRESHOLD = 0.1
"""Seconds. Nobody at a screen notices less, and a handler that computes for longer is worth a thread."""

SHORTEST_THRESHOLD = 0.01
"""Threads of Python take turns every 5 ms (sys.setswitchinterval): looks cannot follow each other closer than that."""

LOOKS = 5
"""Looks in the time of the threshold. What blocks for half as long again is always found, and never less than it."""

STILL_BLOCKED = 10
"""What blocks for so many thresholds is reported while it lasts, too: it may never end."""

MOST_LOOKS = 200
"""Remembered of one that blocks; by then it has been reported."""

_start_thread = get_original("_thread", "start_new_thread")
_native_lock = get_original("_thread", "allocate_lock")


class Place(NamedTuple):
    """One frame of a stack."""

    code: CodeType
    instruction: int
    line: int

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


class BlockDetector:
    """Watches the event loop of one thread; counts and logs what blocks it.

    ``start`` it in that thread, before or while servers run, and ``stop`` it there; or use it in a ``with``. Servers
    show its counters in ``stats``.

    Each time one greenlet has held the loop for longer than the threshold, a line with its stack is logged (warning,
    logger "gtcpserver"), for the same place less and less often.

    It costs 0.1 us a switch of greenlets, of which a request has two; and a timer in the loop and a native thread wake
    up five times in the time of the threshold. Without it there is no cost.

    Args:
        threshold: seconds, 0.01 or more.

    Attributes:
        blocked: how often something has blocked the loop.
        blocked_seconds: for how long, all together.

    Raises:
        ConfigError: a threshold that cannot be.
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        check_number("threshold", threshold, least=SHORTEST_THRESHOLD)
        self.threshold = threshold
        self.blocked = 0
        self.blocked_seconds = 0.0
        self._interval = threshold / LOOKS
        self._faults = FaultLimiter()
        self._beat = (0.0, 0)  # when the timer ran last, and the switches up to then
        self._timer: Any = None
        self._tracer: Any = None
        self._end: Any = None  # a lock that the thread waits for; it ends when it gets it

    # -- in the thread of the loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch this thread's event loop from now on.

        Raises:
            GtcpServerError: it does so already.
        """
        global _latest
        if self._timer is not None:
            raise GtcpServerError("this BlockDetector has been started already")
        _latest = self
        register(self)
        hub = get_hub()
        self._tracer = GreenletTracer()
        self._note_beat()
        self._timer = hub.loop.timer(self._interval, self._interval, ref=False)
        self._timer.start(self._note_beat)
        self._end = _native_lock()
        self._end.acquire()
        _start_thread(self._watch, (hub.thread_ident, self._end))

    def stop(self) -> None:
        """Watch no longer. The counters stay; servers' stats show them no more."""
        global _latest
        if self._timer is not None:
            self._timer.close()
            self._timer = None
            self._tracer.kill()
            if _latest is self:
                _latest = None
            self._end.release()

    def serves(self) -> bool:
        return False

    def left_in_child(self, _own: Any) -> None:
        """In a forked child of a serving process (see forked.py): it watches another event loop's thread."""
        global _latest
        _latest = self._timer = None

    def __enter__(self) -> BlockDetector:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _note_beat(self) -> None:
        self._beat = (monotonic(), self._tracer.greenlet_switch_counter)

    # -- in its own thread -------------------------------------------------------------------------------------------

    def _watch(self, thread: int, end: Any) -> None:
        tracer = self._tracer
        seen = looked, switches = self._beat
        holder: _Holder | None = None
        while not end.acquire(timeout=self._interval):
            beat, now = self._beat, monotonic()
            if beat is not seen:
                if holder is not None:
                    self._count(holder, beat[0] if self._is_one(beat[1] - switches, beat[0] - looked) else looked)
                    holder = None
                seen = looked, switches = beat
            due = seen[0] + self._interval
            if now - due < self._interval / 4:  # timers are late for a moment
                continue
            before, switches = switches, tracer.greenlet_switch_counter
            stack = _stack_of(thread)
            if stack and holder is not None and switches == before and holder.look(stack, now):
                pass
            else:
                if holder is not None:
                    self._count(holder, looked)
                # Who stands here came after the last look, or, if that was in time, before the timer was due.
                since = max(looked, due)
                if not self._is_one(switches - before, now - since):
                    since = now
                holder = _Holder(stack, since, now) if stack else None
            looked = now
            if holder is not None and not holder.told and now - holder.since >= STILL_BLOCKED * self.threshold:
                holder.told = True
                self._log(holder, now - holder.since, "still is")

    def _is_one(self, switches: int, seconds: float) -> bool:
        """Whether it was one greenlet, for the most part, that held the loop for so long.

        More than one switch is nothing unusual: others ran for a moment before it. But while a call into C holds the
        interpreter there can be no look, and to this thread it is as if it had got no CPU.
        """
        return switches <= 1 or seconds / switches >= self.threshold

    def _count(self, holder: _Holder, until: float) -> None:
        seconds = until - holder.since
        if seconds >= self.threshold:
            self.blocked += 1
            self.blocked_seconds += seconds
            self._log(holder, seconds)

    def _log(self, holder: _Holder, seconds: float, more: str = "") -> None:
        stack = holder.stack()
        place = stack[-1]
        left_out = self._faults.allow((place.code, more))
        if left_out is None:
            return
        message = f"the event loop was blocked for {seconds:.2f} s by {place}"
        message += f", and {more}" if more else also(left_out)
        if log.isEnabledFor(logging.WARNING):
            where = place.code.co_filename, place.line
            extra = {"blocked_seconds": round(seconds, 3)}
            log.handle(
                log.makeRecord(
                    log.name,
                    logging.WARNING,
                    *where,
                    message,
                    (),
                    None,
                    place.code.co_name,
                    extra,
                    sinfo=format_stack(stack),
                )
            )


#: Runs now; of several in several threads, the last one.
_latest: BlockDetector | None = None


def blocked_so_far() -> tuple[int, float]:
    """How often, and for how many seconds, something has blocked the event loop since the BlockDetector that runs was
    started; (0, 0.0) if none runs."""
    return (_latest.blocked, _latest.blocked_seconds) if _latest is not None else (0, 0.0)


class _Holder:
    """A greenlet that holds the loop.

    Attributes:
        since: when it began, as far as known (monotonic).
        told: that it blocks has been logged while it lasts.
    """

    def __init__(self, stack: list[Place], since: float, now: float) -> None:
        self.since = since
        self.told = False
        self._looks: list[tuple[list[Place], float]] = [(stack, now - since)]
        self._looked = now

    def look(self, stack: list[Place], now: float) -> bool:
        """It was seen again. False: that is another callback of the loop."""
        if stack[0].code is not self._looks[-1][0][0].code:
            return False
        if len(self._looks) < MOST_LOOKS:
            self._looks.append((stack, now - self._looked))
        self._looked = now
        return True

    def stack(self) -> list[Place]:
        """Where it was, outermost first, down to the innermost frame that it was in for more than half of the time.

        The last look often finds it behind what has taken the time: there it first lets go of the interpreter.
        """
        found: list[Place] = []
        looks = self._looks
        half = sum(seconds for _, seconds in looks) / 2
        while looks := [(stack, seconds) for stack, seconds in looks if len(stack) > len(found)]:
            depth = len(found)
            code, seconds = _longest((stack[depth].code, seconds) for stack, seconds in looks)
            if seconds < half:
                break
            looks = [(stack, seconds) for stack, seconds in looks if stack[depth].code is code]
            place, _ = _longest((stack[depth], seconds) for stack, seconds in looks)
            looks = [(stack, seconds) for stack, seconds in looks if stack[depth] == place]
            found.append(place)
        return found


Seen = TypeVar("Seen")


def _longest(times: Iterable[tuple[Seen, float]]) -> tuple[Seen, float]:
    """The one with most seconds, all of its together."""
    sums: dict[Seen, float] = {}
    for seen, seconds in times:
        sums[seen] = sums.get(seen, 0.0) + seconds
    return max(sums.items(), key=lambda item: item[1])


def format_stack(stack: list[Place]) -> str:
    # With the words that Python's tracebacks have: editors find the lines by them.
    frames = [traceback.FrameSummary(place.code.co_filename, place.line, place.code.co_name) for place in stack]
    return "Stack (most recent call last):\n" + "".join(traceback.StackSummary.from_list(frames).format()).rstrip()


def _stack_of(thread: int) -> list[Place]:
    """Where the thread of a loop stands, outermost first; empty: it waits for events, or runs none of Python's code."""
    places = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        # The loop runs callbacks one after another in its own greenlet: each of them counts as one.
        if frame.f_code is not Hub.run.__code__:
            places.append(Place(frame.f_code, frame.f_lasti, frame.f_lineno))
        # It is not kept: what it refers to would end in this thread, and sockets and greenlets must not.
        frame = frame.f_back
    places.reverse()
    return places
