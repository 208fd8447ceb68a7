"""Worker slots, and what the master knows about each worker process."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from .channel import Channel
from .lending import Loans
from .system import System
from .worker import BEAT_SECONDS

#: Seconds before the next attempt after a failed start; doubled each time, up to LONGEST_BACK_OFF.
FIRST_BACK_OFF = 0.5
LONGEST_BACK_OFF = 30.0

#: A worker whose loop is later than this many seconds gets no new connections. A healthy loop is a millisecond or two
#: late.
LAG_SECONDS = 0.25

#: Seconds before a process that survived SIGKILL is killed again.
KILL_AGAIN_SECONDS = 1.0

#: This many missing beats in a row count as a lag.
MISSED_BEATS = 3

#: This many beats in time, in a row, end a lag.
BEATS_TO_RETURN = 4


class WorkerState(Enum):
    """The states of a worker as the master sees it; none is entered twice."""

    STARTING = "starting"
    READY = "ready"
    RETIRING = "retiring"  # leaves its sockets to a successor
    STOPPING = "stopping"  # drains its sockets for good
    KILLED = "killed"


#: Every change of state, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
#: A worker may end in any state; then the master forgets it.
WORKER_CHANGES = {
    (WorkerState.STARTING, WorkerState.READY): "it says `ready`",
    (WorkerState.STARTING, WorkerState.RETIRING): "reload fails, or a new master takes over",
    (WorkerState.STARTING, WorkerState.STOPPING): "stop, or its slot goes away",
    (WorkerState.READY, WorkerState.RETIRING): "a successor is proven, its loop is blocked, or a new master takes over",
    (WorkerState.READY, WorkerState.STOPPING): "stop, or its slot goes away",
    (WorkerState.RETIRING, WorkerState.STOPPING): "QUIT",
    (WorkerState.RETIRING, WorkerState.KILLED): "its time is over",
    (WorkerState.STOPPING, WorkerState.KILLED): "its time is over",
}


@dataclass(frozen=True)
class Selected:
    """A worker's connections that were asked for.

    Attributes:
        rows: the first of them.
        number: how many there are.
        ended: how many of them were ended.
    """

    rows: list[dict[str, Any]]
    number: int
    ended: int


@dataclass(eq=False)
class WorkerProcess:
    """One worker process.

    Attributes:
        slot: number of its slot.
        kill_at: monotonic time at which it is killed if it has not ended.
        failure: why it could not start, as it said itself.
        retired_at: monotonic time at which its successor took over.
        hastened: whether it was told to finish soon, because too many retired workers are left.
        wants_to_retire: why it asks for a successor; "" if it does not.
        lagging: whether its loop is late, so that it gets no new connections.
        stats: the last counters it sent.
        table: its table of connections; None until it answers the last question.
        places: number of its connections by where their handlers stand, as of the table.
        selected: its answers to questions about connections, by number; None until it answers.
        drained: whether its sockets are drained and closed.
        loans: the files that it may borrow.
        has_begun: whether it was ready once.
        ends_service: whether its program has `max_accepts`, so that it may tell the service to stop.
        said_enough: whether it has told it to.
        handover: whether it takes connections from workers that leave, and gives its own away.
        paired: process ids of the workers to which it has a line.
        alone_until: monotonic time from which on it gets new lines again if it says that it has none.
        settled: whether, leaving, it has moved all connections that were idle.
        moved: number of these.
        staying: the others, by reason.
    """

    slot: int
    pid: int
    channel: Channel
    generation: int
    system: System
    state: WorkerState = WorkerState.STARTING
    started_at: float = field(init=False)
    ready_at: float = 0.0
    last_beat: float = field(init=False)
    kill_at: float | None = None
    retired_at: float = 0.0
    hastened: bool = False
    failure: str = ""
    details: str = ""
    status: int = 3
    fatal: str = ""
    wants_to_retire: str = ""
    lagging: bool = False
    lag: float = 0.0
    beats_in_time: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    rss: int = 0
    table: list[dict[str, Any]] | None = None
    places: dict[str, int] = field(default_factory=dict)
    selected: dict[int, Selected | None] = field(default_factory=dict)
    reported: bool = False
    drained: bool = False
    ended: bool = False
    dump_asked_at: float | None = None
    dumped: bool = False
    loans: Loans = field(default_factory=Loans)
    has_begun: bool = False
    ends_service: bool = False
    said_enough: bool = False
    handover: bool = False
    paired: set[int] = field(default_factory=set)
    alone_until: float = 0.0
    settled: bool = False
    moved: int = 0
    staying: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started_at = self.last_beat = self.system.monotonic()

    @property
    def leaving(self) -> bool:
        return self.state in (WorkerState.RETIRING, WorkerState.STOPPING, WorkerState.KILLED)

    def note_beat(self, lag: float) -> None:
        """Record a beat, and whether the loop keeps time."""
        self.last_beat = self.system.monotonic()
        self.lag = lag
        if lag > LAG_SECONDS:
            self.beats_in_time = 0
            self.lagging = True
        else:
            self.beats_in_time += 1
            if self.beats_in_time >= BEATS_TO_RETURN:
                self.lagging = False

    def note_silence(self, now: float) -> None:
        """Count a missing beat as lag. Call regularly."""
        if now >= self.silent_at():
            self.lagging = True
            self.beats_in_time = 0
            self.lag = now - self.last_beat

    def silent_at(self) -> float:
        """Return the monotonic time at which silence will count as a lag."""
        if self.state is not WorkerState.READY:
            return float("inf")
        return self.last_beat + MISSED_BEATS * BEAT_SECONDS

    def signal(self, number: int) -> None:
        # The process is gone and not reaped yet; or EPERM, which must not keep the master from the others.
        with contextlib.suppress(OSError):
            self.system.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, repeatedly if need be.

        The end of a worker that was not leaving still counts as a failed start, or as a death.
        """
        if self.leaving:
            self.state = WorkerState.KILLED
        self.kill_at = self.system.monotonic() + KILL_AGAIN_SECONDS
        self.signal(signal.SIGKILL)


