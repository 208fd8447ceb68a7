"""A soak test: mixed load and faults for minutes to hours, against a server process that is watched.

    python -m loadtests.soak --run-time 30m
    python -m loadtests.soak --run-time 4h --users 200 --workers 2 --out loadtests/results/soak

Clients reset connections, half-close them, are slow, leave answers unread, send nonsense; with --workers the server is
reloaded again and again. Meanwhile all other answers are checked. At the end: soak.json, soak.png, soak.svg and
server.log in --out, and exit status 1 if memory, descriptors or greenlets grew beyond a bound, or anything failed
without a cause.
"""

from __future__ import annotations

# locust replaces parts of the standard library when it is imported: before anything else.
from locust import task  # isort: skip
from locust.env import Environment  # isort: skip

import argparse
import json
import logging
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import gevent
from gevent.event import Event
from locust.event import Events
from locust.util.timespan import parse_timespan

from gtcpserver.supervisor import ask

from ..local_servers import ROOT, LocalServers, StartError
from ..tcp_user import TcpUser
from .app import EVERY, REPORT_TO
from .report import Limits, Sample, Soak, table

#: Connections of users who have left must be gone from the server after so many seconds.
DRAIN_SECONDS = 20.0

#: Old workers may cut slow requests for so long after a reload: the server's --stop-timeout, and a little.
STOP_TIMEOUT = 10.0
AFTERMATH = STOP_TIMEOUT + 5.0

LARGE = 200_000

#: Looks in a run, at least a fifth of a second apart.
SAMPLES = 600

#: A line of the server's log with one of these is an error of the run.
BAD_LEVELS = (" ERROR ", " CRITICAL ", "Traceback")


class SoakUser(TcpUser):
    """Does the next of these at random, and checks the answers."""

    request_type = "SOAK"
    timeout = 20.0
    #: Set by the run.
    watch: Watch

    def wait_time(self) -> float:
        return random.uniform(0.0, 0.05)

    def on_start(self) -> None:
        self.key = b"key-%x" % id(self)

    def exchange(self, name: str, size: int, *, connect: bool = False) -> None:
        """SET and GET in one go, so that with several workers one store answers both."""
        asked, expected = self.set_and_get(size)
        reused = self.client.socket is not None and not connect
        with self.client.request(name, connect=connect) as request:
            try:
                self.client.send(asked)
                answer = self.client.receive_exactly(len(expected))
            except ConnectionError:
                # A worker that leaves closes idle connections. One that was closed as we sent has taken nothing in, as
                # HTTP clients assume, too (RFC 9112 section 9.3.1). A new connection must never fail.
                if not (reused and self.watch.reloading() and not request.received):
                    raise
                self.watch.soak.tolerated += 1
                self.client.close()
                self.client.send(asked)
                answer = self.client.receive_exactly(len(expected))
            if answer != expected:
                raise AssertionError("the answer is not what was stored")

    def set_and_get(self, size: int) -> tuple[bytes, bytes]:
        value = random.randbytes(size)
        return (
            b"SET %b %d\n%b\nGET %b\n" % (self.key, size, value, self.key),
            b"OK\nVALUE %d\n%b\n" % (size, value),
        )

    # -- what must work ----------------------------------------------------------------------------------------------

    @task(40)
    def small(self) -> None:
        self.exchange("small", random.randrange(1, 200))

    @task(10)
    def new_connection(self) -> None:
        self.exchange("new connection", 100, connect=True)
        self.client.close()

    @task(3)
    def large(self) -> None:
        self.exchange("large", LARGE)

    @task(3)
    def half_close(self) -> None:
        asked, expected = self.set_and_get(1000)
        with self.client.request("half-closed", connect=True):
            self.client.send(asked)
            self.client.half_close()
            answer = self.client.receive_to_end()
            if answer != expected:
                what = "the whole answer" if expected.startswith(answer) else "what was stored"
                raise AssertionError(f"a client that half-closes does not get {what}")

    @task(2)
    def slow(self) -> None:
        """Bytes drip in, and the answer is read in pieces. A reload may cut this short: half a request is none."""
        asked, expected = self.set_and_get(200)
        self.client.close()
        with self.client.request("slow", connect=True) as request:
            answer = b""
            try:
                for begin in range(0, len(asked), 32):
                    self.client.send(asked[begin : begin + 32])
                    request.sleep(0.03)
                while len(answer) < len(expected):
                    answer += self.client.receive(32)
                    request.sleep(0.01)
            except ConnectionError:
                if not self.watch.reloading():
                    raise
                self.watch.soak.tolerated += 1
                self.client.close()
                return
            if answer != expected:
                raise AssertionError("a slow client does not get what was stored")

    @task(2)
    def nonsense(self) -> None:
        with self.client.request("nonsense", connect=True):
            self.client.send(random.choice([b"PUT x 1\n", b"SET x -1\n", b"\x00" * 50 + b"\n", b"GET " + b"x" * 300]))
            answer = self.client.receive_to_end()
            if not answer and self.watch.reloading():
                self.watch.soak.tolerated += 1  # some of it is half a line, and that is no request
            elif not answer.startswith(b"ERROR "):
                raise AssertionError("nonsense is not answered by ERROR")

    # -- faults of clients, of which the server must only recover ------------------------------------------------------

    @task(3)
    def reset_at_once(self) -> None:
        self.client.close()
        self.client.connect()
        self.client.reset()

    @task(3)
    def reset_in_request(self) -> None:
        asked, _ = self.set_and_get(1000)
        self._send_unreported(asked[: random.randrange(1, len(asked))])
        self.client.reset()

    @task(3)
    def unread(self) -> None:
        """Asks for much, does not read it, and leaves: with a reset, or in order."""
        asked, _ = self.set_and_get(LARGE)
        self._send_unreported(asked + asked[asked.rindex(b"GET ") :] * 20)
        gevent.sleep(random.uniform(0.0, 0.5))
        random.choice([self.client.reset, self.client.close])()

    @task(2)
    def silent(self) -> None:
        self.client.close()
        self.client.connect()
        gevent.sleep(random.uniform(0.0, 1.0))
        self.client.close()

    def _send_unreported(self, data: bytes) -> None:
        """On a new connection; the server may close before it has all."""
        self.client.close()
        self.client.connect()
        self.client.socket.settimeout(self.timeout)
        try:
            self.client.socket.sendall(data)
        except OSError:
            pass


