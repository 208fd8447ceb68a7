"""What the tests of worker processes share: a master started as a user starts it, and clients that load it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gtcpserver.supervisor import ask
from kit.patience import SOON

COMMAND = [sys.executable, "-m", "gtcpserver"]

APP = '''
import os, signal, sys, time
import gevent

def handler(conn):
    """Each line is a request; every answer names the worker, and the last one says so."""
    while True:
        try:
            line = conn.recv_until(b"\\n")
        except EOFError:
            return
        word, _, rest = line.decode().strip().partition(" ")
        if word == "sleep":
            gevent.sleep(float(rest))
        elif word == "block":
            seconds, _, later = rest.partition(" ")
            gevent.sleep(float(later or 0))
            time_to_end = time.monotonic() + float(seconds)
            while time.monotonic() < time_to_end:
                pass
        elif word == "hold":
            conn.sendall(f"{os.getpid()} held\\n".encode())
            conn.server.stopping_event.wait(float(rest))
            gevent.sleep(0.05)
        elif word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        last = conn.server.stopping
        conn.sendall(f"{os.getpid()} {'last' if last else 'more'}\\n".encode())
        if last:
            return
'''

# One client process: short connections, or long ones with a request always in flight. Runs until its stdin is closed.
LOAD = """
import json, select, socket, sys, threading
host, port, kind, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
done, lock = threading.Event(), threading.Lock()
requests, workers, failures = [0], set(), []

def connect():
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(60)
    sock.connect((host, port))
    return sock

def ask(sock, lines):
    sock.sendall(b"sleep 0.002\\n")
    answer = lines.readline()
    if not answer.endswith(b"\\n"):
        raise EOFError(f"the answer is {answer!r}")
    worker, more = answer.split()
    with lock:
        requests[0] += 1
        workers.add(int(worker))
    return more == b"more"

def client():
    while not done.is_set():
        sock, local = None, 0
        try:
            sock = connect()
            local = sock.getsockname()[1]
            lines = sock.makefile("rb")
            if kind == "short":
                ask(sock, lines)
            else:
                while ask(sock, lines) and not done.is_set():
                    pass
        except (OSError, EOFError) as error:
            with lock:
                failures.append([local, repr(error)])
        finally:
            if sock is not None:
                sock.close()

running = [threading.Thread(target=client) for _ in range(threads)]
for one in running: one.start()
print("loading", flush=True)
sys.stdin.read()
done.set()
for one in running: one.join()
print(json.dumps({"requests": requests[0], "workers": sorted(workers), "failures": failures}))
"""


def wait_until(condition: Callable[[], Any], seconds: float = SOON) -> Any:
    """Waits until the condition is true, and returns its value."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, f"still not true after {seconds} s"
        time.sleep(0.005)
    return value


class Load:
    """Client processes. `end` stops them and returns what they have met."""

    def __init__(self, port: int, kinds: tuple[str, ...] = ("short", "short", "long"), threads: int = 3) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", LOAD, "127.0.0.1", str(port), kind, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for kind in kinds
        ]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n"

    def end(self) -> dict[str, Any]:
        results = []
        for process in self.processes:
            output, _ = process.communicate(timeout=SOON)
            results.append(json.loads(output))
        self.processes = []
        return {
            "requests": sum(one["requests"] for one in results),
            "workers": set().union(*(one["workers"] for one in results)),
            "failures": [tuple(failure) for one in results for failure in one["failures"]],
        }

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


