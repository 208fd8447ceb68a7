"""Starting a server, loading it, and reading what it cost: server CPU us a request, as the kernel accounts it."""

from __future__ import annotations

import os
import random
import re
import resource
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICK = os.sysconf("SC_CLK_TCK")
CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = CPUS[0], CPUS[min(1, len(CPUS) - 1)]

#: Seconds for a server to say that it listens: an import of everything takes 0.3 s on an idle machine.
START_TIMEOUT = 20.0


class BenchError(Exception):
    """A measurement that cannot be made; the message says why."""


@dataclass(frozen=True)
class Run:
    """One run of one server.

    Attributes:
        user, system: server CPU us a request.
        rate: requests a second.
        p50, p99: latency, ms.
        errors: requests that failed.
        busy: share of its CPU that the server used; below 0.9 the client was the limit.
    """

    user: float
    system: float
    rate: float
    p50: float
    p99: float
    errors: int
    busy: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


@dataclass(frozen=True)
class Listening:
    pid: int
    host: str
    port: int


@contextmanager
def serving(command: list[str]) -> Iterator[Listening]:
    """Run a server pinned to its CPU; it must print "listening on HOST:PORT".

    Raises:
        BenchError: it says something else, or nothing in START_TIMEOUT.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepare(SERVER_CPU),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
        line = process.stdout.readline() if ready else "nothing said"
        found = re.search(r"listening on (.*):(\d+)", line)
        if found is None:
            raise BenchError(f"{' '.join(command)} did not start: {line!r}")
        yield Listening(process.pid, found[1], int(found[2]))
    finally:
        process.kill()
        process.wait()


def prepare(cpu: int) -> Callable[[], None]:
    """What a child process does first: stay on one CPU, and allow itself as many descriptors as it may."""

    def prepare() -> None:
        os.sched_setaffinity(0, {cpu})
        allow_descriptors()

    return prepare


def allow_descriptors() -> int:
    """Raise the soft limit of open descriptors to the hard one, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def cpu_seconds(pid: int) -> tuple[float, float]:
    """User and system time of a process; /proc/PID/stat, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) / TICK, int(fields[12]) / TICK


def memory_kib(pid: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def load(server: Listening, seconds: int, clients: int, tls: bool = False, path: str = "/") -> Run:
    """Let wrk load the server and read both accounts."""
    scheme = "https" if tls else "http"
    url = f"{scheme}://{server.host}:{server.port}{path}"
    before, began = cpu_seconds(server.pid), time.monotonic()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--latency", url],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=prepare(CLIENT_CPU),
    )
    after, ended = cpu_seconds(server.pid), time.monotonic()
    report = read_report(done.stdout)
    if not report.requests:
        raise BenchError(f"wrk measured nothing: {done.stdout}{done.stderr}")
    used = sum(after) - sum(before)
    return Run(
        user=(after[0] - before[0]) / report.requests * 1e6,
        system=(after[1] - before[1]) / report.requests * 1e6,
        rate=report.requests / (ended - began),
        p50=report.p50,
        p99=report.p99,
        errors=report.errors,
        busy=used / (ended - began),
    )


@dataclass(frozen=True)
class Report:
    """What wrk said: latency in ms; errors are those of sockets, time-outs, and answers other than 2xx and 3xx."""

    requests: int
    p50: float
    p99: float
    errors: int


def read_report(text: str) -> Report:
    """Read wrk's output; 0 for what it does not say."""
    total = re.search(r"(\d+) requests in", text)
    failed = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    not_200 = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return Report(
        requests=int(total[1]) if total else 0,
        p50=_milliseconds(text, "50%"),
        p99=_milliseconds(text, "99%"),
        errors=sum(map(int, failed.groups() if failed else ())) + (int(not_200[1]) if not_200 else 0),
    )


def _milliseconds(text: str, percentile: str) -> float:
    found = re.search(rf"^ +{percentile} +([\d.]+)(us|ms|s|m) *$", text, re.MULTILINE)
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}[found[2]] if found else 0.0


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def answer_of(server: Listening, tls: bool = False) -> bytes:
    """One answer, for the check that all servers send the same; with TLS, behind the version and cipher agreed on."""
    sock = socket.create_connection((server.host, server.port), timeout=10)
    agreed = b""
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = context.wrap_socket(sock)
        agreed = repr(sock.cipher()).encode() + b" "
    with sock:
        sock.sendall(REQUEST)
        answer = b""
        while True:
            head, found, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            if found and length and len(body) >= int(length[1]):
                return agreed + answer
            more = sock.recv(65536)
            if not more:
                raise BenchError(f"the server closed after {answer!r}")
            answer += more


def idle_memory(server: Listening, connections: int) -> float:
    """KiB of server memory for each of many idle keep-alive connections which were served one request."""
    limit = allow_descriptors()
    if limit < connections + 100:
        raise BenchError(
            f"{connections} connections need {connections + 100} descriptors, the limit is {limit}: ulimit -n"
        )
    answer_of(server)
    time.sleep(0.5)
    before = memory_kib(server.pid)
    socks = []
    try:
        for number in range(connections):
            sock = socket.socket()
            # Many source addresses: ports that were used a minute ago are still in TIME-WAIT.
            sock.bind((f"127.0.{random.randrange(256)}.{2 + number % 250}", 0))
            sock.connect((server.host, server.port))
            socks.append(sock)
        for sock in socks:
            sock.sendall(REQUEST)
        for sock in socks:
            if not sock.recv(65536):
                raise BenchError("the server closed an idle connection")
        time.sleep(0.5)
        return (memory_kib(server.pid) - before) / connections
    finally:
        for sock in socks:
            sock.close()


def need_wrk() -> None:
    """Exit unless wrk is there."""
    try:
        subprocess.run(["wrk", "-v"], capture_output=True, check=False)
    except FileNotFoundError:
        print("the benchmarks need wrk: apt-get install wrk", file=sys.stderr)
        sys.exit(2)
