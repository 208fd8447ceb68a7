"""The system calls of each request and connection, beside those of peers, counted by strace -c.

    python -m loadtests.bench.system_calls                            # the tables of docs/performance.md
    python -m loadtests.bench.system_calls --server 'Go net' keep-alive

In each round 32 clients act while the server is stopped (SIGSTOP), so that always 32 events share a turn of the event
loop; only over TLS they shake hands one after another. Counting begins after some rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .answers import REQUEST
from .measure import BenchError, Listening
from .request_cost import make_certificate
from .results import OURS
from .servers import SERVERS, serving, why_missing

CLIENTS = 32

#: Rounds before counting begins, and those that are counted.
WARM, COUNTED = 5, 20

#: Seconds for any one step of a client, and until strace is attached.
PATIENCE = 30.0

#: Seconds after the last round in which a server may do what it has put off, such as a lingering close.
AFTERWARDS = 1.0

#: Fewer are left out: what is done once for 32, or by chance.
SHOWN = 0.05

PEERS = (OURS, "gevent StreamServer", "uvloop Protocol", "Go net")


@dataclass(frozen=True)
class Scenario:
    """A load.

    Attributes:
        title: of the table.
        keep: connections stay open from round to round.
        tls: they are encrypted.
    """

    title: str
    keep: bool
    tls: bool = False


SCENARIOS = {
    "keep-alive": Scenario("Calls a request, keep-alive", keep=True),
    "new-connection": Scenario("Calls a connection, with one request", keep=False),
    "tls-keep-alive": Scenario("Calls a request, keep-alive, TLS 1.3", keep=True, tls=True),
    "tls-new-connection": Scenario("Calls a connection, with one request, TLS 1.3", keep=False, tls=True),
}


class Clients:
    """32 of them."""

    def __init__(self, server: Listening, scenario: Scenario) -> None:
        self._server = server
        self._scenario = scenario
        self._socks: list[socket.socket] = []

    def round(self) -> None:
        if not self._socks:
            self._connect()
        os.kill(self._server.pid, signal.SIGSTOP)
        if not self._socks:
            self._socks = [self._one() for _ in range(CLIENTS)]
        for sock in self._socks:
            sock.sendall(REQUEST)
        os.kill(self._server.pid, signal.SIGCONT)
        for sock in self._socks:
            read_answer(sock, self._scenario.keep)
        if not self._scenario.keep:
            self.close()

    def _connect(self) -> None:
        """Connect those that cannot connect while the server is stopped, or whose connection does not count."""
        if self._scenario.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._socks = [context.wrap_socket(self._one()) for _ in range(CLIENTS)]
        elif self._scenario.keep:
            self._socks = [self._one() for _ in range(CLIENTS)]

    def _one(self) -> socket.socket:
        return socket.create_connection((self._server.host, self._server.port), PATIENCE)

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        self._socks = []


def read_answer(sock: socket.socket, keep: bool) -> None:
    """Read the head and as many bytes as it says; to the end where the connection is not kept."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _some(sock)
    while not keep and sock.recv(1024):
        pass


def _some(sock: socket.socket) -> bytes:
    if data := sock.recv(4096):
        return data
    raise BenchError("the server closed before its answer was complete")


def count(name: str, scenario: Scenario, certificate: Sequence[str]) -> dict[str, float]:
    """Return how many calls of each name a server makes for each request or connection."""
    options = [*([] if scenario.keep else ["--no-keepalive"]), *(certificate if scenario.tls else [])]
    with serving(name, options) as server, tempfile.TemporaryDirectory() as folder:
        clients = Clients(server, scenario)
        for _ in range(WARM):
            clients.round()
        time.sleep(AFTERWARDS)
        path = Path(folder, "calls")
        command = ["strace", "-f", "-c", "-o", str(path), "-p", str(server.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            _wait_attached(tracer)
            for _ in range(COUNTED):
                clients.round()
            time.sleep(AFTERWARDS)
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=PATIENCE)
        clients.close()
        return {call: number / (COUNTED * CLIENTS) for call, number in read_table(path.read_text()).items()}


def _wait_attached(tracer: subprocess.Popen[bytes]) -> None:
    """Wait until strace says so; with -f it has all threads then."""
    assert tracer.stderr is not None
    if b"attached" not in (line := tracer.stderr.readline()):
        raise BenchError(f"strace cannot attach: {line.decode().strip()}")


def read_table(text: str) -> dict[str, int]:
    """Of strace -c: "% time, seconds, usecs/call, calls, errors (or nothing), syscall"."""
    rows = [line.split() for line in text.splitlines()]
    return {row[-1]: int(row[3]) for row in rows if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"}


def table(scenario: Scenario, found: dict[str, dict[str, float]]) -> str:
    calls = {call for counts in found.values() for call, number in counts.items() if number >= SHOWN}
    most = {call: max(counts.get(call, 0) for counts in found.values()) for call in calls}
    lines = [f"| {scenario.title} | " + " | ".join(found) + " |", "| --- |" + " ---: |" * len(found)]
    for call in sorted(calls, key=lambda call: (-most[call], call)):
        numbers = (counts.get(call, 0) for counts in found.values())
        cells = (f"{number:.2f}" if number >= SHOWN else "" for number in numbers)
        lines.append(f"| {call} | {' | '.join(cells)} |")
    lines.append("| all | " + " | ".join(f"{sum(counts.values()):.2f}" for counts in found.values()) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench.system_calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--server", action="append", choices=SERVERS, metavar="NAME", help="of loadtests.bench")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.scenario if name not in SCENARIOS]:
        parser.error(f"scenarios must be of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    if shutil.which("strace") is None:
        print("python -m loadtests.bench.system_calls: needs strace: apt-get install strace", file=sys.stderr)
        return 1
    names = options.server or PEERS
    for name in names:
        if why := why_missing(name):
            print(f"{name} is left out: {why}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as folder:
            certificate = make_certificate(folder)
            for chosen in options.scenario or SCENARIOS:
                scenario = SCENARIOS[chosen]
                print(table(scenario, {n: count(n, scenario, certificate) for n in names if not why_missing(n)}) + "\n")
    except (BenchError, OSError) as problem:
        print(f"python -m loadtests.bench.system_calls: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
