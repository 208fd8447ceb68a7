"""Probation and old workers as the master decides on them, by the clock, in a simulated system."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT
from gtcpserver.supervisor.config import LONGEST_PROBATION, SupervisorConfig
from gtcpserver.supervisor.fleet import FEW_RETIRED, KILL_MARGIN, LASTING_SECONDS, Fleet
from gtcpserver.supervisor.messages import MASTER_KINDS, decode
from gtcpserver.supervisor.reload import LET_GO_SECONDS, Reload
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState
from gtcpserver.supervisor.upgrade import UPGRADE_SECONDS
from kit.simulated import SimulatedSystem, add_worker, make_fleet, make_ready


@pytest.fixture
def system() -> SimulatedSystem:
    return SimulatedSystem()


def retire(fleet: Fleet, seconds_ago: float) -> WorkerProcess:
    worker = fleet.slots[0].current = add_worker(fleet)
    fleet.let_go(fleet.slots[0], worker)
    worker.retired_at -= seconds_ago
    return worker


def heard(fleet: Fleet, worker: WorkerProcess) -> list[tuple[str, Any]]:
    """What a worker was told since it was asked last: kinds, and timeouts."""
    system: Any = fleet.system
    inbox = system.processes[worker.pid].end.inbox
    messages = [decode(inbox.popleft(), MASTER_KINDS) for _ in range(len(inbox))]
    return [(message.kind, message.fields.get("timeout")) for message in messages]


def blocked(fleet: Fleet, worker: WorkerProcess) -> None:
    """It was ready, and has not been heard for long."""
    make_ready(worker)
    worker.last_beat -= 100
    fleet.care.look(fleet.system.monotonic())


# -- probation ---------------------------------------------------------------------------------------------------------


def test_a_worker_is_proven_by_a_beat_after_its_probation(system: SimulatedSystem) -> None:
    fleet = make_fleet(system, probation=2.0)
    worker = add_worker(fleet)
    worker.ready_at = worker.last_beat = system.now
    worker.last_beat = system.later(1.9)
    assert not fleet.proven(worker)
    system.later(0.2)
    assert not fleet.proven(worker)  # it may be blocked since that beat
    worker.last_beat = system.now
    assert fleet.proven(worker)
    worker.channel.ended = True  # it is ending
    assert not fleet.proven(worker)


def test_a_worker_that_may_be_blocked_for_ever_is_not_waited_for_for_ever(system: SimulatedSystem) -> None:
    fleet = make_fleet(system, probation=2.0, worker_timeout=None)
    worker = add_worker(fleet)
    worker.ready_at = worker.last_beat = system.now
    system.later(2.1)
    assert fleet.proven(worker)


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.READY])
def test_no_other_worker_is_proven(system: SimulatedSystem, state: WorkerState) -> None:
    fleet = make_fleet(system, probation=0)
    assert not fleet.proven(add_worker(fleet, state=state))


def test_without_a_probation_a_worker_is_proven_when_it_is_ready(system: SimulatedSystem) -> None:
    fleet = make_fleet(system, probation=0)
    assert fleet.proven(add_worker(fleet))


def test_a_successor_takes_the_place_at_once_where_nobody_else_is(system: SimulatedSystem) -> None:
    fleet = make_fleet(system)
    slot = fleet.slots[0]
    slot.next = worker = add_worker(fleet)
    fleet.look_after(system.now)
    assert (slot.current, slot.next) == (worker, None)


def test_a_successor_that_fails_does_not_fail_a_change_of_their_number(system: SimulatedSystem) -> None:
    fleet = make_fleet(system)
    slot = fleet.slots[0]
    slot.current, slot.next = add_worker(fleet), add_worker(fleet)
    told: list[str | None] = []
    fleet.want_scale(1, told.append)
    fleet.reap(slot.next.pid, 7 << 8)
    assert slot.failures == 1
    fleet.look_after(system.now)
    assert told == [None]


def test_a_reload_that_waits_for_its_turn_is_under_way(system: SimulatedSystem) -> None:
    # systemd and `ctl status` are told so.
    fleet = make_fleet(system)
    slot = fleet.slots[0]
    slot.current, slot.next = add_worker(fleet), add_worker(fleet, state=WorkerState.STARTING)
    assert not fleet.reloading()
    fleet.want_reload(lambda _: None)
    fleet.look_after(system.now)
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
    system: SimulatedSystem, caplog: pytest.LogCaptureFixture, most: int | None
) -> None:
    fleet = make_fleet(system, max_retired=most)
    slot = fleet.slots[0]
    oldest, _ = retire(fleet, 5), retire(fleet, 3)
    slot.current = worker = add_worker(fleet)
    worker.wants_to_retire = "asks for it"
    with caplog.at_level(logging.INFO, "gtcpserver"):
        for _ in range(2):
            fleet.look_after(system.now)
        assert (slot.next is None) == (most == 1)
        slot.next = None
        fleet.want_reload(lambda _: None)
        for _ in range(2):
            fleet.look_after(system.now)
    assert (fleet.reload is None) == (most == 1)
    assert caplog.text.count("the reload waits for old workers to finish (--max-retired 1)") == (most == 1)
    if most == 1:
        assert slot.next is None
        fleet.reap(oldest.pid, 0)
        fleet.look_after(system.now)
        assert fleet.reload is not None


def test_a_reload_does_not_wait_for_workers_that_ask_for_a_successor_later(system: SimulatedSystem) -> None:
    fleet = make_fleet(system, slots=2, probation=0)
    first, second = fleet.slots.values()
    first.current, second.current = add_worker(fleet), add_worker(fleet, 1)
    first.next = add_worker(fleet)
    second.current.wants_to_retire = "asks for it"
    fleet.want_reload(lambda _: None)
    fleet.look_after(system.now)
    assert fleet.reload is not None
    assert second.next is None


def test_a_worker_that_an_earlier_reload_has_given_up_does_not_fail_the_next_one(system: SimulatedSystem) -> None:
    fleet = make_fleet(system)
    slot = fleet.slots[0]
    slot.current = add_worker(fleet)
    first = fleet.reload = Reload(fleet, [])
    first.go_on()
    given_up = slot.next
    assert given_up is not None
    first.abort("for a test")
    second = fleet.reload = Reload(fleet, [])
    second.go_on()
    assert given_up.generation == second.generation
    blocked(fleet, given_up)
    assert fleet.reload is second
    assert slot.next is not None
    blocked(fleet, slot.next)
    assert fleet.reload is None


# -- one by one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 0])
def test_one_by_one_the_next_waits_for_memory_and_only_for_what_has_to_end(
    system: SimulatedSystem, most: int | None
) -> None:
    fleet = make_fleet(system, slots=2, max_retired=most, probation=0, reload_one_by_one=True)
    for number in range(2):
        fleet.slots[number].current = add_worker(fleet, number)
    first, second = fleet.slots.values()
    old = first.current
    reload = fleet.reload = Reload(fleet, [])
    reload.go_on()
    assert first.next is not None
    assert second.next is None
    make_ready(first.next)
    for _ in range(3):
        reload.go_on()
    assert first.gone_on == [old]
    assert second.next is None
    # Its connections last.
    system.later(LET_GO_SECONDS)
    reload.go_on()
    if most is not None:
        assert second.next is None
        fleet.reap(old.pid, 0)
        reload.go_on()
    assert second.next is not None


# -- retired workers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop_timeout", "given"), [(4.0, 4.0), (None, DEFAULT_STOP_TIMEOUT)])
def test_the_oldest_of_too_many_is_told_once(system: SimulatedSystem, stop_timeout: float | None, given: float) -> None:
    fleet = make_fleet(system, max_retired=1, graceful_timeout=stop_timeout)
    older, younger = retire(fleet, 5), retire(fleet, 3)
    now = system.now
    for _ in range(2):
        fleet.look_after(now)
    assert heard(fleet, older) == [("retire", None), ("hasten", given)]
    assert older.kill_at == pytest.approx(now + given + KILL_MARGIN, abs=5)
    assert heard(fleet, younger) == [("retire", None)]
    assert younger.kill_at is None


def test_a_worker_that_was_just_replaced_is_not_told_to_hurry(system: SimulatedSystem) -> None:
    # A client that has connected and said nothing yet would lose its first request.
    fleet = make_fleet(system, max_retired=0)
    worker = retire(fleet, 0)
    fleet.look_after(system.now)
    assert heard(fleet, worker) == [("retire", None)]
    fleet.look_after(system.now + LASTING_SECONDS)
    assert heard(fleet, worker) == [("hasten", DEFAULT_STOP_TIMEOUT)]


def test_a_shorter_time_that_it_has_already_stays(system: SimulatedSystem) -> None:
    fleet = make_fleet(system, max_retired=0, retire_timeout=2.0)
    worker = retire(fleet, 1.5)
    kill_at = worker.kill_at
    fleet.look_after(system.now)
    assert worker.kill_at == kill_at


def test_retired_workers_that_pile_up_are_told_at_twice_as_many_again(
    system: SimulatedSystem, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make_fleet(system)

    def told_at(counts: range) -> list[int]:
        caplog.clear()
        for _ in counts:
            retire(fleet, 60)
            fleet.look_after(system.now)
        return [cast(int, cast(Any, record.args)[0]) for record in caplog.records]

    with caplog.at_level(logging.WARNING, "gtcpserver"):
        assert told_at(range(7)) == [FEW_RETIRED + 1, 2 * (FEW_RETIRED + 1) + 1]
        assert "7 retired workers still have connections, the oldest for 60 s" in caplog.text
        fleet.slots[0].gone_on.clear()
        fleet.look_after(system.now)
        assert told_at(range(3)) == [FEW_RETIRED + 1]
