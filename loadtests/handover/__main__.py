"""What it costs to move connections to another worker, and what clients notice.

    python -m loadtests.handover
    python -m loadtests.handover --connections 10000 --asking 200 --tunnels 2000 --json
    python -m loadtests.handover --rounds 3 --publish

One worker has the connections. It is reloaded twice: first all of them are silent, for wall and CPU time; then some ask
again and again, for the latency of a request that comes meanwhile. Before and after, every connection is asked, and
every answer checked. Then the same with a forwarder's worker: first all its tunnels are idle, then one is at full
speed. With --publish the medians of some rounds go to docs/performance.md. Exit status 1 if a figure exceeds its limit,
or anything is lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from statistics import median

from ..local_servers import LocalServers
from . import tunnels
from .clients import Client, ClientError, ask_all, ask_for, connect
from .publish import publish
from .service import Service

#: Seconds between an answer and the next request of a connection that asks.
PAUSE = 0.1

#: Largest wall time in seconds, for 10,000 connections; CPU time in microseconds a connection, in both workers
#: together; seconds that a move adds to the 99th percentile of a request's latency; and seconds for which nothing
#: arrives through a tunnel at full speed.
LIMITS = {"wall_seconds": 2.0, "cpu_us": 60.0, "added_latency_p99": 0.05, "bulk_pause": 0.1}


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def measure(connections: int, asking: int, tunnelled: int, bulk_rest: float = 0.0) -> dict[str, float]:
    """Run all reloads; return the figures.

    Args:
        bulk_rest: as for `tunnels.Bulk`.

    Raises:
        ClientError: an answer is wrong or missing.
    """
    servers = LocalServers()
    try:
        service = Service(servers, "serve", "loadtests.handover.app:handle", "--bind", "127.0.0.1:0")
        clients = connect(service.address, connections)
        figures = service.reload()
        if figures["moved"] != connections:
            raise ClientError(f"{figures['moved']} of {connections} connections moved")
        cpu_seconds = figures.pop("cpu_old_seconds") + figures.pop("cpu_new_seconds")
        figures["cpu_us"] = cpu_seconds / connections * 1e6
        ask_all(clients)
        figures |= latencies(service, clients[:asking])
        ask_all(clients)
        for client in clients:
            client.sock.close()
        return figures | tunnels.measure(servers, tunnelled, bulk_rest)
    finally:
        servers.stop()


def latencies(service: Service, asking: list[Client]) -> dict[str, float]:
    """Return the 99th percentile of latency in seconds, without a move and during one."""
    quiet = ask_for(asking, 2.0, PAUSE, [False])
    ended = [False]

    def reload() -> None:
        try:
            service.reload()
        finally:
            ended[0] = True

    thread = threading.Thread(target=reload)
    thread.start()
    found = ask_for(asking, 60.0, PAUSE, ended)
    thread.join()
    until = max(at for at, _ in found)
    moving = [seconds for at, seconds in found if at > until - 2.0]  # the move is at the end
    before, during = percentile([seconds for _, seconds in quiet], 0.99), percentile(moving, 0.99)
    return {
        "latency_p99": before,
        "latency_p99_moving": during,
        "added_latency_p99": max(0.0, during - before),
        "latency_max_moving": max(moving),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.handover", description="A benchmark of handovers.")
    parser.add_argument("--connections", type=int, default=10_000, metavar="N")
    parser.add_argument("--asking", type=int, default=200, metavar="N", help="connections that ask during a move")
    parser.add_argument("--tunnels", type=int, default=2_000, metavar="N")
    parser.add_argument("--bulk-rest", type=float, default=0.0, help=argparse.SUPPRESS)  # for its test
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="the figures are medians of so many rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--publish", action="store_true", help="put the figures into the documentation")
    options = parser.parse_args(arguments)
    if not 1 <= options.asking <= options.connections:
        parser.error("--asking must be from 1 to --connections")
    if options.tunnels < 1 or options.rounds < 1:
        parser.error("--tunnels and --rounds must be 1 or more")
    try:
        settings = options.connections, options.asking, options.tunnels, options.bulk_rest
        rounds = [measure(*settings) for _ in range(options.rounds)]
        figures = {name: median(one[name] for one in rounds) for name in rounds[0]}
        if options.publish:
            publish(figures, options.connections, options.tunnels, options.rounds)
    except (ClientError, OSError, ValueError) as error:
        print(f"loadtests.handover: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            limit = f"  (at most {LIMITS[name]:g})" if name in LIMITS else ""
            print(f"{name:20} {value:10.4f}{limit}")
    # CPU time on a busy machine says more than wall time, and both say less than on an idle one.
    return int(any(figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
