"""What new workers have of their master and of each other, and when old ones and their slots go."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gtcpserver.address import parse_address
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.supervisor.channel import make_pair
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.supervisor.fleet import Fleet
from gtcpserver.supervisor.messages import MASTER_KINDS, WORKER_KINDS
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState
from gtcpserver.supervisor.sockets import ListeningSockets
from gtcpserver.supervisor.system import REAL_SYSTEM
from gtcpserver.supervisor.worker import BEAT_SECONDS
from kit.patience import SOON
from kit.supervised import APP, Master, Start, state_of, wait_until

PID = 1 << 30  # no process's: above what pid_max may be


# As APP, but its import does in one worker what it is told to by the file "start": fails, or takes until it is gone.
SLOW_START = (
    """
import os, time
from gtcpserver.supervisor import current_worker

while os.path.exists(f"wait{current_worker().number}"):
    time.sleep(0.01)
if os.path.exists(f"fail{current_worker().number}"):
    raise RuntimeError("not today")
"""
    + APP
)


def in_background(master: Master, command: str, **more: Any) -> Callable[[], Any]:
    """Asks the master; the returned function waits for the answer or raises."""
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(1)
    asked = threads.submit(master.ask, command, **more)
    threads.shutdown(wait=False)
    return lambda: asked.result(SOON)


@pytest.mark.slow
def test_after_a_reload_that_failed_only_the_old_workers_serve(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2", app=SLOW_START)
    before = master.pids()
    (tmp_path / "fail1").touch()  # the one that goes ahead is slot 0's, and ready
    with pytest.raises(Exception, match="app raised RuntimeError"):
        master.ask("reload")
    assert master.settled(2) == before
    assert {master.request()[0] for _ in range(20)} <= set(before)


@pytest.mark.slow
def test_a_new_worker_whose_predecessor_died_stays_when_its_reload_fails(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2", app=SLOW_START)
    first, second = master.pids()
    for name in ("wait1", "fail1"):
        (tmp_path / name).touch()
    answer = in_background(master, "reload")
    new = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready", count=2))
    os.kill(first, signal.SIGKILL)
    master.wait_for(rf"worker 0 \(pid {first}\) was killed by SIGKILL")
    (tmp_path / "wait1").unlink()
    with pytest.raises(Exception, match="app raised RuntimeError"):
        answer()
    assert master.settled(2) == [new, second]


@pytest.mark.slow
def test_a_reload_whose_first_new_worker_dies_fails_and_the_old_ones_serve(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2", app=SLOW_START)
    before = master.pids()
    (tmp_path / "wait1").touch()
    answer = in_background(master, "reload")
    new = int(master.wait_for(r"worker 0 \(pid (\d+)\) is ready", count=2))
    wait_until(lambda: master.workers("starting"))
    os.kill(new, signal.SIGKILL)
    with pytest.raises(Exception, match="was killed by SIGKILL"):
        answer()
    (tmp_path / "wait1").unlink()
    assert master.settled(2) == before


@pytest.mark.slow
def test_workers_that_are_due_at_the_same_time_are_replaced_one_after_the_other(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "2", app=SLOW_START)
    before = master.pids()
    for name in ("wait0", "wait1"):
        (tmp_path / name).touch()
    for pid in before:
        os.kill(pid, signal.SIGTERM)  # each asks for a successor
    master.wait_for("replacing it")
    began = time.monotonic()
    while time.monotonic() - began < 2 * BEAT_SECONDS + 0.1:
        assert len(master.workers("starting")) == 1
    for name in ("wait0", "wait1"):
        (tmp_path / name).unlink()
    master.wait_for("replacing it", count=2)
    assert not set(master.settled(2)) & set(before)
    assert master.log().count("replacing it") == 2


# Dies as soon as it is ready, while there is a file "die".
SHORT_LIVED = (
    """
import os
import gevent

def begin(worker):
    if os.path.exists("die"):
        gevent.spawn_later(0.05, os._exit, 1)
