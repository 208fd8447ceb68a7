"""Worker processes against one: throughput, and CPU a request.

    python -m loadtests.bench.workers [--workers N] [--rounds N] [--seconds N]

The handler computes for 0.15 ms a request, so that the load generator, which shares the CPUs with the workers, needs a
few per cent of them; its share is shown. One worker and N take turns.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from .machine import need
from .measure import CPUS, BenchError, cpu_of_session, read_report, wrk
from .publish import several_against_one
from .results import OURS, Figures
from .starting import serving_handler
from .turns import Recording, parser_of, positive, record, take_turns

COLUMNS = ["requests/s", "CPU µs a request", "the client's share of the CPUs"]

HANDLER = "loadtests/bench/peers/heavy.py:handle"


def run(workers: int, seconds: int) -> list[float]:
    """The figures of COLUMNS."""
    with serving_handler(HANDLER, ["--workers", str(workers)], set(CPUS)) as (server, _):
        # The kernel spreads connections over workers by chance: few would make one of them idle.
        subprocess.run(wrk(server, 1, 64 * workers), capture_output=True, check=True)
        before, began = sum(cpu_of_session(server.pid)), time.monotonic()
        client = _client_seconds()
        done = subprocess.run(wrk(server, seconds, 64 * workers), capture_output=True, text=True, check=True)
        client = _client_seconds() - client
        took = time.monotonic() - began
        used = sum(cpu_of_session(server.pid)) - before
    report = read_report(done.stdout)
    if not report.requests or report.errors:
        raise BenchError(f"wrk: {done.stdout.strip()}")
    return [report.requests / took, used / report.requests * 1e6, client / took / len(CPUS)]


def _client_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def named(workers: int) -> str:
    return f"{OURS}, {workers} worker{'s' if workers > 1 else ''}"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("loadtests.bench.workers", __doc__, rounds=5)
    parser.add_argument(
        "--workers",
        type=positive,
        default=max(2, len(CPUS)),
        help="against one; default: one for each CPU, %(default)s",
    )
    parser.add_argument("--seconds", type=positive, default=3, help="of each run; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.workers < 2:
        parser.error(f"--workers must be 2 or more, to be measured against one, got {options.workers}")
    need("workers")
    counts = {named(number): number for number in (1, options.workers)}
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    title = f"{options.workers} workers on {len(CPUS)} CPUs, which the client shares: 0.15 ms of work a request"

    def measure(recording: Recording) -> None:
        found, failed = take_turns(
            counts, options.rounds, lambda name: run(counts[name], options.seconds), recording.progress, title
        )
        figures = Figures(title, COLUMNS, found, failed, more_is_better=True)
        recording.figures("workers", figures)
        if not failed:
            print(several_against_one(figures))

    return record("workers", parser, options, settings, 2 * options.rounds, measure)


if __name__ == "__main__":
    sys.exit(main())
