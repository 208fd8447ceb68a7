"""Benchmarks of moving bytes: relays against haproxy and a recv/sendall relay, files against nginx.

    python -m loadtests.transfers [--scenario NAME] [--rounds N] [--gib N]

Every server runs on one CPU, whatever loads it on the other. Servers take turns within a round; figures are medians,
and ratios are medians of the rounds' ratios. Needs haproxy, nginx and wrk.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .measure import (
    CLIENT_CPU,
    ROOT,
    SERVER_CPU,
    START_TIMEOUT,
    BenchError,
    Listening,
    allow_descriptors,
    cpu_seconds,
    load,
    memory_kib,
    need_wrk,
    prepare,
)
from .servers import OURS, PYTHON, free_port

GIB = 1 << 30
CHUNK = 1 << 20
MEDIUM, SMALL = 64 << 20, 16 << 10

HAPROXY = """
global
    nbthread 1
    maxconn 5000
defaults
    mode tcp
    option splice-request
    option splice-response
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen relay
    bind 127.0.0.1:{port}
    server target 127.0.0.1:{target}
"""

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def running(command: list[str], port: int, cpu: int = SERVER_CPU) -> Iterator[Listening]:
    """Run a server that listens on a port it was told."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=prepare(cpu),
    )
    try:
        give_up = time.monotonic() + START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > give_up:
                    process.kill()
                    said = process.communicate()[1].decode().strip()
                    raise BenchError(f"{' '.join(command)} did not start: {said}") from None
                time.sleep(0.02)
        # Nobody must be stopped by a full pipe of messages.
        threading.Thread(target=process.communicate, daemon=True).start()
        yield Listening(process.pid, "127.0.0.1", port)
    finally:
        process.kill()
        process.wait()


