"""The cost of each step of a connection in instructions, which do not depend on what else the machine does.

    python -m loadtests.bench.instructions                  # every scenario: the tables of docs/architecture.md
    python -m loadtests.bench.instructions keep-alive idle  # some of them

The server runs under ``valgrind --tool=callgrind``, which counts the instructions that it executes in user space: those
of the kernel are not among them. In each round 32 clients act while the server is stopped (SIGSTOP), so that always 32
events share a turn of the event loop. Counting starts after some rounds, when caches are warm. Figures of requests
repeat within 0.5 %, those of connections within 3 %.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event

from gtcpserver import ClientLimits, Connection, HandlerPool, ProxyProtocol, Server
from gtcpserver.listening.listener import open_listeners
from gtcpserver.server.acceptor import Acceptor

from ..local_servers import ROOT
from .measure import BenchError, read_address

CLIENTS = 32

#: Rounds before counting begins, and those that are counted.
WARM, COUNTED = 20, 40

#: Seconds for any one step of a client: a server under callgrind takes some 50 times as long as otherwise.
PATIENCE = 120.0

#: A function of the C library that nothing else calls: callgrind writes down what it has counted before each call.
MARK = "getloadavg"

#: The environment variable by which a server of a TLS scenario is told its certificate.
CERTIFICATE = "INSTRUCTIONS_CERTIFICATE"

ANSWER = b"a" * 1024
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LINE = b"GET name\r\n"
HEADER = b"PROXY TCP4 192.0.2.1 127.0.0.1 50000 5000\r\n"


# -- the handlers, in the server's process -----------------------------------------------------------------------------


def leave(_conn: Connection) -> None:
    pass


def answer_one(conn: Connection) -> None:
    conn.recv(8192)
    conn.sendall(ANSWER)


def answer(conn: Connection) -> None:
    while conn.recv(8192):
        conn.sendall(ANSWER)


def answer_idle(conn: Connection) -> None:
    while True:
        with conn.idle():
            data = conn.recv(8192)
        if not data:
            return
        conn.sendall(ANSWER)


def answer_lines(conn: Connection) -> None:
    while True:
        conn.recv_until(b"\r\n")
        conn.sendall(ANSWER)


def answer_within_deadline(conn: Connection) -> None:
    while True:
        with conn.deadline(60):
            data = conn.recv(8192)
        if not data:
            return
        conn.sendall(ANSWER)


def close_socket(conn: Connection) -> None:
    conn.stream.sock.close()


def accept_alone(pool: HandlerPool | None) -> Callable[[], None]:
    """An accept loop without a server: each connection is closed at once, in the hub or in a greenlet of the pool."""

    def serve() -> None:
        (listener,) = open_listeners("127.0.0.1:0")

        def handle(conn: Connection, _address: Any) -> None:
            if pool is None:
                close_socket(conn)
            else:
                pool.run_one(close_socket, conn)

        Acceptor.on(listener, handle).start()
        announce(listener.address)
        Event().wait()

    return serve


def serve(handler: Callable[[Connection], None], **options: Any) -> Callable[[], None]:
    def run() -> None:
        tls = os.environ.get(CERTIFICATE)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            options["tls"] = context
        server = Server("127.0.0.1:0", handler, **options)
        server.start()
        announce(server.address)
        server.serve_forever()

    return run


def announce(address: str) -> None:
    gevent.signal_handler(signal.SIGUSR1, os.getloadavg)  # MARK
    print(f"listening on {address}", flush=True)


# -- the scenarios -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """What is counted.

    Attributes:
        what: in the table.
        serve: runs the server until SIGTERM.
        sends: by the client in each round; b"": it waits for the end.
        keep: the connections stay open from round to round.
        tls: they are encrypted.
        answer: bytes that the client waits for.
    """

    what: str
    serve: Callable[[], None]
    sends: bytes = REQUEST
    keep: bool = True
    tls: bool = False
    answer: int = len(ANSWER)


SCENARIOS = {
    # A connection.
    "accept": Scenario("accept, and a Connection of it", accept_alone(None), b"", keep=False, answer=0),
    "pool": Scenario("that, and a greenlet of the pool", accept_alone(HandlerPool(100)), b"", keep=False, answer=0),
    "server": Scenario(
        "that, by a Server: counted, admitted, closed", serve(leave, linger=0), b"", keep=False, answer=0
    ),
    "linger": Scenario("that, with a lingering close", serve(leave), b"", keep=False, answer=0),
    "connection": Scenario("that, with one request", serve(answer_one), keep=False),
    "limits": Scenario(
        "that, with `client_limits`", serve(answer_one, client_limits=ClientLimits(connections=1000)), keep=False
    ),
    "proxy": Scenario(
        "that, with a PROXY header",
        serve(answer_one, proxy_protocol=ProxyProtocol(["127.0.0.1"])),
        HEADER + REQUEST,
        keep=False,
    ),
    "tls": Scenario("that, with a TLS 1.3 handshake", serve(answer_one), keep=False, tls=True),
    # A request.
    "keep-alive": Scenario("`recv`, `sendall`", serve(answer)),
    "timeout": Scenario("with a timeout", serve(answer, timeout=60)),
    "deadline": Scenario("in a `deadline()` block", serve(answer_within_deadline)),
    "min-rate": Scenario("with `min_rate` and `handler_timeout`", serve(answer, min_rate=1, handler_timeout=3600)),
    "idle": Scenario("in an `idle()` block", serve(answer_idle)),
    "line": Scenario("`recv_until` in place of `recv`", serve(answer_lines), LINE),
    "tls-keep-alive": Scenario("over TLS 1.3", serve(answer), tls=True),
}


# -- the client, outside -----------------------------------------------------------------------------------------------


class Clients:
    """32 of them."""

    def __init__(self, scenario: Scenario, host: str, port: int, server: subprocess.Popen[bytes]) -> None:
        self._scenario = scenario
        self._address = (host, port)
        self._server = server
        self._socks: list[socket.socket] = []

    def connect(self) -> None:
        self._socks = [socket.create_connection(self._address, PATIENCE) for _ in range(CLIENTS)]
        if self._scenario.tls:
            self._server.send_signal(signal.SIGCONT)  # which has to answer
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._socks = [context.wrap_socket(sock) for sock in self._socks]

    def rounds(self, number: int) -> None:
        for _ in range(number):
            self._server.send_signal(signal.SIGSTOP)
            self._round()
        self._server.send_signal(signal.SIGCONT)

    def _round(self) -> None:
        if not (self._scenario.keep and self._socks):
            self.connect()
        if self._scenario.sends:
            for sock in self._socks:
                sock.sendall(self._scenario.sends)
        self._server.send_signal(signal.SIGCONT)
        for sock in self._socks:
            self._read(sock)
        if not self._scenario.keep:
            self.close()

    def _read(self, sock: socket.socket) -> None:
        left = self._scenario.answer
        while left > 0:
            data = sock.recv(left)
            if not data:
                raise BenchError("the server closed before it had answered")
            left -= len(data)
        if not self._scenario.keep and sock.recv(1):
            raise BenchError("the server answered too much")

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


def count(name: str, certificate: str) -> int:
    """Run a server under callgrind; return the instructions that it executed for each request, or connection."""
    scenario = SCENARIOS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", f"--dump-before={MARK}"]
        command += [sys.executable, "-m", "loadtests.bench.instructions", "--serve", name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
        if scenario.tls:
            environment[CERTIFICATE] = certificate
        log = Path(folder, "stderr")
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            found = read_address(process.stdout.readline().decode())
            if found is None:
                raise BenchError(f"the server of {name} did not start: {log.read_text()[-2000:]}")
            clients = Clients(scenario, *found, process)
            clients.rounds(WARM)
            mark(process, Path(f"{out}.1"))
            clients.rounds(COUNTED)
            mark(process, second := Path(f"{out}.2"))
            clients.close()
            process.terminate()
            process.wait(PATIENCE)
            counted = re.search(r"^(?:summary|totals): (\d+)", second.read_text(), re.MULTILINE)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if counted is None:
            raise BenchError(f"callgrind has counted nothing: {log.read_text()[-2000:]}")
        return round(int(counted[1]) / (COUNTED * CLIENTS))


def mark(process: subprocess.Popen[bytes], dump: Path) -> None:
    """Have the server call MARK, and wait until callgrind has written the file."""
    give_up = time.monotonic() + PATIENCE
    process.send_signal(signal.SIGUSR1)
    while not (dump.exists() and "totals:" in dump.read_text()):
        if process.poll() is not None or time.monotonic() > give_up:
            raise BenchError(f"callgrind has not written {dump.name}")
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "python -m loadtests.bench.instructions"
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--serve", choices=SCENARIOS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        SCENARIOS[options.serve].serve()
        return 0
    if unknown := [name for name in options.scenario if name not in SCENARIOS]:
        parser.error(f"scenarios must be of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    if shutil.which("valgrind") is None:
        print("python -m loadtests.bench.instructions: needs valgrind: apt-get install valgrind", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            certificate = make_pem(folder)
            print("| scenario | counted | instructions |\n| --- | --- | ---: |")
            for name in options.scenario or SCENARIOS:
                print(f"| {name} | {SCENARIOS[name].what} | {count(name, certificate):,} |", flush=True)
    except (BenchError, OSError) as problem:
        print(f"python -m loadtests.bench.instructions: {problem}", file=sys.stderr)
        return 1
    return 0


def make_pem(folder: str) -> str:
    """Make an ECDSA P-256 certificate; returns a file with it and its key."""
    from .request_cost import make_certificate

    options = make_certificate(folder)
    path = Path(folder, "both.pem")
    path.write_bytes(b"".join(Path(one).read_bytes() for one in options if one.endswith(".pem")))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
