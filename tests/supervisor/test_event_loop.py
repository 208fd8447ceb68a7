"""A master has no event loop of gevent's, whatever is asked of it and whatever happens to it.

Out of descriptors or memory, libev ends a process that makes one. And every fork would share its epoll(7).
"""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gtcpserver.supervisor import ControlError, ask
from kit.patience import SOON
from kit.supervised import APP, Master, alive, children, wait_until

pytestmark = pytest.mark.slow

ARGUMENTS = ("serve", "app:handler", "--workers", "1", "--pid-file", "app.pid", "--bind", "127.0.0.1:0")

WAYS = {
    "patched": ("--metrics", "0"),
    "not patched": ("--no-monkey-patch", "--metrics", "0"),
    "without metrics": (),
    "TLS": ("--tls-self-signed", "--log-file", "app.log", "--bind", "unix:app.sock", "--metrics", "0"),
}

# A master in a program of one's own: with logging of its own, and gevent imported.
OWN = """
import logging, sys
if sys.argv[2] == "patched":
    from gevent import monkey
    monkey.patch_all()
import gtcpserver
logging.basicConfig(level="INFO")

def handler(conn):
    conn.sendall(conn.recv(100))

gtcpserver.run(handler, "127.0.0.1:0", workers=1, metrics=0, control=sys.argv[1])
"""


def event_loops(pid: int) -> list[str]:
    """The descriptors that libev makes with a loop: epoll(7), and eventfd(2) or timerfd_create(2)."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            pass
    return [name for name in found if name.startswith("anon_inode:")]


class Watched:
    """A master that is looked at after each step."""

    def __init__(self, folder: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        (folder / "app.py").write_text(APP)
        self.folder = folder
        more = ("--control", str(folder / "ctl"), *arguments)
        # In a session of its own, so that a master after an upgrade is found, too.
        self.master = Master(folder, (*ARGUMENTS, *more), prefix=prefix, start_new_session=True)
        self.session = self.master.pid

    def started(self) -> Watched:
        wait_until(lambda: "listening on" in self.log())
        self.master.port = int(re.findall(r"listening on 127.0.0.1:(\d+)", self.log())[0])
        return self

    def end(self) -> None:
        """After a test: nothing stays, whatever has happened."""
        try:
            os.killpg(self.session, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.master.process.wait()

    def log(self) -> str:
        file = self.folder / "app.log"
        return self.master.log() + (file.read_text() if file.exists() else "")

    def check(self, after: str) -> None:
        assert event_loops(self.master.pid) == [], f"after {after}"

    def ask(self, command: str, **more: Any) -> dict[str, Any] | str:
        try:
            return self.master.ask(command, **more)
        except ControlError as error:
            return str(error)
        finally:
            self.check(f"ctl {command}")

    def wait_for(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.log().count(text) >= count)
        self.check(text)

    def raw(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(self.master.control)
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return client.makefile("rb").readline()


@pytest.fixture(params=WAYS)
def watched(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Watched]:
    found = Watched(tmp_path, *WAYS[request.param])
    try:
        yield found.started()
    finally:
        found.end()


def monitors(pid: int, workers: list[int]) -> list[int]:
    return [child for child, state in children(pid).items() if child not in workers and state != "Z"]


def test_no_command_signal_or_child_makes_an_event_loop_in_a_master(watched: Watched) -> None:
    master = watched.master
    watched.check("the start")
    (worker,) = master.settled(1)
    for request in (b"\n", b"[]\n", b"{}\n", b'{"command": "status"}\n', b"", b"{" * 9000):
        watched.raw(request)
        watched.check(f"the request {request[:30]!r}")
    # Children that die: a worker, and the monitor.
    for number in (signal.SIGKILL, signal.SIGSEGV):
        os.kill(worker, number)
        watched.wait_for(f"worker 0 (pid {worker}) was killed by {number.name}")
        (worker,) = master.settled(1)
    for monitor in monitors(master.pid, [worker]):
        os.kill(monitor, signal.SIGKILL)
        watched.wait_for(f"the monitor (pid {monitor}) was killed")
    # Signals, and commands.
    master.send_signal(signal.SIGTTIN)
    master.settled(2)
    master.send_signal(signal.SIGTTOU)
    master.settled(1)
    master.send_signal(signal.SIGUSR1)
    watched.wait_for("log file")
    master.send_signal(signal.SIGHUP)
    watched.wait_for("has left")
    assert watched.ask("scale", workers=3) == {"ok": True}
    assert watched.ask("scale", workers=1) == {"ok": True}
    assert "must be a whole number" in str(watched.ask("scale", workers=0))
    assert "no command" in str(watched.ask("dance"))
    assert watched.ask("reopen") == {"ok": True}
    assert watched.ask("reload") == {"ok": True}
    # A broken program: reloads and upgrades fail, and a worker that dies is not replaced.
    app = watched.folder / "app.py"
    app.write_text("1 / 0")
    assert "ZeroDivisionError" in str(watched.ask("reload"))
    assert "ZeroDivisionError" in str(watched.ask("upgrade"))
    (worker,) = master.settled(1)
    os.kill(worker, signal.SIGKILL)
    watched.wait_for("could not start: app raised")
    app.write_text(APP)
    master.settled(1)
    # The new master took over: it is looked at from now on.
    assert master.ask("upgrade") == {"ok": True}
    # (The old one makes an event loop at its very end: gevent waits in it for threads.)
    old, master.pid = master.pid, master.ask("status")["pid"]
    assert old != master.pid
    wait_until(lambda: not alive(old))
    watched.check("an upgrade")
    master.settled(1)
    assert watched.ask("reload") == {"ok": True}
    master.send_signal(signal.SIGTERM)
    wait_until(lambda: not alive(master.pid))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(params=["--monkey-patch", "--no-monkey-patch"])
def plain(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Watched]:
    found = Watched(tmp_path, request.param, "--metrics", "0")
    try:
        yield found.started()
    finally:
        found.end()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit(2)")
def test_a_master_without_descriptors_serves_on_and_costs_nothing(plain: Watched) -> None:
    watched = plain
    master = watched.master
    (worker,) = master.settled(1)
    wait_until(lambda: len(monitors(master.pid, [worker])) == 1)
    (monitor,) = monitors(master.pid, [worker])
    before = resource.prlimit(master.pid, resource.RLIMIT_NOFILE)
    clients = []
    try:
        # One more than the highest number in use; those free below it are taken by clients of the control socket.
        highest = max(map(int, os.listdir(f"/proc/{master.pid}/fd")))
        resource.prlimit(master.pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
        for _ in range(12):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(20)
            client.connect(master.control)
            clients.append(client)
        began, cpu = time.monotonic(), cpu_seconds(master.pid)
        master.send_signal(signal.SIGHUP)
        master.send_signal(signal.SIGUSR1)
        master.send_signal(signal.SIGUSR2)
        os.kill(monitor, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        watched.wait_for("Too many open files")
        wait_until(lambda: not alive(worker) and not alive(monitor))
        time.sleep(max(0.0, 1.5 - (time.monotonic() - began)))
        spent = cpu_seconds(master.pid) - cpu
        assert spent < 0.3 * (time.monotonic() - began), f"{spent} s of CPU"
        watched.check("the limit of descriptors")
    finally:
        resource.prlimit(master.pid, resource.RLIMIT_NOFILE, before)
        for client in clients:
            client.close()
    assert alive(master.pid)
    assert len(master.settled(1)) == 1
    assert master.request()[1] == "more"
    assert watched.ask("reload") == {"ok": True}
    assert master.stop() == 0


@pytest.mark.parametrize("patched", ["patched", "not patched"])
def test_a_master_in_a_program_of_ones_own_has_no_event_loop(tmp_path: Path, patched: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    control = str(tmp_path / "ctl")
    with (tmp_path / "log0").open("ab") as log:
        process = subprocess.Popen([sys.executable, "own.py", control, patched], cwd=tmp_path, stderr=log)
    try:
        wait_until(lambda: "listening on" in (tmp_path / "log0").read_text())
        for request in ({"command": "reload"}, {"command": "scale", "workers": 2}, {"command": "status"}):
            ask(control, request, SOON)
            assert event_loops(process.pid) == [], request
        ask(control, {"command": "stop"}, SOON)
        assert process.wait(SOON) == 0
    finally:
        process.kill()
        process.wait()


# A program that has an event loop before it becomes a master: there, nothing ever runs in it.
WITH_LOOP = """
import sys
from gevent import monkey
monkey.patch_all()
import gevent, gtcpserver
gevent.sleep(0)

