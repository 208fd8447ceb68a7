"""A master in a simulated system, driven at random: deaths, timeouts, signals, reloads, and calls that fail.

The real Master, Fleet, Reload and Upgrade run, by a virtual clock; processes, channels and signals are simulated
(kit/simulated.py). After each step the books are compared with what the processes do; at the end of each schedule all
faults end, and everything has to come to rest: every slot served, every operation ended, nothing left over.

Hypothesis drives the machine, which is thorough, and so does a plain loop, which is four times as fast. For as many
schedules as there is time for: GTCPSERVER_SCHEDULES=20000, or `make schedules`. A schedule that fails is made shorter
before it is printed; GTCPSERVER_NO_SHRINK=1 leaves it as it is.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gtcpserver.supervisor.care import DUMP_SECONDS, START_SECONDS
from gtcpserver.supervisor.fleet import HALT_SECONDS, KILL_MARGIN, LASTING_SECONDS, Fleet
from gtcpserver.supervisor.master import REAP_SECONDS, MasterState, WorkersCannotStart
from gtcpserver.supervisor.monitor import LEAVE_SECONDS, MAX_REQUEST
from gtcpserver.supervisor.monitor import START_SECONDS as MONITOR_START_SECONDS
from gtcpserver.supervisor.reload import LET_GO_SECONDS
from gtcpserver.supervisor.slots import KILL_AGAIN_SECONDS, LONGEST_BACK_OFF, WorkerState
from gtcpserver.supervisor.upgrade import FAILED_SECONDS, UPGRADE_SECONDS
from kit.simulated import FIRST_PID, Fate, Monitor, MonitorFate, Process, SimulatedMaster, SimulatedSystem

SCHEDULES = int(os.environ.get("GTCPSERVER_SCHEDULES", "1000"))

#: Others each time, where there is time for many.
FIRST_SCHEDULE = random.randrange(1 << 32) if "GTCPSERVER_SCHEDULES" in os.environ else 0

#: By hypothesis.
EXAMPLES = SCHEDULES // 10

LONGEST = 20  # steps of a schedule

SHRINKS = "GTCPSERVER_NO_SHRINK" not in os.environ

WORKER_TIMEOUT = 2.0
GRACEFUL_TIMEOUT = 3.0
NOTICED = REAP_SECONDS + 1.5  # seconds until the master knows that a process has ended, without a signal too
LINGERS = 2.5  # seconds that SIGKILL takes at most

#: Seconds until a process that is to end has ended, whatever it does.
ENDED = GRACEFUL_TIMEOUT + KILL_MARGIN + LASTING_SECONDS + KILL_AGAIN_SECONDS + LINGERS + 2

#: The same for a monitor.
MONITOR_ENDED = LEAVE_SECONDS + LINGERS + 2

#: Seconds until a new worker is proven, or has failed.
PROVEN = START_SECONDS + 2 * DUMP_SECONDS + LINGERS + 2 + WORKER_TIMEOUT + 3

MOST_WORKERS = 3

#: Seconds until everything is at rest when nothing fails any more: an upgrade, the back-off, a recycling, and a reload.
AT_REST = (
    MONITOR_START_SECONDS
    + MONITOR_ENDED
    + UPGRADE_SECONDS
    + 2 * LONGEST_BACK_OFF
    + 2 * PROVEN
    + MOST_WORKERS * (PROVEN + ENDED + LET_GO_SECONDS)
)

FATES = {
    "good": Fate(),
    "slow": Fate(ready_after=8.0),
    "hangs": Fate(ready_after=None),
    "hangs in C": Fate(ready_after=None, blocked_in_c=True, lingers=LINGERS),
    "fails": Fate(fails=True),
    "fails late": Fate(fails=True, ready_after=3.0),
    "crashes at its start": Fate(ready_after=None, dies_after=0.3, status=signal.SIGSEGV),
    "exits at once": Fate(dies_after=0.0, status=0),
    "dies on probation": Fate(dies_after=0.5, status=1 << 8),
    "is killed": Fate(dies_after=0.15, status=signal.SIGKILL),
    "dies later": Fate(dies_after=4.0, status=signal.SIGABRT),
    "blocks on probation": Fate(stalls_after=0.2),
    "blocks later": Fate(stalls_after=5.0, blocked_in_c=True),
    "closes its channel": Fate(closes_after=0.05),
    "closes its channel later": Fate(closes_after=2.0, lingers=LINGERS),
    "is recycled": Fate(wants_to_retire_after=1.5),
    "is recycled soon": Fate(wants_to_retire_after=0.2),
    "has lasting connections": Fate(lasts=None),
    "drains badly": Fate(lasts=10.0, drains=False),
    "obeys nobody": Fate(obeys=False),
    "obeys not even SIGKILL": Fate(obeys=False, lingers=LINGERS),
}

#: A new master has no beats, connections or successors.
MASTER_FATE = [
    name
    for name in FATES
    if not name.startswith(("blocks", "is recycled", "has", "drains", "closes its channel later"))
]

#: Good ones more often, and those without which a stop is over at once.
FATE = ("good", "has lasting connections", *FATES, "good", "good", "good", "drains badly")

#: Nothing of it may harm the service.
MONITOR_FATES = {
    "good": MonitorFate(),
    "slow": MonitorFate(starts_after=8.0),
    "is slow to let go of sockets": MonitorFate(holds=1.0),
    "never starts": MonitorFate(starts_after=None, lingers=LINGERS),
    "stops before it lets go of sockets": MonitorFate(stalls_after=0.0),
    "dies before it lets go of sockets": MonitorFate(holds=1.0, dies_after=0.5, status=signal.SIGKILL),
    "exits at once": MonitorFate(dies_after=0.0),
    "dies before it reads": MonitorFate(starts_after=3.0, dies_after=1.0, status=1 << 8),
    "dies later": MonitorFate(dies_after=4.0, status=signal.SIGSEGV),
    "dies much later": MonitorFate(dies_after=15.0, status=signal.SIGABRT),
    "blocks": MonitorFate(stalls_after=2.0),
    "closes its line": MonitorFate(closes_after=1.0, lingers=LINGERS),
    "is slow to end": MonitorFate(leaves_after=1.0),
    "does not end": MonitorFate(leaves_after=None),
    "does not even end by SIGKILL": MonitorFate(leaves_after=None, lingers=LINGERS),
}

MONITOR_FATE = ("good", "good", "good", *MONITOR_FATES)

#: What a monitor may say: what one says, what nobody says, and lines without end.
WORDS = ("status", "connections", "well", "started", "", "nonsense", MAX_REQUEST * "x", 2 * MAX_REQUEST * "x")

STATUSES = (0, 1 << 8, 3 << 8, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)

FAILING = ("fork", "pair", "send", "receive", "socket", "kill", "poll")

NUMBER = range(6)
SECONDS = [0.05, 0.3, 1.0, 3.0, 12.0]


def _was_injected(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


class Faults(logging.Handler):
    """Raises what the master has caught and logged: none of its parts may fail here."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and not _was_injected(record.exc_info[1]):
            self.seen.append(record.exc_info[1])


