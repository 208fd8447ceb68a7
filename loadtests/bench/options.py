"""What the options of the listening sockets, and worker processes, do here.

    python -m loadtests.bench.options [--rounds N] [--seconds N] [--publish]

Each is measured in turn with the default. TCP Fast Open is tried on a link with a delay of 5 ms each way, which needs
root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ..local_servers import ROOT
from . import fast_open as fast_open_link
from .machine import need
from .measure import CPUS, SERVER_CPU, Run, load, warm_up
from .results import Figures, Result
from .starting import PYTHON, serving_handler
from .turns import Progress, Recording, parser_of, positive, record, take_turns

EACH, KEPT = "loadtests/bench/peers/served.py:each", "loadtests/bench/peers/served.py:kept"

#: title -> (handler, clients, name -> options)
VARIANTS: dict[str, tuple[str, int, dict[str, list[str]]]] = {
    "A new connection for each request, 1 kB, 100 clients": (
        EACH,
        100,
        {
            "default": [],
            "--defer-accept 1": ["--defer-accept", "1"],
            "--accept-loops 4": ["--accept-loops", "4"],
            "--backlog 16": ["--backlog", "16"],
            "--delay": ["--delay"],
            "--no-keepalive": ["--no-keepalive"],
            "--linger 0": ["--linger", "0"],
            "--pool none": ["--pool", "none"],
        },
    ),
    "Keep-alive, 1 kB, 100 connections": (
        KEPT,
        100,
        {
            "default": [],
            "--timeout 30": ["--timeout", "30"],
            "--delay": ["--delay"],
            "--min-rate 1": ["--min-rate", "1"],
        },
    ),
    f"Workers on {len(CPUS)} CPUs, which wrk shares: keep-alive, 1 kB, 100 connections": (
        KEPT,
        100,
        {
            "one process": [],
            "--workers 1": ["--workers", "1"],
            f"--workers {len(CPUS)}": ["--workers", str(len(CPUS))],
            f"--workers {len(CPUS)} --pin-cpus": ["--workers", str(len(CPUS)), "--pin-cpus"],
        },
    ),
}


def measure(title: str, rounds: int, seconds: int, progress: Progress) -> Result:
    handler, clients, variants = VARIANTS[title]
    cpus = set(CPUS) if "Workers" in title else {SERVER_CPU}

    def run(name: str) -> Run:
        with serving_handler(handler, variants[name], cpus) as (server, _):
            warm_up(server, clients)
            return load(server, seconds, clients, cpus=len(cpus))

    found, failed = take_turns(variants, rounds, run, progress, title)
    return Result(title, found, failed, against=[next(iter(variants))], what="option")


def fast_open(rounds: int) -> Figures:
    """Time to the answer with and without TCP Fast Open; see loadtests.bench.fast_open."""
    figures = Figures(
        f"TCP Fast Open, {fast_open_link.DELAY * 1000:g} ms each way: until the answer on a new connection",
        ["ms", "of the connections, counted by the kernel as opened so"],
    )
    done = subprocess.run(
        [PYTHON, "-m", "loadtests.bench.fast_open", "--rounds", str(rounds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        figures.failed["TCP Fast Open"] = done.stderr.strip().rpartition("\n")[2]
        return figures
    found = json.loads(done.stdout)
    figures.runs = {"default": found["without"], "--fast-open 64": found["with"]}
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("loadtests.bench.options", __doc__, rounds=9)
    parser.add_argument("--seconds", type=positive, default=2, help="of each run; default: %(default)s")
    given = parser.parse_args(arguments)
    need("workers")
    steps = sum(len(variants) for _, _, variants in VARIANTS.values()) * given.rounds
    settings = {"rounds": given.rounds, "seconds": given.seconds}

    def measure_all(recording: Recording) -> None:
        for title in VARIANTS:
            recording.load(title, measure(title, given.rounds, given.seconds, recording.progress))
        recording.progress.show("TCP Fast Open")
        recording.figures("fast-open", fast_open(given.rounds))

    return record("options", parser, given, settings, steps, measure_all)


if __name__ == "__main__":
    sys.exit(main())
