"""What a monitor costs: server CPU of a request with --metrics, scraped every second, against without, in turn.

    python -m loadtests.monitoring [--rounds N] [--seconds N] [--clients N]

The handler does next to nothing, so the ratio is the worst there is. The CPU time is that of the server's process,
which answers the scrapes as well.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from .machine import need
from .measure import (
    CLIENT_CPU,
    REPORT_SCRIPT,
    ROOT,
    SERVER_CPU,
    START_TIMEOUT,
    BenchError,
    cpu_seconds,
    prepare,
    read_report,
)

SCRAPE_SECONDS = 1.0


@contextmanager
def serving(metrics: bool) -> Iterator[tuple[int, int, str]]:
    """Yields port, process id, and where the metrics are ("" for nowhere)."""
    command = [sys.executable, "-m", "gtcpserver", "serve", "loadtests/peers/idle.py:handle", "--bind", "127.0.0.1:0"]
    more = ["--metrics", "127.0.0.1:0"] if metrics else []
    process = subprocess.Popen(
        [*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=prepare(SERVER_CPU)
    )
    try:
        assert process.stderr is not None
        url = ""
        give_up = time.monotonic() + START_TIMEOUT
        for line in process.stderr:
            if found := re.search(r"status page on (http\S+)", line):
                url = found[1]
            elif found := re.search(r"listening on .*:(\d+) ", line):
                yield int(found[1]), process.pid, url
                return
            if time.monotonic() > give_up:
                break
        raise BenchError("the server did not start")
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def scraping(url: str) -> Iterator[list[int]]:
    """Asks for the metrics every second; yields the number of bytes of each answer."""
    sizes: list[int] = []
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(url + "metrics", timeout=10) as answer:
                sizes.append(len(answer.read()))

    thread = threading.Thread(target=scrape)
    if url:
        thread.start()
    try:
        yield sizes
    finally:
        done.set()
        if url:
            thread.join()


def run(metrics: bool, seconds: int, clients: int) -> tuple[float, float]:
    """(requests a second, CPU us a request)."""
    with serving(metrics) as (port, pid, url):
        command = ["wrk", "-t1", f"-c{clients}", "-s", str(REPORT_SCRIPT), f"http://127.0.0.1:{port}/"]
        on_its_cpu = prepare(CLIENT_CPU)
        subprocess.run([*command, "-d1"], capture_output=True, check=True, preexec_fn=on_its_cpu)
        with scraping(url) as sizes:
            before, began = sum(cpu_seconds(pid)), time.monotonic()
            done = subprocess.run(
                [*command, f"-d{seconds}"], capture_output=True, text=True, check=True, preexec_fn=on_its_cpu
            )
            used, took = sum(cpu_seconds(pid)) - before, time.monotonic() - began
        if url and len(sizes) < seconds // 2:
            raise BenchError(f"{len(sizes)} scrapes in {seconds} s")
    report = read_report(done.stdout)
    if not report.requests or report.errors:
        raise BenchError(f"wrk: {done.stdout}")
    return report.requests / took, used / report.requests * 1e6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.monitoring", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=100)
    options = parser.parse_args(arguments)
    if min(options.rounds, options.seconds, options.clients) < 1:
        parser.error("--rounds, --seconds and --clients must be 1 or more")
    need("monitoring")
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    try:
        for number in range(options.rounds):
            for metrics in (False, True) if number % 2 else (True, False):
                found[metrics].append(run(metrics, options.seconds, options.clients))
    except (BenchError, OSError, subprocess.CalledProcessError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    print("| metrics | requests/s | CPU us a request |\n| --- | ---: | ---: |")
    for metrics, runs in found.items():
        rate, cpu = (statistics.median(figures) for figures in zip(*runs, strict=True))
        print(f"| {'scraped every second' if metrics else 'off'} | {rate:,.0f} | {cpu:.2f} |")
    ratios = [on[1] / off[1] for on, off in zip(found[True], found[False], strict=True)]
    print(
        f"\nwith metrics: {statistics.median(ratios):.3f} of the CPU a request ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
