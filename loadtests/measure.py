"""Starting a server, loading it, and reading what it cost: server CPU us a request, as the kernel accounts it."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import selectors
import signal
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
        busy: share of its CPU that the server used; below 0.9 the client was the limit.
    """

    user: float
    system: float
    rate: float
    p50: float
    p99: float
    p999: float
    errors: int
    busy: float

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


def load(server: Listening, seconds: int, clients: int, tls: bool = False, path: str = "/", cpus: int = 1) -> Run:
    """Let wrk load the server and read both accounts.

    Args:
        cpus: that the server may use.
    """
    scheme = "https" if tls else "http"
    url = f"{scheme}://{server.host}:{server.port}{path}"
    before, began = cpu_of_session(server.pid), time.monotonic()
    done = subprocess.run(
        ["wrk", "-t1", f"-c{clients}", f"-d{seconds}", "--timeout", "10", "-s", str(REPORT_SCRIPT), url],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=prepare(CLIENT_CPU),
    )
    after, ended = cpu_of_session(server.pid), time.monotonic()
    report = read_report(done.stdout)
    if not report.requests:
        raise NoAnswer(f"no answer to {clients} clients within {seconds} s {done.stderr}".strip())
    used = sum(after) - sum(before)
    return Run(
        user=(after[0] - before[0]) / report.requests * 1e6,
        system=(after[1] - before[1]) / report.requests * 1e6,
        rate=report.requests / (ended - began),
        p50=report.p50,
        p99=report.p99,
        p999=report.p999,
        errors=report.errors,
        busy=used / (ended - began) / cpus,
    )


REPORT_SCRIPT = ROOT / "loadtests" / "report.lua"


@dataclass(frozen=True)
class Report:
    """What wrk said: latency in ms; errors are those of sockets, time-outs, and answers other than 2xx and 3xx."""

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


#: An answer of a server that is compared, bytes; the scenarios' longest has 16 kB.
LONGEST_ANSWER = 1 << 20

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
        give_up = time.monotonic() + 10
        while True:
            if len(answer) > LONGEST_ANSWER or time.monotonic() > give_up:
                raise BenchError(f"the answer does not end, it begins {answer[:100]!r}")
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
    answer_of(server)
    time.sleep(0.5)
    before = memory_kib(server.pid)
    with idle_connections(server, connections):
        time.sleep(0.5)
        return (memory_kib(server.pid) - before) / connections


@contextmanager
def idle_connections(server: Listening, connections: int) -> Iterator[None]:
    """So many keep-alive connections that have been served one request."""
    limit = allow_descriptors()
    if limit < connections + 100:
        raise BenchError(
            f"{connections} connections need {connections + 100} descriptors, the limit is {limit}: ulimit -n"
        )
    socks = []
    try:
        for number in range(connections):
            socks.append(_connect(server, number))
        for sock in socks:
            sock.sendall(REQUEST)
        for sock in socks:
            if not sock.recv(65536):
                raise BenchError("the server closed an idle connection")
        yield
    finally:
        for sock in socks:
            sock.close()


def _connect(server: Listening, number: int) -> socket.socket:
    sock = socket.socket()
    # Many source addresses: ports that were used a minute ago are still in TIME-WAIT.
    sock.bind((f"127.0.{random.randrange(256)}.{2 + number % 250}", 0))
    sock.connect((server.host, server.port))
    return sock


def first_bytes(server: Listening, beside: int, times: int) -> list[float]:
    """Milliseconds until the first byte of an answer came, each on a new connection, beside so many idle ones."""
    found = []
    with idle_connections(server, beside):
        for number in range(times):
            began = time.perf_counter()
            with _connect(server, number) as sock:
                sock.sendall(REQUEST)
                if not sock.recv(1):
                    raise BenchError("the server closed without an answer")
                found.append((time.perf_counter() - began) * 1000)
    return sorted(found)


def crowd(server: Listening, number: int) -> float:
    """Connections a second of a crowd that comes all at once to a server that has just started, up to the answers."""
    allow_descriptors()
    socks = [socket.socket() for _ in range(number)]
    try:
        began = time.perf_counter()
        for place, sock in enumerate(socks):
            sock.bind((f"127.0.{random.randrange(256)}.{2 + place % 250}", 0))
            sock.setblocking(False)
            sock.connect_ex((server.host, server.port))
        left = set(socks)
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                selector.register(sock, selectors.EVENT_WRITE)
            while left:
                ready = selector.select(20)
                if not ready:
                    raise BenchError(f"{len(left)} of {number} connections were not answered in 20 seconds")
                for key, events in ready:
                    sock = key.fileobj  # type: ignore[assignment]
                    if events & selectors.EVENT_WRITE:
                        sock.send(REQUEST)
                        selector.modify(sock, selectors.EVENT_READ)
                    else:
                        if not sock.recv(65536):
                            raise BenchError("the server closed without an answer")
                        selector.unregister(sock)
                        left.discard(sock)
        return number / (time.perf_counter() - began)
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
