"""Workers that are late, blocked or never ready, and reloads: what a master decides by the clock."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest

from gtcpserver.supervisor import reload as reload_module
from gtcpserver.supervisor.care import DUMP_SECONDS, START_SECONDS, TICK_SECONDS, Care
from gtcpserver.supervisor.reload import LET_GO_SECONDS, Reload
from gtcpserver.supervisor.slots import Slot, WorkerProcess, WorkerState

TIMEOUT = 10.0


@dataclass(eq=False)
class Worker(WorkerProcess):
    """One without a process: notes the signals it would get."""

    signals: list[int] = field(default_factory=list)

    def signal(self, number: int) -> None:
        self.signals.append(number)


class Sockets:
    """Notes where new connections are sent."""

    def __init__(self) -> None:
        self.steered: set[int] = set()

    def steer(self, slots: Collection[int], cpus: Mapping[int, int]) -> None:
        self.steered = set(slots)


class Fleet:
    """As much of a fleet as Care and Reload know of: slots 0, 1, 2 ... with a worker each."""

    def __init__(self, workers: int) -> None:
        self.config = SimpleNamespace(worker_timeout=TIMEOUT, reload_one_by_one=False)
        self.slots = {number: Slot(number) for number in range(workers)}
        self.workers: dict[int, WorkerProcess] = {}
        self.sockets = Sockets()
        self.reload: Any = None
        self.stopping = False
        self.generation = 1
        self.let_go_of: list[WorkerProcess] = []
        self.failed_with: list[tuple[WorkerProcess, str]] = []
        for slot in self.slots.values():
            slot.current = self.add(slot)

    def add(self, slot: Slot, state: WorkerState = WorkerState.READY) -> Worker:
        pid = len(self.workers) + 1
        worker = Worker(slot.number, pid, SimpleNamespace(ended=False, unread=False), self.generation, state=state)  # type: ignore[arg-type]
        self.workers[pid] = worker
        return worker

    def active(self) -> list[Slot]:
        return list(self.slots.values())

    def cpu_of(self, slot: int) -> int | None:
        return None

    def start(self, slot: Slot, generation: int) -> Worker:
        return self.add(slot, WorkerState.STARTING)

    def let_go(self, slot: Slot, worker: WorkerProcess) -> None:
        self.let_go_of.append(worker)
        worker.state = WorkerState.RETIRING

    def fail_with(self, worker: WorkerProcess, how: str) -> None:
        self.failed_with.append((worker, how))

    def proven(self, worker: WorkerProcess) -> bool:
        return worker.state is WorkerState.READY

    def promote(self, slot: Slot) -> None:
        before, slot.current, slot.next = slot.current, slot.next, None
        if before is not None:
            self.let_go(slot, before)


def watch(care: Care, seconds: float, began: float, deaf: Collection[WorkerProcess] = ()) -> float:
    """Look as often as a master does; all workers but the deaf ones beat. Returns what time it is then."""
    now = began
    while now < began + seconds:
        now += TICK_SECONDS
        for worker in care._fleet.workers.values():
            if worker not in deaf:
                worker.last_beat = now
        care.look(now)
    return now


def test_a_worker_whose_beats_stay_away_is_replaced_and_killed_and_no_other() -> None:
    fleet = Fleet(2)
    care = Care(fleet)  # type: ignore[arg-type]
    blocked, other = fleet.workers.values()
    now = watch(care, TIMEOUT - 1, monotonic(), deaf=[blocked])
    assert blocked.signals == []
    now = watch(care, 1 + TICK_SECONDS, now, deaf=[blocked])
    assert (blocked.signals, fleet.let_go_of) == ([signal.SIGUSR2], [blocked])
    watch(care, 2 * DUMP_SECONDS + TICK_SECONDS, now, deaf=[blocked])
    assert blocked.signals[-1] == signal.SIGKILL
    assert signal.SIGABRT in blocked.signals
    assert blocked.state is WorkerState.KILLED
    assert other.signals == []


def test_a_master_that_stood_still_does_not_blame_its_workers() -> None:
    # It may have been stopped between reading what its workers said and looking at what time it is.
    fleet = Fleet(2)
    care = Care(fleet)  # type: ignore[arg-type]
    now = watch(care, 1, monotonic())
    care.look(now + 10 * TIMEOUT)
    watch(care, TIMEOUT, now + 10 * TIMEOUT)
    assert fleet.let_go_of == []
    assert not any(worker.signals for worker in fleet.workers.values())


def test_the_pause_of_a_master_delays_the_end_of_a_blocked_worker_and_does_not_forgive_it() -> None:
    fleet = Fleet(1)
    care = Care(fleet)  # type: ignore[arg-type]
    (blocked,) = fleet.workers.values()
    now = watch(care, TIMEOUT - 1, monotonic(), deaf=[blocked]) + 10 * TIMEOUT
    care.look(now)
    now = watch(care, TIMEOUT - 1, now, deaf=[blocked])
    assert fleet.let_go_of == []
    watch(care, 1, now, deaf=[blocked])
    assert fleet.let_go_of == [blocked]


def test_a_start_that_takes_for_ever_is_dumped_and_killed() -> None:
    fleet = Fleet(1)
    care = Care(fleet)  # type: ignore[arg-type]
    slow = fleet.slots[0].current = fleet.add(fleet.slots[0], WorkerState.STARTING)
    now = watch(care, START_SECONDS - 1, monotonic())
    assert slow.signals == []
    now = watch(care, 2, now)
    assert slow.signals == [signal.SIGUSR2]
    assert "not ready after" in slow.failure
    watch(care, 2 * DUMP_SECONDS + TICK_SECONDS, now)
    assert slow.signals[-1] == signal.SIGKILL
    assert slow.state is WorkerState.STARTING  # its end counts as a start that failed


def test_a_worker_that_has_closed_its_channel_and_lives_on_is_killed_soon() -> None:
    fleet = Fleet(1)
    care = Care(fleet)  # type: ignore[arg-type]
    (worker,) = fleet.workers.values()
    now = monotonic()
    worker.channel.ended = True
    care.look(now)
    assert worker.kill_at == now + DUMP_SECONDS


def test_a_reload_whose_new_worker_is_blocked_is_given_up() -> None:
    fleet = Fleet(2)
    care = Care(fleet)  # type: ignore[arg-type]
    new = fleet.slots[1].next = fleet.add(fleet.slots[1])
    watch(care, TIMEOUT + TICK_SECONDS, monotonic(), deaf=[new])
    ((worker, why),) = fleet.failed_with
    assert worker is new
    assert "its event loop was blocked" in why


@pytest.mark.parametrize(
    ("late", "wanted"),
    [([], {0, 1, 2, 3}), ([3], {0, 1, 2}), ([1, 2], {0, 3}), ([0, 1, 2], {0, 1, 2, 3}), ([0, 1, 2, 3], {0, 1, 2, 3})],
)
def test_new_connections_are_sent_past_late_workers_unless_most_are_late(late: list[int], wanted: set[int]) -> None:
    fleet = Fleet(4)
    care = Care(fleet)  # type: ignore[arg-type]
    for number in late:
        fleet.slots[number].current.lagging = True  # type: ignore[union-attr]
    care.steer()
    assert fleet.sockets.steered == wanted
    for number in late:
        fleet.slots[number].current.lagging = False  # type: ignore[union-attr]
    care.steer()
    assert fleet.sockets.steered == {0, 1, 2, 3}


def test_a_slot_whose_new_worker_keeps_time_gets_connections_though_the_old_one_is_late() -> None:
    fleet = Fleet(3)
    care = Care(fleet)  # type: ignore[arg-type]
    slot = fleet.slots[0]
    slot.current.lagging = True  # type: ignore[union-attr]
    slot.next = fleet.add(slot)
    care.steer()
    assert fleet.sockets.steered == {0, 1, 2}


def test_a_reload_is_done_when_the_old_workers_have_left_their_sockets_and_waits_not_for_ever_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [monotonic()]
    monkeypatch.setattr(reload_module, "monotonic", lambda: now[0])
    for drains in (True, False):
        fleet = Fleet(2)
        told: list[str | None] = []
        old = list(fleet.workers.values())
        reload = fleet.reload = Reload(fleet, [told.append])  # type: ignore[arg-type]
        reload.go_on()
        assert [slot.next is not None for slot in fleet.active()] == [True, False]  # one goes ahead
        for number in range(2):
            fleet.slots[number].next.state = WorkerState.READY  # type: ignore[union-attr]
            for _ in range(2):
                reload.go_on()
            assert fleet.let_go_of == (old if number else [])
        old[0].drained = True
        reload.go_on()
        assert told == []
        if drains:
            old[1].drained = True
        else:
            now[0] += LET_GO_SECONDS
        reload.go_on()
        assert told == [None]
        assert fleet.reload is None
