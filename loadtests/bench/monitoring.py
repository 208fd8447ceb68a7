"""What a monitor costs: server CPU of a request with --metrics, scraped every second, against without, in turn.

    python -m loadtests.bench.monitoring [--rounds N] [--seconds N] [--clients N]

The handler does next to nothing, so the ratio is the worst there is. The CPU time is that of the server's process,
which answers the scrapes as well.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from .machine import need
from .measure import CLIENT_CPU, SERVER_CPU, BenchError, cpu_seconds, prepare, read_report, wrk
from .results import OURS, Figures, Ratio
from .starting import serving_handler
from .turns import Recording, parser_of, positive, record, take_turns

COLUMNS = ["CPU µs a request", "requests/s"]

#: What takes turns -> with metrics.
WAYS = {OURS: False, f"{OURS}, metrics scraped every second": True}

SCRAPE_SECONDS = 1.0

HANDLER = "loadtests/bench/peers/idle.py:handle"


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
    with serving_handler(HANDLER, ["--metrics", "127.0.0.1:0"] if metrics else [], {SERVER_CPU}) as (server, said):
        page = re.search(r"status page on (http\S+)", said)
        url = page[1] if page else ""
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
    parser = parser_of("loadtests.bench.monitoring", __doc__, rounds=9)
    parser.add_argument("--seconds", type=positive, default=4, help="of each run; default: %(default)s")
    parser.add_argument("--clients", type=positive, default=100)
    options = parser.parse_args(arguments)
    need("monitoring")
    settings = {"rounds": options.rounds, "seconds": options.seconds, "clients": options.clients}
    title = "Metrics, a handler that does next to nothing"

    def measure(recording: Recording) -> None:
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

    return record("monitoring", parser, options, settings, 2 * options.rounds, measure)


if __name__ == "__main__":
    sys.exit(main())
