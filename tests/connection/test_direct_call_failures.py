"""recv(2) and send(2) of a connection that fail, in both forms: nothing is lost, and nothing is sent twice.

The calls fail by strace, in one program for all cases: a line on its stdin is a function to be called, the line that it
writes says what that saw. A recv(2) that fails leaves in the kernel what it would have read.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from injection.strace import can_trace, injecting, rule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace"),
]

#: The peer is a descriptor that is read and written: what fails are the connection's calls alone.
PROGRAM = r"""
import errno, gc, os, signal, socket
import gevent
from gevent.os import nb_read, nb_write, tp_read
from gtcpserver import Connection

LONG = bytes(range(250)) * 240  # 60,000 bytes: one direct call, which the socket takes a part of

def caught(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno], conn.stream.has_raised(error)

def receive():
    nb_write(peer, b"first")
    return caught(conn.recv, 100), conn.bytes_received

def receive_within_a_deadline():
    nb_write(peer, b"first")
    with conn.deadline(30):
        return caught(conn.recv, 100), conn.bytes_received

def receive_after_a_wait():
    nb_write(peer, b"first")
    conn.recv(100)
    gevent.spawn(nb_write, peer, b"second")
    return caught(conn.recv, 100), conn.bytes_received

def receive_in_the_middle():
    nb_write(peer, b"a line")
    gevent.spawn(nb_write, peer, b" and its end\nrest")
    return caught(conn.recv_until, b"\n"), caught(conn.recv_exactly, 4)

def send():
    return caught(conn.sendall, b"answer"), conn.bytes_sent

def send_much():
    reader = gevent.spawn(read_to_the_end)
    said = caught(conn.sendall, LONG)
    conn.shutdown(socket.SHUT_WR)
    got = reader.get()
    return said, len(got) == conn.bytes_sent, got == LONG[:len(got)], len(got) == len(LONG)

def read_to_the_end():
    return b"".join(iter(lambda: nb_read(peer, 1000), b""))

def new():
    global conn, peer
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    conn = Connection(ours.family, ours.type, 0, ours.detach())
    peer = theirs.detach()
    os.set_blocking(peer, False)

def after():
    # What is left can be read; the connection serves on, both ways.
    left = b""
    conn.settimeout(0)
    while type(data := caught(conn.recv, 100)) is bytes and data:
        left += data
    conn.settimeout(None)
    nb_write(peer, b"ping")
    assert conn.recv(100) == b"ping"
    conn.sendall(b"pong")
    return left, nb_read(peer, 100)

def close():
    conn.close()
    os.close(peer)
    gc.collect()
    gevent.sleep(0)  # gevent closes watchers a little later
    return len(os.listdir("/proc/self/fd"))

signals = []
signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
new(), receive(), close()
print(os.getpid(), flush=True)
while name := tp_read(0, 100).decode().strip():
    print((globals()[name](), len(signals)), flush=True)
    signals.clear()
"""


class Program:
    def __init__(self) -> None:
        command = [sys.executable, "-c", PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._pid = int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def call(self, name: str) -> tuple[Any, int]:
        """Call a function there. Return what it returned, and how many signals came."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        value, signals = ast.literal_eval(self._line())
        return value, signals

    def call_with(self, name: str, failing: str, folder: Path) -> tuple[Any, int]:
        """Call it while system calls fail."""
        self.call("new")
        with injecting(self._pid, folder / "trace", failing) as trace:
            result = self.call(name)
            assert trace.failed() == 1
        return result

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    found = Program()
    yield found
    found.end()


#: The function, which of its calls fails, what it sees where the call is made again, and what it sees of error E; then
#: what is left to be read.
RECEIVES: dict[str, tuple[int, Any, Any, bytes]] = {
    "receive": (1, (b"first", 5), ("E", 0), b"first"),
    "receive_within_a_deadline": (1, (b"first", 5), ("E", 0), b"first"),
    "receive_after_a_wait": (2, (b"second", 11), ("E", 5), b"second"),
    "receive_in_the_middle": (2, (b"a line and its end\n", b"rest"), ("E", b"a li"), b"ne and its end\nrest"),
}

AGAIN = ("EINTR", "EAGAIN", "EINTR:signal=SIGUSR1")
FATAL = ("ECONNRESET", "ENOBUFS", "ENOMEM")


def expected(seen: Any, error: str) -> Any:
    return tuple((error, True) if one == "E" else one for one in seen)


@pytest.mark.parametrize("name", RECEIVES)
@pytest.mark.parametrize("error", [*AGAIN, *FATAL, "ETIMEDOUT"])
def test_a_recv_that_fails_loses_nothing(program: Program, tmp_path: Path, name: str, error: str) -> None:
    which, whole, failed, left = RECEIVES[name]
    seen, signals = program.call_with(name, rule("recvfrom", error, str(which)), tmp_path)
    assert seen == (whole if error in AGAIN else expected(failed, error))
    assert signals == error.count("signal")
    assert program.call("after")[0] == (b"" if error in AGAIN else left, b"pong")
    descriptors = program.call("close")
    program.call("new")
    assert program.call("close") == descriptors


@pytest.mark.parametrize("error", [*AGAIN, *FATAL, "EPIPE"])
def test_a_send_that_fails_has_sent_nothing(program: Program, tmp_path: Path, error: str) -> None:
    seen, signals = program.call_with("send", rule("sendto", error, "1"), tmp_path)
    assert seen == ((None, 6) if error in AGAIN else ((error, True), 0))
    assert signals == error.count("signal")
    assert program.call("after")[0] == (b"", b"answerpong" if error in AGAIN else b"pong")
    program.call("close")


@pytest.mark.parametrize("which", ["1", "2", "4"])
@pytest.mark.parametrize("error", [*AGAIN, *FATAL, "EPIPE"])
def test_bytes_sent_are_those_that_arrive(program: Program, tmp_path: Path, which: str, error: str) -> None:
    (said, counted, in_order, whole), signals = program.call_with("send_much", rule("sendto", error, which), tmp_path)
    assert said == (None if error in AGAIN else (error, True))
    assert (counted, in_order, whole) == (True, True, error in AGAIN)
    assert signals == error.count("signal")
    program.call("close")
