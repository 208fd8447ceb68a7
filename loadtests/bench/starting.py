"""Starting a server: on its CPUs, in a session of its own, which is how all of its processes are found and ended."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from ..local_servers import ROOT, START_SECONDS
from .measure import BenchError, Listening, kill_all, prepare, read_address

PYTHON = sys.executable


@contextmanager
def started(
    name: str,
    command: Sequence[str],
    cpus: set[int],
    stdout: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of the repository until the end of the block.

    Args:
        name: for messages.

    Raises:
        BenchError: there is no such program.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=stderr,
            bufsize=0,
            preexec_fn=prepare(cpus),
            start_new_session=True,
        )
    except OSError as problem:
        raise BenchError(f"{name} did not start: {problem}") from None
    try:
        yield process
    finally:
        kill_all(process.pid)
        process.wait()


@contextmanager
def serving_handler(handler: str, options: Sequence[str], cpus: set[int]) -> Iterator[tuple[Listening, str]]:
    """Run ``gtcpserver serve HANDLER`` on a free port; yields it, and its log until it listened.

    Raises:
        BenchError: it does not start.
    """
    name = f"gtcpserver serve {' '.join(options)}".strip()
    command = [PYTHON, "-m", "gtcpserver", "serve", handler, "--bind", "127.0.0.1:0", *options]
    with started(name, command, cpus, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        host, port, said = wait_until_it_says_so(name, process.stderr)
        drain(process.stderr)
        yield Listening(process.pid, host, port), said


def wait_until_it_says_so(name: str, stream: IO[bytes]) -> tuple[str, int, str]:
    """Wait for the line with "listening on HOST:PORT"; returns the two, and all that was said.

    Raises:
        BenchError: it ends, or says something else for START_SECONDS.
    """
    give_up = time.monotonic() + START_SECONDS
    said = ""
    while select.select([stream], [], [], max(0.0, give_up - time.monotonic()))[0]:
        line = stream.readline().decode(errors="replace")
        if not line:
            break
        said += line
        if found := read_address(line):
            return *found, said
    raise BenchError(f"{name} did not start: {said.strip()[-2000:] or 'nothing said'}")


def wait_until_it_accepts(name: str, process: subprocess.Popen[bytes], port: int) -> None:
    """Wait for a server that listens on the port it was told.

    Raises:
        BenchError: it ends, or nobody listens there for START_SECONDS; with what it said to a piped stderr.
    """
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > give_up:
                kill_all(process.pid)
                said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
                raise BenchError(f"{name} did not start: {said or f'nobody listens on port {port}'}") from None
            time.sleep(0.02)


def drain(stream: IO[bytes]) -> None:
    """Read what a server says from now on, or a full pipe stops it."""

    def read() -> None:
        with stream:
            while stream.read(1 << 16):
                pass

    threading.Thread(target=read, daemon=True).start()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
