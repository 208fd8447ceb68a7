"""docs/troubleshooting.md has the lines that servers write."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.paths import ROOT
from kit.patience import SOON

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
COMMAND = [sys.executable, "-m", "gtcpserver", "serve"]

APP = """
import time
def handle(conn):
    conn.sendall(b"x")
def two(conn, more):
    pass
def slow(conn):
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        pass
    conn.sendall(b"x")
def hold(conn):
    conn.sendall(b"x")
    conn.recv(1)
"""

#: What differs from machine to machine, and from one run to the next.
VARIABLE = (
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"127\.0\.0\.1', \d+", "ADDRESS"),
    (r"192\.0\.2\.1:\d+", "ADDRESS"),
    (r"\(pid \d+ [^)]*\)", "(pid N)"),
    (r"\(pid \d+", "(pid N"),
    (r"\d+\.\d+ s", "S s"),
    (r"(?:/\S+/)?app\.py:\d+", "app.py:N"),
    (r"did you mean .*?\?", "did you mean ...?"),
    (r"looked in \S+", "looked in FOLDER"),
    (r"^\S+Z ", ""),
)


def plain(line: str) -> str:
    for pattern, word in VARIABLE:
        line = re.sub(pattern, word, line.strip())
    return line


#: The lines of the page.
LINES = {plain(line) for line in PAGE.splitlines() if line.startswith("    ")}


def check(output: str, *words: str) -> None:
    """Assert that the line with these words is one of the page's."""
    line = next(line for line in output.splitlines() if all(word in line for word in words))
    assert plain(line) in LINES, f"docs/troubleshooting.md has not: {line}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Any]]:
    started: list[subprocess.Popen[str]] = []

    def begin(handler: str, *arguments: str, limit: int | None = None) -> tuple[subprocess.Popen[str], int, str]:
        command = [*COMMAND, f"app:{handler}", "-b", "127.0.0.1:0", *arguments]
        if limit is not None:
            command = ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        return process, int(line.partition("127.0.0.1:")[2].split()[0]), line

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr is not None
    return next(line for line in process.stderr if word in line)


def run(folder: Path, *arguments: str, **variables: str) -> str:
    result = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    assert result.returncode in (1, 2)
    return result.stderr


@pytest.mark.slow
def test_lines_of_a_start_that_fails(folder, start) -> None:
    _, port, line = start("handle")
    check(line, "listening on")
    check(run(folder, "app:handle", "-b", f"127.0.0.1:{port}"), "already in use")
    check(run(folder, "app:handle", "-b", "192.0.2.1:5000"), "Cannot assign")


@pytest.mark.slow
def test_lines_of_a_handler_that_is_not_found(folder) -> None:
    for reference, word in (("ap:handle", "no module"), ("app:handel", "has no"), ("app:two", "must take")):
        check(run(folder, reference), word)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="as root alone: makes a namespace in which ports below 1024 are not free")
def test_line_of_a_port_without_permission(folder) -> None:
    # A fork without exec, since another user may not be able to read this Python.
    code = """
import os, sys
from gtcpserver.cli.commands import run, load_command
load_command("echo"), "x".encode("idna")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(run(["echo", "-b", "127.0.0.1:80"]))
"""
    result = subprocess.run(
        ["unshare", "--net", "/bin/sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )
    if result.returncode != 1 or "cannot listen" not in result.stderr:
        pytest.skip(f"no namespace here: {result.stderr[-200:]}")
    check(result.stderr, "cannot listen")


@pytest.mark.slow
def test_line_without_click(folder) -> None:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    (folder / "click.py").write_text("raise ModuleNotFoundError(name='click')")
    check(run(folder, "app:handle", PYTHONPATH=path), "needs click")


@pytest.mark.slow
def test_line_of_a_handler_that_blocks(start) -> None:
    process, port, _ = start("slow", "--block-detector=0.05")
    done = threading.Event()

    def clients() -> None:
        while not done.is_set():  # the detector begins a moment after the server
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                client.recv(1)
            done.wait(0.05)

    thread = threading.Thread(target=clients)
    thread.start()
    try:
        check(until(process, "event loop was blocked"), "blocked")
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
def test_line_of_too_many_open_files(start) -> None:
    process, port, _ = start("hold", limit=30)
    clients = [socket.create_connection(("127.0.0.1", port), SOON) for _ in range(30)]
    try:
        check(until(process, "cannot accept"), "cannot accept")
    finally:
        for client in clients:
            client.close()


@pytest.mark.slow
def test_lines_of_a_reload_and_a_stop(start) -> None:
    process, port, _ = start("hold", "--stop-timeout", "0.05")
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.recv(1)
        process.send_signal(signal.SIGHUP)
        check(until(process, "SIGHUP"), "SIGHUP")
        process.send_signal(signal.SIGTERM)
        check(until(process, "WARNING"), "cut")


def test_each_line_of_the_page_is_one_of_these() -> None:
    words = (
        *("already in use", "Permission denied", "Cannot assign", "no module", "has no", "must take", "needs click"),
        *("listening on", "event loop was blocked", "cannot accept", "SIGHUP", ": cut ADDRESS"),
    )
    assert [line for line in LINES if not any(word in line for word in words)] == []
    assert len(LINES) == len(words)
