"""BlockDetector: find what blocks the event loop, where, and for how long.

All handlers share one thread. A handler that computes, or calls something that cannot be patched (a driver written in
C, a system lock), makes all others wait, and nothing shows it. Here a timer in the loop proves that it runs, and when
the timer is late a native thread looks at the stack of the loop's thread. Greenlet switches are counted: many greenlets
that hold the loop for a short time each are load, and none of them is to blame.

gevent's own monitor thread (``gevent.config.monitor_thread``) is not used: it does not know how long something has
blocked, and its report, the tree of all greenlets, goes to a stream that may itself block.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
import zlib
from collections.abc import Iterable
from mmap import mmap
from time import monotonic
from types import CodeType, TracebackType
from typing import Any, NamedTuple, TypeVar

from gevent._tracer import GreenletTracer  # what gevent's monitor thread counts with; chains to one that is there
from gevent.hub import Hub, get_hub
from gevent.monkey import get_original, is_module_patched

from gtcpserver.checks import check_number
from gtcpserver.errors import GtcpServerError
from gtcpserver.linux import thread_clock
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import register

from .frames import frames_of_threads, is_library
from .logs import FaultLimiter, also

log = logging.getLogger("gtcpserver")

#: Seconds. People at a screen do not notice less, and a handler that computes for longer is worth a thread.
DEFAULT_THRESHOLD = 0.1

#: Python threads take turns every 5 ms (sys.setswitchinterval), so looks cannot be closer together than that.
SHORTEST_THRESHOLD = 0.01

#: Looks per threshold. A block of one and a half thresholds is always found, one below the threshold never.
LOOKS = 5

#: Maximum seconds between two looks: waiting for a lock has a limit (threading.TIMEOUT_MAX).
LONGEST_INTERVAL = 3600.0

#: After this many thresholds, report it while it is still blocking: it may never end.
STILL_BLOCKED = 10

#: Looks remembered of one block; by then it has been reported.
MOST_LOOKS = 200

#: What to do about it, the last line of a report.
COMPUTED = (
    "This is computation. Run it in a thread, gevent.get_hub().threadpool.apply(function, arguments), or in a process "
    "(docs/blocking.md)."
)
WAITED_UNPATCHED = (
    "The call blocks the thread, as this program is not monkey-patched. Pass monkey_patch=True to run(), or begin the "
    "program with 'from gevent import monkey; monkey.patch_all()': the standard library and what is built on it "
    "(time.sleep, sockets, requests) then wait on the event loop (docs/blocking.md)."
)
WAITED_PATCHED = (
    "The call blocks the thread in spite of monkey patching: a file, C code, or a name imported before the patch. Run "
    "it in a thread, gevent.get_hub().threadpool.apply(function, arguments) (docs/blocking.md)."
)

#: Share of CPU time above which a block counts as computation. Code that waits uses next to none; code that computes
#: may get little on a busy host whose hypervisor does not report it.
COMPUTING = 0.2

#: Distinct places if each is reported once: one byte each, which worker processes can share.
PLACES = 4096

_start_thread = get_original("_thread", "start_new_thread")
_native_lock = get_original("_thread", "allocate_lock")


class Place(NamedTuple):
    """One frame of a stack."""

    code: CodeType
    instruction: int
    line: int

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line} in {self.code.co_name}"


class _Times(NamedTuple):
    """Times of a thread since it was started, in seconds.

    Attributes:
        computing: on a CPU.
        starved: ready to run, while others had the CPU (/proc/pid/schedstat: Linux's
            Documentation/scheduler/sched-stats.rst); 0.0 if the kernel does not say.
    """

    computing: float
    starved: float


class _ThreadClock:
    """Read a thread's times from another thread. Must be created in the thread itself."""

    def __init__(self) -> None:
        self._clock = thread_clock(get_original("_thread", "get_ident")())
        path = f"/proc/self/task/{get_original('_thread', 'get_native_id')()}/schedstat"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no /proc, no free descriptor, a kernel without it
            self._fd = -1

    def read(self) -> _Times:
        try:
            computing = time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return _Times(0.0, 0.0)
        try:
            starved = int(os.pread(self._fd, 100, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            starved = 0.0
        return _Times(computing, starved)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            close_descriptor(fd)


class BlockDetector:
    """Watch the event loop of one thread; count and log what blocks it.

    ``start`` it in that thread, before or while servers run, and ``stop`` it there; or use it in a ``with``. Servers
    show its counters in ``stats``.

    Each time a greenlet has held the loop for longer than the threshold, a line with its stack and the fix is logged
    (warning, logger "gtcpserver"), for the same place less and less often. Time in which the thread was ready to run
    while other programs had the CPU does not count.

    It costs 0.1 us per greenlet switch, two per request; and a timer in the loop and a native thread wake up
    five times per threshold: 0.8 % of a CPU with the default. Without a detector there is no cost.

    Args:
        threshold: seconds, 0.01 or more.

    Attributes:
        blocked: how often the loop was blocked.
        blocked_seconds: for how long, in total.
        reported: whether a place was reported, by its hash; None: report all, less and less often. For this package.

    Raises:
        ConfigError: an invalid threshold.

    Example::

        from gtcpserver import BlockDetector, Server

        detector = BlockDetector(threshold=0.2)
        detector.start()
        server = Server("127.0.0.1:5000", handle)
        server.start()
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        check_number("threshold", threshold, least=SHORTEST_THRESHOLD)
        self.threshold = threshold
        self.blocked = 0
        self.blocked_seconds = 0.0
        self._interval = min(threshold / LOOKS, LONGEST_INTERVAL)
        self._faults = FaultLimiter()
        self.reported: bytearray | mmap | None = None
        self._tick = (0.0, 0)  # when the timer last ran, and the switches up to then
        self._timer: Any = None
        self._tracer: Any = None
        self._clock: _ThreadClock | None = None
        self._end: Any = None  # a lock that the thread waits for; it ends when it gets it

    # -- in the thread of the loop -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch this thread's event loop from now on.

        Raises:
            GtcpServerError: it is already started.
            RuntimeError: the system cannot start another thread.
        """
        global _latest
        if self._timer is not None:
            raise GtcpServerError("this BlockDetector has been started already")
        hub = get_hub()
        self._end = _native_lock()
        self._end.acquire()
        # Before the tracer, which would keep counting if this failed.
        timer = hub.loop.timer(self._interval, self._interval, ref=False)
        self._tracer = GreenletTracer()
        self._timer = timer
        clock: _ThreadClock | None = None
        try:
            self._note_tick()
            timer.start(self._note_tick)
            self._clock = clock = _ThreadClock()
            _start_thread(self._watch, (hub.thread_ident, self._end, clock))
        except BaseException:
            self.stop()
            if clock is not None:
                clock.close()
            raise
        _latest = self
        register(self)

    def stop(self) -> None:
        """Stop watching. The counters stay, but servers' stats no longer show them."""
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
        """Forget everything in a forked child of a serving process (process/forked.py): the loop is the parent's."""
        global _latest
        _latest = self._timer = None
        if self._clock is not None:
            self._clock.close()

    def __enter__(self) -> BlockDetector:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _note_tick(self) -> None:
        self._tick = (monotonic(), self._tracer.greenlet_switch_counter)

    # -- in its own thread -------------------------------------------------------------------------------------------

    def _watch(self, thread: int, end: Any, clock: _ThreadClock) -> None:
        try:
            self._look_until(end, thread, clock)
        finally:
            clock.close()

    def _look_until(self, end: Any, thread: int, clock: _ThreadClock) -> None:
        tracer = self._tracer
        seen = looked, switches = self._tick
        holder: _Holder | None = None
        times = clock.read()
        while not end.acquire(timeout=self._interval):
            tick, now = self._tick, monotonic()
            times_before, times = times, clock.read()
            if tick is not seen:
                if holder is not None:
                    was_one = self._is_one(tick[1] - switches, tick[0] - looked)
                    self._count(holder, *((tick[0], times) if was_one else (looked, times_before)))
                    holder = None
                seen = looked, switches = tick
            due = seen[0] + self._interval
            if now - due < self._interval / 4:  # timers are a moment late
                continue
            before, switches = switches, tracer.greenlet_switch_counter
            stack = _stack_of(thread)
            if stack and holder is not None and switches == before and holder.look(stack, now):
                pass
            else:
                if holder is not None:
                    self._count(holder, looked, times_before)
                # The current greenlet started after the last look, or, if that was in time, before the timer was due.
                since = max(looked, due)
                if not self._is_one(switches - before, now - since):
                    since = now
                holder = _Holder(stack, since, now, times_before) if stack else None
            looked = now
            if holder is not None and not holder.told:
                seconds = holder.seconds(now, times)
                if seconds >= STILL_BLOCKED * self.threshold:
                    holder.told = True
                    self._log(holder, seconds, times, "still is")

    def _is_one(self, switches: int, seconds: float) -> bool:
        """Return whether mostly one greenlet held the loop for that long.

        More than one switch is not unusual: others ran for a moment before it. But while a call into C holds the
        interpreter there can be no look, and to this thread it seems as if it had got no CPU.
        """
        return switches <= 1 or seconds / switches >= self.threshold

    def _count(self, holder: _Holder, until: float, times: _Times) -> None:
        seconds = holder.seconds(until, times)
        if seconds >= self.threshold:
            self.blocked += 1
            self.blocked_seconds += seconds
            self._log(holder, seconds, times)

    def _log(self, holder: _Holder, seconds: float, times: _Times, more: str = "") -> None:
        stack = holder.stack()
        place = stack[-1]
        # The line of the program that called it: a socket's read in the standard library may be anybody's.
        caller = next((one for one in reversed(stack) if not is_library(one.code)), place)
        computed = times.computing - holder.times.computing >= seconds * COMPUTING
        left_out = self._allow(place, caller, computed, more)
        if left_out is None:
            return
        message = f"the event loop was blocked for {seconds:.2f} s by {place}"
        message += "" if caller is place else f", called at {caller}"
        message += f", and {more}" if more else also(left_out)
        if log.isEnabledFor(logging.WARNING):
            where = caller.code.co_filename, caller.line
            extra = {"blocked_seconds": round(seconds, 3)}
            log.handle(
                log.makeRecord(
                    log.name,
                    logging.WARNING,
                    *where,
                    message,
                    (),
                    None,
                    caller.code.co_name,
                    extra,
                    sinfo=f"{format_stack(stack)}\n{_cure(computed)}",
                )
            )

    def _allow(self, place: Place, caller: Place, computed: bool, more: str) -> int | None:
        """As FaultLimiter.allow."""
        if self.reported is None:
            return self._faults.allow((place.code, more))
        # In a computation the line differs each time.
        line = caller.code.co_firstlineno if computed else caller.line
        number = zlib.crc32(f"{caller.code.co_filename}:{line}:{computed}".encode("utf-8", "replace")) % PLACES
        if self.reported[number]:
            return None
        self.reported[number] = 1
        return 0


def _cure(computed: bool) -> str:
    if computed:
        return COMPUTED
    return WAITED_PATCHED if is_module_patched("socket") else WAITED_UNPATCHED


#: The running detector; of several in several threads, the last one.
_latest: BlockDetector | None = None


def is_watched() -> bool:
    """Return whether a BlockDetector runs in this process."""
    return _latest is not None


def start_detector(threshold: float, reported: bytearray | mmap) -> BlockDetector | None:
    """Start a BlockDetector that reports each place once, unless one is running.

    Args:
        reported: PLACES zeros; each report sets one to 1. Processes may share them.

    Returns:
        None: one is running, or it cannot be started, which is logged: a server can do without.
    """
    if is_watched():
        return None
    detector = BlockDetector(threshold)
    detector.reported = reported
    try:
        detector.start()
    except (RuntimeError, MemoryError) as error:
        log.warning("what blocks the event loop will not be reported: %s", error)
        return None
    return detector


def blocked_so_far() -> tuple[int, float]:
    """Return how often, and for how many seconds, the event loop was blocked since the running BlockDetector was
    started; (0, 0.0) if none is running."""
    return (_latest.blocked, _latest.blocked_seconds) if _latest is not None else (0, 0.0)


class _Holder:
    """A greenlet that holds the loop.

    Attributes:
        since: when it began, as far as known (monotonic).
        times: its thread's times when it began.
        told: it was already reported while it lasts.
    """

    def __init__(self, stack: list[Place], since: float, now: float, times: _Times) -> None:
        self.since = since
        self.times = times
        self.told = False
        self._looks: list[tuple[list[Place], float]] = [(stack, now - since)]
        self._looked = now

    def seconds(self, until: float, times: _Times) -> float:
        """Return how long it has held the loop, without the time in which others had the CPU."""
        return until - self.since - max(0.0, times.starved - self.times.starved)

    def look(self, stack: list[Place], now: float) -> bool:
        """Note that it was seen again. Return False if this is another callback of the loop."""
        if stack[0].code is not self._looks[-1][0][0].code:
            return False
        if len(self._looks) < MOST_LOOKS:
            self._looks.append((stack, now - self._looked))
        self._looked = now
        return True

    def stack(self) -> list[Place]:
        """Return where it was, outermost first, down to the innermost frame in which it spent more than half of the
        time.

        The last look often comes after the code that took the time: there it first releases the interpreter.
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
    """Return the place with the largest total time."""
    sums: dict[Seen, float] = {}
    for seen, seconds in times:
        sums[seen] = sums.get(seen, 0.0) + seconds
    return max(sums.items(), key=lambda item: item[1])


def format_stack(stack: list[Place]) -> str:
    # In the wording of Python's tracebacks: editors find the lines by it.
    frames = [traceback.FrameSummary(place.code.co_filename, place.line, place.code.co_name) for place in stack]
    return "Stack (most recent call last):\n" + "".join(traceback.StackSummary.from_list(frames).format()).rstrip()


def _stack_of(thread: int) -> list[Place]:
    """Return the stack of the loop's thread, outermost first; empty: it waits for events, or runs no Python code."""
    places = []
    frame = frames_of_threads().get(thread)
    while frame is not None:
        # The loop runs callbacks one after another in its own greenlet: each of them counts as one.
        if frame.f_code is not Hub.run.__code__:
            places.append(Place(frame.f_code, frame.f_lasti, frame.f_lineno))
        # The frame is not kept: objects it refers to would be freed in this thread; sockets and greenlets must not.
        frame = frame.f_back
    places.reverse()
    return places
