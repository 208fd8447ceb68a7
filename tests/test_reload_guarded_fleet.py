"""Probation and old workers as the master decides on them, by the clock: a fleet whose workers have no processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, cast

import pytest

from gtcpserver.address import parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT
from gtcpserver.supervisor import fleet as fleet_module
from gtcpserver.supervisor import reload as reload_module
from gtcpserver.supervisor.channel import Channel, make_pair
from gtcpserver.supervisor.config import LONGEST_PROBATION, SupervisorConfig
from gtcpserver.supervisor.fleet import FEW_RETIRED, KILL_MARGIN, LASTING_SECONDS, Fleet
from gtcpserver.supervisor.messages import MASTER_KINDS, WORKER_KINDS
from gtcpserver.supervisor.reload import LET_GO_SECONDS, Reload
from gtcpserver.supervisor.slots import Slot, WorkerProcess, WorkerState
from gtcpserver.supervisor.sockets import ListeningSockets
from gtcpserver.supervisor.upgrade import UPGRADE_SECONDS

FIRST_PID = 1 << 30  # no process's: above what pid_max may be

MakeFleet = Callable[..., "Workers"]


class Workers(Fleet):
    """A fleet without processes. `add` makes a worker; `heard` is what it was told."""

    ends: dict[int, Channel]

    def start(self, slot: Slot, generation: int) -> WorkerProcess:
        worker = self.add(WorkerState.STARTING, slot.number)
        worker.generation = generation
        return worker

    def add(self, state: WorkerState = WorkerState.READY, number: int = 0) -> WorkerProcess:
        ours, theirs = make_pair(WORKER_KINDS, MASTER_KINDS)
        pid = FIRST_PID + len(self.ends)
        self.ends[pid] = theirs
        worker = self.workers[pid] = WorkerProcess(number, pid, ours, self.generation, state=state)
        worker.ready_at = worker.last_beat = monotonic()
        return worker

    def retire(self, seconds_ago: float) -> WorkerProcess:
        worker = self.add()
        self.slots[0].current = worker
        self.let_go(self.slots[0], worker)
        worker.retired_at = monotonic() - seconds_ago
        return worker

    def heard(self, worker: WorkerProcess) -> list[tuple[str, Any]]:
        return [(message.kind, message.fields.get("timeout")) for message, _ in self.ends[worker.pid].receive()]


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    made: list[Workers] = []

    def make(slots: int = 1, **options: Any) -> Workers:
        sockets = ListeningSockets(ListenConfig())
        sockets.open([parse_address(f"unix:{tmp_path}/socket{len(made)}")], [0])
        config = SupervisorConfig(workers=slots, **options)
        fleet = Workers(config, sockets, cast(Any, None), "/", lambda: None, [*range(slots)])
        fleet.ends = {}
        fleet.up = True
        made.append(fleet)
        return fleet

    yield make
    for fleet in made:
        for pid, worker in fleet.workers.items():
            worker.channel.close()
            fleet.ends[pid].close()
        fleet.sockets.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Called with seconds: so much later is it."""
    now = [monotonic()]
    for module in (fleet_module, reload_module):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def later(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    return later


# -- probation ---------------------------------------------------------------------------------------------------------


def test_a_worker_is_proven_by_a_beat_after_its_probation(make_fleet: MakeFleet, clock: Any) -> None:
    fleet = make_fleet(probation=2.0)
    worker = fleet.add()
    worker.ready_at = worker.last_beat = clock(0)
    worker.last_beat = clock(1.9)
    assert not fleet.proven(worker)
    clock(0.2)
    assert not fleet.proven(worker)  # it may be blocked since that beat
    worker.last_beat = clock(0)
    assert fleet.proven(worker)
    worker.channel.ended = True  # it is ending
    assert not fleet.proven(worker)


def test_a_worker_that_may_be_blocked_for_ever_is_not_waited_for_for_ever(make_fleet: MakeFleet, clock: Any) -> None:
    fleet = make_fleet(probation=2.0, worker_timeout=None)
    worker = fleet.add()
    worker.ready_at = worker.last_beat = clock(0)
    clock(2.1)
    assert fleet.proven(worker)


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.READY])
def test_no_other_worker_is_proven(make_fleet: MakeFleet, state: WorkerState) -> None:
    fleet = make_fleet(probation=0)
    assert not fleet.proven(fleet.add(state))


