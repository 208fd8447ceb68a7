"""Workers that are late, blocked or never ready, and reloads: what a master decides by the clock."""

from __future__ import annotations

import signal
from collections.abc import Collection
from typing import Any

import pytest

from gtcpserver.supervisor.care import DUMP_SECONDS, START_SECONDS, TICK_SECONDS
from gtcpserver.supervisor.fleet import Fleet
from gtcpserver.supervisor.reload import LET_GO_SECONDS, Reload
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState
from kit.simulated import SimulatedSystem, Sockets, add_worker, make_fleet, make_ready

TIMEOUT = 10.0


@pytest.fixture
def system() -> SimulatedSystem:
    return SimulatedSystem()


def serving(system: SimulatedSystem, slots: int, **options: Any) -> Fleet:
    """A fleet of slots 0, 1, 2 ... with a worker each."""
    fleet = make_fleet(system, slots, worker_timeout=TIMEOUT, probation=0, **options)
    for slot in fleet.slots.values():
        slot.current = add_worker(fleet, slot.number)
    return fleet


def signals(fleet: Fleet, worker: WorkerProcess) -> list[int]:
    system: Any = fleet.system
    return [number for pid, number in system.kills if pid == worker.pid]


def leaving(fleet: Fleet) -> list[WorkerProcess]:
    return [worker for worker in fleet.workers.values() if worker.leaving]


def watch(fleet: Fleet, seconds: float, deaf: Collection[WorkerProcess] = ()) -> None:
    """Look as often as a master does; all workers but the deaf ones beat."""
    system: Any = fleet.system
    end = system.now + seconds
    while system.now < end:
        system.now += TICK_SECONDS
        for worker in fleet.workers.values():
            if worker not in deaf:
                worker.last_beat = system.now
        fleet.care.look(system.now)


def test_a_worker_whose_beats_stay_away_is_replaced_and_killed_and_no_other(system: SimulatedSystem) -> None:
    fleet = serving(system, 2)
    blocked, other = fleet.workers.values()
    watch(fleet, TIMEOUT - 1, deaf=[blocked])
    assert signals(fleet, blocked) == []
    watch(fleet, 1 + TICK_SECONDS, deaf=[blocked])
    assert (signals(fleet, blocked), leaving(fleet)) == ([signal.SIGUSR2], [blocked])
    watch(fleet, 2 * DUMP_SECONDS + TICK_SECONDS, deaf=[blocked])
    assert signals(fleet, blocked)[-1] == signal.SIGKILL
    assert signal.SIGABRT in signals(fleet, blocked)
    assert blocked.state is WorkerState.KILLED
    assert signals(fleet, other) == []


def test_a_master_that_stood_still_does_not_blame_its_workers(system: SimulatedSystem) -> None:
    # It may have been stopped between reading what its workers said and looking at what time it is.
    fleet = serving(system, 2)
    watch(fleet, 1)
    system.now += 10 * TIMEOUT
    fleet.care.look(system.now)
    watch(fleet, TIMEOUT)
    assert leaving(fleet) == []
    assert system.kills == []


def test_the_pause_of_a_master_delays_the_end_of_a_blocked_worker_and_does_not_forgive_it(
    system: SimulatedSystem,
) -> None:
    fleet = serving(system, 1)
    (blocked,) = fleet.workers.values()
    watch(fleet, TIMEOUT - 1, deaf=[blocked])
    system.now += 10 * TIMEOUT
    fleet.care.look(system.now)
    watch(fleet, TIMEOUT - 1, deaf=[blocked])
    assert leaving(fleet) == []
    watch(fleet, 1, deaf=[blocked])
    assert leaving(fleet) == [blocked]


def test_a_start_that_takes_for_ever_is_dumped_and_killed(system: SimulatedSystem) -> None:
    fleet = serving(system, 1)
    slow = fleet.slots[0].current = add_worker(fleet, state=WorkerState.STARTING)
    watch(fleet, START_SECONDS - 1)
    assert signals(fleet, slow) == []
    watch(fleet, 2)
    assert signals(fleet, slow) == [signal.SIGUSR2]
    assert "not ready after" in slow.failure
    watch(fleet, 2 * DUMP_SECONDS + TICK_SECONDS)
    assert signals(fleet, slow)[-1] == signal.SIGKILL
    assert slow.state is WorkerState.STARTING  # its end counts as a start that failed