class Target:
    """Behind the relays: sends as many bytes as the first 8 bytes it gets say."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listening.accept()
            threading.Thread(target=self._send, args=(sock,), daemon=True).start()

    def _send(self, sock: socket.socket) -> None:
        data = memoryview(bytes(CHUNK))
        with sock:
            try:
                left = struct.unpack("!Q", sock.recv(8, socket.MSG_WAITALL))[0]
                while left:
                    left -= sock.send(data[: min(left, CHUNK)])
            except (OSError, struct.error):
                return


def discard(sock: socket.socket, count: int) -> None:
    """Read and throw away, without the cost of copying (MSG_TRUNC, tcp(7))."""
    room = bytearray(CHUNK)
    while count:
        got = sock.recv_into(room, min(count, CHUNK), socket.MSG_TRUNC)
        if not got:
            raise BenchError(f"the connection ended {count} bytes early")
        count -= got


Relay = Callable[[int, int, str], list[str]]


def _haproxy(port: int, target: int, folder: str) -> list[str]:
    config = Path(folder, f"haproxy-{port}.cfg")
    config.write_text(HAPROXY.format(port=port, target=target))
    return ["haproxy", "-db", "-f", str(config)]


RELAYS: dict[str, Relay] = {
    OURS: lambda port, target, _: [PYTHON, "-m", "gtcpserver", "forward", f"127.0.0.1:{port}", f"127.0.0.1:{target}"],
    "haproxy, splice forced": _haproxy,
    "recv/sendall on gevent": lambda port, target, _: [PYTHON, "loadtests/peers/copy_relay.py", str(port), str(target)],
}


def _nginx(port: int, root: str, folder: str) -> list[str]:
    config = Path(folder, f"nginx-{port}.conf")
    config.write_text(NGINX.format(port=port, root=root, folder=folder))
    return ["nginx", "-c", str(config), "-e", f"{folder}/error.log"]


FILE_SERVERS: dict[str, Callable[[int, str, str], list[str]]] = {
    OURS: lambda port, root, _: [PYTHON, "-m", "gtcpserver", "files", root, "--bind", f"127.0.0.1:{port}"],
    "nginx, sendfile on": _nginx,
}


# -- scenarios: name -> figures of each server, one a round ------------------------------------------------------------

Figures = dict[str, list[float]]


def relay_bulk(rounds: int, gib: float, folder: str) -> Figures:
    target = Target()
    count = int(gib * GIB)

    def run(server: Listening) -> float:
        return _cpu_a_gib(server, count, lambda: _ask_for(server.port, count))

    return _in_turn(RELAYS, rounds, lambda make, port: make(port, target.port, folder), run)


def _ask_for(port: int, count: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(struct.pack("!Q", count))
        discard(sock, count)


def relay_small(rounds: int, gib: float, folder: str) -> Figures:
    port = free_port()
    command = [PYTHON, "examples/http_server.py", "--no-idle", "--listen", f"127.0.0.1:{port}"]
    with running(command, port, CLIENT_CPU):
        return _in_turn(
            RELAYS, rounds, lambda make, own: make(own, port, folder), lambda server: load(server, 3, 100).cpu
        )


def files_large(rounds: int, gib: float, folder: str) -> Figures:
    root = _files(folder)
    count = max(1, int(gib * GIB) // MEDIUM)

    def fetch(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as sock:
            for _ in range(count):
                sock.sendall(b"GET /medium HTTP/1.1\r\nHost: x\r\n\r\n")
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += sock.recv(1)
                if f"Content-Length: {MEDIUM}".encode() not in head:
                    raise BenchError(f"the file came otherwise: {head!r}")
                discard(sock, MEDIUM)

    def run(server: Listening) -> float:
        fetch(server.port)  # warm
        return _cpu_a_gib(server, count * MEDIUM, lambda: fetch(server.port))

    return _in_turn(FILE_SERVERS, rounds, lambda make, port: make(port, root, folder), run)


def files_small(rounds: int, gib: float, folder: str) -> Figures:
    root = _files(folder)
    return _in_turn(
        FILE_SERVERS,
        rounds,
        lambda make, port: make(port, root, folder),
        lambda server: load(server, 3, 100, path="/small").cpu,
    )


def _files(folder: str) -> str:
    root = Path(folder, "www")
    root.mkdir(exist_ok=True)
    os.chmod(folder, 0o755)
    for name, size in {"medium": MEDIUM, "small": SMALL}.items():
        if not (root / name).exists():
            (root / name).write_bytes(os.urandom(size))
    return str(root)


def _in_turn(
    servers: dict[str, Callable[..., list[str]]],
    rounds: int,
    command: Callable[[Callable[..., list[str]], int], list[str]],
    run: Callable[[Listening], float],
) -> Figures:
    found: Figures = {name: [] for name in servers}
    for _ in range(rounds):
        for name in random.sample(list(servers), len(servers)):
            port = free_port()
            with running(command(servers[name], port), port) as server:
                found[name].append(run(server))
    return found


def _cpu_a_gib(server: Listening, count: int, move: Callable[[], None]) -> float:
    before = sum(cpu_seconds(server.pid))
    move()
    return (sum(cpu_seconds(server.pid)) - before) / (count / GIB)


SCENARIOS = {
    "relay-bulk": ("Relay of bulk data, one connection: CPU s a GiB", relay_bulk),
    "relay-small": ("Relay of 1 kB requests and answers, 100 keep-alive connections: CPU us a request", relay_small),
    "files-large": ("64 MiB files: CPU s a GiB", files_large),
    "files-small": ("16 kB files, 100 keep-alive connections: CPU us a request", files_small),
}


# -- what is no comparison ---------------------------------------------------------------------------------------------


def slow_relays(folder: str, number: int = 1000) -> None:
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
        seen = -1
        while seen != (now := memory_kib(server.pid) + _in_pipes(server.pid)):
            seen = now
            time.sleep(2)
        after, piped = memory_kib(server.pid), _in_pipes(server.pid)
        print(
            f"### {number:,} relays whose clients do not read\n\n{(after - before) / number:.1f} KiB of memory each, "
            f"and {piped / number:.1f} KiB each in pipes ({piped / 1024:.0f} MiB in all)\n"
        )


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


def cold_file(folder: str) -> None:
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
    print("### Small requests while a 1 GiB file is sent\n\n| file | took s | p50 ms | p99 ms | longest ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
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
            print(
                f"| {state} | {took:.2f} | {waits[len(waits) // 2]:.2f} | {waits[len(waits) * 99 // 100]:.2f} "
                f"| {waits[-1]:.2f} |",
                flush=True,
            )
    print()


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


def table(title: str, found: Figures) -> str:
    peers = [name for name in found if name != OURS]
    lines = [f"### {title}", "", "| server | median | spread | ours of it |", "| --- | ---: | ---: | ---: |"]
    for name, figures in found.items():
        middle = statistics.median(figures)
        spread = (max(figures) - min(figures)) / 2 / middle
        ratio = "" if name not in peers else f"{_ratio(found[OURS], figures):.2f}"
        lines.append(f"| {name} | {middle:.3f} | ±{spread:.0%} | {ratio} |")
    return "\n".join(lines) + "\n"


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.transfers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenario", action="append", choices=[*SCENARIOS, *OTHERS], help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=2.0, help="moved in each run of bulk data")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not 0 < options.gib <= 1024:
        parser.error("--rounds must be 1 or more and --gib more than 0")
    need_wrk()
    for program in ("haproxy", "nginx"):
        if not shutil.which(program):
            print(f"these benchmarks need {program}: apt-get install {program}", file=sys.stderr)
            return 2
    os.sched_setaffinity(0, {CLIENT_CPU})
    try:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
            for name in options.scenario or [*SCENARIOS, *OTHERS]:
                if name in SCENARIOS:
                    title, scenario = SCENARIOS[name]
                    print(table(title, scenario(options.rounds, options.gib, folder)), flush=True)
                else:
                    OTHERS[name](folder)
    except (BenchError, OSError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
