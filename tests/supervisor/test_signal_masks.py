"""Programs that are started by handlers in workers have the signals of any program: none ignored, none blocked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.supervised import Master, alive, wait_until

pytestmark = pytest.mark.slow

APP = r"""
import os, subprocess, sys, threading

LOOK = ["cat", "/proc/self/status"]

def by_run():
    return subprocess.run(LOOK, stdout=subprocess.PIPE, check=True).stdout

def by_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(by_run()))
    thread.start()
    thread.join()
    return found[0]

def by_spawn():
    reader, writer = os.pipe()
    os.posix_spawn("/bin/cat", LOOK, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
    os.fdopen(writer, "wb").close()  # os.close would wait for the event loop
    with os.fdopen(reader, "rb") as file:
        return file.read()

def by_fork():
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1)
        os.execv("/bin/cat", LOOK)
    os.fdopen(writer, "wb").close()  # os.close would wait for the event loop
    with os.fdopen(reader, "rb") as file:
        return file.read()

WAYS = {"run": by_run, "thread": by_thread, "spawn": by_spawn, "fork": by_fork}
at_start = []

def start(worker):
    at_start.append(by_run())

def handler(conn):
    word = conn.recv_until(b"\n").decode().strip()
    conn.sendall(at_start[0] if word == "start" else WAYS[word]())
"""

#: What the master and its workers have handlers for, and Python itself ignores (SIGPIPE, SIGXFSZ).
OURS = {
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
}


def masks(status: str) -> dict[str, set[int]]:
    """SigBlk and SigIgn of /proc/PID/status, proc_pid_status(5)."""
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("SigBlk", "SigIgn"):
            found[name] = {number for number in signal.valid_signals() if int(value, 16) >> (number - 1) & 1}
    assert len(found) == 2
    return found


def masks_of(pid: int) -> dict[str, set[int]]:
    return masks(Path(f"/proc/{pid}/status").read_text())


def begin(folder: Path, *arguments: str, **options: Any) -> Master:
    (folder / "app.py").write_text(APP)
    control = ("--control", str(folder / "ctl"), "--bind", "127.0.0.1:0", "--worker-start", "app:start")
    master = Master(folder, ("serve", "app:handler", "--workers", "1", *control, *arguments), **options)
    return master.wait_listening()


@pytest.fixture(params=["--monkey-patch", "--no-monkey-patch"])
def master(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Master]:
    found = begin(tmp_path, request.param, "--metrics", "0")
    yield found
    found.kill_all()


def seen_by_child(master: Master, way: str) -> dict[str, set[int]]:
    with master.connect() as client:
        client.sendall(way.encode() + b"\n")
        return masks(client.makefile("r").read())


def test_what_a_handler_starts_ignores_and_blocks_nothing_of_ours(master: Master) -> None:
    ours = set(map(int, OURS))
    for way in ("run", "thread", "spawn", "fork", "start"):
        seen = seen_by_child(master, way)
        assert not seen["SigIgn"] & ours, way
        assert not seen["SigBlk"], way
        if way in ("run", "thread", "start"):  # subprocess gives back what Python ignores
            assert not seen["SigIgn"] & {signal.SIGPIPE, signal.SIGXFSZ}
    # A new master, that exec has made, and its workers.
    assert master.ask("upgrade") == {"ok": True}
    old, master.pid = master.pid, master.ask("status")["pid"]
    for pid in (master.pid, *master.settled(1)):
        assert not masks_of(pid)["SigIgn"] & ours
        assert not masks_of(pid)["SigBlk"]
    wait_until(lambda: not alive(old))
    assert not seen_by_child(master, "run")["SigIgn"] & ours


def test_signals_that_come_to_a_whole_group_do_nothing_to_a_worker(master: Master) -> None:
    (worker,) = master.settled(1)
    for _ in range(3):
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU):
            os.kill(worker, number)
    assert not seen_by_child(master, "run")["SigIgn"] & set(map(int, OURS))
    assert master.settled(1) == [worker]
    assert "Traceback" not in master.log()


def test_a_child_program_ends_by_the_signal_that_its_handler_sends_it(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(
        "import subprocess\n"
        "def handler(conn):\n"
        "    for number in eval(conn.recv_until(b'\\n')):\n"
        "        child = subprocess.Popen(['sleep', '60'])\n"
        "        child.send_signal(number)\n"
        "        conn.sendall(f'{child.wait(20)}\\n'.encode())\n"
    )
    master = Master(tmp_path, ("serve", "killer:handler", "--workers", "1", "--bind", "127.0.0.1:0")).wait_listening()
    try:
        numbers = [int(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)]
        with master.connect() as client:
            client.sendall(repr(numbers).encode() + b"\n")
            assert list(map(int, client.makefile("r"))) == [-number for number in numbers]
        assert master.stop() == 0
    finally:
        master.kill_all()


@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["single", "workers"])
def test_signals_that_were_blocked_at_the_start_are_obeyed(tmp_path: Path, workers: tuple[str, ...]) -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, OURS)

    (tmp_path / "app.py").write_text(APP)
    arguments = ("serve", "app:handler", "--bind", "127.0.0.1:0", *workers)
    master = Master(tmp_path, arguments, preexec_fn=block).wait_listening()
    try:
        assert seen_by_child(master, "run") == {"SigIgn": set(), "SigBlk": set()} or workers == ()
        assert master.stop() == 0
    finally:
        master.kill_all()


def test_a_system_call_of_a_c_library_goes_on_after_such_a_signal(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def handler(conn):\n"
        "    reader, writer = os.pipe()\n"
        "    conn.sendall(f'{os.getpid()} {os.dup(writer)}\\n'.encode())\n"
        "    got = libc.read(reader, ctypes.create_string_buffer(1), 1)\n"
        "    conn.sendall(f'{got} {ctypes.get_errno()}\\n'.encode())\n"
    )
    master = Master(tmp_path, ("serve", "c:handler", "--workers", "1", "--bind", "127.0.0.1:0")).wait_listening()
    try:
        with master.connect() as client, client.makefile("r") as lines:
            worker, fd = map(int, lines.readline().split())
            wait_until(lambda: Path(f"/proc/{worker}/syscall").read_text().startswith("0 "))
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(worker, number)
                time.sleep(0.05)
            with open(f"/proc/{worker}/fd/{fd}", "wb") as pipe:
                pipe.write(b"x")
            assert lines.readline() == "1 0\n"
    finally:
        master.kill_all()