def handler(conn):
    conn.sendall(conn.recv(100))

files = {"control": sys.argv[1], "log_file": "app.log", "pid_file": "app.pid"}
gtcpserver.run(handler, ["127.0.0.1:0", "unix:app.sock"], workers=1, metrics=0, **files)
"""


def test_a_master_whose_program_had_an_event_loop_closes_what_it_opens(tmp_path: Path) -> None:
    """gevent 25.8.1 and newer close a descriptor in the event loop's next turn (os.close), which never comes here."""
    (tmp_path / "own.py").write_text(WITH_LOOP)
    control, log = str(tmp_path / "ctl"), tmp_path / "app.log"
    process = subprocess.Popen([sys.executable, "own.py", control], cwd=tmp_path)
    try:
        wait_until(lambda: log.exists() and "listening on" in log.read_text())

        def turn() -> None:
            for request in ({"command": "reopen"}, {"command": "scale", "workers": 2}, {"command": "reload"}):
                assert ask(control, request, SOON) == {"ok": True}
            assert ask(control, {"command": "scale", "workers": 1}, SOON) == {"ok": True}
            wait_until(lambda: len(ask(control, {"command": "status"}, SOON)["workers"]) == 1)

        def opened() -> list[str]:
            return sorted(os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd"))

        turn()
        before = opened()
        turn()
        wait_until(lambda: len(opened()) <= len(before))
        assert str(tmp_path) not in opened()  # a folder that was opened to look into it, and is locked then
        ask(control, {"command": "stop"}, SOON)
        assert process.wait(SOON) == 0
    finally:
        process.kill()
        process.wait()
