"""For tests of single faults: a program whose system calls fail as told, and how its clients see that."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.patience import SOON

from . import strace

#: What the programs begin with: `say` tells the test something, a line each.
PRELUDE = """
import os, signal, sys, time
import gevent
import gtcpserver
from gtcpserver import Server

def say(text):
    os.write(1, f"{text}\\n".encode())

def told():
    gevent.os.tp_read(0, 1)  # the test has said `go`

def serve(server, stop_timeout=5.0):
    say(os.getpid())
    server.start()
    say(server.port)
    report = server.serve_forever(stop_timeout)
    say(f"finished {report.finished} ended {report.ended}")
"""


class Injected:
    """A program of this package, started under strace.

    Args:
        program: Python source, behind `PRELUDE`; it ends with ``serve(server)``, or says its process id and its port by
            itself.
        folder: where its log and the trace are kept.
        injections: as `strace.rule` writes them.
        arguments: of the program.

    Attributes:
        pid: of the program, not of strace.
        port: where it listens.
    """

    def __init__(
        self, program: str, folder: Path, injections: Sequence[str] = (), arguments: Sequence[Any] = ()
    ) -> None:
        self._log = folder / "log"
        self._trace = folder / "trace"
        source = PRELUDE + textwrap.dedent(program)
        command = [sys.executable, "-c", source, *map(str, arguments)]
        if injections:
            command = [*strace.command(injections, self._trace), "--seccomp-bpf", *command]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self.pid = self.port = 0
        try:
            self.pid = int(self.line())
            self.port = int(self.line())
        except BaseException:
            self.end()
            raise

    @contextlib.contextmanager
    def injecting(self, *injections: str) -> Iterator[None]:
        """Within the ``with`` block; the counts begin with it. Not for a program that was started with injections."""
        with strace.injecting(self.pid, self._trace, *injections):
            yield

    def line(self) -> str:
        """The next line that the program says."""
        got = _in_time(self.process.stdout.readline)
        if not got:
            raise AssertionError(f"the program has ended:\n{self.log()}")
        return got.decode().strip()

    def go(self) -> None:
        """Let the program's next `told` return."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, pattern: str, seconds: float = SOON) -> str:
        wait_until(lambda: re.search(pattern, self.log()), self.process, seconds)
        return self.log()

    def failed_calls(self) -> int:
        """How often a call was made to fail so far."""
        return strace.Trace(self._trace).failed()

    def wait_for_failed_call(self, count: int = 1) -> None:
        wait_until(lambda: self.failed_calls() >= count, self.process)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(SOON)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def ask(self, request: bytes = b"hello\n") -> bytes:
        """What an echo server makes of it."""
        with self.connect() as client:
            client.sendall(request)
            return client.recv(len(request), socket.MSG_WAITALL)

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = SOON) -> int:
        """The exit status (strace ends as its program does)."""
        return self.process.wait(seconds)

    def end(self) -> None:
        if self.pid and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()


@pytest.fixture
def injected(tmp_path: Path) -> Iterator[Callable[..., Injected]]:
    """``injected(program, *injections, arguments=())`` starts it; it is ended after the test."""
    started: list[Injected] = []

    def start(program: str, *injections: str, arguments: Sequence[Any] = ()) -> Injected:
        folder = tmp_path / f"injected{len(started)}"
        folder.mkdir()
        started.append(Injected(program, folder, injections, arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


@dataclass(frozen=True)
class Received:
    """What came on a connection, and how that ended: "end", "reset" or "nothing" (in time)."""

    size: int
    sha256: str
    how: str


def receive_all(sock: socket.socket) -> Received:
    digest, size = hashlib.sha256(), 0
    while True:
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            how = "reset"
            break
        except TimeoutError:
            how = "nothing"
            break
        if not data:
            how = "end"
            break
        digest.update(data)
        size += len(data)
    return Received(size, digest.hexdigest(), how)


def received_from(subject: Injected, receive_buffer: int | None = None, once: str = "") -> Received:
    """What a server that may reset its clients at once sends to one: a reset may come before `connect` has looked.

    Args:
        once: nothing is read before the server has logged it.
    """
    try:
        with subject.connect(receive_buffer) as client:
            subject.wait_for_log(once)
            return receive_all(client)
    except ConnectionResetError:
        return Received(0, hashlib.sha256().hexdigest(), "reset")


def whole(data: bytes) -> Received:
    """All of it came, and the connection ended in order."""
    return Received(len(data), hashlib.sha256(data).hexdigest(), "end")


class Source:
    """A server in a native thread that sends ``data`` to each client that has sent a byte, and closes.

    The byte is there for clients whose connection may be reset: a reset that comes before `socket.connect` has looked
    is an error of the connect.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.settimeout(SOON)
                client.recv(1)
                client.sendall(self._data)
                client.shutdown(socket.SHUT_WR)
                client.recv(1)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(SOON)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = SOON) -> Any:
    """Wait until it is true while the process lives; returns its value."""
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < give_up, f"still not true after {seconds} s"
        time.sleep(0.005)
    return value


def _in_time(function: Callable[[], bytes]) -> bytes:
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(function()), daemon=True)
    thread.start()
    thread.join(SOON)
    assert result, f"nothing was said within {SOON} s"
    return result[0]