class Master:
    """A running master, its log, and its control socket.

    Attributes:
        pid: of the master that serves; another one after an upgrade.
    """

    def __init__(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        at: Path | None = None,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.folder = folder
        self.log_path = folder / f"log{len(list(folder.glob('log[0-9]*')))}"
        self.control = str(folder / "ctl")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *COMMAND, *arguments], cwd=at or folder, stdin=subprocess.DEVNULL, stderr=log, **options
            )
        self.pid = self.process.pid

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, pattern: str, count: int = 1, seconds: float = SOON) -> str:
        """Waits until the log has the pattern so often; the last match's first group, or all of it."""

        def found() -> list[Any]:
            matches = list(re.finditer(pattern, self.log()))
            return matches if len(matches) >= count else []

        try:
            match = wait_until(found, seconds)[-1]
        except AssertionError:
            raise AssertionError(f"{pattern!r} did not come {count} times in:\n{self.log()}") from None
        return str(match[1] if match.re.groups else match[0])

    def wait_listening(self) -> Master:
        self.port = int(self.wait_for(r"listening on [^ ,]*:(\d+)"))
        return self

    def ask(self, command: str, **more: Any) -> dict[str, Any]:
        return ask(self.control, {"command": command, **more}, SOON)

    def workers(self, state: str = "ready") -> list[dict[str, Any]]:
        return [one for one in self.ask("status")["workers"] if one["state"] == state]

    def pids(self) -> list[int]:
        return [one["pid"] for one in self.workers()]

    def settled(self, count: int) -> list[int]:
        """Waits until exactly so many workers are there, all ready; their process ids."""

        def ready() -> list[int]:
            found = self.ask("status")["workers"]
            good = len(found) == count and all(one["state"] == "ready" for one in found)
            return [one["pid"] for one in found] if good else []

        return wait_until(ready)

    def wait_until_active(self, count: int) -> None:
        wait_until(lambda: self.ask("status")["stats"].get("active") == count)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SOON)

    def request(self, line: bytes = b"x\n") -> tuple[int, str]:
        with self.connect() as client:
            client.sendall(line)
            worker, word = client.makefile("rb").readline().split()
            return int(worker), word.decode()

    def hold(self, worker: int | None = None, count: int = 1) -> list[socket.socket]:
        """Connections whose requests are in flight, in one worker if it is given."""
        held: list[socket.socket] = []
        while len(held) < count:
            client = self.connect()
            client.sendall(b"hold 60\n")
            there = int(client.recv(100).split()[0])
            if worker is None or there == worker:
                held.append(client)
            else:
                client.close()
        return held

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for the end of the process that was started, and of the one that serves."""
        status = self.process.wait(SOON)
        wait_until(lambda: not alive(self.pid))
        return status

    def kill_all(self) -> None:
        """After a test: nothing stays, whatever has happened."""
        for pid in {self.pid, self.process.pid, *map(int, re.findall(r"\(pid (\d+)", self.log()))}:
            if alive(pid) and self._is_ours(pid):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/cwd").startswith(str(self.folder))
        except OSError:
            return False


#: `start(*arguments, app=None, handler="app:handler", bind="127.0.0.1:0", **options of Popen)` of `masters`.
Start = Callable[..., Master]


@contextmanager
def masters(folder: Path, control: bool = True) -> Iterator[Start]:
    """Give a function that starts masters in a folder, of APP or another program; they are killed at the end.

    Args:
        control: with a control socket, which a server without workers cannot have.
    """
    started: list[Master] = []
    (folder / "app.py").write_text(APP)

    def start(
        *arguments: str, app: str | None = None, handler: str = "app:handler", bind: str = "127.0.0.1:0", **options: Any
    ) -> Master:
        if app is not None:
            (folder / "app.py").write_text(app)
        more = ("--bind", bind, *(("--control", str(folder / "ctl")) if control else ()), *arguments)
        started.append(Master(folder, ("serve", handler, *more), **options))
        return started[-1].wait_listening() if bind.startswith("127") else started[-1]

    try:
        yield start
    finally:
        for master in started:
            master.kill_all()


@contextmanager
def masters_of(folder: Path) -> Iterator[Callable[..., Master]]:
    """Give a function that starts masters of any command in a new folder; they are killed at the end."""
    started: list[Master] = []
    folder.mkdir()

    def start(*command: str) -> Master:
        started.append(Master(folder, (*command, "--control", str(folder / "ctl"))))
        return started[-1].wait_listening()

    try:
        yield start
    finally:
        for master in started:
            master.kill_all()


def upgrade(master: Master) -> int:
    """Upgrades a master; the process id of the old one."""
    old = master.pid
    assert master.ask("upgrade") == {"ok": True}

    def answers() -> int:
        # In its last turn the old one may still answer.
        pid: int = master.ask("status")["pid"]
        return pid if pid != old else 0

    master.pid = wait_until(answers)
    return old


def state_of(pid: int) -> str:
    """One letter, see proc(5): R, S, T (stopped), Z (zombie); "" where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    return state_of(pid) not in ("", "Z", "X")


def children(pid: int) -> dict[int, str]:
    """The child processes with their states; zombies are "Z"."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == pid:
                found[int(name)] = fields[0]
    return found


def connections_inside(pid: int, port: int) -> set[int]:
    """The clients' ports of the connections that a process has accepted: its sockets, looked up in /proc/net/tcp."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            pass
    inside = set()
    with open("/proc/net/tcp") as file:
        for line in file.readlines()[1:]:
            columns = line.split()
            if int(columns[1].split(":")[1], 16) == port and f"socket:[{columns[9]}]" in inodes:
                remote = int(columns[2].split(":")[1], 16)
                if remote:
                    inside.add(remote)
    return inside