"""
    + APP
)


@pytest.mark.slow
def test_workers_that_die_as_soon_as_they_are_ready_are_not_started_without_a_pause(
    start: Start, tmp_path: Path
) -> None:
    master = start("--workers", "1", "--worker-start", "app:begin", app=SHORT_LIVED)
    (tmp_path / "die").touch()
    os.kill(master.pids()[0], signal.SIGKILL)
    master.wait_for(r"worker 0 lived \d\.\d+ s; trying again in 1\.0 s")
    assert len(re.findall("is ready after", master.log())) == 3  # the first, and two that died
    (tmp_path / "die").unlink()
    master.settled(1)


@pytest.mark.slow
def test_a_slot_is_closed_only_when_its_workers_have_left(start: Start) -> None:
    master = start("--workers", "2")
    stays, leaves = master.pids()
    while True:
        client = master.connect()
        lines = client.makefile("rb")
        client.sendall(b"x\n")
        if int(lines.readline().split()[0]) == leaves:
            break
        client.close()
    client.sendall(b"sleep 0.5\n")
    master.ask("scale", workers=1)
    wait_until(lambda: master.workers("stopping"))
    assert len(master.workers()) == 1
    assert "slot 1 is closed" not in master.log()
    assert lines.readline().split() == [str(leaves).encode(), b"last"]
    client.close()
    master.wait_for("slot 1 is closed, 0 reset")
    assert master.settled(1) == [stays]
    assert "failed at something" not in master.log()


@pytest.mark.slow
def test_a_slot_is_closed_only_when_no_worker_starts(start: Start, tmp_path: Path) -> None:
    # One that starts may still hold the sockets of all slots, so that the kernel counts them.
    master = start("--workers", "3", app=SLOW_START)
    (tmp_path / "wait0").touch()
    first, *_, last = master.pids()
    os.kill(first, signal.SIGKILL)
    master.wait_for(r"was killed by SIGKILL")
    wait_until(lambda: master.workers("starting"))
    scaled = in_background(master, "scale", workers=2)
    master.wait_for(rf"worker 2 \(pid {last}\) has left")
    wait_until(lambda: master.ask("status"))
    assert "slot 2 is closed" not in master.log()
    (tmp_path / "wait0").unlink()
    scaled()
    master.wait_for(r"slot 2 is closed, 0 reset")
    master.settled(2)


def packet_sockets(pid: int) -> list[str]:
    """The inodes of a process's SOCK_SEQPACKET sockets: channels (/proc/net/unix, whose type column says 0005)."""
    with open("/proc/net/unix") as file:
        kinds = {columns[6]: columns[4] for columns in map(str.split, file.readlines()[1:])}
    names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    inodes = [name[8:-1] for name in names if name.startswith("socket:[")]
    return [inode for inode in inodes if kinds.get(inode) == "0005"]


@pytest.mark.slow
def test_a_worker_has_its_own_end_of_its_own_channel_and_no_other(start: Start) -> None:
    master = start("--workers", "3")
    channels = [packet_sockets(pid) for pid in master.pids()]
    assert [len(ends) for ends in channels] == [1, 1, 1]
    assert len(packet_sockets(master.pid)) == 3


@pytest.mark.slow
def test_a_worker_shares_with_its_master_its_own_listening_socket_and_nothing_else(start: Start) -> None:
    def pipes_and_sockets(pid: int) -> set[str]:
        fds = [fd for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2]
        names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in fds]
        return {name for name in names if name.startswith(("pipe:", "socket:"))}

    master = start("--workers", "2")
    workers = [pipes_and_sockets(pid) for pid in master.pids()]
    masters = pipes_and_sockets(master.pid)
    assert [len(masters & one) for one in workers] == [1, 1]
    assert not workers[0] & workers[1]


SIGNAL_PIPE = """
import signal

def handler(conn):
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    conn.sendall(f"{descriptor}\\n".encode())
"""


@pytest.mark.slow
def test_signals_of_a_worker_are_written_nowhere(start: Start) -> None:
    # The master's pipe is closed in it, and its number is something else's.
    master = start("--workers", "1", app=SIGNAL_PIPE)
    with master.connect() as client:
        assert client.makefile("rb").readline() == b"-1\n"


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """One of a worker without a process, on a unix socket."""
    sockets = ListeningSockets(ListenConfig())
    sockets.open([parse_address(f"unix:{tmp_path}/socket")], [0])
    fleet = Fleet(SupervisorConfig(), sockets, cast(Any, None), "/", lambda: None, [0], REAL_SYSTEM)
    ours, theirs = make_pair(WORKER_KINDS, MASTER_KINDS)
    fleet.workers[PID] = fleet.slots[0].current = WorkerProcess(0, PID, ours, 1, REAL_SYSTEM, state=WorkerState.READY)
    fleet.its_end = theirs  # type: ignore[attr-defined]
    yield fleet
    ours.close()
    theirs.close()
    sockets.close()


def test_what_a_worker_says_just_before_its_end_is_heard(fleet: Any) -> None:
    # Its end may be noticed before its words.
    fleet.workers[PID].state = WorkerState.STOPPING
    fleet.its_end.send("stopped", finished=3, ended=1, stats={"accepted": 4})
    assert fleet.reap(PID, 0)
    assert (fleet.finished, fleet.ended, fleet.stats()) == (3, 1, {"accepted": 4})


