"""Benchmarks of the proxy, in turn with others: short connections, bulk data, idle tunnels.

    python -m loadtests.bench.proxies [--scenario NAME] [--proxy NAME] [--connections N] [--gib N] [--quick] ...

Every proxy runs on one CPU, its clients and the destination on the other. CPU is that of all of its processes, those
that have ended included. Servers take turns within a round; figures are medians, and ratios are medians of the rounds'
ratios. Proxies that are not installed are left out, and named: Debian has dante-server, haproxy, microsocks,
privoxy, squid and tinyproxy, PyPI pproxy and proxy.py.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from .measure import CLIENT_CPU, allow_descriptors
from .proxy_clients import Holder, PageOrigin, ShortTarget, kept_requests, short_connections, through
from .proxy_peers import PROXIES, Proxy, Running, cpu_of, memory_of, running
from .results import OURS, Figures
from .transfer_peers import CHUNK, GIB, Target, discard
from .turns import Progress, Recording, parser_of, record, take_turns


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        connections: short ones in each run.
        gib: moved in each run of bulk data.
        tunnels: that are idle.
        folder: for the proxies' configurations.
    """

    rounds: int
    connections: int
    gib: float
    tunnels: int
    folder: str
    proxies: dict[str, Proxy]
    progress: Progress


def short(title: str, options: Options, at_once: int, name: bytes = b"") -> Figures:
    """Short connections, so many at once.

    Args:
        name: of the destination, which the proxy looks up, as browsers ask it to (here in /etc/hosts).
    """
    count = options.connections if at_once > 1 else options.connections // 2
    with ShortTarget() as target:

        def run(server: Running) -> float:
            short_connections(server, target, 200, at_once, name)  # warm, and checked
            before = cpu_of(server)
            done = short_connections(server, target, count, at_once, name)
            return (cpu_of(server) - before) / done * 1e6

        return _in_turn(Figures(title, ["CPU µs a connection"]), options, target, run)


def kept(title: str, options: Options) -> Figures:
    """HTTP requests that the proxy forwards, on connections that are kept on both sides."""
    # tinyproxy keeps none.
    some = {
        name: proxy for name, proxy in options.proxies.items() if name.endswith(", HTTP") and "tinyproxy" not in name
    }
    with PageOrigin() as origin:

        def run(server: Running) -> float:
            kept_requests(server, origin, 500, 50)  # warm, and checked
            before = cpu_of(server)
            done = kept_requests(server, origin, options.connections, 50)
            return (cpu_of(server) - before) / done * 1e6

        return _in_turn(Figures(title, ["CPU µs a request"]), replace(options, proxies=some), origin, run)


def bulk(title: str, options: Options) -> Figures:
    target = Target()
    count = int(options.gib * GIB)

    def run(server: Running) -> float:
        with through(server, target.port) as sock:
            before = cpu_of(server)
            sock.sendall(struct.pack("!Q", count))
            discard(sock, count)
            return (cpu_of(server) - before) / (count / GIB)

    return _in_turn(Figures(title, ["CPU s a GiB"]), options, target.port, run)


def idle_tunnels(title: str, options: Options) -> Figures:
    """Memory of tunnels in which nothing moves."""
    # danted wants three processes for each thousand of clients; it is not asked for as many.
    some = {name: proxy for name, proxy in options.proxies.items() if name in (OURS, "danted", "microsocks")}

    def fill(server: Running, target: int, count: int) -> float:
        with ExitStack() as stack:
            for _ in range(50):
                through(server, target).close()
            time.sleep(0.5)
            before = memory_of(server)
            for _ in range(count):
                stack.enter_context(through(server, target))
            time.sleep(0.5)
            return (memory_of(server) - before) / count

    def run(name: str) -> list[float]:
        holder = Holder()
        try:
            with running(some[name], holder.port, options.folder) as server:
                return [fill(server, holder.port, options.tunnels if name == OURS else min(200, options.tunnels))]
        finally:
            holder.close()

    title = title.format(f"{options.tunnels:,}")
    found, failed = take_turns(some, options.rounds, run, options.progress, title)
    return Figures(title, ["KiB of memory each"], found, failed)


def _in_turn(figures: Figures, options: Options, target: int, run: Callable[[Running], float]) -> Figures:
    def of_one(name: str) -> list[float]:
        with running(options.proxies[name], target, options.folder) as server:
            return [run(server)]

    figures.runs, figures.failed = take_turns(options.proxies, options.rounds, of_one, options.progress, figures.title)
    return figures


#: name -> (title, what measures it)
SCENARIOS: dict[str, tuple[str, Callable[[str, Options], Figures]]] = {
    "sequential": ("Short connections, one after another (1 kB)", partial(short, at_once=1)),
    "short": ("Short connections, 50 at once (1 kB)", partial(short, at_once=50)),
    "names": ("The same, by the destination's name", partial(short, at_once=50, name=b"localhost")),
    "http": ("Forwarded HTTP requests, 50 at once, kept connections (1 kB)", kept),
    "bulk": ("Bulk data through one tunnel", bulk),
    "idle": ("{} idle tunnels (others: 200)", idle_tunnels),
}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("loadtests.bench.proxies", __doc__, rounds=5)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: all")
    parser.add_argument("--proxy", action="append", choices=list(PROXIES), help="compare with these; default: all")
    parser.add_argument("--connections", type=int, default=6000, help="in each run; default: %(default)s")
    parser.add_argument("--gib", type=float, default=1.0, help="moved in each run of bulk data; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all of it works")
    given = parser.parse_args(arguments)
    if given.connections < 100 or not 0 < given.gib <= 1024:
        parser.error("--connections must be 100 or more, and --gib more than 0 and 1024 at most")
    if given.quick:
        given.rounds, given.connections, given.gib = 1, 400, CHUNK * 64 / GIB
    wanted = {name: PROXIES[name] for name in PROXIES if not given.proxy or name == OURS or name in given.proxy}
    there = {name: proxy for name, proxy in wanted.items() if proxy.is_there}
    if missing := [name for name in wanted if name not in there]:
        print(f"not installed, left out: {', '.join(missing)}\n", file=sys.stderr)
    os.sched_setaffinity(0, {CLIENT_CPU})
    # A tunnel takes two descriptors in the proxy, and two here.
    tunnels = min(500 if given.quick else 10_000, (allow_descriptors() - 200) // 200 * 100)
    chosen = given.scenario or list(SCENARIOS)
    steps = sum(min(3, len(there)) if name == "idle" else len(there) for name in chosen) * given.rounds
    settings = {name: getattr(given, name) for name in ("rounds", "connections", "gib", "quick")}

    def measure_all(recording: Recording) -> None:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            os.chmod(folder, 0o777)
            options = Options(given.rounds, given.connections, given.gib, tunnels, folder, there, recording.progress)
            for name in chosen:
                title, measure = SCENARIOS[name]
                recording.figures(name, measure(title, options))

    return record("proxies", parser, given, settings, steps, measure_all)


if __name__ == "__main__":
    sys.exit(main())