def test_without_a_probation_a_worker_is_proven_when_it_is_ready(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(probation=0)
    assert fleet.proven(fleet.add())


def test_a_successor_takes_the_place_at_once_where_nobody_else_is(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    slot = fleet.slots[0]
    slot.next = worker = fleet.add()
    fleet.look_after(monotonic())
    assert (slot.current, slot.next) == (worker, None)


def test_a_successor_that_fails_does_not_fail_a_change_of_their_number(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    slot = fleet.slots[0]
    slot.current, slot.next = fleet.add(), fleet.add()
    told: list[str | None] = []
    fleet.want_scale(1, told.append)
    fleet.reap(slot.next.pid, 7 << 8)
    assert slot.failures == 1
    fleet.look_after(monotonic())
    assert told == [None]


def test_a_reload_that_waits_for_its_turn_is_under_way(make_fleet: MakeFleet) -> None:
    # systemd and `ctl status` are told so.
    fleet = make_fleet()
    slot = fleet.slots[0]
    slot.current, slot.next = fleet.add(), fleet.add(WorkerState.STARTING)
    assert not fleet.reloading()
    fleet.want_reload(lambda _: None)
    fleet.look_after(monotonic())
    assert fleet.reload is None  # a worker is being recycled
    assert fleet.reloading()


@pytest.mark.parametrize(
    "wrong",
    [{"probation": -1}, {"probation": LONGEST_PROBATION + 1}, {"probation": None}, {"max_retired": -1}],
    ids=str,
)
def test_values_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        SupervisorConfig(**wrong)


def test_an_upgrade_has_the_time_for_a_probation() -> None:
    assert 2 * LONGEST_PROBATION <= UPGRADE_SECONDS


@pytest.mark.parametrize("most", [None, 1, 2])
def test_reloads_and_recycling_wait_while_there_are_too_many_old_workers(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture, most: int | None
) -> None:
    fleet = make_fleet(max_retired=most)
    slot = fleet.slots[0]
    oldest, _ = fleet.retire(5), fleet.retire(3)
    slot.current = worker = fleet.add()
    worker.wants_to_retire = "asks for it"
    with caplog.at_level(logging.INFO, "gtcpserver"):
        for _ in range(2):
            fleet.look_after(monotonic())
        assert (slot.next is None) == (most == 1)
        slot.next = None
        fleet.want_reload(lambda _: None)
        for _ in range(2):
            fleet.look_after(monotonic())
    assert (fleet.reload is None) == (most == 1)
    assert caplog.text.count("the reload waits for old workers to finish (--max-retired 1)") == (most == 1)
    if most == 1:
        assert slot.next is None
        fleet.reap(oldest.pid, 0)
        fleet.look_after(monotonic())
        assert fleet.reload is not None


def test_a_reload_does_not_wait_for_workers_that_ask_for_a_successor_later(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(slots=2, probation=0)
    first, second = fleet.slots.values()
    first.current, second.current = fleet.add(), fleet.add(number=1)
    first.next = fleet.add()
    second.current.wants_to_retire = "asks for it"
    fleet.want_reload(lambda _: None)
    fleet.look_after(monotonic())
    assert fleet.reload is not None
    assert second.next is None


def test_a_worker_that_an_earlier_reload_has_given_up_does_not_fail_the_next_one(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    slot = fleet.slots[0]
    slot.current = fleet.add()
    first = fleet.reload = Reload(fleet, [])
    first.go_on()
    given_up = slot.next
    assert given_up is not None
    first.abort("for a test")
    second = fleet.reload = Reload(fleet, [])
    second.go_on()
    assert given_up.generation == second.generation
    fleet.care._begin_to_end(given_up, monotonic())
    assert fleet.reload is second
    assert slot.next is not None
    fleet.care._begin_to_end(slot.next, monotonic())
    assert fleet.reload is None


# -- one by one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 0])
def test_one_by_one_the_next_waits_for_memory_and_only_for_what_has_to_end(
    make_fleet: MakeFleet, clock: Any, most: int | None
) -> None:
    fleet = make_fleet(slots=2, max_retired=most, probation=0, reload_one_by_one=True)
    for number in range(2):
        fleet.slots[number].current = fleet.add(number=number)
    first, second = fleet.slots.values()
    old = first.current
    reload = fleet.reload = Reload(fleet, [])
    reload.go_on()
    assert first.next is not None
    assert second.next is None
    first.next.state = WorkerState.READY
    first.next.ready_at = first.next.last_beat = clock(0)
    for _ in range(3):
        reload.go_on()
    assert first.gone_on == [old]
    assert second.next is None
    # Its connections last.
    clock(LET_GO_SECONDS)
    reload.go_on()
    if most is not None:
        assert second.next is None
        fleet.reap(old.pid, 0)
        reload.go_on()
    assert second.next is not None


# -- retired workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop_timeout", "given"), [(4.0, 4.0), (None, DEFAULT_STOP_TIMEOUT)])
def test_the_oldest_of_too_many_is_told_once(make_fleet: MakeFleet, stop_timeout: float | None, given: float) -> None:
    fleet = make_fleet(max_retired=1, graceful_timeout=stop_timeout)
    older, younger = fleet.retire(5), fleet.retire(3)
    now = monotonic()
    for _ in range(2):
        fleet._bound_retired(now)
    assert fleet.heard(older) == [("retire", None), ("hasten", given)]
    assert older.kill_at == pytest.approx(now + given + KILL_MARGIN, abs=5)
    assert fleet.heard(younger) == [("retire", None)]
    assert younger.kill_at is None


def test_a_worker_that_was_just_replaced_is_not_told_to_hurry(make_fleet: MakeFleet) -> None:
    # A client that has connected and said nothing yet would lose its first request.
    fleet = make_fleet(max_retired=0)
    worker = fleet.retire(0)
    fleet._bound_retired(monotonic())
    assert fleet.heard(worker) == [("retire", None)]
    fleet._bound_retired(monotonic() + LASTING_SECONDS)
    assert fleet.heard(worker) == [("hasten", DEFAULT_STOP_TIMEOUT)]


def test_a_shorter_time_that_it_has_already_stays(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(max_retired=0, retire_timeout=2.0)
    worker = fleet.retire(1.5)
    kill_at = worker.kill_at
    fleet._bound_retired(monotonic())
    assert worker.kill_at == kill_at


def test_retired_workers_that_pile_up_are_told_at_twice_as_many_again(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet()

    def told_at(counts: range) -> list[int]:
        caplog.clear()
        for _ in counts:
            fleet.retire(60)
            fleet._bound_retired(monotonic())
        return [cast(int, cast(Any, record.args)[0]) for record in caplog.records]

    with caplog.at_level(logging.WARNING, "gtcpserver"):
        assert told_at(range(7)) == [FEW_RETIRED + 1, 2 * (FEW_RETIRED + 1) + 1]
        assert "7 retired workers have connections still, the oldest for 60 s" in caplog.text
        fleet.slots[0].gone_on.clear()
        fleet._bound_retired(monotonic())
        assert told_at(range(3)) == [FEW_RETIRED + 1]