def test_the_path_of_a_unix_socket_goes_before_its_queue_is_drained(fleet: Any, tmp_path: Path) -> None:
    fleet.stop(leave=False)
    assert not (tmp_path / "socket").exists()
    assert [message.kind for message, _ in fleet.its_end.receive()] == ["stop"]
    (shared,) = fleet.sockets.shared
    assert not shared.listener.closed  # until the worker has drained it


@pytest.mark.slow
def test_exit_handlers_of_the_master_do_not_run_in_its_workers(start: Start) -> None:
    leaves = "import atexit, os, sys\natexit.register(lambda: print('bye from', os.getpid(), file=sys.stderr))\n"
    master = start("--workers", "1", "--preload", app=leaves + APP)
    assert master.stop() == 0
    assert re.findall(r"bye from (\d+)", master.log()) == [str(master.pid)]


LONG_FINALLY = """
import gevent
from gtcpserver.supervisor import current_worker

def handler(conn):
    conn.sendall(b"begun")
    try:
        gevent.sleep(60)
    finally:
        gevent.sleep(0.2)
        with open("ended", "w") as file:
            file.write(f"ready: {current_worker().ready}")
"""


@pytest.mark.slow
def test_finally_blocks_have_time_when_a_stop_ends_their_handlers(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1", "--stop-timeout", "0.1", app=LONG_FINALLY)
    with master.connect() as client:
        assert client.recv(10) == b"begun"
        assert master.stop() == 0
    assert (tmp_path / "ended").read_text() == "ready: False"


@pytest.mark.slow
def test_finally_blocks_have_time_when_everything_is_ended_at_once(start: Start, tmp_path: Path) -> None:
    master = start("--workers", "1", app=LONG_FINALLY)
    with master.connect() as client:
        assert client.recv(10) == b"begun"
        assert master.stop(signal.SIGQUIT) == 0
    assert (tmp_path / "ended").read_text() == "ready: False"
    assert "killing it" not in master.log()


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_while_it_starts_does_so_when_it_has_started(
    start: Start, tmp_path: Path
) -> None:
    slow = "import os, gevent\nwhile os.path.exists('wait'):\n    gevent.sleep(0.01)\n"
    master = start("--workers", "1", "--stop-timeout", "1", app=slow + APP)
    (tmp_path / "wait").touch()
    master.send_signal(signal.SIGHUP)
    wait_until(lambda: master.workers("starting"))
    master.send_signal(signal.SIGTERM)
    master.wait_for("SIGTERM: stopping")
    wait_until(lambda: len(master.ask("status")["workers"]) == 1)  # the old one has left
    (tmp_path / "wait").unlink()
    assert master.wait() == 0
    assert "killing it" not in master.log()


FAILING_BEATS = """
from gtcpserver.supervisor.worker import _Life

def fails(self):
    raise OSError(24, "Too many open files")

_Life.look_whether_due = fails
"""


@pytest.mark.slow
def test_a_worker_whose_beats_fail_in_part_is_not_taken_for_blocked(start: Start) -> None:
    master = start("--workers", "1", "--worker-timeout", "2", app=FAILING_BEATS + APP)
    before = master.pids()
    master.wait_for("a beat failed")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 2.5)
    assert master.settled(1) == before
    assert "blocked" not in master.log()


# With --preload, in the master too.
FAILING_COMMANDS = """
from gtcpserver.supervisor.commands import Commands

def fails(self, now):
    raise OSError(12, "Cannot allocate memory")

Commands.look_after = fails
"""


@pytest.mark.slow
def test_what_fails_in_a_master_every_time_keeps_it_from_nothing_else(start: Start) -> None:
    master = start("--workers", "1", "--preload", app=FAILING_COMMANDS + APP)
    master.wait_for("the master failed at something, and goes on")
    worker, word = master.request()
    assert word == "more"
    os.kill(worker, signal.SIGKILL)
    master.wait_for(r"worker 0 \(pid \d+\) is ready", count=2)
    assert master.request()[0] != worker
    assert master.stop() == 0


@pytest.mark.slow
def test_a_worker_that_computes_when_its_time_is_over_is_killed(start: Start) -> None:
    master = start("--workers", "1", "--stop-timeout", "0.1")
    (worker,) = master.pids()
    with master.connect() as client:
        client.sendall(b"block 60\n")
        wait_until(lambda: state_of(worker) == "R")
        assert master.stop() == 0
    assert "does not end: killing it" in master.log()
