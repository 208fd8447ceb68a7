"""The servers that are compared, and how they are started: each says "listening on HOST:PORT", or is told its port.

All of them know the same options: --listen HOST:PORT, --size BYTES, --no-keepalive, --sleep MS, --aes128, --timeout
SECONDS, --tls-cert FILE, --tls-key FILE; and give the same answer, which loadtests.bench.answers looks at.
"""

from __future__ import annotations

import os
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise

from .measure import CPUS, ROOT, SERVER_CPU, START_TIMEOUT, BenchError, Listening, kill_all, prepare, read_address
from .results import OURS

PYTHON = sys.executable

#: Worker processes of the row with several: all CPUs but the client's.
WORKERS = len(CPUS) - 1

#: name -> command, to which the scenario's options are added.
SERVERS: dict[str, list[str]] = {
    # The same work as the peers' handlers do; in the next row the wait between requests is marked as well.
    OURS: [PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0", "--no-idle"],
    "gtcpserver, idle()": [PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0"],
    "gtcpserver StreamServer": [PYTHON, "loadtests/bench/peers/gtcpserver_stream.py"],
    "gevent StreamServer": [PYTHON, "loadtests/bench/peers/gevent_stream.py"],
    "gevent StreamServer, Pool": [PYTHON, "loadtests/bench/peers/gevent_stream.py", "--pool", "10000"],
    "asyncio streams": [PYTHON, "loadtests/bench/peers/asyncio_streams.py"],
    "asyncio Protocol": [PYTHON, "loadtests/bench/peers/asyncio_protocol.py"],
    "uvloop streams": [PYTHON, "loadtests/bench/peers/asyncio_streams.py", "--uvloop"],
    "uvloop Protocol": [PYTHON, "loadtests/bench/peers/asyncio_protocol.py", "--uvloop"],
    "Twisted": [PYTHON, "loadtests/bench/peers/twisted_protocol.py"],
    "trio": [PYTHON, "loadtests/bench/peers/trio_streams.py"],
    "threads": [PYTHON, "loadtests/bench/peers/threads_socketserver.py"],
}
#: Those that have all CPUs but the client's. With two CPUs there are none: see loadtests.bench.workers.
WITH_WORKERS = f"gtcpserver, {WORKERS} workers"
if WORKERS > 1:
    SERVERS[WITH_WORKERS] = [*SERVERS[OURS], "--workers", str(WORKERS)]

#: Names of the user's own.
OWN: list[str] = []

#: What a server needs besides the standard library and gevent.
NEEDS = {"uvloop streams": "uvloop", "uvloop Protocol": "uvloop", "Twisted": "twisted", "trio": "trio"}


def add_server(text: str) -> str:
    """Take a "NAME=COMMAND" of the user's; returns the name.

    "{port}" in the command is replaced by a free port, and the server is ready when it accepts there; otherwise it must
    say "listening on HOST:PORT". The scenario's options are put behind it, or in the place of "{options}", or not at
    all where one of them is named alone: see :func:`values_of`.

    Raises:
        ValueError: it is not of that form.
    """
    name, equals, command = text.partition("=")
    if not equals or not name.strip() or not command.strip():
        raise ValueError(f"must be NAME=COMMAND, got {text!r}")
    if name.strip() in SERVERS:
        raise ValueError(f"{name.strip()!r} is the name of one that is there, got {text!r}")
    SERVERS[name.strip()] = shlex.split(command)
    OWN.append(name.strip())
    return name.strip()


def values_of(options: Sequence[str]) -> dict[str, str]:
    """A scenario's options for a server that has others: "{size}" in its command is bytes, "{sleep}" ms, "{timeout}"
    seconds, "{keepalive}" and "{aes128}" true or false, "{cert}" and "{key}" files, empty without TLS."""
    values = {"size": "1024", "sleep": "0", "timeout": "0", "cert": "", "key": ""}
    values |= {"keepalive": str("--no-keepalive" not in options).lower(), "aes128": str("--aes128" in options).lower()}
    for option, value in pairwise(options):
        name = option.removeprefix("--").removeprefix("tls-")
        if option.startswith("--") and name in values and not value.startswith("--"):
            values[name] = value
    return values


def command_of(name: str, options: Sequence[str], port: int) -> list[str]:
    """What is run."""
    words = list(SERVERS[name])
    values = values_of(options)
    named = any(f"{{{value}}}" in word for word in words for value in values)
    if "{options}" in words:
        place = words.index("{options}")
        words[place : place + 1] = options
    elif not named:
        words += options
    for value, text in {**values, "port": str(port)}.items():
        words = [word.replace(f"{{{value}}}", text) for word in words]
    return words


def installed(names: Sequence[str]) -> list[str]:
    """Those that can run here, each once."""
    return [name for name in dict.fromkeys(names) if name not in NEEDS or find_spec(NEEDS[name]) is not None]


@contextmanager
def serving(name: str, options: Sequence[str] = ()) -> Iterator[Listening]:
    """Run a server, pinned to its CPU.

    Raises:
        BenchError: it does not start.
    """
    port = free_port() if any("{port}" in word for word in SERVERS[name]) else 0
    words = command_of(name, options, port)
    cpus = set(CPUS[:-1]) if name == WITH_WORKERS else {SERVER_CPU}
    try:
        process = _start(words, cpus)
    except OSError as problem:
        raise BenchError(f"{name} did not start: {problem}") from None
    try:
        if port:
            _drain(process)
            _wait_for(process, port)
            yield Listening(process.pid, "127.0.0.1", port)
            return
        address = _address_said_by(process, name)
        _drain(process)
        yield Listening(process.pid, *address)
    finally:
        kill_all(process.pid)
        process.wait()


def _start(words: list[str], cpus: set[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        # Where there are worker processes, their master says it, in the log, when all are ready.
        stderr=subprocess.STDOUT if "--workers" in words else None,
        bufsize=0,
        preexec_fn=prepare(cpus),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def _drain(process: subprocess.Popen[bytes]) -> None:
    """Read what it says from now on, or a full pipe stops it."""

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            while process.stdout.read(1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()


def _address_said_by(process: subprocess.Popen[bytes], name: str) -> tuple[str, int]:
    assert process.stdout is not None
    give_up = time.monotonic() + START_TIMEOUT
    said = "nothing said"
    while select.select([process.stdout], [], [], max(0.0, give_up - time.monotonic()))[0]:
        line = process.stdout.readline().decode(errors="replace")
        if not line:
            break
        said = line
        found = read_address(line)
        if found is not None:
            return found
    raise BenchError(f"{name} did not start: {said!r}")


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_TIMEOUT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                raise BenchError(f"{process.args!r} did not start: nobody listens on port {port}") from None
            time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
