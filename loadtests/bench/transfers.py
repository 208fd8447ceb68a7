"""Benchmarks of moving bytes: relays against haproxy and a recv/sendall relay, files against nginx.

    python -m loadtests.bench.transfers [--scenario NAME] [--rounds N] [--gib N]

Every server runs on one CPU, whatever loads it on the other. Servers take turns within a round; figures are medians,
and ratios are medians of the rounds' ratios. Needs haproxy, nginx and wrk.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .machine import need
from .measure import CLIENT_CPU, BenchError, Listening, allow_descriptors, cpu_seconds, load, memory_kib
from .results import OURS, Figures
from .starting import PYTHON, free_port
from .transfer_peers import CHUNK, FILE_SERVERS, GIB, MEDIUM, RELAYS, SMALL, Target, discard, running
from .turns import Recording, parser_of, record, take_turns

#: (servers, run, title) -> what each of them found, and why others have nothing; as turns.take_turns.
Turns = Callable[[Mapping[str, Any], Callable[[str], list[float]], str], Figures]

GIB_UNIT, REQUEST_UNIT = "CPU s a GiB", "CPU µs a request"


def relay_bulk(title: str, turns: Turns, gib: float, folder: str) -> Figures:
    target = Target()
    count = int(gib * GIB)

    def run(name: str) -> list[float]:
        port = free_port()
        with running(RELAYS[name](port, target.port, folder), port) as server:
            return [_cpu_a_gib(server, count, lambda: _ask_for(port, count))]

    return turns(RELAYS, run, title)


def _ask_for(port: int, count: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(struct.pack("!Q", count))
        discard(sock, count)


def relay_small(title: str, turns: Turns, gib: float, folder: str) -> Figures:
    target = free_port()
    command = [PYTHON, "examples/http_server.py", "--no-idle", "--listen", f"127.0.0.1:{target}"]

    def run(name: str) -> list[float]:
        port = free_port()
        with running(RELAYS[name](port, target, folder), port) as server:
            return [load(server, 3, 100).cpu]

    with running(command, target, CLIENT_CPU):
        return turns(RELAYS, run, title)


def files_large(title: str, turns: Turns, gib: float, folder: str) -> Figures:
    root = _files(folder)
    count = max(1, int(gib * GIB) // MEDIUM)

    def run(name: str) -> list[float]:
        port = free_port()
        with running(FILE_SERVERS[name](port, root, folder), port) as server:
            _fetch(port, 1)  # warm
            return [_cpu_a_gib(server, count * MEDIUM, lambda: _fetch(port, count))]

    return turns(FILE_SERVERS, run, title)


def _fetch(port: int, count: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        for _ in range(count):
            sock.sendall(b"GET /medium HTTP/1.1\r\nHost: x\r\n\r\n")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                more = sock.recv(1)
                if not more:
                    raise BenchError(f"the connection ended after {head!r}")
                head += more
            if f"Content-Length: {MEDIUM}".encode() not in head:
                raise BenchError(f"the file came otherwise: {head!r}")
            discard(sock, MEDIUM)


def files_small(title: str, turns: Turns, gib: float, folder: str) -> Figures:
    root = _files(folder)

    def run(name: str) -> list[float]:
        port = free_port()
        with running(FILE_SERVERS[name](port, root, folder), port) as server:
            return [load(server, 3, 100, path="/small").cpu]

    return turns(FILE_SERVERS, run, title)


def _files(folder: str) -> str:
    root = Path(folder, "www")
    root.mkdir(exist_ok=True)
    os.chmod(folder, 0o755)
    for name, size in {"medium": MEDIUM, "small": SMALL}.items():
        if not (root / name).exists():
            (root / name).write_bytes(os.urandom(size))
    return str(root)


def _cpu_a_gib(server: Listening, count: int, move: Callable[[], None]) -> float:
    before = sum(cpu_seconds(server.pid))
    move()
    return (sum(cpu_seconds(server.pid)) - before) / (count / GIB)


#: name -> (title, unit, what measures it)
SCENARIOS = {
    "relay-bulk": ("Relay of bulk data, one connection", GIB_UNIT, relay_bulk),
    "relay-small": ("Relay of 1 kB requests and answers, 100 keep-alive connections", REQUEST_UNIT, relay_small),
    "files-large": ("64 MiB files", GIB_UNIT, files_large),
    "files-small": ("16 kB files, 100 keep-alive connections", REQUEST_UNIT, files_small),
}


# -- what is no comparison: once, of our own server alone --------------------------------------------------------------


def slow_relays(folder: str, number: int = 1000) -> Figures:
    """Memory of relays whose clients do not read."""
    allow_descriptors()
    target = Target()
    port = free_port()
    with running(RELAYS[OURS](port, target.port, folder), port) as server, ExitStack() as stack:
        _ask_for(port, CHUNK)
        before = memory_kib(server.pid)
        for _ in range(number):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            sock.sendall(struct.pack("!Q", GIB))
        seen = -1.0
        while seen != (now := memory_kib(server.pid) + _in_pipes(server.pid)):
            seen = now
            time.sleep(2)
        after, piped = memory_kib(server.pid), _in_pipes(server.pid)
    figures = [(after - before) / number, piped / number]
    title = f"{number:,} relays whose clients do not read"
    return Figures(title, ["KiB of memory each", "KiB in pipes each"], {OURS: [figures]})


def _in_pipes(pid: int) -> float:
    """KiB that wait in a process's pipes."""
    total = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if not os.readlink(path).startswith("pipe:"):
                continue
            with open(
                path, "rb", buffering=0, opener=lambda name, _: os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            ) as pipe:
                total += struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]
        except OSError:
            continue
    return total / 2 / 1024  # each pipe was seen by both of its ends


