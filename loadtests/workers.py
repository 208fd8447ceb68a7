"""Two worker processes against one: throughput, and CPU a request.

    python -m loadtests.workers [--rounds N] [--seconds N]

The handler computes for 0.15 ms a request, so that the load generator, which shares the CPUs with two workers, needs a
few per cent of them; its share is printed. One worker and two take turns.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .measure import REPORT_SCRIPT, START_TIMEOUT, BenchError, cpu_seconds, need_wrk, read_report


@contextmanager
def serving(workers: int) -> Iterator[tuple[int, list[int]]]:
    """Yields the port and the process ids of the workers."""
    command = [sys.executable, "-m", "gtcpserver", "serve", "loadtests/peers/heavy.py:handle", "--bind", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=Path(__file__).resolve().parent.parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        pids: list[int] = []
        give_up = time.monotonic() + START_TIMEOUT
        for line in process.stderr:
            if found := re.search(r"worker \d+ \(pid (\d+)\) is ready", line):
                pids.append(int(found[1]))
            elif found := re.search(r"listening on .*:(\d+) ", line):
                yield int(found[1]), pids
                return
            if time.monotonic() > give_up:
                break
        raise BenchError("the server did not start")
    finally:
        process.terminate()
        process.communicate()


def run(workers: int, seconds: int) -> tuple[float, float, float]:
    """(requests a second, CPU us a request of all workers, the client's share of all CPUs)."""
    with serving(workers) as (port, pids):
        command = ["wrk", "-t1", "-c64", "-s", str(REPORT_SCRIPT), f"http://127.0.0.1:{port}/"]
        subprocess.run([*command, "-d1"], capture_output=True, check=True)
        before, began = sum(sum(cpu_seconds(pid)) for pid in pids), time.monotonic()
        client_before = os.times()
        done = subprocess.run([*command, f"-d{seconds}"], capture_output=True, text=True, check=True)
        used = sum(sum(cpu_seconds(pid)) for pid in pids) - before
        took = time.monotonic() - began
        client_after = os.times()
    report = read_report(done.stdout)
    if not report.requests or report.errors:
        raise BenchError(f"wrk: {done.stdout}")
    client = (
        client_after.children_user
        - client_before.children_user
        + client_after.children_system
        - client_before.children_system
    )
    return report.requests / took, used / report.requests * 1e6, client / took / (os.cpu_count() or 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.workers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be 1 or more")
    need_wrk()
    found: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    try:
        for number in range(options.rounds):
            for workers in (1, 2) if number % 2 else (2, 1):
                found[workers].append(run(workers, options.seconds))
    except (BenchError, OSError, subprocess.CalledProcessError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    print("| workers | requests/s | CPU us a request | the client's share of the CPUs |\n| ---: | ---: | ---: | ---: |")
    for workers, runs in found.items():
        rate, cpu, client = (statistics.median(figures) for figures in zip(*runs, strict=True))
        print(f"| {workers} | {rate:,.0f} | {cpu:.1f} | {client:.0%} |")
    pairs = list(zip(found[2], found[1], strict=True))
    rate = statistics.median(two[0] / one[0] for two, one in pairs)
    cpu = statistics.median(two[1] / one[1] for two, one in pairs)
    print(f"\ntwo workers: {rate:.2f} of the throughput of one, {cpu:.2f} of its CPU a request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
