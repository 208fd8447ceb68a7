"""Benchmarks against peers: what a request costs the server, in CPU microseconds.

    python -m loadtests.bench                     # everything, a quarter of an hour
    python -m loadtests.bench --quick             # under 2 minutes, noisier
    python -m loadtests.bench --scenario keepalive --rounds 7

The server runs on one CPU, wrk on another. Servers take turns within a round, in random order; figures are medians over
the rounds, and a ratio is the median of the ratios within the rounds, since a machine's speed changes from minute to
minute. CPU a request does not depend on whether the client or the server was the limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from .measure import CLIENT_CPU, SERVER_CPU, BenchError, Run, answer_of, idle_memory, load, need_wrk, serving

PYTHON = sys.executable
OURS = "gtcpserver"

#: name -> command, to which the scenario's options are added.
SERVERS = {
    # The same work as the peers' handlers do; in the next row the wait between requests is marked as well.
    OURS: [PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0", "--no-idle"],
    "gtcpserver, idle()": [PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0"],
    "gtcpserver StreamServer": [PYTHON, "loadtests/peers/gtcpserver_stream.py"],
    "gevent StreamServer": [PYTHON, "loadtests/peers/gevent_stream.py"],
    "gevent StreamServer, Pool": [PYTHON, "loadtests/peers/gevent_stream.py", "--pool", "10000"],
    "asyncio streams": [PYTHON, "loadtests/peers/asyncio_streams.py"],
    "asyncio Protocol": [PYTHON, "loadtests/peers/asyncio_protocol.py"],
    "uvloop streams": [PYTHON, "loadtests/peers/asyncio_streams.py", "--uvloop"],
    "uvloop Protocol": [PYTHON, "loadtests/peers/asyncio_protocol.py", "--uvloop"],
    "threads": [PYTHON, "loadtests/peers/threads_socketserver.py"],
}


@dataclass(frozen=True)
class Scenario:
    """A load, and with whom we compare ourselves in it."""

    title: str
    options: tuple[str, ...] = ()
    servers: tuple[str, ...] = tuple(SERVERS)
    against: tuple[str, ...] = ("gevent StreamServer", "uvloop Protocol")
    clients: int = 100
    tls: bool = False


NOT_POOL = tuple(name for name in SERVERS if "Pool" not in name)

SCENARIOS = {
    "keepalive": Scenario("Keep-alive, 1 kB, 100 connections", servers=NOT_POOL),
    "keepalive-timeout": Scenario(
        "Keep-alive, 1 kB, 100 connections, 30 s idle time-out", ("--timeout", "30"), servers=NOT_POOL
    ),
    "new-connection": Scenario(
        "A new connection for each request, 1 kB, 100 clients",
        ("--no-keepalive",),
        against=("gevent StreamServer, Pool", "uvloop Protocol"),
    ),
    "tls-keepalive": Scenario("TLS 1.3, keep-alive, 1 kB, 100 connections", servers=NOT_POOL, tls=True),
    "tls-new-connection": Scenario(
        "TLS 1.3, a new connection for each request", ("--no-keepalive",), servers=NOT_POOL, tls=True
    ),
}

IDLE_CONNECTIONS = 10_000
IDLE_SERVERS = (
    OURS,
    "gtcpserver, idle()",
    "gtcpserver StreamServer",
    "gevent StreamServer",
    "gevent StreamServer, Pool",
    "uvloop Protocol",
)


@dataclass
class Result:
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def median(self, server: str, figure: str) -> float:
        return float(statistics.median(getattr(run, figure) for run in self.runs[server]))

    def spread(self, server: str) -> float:
        """Half of the range of the CPU figures, relative to the median."""
        figures = [run.cpu for run in self.runs[server]]
        return (max(figures) - min(figures)) / 2 / statistics.median(figures)

    def ratio(self, server: str, peer: str) -> float:
        pairs = zip(self.runs[server], self.runs[peer], strict=True)
        return statistics.median(a.cpu / b.cpu for a, b in pairs)


def measure(scenario: Scenario, names: list[str], rounds: int, seconds: int, tls: list[str]) -> Result:
    """Run all servers in turn, ``rounds`` times."""
    result = Result({name: [] for name in names})
    extra = [*scenario.options, *(tls if scenario.tls else [])]
    check_answers(names, extra, scenario.tls)
    for number in range(rounds):
        for name in random.sample(names, len(names)):
            with serving([*SERVERS[name], *extra]) as server:
                load(server, 1, scenario.clients, scenario.tls)  # warm-up
                result.runs[name].append(load(server, seconds, scenario.clients, scenario.tls))
            progress(f"{scenario.title}: round {number + 1} of {rounds}, {name}")
    progress("")
    return result


def check_answers(names: list[str], extra: list[str], tls: bool) -> None:
    """Whoever answers less, or encrypts more weakly, is not comparable.

    Raises:
        BenchError: the servers do not all answer the same bytes.
    """
    answers = {}
    for name in names:
        with serving([*SERVERS[name], *extra]) as server:
            answers[name] = answer_of(server, tls)
    if len(set(answers.values())) > 1:
        listed = "".join(f"\n{name}: {answer[:200]!r}" for name, answer in answers.items())
        raise BenchError(f"the servers do not answer the same:{listed}")


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:110}" + ("" if text else "\r"), end="", file=sys.stderr, flush=True)


def table(scenario: Scenario, result: Result) -> str:
    peers = [peer for peer in scenario.against if peer in result.runs]
    lines = [
        f"### {scenario.title}",
        "",
        "| server | user | system | CPU us a request | spread | requests/s | p50 ms | p99 ms | errors |"
        + "".join(f" of {peer} |" for peer in peers),
        "| --- |" + " ---: |" * (8 + len(peers)),
    ]
    for name, runs in sorted(result.runs.items(), key=lambda item: result.median(item[0], "cpu")):
        lines.append(
            f"| {name} | {result.median(name, 'user'):.1f} | {result.median(name, 'system'):.1f} "
            f"| {result.median(name, 'cpu'):.1f} | ±{result.spread(name):.0%} | {result.median(name, 'rate'):,.0f} "
            f"| {result.median(name, 'p50'):.2f} | {result.median(name, 'p99'):.2f} | {sum(r.errors for r in runs)} |"
            + "".join(f" {result.ratio(name, peer):.2f} |" for peer in peers)
        )
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """What was measured on what."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    versions = {name: _version(name) for name in ("gevent", "greenlet", "uvloop", "gtcpserver")}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "kernel": platform.release(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **versions,
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description="Benchmarks against peers.")
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, "idle"], help="default: all")
    parser.add_argument("--server", action="append", choices=list(SERVERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s, against the two main peers")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds must be 1 or more and --seconds 1 or more")
    chosen = options.scenario or [*SCENARIOS, "idle"]
    if chosen != ["idle"]:
        need_wrk()
    rounds, seconds = (2, 1) if options.quick else (options.rounds, options.seconds)
    if SERVER_CPU == CLIENT_CPU:
        print("only one CPU: server and client share it, the figures are rough", file=sys.stderr)
    if _version("uvloop") == "missing":
        print('uvloop is missing, its rows are left out: pip install ".[bench]"', file=sys.stderr)
    facts = machine()
    output: dict[str, object] = {"machine": facts}
    print(", ".join(f"{name} {value}" for name, value in facts.items()) + "\n")
    try:
        with tempfile.TemporaryDirectory() as folder:
            certificate = (
                make_certificate(folder) if any(key in SCENARIOS and SCENARIOS[key].tls for key in chosen) else []
            )
            for key in chosen:
                if key == "idle":
                    output[key] = idle(installed(options.server or IDLE_SERVERS))
                else:
                    scenario = SCENARIOS[key]
                    quick = (OURS, *scenario.against)
                    names = installed(options.server or (quick if options.quick else scenario.servers))
                    result = measure(scenario, names, rounds, seconds, certificate)
                    print(table(scenario, result), flush=True)
                    output[key] = {name: [asdict(run) for run in runs] for name, runs in result.runs.items()}
                if options.json:
                    # After each scenario, so that a fault in a later one loses nothing.
                    Path(options.json).write_text(json.dumps(output, indent=1))
    except (BenchError, OSError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


def installed(names: Sequence[str]) -> list[str]:
    """Those that can run here, each once."""
    return [name for name in dict.fromkeys(names) if "uvloop" not in name or _version("uvloop") != "missing"]


def idle(names: list[str]) -> dict[str, float]:
    print(f"### Memory of {IDLE_CONNECTIONS:,} idle keep-alive connections\n\n| server | KiB each |\n| --- | ---: |")
    figures = {}
    for name in names:
        with serving(SERVERS[name]) as server:
            figures[name] = idle_memory(server, IDLE_CONNECTIONS)
        print(f"| {name} | {figures[name]:.2f} |", flush=True)
    print()
    return figures


if __name__ == "__main__":
    sys.exit(main())
