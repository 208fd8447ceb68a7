"""Benchmarks against peers: what a request costs the server, in CPU microseconds.

    python -m loadtests.bench                        # everything, with 100, 1,000 and 10,000 clients: an hour
    python -m loadtests.bench --quick                # under 2 minutes, noisier
    python -m loadtests.bench --publish              # under 25 minutes: the tables and plots of the documentation
    python -m loadtests.bench --scenario keepalive --rounds 7 --clients 1000
    python -m loadtests.bench --original             # the eight tests of the Go original
    python -m loadtests.bench --server 'mine=./my-server --port {port}'

The server runs on one CPU, wrk on another. Servers take turns within a round, in random order; figures are medians over
the rounds, and a ratio is the median of the ratios within the rounds, since a machine's speed changes from minute to
minute. CPU a request does not depend on whether the client or the server was the limit.

Results go to loadtests/results: JSON (for loadtests.bench.compare), a Markdown table, and plots.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby

from .answers import check_answers
from .idle import kind
from .machine import need
from .measure import CLIENT_CPU, CPUS, SERVER_CPU, BenchError, Run, allow_descriptors, load, warm_up
from .results import OURS, Result
from .scenarios import GEVENT, MAIN, ORIGINAL, OTHER_SERVERS, OTHERS, PUBLISHED, SCENARIOS, UVLOOP, Scenario
from .servers import OWN, SERVERS, WITH_WORKERS, WORKERS, add_server, installed, serving, why_missing
from .turns import Progress, Recording, parser_of, positive, seed_of, take_turns

#: Those of the default. The last are left out where descriptors do not allow them.
CLIENTS = (100, 1000, 10_000)

#: Unless one asks for more: with 10,000 the handshakes alone take longer than a run.
MOST_TLS = 1000

#: Descriptors of a process beside those of its connections.
SPARE = 100


@dataclass(frozen=True)
class Cell:
    """A load that is measured, and whom with."""

    scenario: str
    clients: int
    servers: list[str]


# -- what is measured --------------------------------------------------------------------------------------------------


def measure(cell: Cell, rounds: int, seconds: int, warm: bool, tls: Sequence[str], progress: Progress) -> Result:
    """Run all servers of a cell in turn, ``rounds`` times.

    Args:
        tls: options for the servers where the scenario is encrypted.

    Raises:
        BenchError: the servers do not give the same answer. One of the user's own is left out instead, and named.
    """
    scenario, clients = SCENARIOS[cell.scenario], cell.clients
    options = [*scenario.options, *(tls if scenario.tls else [])]
    progress.show(f"{scenario.named(clients)}: comparing answers")
    check_answers([name for name in cell.servers if name not in OWN], options, scenario.tls)
    unlike = {}
    for name in [name for name in cell.servers if name in OWN]:
        try:
            check_answers([OURS, name], options, scenario.tls)
        except BenchError as problem:
            unlike[name] = str(problem)
            progress.step(rounds)

    def run(name: str) -> Run:
        with serving(name, options) as server:
            if warm:
                warm_up(server, clients, scenario.tls)
            return load(server, seconds, clients, scenario.tls, cpus=WORKERS if name == WITH_WORKERS else 1)

    names = [name for name in cell.servers if name not in unlike]
    runs, failed = take_turns(names, rounds, run, progress, scenario.named(clients))
    return Result(scenario.named(clients), runs, {**unlike, **failed}, against_of(scenario, names))


def against_of(scenario: Scenario, names: list[str]) -> list[str]:
    """Whom a ratio is computed with: the scenario's peers, or ourselves where none of them takes part."""
    return [name for name in scenario.against if name in names] or [OURS]


def cells_of(options: argparse.Namespace) -> list[Cell]:
    if options.publish:
        return [
            Cell(name, clients, servers_of(options, servers))
            for clients, loads in PUBLISHED.items()
            for name, servers in loads
        ]
    loads = [name for name in options.chosen if name in SCENARIOS]
    quick = {name: (OURS, *SCENARIOS[name].against) for name in loads}
    return [
        Cell(name, clients, servers_of(options, quick[name] if options.quick else SCENARIOS[name].servers))
        for clients in options.clients
        for name in loads
        if clients in options.asked or clients <= MOST_TLS or not SCENARIOS[name].tls
    ]


def servers_of(options: argparse.Namespace, usual: Sequence[str]) -> list[str]:
    """Who takes part: ourselves, the peers that were named or else the usual ones, and the user's own servers."""
    given = options.server or []
    own = [name for name in given if name in OWN]
    named = [name for name in given if name not in OWN]
    if own and not named:
        named = [name for name in usual if name in MAIN]
    return installed([OURS, *(named or usual), *own])


