"""A run of a soak test: the server, the load, and a look at both from time to time."""

from __future__ import annotations

# locust replaces parts of the standard library when it is imported: before anything else.
from locust.env import Environment  # isort: skip

import argparse
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust.event import Events

from gtcpserver.supervisor import ask

from ..local_servers import LocalServers
from .app import EVERY, REPORT_TO
from .report import Limits, Sample, Soak
from .user import STOP_TIMEOUT, Reloads, SoakUser

#: Connections of users who have left must be gone from the server after so many seconds.
DRAIN_SECONDS = 20.0

#: Looks in a run, at least a fifth of a second apart.
SAMPLES = 600

#: A line of the server's log with one of these is an error of the run.
BAD_LEVELS = (" ERROR ", " CRITICAL ", "Traceback")


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
        self._reloads = Reloads()
        self._began = 0.0
        self._every = max(0.2, options.run_time / SAMPLES)
        self._times: list[float] = []  # of the requests since the last look, ms; locust's own are rounded to whole ones
        self._environment = Environment(user_classes=[SoakUser], events=Events())
        self._environment.events.request.add_listener(lambda response_time, **_: self._times.append(response_time))
        self._servers = LocalServers(str(options.out))
        SoakUser.reloads = self._reloads

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
            self._reloads.begin()
            try:
                ask(self._control, {"command": "reload"}, timeout=60)
            except Exception as problem:
                self.soak.errors.append(f"a reload failed: {problem}")
            self._reloads.done()

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
        self.soak.tolerated = self._reloads.tolerated
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
