"""Benchmarks against peers: what a request costs the server, in CPU microseconds.

    python -m loadtests.bench                        # everything
    python -m loadtests.bench --quick                # under 2 minutes, noisier
    python -m loadtests.bench --scenario keepalive --rounds 7 --clients 1000
    python -m loadtests.bench --original             # the eight tests of the Go original, 1,000 clients
    python -m loadtests.bench --server 'mine=./my-server --port {port}'

The server runs on one CPU, wrk on another. Servers take turns within a round, in random order; figures are medians over
the rounds, and a ratio is the median of the ratios within the rounds, since a machine's speed changes from minute to
minute. CPU a request does not depend on whether the client or the server was the limit.

Results go to loadtests/results: JSON (for loadtests/compare.py), a Markdown table, and plots.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from .measure import (
    CLIENT_CPU,
    ROOT,
    SERVER_CPU,
    BenchError,
    Listening,
    NoAnswer,
    answer_of,
    crowd,
    first_bytes,
    idle_memory,
    load,
    need_wrk,
)
from .results import Result
from .scenarios import ORIGINAL, OTHER_SERVERS, OTHERS, SCENARIOS, Scenario
from .servers import OURS, SERVERS, WORKERS, add_server, installed, serving
from .tables import simple_table, table

RESULTS = ROOT / "loadtests" / "results"
IDLE_CONNECTIONS = 10_000


# -- what is measured --------------------------------------------------------------------------------------------------


def measure(
    scenario: Scenario,
    clients: int,
    names: Sequence[str],
    rounds: int,
    seconds: int,
    tls: Sequence[str],
    progress: Progress,
) -> Result:
    """Run all servers in turn, ``rounds`` times."""
    result = Result({name: [] for name in names})
    options = [*scenario.options, *(tls if scenario.tls else [])]
    check_answers(names, options, scenario.tls, scenario.answers_differ)
    for number in range(rounds):
        for name in progress.random.sample(list(result.runs), len(result.runs)):
            progress.show(f"{scenario.named(clients)}: round {number + 1} of {rounds}, {name}")
            try:
                with serving(name, options) as server:
                    cpus = WORKERS if "workers" in name else 1
                    warm_up(server, seconds, clients, scenario.tls)
                    result.runs[name].append(load(server, seconds, clients, scenario.tls, cpus=cpus))
            except NoAnswer as problem:
                result.failed[name] = str(problem)
                del result.runs[name]
            progress.step()
    return result


def warm_up(server: Listening, seconds: int, clients: int, tls: bool) -> None:
    if seconds > 1:
        try:
            load(server, 1, clients, tls)
        except NoAnswer:
            pass  # a thousand TLS handshakes take longer


def check_answers(names: Sequence[str], options: Sequence[str], tls: bool, only_lengths: bool = False) -> None:
    """Whoever answers less, or encrypts more weakly, is not comparable.

    Raises:
        BenchError: the servers do not all answer the same bytes (or as many).
    """
    answers: dict[str, bytes] = {}
    for name in names:
        with serving(name, options) as server:
            answers[name] = answer_of(server, tls)
    seen: set[Any] = {len(answer) if only_lengths else answer for answer in answers.values()}
    if len(seen) > 1:
        listed = "".join(f"\n{name}: {answer[:200]!r}" for name, answer in answers.items())
        raise BenchError(f"the servers do not answer the same:{listed}")


def measure_other(which: str, names: Sequence[str], quick: bool, progress: Progress) -> dict[str, list[float]]:
    """One of OTHERS: figures of each server."""
    rows: dict[str, list[float]] = {}
    for name in names:
        progress.show(f"{which}: {name}")
        with serving(name) as server:
            if which == "idle":
                rows[name] = [idle_memory(server, 500 if quick else IDLE_CONNECTIONS)]
            elif which == "first-byte":
                times = first_bytes(server, 100 if quick else 1000, 200 if quick else 2000)
                rows[name] = [times[len(times) // 2], times[len(times) * 99 // 100], times[-1]]
            else:
                rows[name] = [crowd(server, 200 if quick else 3000)]
        progress.step()
    return rows


def other_table(which: str, rows: dict[str, list[float]], quick: bool) -> str:
    titles = {
        "idle": (f"Memory of {500 if quick else IDLE_CONNECTIONS:,} idle keep-alive connections", ["KiB each"]),
        "first-byte": (
            f"First byte on a new connection beside {100 if quick else 1000:,} idle ones",
            ["p50 ms", "p99 ms", "longest ms"],
        ),
        "crowd": (f"{200 if quick else 3000:,} clients at once, just after the start", ["connections answered/s"]),
    }
    return simple_table(*titles[which], rows)


# -- around it ---------------------------------------------------------------------------------------------------------


class Progress:
    """A line that tells how far it is, on a terminal."""

    def __init__(self, steps: int, seed: int) -> None:
        self.random = random.Random(seed)
        self._steps = max(1, steps)
        self._done = 0
        self._began = time.monotonic()

    def show(self, text: str) -> None:
        if sys.stderr.isatty():
            share = self._done / self._steps
            filled = round(share * 20)
            spent = time.monotonic() - self._began
            left = f"{spent / share - spent:4.0f} s left" if share else ""
            line = f"[{'=' * filled}{' ' * (20 - filled)}] {share:4.0%} {left} {text}"
            print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)

    def step(self) -> None:
        self._done += 1

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def machine(seed: int) -> dict[str, str]:
    """What was measured on what."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    packages = ("gtcpserver", "gevent", "greenlet", "uvloop", "trio", "twisted")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "kernel": platform.release(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "seed": str(seed),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


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
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description="Benchmarks against peers.")
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, *OTHERS], help="default: all")
    parser.add_argument("--original", action="store_true", help="the eight tests of the Go original")
    parser.add_argument(
        "--server", action="append", type=_server, metavar="NAME[=COMMAND]", help="only these, and ours; default: all"
    )
    parser.add_argument("--clients", type=_clients, metavar="N,N", help="default: 100; with --original: 1000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="of each run")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of 1 s without warm-up, against the two main peers"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the order of the servers")
    parser.add_argument("--json", metavar="FILE", help="where to write the results; default: loadtests/results")
    parser.add_argument("--no-plots", action="store_true", help="only JSON and tables")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds must be 1 or more and --seconds 1 or more")
    if options.quick:
        options.rounds, options.seconds = 2, 1
    options.chosen = options.scenario or (ORIGINAL if options.original else [*SCENARIOS, *OTHERS])
    options.clients = options.clients or ([1000] if options.original else [100])
    options.seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    return options


def servers_of(options: argparse.Namespace, scenario: Scenario | None) -> list[str]:
    """Who takes part: those that were named, and ourselves; or those of the scenario."""
    if options.server:
        return installed([OURS, *options.server])
    if scenario is None:
        return installed((OURS, OTHER_SERVERS[-2]) if options.quick else OTHER_SERVERS)
    return installed((OURS, *scenario.against) if options.quick else scenario.servers)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    loads = [name for name in options.chosen if name in SCENARIOS]
    if loads:
        need_wrk()
    if SERVER_CPU == CLIENT_CPU:
        print("only one CPU: server and client share it, the figures are rough", file=sys.stderr)
    missing = [name for name in SERVERS if name not in installed(list(SERVERS))]
    if missing:
        print(f'left out, not installed: {", ".join(missing)}: pip install ".[bench]"', file=sys.stderr)
    facts = machine(options.seed)
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    output: dict[str, Any] = {"machine": facts, "scenarios": {}, "others": {}}
    try:
        run_all(options, loads, output)
    except (BenchError, OSError) as problem:
        print(f"\npython -m loadtests.bench: {problem}", file=sys.stderr)
        return 1
    return 0


def run_all(options: argparse.Namespace, loads: list[str], output: dict[str, Any]) -> None:
    others = [name for name in options.chosen if name in OTHERS]
    runs = sum(len(servers_of(options, SCENARIOS[name])) for name in loads) * options.rounds * len(options.clients)
    progress = Progress(runs + len(others) * len(servers_of(options, None)), options.seed)
    if options.json:
        file = Path(options.json)
    else:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    tables = []

    def note(text: str) -> None:
        progress.clear()
        print(text, flush=True)
        tables.append(text)
        # After each, so that a fault in a later one loses nothing.
        file.write_text(json.dumps(output, indent=1))
        file.with_suffix(".md").write_text("\n".join(tables))

    with tempfile.TemporaryDirectory() as folder:
        certificate = make_certificate(folder) if any(SCENARIOS[name].tls for name in loads) else []
        for clients in options.clients:
            for name in loads:
                _run_one(options, name, clients, certificate, output, note, progress)
    for name in others:
        rows = measure_other(name, servers_of(options, None), options.quick, progress)
        output["others"][name] = rows
        note(other_table(name, rows, options.quick))
    if not options.no_plots:
        from .plots import plot

        try:
            for path in plot(output, file.with_suffix("")):
                print(path)
        except BenchError as missing:
            print(missing, file=sys.stderr)  # the figures are there
    print(file)


def _run_one(
    options: argparse.Namespace,
    name: str,
    clients: int,
    certificate: list[str],
    output: dict[str, Any],
    note: Callable[[str], None],
    progress: Progress,
) -> None:
    scenario = SCENARIOS[name]
    names = servers_of(options, scenario)
    result = measure(scenario, clients, names, options.rounds, options.seconds, certificate, progress)
    output["scenarios"][f"{name}/{clients}"] = {
        "title": scenario.named(clients),
        "runs": {server: [asdict(run) for run in runs] for server, runs in result.runs.items()},
    }
    note(table(scenario, clients, result))


if __name__ == "__main__":
    sys.exit(main())