# -- around it ---------------------------------------------------------------------------------------------------------


def make_certificate(folder: str) -> list[str]:
    """An ECDSA P-256 certificate; returns the servers' options for it."""
    cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise BenchError(f"the TLS scenarios need a certificate, made by openssl: {problem}") from problem
    return ["--tls-cert", cert, "--tls-key", key]


def _server(text: str) -> str:
    """--server: the name of a known one, or NAME=COMMAND."""
    if text in SERVERS:
        return text
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"must be NAME=COMMAND or one of {', '.join(SERVERS)}, got {text!r}")
    try:
        return add_server(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _clients(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1, as 100,1000, got {text!r}")
    return numbers


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("loadtests.bench", __doc__, rounds=3)
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, *OTHERS], help="default: all")
    parser.add_argument("--original", action="store_true", help="the eight tests of the Go original")
    parser.add_argument(
        "--server",
        action="append",
        type=_server,
        metavar="NAME[=COMMAND]",
        help="with a command: a server of your own, beside ours and the main peers; names alone: only these, and ours",
    )
    parser.add_argument("--clients", type=_clients, metavar="N,N", help="default: 100,1000,10000; --quick: 100")
    parser.add_argument("--seconds", type=positive, default=2, help="of each run; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s, or fewer; no warm-up, few peers")
    parser.add_argument("--no-plots", action="store_true", help="only JSON and tables")
    options = parser.parse_args(arguments)
    if options.publish and (options.quick or options.scenario or options.original or options.clients):
        parser.error("--publish has its own scenarios and clients: not with --quick, --scenario, --original, --clients")
    if options.publish and find_spec("matplotlib") is None:
        parser.error("--publish draws plots, which need matplotlib: pip install '.[bench]'")
    if options.quick:
        options.rounds, options.seconds = min(options.rounds, 2), 1
    options.chosen = options.scenario or (ORIGINAL if options.original else [*SCENARIOS, *OTHERS])
    options.seed = seed_of(options)
    options.asked = options.clients or []
    limit = allow_descriptors()
    wanted = options.clients or ([100] if options.quick else CLIENTS)
    options.clients = [number for number in wanted if number + SPARE <= limit]
    if left_out := [f"{number:,}" for number in wanted if number not in options.clients]:
        text = f"{' and '.join(left_out)} clients need more descriptors than the limit of {limit:,}: ulimit -Hn"
        if not options.clients:
            parser.error(text)
        print(f"left out: {text}", file=sys.stderr)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    need("bench")
    if SERVER_CPU == CLIENT_CPU:
        print("only one CPU: server and client share it, the figures are rough", file=sys.stderr)
    if WORKERS < 2:
        print(f"no server with workers on {len(CPUS)} CPUs, of which one is the client's", file=sys.stderr)
    for why, names in groupby(SERVERS, why_missing):
        if why:
            print(f"left out, {', '.join(names)}: {why}", file=sys.stderr)
    os.sched_setaffinity(0, {CLIENT_CPU})
    try:
        return run_all(options)
    except (BenchError, OSError) as problem:
        print(f"\npython -m loadtests.bench: {problem}", file=sys.stderr)
        return 1


def run_all(options: argparse.Namespace) -> int:
    cells = cells_of(options)
    others = [name for name in options.chosen if name in OTHERS]
    of_others = servers_of(options, (OURS, GEVENT, UVLOOP) if options.quick else OTHER_SERVERS)
    steps = (sum(len(cell.servers) for cell in cells) + len(others) * len(of_others)) * options.rounds
    settings = {"rounds": options.rounds, "seconds": options.seconds, "quick": options.quick}
    recording = Recording("bench", settings, options.json, options.seed, steps)
    with tempfile.TemporaryDirectory() as folder:
        tls = make_certificate(folder) if any(SCENARIOS[cell.scenario].tls for cell in cells) else []
        for cell in cells:
            found = measure(cell, options.rounds, options.seconds, not options.quick, tls, recording.progress)
            recording.load(f"{cell.scenario}/{cell.clients}", found)
    for which in others:
        figures, ask = kind(which, options.quick)

        def run(name: str) -> list[float]:
            with serving(name) as server:
                return ask(server)  # noqa: B023 (it is called within this turn of the loop)

        figures.runs, figures.failed = take_turns(of_others, options.rounds, run, recording.progress, figures.title)
        recording.figures(which, figures)
    if not (options.no_plots or options.publish):
        from .plots import plot

        try:
            for path in plot(recording.output, recording.path.with_suffix("")):
                print(path)
        except BenchError as lacking:
            print(lacking, file=sys.stderr)  # the figures are there
    return recording.end(options.publish)
