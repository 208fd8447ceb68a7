"""The system calls that compiled code makes itself: interrupted, on a blocking socket, out of memory."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from types import ModuleType

import gevent
import pytest
from gevent import socket as gevent_socket

import gtcpserver
from gtcpserver import Connection
from gtcpserver.server.accept_loop import AcceptLoop
from injection.strace import can_trace

testcapi: ModuleType | None
try:
    import _testcapi as testcapi
except ImportError:  # Python was built without its own tests
    testcapi = None

CLOSED_BY_A_SIGNAL = """
import os, signal, socket, sys
from gtcpserver import Connection

ours, peer = socket.socketpair()
conn = Connection(ours.family, ours.type, 0, ours.detach())
peer.send(b"mine")
victims = []

def close(*_):
    fd = conn.detach()
    os.close(fd)
    while fd not in [victim.fileno() for victim in victims]:
        victims.extend(socket.socketpair())
    for victim in victims:
        victim.send(b"SECRET")

signal.signal(signal.SIGUSR1, close)
try:
    print(conn.recv(100) if sys.argv[1] == "recv" else conn.sendall(b"INJECTED"))
except OSError as error:
    print(error.errno)
print({victim.recv(100, socket.MSG_DONTWAIT) for victim in victims})
"""


def interrupted(call: str, program: str, *arguments: str, which: int = 1) -> list[str]:
    """Run a program whose system call ``call`` is interrupted by SIGUSR1, once; return what it prints."""
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={call}:error=EINTR:signal=SIGUSR1:when={which}"]
    command = [*strace, sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace")
@pytest.mark.parametrize(("call", "name", "which"), [("recvfrom", "recv", 1), ("sendto", "sendall", 2)])
def test_a_signal_handler_that_closes_the_connection_hands_no_call_to_another(call: str, name: str, which: int) -> None:
    said = interrupted(call, CLOSED_BY_A_SIGNAL, name, which=which)
    assert said == ["9", "{b'SECRET'}"]


GOES_ON = """
import signal, socket
from gtcpserver import Connection

signals = []
signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
ours, peer = socket.socketpair()
conn = Connection(ours.family, ours.type, 0, ours.detach())
peer.send(b"mine")
conn.settimeout(0)
print(conn.recv(100), conn.sendall(b"answer"), peer.recv(100), signals)
"""


@pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace")
def test_an_interrupted_receive_is_made_again() -> None:
    assert interrupted("recvfrom", GOES_ON) == ["b'mine' None b'answer' [1]"]


@pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace")
def test_a_signal_handler_may_raise_in_a_receive() -> None:
    program = GOES_ON.replace("lambda *_: signals.append(1)", "signal.default_int_handler").replace(
        "print(", "try:\n    conn.recv(100)\nexcept KeyboardInterrupt:\n    signals.append(2)\nprint("
    )
    assert interrupted("recvfrom", program) == ["b'mine' None b'answer' [2]"]


@pytest.mark.skipif(not gtcpserver.compiled, reason="the socket module's recv() blocks then")
def test_a_direct_receive_never_blocks() -> None:
    """O_NONBLOCK belongs to the open file, which a child shares; a direct call holds the GIL."""
    ours, peer = socket.socketpair()
    conn = Connection(ours.family, ours.type, 0, ours.detach())
    with peer:
        subprocess.run([sys.executable, "-c", "import os; os.set_blocking(0, True)"], stdin=conn.fileno(), check=True)
        assert os.get_blocking(conn.fileno())
        reader = gevent.spawn(conn.recv, 100)
        gevent.spawn_later(0.01, peer.send, b"data")  # an event loop that is blocked would never send it
        assert reader.get(timeout=5) == b"data"
    conn.close()


@pytest.mark.skipif(not gtcpserver.compiled, reason="the socket module loses it then")
@pytest.mark.skipif(testcapi is None or not hasattr(testcapi, "set_nomemory"), reason="needs _testcapi")
def test_no_descriptor_is_lost_when_memory_runs_out_in_accept() -> None:
    """Numbers up to 256 need no memory: descriptors of a busy server are above."""
    assert testcapi is not None
    with ExitStack() as stack:
        listening = stack.enter_context(gevent_socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        loop = AcceptLoop(object(), listening, Connection)  # type: ignore[arg-type]
        for _ in range(300):
            stack.callback(os.close, os.dup(listening.fileno()))
        gc.collect()
        failures = 0
        for first in range(64):
            client = stack.enter_context(socket.create_connection(listening.getsockname()))
            before = len(os.listdir("/proc/self/fd"))
            accepted = None
            try:
                testcapi.set_nomemory(first, first + 1)
                try:
                    accepted = loop.accept()
                finally:
                    testcapi.remove_mem_hooks()
            except MemoryError:
                failures += 1
            if accepted is not None:
                accepted[0].close()
            assert len(os.listdir("/proc/self/fd")) == before, f"allocation {first}"
            client.close()
            if accepted is not None:
                break
        assert failures
