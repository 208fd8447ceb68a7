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
from .watch import Watch  # isort: skip

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import gevent
from locust.util.timespan import parse_timespan

from ..local_servers import ROOT, StartError
from .report import Limits, table


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