@dataclass
class Operation:
    """A reload, an upgrade, or a change of the number of workers."""

    what: str
    machine: Schedules
    began_at: float
    failures: int
    count: int = 0
    old: list[Process] = field(default_factory=list)
    told: list[str | None] = field(default_factory=list)

    def done(self, error: str | None) -> None:
        assert not self.told, f"{self.what} ended twice: {self.told[0]!r}, {error!r}"
        self.told.append(error)
        machine = self.machine
        if self.what == "reload" and not machine.master.stopping:
            machine.look_at_reload(self, error)
        elif self.what == "scale" and error is None:
            newer = [one.count for one in machine.operations if one.what == "scale"]
            assert machine.fleet.target == newer[-1] or machine.scaled_by_signal, "not as many as wanted"


Choices = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Step:
    """What may come next.

    Attributes:
        when: whether it is possible.
        choices: of its arguments.
    """

    when: Callable[[Any], bool]
    choices: Choices


STEPS: dict[str, Step] = {}


def drawn(choices: Choices) -> dict[str, Any]:
    return {name: st.sampled_from(values) for name, values in choices.items()}


def step(when: Callable[[Any], bool] = lambda self: True, **choices: Sequence[Any]) -> Callable[[Any], Any]:
    """Decorate a rule of hypothesis's that the plain loop knows too."""

    def decorate(function: Any) -> Any:
        STEPS[function.__name__] = Step(when, choices)
        return precondition(when)(rule(**drawn(choices))(function))

    return decorate


