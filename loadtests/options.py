"""What the options of the listening sockets, and worker processes, do here.

    python -m loadtests.options [--rounds N] [--seconds N]

Each is measured in turn with the default. TCP Fast Open needs root: it is tried in a network namespace of its own with
5 ms of delay each way, where the system allows it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .measure import (
    CPUS,
    ROOT,
    SERVER_CPU,
    START_TIMEOUT,
    BenchError,
    Listening,
    Run,
    kill_all,
    load,
    need_wrk,
    prepare,
)
from .results import Result
from .servers import PYTHON

EACH, KEPT = "loadtests/peers/served.py:each", "loadtests/peers/served.py:kept"

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


@contextmanager
def serving(handler: str, options: Sequence[str], cpus: set[int]) -> Iterator[Listening]:
    process = subprocess.Popen(
        [PYTHON, "-m", "gtcpserver", "serve", handler, "--bind", "127.0.0.1:0", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare(cpus),
        start_new_session=True,
    )
    said: list[str] = []
    try:
        assert process.stderr is not None
        give_up = time.monotonic() + START_TIMEOUT
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"listening on .*:(\d+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # or a full pipe stops it
                yield Listening(process.pid, "127.0.0.1", int(found[1]))
                return
            if time.monotonic() > give_up:
                break
        raise BenchError(f"{' '.join(options)} did not start: {''.join(said)}")
    finally:
        kill_all(process.pid)
        process.wait()


def measure(title: str, rounds: int, seconds: int) -> Result:
    handler, clients, variants = VARIANTS[title]
    cpus = set(CPUS) if "Workers" in title else {SERVER_CPU}
    result = Result({name: [] for name in variants})
    for _ in range(rounds):
        for name in random.sample(list(variants), len(variants)):
            with serving(handler, variants[name], cpus) as server:
                run: Run = load(server, seconds, clients, cpus=len(cpus))
                result.runs[name].append(run)
    return result


def table(title: str, result: Result) -> str:
    base = next(iter(result.runs))
    lines = [f"### {title}", "", f"| option | CPU us a request | spread | requests/s | p50 ms | p99 ms | of {base} |"]
    lines.append("| --- |" + " ---: |" * 6)
    for name in result.runs:
        figures = [f"{result.median(name, 'cpu'):.1f}", f"±{result.spread(name):.0%}"]
        figures += [f"{result.median(name, 'rate'):,.0f}", *(f"{result.median(name, p):.2f}" for p in ("p50", "p99"))]
        lines.append(f"| {name} | {' | '.join(figures)} | {result.ratio(name, base) if name != base else ''} |")
    return "\n".join(lines) + "\n"


FAST_OPEN = """
    import socket, statistics, sys, threading, time
    from gtcpserver import ListenConfig, Server

    MSG_FASTOPEN = 0x20000000
    ROUNDS = 40

    def answer(conn):
        conn.recv(1000)
        conn.sendall(b"x")

    def ask(port, fast):
        began = time.perf_counter()
        with socket.socket() as sock:
            if fast:
                sock.sendto(b"GET", MSG_FASTOPEN, ("127.0.0.1", port))
            else:
                sock.connect(("127.0.0.1", port))
                sock.sendall(b"GET")
            sock.recv(1)
        return (time.perf_counter() - began) * 1000

    def client(port):
        for fast in (False, True):
            ask(port, fast)  # which gets the cookie
            print(statistics.median(ask(port, fast) for _ in range(ROUNDS)))

    server = Server("127.0.0.1:0", answer, listen=ListenConfig(fast_open=64))
    server.start()
    from gevent.threadpool import ThreadPool
    ThreadPool(1).apply(client, (server.port,))
"""


def fast_open() -> str:
    """Time to the answer with and without TCP Fast Open."""
    title = "### TCP Fast Open: ms until the answer to one request on a new connection\n"
    setup = "ip link set lo up && sysctl -qw net.ipv4.tcp_fastopen=3"
    delay = "tc qdisc add dev lo root netem delay 5ms 2>/dev/null && echo 5 || echo 0"
    command = ["unshare", "--net", "sh", "-c", f'{setup} && ({delay}) && exec "$0" -c "$1"', PYTHON]
    try:
        done = subprocess.run(
            [*command, textwrap.dedent(FAST_OPEN)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        milliseconds, without, with_it = map(float, done.stdout.split())
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{title}\n(left out: no network namespace: {error})\n"
    rows = f"| {without:.3f} | {with_it:.3f} |"
    return f"{title}\n| without, {milliseconds:g} ms each way | with --fast-open 64 |\n| ---: | ---: |\n{rows}\n" + (
        "" if milliseconds else "\n(This kernel has no netem, so nothing delays the packets.)\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.options", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds < 1:
        parser.error("--rounds and --seconds must be 1 or more")
    need_wrk()
    try:
        for title in VARIANTS:
            print(table(title, measure(title, given.rounds, given.seconds)), flush=True)
        print(fast_open())
    except (BenchError, OSError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