def cold_file(folder: str) -> Figures:
    """What other connections see while a file comes from the disk."""
    root = Path(_files(folder))
    big = root / "big"
    with open(big, "wb") as file:
        block = os.urandom(CHUNK)
        for _ in range(1024):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    port = free_port()
    found = Figures("Small requests while a 1 GiB file is sent", ["p50 ms", "p99 ms", "longest ms", "the file took s"])
    with running(FILE_SERVERS[OURS](port, str(root), folder), port):
        for state in ("in memory", "on disk"):
            with open(big, "rb") as file:
                if state == "on disk":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(CHUNK):
                        pass
            took, waits = _ask_meanwhile(port)
            waits.sort()
            figures = [waits[len(waits) // 2], waits[len(waits) * 99 // 100], waits[-1], took]
            found.runs[f"{OURS}, the file is {state}"] = [figures]
    return found


def _ask_meanwhile(port: int) -> tuple[float, list[float]]:
    done = threading.Event()
    took = 0.0

    def fetch() -> None:
        nonlocal took
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), 60) as sock:
                sock.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
                discard(sock, GIB)
        finally:
            took = time.monotonic() - began
            done.set()

    threading.Thread(target=fetch, daemon=True).start()
    waits = []
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        while not done.is_set():
            began = time.monotonic()
            sock.sendall(b"HEAD /small HTTP/1.1\r\nHost: x\r\n\r\n")
            if not sock.recv(4096):
                raise BenchError("the server closed")
            waits.append((time.monotonic() - began) * 1000)
            time.sleep(0.001)
    return took, waits


OTHERS = {"slow-relays": slow_relays, "cold-file": cold_file}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("loadtests.bench.transfers", __doc__, rounds=5)
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, *OTHERS], help="default: all")
    parser.add_argument("--gib", type=float, default=2.0, help="moved in each run of bulk data; default: %(default)s")
    options = parser.parse_args(arguments)
    if not 0 < options.gib <= 1024:
        parser.error(f"--gib must be more than 0, and 1024 at most, got {options.gib}")
    need("transfers")
    os.sched_setaffinity(0, {CLIENT_CPU})
    chosen = options.scenario or [*SCENARIOS, *OTHERS]
    steps = sum(len(RELAYS if "relay" in name else FILE_SERVERS) for name in chosen if name in SCENARIOS)
    settings = {"rounds": options.rounds, "GiB": options.gib}

    def measure_all(recording: Recording) -> None:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            for name in chosen:
                if name in OTHERS:
                    recording.progress.show(name)
                    recording.figures(name, OTHERS[name](folder))
                    continue
                title, unit, measure = SCENARIOS[name]

                def turns(servers: Mapping[str, Any], run: Callable[[str], list[float]], title: str) -> Figures:
                    found, failed = take_turns(servers, options.rounds, run, recording.progress, title)
                    return Figures(title, [unit], found, failed)  # noqa: B023 (called within this turn)

                recording.figures(name, measure(title, turns, options.gib, folder))

    return record("transfers", parser, options, settings, steps * options.rounds, measure_all)


if __name__ == "__main__":
    sys.exit(main())
