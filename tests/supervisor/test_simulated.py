"""A whole master in a simulated system: what takes minutes, or a system that fails, in milliseconds."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gtcpserver.supervisor.fleet import HALT_SECONDS
from gtcpserver.supervisor.monitor import LEAVE_SECONDS, SHORT_LIFE
from gtcpserver.supervisor.monitor import START_SECONDS as MONITOR_START_SECONDS
from gtcpserver.supervisor.slots import FIRST_BACK_OFF, LONGEST_BACK_OFF, WorkerState, back_off
from gtcpserver.supervisor.upgrade import FAILED_SECONDS
from kit.simulated import EXIT_SECONDS, Fate, MonitorFate, SimulatedMaster, SimulatedSystem

Start = Callable[..., SimulatedMaster]

FOR_EVER = Fate(lasts=None)


@pytest.fixture
def system() -> Iterator[SimulatedSystem]:
    system = SimulatedSystem()
    yield system
    system.end()


@pytest.fixture
def start(system: SimulatedSystem, caplog: pytest.LogCaptureFixture) -> Iterator[Start]:
    def begin(*fates: Fate, **options: Any) -> SimulatedMaster:
        system.fates += fates
        one = SimulatedMaster(system, **{"workers": 1, **options})
        one.run(2.0)
        return one

    yield begin
    assert not any("the master failed at something" in record.getMessage() for record in caplog.get_records("call"))


# -- starts that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fate",
    [Fate(fails=True), Fate(dies_after=0.5, status=1 << 8), Fate(dies_after=0.05, status=signal.SIGSEGV)],
    ids=["fails", "lives for half a second", "crashes"],
)
def test_workers_that_die_soon_are_started_less_and_less_often(
    system: SimulatedSystem, start: Start, fate: Fate
) -> None:
    master = start()
    system.fates += [fate] * 100
    before = len(system.processes)
    master.current().exit(1 << 8)
    master.run(120.0)
    assert 5 <= len(system.processes) - before <= 10
    system.fates.clear()
    master.run(2 * LONGEST_BACK_OFF)
    assert master.master.ready


def test_starts_that_fail_all_night_go_on_as_seldom(system: SimulatedSystem, start: Start) -> None:
    master = start()
    system.fates += [Fate(fails=True)] * 100
    before = len(system.processes)
    master.fleet.slots[0].failures = 2000  # too many for a float that doubles each time
    master.current().exit(1 << 8)
    master.run(4 * LONGEST_BACK_OFF)
    assert 3 <= len(system.processes) - before <= 5
    assert [back_off(failures) for failures in (0, 1, 5, 6, 2000)] == [FIRST_BACK_OFF, 1, 16, 30, LONGEST_BACK_OFF]


def test_a_fork_that_fails_is_tried_again_until_it_works(system: SimulatedSystem, start: Start) -> None:
    master = start()
    master.current().exit(1 << 8)
    system.failing.add("fork")
    master.run(120.0)
    assert 5 <= system.failures <= 10
    system.failing.clear()
    master.run(LONGEST_BACK_OFF + 1)
    assert master.master.ready


def test_a_worker_that_is_killed_is_replaced_at_once(start: Start) -> None:
    master = start()
    for _ in range(20):
        master.current().exit(signal.SIGKILL)
        master.run(0.2)
        assert master.master.ready


# -- reloads -----------------------------------------------------------------------------------------------------------


def test_a_worker_of_a_failed_reload_that_was_needed_does_not_fail_the_next_one(
    system: SimulatedSystem, start: Start
) -> None:
    master = start(workers=2)
    told: list[str | None] = []
    system.fates += [Fate(), Fate(fails=True, ready_after=3.0)]
    master.master.begin_reload("test", told.append)
    master.run(2.0)
    master.current(0).exit(signal.SIGKILL)  # its successor is ready, and takes its place though the reload fails
    needed = master.fleet.slots[0].next
    master.run(3.0)
    assert [bool(error) for error in told] == [True]
    assert master.fleet.slots[0].current is needed
    system.fates.append(Fate(ready_after=5.0))
    master.master.begin_reload("test", told.append)
    master.run(1.0)
    master.current(0).exit(signal.SIGKILL)
    master.run(20.0)
    assert told[1:] == [None]


# -- scale -------------------------------------------------------------------------------------------------------------


def test_who_asked_for_more_workers_is_told_that_there_is_no_socket_for_them(
    system: SimulatedSystem, start: Start
) -> None:
    master = start()
    told: list[str | None] = []
    system.failing.add("socket")
    master.master.scale(3, told.append)
    master.run(1.0)
    (error,) = told
    assert error is not None
    assert "cannot open a socket for worker 1" in error
    assert master.fleet.target == 1


def test_a_slot_is_not_closed_while_a_worker_that_was_told_to_leave_at_once_starts(
    system: SimulatedSystem, start: Start
) -> None:
    # It was forked with the sockets of all slots, and may not have closed them yet.
    master = start(FOR_EVER, FOR_EVER, workers=2)
    system.fates.append(Fate(ready_after=8.0))
    for count in (1, 2, 1):
        master.master.scale(count)
        master.run(0.3)
    first, second, third = system.processes.values()
    second.leave()
    master.run(1.0)
    assert not second.running
    assert third.orders
    assert master.fleet.slots.keys() == {0, 1, 2}
    master.run(10.0)
    assert master.fleet.slots.keys() == {0}
    assert first.accepts


# -- upgrades ----------------------------------------------------------------------------------------------------------


def test_a_new_master_that_dies_while_the_old_one_leaves_is_buried_and_told(
    system: SimulatedSystem, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    master = start(FOR_EVER)
    system.fates.append(Fate(dies_after=5.0, status=signal.SIGSEGV))
    with caplog.at_level(logging.INFO, "gtcpserver"):
        master.signal(signal.SIGUSR2, 3.0)
        assert "is ready; this one's workers finish their connections" in caplog.text
        master.run(5.0)
    assert system.zombies() == []
    assert f"the new master (pid {max(system.processes)}) was killed by SIGSEGV" in caplog.text
    assert master.outcome is None  # its connections last


def test_a_stop_waits_for_a_new_master_that_was_given_up(system: SimulatedSystem, start: Start) -> None:
    # It has the listening sockets: as long as it is there, connections come to a queue that nobody serves.
    master = start()
    system.fates.append(Fate(ready_after=None, obeys=False))
    master.signal(signal.SIGUSR2, 1.0)
    master.signal(signal.SIGTERM, FAILED_SECONDS - 5)
    assert master.outcome is None
    master.run(10.0)
    assert master.outcome is not None
    assert system.running() == []


def test_a_slot_is_not_closed_as_long_as_a_new_master_that_was_given_up_has_its_socket(
    system: SimulatedSystem, start: Start
) -> None:
    # The kernel would count it, and give it connections.
    master = start(workers=2)
    system.fates.append(Fate(ready_after=None, closes_after=0.5, obeys=False))
    master.signal(signal.SIGUSR2, 1.0)
    master.signal(signal.SIGTTOU, FAILED_SECONDS - 5)
    assert system.sockets[0].slots == {0, 1}
    master.run(10.0)
    assert system.sockets[0].slots == {0}


def test_a_halt_gives_a_new_master_no_longer_than_workers(system: SimulatedSystem, start: Start) -> None:
    master = start()
    system.fates.append(Fate(ready_after=None, obeys=False))
    master.signal(signal.SIGUSR2, 1.0)
    master.signal(signal.SIGQUIT, HALT_SECONDS + 1)
    assert master.outcome is not None
    assert system.running() == []


def test_a_stop_does_not_wait_for_a_new_master_that_the_program_has_buried(
    system: SimulatedSystem, start: Start
) -> None:
    master = start()
    system.fates.append(Fate(ready_after=None))
    master.signal(signal.SIGUSR2, 1.0)
    new = system.processes[max(system.processes)]
    new.exit(1 << 8)
    new.buried = True
    master.signal(signal.SIGTERM, FAILED_SECONDS / 2)
    assert master.outcome is not None


def test_nor_for_one_that_it_buries_after_it_was_given_up(system: SimulatedSystem, start: Start) -> None:
    master = start()
    system.fates.append(Fate(ready_after=None, obeys=False))
    master.signal(signal.SIGUSR2, 1.0)
    new = system.processes[max(system.processes)]
    master.signal(signal.SIGTERM, 1.0)
    new.exit(1 << 8)
    new.buried = True
    master.run(FAILED_SECONDS + 1)
    assert master.outcome is not None


def test_workers_serve_on_while_an_upgrade_is_tried_and_fails(system: SimulatedSystem, start: Start) -> None:
    master = start(workers=2)
    for fate in (Fate(fails=True), Fate(dies_after=0.05), Fate(closes_after=0.5, ready_after=None)):
        system.fates.append(fate)
        master.signal(signal.SIGUSR2, 3.0)
        assert [worker.state for worker in master.fleet.workers.values()] == 2 * [WorkerState.READY]


# -- the monitor -------------------------------------------------------------------------------------------------------

METRICS = "127.0.0.1:0"


def test_a_slot_is_not_closed_while_a_monitor_that_starts_may_have_its_socket(
    system: SimulatedSystem, start: Start
) -> None:
    # The kernel takes a socket out of its group when the last process has closed it: the program that steers new
    # connections would name the wrong one until then.
    system.monitor_fates += [MonitorFate(), MonitorFate(holds=5.0, starts_after=2.0)]
    master = start(workers=2, metrics=METRICS)
    first = master.monitor()
    master.run(SHORT_LIFE)
    first.exit(1 << 8)
    master.run(0.1)
    assert master.monitor() is not first
    master.signal(signal.SIGTTOU, 4.0)
    assert len(system.running()) == 1
    assert system.sockets[0].slots == {0, 1}
    master.run(4.0)
    assert master.monitor().started
    assert system.sockets[0].slots == {0}


def test_nor_while_one_ends_that_has_not_let_go_of_it(system: SimulatedSystem, start: Start) -> None:
    # Its line may be the first that the kernel closes.
    system.monitor_fates.append(MonitorFate(holds=60.0))
    master = start(workers=2, metrics=METRICS)
    master.signal(signal.SIGTTOU, 1.0)
    assert system.sockets[0].slots == {0, 1}
    master.monitor().exit(signal.SIGKILL)
    master.run(EXIT_SECONDS / 2)
    assert not system.open_lines()
    assert system.sockets[0].slots == {0, 1}
    master.run(1.0)
    assert system.sockets[0].slots == {0}


def test_a_monitor_that_ends_while_a_worker_finishes_its_connections_is_replaced(
    system: SimulatedSystem, start: Start
) -> None:
    master = start(Fate(), FOR_EVER, workers=2, metrics=METRICS)
    master.run(SHORT_LIFE)
    master.signal(signal.SIGTTOU, 1.0)
    assert len(system.running()) == 2
    master.monitor().exit(signal.SIGKILL)
    master.run(2.0)
    assert master.monitor().health == {"ready": True, "word": "ready"}


@pytest.mark.parametrize("fate", [MonitorFate(starts_after=None), MonitorFate(stalls_after=20.0)])
def test_a_monitor_that_says_nothing_is_replaced(system: SimulatedSystem, start: Start, fate: MonitorFate) -> None:
    system.monitor_fates.append(fate)
    master = start(metrics=METRICS)
    first = master.monitor()
    master.run(MONITOR_START_SECONDS + 5)
    assert not first.running
    assert master.monitor().started


def test_a_monitor_that_dies_at_once_is_started_less_and_less_often(system: SimulatedSystem, start: Start) -> None:
    system.monitor_fates += [MonitorFate(dies_after=0.1, status=1 << 8)] * 100
    master = start(metrics=METRICS)
    master.run(120.0)
    assert 5 <= len(system.monitors) <= 10
    assert master.master.ready


def test_the_monitor_says_that_the_service_drains_until_its_last_connection_has_ended(
    system: SimulatedSystem, start: Start
) -> None:
    master = start(Fate(lasts=5.0), metrics=METRICS, drain_delay=1.0)
    monitor = master.monitor()
    master.signal(signal.SIGTERM, 4.0)
    assert monitor.health == {"ready": False, "word": "draining"}
    assert not monitor.told_to_leave
    master.run(4.0)
    assert monitor.told_to_leave
    assert master.outcome is not None
    assert not system.open_lines()


@pytest.mark.parametrize("fate", [MonitorFate(leaves_after=None), MonitorFate(stalls_after=1.0)])
def test_a_stop_does_not_wait_for_a_monitor_that_does_not_end(
    system: SimulatedSystem, start: Start, fate: MonitorFate
) -> None:
    system.monitor_fates.append(fate)
    master = start(metrics=METRICS)
    master.signal(signal.SIGTERM, LEAVE_SECONDS + 1)
    assert master.outcome is not None
    assert all(one.buried for one in system.monitors.values())