@dataclass(eq=False)
class Slot:
    """The position of a worker; its listening sockets outlive the workers that serve them.

    Attributes:
        number: its number, from 0.
        current: the worker that serves, or will.
        next: its successor while it starts, and on probation.
        gone_on: workers that finish their connections.
        closing: whether the slot goes away when its workers have drained its sockets.
        failures: number of failed starts in a row; they delay the next one.
        failed_at: monotonic time of the last of them.
        not_before: monotonic time before which there is no next start.
        why: the reason why the last worker died, for the next one.
    """

    number: int
    current: WorkerProcess | None = None
    next: WorkerProcess | None = None
    gone_on: list[WorkerProcess] = field(default_factory=list)
    closing: bool = False
    failures: int = 0
    failed_at: float = 0.0
    not_before: float = 0.0
    why: str = ""

    def workers(self) -> list[WorkerProcess]:
        return [worker for worker in (self.current, self.next, *self.gone_on) if worker is not None]

    def serves(self) -> bool:
        """Return whether a ready worker accepts from its sockets."""
        return any(one is not None and one.state is WorkerState.READY for one in (self.current, self.next))

    def lags(self) -> bool:
        """Return whether new connections should go to other slots."""
        ready = [one for one in (self.current, self.next) if one is not None and one.state is WorkerState.READY]
        return bool(ready) and all(one.lagging for one in ready)


def back_off(failures: int) -> float:
    """Return the seconds until the next start of a process.

    Args:
        failures: number of failures in a row before the last one.
    """
    doublings = min(failures, 10)  # after a night of failures, 2**failures is too large for a float
    return min(LONGEST_BACK_OFF, FIRST_BACK_OFF * (1 << doublings))


def describe_status(status: int) -> str:
    """Describe a status of waitpid(2) in words."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"was killed by {name}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"
