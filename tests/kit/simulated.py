"""A simulated operating system for a master: a virtual clock, and processes that do what a test wants, when it wants.

It stands for `gtcpserver.supervisor.system.RealSystem`. Channels are the real ones over simulated sockets. A master
runs in a greenlet of its own: `run` lets it go on for some virtual seconds, and returns when it waits at their end.
"""

from __future__ import annotations

import dataclasses
import errno
import heapq
import itertools
import json
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from greenlet import getcurrent, greenlet

from gtcpserver.listening.listener import ListenConfig
from gtcpserver.shared.memory import SharedMemory
from gtcpserver.supervisor import SupervisorConfig
from gtcpserver.supervisor.channel import Channel
from gtcpserver.supervisor.fleet import Fleet
from gtcpserver.supervisor.master import Master, WorkersCannotStart
from gtcpserver.supervisor.messages import HANDOVER_KINDS, MAX_BYTES, decode, encode
from gtcpserver.supervisor.monitor import LEAVE_SECONDS
from gtcpserver.supervisor.monitor_job import MonitorJob
from gtcpserver.supervisor.program import Program
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState
from gtcpserver.supervisor.sockets import ListeningSockets
from gtcpserver.supervisor.system import Signals
from gtcpserver.supervisor.upgrade import VARIABLE, Handover
from gtcpserver.supervisor.worker import Job

MASTER = 4242  # the process id that the master has
FIRST_PID = 1 << 30  # above what pid_max may be: a signal that went out for real would find nobody
FIRST_MONITOR = FIRST_PID + (1 << 16)
FIRST_FD = 1 << 20
SIGNAL_FD = FIRST_FD - 1

BEAT_SECONDS = 0.7  # of all workers; less than what the master takes for a lag
READING_SECONDS = 0.02  # until a process has read what it is told
HOLDS_ALL_SECONDS = 0.05  # until a new process has closed its copies of other slots' sockets
EXIT_SECONDS = 0.05  # between the first and the last descriptor that the kernel closes of a process that ends
TURN_SECONDS = 0.001  # that a turn of the master takes, so that one that spins is seen
INBOX = 6  # messages that fit into a socket
LINE_BUFFER = 16384  # bytes that fit into a monitor's line

BEAT = encode("beat", lag=0.0)