def test_a_worker_that_has_closed_its_channel_and_lives_on_is_killed_soon(system: SimulatedSystem) -> None:
    fleet = serving(system, 1)
    (worker,) = fleet.workers.values()
    worker.channel.ended = True
    fleet.care.look(system.now)
    assert worker.kill_at == system.now + DUMP_SECONDS


def test_a_reload_whose_new_worker_is_blocked_is_given_up(system: SimulatedSystem) -> None:
    fleet = serving(system, 2)
    told: list[str | None] = []
    fleet.reload = Reload(fleet, [told.append])
    fleet.reload.go_on()
    new = fleet.slots[0].next
    assert new is not None
    make_ready(new)
    watch(fleet, TIMEOUT + TICK_SECONDS, deaf=[new])
    (why,) = told
    assert why is not None
    assert "its event loop was blocked" in why
    assert leaving(fleet) == [new]


@pytest.mark.parametrize(
    ("late", "wanted"),
    [([], {0, 1, 2, 3}), ([3], {0, 1, 2}), ([1, 2], {0, 3}), ([0, 1, 2], {0, 1, 2, 3}), ([0, 1, 2, 3], {0, 1, 2, 3})],
)
def test_new_connections_are_sent_past_late_workers_unless_most_are_late(
    system: SimulatedSystem, late: list[int], wanted: set[int]
) -> None:
    fleet = serving(system, 4)
    assert isinstance(fleet.sockets, Sockets)
    for number in late:
        fleet.slots[number].current.lagging = True  # type: ignore[union-attr]
    fleet.care.steer()
    assert fleet.sockets.steered == wanted
    for number in late:
        fleet.slots[number].current.lagging = False  # type: ignore[union-attr]
    fleet.care.steer()
    assert fleet.sockets.steered == {0, 1, 2, 3}


def test_a_worker_that_is_late_again_and_again_does_not_fill_the_log(
    system: SimulatedSystem, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gtcpserver")
    fleet = serving(system, 4)
    for _ in range(100):
        for late in (True, False):
            fleet.slots[3].current.lagging = late  # type: ignore[union-attr]
            fleet.care.steer()
            assert fleet.care.late == ({3} if late else set())
    lags, caught_up = ([text for text in caplog.messages if words in text] for words in ("3 lags", "3 has caught up"))
    assert 0 < len(lags) == len(caught_up) < 10
    system.now += 3600
    fleet.slots[3].current.lagging = True  # type: ignore[union-attr]
    fleet.care.steer()
    assert f"(and {100 - len(lags)} more like this)" in caplog.messages[-1]


def test_a_slot_whose_new_worker_keeps_time_gets_connections_though_the_old_one_is_late(
    system: SimulatedSystem,
) -> None:
    fleet = serving(system, 3)
    assert isinstance(fleet.sockets, Sockets)
    slot = fleet.slots[0]
    slot.current.lagging = True  # type: ignore[union-attr]
    slot.next = add_worker(fleet)
    fleet.care.steer()
    assert fleet.sockets.steered == {0, 1, 2}


@pytest.mark.parametrize("drains", [True, False])
def test_a_reload_is_done_when_the_old_workers_have_left_their_sockets_and_waits_not_for_ever_for_them(
    system: SimulatedSystem, drains: bool
) -> None:
    fleet = serving(system, 2)
    told: list[str | None] = []
    old = list(fleet.workers.values())
    reload = fleet.reload = Reload(fleet, [told.append])
    reload.go_on()
    assert [slot.next is not None for slot in fleet.active()] == [True, False]  # one goes ahead
    for number in range(2):
        make_ready(fleet.slots[number].next)  # type: ignore[arg-type]
        for _ in range(2):
            reload.go_on()
        assert leaving(fleet) == (old if number else [])
    old[0].drained = True
    reload.go_on()
    assert told == []
    if drains:
        old[1].drained = True
    else:
        system.now += LET_GO_SECONDS
    reload.go_on()
    assert told == [None]
    assert fleet.reload is None
