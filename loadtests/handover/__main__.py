"""What it costs to move connections to another worker, and what clients notice.

    python -m loadtests.handover
    python -m loadtests.handover --connections 10000 --asking 200 --json

One worker has the connections. It is reloaded twice: first all of them are silent, for wall and CPU time; then some ask
again and again, for the latency of a request that comes meanwhile. Before and after, every connection is asked, and
every answer checked. Exit status 1 if a figure exceeds its limit, or anything is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gtcpserver.supervisor import ask

from ..local_servers import LocalServers
from .clients import Client, ClientError, ask_all, ask_for, connect

#: Seconds between readiness of the new worker and the move: its start is not counted.
PROBATION = 1.5

#: Seconds between an answer and the next request of a connection that asks.
PAUSE = 0.1

#: Largest wall time in seconds, for 10,000 connections; CPU time in microseconds a connection, in both workers
#: together; and seconds that a move adds to the 99th percentile of a request's latency.
LIMITS = {"wall_seconds": 2.0, "cpu_us": 60.0, "added_latency_p99": 0.05}


def cpu_of(pid: int) -> float | None:
    """Return the seconds of CPU of a process with one thread; None if there is none. (proc(5): in nanoseconds)"""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return None


class Service:
    """A master with one worker, which hands over."""

    def __init__(self, servers: LocalServers) -> None:
        self.control = str(servers.log_folder / "control")
        arguments = ("--workers", "1", "--handover", "--probation", str(PROBATION), "--pool", "none")
        handler = "loadtests.handover.app:handle"
        host, _, port = servers.start(
            *("server", "-m", "gtcpserver", "serve", handler, "--bind", "127.0.0.1:0"),
            *("--control", self.control, "--max-connections", "none", *arguments),
        ).rpartition(":")
        self.address = host, int(port)

    def pids(self) -> list[int]:
        return [one["pid"] for one in ask(self.control, {"command": "status"}, 10.0)["workers"]]

    def reload(self) -> dict[str, float]:
        """Reload, and return wall and CPU seconds of the move."""
        (old,) = self.pids()
        answer: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: answer.update(ask(self.control, {"command": "reload"}, 120.0)))
        thread.start()
        while len(pids := self.pids()) < 2:
            time.sleep(0.05)
        (new,) = (pid for pid in pids if pid != old)
        time.sleep(PROBATION / 2)  # it has started
        first_old, first_new = cpu_of(old) or 0.0, cpu_of(new) or 0.0
        began, idle, last_old = 0.0, first_old, first_old
        while os.path.exists(f"/proc/{old}"):
            now = cpu_of(old)
            # A beat takes a tenth of a millisecond: more is the move.
            if not began and now is not None and now - idle > 0.002:
                began = time.monotonic()
            idle, last_old = (now if now is not None else idle), (now or last_old)
            time.sleep(0.002)
        wall = time.monotonic() - began if began else 0.0
        cpu = last_old - first_old + (cpu_of(new) or 0.0) - first_new
        thread.join()
        return {"wall_seconds": wall, "cpu_seconds": cpu, "moved": answer.get("moved", 0)}


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def measure(connections: int, asking: int) -> dict[str, float]:
    """Run both reloads; return the figures.

    Raises:
        ClientError: an answer is wrong or missing.
    """
    servers = LocalServers()
    try:
        service = Service(servers)
        clients = connect(service.address, connections)
        figures = service.reload()
        if figures["moved"] != connections:
            raise ClientError(f"{figures['moved']} of {connections} connections moved")
        figures["cpu_us"] = figures.pop("cpu_seconds") / connections * 1e6
        ask_all(clients)
        figures |= latencies(service, clients[:asking])
        ask_all(clients)
        return figures
    finally:
        servers.stop()


def latencies(service: Service, asking: list[Client]) -> dict[str, float]:
    """Return the 99th percentile of latency in seconds, without a move and during one."""
    quiet = ask_for(asking, 2.0, PAUSE, [False])
    ended = [False]

    def reload() -> None:
        try:
            service.reload()
        finally:
            ended[0] = True

    thread = threading.Thread(target=reload)
    thread.start()
    found = ask_for(asking, 60.0, PAUSE, ended)
    thread.join()
    until = max(at for at, _ in found)
    moving = [seconds for at, seconds in found if at > until - 2.0]  # the move is at the end
    before, during = percentile([seconds for _, seconds in quiet], 0.99), percentile(moving, 0.99)
    return {
        "latency_p99": before,
        "latency_p99_moving": during,
        "added_latency_p99": max(0.0, during - before),
        "latency_max_moving": max(moving),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.handover", description="A benchmark of handovers.")
    parser.add_argument("--connections", type=int, default=10_000, metavar="N")
    parser.add_argument("--asking", type=int, default=200, metavar="N", help="connections that ask during a move")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if not 1 <= options.asking <= options.connections:
        parser.error("--asking must be from 1 to --connections")
    try:
        figures = measure(options.connections, options.asking)
    except ClientError as error:
        print(f"loadtests.handover: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            limit = f"  (at most {LIMITS[name]:g})" if name in LIMITS else ""
            print(f"{name:20} {value:10.4f}{limit}")
    # CPU time on a busy machine says more than wall time, and both say less than on an idle one.
    return int(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