def failed(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class AnyEnd:
    """One end of a socket pair, as a socket object. `holders` are the processes that have it open."""

    peer: Any
    inbox: Any

    def __init__(self, system: SimulatedSystem, fd: int) -> None:
        self._system = system
        self._fd = fd
        self.holders = {MASTER}
        self.reader: Process | Monitor | None = None

    def setblocking(self, _flag: bool) -> None:
        pass

    def fileno(self) -> int:
        return self._fd if MASTER in self.holders else -1

    def events(self) -> int:
        """What poll(2) would say."""
        return select.POLLIN if self.inbox or not self.peer.holders else 0

    def close(self) -> None:
        self.holders.discard(MASTER)

    def wake_reader(self) -> None:
        if self.peer.reader is not None:
            self._system.after(READING_SECONDS, self.peer.reader.read)


class End(AnyEnd):
    """Of a channel, which carries messages."""

    peer: End

    def __init__(self, system: SimulatedSystem, fd: int) -> None:
        super().__init__(system, fd)
        self.inbox: deque[bytes] = deque()

    def sendmsg(self, parts: list[bytes], _rights: Any) -> int:
        if not self.peer.holders:
            raise failed(errno.EPIPE)
        if len(self.peer.inbox) >= INBOX or self._system.fails("send"):
            raise failed(errno.EAGAIN)
        self.peer.inbox.append(parts[0])
        self.wake_reader()
        return len(parts[0])

    def recv(self, _size: int) -> bytes:
        if self._system.fails("receive"):
            raise failed(errno.ENOMEM)
        if self.inbox:
            return self.inbox.popleft()
        if self.peer.holders:
            raise failed(errno.EAGAIN)
        return b""


class LineEnd(AnyEnd):
    """Of a monitor's line, which carries bytes."""

    peer: LineEnd

    def __init__(self, system: SimulatedSystem, fd: int) -> None:
        super().__init__(system, fd)
        self.inbox = bytearray()

    def events(self) -> int:
        room = len(self.peer.inbox) < LINE_BUFFER and "send" not in self._system.failing
        return super().events() | (select.POLLOUT if room or not self.peer.holders else 0)

    def send(self, data: bytes) -> int:
        if not self.peer.holders:
            raise failed(errno.EPIPE)
        part = data[: LINE_BUFFER - len(self.peer.inbox)]
        if not part or self._system.fails("send"):
            raise failed(errno.EAGAIN)
        self.peer.inbox += part
        self.wake_reader()
        return len(part)

    def recv(self, size: int) -> bytes:
        if self._system.fails("receive"):
            raise failed(errno.ENOMEM)
        data = bytes(self.inbox[:size])
        if not data and self.peer.holders:
            raise failed(errno.EAGAIN)
        del self.inbox[:size]
        return data


@dataclass(frozen=True)
class Fate:
    """What a new process will do.

    Attributes:
        ready_after: seconds until it is ready; None: never.
        fails: it says why it cannot start, and exits, instead of being ready.
        dies_after: seconds from its birth until it ends with `status`, as waitpid(2) has it, without a word.
        stalls_after: seconds from its birth until its event loop is blocked for good.
        blocked_in_c: a dump of its stacks does not come.
        closes_after: seconds from its birth until it closes its channel and goes on.
        wants_to_retire_after: seconds from its birth until it asks for a successor.
        lasts: seconds that its connections last when it is told to leave; None: forever.
        drains: it says that its sockets are drained.
        obeys: it does what it is told.
        lingers: seconds that SIGKILL takes (an uninterruptible system call).
    """

    ready_after: float | None = 0.1
    fails: bool = False
    dies_after: float | None = None
    status: int = 0
    stalls_after: float | None = None
    blocked_in_c: bool = False
    closes_after: float | None = None
    wants_to_retire_after: float | None = None
    lasts: float | None = 0.05
    drains: bool = True
    obeys: bool = True
    lingers: float = 0.0


@dataclass(eq=False)
class Process:
    """A child of the master.

    Attributes:
        job: a worker's; None: it is a new master.
        status: how it has ended, as waitpid(2) has it; None: it runs.
        buried: somebody has waited for it.
        faulty: it did what no good process does.
        orders: what it was told and has read, in this order.
        leaves_at: when it has ended all connections, as it was told.
        finished: connections that it has told of in its last words.
        told_early: it was told to leave before it was ready, which it does when it is.
        late: what it would have done if it had not been blocked.
    """

    system: SimulatedSystem
    pid: int
    end: End
    fate: Fate
    job: Job | None = None
    status: int | None = None
    buried: bool = False
    faulty: bool = False
    ready: bool = False
    told_ready: bool = False
    stalled: bool = False
    orders: list[str] = field(default_factory=list)
    leaves_at: float | None = None
    finished: int = 0
    ended_at: float = 0.0
    late: Callable[[], None] | None = None
    told_early: bool = False

    def __post_init__(self) -> None:
        fate, later = self.fate, self.system.after
        self.born_at = self.system.now
        self.end.holders.add(self.pid)
        self.end.reader = self
        if fate.ready_after is not None:
            later(fate.ready_after, self.fail if fate.fails else self.become_ready)
        if fate.dies_after is not None:
            later(fate.dies_after, lambda: self.exit(fate.status))
        if fate.stalls_after is not None:
            later(fate.stalls_after, self.stall)
        if fate.closes_after is not None:
            later(fate.closes_after, self.close)
        if fate.wants_to_retire_after is not None:
            later(fate.wants_to_retire_after, self.want_to_retire)
        self.faulty = fate.ready_after is None or fate.fails

    @property
    def running(self) -> bool:
        return self.status is None

    @property
    def accepts(self) -> bool:
        """Whether it takes new connections."""
        return self.running and self.ready and not self.stalled and not self.orders

    # -- what it does ------------------------------------------------------------------------------------------------

    def say(self, data: bytes) -> bool:
        heard = self.pid in self.end.holders and bool(self.end.peer.holders)
        if heard:
            self.end.peer.inbox.append(data)
        return heard

    def become_ready(self) -> None:
        if self.stalled:
            self.late = self.become_ready
        elif self.running:
            self.ready = True
            self.told_ready = self.say(encode("ready"))
            self.obey()

    def fail(self) -> None:
        if self.stalled:
            self.late = self.fail
        elif self.running:
            self.say(encode("failed", error="no such module", details="a traceback", status=3))
            self.exit(3 << 8)

    def exit(self, status: int) -> None:
        """End; `status` as waitpid(2) has it."""
        if self.running:
            self.status = status
            self.ended_at = self.system.now
            self.faulty = self.faulty or self.leaves_at is None
            for end in (self.end, self.end.peer):
                end.holders.discard(self.pid)
            self.system.child_ended()

    def stall(self) -> None:
        if self.running:
            self.stalled = self.faulty = True

    def go_on(self) -> None:
        if self.stalled:
            self.stalled = False
            self.read()
            late, self.late = self.late, None
            if late is not None:
                late()

    def close(self) -> None:
        if self.running:
            self.faulty = True
            self.end.holders.discard(self.pid)

    def want_to_retire(self) -> None:
        if self.ready and self.running and not self.stalled:
            self.say(encode("retire", why="has accepted 5 connections"))

    def beat(self) -> None:
        if self.running and self.ready and self.job and not self.stalled and len(self.end.peer.inbox) < INBOX:
            self.say(BEAT)

    # -- what it is told ---------------------------------------------------------------------------------------------

    def read(self) -> None:
        if self.stalled or not self.running or self.pid not in self.end.holders:
            return
        while self.end.inbox:
            message = json.loads(self.end.inbox.popleft())
            if message["kind"] in ("retire", "stop", "hasten", "halt"):
                self.orders.append(message["kind"])
                self._timeout = message.get("timeout")
                if self.ready:
                    self.obey()
                else:
                    self.told_early = True
        if not self.end.peer.holders:
            self.exit(0)  # the master is gone

    def obey(self) -> None:
        if not self.orders or not self.fate.obeys:
            return
        if self.fate.drains and len(self.orders) == 1:
            self.system.after(0.05, lambda: self.say(encode("drained")))
        lasts = 0.0 if self.orders[-1] == "halt" else self.fate.lasts
        if lasts is None or (self._timeout is not None and self._timeout < lasts):
            lasts = self._timeout
        if lasts is not None:
            self.leaves_at = self.system.now + lasts
            self.system.after(lasts, self.leave)

    def leave(self) -> None:
        """Its last connection has ended."""
        if self.running and self.orders and not self.stalled:
            self.leaves_at = self.system.now
            if self.pid in self.end.holders:
                self.finished = 1
            self.say(encode("stopped", finished=1, ended=0))
            self.exit(0)

    def get_signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            if self.ready and not (self.faulty or self.told_early) and self.fate.obeys:
                self.system.killed_in_vain.append(self.pid)
            self.system.after(self.fate.lingers, lambda: self.exit(signal.SIGKILL))
        elif number == signal.SIGTERM and self.job is None:
            if self.fate.obeys:
                self.system.after(0.1, lambda: self.exit(0))
        elif number == signal.SIGTERM:
            self.want_to_retire()
        elif self.fate.blocked_in_c and number == signal.SIGUSR2:
            pass
        elif number == signal.SIGUSR2:
            self.say(encode("dumped"))
        elif number:
            self.system.after(self.fate.lingers, lambda: self.exit(number))


@dataclass(frozen=True)
class MonitorFate:
    """What a new monitor will do.

    Attributes:
        holds: seconds from its birth until it has closed its copies of the service's listening sockets.
        starts_after: seconds from then until it reads its line; None: never.
        dies_after: seconds from its birth until it ends with `status`, as waitpid(2) has it.
        stalls_after: seconds from its birth until its event loop is blocked for good.
        closes_after: seconds from its birth until it closes its line and goes on.
        leaves_after: seconds that its last answers take when it is told to leave; None: for ever.
        lingers: seconds that SIGKILL takes.
    """

    holds: float = 0.02
    starts_after: float | None = 0.1
    dies_after: float | None = None
    status: int = 0
    stalls_after: float | None = None
    closes_after: float | None = None
    leaves_after: float | None = 0.05
    lingers: float = 0.0


@dataclass(eq=False)
class Monitor:
    """The monitor of the master.

    Attributes:
        status, buried, faulty, ended_at, late: as a Process's.
        holds_sockets: it has copies of the service's listening sockets.
        exits: it is about to end.
        reads_since: when it had come so far that it reads what it is told.
        started: it has said that it serves.
        health: what it was told last.
        told_to_leave: as it says.
        part: of a line that has begun to come.
        answers: what it was told besides, by kind.
    """

    system: SimulatedSystem
    pid: int
    line: LineEnd
    fate: MonitorFate
    status: int | None = None
    buried: bool = False
    faulty: bool = False
    stalled: bool = False
    ended_at: float = 0.0
    late: list[Callable[[], None]] = field(default_factory=list)
    holds_sockets: bool = True
    exits: bool = False
    reads_since: float | None = None
    started: bool = False
    health: dict[str, Any] | None = None
    told_to_leave: bool = False
    part: bytes = b""
    answers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fate, later = self.fate, self.system.after
        self.born_at = self.system.now
        self.line.holders.add(self.pid)
        self.line.reader = self
        later(fate.holds, self._unless_stalled(self.let_go_of_sockets))
        if fate.starts_after is not None:
            later(fate.holds + fate.starts_after, self._unless_stalled(self.start_reading))
        if fate.dies_after is not None:
            later(fate.dies_after, lambda: self.exit(fate.status))
        if fate.stalls_after is not None:
            later(fate.stalls_after, self.stall)
        if fate.closes_after is not None:
            later(fate.closes_after, self._unless_stalled(self.close))
        self.faulty = fate.starts_after is None or fate.leaves_after is None

    def _unless_stalled(self, do: Callable[[], None]) -> Callable[[], None]:
        def done() -> None:
            if self.stalled:
                self.late.append(do)
            elif self.running and not self.exits:
                do()

        return done

    @property
    def running(self) -> bool:
        return self.status is None

    # -- what it does ------------------------------------------------------------------------------------------------

    def let_go_of_sockets(self) -> None:
        self.holds_sockets = False

    def start_reading(self) -> None:
        self.reads_since = self.system.now
        self.read()

    def say(self, what: str, end: str = "\n") -> None:
        if self.running and not self.stalled and self.pid in self.line.holders:
            self.line.peer.inbox += (what + end).encode()

    def exit(self, status: int, buried: bool = False) -> None:
        """End; `status` as waitpid(2) has it. `buried`: the program waits for it."""

        def end_of_all() -> None:
            self.holds_sockets = False
            self.status = status
            self.buried = buried
            self.ended_at = self.system.now
            self.system.child_ended()

        if self.exits or not self.running:
            return
        self.exits = True
        for end in (self.line, self.line.peer):
            end.holders.discard(self.pid)
        if self.holds_sockets:
            # The kernel closes one descriptor after the other, and wakes who polls the first meanwhile.
            self.system.after(EXIT_SECONDS, end_of_all)
        else:
            end_of_all()

    def stall(self) -> None:
        if self.running:
            self.stalled = self.faulty = True

    def go_on(self) -> None:
        if self.stalled:
            self.stalled = False
            late, self.late = self.late, []
            for do in late:
                do()
            self.read()

    def close(self) -> None:
        if self.running:
            self.faulty = True
            self.line.holders.discard(self.pid)

    # -- what it is told ---------------------------------------------------------------------------------------------

    def read(self) -> None:
        if self.reads_since is None or self.stalled or not self.running or self.pid not in self.line.holders:
            return
        *lines, self.part = (self.part + bytes(self.line.inbox)).split(b"\n")
        self.line.inbox.clear()
        for line in lines:
            for what, value in json.loads(line).items():
                self.hear(what, value)
        if not self.line.peer.holders:
            self.exit(0)  # the master is gone

    def hear(self, what: str, value: Any) -> None:
        if what == "health":
            self.health = value
            self.say("well")
            if not self.started:
                self.started = True
                assert not self.holds_sockets
                self.say("started")
        elif what == "leave":
            self.told_to_leave = True
            if self.fate.leaves_after is not None:
                self.system.after(self.fate.leaves_after, self._unless_stalled(lambda: self.exit(0)))
        else:
            self.answers[what] = self.answers.get(what, 0) + 1

    def get_signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            heard = self.reads_since is not None and self.system.now - self.reads_since >= LEAVE_SECONDS
            if heard and not (self.faulty or self.system.failures):
                self.system.killed_in_vain.append(self.pid)
            self.system.after(self.fate.lingers, lambda: self.exit(signal.SIGKILL))


class Sockets(ListeningSockets):
    """Listening sockets without any: notes which slots have some, and where new connections are sent."""

    def __init__(self, system: SimulatedSystem, config: ListenConfig) -> None:
        super().__init__(config)
        self._system = system
        self.slots: set[int] = set()
        self.steered: set[int] = set()
        self.closed = False

    def open(self, _addresses: Any, slots: Iterable[int], _inherited: Any = ()) -> None:
        self.slots = set(slots)

    def add_slot(self, slot: int) -> None:
        if self._system.fails("socket"):
            raise failed(errno.EMFILE)
        assert slot not in self.slots
        self.slots.add(slot)

    def remove_slot(self, slot: int) -> int:
        # A process that was just forked has copies of them all: the kernel would keep the member, and count otherwise.
        for process in self._system.running():
            has_all = process.job is None or process.born_at + HOLDS_ALL_SECONDS > self._system.now
            assert not has_all, f"slot {slot} is closed while process {process.pid} holds its sockets"
        for monitor in self._system.monitors.values():
            assert not monitor.holds_sockets, f"slot {slot} is closed while a monitor that starts holds its sockets"
        self.slots.remove(slot)
        return 0

    def steer(self, slots: Collection[int], _cpus: Mapping[int, int]) -> None:
        self.steered = set(slots)

    def close_slot(self, slot: int) -> int:
        self.slots.discard(slot)
        return 0

    def close_shared(self, keep_paths: bool = False) -> None:
        pass

    def close(self, keep_paths: bool = False) -> None:
        self.slots.clear()
        self.closed = True


class CaughtSignals:
    """Signals to the master."""

    def __init__(self) -> None:
        self.caught: deque[int] = deque()
        self.woken = False
        self.closed = False

    def send(self, number: int) -> None:
        self.caught.append(number)
        self.woken = True

    def fileno(self) -> int:
        return SIGNAL_FD

    def empty(self) -> None:
        self.woken = False

    def next(self) -> int | None:
        return self.caught.popleft() if self.caught else None

    def close(self) -> None:
        self.closed = True

    def close_in_child(self) -> None:
        raise AssertionError("there are no children in which it would be called")


class SimulatedSystem:
    """A `System`.

    Attributes:
        now: what the clock says; seconds.
        processes: all workers and new masters there ever were, by process id.
        monitors: all monitors.
        fates, monitor_fates: of the next ones; those beyond are good ones.
        failing: kinds of calls that fail now: fork, pair, send, receive, socket, kill, poll.
        failures: how many calls have failed.
        signals: to the master, if it has caught them.
        slack: seconds that a wait of the master takes at least when nothing happens: a busy machine.
        kills: signals that were sent, with their process ids.
        killed_in_vain: processes that got SIGKILL, and would have ended in time.
        loses_child_signals: SIGCHLD does not come: the program has taken it.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.processes: dict[int, Process] = {}
        self.monitors: dict[int, Monitor] = {}
        self.fates: deque[Fate] = deque()
        self.monitor_fates: deque[MonitorFate] = deque()
        self.failing: set[str] = set()
        self.failures = 0
        self.signals: CaughtSignals | None = None
        self.slack = 0.0
        self.kills: list[tuple[int, int]] = []
        self.killed_in_vain: list[int] = []
        self.loses_child_signals = False
        self.sockets: list[Sockets] = []
        self.ends: dict[int, End] = {}
        self.line_ends: dict[int, LineEnd] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._horizon = 0.0
        self._polls = 0
        self._most_polls = 0.0
        self._life: greenlet | None = None
        self._test = getcurrent()

    # -- for tests ---------------------------------------------------------------------------------------------------

    def begin(self, life: Callable[[], Any]) -> None:
        """Have `life` use this system, in steps of `run`."""
        self._test = getcurrent()
        self._life = greenlet(life)
        self.after(BEAT_SECONDS, self._beat)

    def run(self, seconds: float) -> bool:
        """Let it go on for some seconds; False: it has ended. What it raises is raised here."""
        assert self._life is not None
        self._horizon = self.now + seconds
        # A few turns for everything that can happen, and the rest would be a loop without a pause.
        self._polls, self._most_polls = 0, 100 + 60 * seconds
        if not self._life.dead:
            self._life.switch()
        assert self._polls < self._most_polls, f"{self._polls} turns in {seconds} s"
        return not self._life.dead

    def end(self) -> None:
        """Unwind what has not ended; what `finally` blocks still do happens at once."""
        if self._life is not None and not self._life.dead:
            self._horizon = float("inf")
            self._life.throw()

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), what))

    def later(self, seconds: float) -> float:
        """Set the clock forward, while nothing happens; return what it says."""
        self.now += seconds
        return self.now

    def fails(self, kind: str) -> bool:
        if kind in self.failing:
            self.failures += 1
            return True
        return False

    def running(self) -> list[Process]:
        return [process for process in self.processes.values() if process.running]

    def zombies(self) -> list[Process]:
        return [process for process in self.processes.values() if not process.running and not process.buried]

    def open_fds(self) -> set[int]:
        """Channels that the master has open."""
        return {fd for fd, end in self.ends.items() if MASTER in end.holders}

    def open_lines(self) -> set[int]:
        """Lines to monitors that the master has open."""
        return {fd for fd, end in self.line_ends.items() if MASTER in end.holders}

    def _beat(self) -> None:
        for process in self.processes.values():
            process.beat()
        self.after(BEAT_SECONDS, self._beat)

    def child_ended(self) -> None:
        if self.signals is not None and not self.loses_child_signals:
            self.signals.send(signal.SIGCHLD)

    # -- System ------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._wait(seconds, list)

    def pid(self) -> int:
        return MASTER

    def start_worker(self, job: Job, _close: Callable[[], None]) -> int:
        return self._start(self.ends[job.channel.fileno()], job)

    def start_master(self, _environment: Callable[[], Mapping[str, str]], fds: Iterable[int]) -> int:
        (end,) = (self.ends[fd] for fd in fds)
        return self._start(end, None)

    def _start(self, end: End, job: Job | None) -> int:
        if self.fails("fork"):
            raise failed(errno.EAGAIN)
        pid = FIRST_PID + len(self.processes)
        fate = self.fates.popleft() if self.fates else Fate()
        self.processes[pid] = Process(self, pid, end, fate, job)
        return pid

    def history_memory(self, _fd: int | None) -> int | None:
        return None

    def start_monitor(self, job: MonitorJob, _close: Callable[[], None]) -> int:
        if self.fails("fork"):
            raise failed(errno.EAGAIN)
        pid = FIRST_MONITOR + len(self.monitors)
        fate = self.monitor_fates.popleft() if self.monitor_fates else MonitorFate()
        self.monitors[pid] = Monitor(self, pid, self.line_ends[job.line.fileno()], fate)
        return pid

    def _child(self, pid: int) -> Process | Monitor | None:
        return self.processes.get(pid) or self.monitors.get(pid)

    def has_terminal(self) -> bool:
        return False

    def who_ends_with_us(self) -> str:
        return ""

    def kill(self, pid: int, number: int) -> None:
        process = self._child(pid)
        if process is None or process.buried:
            raise failed(errno.ESRCH)
        if self.fails("kill"):
            raise failed(errno.EPERM)
        self.kills.append((pid, number))
        if process.running:
            process.get_signal(number)

    def wait(self, pid: int) -> tuple[int, int]:
        process = self._child(pid)
        if process is None or process.buried:
            raise failed(errno.ECHILD)
        if process.status is None:
            return 0, 0
        process.buried = True
        return pid, process.status

    def catch_signals(self, _numbers: Iterable[int]) -> Signals:
        self.signals = CaughtSignals()
        return self.signals

    def make_pair(self, kinds_here: frozenset[str], kinds_there: frozenset[str]) -> tuple[Channel, Channel]:
        one, other = self._make_pair(End, self.ends)
        return Channel(one, kinds_here), Channel(other, kinds_there)

    def make_line(self) -> tuple[socket.socket, socket.socket]:
        return self._make_pair(LineEnd, self.line_ends)

    def _make_pair(self, kind: type[AnyEnd], ends: dict[int, Any]) -> tuple[Any, Any]:
        if self.fails("pair"):
            raise failed(errno.EMFILE)
        first = FIRST_FD + len(self.ends) + len(self.line_ends)
        here, there = (kind(self, first + i) for i in (0, 1))
        here.peer, there.peer = there, here
        ends[here.fileno()], ends[there.fileno()] = here, there
        return here, there

    def listening_sockets(self, config: ListenConfig) -> ListeningSockets:
        self.sockets.append(Sockets(self, config))
        return self.sockets[-1]

    def shared_memory(self, _workers: int, _fd: int | None) -> SharedMemory | None:
        return None

    def poll(self, watched: Mapping[int, int], seconds: float) -> list[tuple[int, int]]:
        self._polls += 1
        if self._polls >= self._most_polls:
            self._test.switch()
        self.now += TURN_SECONDS
        if self.fails("poll"):
            raise failed(errno.ENOMEM)

        def ready() -> list[tuple[int, int]]:
            found = [(fd, self._events_of(fd) & wanted) for fd, wanted in watched.items()]
            return [(fd, events) for fd, events in found if events]

        return self._wait(max(seconds, self.slack), ready)

    def _events_of(self, fd: int) -> int:
        if fd == SIGNAL_FD:
            return select.POLLIN if self.signals is not None and self.signals.woken else 0
        end = self.ends.get(fd) or self.line_ends[fd]
        return end.events()

    def _wait(self, seconds: float, ready: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
        until = self.now + seconds
        while True:
            found = ready()
            if found or self.now >= until:
                return found
            at = min(until, self._events[0][0]) if self._events else until
            if at > self._horizon:
                self.now = max(self.now, self._horizon)
                self._test.switch()
                continue  # the test may have done something
            self.now = max(self.now, at)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()


#: Nothing of it runs: simulated processes have lives of their own.
PROGRAM = Program(addresses=[], listen=ListenConfig(), build=cast(Any, None))


def make_fleet(system: SimulatedSystem, slots: int = 1, **options: Any) -> Fleet:
    """A fleet without a master, that has started before; its slots are empty (`add_worker`)."""
    config = SupervisorConfig(workers=slots, **options)
    sockets = system.listening_sockets(PROGRAM.listen)
    sockets.open((), range(slots))
    fleet = Fleet(config, sockets, PROGRAM, "/", lambda: None, [*range(slots)], system)
    fleet.up = True
    return fleet


def add_worker(fleet: Fleet, number: int = 0, state: WorkerState = WorkerState.READY) -> WorkerProcess:
    """A worker for a slot, in whose place the caller may put it."""
    worker = fleet.start(fleet.slots[number], fleet.generation)
    assert worker is not None
    make_ready(worker)
    worker.state = state
    return worker


def make_ready(worker: WorkerProcess) -> None:
    worker.state = WorkerState.READY
    worker.ready_at = worker.last_beat = worker.system.monotonic()


class SimulatedMaster:
    """A master that runs in a simulated system.

    Args:
        takes_over: it is the new master of an upgrade. The old one hears it over a real socket: `told`.

    Attributes:
        outcome: how its life has ended; None: it has not.
    """

    def __init__(self, system: SimulatedSystem, *, takes_over: bool = False, **options: Any) -> None:
        self.system = system
        self.master = Master(PROGRAM, SupervisorConfig(**options), system)
        self.outcome: Fleet | WorkersCannotStart | None = None
        self._slots = self.master.config.worker_count()
        self._old_master: socket.socket | None = None
        if takes_over:
            self._old_master, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._old_master.setblocking(False)
            self._channel = theirs.detach()
        system.begin(self._live)

    def told(self) -> list[str]:
        """What the old master has heard until now, once; at the end."""
        assert self._old_master is not None
        kinds = []
        with self._old_master as sock:
            try:
                while data := sock.recv(MAX_BYTES):
                    kinds.append(decode(data, HANDOVER_KINDS).kind)
            except BlockingIOError:
                os.close(self._channel)  # as the end of its process would
        return kinds

    def _live(self) -> None:
        if self._old_master is not None:
            slots = [*range(self._slots)]
            handover = Handover(1, self._channel, slots, sockets=[], control=None, listen_fds=0, metrics=[])
            os.environ[VARIABLE] = json.dumps(dataclasses.asdict(handover))
        try:
            self.outcome = self.master.run()
        except WorkersCannotStart as error:
            self.outcome = error

    @property
    def fleet(self) -> Fleet:
        return self.master.fleet

    def run(self, seconds: float) -> None:
        self.system.run(seconds)

    def signal(self, number: int, seconds: float = 0.0) -> None:
        """Send it a signal, and let it go on."""
        assert self.system.signals is not None
        self.system.signals.send(number)
        self.system.run(seconds)

    def current(self, number: int = 0) -> Process:
        """The process that serves a slot."""
        worker = self.fleet.slots[number].current
        assert worker is not None
        return self.system.processes[worker.pid]

    def monitor(self) -> Monitor:
        """The newest."""
        return self.system.monitors[max(self.system.monitors)]
