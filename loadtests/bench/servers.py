"""The servers that are compared, and how they are started: each says "listening on HOST:PORT", or is told its port.

All of them know the same options: --listen HOST:PORT, --size BYTES, --no-keepalive, --sleep MS, --aes128, --timeout
SECONDS, --tls-cert FILE, --tls-key FILE; and give the same answer, which loadtests.bench.answers looks at.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise

import gtcpserver

from . import go_peers
from .measure import CPUS, SERVER_CPU, Listening
from .results import OURS
from .starting import PYTHON, drain, free_port, started, wait_until_it_accepts, wait_until_it_says_so

#: Worker processes of the row with several: all CPUs but the client's.
WORKERS = len(CPUS) - 1

#: The row of the same server in pure Python, where the others of ours are compiled.
PURE = f"{OURS}, pure Python"

#: name -> command, to which the scenario's options are added.
SERVERS: dict[str, list[str]] = {
    # The same work as the peers' handlers do; in the next row the wait between requests is marked as well.
    OURS: [PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0", "--no-idle"],
    PURE: ["env", "GTCPSERVER_PURE=1", PYTHON, "examples/http_server.py", "--listen", "127.0.0.1:0", "--no-idle"],
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
    **{name: go_peers.command(name) for name in go_peers.PROGRAMS},
}
#: Those that have all CPUs but the client's. With two CPUs there are none: see loadtests.bench.workers.
WITH_WORKERS = f"gtcpserver, {WORKERS} workers"
if WORKERS > 1:
    SERVERS[WITH_WORKERS] = [*SERVERS[OURS], "--workers", str(WORKERS)]

#: Names of the user's own.
OWN: list[str] = []

#: What a server needs, of Python's packages, besides the standard library and gevent.
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
    return [name for name in dict.fromkeys(names) if not why_missing(name)]


def why_missing(name: str) -> str:
    """Why a server cannot run here; "" if it can."""
    if name == PURE:
        return "" if gtcpserver.compiled else "nothing is compiled here, all rows are"
    if name in go_peers.PROGRAMS:
        return go_peers.why_missing(name)
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        return f'not installed: pip install ".[bench]" has {NEEDS[name]}'
    return ""


@contextmanager
def serving(name: str, options: Sequence[str] = ()) -> Iterator[Listening]:
    """Run a server, pinned to its CPU.

    Raises:
        BenchError: it does not start.
    """
    port = free_port() if any("{port}" in word for word in SERVERS[name]) else 0
    words = command_of(name, options, port)
    cpus = set(CPUS[:-1]) if name == WITH_WORKERS else {SERVER_CPU}
    # Where there are worker processes, their master says it, in the log, when all are ready.
    stderr = subprocess.STDOUT if "--workers" in words else None
    with started(name, words, cpus, subprocess.PIPE, stderr) as process:
        assert process.stdout is not None
        if port:
            drain(process.stdout)
            wait_until_it_accepts(name, process, port)
            yield Listening(process.pid, "127.0.0.1", port)
        else:
            host, number, _ = wait_until_it_says_so(name, process.stdout)
            drain(process.stdout)
            yield Listening(process.pid, host, number)