class Watch:
    """The server, the load, and a look at both from time to time.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.soak = Soak(
            options={name: value for name, value in vars(options).items() if name != "out"},
            machine=machine(),
            limits=Limits(options.max_memory_growth, options.max_descriptor_growth, options.max_greenlet_growth),
        )
        self.over = Event()
        self._folder = tempfile.TemporaryDirectory(prefix="gtcpserver-soak-")
        self._reports: dict[int, dict[str, Any]] = {}
        self._last_reload = float("-inf")
        self._began = 0.0
        self._every = max(0.2, options.run_time / SAMPLES)
        self._times: list[float] = []  # of the requests since the last look, ms; locust's own are rounded to whole ones
        self._environment = Environment(user_classes=[SoakUser], events=Events())
        self._environment.events.request.add_listener(lambda response_time, **_: self._times.append(response_time))
        self._servers = LocalServers(str(options.out))
        SoakUser.watch = self

    def reloading(self) -> bool:
        """Whether a worker may be on its way out."""
        return time.monotonic() - self._last_reload < AFTERMATH

    # -- the run, in order -------------------------------------------------------------------------------------------

    def run(self) -> Soak:
        """
        Raises:
            StartError: the server did not start.
        """
        with self._folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reports:
            path = f"{self._folder.name}/reports"
            reports.bind(path)
            os.environ[REPORT_TO], os.environ[EVERY] = path, str(min(1.0, self._every / 2))
            receiver = gevent.spawn(self._receive, reports)
            try:
                SoakUser.host = self._start_server()
                self._load()
                self._look_at_the_end()
            finally:
                receiver.kill()
                self._stop_server()
        return self.soak

    def _start_server(self) -> str:
        command = ["-m", "gtcpserver", "serve", self.options.handler, "--bind", "127.0.0.1:0"]
        command += ["--stop-timeout", str(STOP_TIMEOUT)]
        if self.options.workers:
            command += ["--workers", str(self.options.workers), "--control", self._control]
        address = self._servers.start("server", *command)
        self._wait(10.0, lambda: len(self._reports) >= max(1, self.options.workers))
        self.soak.before = self._sample()
        return address

    @property
    def _control(self) -> str:
        return f"{self._folder.name}/control"

    def _load(self) -> None:
        runner = self._environment.create_local_runner()
        # All at once: the early part of the run is compared with its end.
        runner.start(self.options.users, spawn_rate=self.options.users)
        self._began = time.monotonic()
        helpers = [gevent.spawn(self._look_for_ever)]
        if self.options.workers:
            helpers.append(gevent.spawn(self._reload_for_ever))
        self.over.wait(self.options.run_time)
        gevent.killall(helpers)
        progress("")
        self.soak.samples.append(self._sample())
        runner.stop()
        self._sum_up()
        runner.quit()

    def _look_for_ever(self) -> None:
        while True:
            gevent.sleep(self._every)
            sample = self._sample()
            self.soak.samples.append(sample)
            progress(
                f"{sample.at:,.0f} of {self.options.run_time:,} s: {sample.requests:,} requests, "
                f"{sample.failures} failed, {sample.memory:.0f} MiB, {sample.descriptors} descriptors, "
                f"{sample.greenlets} greenlets"
            )
            if self._server.poll() is not None:
                self.soak.errors.append(f"the server ended under load, exit status {self._server.returncode}")
                self.over.set()

    def _reload_for_ever(self) -> None:
        # Some in any run, and time in between for the old workers to leave.
        while True:
            gevent.sleep(self.options.reload_every)
            self.soak.reloads.append(time.monotonic() - self._began)
            self._last_reload = time.monotonic() + STOP_TIMEOUT  # until it is done it may begin any time
            try:
                ask(self._control, {"command": "reload"}, timeout=60)
            except Exception as problem:
                self.soak.errors.append(f"a reload failed: {problem}")
            self._last_reload = time.monotonic()

    def _look_at_the_end(self) -> None:
        def quiet() -> bool:
            self.soak.after = self._sample()
            return not self.soak.after.connections

        # The workers report what they had a moment ago: one report after the users have left, at least.
        gevent.sleep(2 * min(1.0, self._every / 2))
        self._wait(DRAIN_SECONDS, quiet)

    def _stop_server(self) -> None:
        ended = self._server.poll() is not None  # told already
        status = self._servers.stop()["server"]
        if status != 0 and not ended:
            self.soak.errors.append(f"the server ended with exit status {status} after SIGTERM")
        log = self._servers.log_of("server").splitlines()
        bad = [line for line in log if any(level in line for level in BAD_LEVELS)]
        if bad:
            self.soak.errors.append(f"{len(bad)} errors in the server's log, server.log, first: {bad[0][:200]}")

    # -- figures -----------------------------------------------------------------------------------------------------

    def _receive(self, reports: socket.socket) -> None:
        while True:
            report = json.loads(reports.recv(65536))
            self._reports[report["pid"]] = report

    @property
    def _server(self) -> Any:
        return self._servers.processes["server"]

    def _sample(self) -> Sample:
        pids = family(self._server.pid)
        living = [report for pid, report in self._reports.items() if pid in pids]
        stats = self._environment.stats.total
        times, self._times = sorted(self._times), []
        return Sample(
            at=time.monotonic() - self._began if self._began else 0.0,
            processes=len(pids),
            memory=sum(map(memory_of, pids)),
            descriptors=sum(map(descriptors_of, pids)),
            greenlets=sum(report["greenlets"] for report in living),
            connections=sum(report["counters"]["active"] + report["counters"]["lingering"] for report in living),
            users=self._environment.runner.user_count if self._environment.runner else 0,
            requests=stats.num_requests,
            failures=stats.num_failures,
            p50=times[len(times) // 2] if times else 0.0,
            p99=times[int(len(times) * 0.99)] if times else 0.0,
        )

    def _sum_up(self) -> None:
        runner = self._environment.runner
        for (name, _), entry in self._environment.stats.entries.items():
            self.soak.requests[name] = {
                "count": entry.num_requests,
                "failures": entry.num_failures,
                "p50": entry.get_response_time_percentile(0.5),
                "p99": entry.get_response_time_percentile(0.99),
                "max": float(entry.max_response_time),
            }
        for error in self._environment.stats.errors.values():
            self.soak.errors.append(f"{error.occurrences} times {error.name}: {error.error}")
        for fault in runner.exceptions.values() if runner else ():
            self.soak.errors.append(f"{fault['count']} times in the test itself: {fault['msg']}")
        for report in self._reports.values():
            for name, value in report["counters"].items():
                self.soak.counters[name] = self.soak.counters.get(name, 0) + value

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + seconds
        while not condition() and time.monotonic() < give_up and self._server.poll() is None:
            gevent.sleep(0.05)


def family(pid: int) -> set[int]:
    """A process and its children: a master and its workers. One that has just gone is left out."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return set()
    return {pid, *map(int, children)}


