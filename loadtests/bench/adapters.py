"""Existing code on our server and on its own: CPU, latency and memory, with many clients.

    python -m loadtests.bench.adapters [--clients N] [--rounds N] [--seconds N] [--publish]

One socketserver handler class runs on socketserver.ThreadingTCPServer and by from_socketserver; one WSGI application on
wsgiref's server with threads, on gevent.pywsgi.WSGIServer and by from_wsgi (peers/existing.py). They take turns.
wsgiref knows no keep-alive: it gets a new connection for each request, so that part of what its row costs is the
connections'.
"""

from __future__ import annotations

import os
import sys

from .answers import answer_of
from .idle import idle_memory
from .machine import need
from .measure import CLIENT_CPU, BenchError, Run, load, warm_up
from .results import Figures, Result
from .servers import SERVERS, serving
from .starting import PYTHON
from .turns import Progress, Recording, parser_of, positive, record, take_turns

#: Of the tables: a title, and name -> KIND of peers/existing.py. Ours is the first.
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

#: Of the body that all must answer with.
BODY = b"x" * 1024


def measure(title: str, clients: int, rounds: int, seconds: int, progress: Progress) -> tuple[Result, Figures]:
    """One of GROUPS under load, and the memory of its idle connections."""
    kinds = GROUPS[title]
    for name, kind in kinds.items():
        SERVERS[name] = [PYTHON, "loadtests/bench/peers/existing.py", kind]

    def run(name: str) -> Run:
        with serving(name) as server:
            answer = answer_of(server)
            if (answer.status, answer.body) != (200, BODY):
                raise BenchError(f"{name} does not answer as the others do: {answer}")
            warm_up(server, clients)
            return load(server, seconds, clients)

    def memory(name: str) -> list[float]:
        with serving(name) as server:
            return [idle_memory(server, clients)]

    title = f"{title}, 1 kB, {clients:,} clients"
    loaded = Result(title, *take_turns(kinds, rounds, run, progress, title), against=list(kinds)[1:])
    keeping = [name for name in kinds if kinds[name] != "wsgiref"]
    title = f"{title}: memory of idle connections"
    return loaded, Figures(title, ["KiB each"], *take_turns(keeping, rounds, memory, progress, title))


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("loadtests.bench.adapters", __doc__, rounds=3)
    parser.add_argument("--clients", type=positive, default=1000, help="default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=5, help="of each run; default: %(default)s")
    options = parser.parse_args(arguments)
    need("workers")
    os.sched_setaffinity(0, {CLIENT_CPU})
    settings = {name: getattr(options, name) for name in ("clients", "rounds", "seconds")}
    steps = sum(2 * len(kinds) for kinds in GROUPS.values()) * options.rounds

    def measure_all(recording: Recording) -> None:
        for title, kinds in GROUPS.items():
            loaded, memory = measure(title, options.clients, options.rounds, options.seconds, recording.progress)
            key = next(iter(kinds.values()))
            recording.load(f"{key}/{options.clients}", loaded)
            recording.figures(f"{key}, idle", memory)

    return record("adapters", parser, options, settings, steps, measure_all)


if __name__ == "__main__":
    sys.exit(main())
