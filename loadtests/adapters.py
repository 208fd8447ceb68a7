"""Existing code on our server and on its own: CPU, latency and memory, with many clients.

    python -m loadtests.adapters [--clients N] [--rounds N] [--seconds N]

One socketserver handler class runs on socketserver.ThreadingTCPServer and by from_socketserver; one WSGI application on
wsgiref's server with threads, on gevent.pywsgi.WSGIServer and by from_wsgi (loadtests/peers/existing.py). They take
turns. wsgiref knows no keep-alive: it gets a new connection for each request, so that part of what its row costs is the
connections'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from .measure import BenchError, Run, answer_of, idle_memory, load, need_wrk
from .servers import PYTHON, SERVERS, serving
from .tables import simple_table

#: Of the tables: a title, and name -> KIND of peers/existing.py. Ours is the first, and the ratios are its.
GROUPS = {
    "A socketserver.StreamRequestHandler, keep-alive": {
        "gtcpserver, from_socketserver": "adapter",
        "socketserver.ThreadingTCPServer": "threads",
    },
    "A WSGI application, keep-alive (wsgiref: a connection a request)": {
        "gtcpserver, from_wsgi": "from_wsgi",
        "gevent.pywsgi.WSGIServer": "pywsgi",
        "wsgiref with threads": "wsgiref",
    },
}
COLUMNS = ["user us", "system us", "CPU us a request", "of ours", "requests/s", "p50 ms", "p99 ms", "p99.9 ms"]
COLUMNS += ["errors", "KiB a connection"]

#: Bytes of the body that all must answer with.
BODY = b"x" * 1024


def measure(kinds: dict[str, str], clients: int, rounds: int, seconds: int) -> dict[str, list[float]]:
    """Rows of the table.

    Raises:
        BenchError: a server does not start, or answers something else.
    """
    for name, kind in kinds.items():
        SERVERS[name] = [PYTHON, "loadtests/peers/existing.py", kind]
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    memory: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        # In turn, and the other way round in every second round: what else the machine does falls on all.
        for name in list(kinds)[:: -1 if number % 2 else 1]:
            with serving(name) as server:
                if not answer_of(server).endswith(b"\r\n\r\n" + BODY):
                    raise BenchError(f"{name} does not answer as the others do")
                load(server, 1, clients)
                runs[name].append(load(server, seconds, clients))
            if kinds[name] != "wsgiref":  # keeps none
                with serving(name) as server:
                    memory[name].append(idle_memory(server, clients))
    ours = runs[next(iter(kinds))]
    return {name: _row(of_name, ours, memory[name]) for name, of_name in runs.items()}


def _row(runs: Sequence[Run], ours: Sequence[Run], memory: Sequence[float]) -> list[float]:
    figures = {name: statistics.median(getattr(run, name) for run in runs) for name in Run.__dataclass_fields__}
    cpu = statistics.median(run.cpu for run in runs)
    ratio = statistics.median(run.cpu / own.cpu for run, own in zip(runs, ours, strict=True))
    return [
        *(figures["user"], figures["system"], cpu, ratio),
        *(figures[name] for name in ("rate", "p50", "p99", "p999")),
        float(sum(run.errors for run in runs)),
        statistics.median(memory) if memory else 0.0,
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args(arguments)
    if min(options.clients, options.rounds, options.seconds) < 1:
        parser.error("--clients, --rounds and --seconds must be 1 or more")
    need_wrk()
    try:
        for title, kinds in GROUPS.items():
            rows = measure(kinds, options.clients, options.rounds, options.seconds)
            print(simple_table(f"{title}, 1 kB, {options.clients:,} clients", COLUMNS, rows), flush=True)
    except (BenchError, OSError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