BEGIN: Choices = {
    "workers": (3, 2, 2, 3, 1),
    "one_by_one": (False, False, True),
    "probation": (0.0, 1.0),
    "worker_timeout": (WORKER_TIMEOUT, None),
    "graceful_timeout": (GRACEFUL_TIMEOUT, None),
    "retire_timeout": (None, 2.0),
    "max_retired": (None, 0, 1),
    "takes_over": (False, False, True),
    "monitored": (True, True, False),
    "monitor": MONITOR_FATE,
    "first": (*["good"] * len(FATE), *FATE),
    "second": FATE,
    "third": FATE,
}


class Schedules(RuleBasedStateMachine):
    """The operator, and everything that can go wrong."""

    @initialize(**drawn(BEGIN))
    def begin(
        self,
        workers: int,
        one_by_one: bool,
        takes_over: bool,
        monitored: bool,
        monitor: str,
        first: str,
        second: str,
        third: str,
        **options: Any,
    ) -> None:
        self.system = SimulatedSystem()
        self.operations: list[Operation] = []
        self.faults = Faults()
        self.logger = logging.getLogger("gtcpserver")
        self.before = self.logger.level, self.logger.propagate
        self.logger.setLevel(logging.ERROR)
        self.logger.propagate = False
        self.logger.addHandler(self.faults)
        self.system.fates += (FATES[first], FATES[second], FATES[third])
        self.system.monitor_fates.append(MONITOR_FATES[monitor])
        self.renewed: set[int] = set()
        self.without_monitor: tuple[Any, float] | None = None
        self.scaled_by_signal = False
        self.retired: set[int] = set()
        more = {"workers": workers, "reload_one_by_one": one_by_one, "drain_delay": 0.5}
        if monitored:
            more["metrics"] = "127.0.0.1:0"
        self.served = False
        self.takes_over = takes_over
        self.simulated = SimulatedMaster(self.system, takes_over=takes_over, **options, **more)
        self.master = self.simulated.master
        self.config = self.master.config
        self.system.run(2.0 if first == "good" else 0.0)

    @property
    def outcome(self) -> Fleet | WorkersCannotStart | None:
        return self.simulated.outcome

    @property
    def fleet(self) -> Fleet:
        return self.master.fleet

    def workers(self) -> list[Process]:
        return [process for process in self.system.running() if process.job is not None]

    def pick(self, number: int) -> Process | None:
        workers = self.workers()
        return workers[number % len(workers)] if workers else None

    @property
    def monitor(self) -> Monitor | None:
        """The one that runs."""
        return next((one for one in self.system.monitors.values() if one.running), None)

    # -- time --------------------------------------------------------------------------------------------------------

    @step(seconds=SECONDS)
    def a_while(self, seconds: float) -> None:
        self.go(seconds)

    @step(seconds=[LONGEST_BACK_OFF, START_SECONDS], how_often=NUMBER)
    def a_long_while(self, seconds: float, how_often: int) -> None:
        if how_often == 0:
            self.go(seconds)

    def go(self, seconds: float) -> None:
        """Let time pass; when it is long, in bigger steps."""
        self.system.slack = 0.9 if seconds > 3 else 0.0
        self.system.run(seconds)

    # -- the operator ------------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self.outcome is None and self.system.signals is not None

    def operate(self, what: str) -> Operation:
        old = [process for process in self.workers() if process.accepts]
        self.operations.append(Operation(what, self, self.system.now, self.system.failures, old))
        return self.operations[-1]

    @step(lambda self: self.up, number=[signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU])
    def get_signal(self, number: int) -> None:
        self.scaled_by_signal = self.scaled_by_signal or number != signal.SIGHUP
        self.system.signals.send(number)
        self.system.run(0.0)

    @step(lambda self: self.up and not self.master.stopping, first=FATE, second=FATE, third=FATE, seconds=SECONDS)
    def reload(self, first: str, second: str, third: str, seconds: float) -> None:
        self.system.fates.extendleft((FATES[third], FATES[second], FATES[first]))
        self.master.begin_reload("a test", self.operate("reload").done)
        self.go(seconds)

    @step(lambda self: self.up and not self.master.stopping, count=range(1, MOST_WORKERS + 1), seconds=SECONDS)
    def scale(self, count: int, seconds: float) -> None:
        operation = self.operate("scale")
        operation.count = count
        self.master.scale(count, operation.done)
        self.go(seconds)

    @step(
        lambda self: self.up and not self.master.stopping,
        fate=MASTER_FATE,
        seconds=SECONDS,
    )
    def upgrade(self, fate: str, seconds: float) -> None:
        self.system.fates.appendleft(FATES[fate])
        self.master.begin_upgrade("a test", self.operate("upgrade").done)
        self.go(seconds)

    @step(lambda self: self.up, number=[signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], how_often=NUMBER)
    def stop(self, number: int, how_often: int) -> None:
        if how_often == 0:  # not too often: it is the end of the schedule
            self.system.signals.send(number)
            self.system.run(0.0)

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    @step(first=FATE, second=FATE)
    def new_processes_will(self, first: str, second: str) -> None:
        self.system.fates += (FATES[first], FATES[second])

    @step(number=NUMBER, status=STATUSES, seconds=SECONDS)
    def die(self, number: int, status: int, seconds: float) -> None:
        if (worker := self.pick(number)) is not None:
            worker.exit(status)
            self.go(seconds)

    @step(number=NUMBER, seconds=SECONDS)
    def stall(self, number: int, seconds: float) -> None:
        if (worker := self.pick(number)) is not None:
            worker.stall()
            self.go(seconds)

    @step(number=NUMBER)
    def go_on(self, number: int) -> None:
        if (worker := self.pick(number)) is not None:
            worker.go_on()

    @step(number=NUMBER)
    def want_to_retire(self, number: int) -> None:
        if (worker := self.pick(number)) is not None:
            worker.want_to_retire()

    @step(number=NUMBER)
    def leave(self, number: int) -> None:
        if (worker := self.pick(number)) is not None:
            worker.leave()

    @step(number=NUMBER)
    def be_buried_by_the_program(self, number: int) -> None:
        if (worker := self.pick(number)) is not None:
            worker.exit(0)
            worker.buried = True

    @step(what=FAILING, seconds=[0.3, 0.0, 2.0], number=(None, *NUMBER))
    def fail(self, what: str, seconds: float, number: int | None) -> None:
        self.system.failing.add(what)
        if number is not None and (worker := self.pick(number)) is not None:
            worker.exit(signal.SIGKILL)
        self.go(seconds)
        self.system.failing.clear()

    @step(loses=(False, True))
    def child_signals(self, loses: bool) -> None:
        self.system.loses_child_signals = loses

    @step(first=MONITOR_FATE, second=MONITOR_FATE)
    def new_monitors_will(self, first: str, second: str) -> None:
        self.system.monitor_fates += (MONITOR_FATES[first], MONITOR_FATES[second])

    @step(lambda self: self.monitor is not None, status=STATUSES, buried=(False, False, True), seconds=SECONDS)
    def monitor_dies(self, status: int, buried: bool, seconds: float) -> None:
        self.monitor.exit(status, buried)
        self.go(seconds)

    @step(lambda self: self.monitor is not None, seconds=SECONDS)
    def monitor_stalls(self, seconds: float) -> None:
        self.monitor.stall()
        self.go(seconds)

    @step(lambda self: self.monitor is not None)
    def monitor_goes_on(self) -> None:
        self.monitor.go_on()

    @step(lambda self: self.monitor is not None and self.monitor.started, word=WORDS, times=(1, 100))
    def monitor_says(self, word: str, times: int) -> None:
        if len(word) >= MAX_REQUEST:
            self.monitor.faulty = True
        for _ in range(times):
            self.monitor.say(word)
        self.go(0.3)

    @step(lambda self: self.up and self.monitor is not None)
    def log_file_is_opened_again(self) -> None:
        self.renewed.add(self.monitor.pid)
        self.master.monitor.renew()

    # -- the books ---------------------------------------------------------------------------------------------------

    @invariant()
    def the_books_are_right(self) -> None:
        if self.master.state is MasterState.SERVING and not self.served:
            self.served = True
            for slot in self.fleet.slots.values() if self.takes_over else ():
                first = slot.current is not None and slot.current.pid < FIRST_PID + self.config.worker_count()
                if first and slot.current.ready_at:
                    lived = self.system.now - slot.current.ready_at
                    assert lived >= self.config.probation, "the old master leaves before the new one is proven"
        self.no_part_of_the_master_has_failed()
        self.every_child_is_known_once()
        self.no_slot_has_two_workers_but_while_one_is_replaced()
        self.workers_leave_when_their_successors_are_proven()
        self.every_end_is_noticed()
        self.no_worker_that_obeys_is_killed()
        self.no_slot_is_forgotten()
        self.there_is_one_monitor()
        self.the_monitor_goes_last()

    def no_part_of_the_master_has_failed(self) -> None:
        for error in self.faults.seen:
            raise error

    def every_child_is_known_once(self) -> None:
        """No worker twice, none forgotten, no channel of a dead one."""
        if self.outcome is not None:
            return
        fleet = self.fleet
        placed = [worker for slot in fleet.slots.values() for worker in slot.workers()]
        assert len({worker.pid for worker in placed}) == len(placed), "a worker is in two places"
        assert {worker.pid for worker in placed} == fleet.workers.keys()
        for number, slot in fleet.slots.items():
            assert all(worker.slot == number for worker in slot.workers())
            assert all(worker.leaving for worker in slot.gone_on)
            if not fleet.stopping:
                assert not any(one is not None and one.leaving for one in (slot.current, slot.next))
        for process in self.system.processes.values():
            if process.job is not None:
                known = process.pid in fleet.workers
                assert known or process.buried, f"worker {process.pid} is forgotten"
        ends = {process.end.peer.fileno() for process in self.system.processes.values() if process.pid in fleet.workers}
        others = self.system.open_fds() - ends
        assert len(ends) == len(fleet.workers)
        assert -1 not in ends
        masters = [one for one in self.system.processes.values() if one.job is None and not self.is_over(one)]
        assert others <= {process.end.peer.fileno() for process in masters}
        assert len(others) <= 1

    def is_over(self, process: Process | Monitor) -> bool:
        """Whether it has ended so long ago that the master must know."""
        return not process.running and self.system.now - process.ended_at > NOTICED

    def no_slot_has_two_workers_but_while_one_is_replaced(self) -> None:
        if self.outcome is not None:
            return
        fleet = self.fleet
        successors = [slot for slot in fleet.slots.values() if slot.next is not None]
        if not fleet.stopping and (fleet.reload is None or self.config.reload_one_by_one):
            assert len(successors) <= 1
        for slot in fleet.slots.values():
            accepting = [one for one in slot.workers() if self.system.processes[one.pid].accepts and not one.leaving]
            assert len(accepting) <= 1 + (slot.next is not None)

    def workers_leave_when_their_successors_are_proven(self) -> None:
        if self.outcome is not None:
            return
        reload = self.fleet.reload
        successors = [slot.next for slot in self.fleet.slots.values() if slot.next is not None]
        if reload is not None and len(successors) > 1:
            assert successors[0].state is WorkerState.READY, "code that was not proven is started in every slot"
        for slot in self.fleet.slots.values():
            for worker in slot.gone_on:
                process, current = self.system.processes[worker.pid], slot.current
                if worker.pid in self.retired or process.faulty or slot.closing or self.fleet.stopping:
                    continue
                self.retired.add(worker.pid)
                if worker.generation <= self.fleet.generation and current is not None:
                    assert current.started_at >= worker.retired_at or (
                        worker.retired_at - current.ready_at >= self.config.probation and current.ready_at
                    ), f"worker {worker.pid} has left before its successor was proven"

    def every_end_is_noticed(self) -> None:
        if self.outcome is None:
            for process in self.system.zombies():
                assert not self.is_over(process), f"nobody has waited for process {process.pid}"
            for monitor in self.system.monitors.values():
                assert monitor.buried or not self.is_over(monitor), f"nobody has waited for monitor {monitor.pid}"

    def no_worker_that_obeys_is_killed(self) -> None:
        assert not self.system.killed_in_vain

    def no_slot_is_forgotten(self) -> None:
        """One without a worker gets the next after a bounded time."""
        if self.outcome is not None or self.fleet.stopping or self.fleet.first_failure is not None:
            return
        for slot in self.fleet.active():
            assert slot.not_before <= self.system.now + LONGEST_BACK_OFF
            if slot.current is None and slot.next is None:
                assert self.system.now <= slot.not_before + 1.5, f"slot {slot.number} is forgotten"
        assert self.system.sockets[0].slots == self.fleet.slots.keys()
        assert self.system.sockets[0].steered <= self.fleet.slots.keys()

    def there_is_one_monitor(self) -> None:
        """One that ends gets a successor after a bounded time, and not before."""
        if self.outcome is not None:
            return
        system = self.system
        unburied = [one for one in system.monitors.values() if not one.buried]
        assert len(unburied) <= 1
        assert system.open_lines() <= {
            one.line.peer.fileno() for one in system.monitors.values() if not self.is_over(one)
        }
        assert len(system.open_lines()) <= 1
        wanted = self.up and self.config.metrics is not None and not self.master.stopping and self.master.owns_metrics
        if unburied or not wanted:
            self.without_monitor = None
            return
        tries = (len(system.monitors), system.failures)
        if self.without_monitor is None or self.without_monitor[0] != tries:
            self.without_monitor = (tries, system.now)
        assert system.now - self.without_monitor[1] <= LONGEST_BACK_OFF + 2, "there is no monitor any more"

    def the_monitor_goes_last(self) -> None:
        """Until nobody is served any more it says that the service drains."""
        if self.monitor is None or not self.monitor.told_to_leave or self.monitor.pid in self.renewed:
            return
        successors = [one for one in self.system.processes.values() if one.told_ready and one.job is None]
        assert successors or not self.workers()

    def look_at_reload(self, reload: Operation, error: str | None) -> None:
        """A reload that was not ended by a stop has ended."""
        fleet, processes = self.fleet, self.system.processes
        if error is None:
            assert all(slot.current is None or slot.current.generation == fleet.generation for slot in fleet.active())
            return
        if "upgrade" in error:
            return
        new = [one for one in processes.values() if one.job is not None and one.born_at >= reload.began_at]
        assert self.system.failures > reload.failures or any(one.faulty for one in new), f"no reason: {error}"
        assert not any(slot.next is not None for slot in fleet.slots.values()), "a new worker stays"
        if not self.config.reload_one_by_one:
            for slot in fleet.active():
                if slot.current is None:
                    left = [processes[one.pid] for one in slot.gone_on if one.ready_at]
                    assert not any(process.accepts for process in left), "a worker that is needed has left"
            for process in reload.old:
                if process.accepts and process.pid in fleet.workers:
                    assert not fleet.workers[process.pid].leaving, "an old worker has left for a reload that failed"

    # -- the end -----------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "system"):
            return
        try:
            self.come_to_rest()
        finally:
            self.logger.removeHandler(self.faults)
            self.logger.level, self.logger.propagate = self.before
            self.system.end()

    def come_to_rest(self) -> None:
        system = self.system
        system.failing.clear()
        system.fates.clear()
        system.monitor_fates.clear()
        system.loses_child_signals = False
        system.slack = 0.9
        self.run_until(self.at_rest, AT_REST)
        if self.outcome is None and not self.master.stopping:
            system.signals.send(signal.SIGTERM)
        if self.config.graceful_timeout is None:
            system.run(3.0)
            if self.outcome is None:
                system.signals.send(signal.SIGQUIT)
        ended = max(ENDED, FAILED_SECONDS + LINGERS + 2) + HALT_SECONDS + MONITOR_ENDED
        self.run_until(lambda: self.outcome is not None, ended)
        if self.takes_over:
            failed = isinstance(self.outcome, WorkersCannotStart)
            assert self.simulated.told() == (["failed"] if failed else ["ready"] if self.served else [])
        assert all(one.told for one in self.operations)
        assert not system.open_fds()
        assert not system.open_lines()
        assert all(one.buried for one in system.monitors.values()), "a monitor runs on, or nobody has waited for it"
        assert system.signals is None or system.signals.closed
        assert all(sockets.closed or not sockets.slots for sockets in system.sockets)
        assert not self.workers(), "a worker runs on"
        successors = [one for one in system.running() if one.told_ready]
        assert system.running() == successors, "a new master that was given up runs on"
        if isinstance(self.outcome, Fleet) and not system.failures:
            assert self.outcome.finished == sum(process.finished for process in system.processes.values())
        assert not [one for one in system.zombies() if one.job is not None], "nobody has waited for a worker"

    def at_rest(self) -> bool:
        """Whether every slot is served, and every operation has ended."""
        if self.outcome is not None:
            return True
        if self.config.worker_timeout is None:
            # Nothing would end those that are blocked, as the operator has asked.
            for process in self.workers():
                process.go_on()
                if not process.ready and process.fate.ready_after is None:
                    process.exit(1 << 8)
        if self.master.state in (MasterState.DRAINING, MasterState.STOPPING):
            self.let_all_leave()
            return False
        fleet = self.fleet
        return (
            self.master.ready
            and not fleet.reloading()
            and all(one.told for one in self.operations)
            and len(fleet.active()) == fleet.target
            and all(slot.next is None and self.serves(slot.current) for slot in fleet.active())
            and (self.config.metrics is None or self.is_monitored())
        )

    def is_monitored(self) -> bool:
        monitor = self.monitor
        good = monitor is not None and monitor.started and not (monitor.stalled or monitor.told_to_leave)
        return good and monitor.health == {"ready": True, "word": "ready"}

    def let_all_leave(self) -> None:
        if self.config.retire_timeout is None or self.config.graceful_timeout is None:
            for process in self.workers():
                process.leave()

    def serves(self, worker: Any) -> bool:
        return worker is not None and worker.state is WorkerState.READY and self.system.processes[worker.pid].accepts

    def run_until(self, condition: Any, seconds: float) -> None:
        give_up = self.system.now + seconds
        while not condition():
            assert self.system.now < give_up, f"not after {seconds} s"
            self.system.run(1.0)
            self.the_books_are_right()