def memory_of(pid: int) -> float:
    """Resident MiB, proc(5); 0 for a process that has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / (1 << 20)
    except (OSError, IndexError):
        return 0.0


def descriptors_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


PAGE = os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("gevent", "greenlet", "locust")}
    return {
        "cpus": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
    }


_told = -60.0


def progress(text: str) -> None:
    """One line that changes on a terminal, a line a minute elsewhere; "" ends it."""
    global _told
    if sys.stderr.isatty():
        print(f"\r{text:110}" + ("" if text else "\r"), end="", file=sys.stderr, flush=True)
    elif text and time.monotonic() - _told >= 60:
        _told = time.monotonic()
        print(text, file=sys.stderr, flush=True)


# -- the command line --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line: what is wrong is not lost below a screen of usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def seconds(text: str) -> int:
    try:
        value = int(parse_timespan(text))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 30m or 4h, got {text!r}")
    return value


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, got {text!r}")
        return int(text)

    return number


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m loadtests.soak", description="A soak test.")
    parser.add_argument("--run-time", type=seconds, default="10m", metavar="TIME", help="such as 90s, 30m, 4h")
    parser.add_argument("--users", type=whole(1), default=50, metavar="N", help="clients at a time (default: 50)")
    parser.add_argument("--workers", type=whole(0), default=0, metavar="N", help="worker processes, reloaded in turn")
    parser.add_argument("--reload-every", type=seconds, metavar="TIME", help="(default: a tenth of the run)")
    parser.add_argument("--out", type=Path, default=ROOT / "loadtests/results/soak", metavar="FOLDER")
    parser.add_argument("--max-memory-growth", type=whole(0), default=int(Limits.memory), metavar="MIB")
    parser.add_argument("--max-descriptor-growth", type=whole(0), default=Limits.descriptors, metavar="N")
    parser.add_argument("--max-greenlet-growth", type=whole(0), default=Limits.greenlets, metavar="N")
    parser.add_argument(
        "--handler",
        default="loadtests.soak.app:handle",
        metavar="MODULE:NAME",
        help="what to test instead: it must speak the protocol of examples/line_protocol.py and import "
        "loadtests.soak.app, which reports how the process is",
    )
    options = parser.parse_args(arguments)
    options.reload_every = options.reload_every or max(1.0, options.run_time / 10)
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # not after four hours
    except OSError as problem:
        parser.error(f"--out: {problem}")
    # locust's own notes; what goes wrong is in its statistics, and told at the end.
    logging.getLogger("locust").setLevel(logging.CRITICAL)
    watch = Watch(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        gevent.signal_handler(number, watch.over.set)
    try:
        soak = watch.run()
    except StartError as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    faults = soak.judge()
    print(table(soak))
    for path in soak.write(options.out):
        print(f"wrote {path}")
    for fault in faults:
        print(f"FAILED: {fault}")
    if not faults:
        print("passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
