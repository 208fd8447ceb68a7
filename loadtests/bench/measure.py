"""Loading a server and reading what it cost: server CPU us a request, as the kernel accounts it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = CPUS[0], CPUS[min(1, len(CPUS) - 1)]


class BenchError(Exception):
    """A measurement that cannot be made; the message says why."""


class NoAnswer(BenchError):
    """Not one request was answered while it was measured."""


@dataclass(frozen=True)
class Run:
    """One run of one server.

    Attributes:
        user, system: server CPU us a request.
        rate: requests a second.
        p50, p99, p999: latency, ms.
        errors: requests that failed.
        busy: share of its CPUs that the server used.
        client: share of its CPU that wrk used, which has one thread.
    """

    user: float
    system: float
    rate: float
    p50: float
    p99: float
    p999: float
    errors: int
    busy: float
    client: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


@dataclass(frozen=True)
class Listening:
    """A server that runs; `pid` is its session as well."""

    pid: int
    host: str
    port: int


def read_address(line: str) -> tuple[str, int] | None:
    """Of "listening on HOST:PORT"."""
    found = re.search(r"listening on (\[[^]]+\]|[^\s:]+):(\d+)", line)
    return None if found is None else (found[1], int(found[2]))


def prepare(cpus: int | set[int]) -> Callable[[], None]:
    """What a child process does first: stay on its CPUs, and allow itself as many descriptors as it may."""

    def prepare() -> None:
        os.sched_setaffinity(0, {cpus} if isinstance(cpus, int) else cpus)
        allow_descriptors()

    return prepare


def allow_descriptors() -> int:
    """Raise the soft limit of open descriptors to the hard one, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process and its children that have ended; /proc/PID/stat, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    user, system, of_children_user, of_children_system = map(int, fields[11:15])
    return (user + of_children_user) / TICK, (system + of_children_system) / TICK


def processes(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                found.append(int(name))
    return found


def cpu_of_session(session: int) -> tuple[float, float]:
    """User and system time of all processes of a session."""
    times = []
    for pid in processes(session):
        try:
            times.append(cpu_seconds(pid))
        except OSError:
            continue  # it has just ended, and is in its parent's account
    return sum(user for user, _ in times), sum(system for _, system in times)


def kill_all(session: int) -> None:
    """End all processes of a session."""
    for pid in processes(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def memory_kib(pid: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def wrk(server: Listening, seconds: int, clients: int, tls: bool = False, path: str = "/") -> list[str]:
    """wrk's command: one thread, and its words as report.lua has them."""
    url = f"{'https' if tls else 'http'}://{server.host}:{server.port}{path}"
    return ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout", "10", "-s", str(REPORT_SCRIPT), url]


def load(server: Listening, seconds: int, clients: int, tls: bool = False, path: str = "/", cpus: int = 1) -> Run:
    """Let wrk load the server and read both accounts.

    Args:
        cpus: that the server may use.

    Raises:
        NoAnswer: not one request was answered.
        BenchError: the server is no session of its own, or has ended.
    """
    before, began = cpu_of_session(server.pid), time.monotonic()
    with subprocess.Popen(
        wrk(server, seconds, clients, tls, path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=prepare(CLIENT_CPU),
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    after, ended = cpu_of_session(server.pid), time.monotonic()
    report = read_report(said)
    if not report.requests:
        why = next((line for line in said.splitlines() if line.startswith("unable")), "")
        raise NoAnswer(f"no answer to {clients} clients within {seconds} s {why}".strip())
    took = ended - began
    if sum(after) <= sum(before):
        raise BenchError(f"no CPU time in the account of the server's session {server.pid}")
    return Run(
        user=(after[0] - before[0]) / report.requests * 1e6,
        system=(after[1] - before[1]) / report.requests * 1e6,
        rate=report.requests / took,
        p50=report.p50,
        p99=report.p99,
        p999=report.p999,
        errors=report.errors,
        busy=(sum(after) - sum(before)) / took / cpus,
        client=(usage.ru_utime + usage.ru_stime) / took,
    )


def warm_up(server: Listening, clients: int, tls: bool = False) -> None:
    """Some requests on as many connections as are measured then, which is not counted."""
    seconds = 0.4 + clients / (1500 if tls else 5000)
    with subprocess.Popen(
        wrk(server, 60, clients, tls),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=prepare(CLIENT_CPU),
    ) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends as if its time were over


REPORT_SCRIPT = Path(__file__).with_name("report.lua")


@dataclass(frozen=True)
class Report:
    """What wrk said: latency in ms; errors are those of sockets, timeouts, and answers other than 2xx and 3xx."""

    requests: int
    p50: float
    p99: float
    p999: float
    errors: int


def read_report(text: str) -> Report:
    """Read what report.lua has written; 0 where nothing was."""
    found = re.search(r"^JSON (.*)$", text, re.MULTILINE)
    said = json.loads(found[1]) if found else {}
    return Report(
        requests=said.get("requests", 0),
        p50=said.get("p50", 0) / 1000,
        p99=said.get("p99", 0) / 1000,
        p999=said.get("p999", 0) / 1000,
        errors=sum(said.get(kind, 0) for kind in ("connect", "read", "write", "status", "timeout")),
    )
