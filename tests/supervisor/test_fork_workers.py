"""Forks in worker processes and in the master: what they have of each other is not the child's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gtcpserver.supervisor import ask
from kit.forks import read_all, sockets_of
from kit.supervised import Master, alive, wait_until

pytestmark = pytest.mark.slow

APP = """
import concurrent.futures, multiprocessing, os, signal, sys, time
import gevent

def handler(conn):
    word = conn.recv_until(b"\\n").decode().strip()
    if word == "process":
        pid = os.fork()
        if not pid:
            gevent.sleep(60)
            os._exit(0)
        conn.sendall(b"%d %d\\n" % (os.getpid(), pid))
    elif word == "pool":
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            conn.sendall(repr(list(pool.map(abs, range(-3, 0)))).encode())
    elif word == "signals":
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            numbers = "TERM INT QUIT HUP USR1 USR2 TTIN TTOU CHLD".split()
            found = {name: signal.getsignal(signal.Signals["SIG" + name]) for name in numbers}
            text = {name for name, found in found.items() if found not in (signal.SIG_DFL, signal.default_int_handler)}
            os.write(writing, repr((text, signal.set_wakeup_fd(-1))).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        conn.sendall(os.read(reading, 1000))
    else:
        conn.sendall(b"%d\\n" % os.getpid())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Master]]:
    masters: list[Master] = []

    def run(*arguments: str, app: str = APP) -> Master:
        (tmp_path / "app.py").write_text(app)
        master = Master(
            tmp_path,
            ("serve", "app:handler", "--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"), *arguments),
            start_new_session=True,
        )
        masters.append(master)
        return master.wait_listening()

    yield run
    for master in masters:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(master.process.pid, signal.SIGKILL)
        master.kill_all()


def answer(master: Master, request: str) -> str:
    client = master.connect()
    client.sendall(request.encode() + b"\n")
    return read_all(client)


def serve_all(master: Master, count: int) -> int:
    """How many of so many clients get an answer from a worker."""
    workers = set(master.pids())
    return sum(int(answer(master, "pid")) in workers for _ in range(count))


@pytest.mark.parametrize("patched", [(), ("--no-monkey-patch",), ("--preload",)])
def test_no_client_is_lost_to_children_while_workers_come_and_go(start: Any, patched: tuple[str, ...]) -> None:
    """A listening socket that a child has kept would get a share of the port's connections, and serve none."""
    master = start("--workers", "3", *patched)
    master.settled(3)
    children = {}
    while len(children) < 3:
        worker, child = map(int, answer(master, "process").split())
        children.setdefault(worker, child)
    of_workers = set().union(*(sockets_of(pid) for pid in (*children, master.pid)))
    for child in children.values():
        # Its handler's connection has ended, and is none of the worker's any more.
        wait_until(lambda child=child: not sockets_of(child) & of_workers)
    for workers in (1, 3):
        assert ask(master.control, {"command": "scale", "workers": workers})["ok"]
        master.settled(workers)
        assert serve_all(master, 60) == 60
    assert sum(map(alive, children.values()))


def test_a_worker_that_dies_is_replaced_although_its_child_lives_on(start: Any) -> None:
    """Its line to the master ends with it."""
    master = start("--workers", "1")
    worker, child = map(int, answer(master, "process").split())
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: worker not in master.pids() and master.settled(1))
    assert serve_all(master, 10) == 10
    assert alive(child)
    master.stop()
    assert alive(child)
    socket.create_server(("127.0.0.1", master.port)).close()


@pytest.mark.parametrize("patched", [(), ("--no-monkey-patch",)])
def test_a_pool_of_processes_in_a_worker(start: Any, patched: tuple[str, ...]) -> None:
    assert answer(start("--workers", "1", *patched), "pool") == "[3, 2, 1]"


def test_a_child_of_a_worker_has_the_default_signals(start: Any) -> None:
    assert answer(start("--workers", "1"), "signals") == "(set(), -1)"


# gevent's os.fork() has SIGCHLD caught behind the fork: it never notices a child that has ended before.
FORKS_WHEN_LOADED = """
import os, sys
from gevent import get_hub, monkey
if monkey.is_object_patched("os", "fork"):
    get_hub().loop.install_sigchld()
pid = os.fork()
if not pid and {how!r} == "raise":
    raise SystemExit(0)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("preload", [(), ("--preload",)])
@pytest.mark.parametrize("how", ["return", "raise"])
def test_a_program_that_forks_while_it_is_loaded_is_served_once(start: Any, preload: tuple[str, ...], how: str) -> None:
    master = start("--workers", "1", *preload, app=FORKS_WHEN_LOADED.format(how=how) + APP)
    assert serve_all(master, 10) == 10
    assert master.log().count("listening on") == 1
    assert "Traceback" not in master.log()
    assert master.stop() == 0


PRELOADS_A_PROCESS = """
import multiprocessing, time
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
process.start()
with open("child", "w") as file:
    file.write(str(process.pid))
"""


def test_a_process_that_was_started_in_the_master_has_nothing_of_it(start: Any, tmp_path: Path) -> None:
    master = start("--workers", "1", "--preload", app=PRELOADS_A_PROCESS + APP)
    child = int((tmp_path / "child").read_text())
    assert serve_all(master, 10) == 10
    assert not sockets_of(child)
    os.kill(child, signal.SIGTERM)
    wait_until(lambda: not alive(child))
