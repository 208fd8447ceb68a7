"""The end of a worker: what belongs to it ends with it, and nothing of its master's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.patience import SOON
from kit.supervised import Start, masters, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with masters(tmp_path, control=False) as start:
        yield lambda app, *arguments: start(*arguments, app=app)


def control(folder: Path) -> tuple[str, str]:
    return ("--control", str(folder / "ctl"))


def ask(port: int, line: bytes = b"\n") -> bytes:
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(line)
        return client.makefile("rb").read()


COROUTINES = """
import asyncio
from gtcpserver import run_coroutine

async def for_ever():
    try:
        await asyncio.sleep(60)
    finally:
        with open("done", "a") as file:
            file.write("ended\\n")

async def begin():
    global task
    task = asyncio.create_task(for_ever())
    await asyncio.sleep(0)

def handler(conn):
    conn.recv_until(b"\\n")
    run_coroutine(begin())
    conn.sendall(b"begun\\n")
"""


@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["single", "workers"])
def test_tasks_that_coroutines_have_left_behind_are_cancelled(start, tmp_path, workers):
    master = start(COROUTINES, *workers)
    assert ask(master.port) == b"begun\n"
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait(SOON) == 0
    assert (tmp_path / "done").exists(), master.log()


CHILDREN = """
import multiprocessing, multiprocessing.util, os, time
import gevent

context = multiprocessing.get_context("fork")

def work(name):
    with open(name, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)

if %s:
    first = context.Process(target=work, args=("first",), daemon=%s)
    first.start()

def handler(conn):
    conn.recv_until(b"\\n")
    process = context.Process(target=work, args=("second",), daemon=True)
    process.start()
    while not os.path.exists("second"):
        gevent.sleep(0.01)
    conn.sendall(b"begun\\n")
"""


@pytest.mark.parametrize("daemon", [False, True])
def test_a_process_of_the_preloaded_program_is_no_work_of_a_worker(start, tmp_path, daemon):
    options = ("--workers", "1", "--preload", "--stop-timeout", f"{2 * SOON:.0f}")  # which nothing here waits for
    master = start(CHILDREN % (True, daemon), *options, *control(tmp_path))
    wait_until((tmp_path / "first").exists)
    first = int(wait_until((tmp_path / "first").read_text))
    try:
        (before,) = master.pids()
        os.kill(before, signal.SIGTERM)
        wait_until(lambda: master.log().count("is ready") == 2)
        master.wait_for(f"worker 0 \\(pid {before}\\) has left")
        os.kill(first, 0)
        assert "background" not in master.log()
    finally:
        os.kill(first, signal.SIGKILL)


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_a_daemon_process_ends_with_its_worker(start, tmp_path, preload):
    master = start(CHILDREN % (False, False), "--workers", "1", *preload)
    assert ask(master.port) == b"begun\n"
    pid = int(wait_until((tmp_path / "second").read_text))
    try:
        assert master.stop() == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
