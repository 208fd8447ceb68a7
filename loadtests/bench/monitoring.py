"""What a monitor costs: server CPU of a request with --metrics, scraped every second, against without, in turn.

    python -m loadtests.bench.monitoring [--rounds N] [--seconds N] [--clients N]

The handler does next to nothing, so the ratio is the worst there is. The CPU time is that of the server's process,
which answers the scrapes as well.
"""

from __future__ import annotations

import argparse
import re
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
    ROOT,
    SERVER_CPU,
    START_TIMEOUT,
    BenchError,
    Listening,
    cpu_seconds,
    prepare,
    read_report,
    wrk,
)
from .results import OURS, Figures, Ratio
from .turns import Recording, add_arguments, positive, seed_of, take_turns

COLUMNS = ["CPU µs a request", "requests/s"]

#: What takes turns -> with metrics.
WAYS = {OURS: False, f"{OURS}, metrics scraped every second": True}

SCRAPE_SECONDS = 1.0


@contextmanager
def serving(metrics: bool) -> Iterator[tuple[Listening, str]]:
    """Yields the server, and where the metrics are ("" for nowhere)."""
    command = [
        sys.executable,
        "-m",
        "gtcpserver",
        "serve",
        "loadtests/bench/peers/idle.py:handle",
        "--bind",
        "127.0.0.1:0",
    ]
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
                yield Listening(process.pid, "127.0.0.1", int(found[1])), url
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


def run(metrics: bool, seconds: int, clients: int) -> list[float]:
    """The figures of COLUMNS."""
    with serving(metrics) as (server, url):
        subprocess.run(wrk(server, 1, clients), capture_output=True, check=True, preexec_fn=prepare(CLIENT_CPU))
        with scraping(url) as sizes:
            before, began = sum(cpu_seconds(server.pid)), time.monotonic()
            done = subprocess.run(
                wrk(server, seconds, clients),
                capture_output=True,
                text=True,
                check=True,
                preexec_fn=prepare(CLIENT_CPU),
            )
            used, took = sum(cpu_seconds(server.pid)) - before, time.monotonic() - began
        if url and len(sizes) < seconds // 2:
            raise BenchError(f"{len(sizes)} scrapes in {seconds} s")
    report = read_report(done.stdout)
    if not report.requests or report.errors:
        raise BenchError(f"wrk: {done.stdout.strip()}")
    return [used / report.requests * 1e6, report.requests / took]


def words(figures: Figures) -> str:
    """What metrics cost."""
    off, on = figures.runs
    ratio = Ratio.of(with_[0] / without[0] for with_, without in zip(figures.runs[on], figures.runs[off], strict=True))
    return f"With metrics a request costs {ratio} of its CPU without."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench.monitoring", description=(__doc__ or "").split("\n")[0]
    )
    add_arguments(parser, rounds=9)
    parser.add_argument("--seconds", type=positive, default=4, help="of each run; default: %(default)s")
    parser.add_argument("--clients", type=positive, default=100)
    options = parser.parse_args(arguments)
    need("monitoring")
    settings = {"rounds": options.rounds, "seconds": options.seconds, "clients": options.clients}
    title = "Metrics, a handler that does next to nothing"
    try:
        recording = Recording("monitoring", settings, options.json, seed_of(options), 2 * options.rounds)
        found, failed = take_turns(
            WAYS,
            options.rounds,
            lambda name: run(WAYS[name], options.seconds, options.clients),
            recording.progress,
            title,
        )
        figures = Figures(title, COLUMNS, found, failed)
        recording.figures("monitoring", figures)
        if not failed:
            print(words(figures))
        return recording.end(options.publish)
    except (BenchError, OSError, subprocess.CalledProcessError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
