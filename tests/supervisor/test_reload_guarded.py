"""Reloads that are guarded: new workers on probation, one after the other, and old ones that do not pile up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gtcpserver.supervisor.control import ControlError
from kit.patience import SOON
from kit.supervised import APP, COMMAND, Load, Master, Start, alive, wait_until

pytestmark = pytest.mark.slow

# As APP; a worker that starts while there is a file "poison", and whose number is in "poisoned" if there is that, does
# what it says: ends after so many seconds, at its first request, or blocks its event loop.
POISON = """
import os
import gevent
from gevent import monkey
from gtcpserver.supervisor import current_worker

poison, seconds = "", 0.0
if os.path.exists("poison"):
    with open("poison") as file:
        poison, seconds = file.read().split()
if os.path.exists("poisoned"):
    with open("poisoned") as file:
        poison = poison if int(file.read()) == current_worker().number else ""
if poison == "later":
    gevent.spawn_later(float(seconds), os._exit, 7)
elif poison == "blocks":
    gevent.spawn_later(float(seconds), monkey.get_original("time", "sleep"), 60)
""" + APP.replace("    while True:\n", "    if poison == 'request':\n        os._exit(9)\n    while True:\n", 1)


@pytest.fixture
def start(start: Start) -> Start:
    return partial(start, app=POISON)


@pytest.fixture
def poison(tmp_path: Path) -> Callable[..., None]:
    """Makes the code on the disk such that new workers die; without arguments, good again."""

    def spread(what: str = "", number: int | None = None) -> None:
        for name, text in (("poisoned", "" if number is None else str(number)), ("poison", what)):
            if text:
                (tmp_path / name).write_text(text)
            else:
                (tmp_path / name).unlink(missing_ok=True)

    return spread


def in_background(master: Master, command: str, **more: Any) -> Callable[[], Any]:
    """Asks the master; the returned function waits for the answer or raises."""
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(1)
    asked = threads.submit(master.ask, command, **more)
    threads.shutdown(wait=False)
    return lambda: asked.result(SOON)


# -- probation ---------------------------------------------------------------------------------------------------------


def test_a_reload_fails_when_the_new_worker_dies_just_after_it_was_ready(
    start: Start, poison: Callable[..., None]
) -> None:
    # A beat after the probation proves a worker: none comes from one that has died before, however slow the machine.
    master = start("--workers", "2", "--probation", "0.3")
    before = master.settled(2)
    poison("later 0.2")
    with pytest.raises(ControlError, match=r"worker 0 \(pid \d+\) exited with status 7, 0\.\d+ s after it was ready"):
        master.ask("reload")
    assert master.settled(2) == before
    assert master.wait_for(r"reload 1 failed, the old workers serve on: .*")
    # One went ahead: nothing was tried in the other slot.
    assert master.log().count("is ready after") == 3
    poison()
    master.ask("reload")
    assert not set(master.settled(2)) & set(before)


@pytest.mark.parametrize("how", [(), ("--no-reuse-port",)], ids=["a group", "one socket"])
def test_code_that_dies_at_its_first_request_loses_that_request_and_no_other(
    start: Start, load: Callable[..., Load], poison: Callable[..., None], how: tuple[str, ...]
) -> None:
    master = start("--workers", "1", *how)
    before = master.settled(1)
    clients = load(master.port, kinds=("short",), threads=3)
    poison("request 0")
    with pytest.raises(ControlError, match="exited with status 9"):
        master.ask("reload")
    assert master.settled(1) == before
    met = clients.end()
    # At most those that the one new worker had accepted.
    assert 1 <= len(met["failures"]) <= 3, met["failures"]
    assert met["workers"] == set(before)


def test_a_reload_fails_with_any_worker_and_new_ones_that_live_leave_again(
    start: Start, poison: Callable[..., None]
) -> None:
    master = start("--workers", "2", "--probation", "0.5")
    before = master.settled(2)
    poison("later 0.1", number=1)
    with pytest.raises(ControlError, match=r"worker 1 \(pid \d+\) exited with status 7"):
        master.ask("reload")
    assert master.settled(2) == before
    assert master.log().count("has left") == 1
    assert master.ask("status")["generation"] == 1


def test_a_worker_that_is_killed_on_probation_fails_the_reload_too(start: Start) -> None:
    # For want of memory, for example.
    master = start("--workers", "1")
    before = master.settled(1)
    answer = in_background(master, "reload")
    new = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready", count=2))
    os.kill(new, signal.SIGKILL)
    with pytest.raises(ControlError, match="was killed by SIGKILL"):
        answer()
    assert master.settled(1) == before


def test_a_worker_that_blocks_on_probation_never_gets_the_place(start: Start, poison: Callable[..., None]) -> None:
    master = start("--workers", "1", "--probation", "0.1", "--worker-timeout", "1")
    before = master.settled(1)
    # It is noticed after its probation would be over.
    poison("blocks 0")
    with pytest.raises(ControlError, match="its event loop was blocked"):
        master.ask("reload")
    assert master.pids() == before
    assert master.request()[0] == before[0]


def test_both_old_and_new_workers_die_and_the_slot_gets_another(start: Start, poison: Callable[..., None]) -> None:
    master = start("--workers", "1")
    (before,) = master.settled(1)
    poison("later 0.5")
    answer = in_background(master, "reload")
    master.wait_for(r"worker 0 \(pid (\d+)\) is ready", count=2)
    os.kill(before, signal.SIGKILL)
    poison()
    with pytest.raises(ControlError, match="exited with status 7"):
        answer()
    assert master.settled(1) != [before]
    assert master.request()[1] == "more"


def test_a_reload_that_is_asked_for_on_probation_follows(start: Start, poison: Callable[..., None]) -> None:
    # The repaired code is on the disk by then.
    master = start("--workers", "1")
    poison("later 0.5")
    first = in_background(master, "reload")
    master.wait_for("is ready after", count=2)
    poison()
    second = in_background(master, "reload")
    with pytest.raises(ControlError, match="exited with status 7"):
        first()
    second()
    assert master.ask("status")["generation"] == 2
    assert len(master.settled(1)) == 1


def test_a_stop_on_probation_loses_nothing(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "2", "--probation", "30")
    clients = load(master.port, kinds=("long",), threads=4)
    master.send_signal(signal.SIGHUP)
    master.wait_for("is ready after", count=3)
    held = master.hold(count=4)
    new = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready", count=2))
    master.send_signal(signal.SIGTERM)
    answers = [client.makefile("rb").readline() for client in held]
    assert all(answer.endswith(b"last\n") for answer in answers)
    assert master.wait() == 0
    assert "0 cut" in master.log()
    assert "ERROR" not in master.log()
    assert "reload 1 is given up: the master stops" in master.log()
    assert not alive(new)
    # What comes after the end is refused; nothing that was accepted is cut.
    assert not [failure for failure in clients.end()["failures"] if "Refused" not in failure[1]]


def test_workers_are_scaled_after_a_probation(start: Start) -> None:
    master = start("--workers", "2", "--probation", "0.5")
    reloaded = in_background(master, "reload")
    master.wait_for("is ready after", count=3)
    scaled = in_background(master, "scale", workers=1)
    reloaded()
    scaled()
    assert len(master.settled(1)) == 1
    assert master.ask("status")["generation"] == 2


def test_the_place_of_a_recycled_worker_is_taken_after_a_probation_too(
    start: Start, poison: Callable[..., None]
) -> None:
    master = start("--workers", "1", "--probation", "0.3")
    (before,) = master.settled(1)
    poison("later 0.2")
    os.kill(before, signal.SIGTERM)  # asks for a successor
    master.wait_for(r"worker 0 lived 0\.\d+ s; trying again in 0\.5 s")
    master.wait_for(r"worker 0 lived 0\.\d+ s; trying again in 1\.0 s")
    assert master.pids()[0] == before
    poison()
    wait_until(lambda: not alive(before))
    assert len(master.settled(1)) == 1


# -- upgrades ----------------------------------------------------------------------------------------------------------


def test_an_upgrade_fails_when_a_new_worker_dies_on_probation(start: Start, poison: Callable[..., None]) -> None:
    master = start("--workers", "2", "--pid-file", "pid", "--probation", "0.3")
    before = master.settled(2)
    poison("later 0.2", number=1)
    with pytest.raises(ControlError, match=r"worker 1 \(pid \d+\) exited with status 7, 0\.\d+ s after it was ready"):
        master.ask("upgrade")
    assert master.settled(2) == before
    assert (master.folder / "pid").read_text() == f"{master.pid}\n"
    new = int(master.wait_for(r"a new master was started \(pid (\d+)\)"))
    wait_until(lambda: not alive(new))
    assert master.request()[0] in before
    poison()
    master.ask("upgrade")
    master.pid = master.ask("status")["pid"]
    assert not set(master.settled(2)) & set(before)


def test_an_upgrade_fails_when_a_new_worker_blocks_on_probation(start: Start, poison: Callable[..., None]) -> None:
    master = start("--workers", "1", "--worker-timeout", "1")
    before = master.settled(1)
    poison("blocks 0")
    with pytest.raises(ControlError, match="its event loop was blocked"):
        master.ask("upgrade")
    assert master.pids() == before


def test_no_upgrade_begins_on_probation_and_no_reload_during_an_upgrade(start: Start) -> None:
    master = start("--workers", "1")
    reloaded = in_background(master, "reload")
    master.wait_for("is ready after", count=2)
    with pytest.raises(ControlError, match=r"a reload .* is under way"):
        master.ask("upgrade")
    reloaded()
    upgraded = in_background(master, "upgrade")
    master.wait_for("a new master was started")
    master.send_signal(signal.SIGHUP)
    master.wait_for("no reload: an upgrade is under way")
    upgraded()
    master.pid = master.ask("status")["pid"]


# -- one by one --------------------------------------------------------------------------------------------------------


def test_one_by_one_a_worker_starts_when_the_one_replaced_before_has_left(
    start: Start, load: Callable[..., Load]
) -> None:
    slow = POISON.replace("gevent.sleep(0.05)", "gevent.sleep(1.5)")
    master = start("--workers", "3", "--reload-one-by-one", "--probation", "0.2", app=slow)
    before = master.settled(3)
    clients = load(master.port, kinds=("short", "long"))
    (lasting,) = master.hold(before[0])  # longer than a worker takes to start, once it is told to stop
    master.ask("reload")
    assert not set(master.settled(3)) & set(before)
    met = clients.end()
    assert met["failures"] == []
    assert lasting.makefile("rb").readline() == b"%d last\n" % before[0]
    steps = re.findall(r"worker (\d) \(pid \d+\) (is ready|has left)", master.log().partition("reload 1 begins")[2])
    assert steps == [(str(number), step) for number in range(3) for step in ("is ready", "has left")]


def test_one_by_one_those_replaced_before_a_failure_stay_and_the_others_too(
    start: Start, poison: Callable[..., None]
) -> None:
    master = start("--workers", "3", "--reload-one-by-one", "--probation", "0.5")
    before = master.settled(3)
    poison("later 0.1", number=1)
    with pytest.raises(ControlError, match=r"exited with status 7, .* s after .*; 1 of 3 workers have the new code"):
        master.ask("reload")
    master.wait_for("reload 1 failed, 1 of 3 workers have the new code, the others serve on: worker 1 .*")
    after = master.settled(3)
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    poison()
    master.ask("reload")
    assert not set(master.settled(3)) & {*after, *before}
    assert master.ask("status")["generation"] == 3


def test_one_by_one_a_worker_that_dies_after_its_probation_stops_the_reload(start: Start) -> None:
    master = start("--workers", "3", "--reload-one-by-one", "--probation", "1")
    before = master.settled(3)
    answer = in_background(master, "reload")
    master.wait_for("worker 1 .* is ready", count=2)
    new = master.pids()[0]
    assert new != before[0]
    os.kill(new, signal.SIGKILL)
    with pytest.raises(ControlError, match=r"worker 0 .*was killed by SIGKILL.*; 1 of 3 workers have the new code"):
        answer()
    assert master.settled(3)[1:] == before[1:]


def test_one_by_one_with_no_retired_worker_allowed_there_is_never_more_than_one_more(start: Start) -> None:
    options = ("--reload-one-by-one", "--probation", "0", "--max-retired", "0", "--stop-timeout", "0.1")
    master = start("--workers", "2", *options)
    before = master.settled(2)
    held = [client for pid in before for client in master.hold(pid)]
    asked = in_background(master, "reload")
    most = 0
    while master.ask("status")["generation"] == 1 or master.ask("status")["reloading"]:
        most = max(most, len(master.ask("status")["workers"]))
    asked()
    assert most <= 3
    assert not set(master.settled(2)) & set(before)
    for client in held:
        client.close()


# -- retired workers ---------------------------------------------------------------------------------------------------


def test_the_oldest_of_too_many_retired_workers_is_told_to_finish(start: Start) -> None:
    options = ("--probation", "0", "--max-retired", "1", "--stop-timeout", "5")
    master = start(
        "--workers", "1", *options, app=POISON.replace("stopping_event.wait", "stopping_event.wait and gevent.sleep")
    )
    held = []
    for number in range(3):
        (worker,) = [one["pid"] for one in master.workers()]
        held += master.hold(worker)
        if number < 2:
            master.ask("reload")
    first, second, third = held
    told = master.wait_for(
        r"worker 0 \(pid \d+\) has 5 s to finish its 1 connection: 2 retired workers, at most 1 may stay"
    )
    assert told
    # No other is touched.
    wait_until(lambda: master.ask("status")["retired"] == 1)
    assert first.recv(100) == b""
    for client in (second, third):
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)
    assert re.search("cut .* in handler", master.log())
    assert master.log().count("to finish its") == 1


def test_old_workers_that_pile_up_are_counted_and_told(start: Start) -> None:
    lasting = POISON.replace("stopping_event.wait", "stopping_event.wait and gevent.sleep")
    master = start("--workers", "1", "--probation", "0", app=lasting)
    held = []
    for number in range(4):
        held += master.hold(master.pids()[0])
        master.ask("reload")
        wait_until(lambda count=number + 1: master.ask("status")["retired"] == count)
    ctl = [*COMMAND, "ctl", "--control", master.control, "status"]
    status = subprocess.run(ctl, capture_output=True, text=True, check=True).stdout
    assert "5 workers of 1 wanted, 4 retired, generation 5" in status
    # Said once, and not with each one more.
    told = re.findall(r"\d retired workers still have connections", master.log())
    assert told == ["3 retired workers still have connections"]
    for client in held:
        client.close()


@pytest.mark.parametrize("stopped", ["upgrade", "stop"])
def test_retired_workers_are_bounded_in_a_master_that_was_left_too(start: Start, stopped: str) -> None:
    lasting = POISON.replace("stopping_event.wait", "stopping_event.wait and gevent.sleep")
    options = ("--probation", "0", "--max-retired", "0", "--stop-timeout", "0.2")
    master = start("--workers", "1", *options, app=lasting)
    (old,) = master.hold()
    if stopped == "upgrade":
        master.ask("upgrade")
        master.pid = master.ask("status")["pid"]
    else:
        master.send_signal(signal.SIGTERM)
    assert old.recv(100) == b""
    assert master.process.wait(SOON) == 0
    assert ("to finish its 1 connection" in master.log()) == (stopped == "upgrade")