Call = tuple[str, dict[str, Any]]


def draw(chance: random.Random) -> list[Call]:
    def call(name: str, choices: Choices) -> Call:
        return name, {argument: chance.choice(values) for argument, values in choices.items()}

    names = chance.choices(list(STEPS), k=chance.randint(1, LONGEST))
    return [call("begin", BEGIN), *(call(name, STEPS[name].choices) for name in names)]


def play(calls: Iterable[Call]) -> None:
    """Raise what is wrong. Steps that are not possible at their time are left out."""
    machine = Schedules()
    try:
        for name, arguments in calls:
            if name == "begin" or STEPS[name].when(machine):
                getattr(machine, name)(**arguments)
                machine.the_books_are_right()
    finally:
        machine.teardown()


def shorten(calls: list[Call]) -> list[Call]:
    """Leave out what is not needed for a failure, until nothing can be left out any more."""

    def fails(fewer: list[Call]) -> bool:
        try:
            play(fewer)
        except Exception:
            return True
        return False

    begin, *calls = calls
    size = len(calls)
    while size:
        for start in range(len(calls) - size, -1, -size):
            fewer = calls[:start] + calls[start + size :]
            if fails([begin, *fewer]):
                calls = fewer
        size //= 2
    return [begin, *calls]


@pytest.mark.slow
def test_whatever_happens_every_slot_is_served_and_every_operation_ends() -> None:
    for number in range(FIRST_SCHEDULE, FIRST_SCHEDULE + SCHEDULES):
        calls = draw(random.Random(number))
        try:
            play(calls)
        except Exception as error:
            if SHRINKS:
                calls = shorten(calls)
            for name, arguments in calls:
                print(f"state.{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            raise AssertionError(f"schedule {number}: {error}") from error


def test_whatever_hypothesis_finds_every_slot_is_served_and_every_operation_ends() -> None:
    run_state_machine_as_test(
        Schedules,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=LONGEST,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if SHRINKS else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
