"""Programs that are started with standard descriptors closed: no socket gets their numbers, and all works as ever."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from gtcpserver.supervisor import ControlError, ask
from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import alive, wait_until

pytestmark = pytest.mark.slow

MODULE = [sys.executable, "-m", "gtcpserver"]

#: Which are closed.
CLOSED = [closed for count in range(4) for closed in combinations((0, 1, 2), count)]

# A program that needs all three of its standard descriptors to be as they should.
APP = """
import subprocess

def handler(conn):
    conn.recv_until(b"\\n")
    # With standard input, which is at its end, and standard error of this process.
    done = subprocess.run("cat; echo said >&2; echo done", shell=True, stdout=subprocess.PIPE, timeout=10)
    conn.sendall(done.stdout)
"""

OWN = """
import sys
{}
import gtcpserver
from app import handler

{}
"""

RUN = 'gtcpserver.run(handler, "unix:app.sock")'
RUN_WORKERS = 'gtcpserver.run(handler, "unix:app.sock", workers=1)'
SERVER = 'gtcpserver.Server("unix:app.sock", handler).serve_forever()'
STREAM_SERVER = """
def serve(sock, address):
    handler(sock)

gtcpserver.StreamServer(("127.0.0.1", int(sys.argv[1])), serve).serve_forever()
"""


def name_of(closed: Sequence[int]) -> str:
    return "closed " + (" ".join(map(str, closed)) or "none")


def without(closed: Sequence[int], command: Sequence[str]) -> list[str]:
    """The command, started with these descriptors closed."""
    return ["sh", "-c", 'exec "$@" ' + " ".join(f"{fd}>&-" for fd in closed), "sh", *command]


@contextmanager
def started(folder: Path, closed: Sequence[int], command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(APP)
    with (folder / "said").open("ab") as said:
        process = subprocess.Popen(
            without(closed, command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # Its session is its own: a new master and workers are in it.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def asked(path: Path, request: bytes = b"x\n") -> bytes:
    """What a server says, as soon as it listens."""

    def connected() -> socket.socket | None:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            return None
        return client

    with wait_until(connected, SOON) as client:
        client.settimeout(SOON)
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


def check_descriptors(pid: int, closed: Sequence[int]) -> None:
    """Those that were closed are /dev/null, for child processes as well."""
    for fd in closed:
        found = os.stat(f"/proc/{pid}/fd/{fd}")
        assert stat.S_ISCHR(found.st_mode), os.readlink(f"/proc/{pid}/fd/{fd}")
        assert found.st_rdev == os.stat("/dev/null").st_rdev
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            (flags,) = (line.split()[1] for line in file if line.startswith("flags:"))
        assert not int(flags, 8) & os.O_CLOEXEC
    for fd in {0, 1, 2} - set(closed):
        assert os.readlink(f"/proc/{pid}/fd/{fd}").startswith(("pipe:", "/"))


@pytest.mark.parametrize("closed", CLOSED, ids=name_of)
def test_a_server_serves_and_stops(tmp_path: Path, closed: tuple[int, ...]) -> None:
    with started(tmp_path, closed, [*MODULE, "serve", "app:handler", "--bind", "unix:app.sock"]) as process:
        assert asked(tmp_path / "app.sock") == b"done\n"
        check_descriptors(process.pid, closed)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    if 2 not in closed:
        assert "said\n" in said
        assert "listening on" in said


@pytest.mark.parametrize("closed", CLOSED, ids=name_of)
def test_workers_serve_are_reloaded_and_upgraded(tmp_path: Path, closed: tuple[int, ...]) -> None:
    options = ("--workers", "2", "--bind", "unix:app.sock", "--control", "ctl", "--log-level", "debug")
    control = str(tmp_path / "ctl")
    with started(tmp_path, closed, [*MODULE, "serve", "app:handler", *options]) as process:
        assert asked(tmp_path / "app.sock") == b"done\n"
        for command in ("reload", "upgrade"):
            assert ask(control, {"command": command}, SOON) == {"ok": True}
            assert asked(tmp_path / "app.sock") == b"done\n"
        status = ask(control, {"command": "status"}, SOON)
        assert status["pid"] != process.pid
        for pid in (status["pid"], *(worker["pid"] for worker in status["workers"])):
            check_descriptors(pid, closed)
        assert ask(control, {"command": "stop"}, SOON)
        assert process.wait(SOON) == 0
        wait_until(lambda: not alive(status["pid"]))
    assert "Traceback" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ("echo", "--bind", "unix:app.sock"),
        ("echo", "--bind", "unix:app.sock", "--workers", "1", "--tls-self-signed"),
        ("files", ".", "--bind", "unix:app.sock"),
        ("forward", "unix:app.sock", "127.0.0.1:9"),
        ("proxy", "--socks", "unix:app.sock"),
        ("proxy", "--http", "unix:app.sock", "--workers", "1"),
    ],
    ids=" ".join,
)
def test_every_server_command_starts_with_none_of_them(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / "app.sock"
    with started(tmp_path, (0, 1, 2), [*MODULE, *command]) as process:
        asked(path, b"")  # a path is there before its server catches signals
        check_descriptors(process.pid, (0, 1, 2))
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0


@pytest.mark.parametrize("call", [RUN, RUN_WORKERS, SERVER], ids=["run", "run with workers", "Server"])
@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"], ids=["", "patched"])
def test_a_program_of_ones_own_serves_without_them(tmp_path: Path, call: str, patch: str) -> None:
    (tmp_path / "own.py").write_text(OWN.format(patch, call))
    with started(tmp_path, (0, 1, 2), [sys.executable, "own.py"]) as process:
        assert asked(tmp_path / "app.sock") == b"done\n"
        check_descriptors(process.pid, (0, 1, 2))
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0


def test_a_stream_server_serves_without_them(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "own.py").write_text(OWN.format("from gevent import monkey; monkey.patch_all()", STREAM_SERVER))
    with started(tmp_path, (0, 1, 2), [sys.executable, "own.py", str(port)]) as process:

        def answer() -> bytes:
            try:
                with socket.create_connection(("127.0.0.1", port), SOON) as client:
                    client.sendall(b"x\n")
                    return client.makefile("rb").read()
            except ConnectionRefusedError:
                return b""

        assert wait_until(answer, SOON) == b"done\n"
        check_descriptors(process.pid, (0, 1, 2))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("--version",), 0),
        (("config", "check", "good.toml"), 0),
        (("config", "check", "bad.toml"), 2),
        (("ctl", "--control", "nobody", "status"), 1),
        (("serve", "no_such_module:handler"), 2),
        (("proxy", "--users-file", "-"), 2),
        (("dance",), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_ends_with_the_same_status_and_says_the_same(
    tmp_path: Path, command: tuple[str, ...], status: int
) -> None:
    (tmp_path / "good.toml").write_text('bind = "127.0.0.1:0"\n')
    (tmp_path / "bad.toml").write_text("no_such_setting = 1\n")

    def run(closed: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            without(closed, [*MODULE, *command]),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    running = {closed: run(closed) for closed in ((), (0,), (2,), (0, 1, 2))}
    said = {closed: process.communicate(timeout=SOON) for closed, process in running.items()}
    for closed, process in running.items():
        assert process.returncode == status, (closed, said[closed])
        for fd in (1, 2):
            assert said[closed][fd - 1] == (b"" if fd in closed else said[()][fd - 1]), (closed, fd)
    assert b"Traceback" not in said[()][1]


def test_ctl_steers_a_server_without_them(tmp_path: Path) -> None:
    options = ("--workers", "1", "--bind", "unix:app.sock", "--control", "ctl")
    with started(tmp_path, (0, 1, 2), [*MODULE, "echo", *options]):
        asked(tmp_path / "app.sock")
        for command in (["reload"], ["scale", "2"], ["stop"]):
            line = [*MODULE, "ctl", "--control", "ctl", *command]
            assert subprocess.run(without((0, 1, 2), line), cwd=tmp_path, check=False, timeout=SOON).returncode == 0
        with pytest.raises(ControlError):
            ask(str(tmp_path / "ctl"), {"command": "status"}, SOON)


WITHOUT_NULL = """
import os, sys
os.devnull = "/no/such/device"
from gtcpserver.cli import main
main()
"""


@pytest.mark.parametrize("closed", [(0,), (0, 1, 2)], ids=name_of)
def test_where_there_is_no_dev_null_either(tmp_path: Path, closed: tuple[int, ...]) -> None:
    arguments = ("serve", "app:handler", "--workers", "1", "--bind", "unix:app.sock", "--control", "ctl")
    with started(tmp_path, closed, [sys.executable, "-c", WITHOUT_NULL, *arguments]) as process:
        assert asked(tmp_path / "app.sock") == b"done\n"
        # Nothing of ours has the number.
        for fd in closed:
            assert os.readlink(f"/proc/{process.pid}/fd/{fd}").startswith("pipe:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
    for command, status in ((("--version",), 0), (("dance",), 2)):
        line = without((0, 1, 2), [sys.executable, "-c", WITHOUT_NULL, *command])
        assert subprocess.run(line, check=False, timeout=SOON).returncode == status


def test_a_load_test_starts_without_them(tmp_path: Path) -> None:
    root = ROOT
    look = "import loadtests, os, sys; sys.exit(not all(map(os.path.samestat, map(os.fstat, (0, 1, 2)), [os.stat('/dev/null')] * 3)) or sys.stdin.read() != '')"  # noqa: E501
    assert (
        subprocess.run(without((0, 1, 2), [sys.executable, "-c", look]), cwd=root, timeout=SOON, check=False).returncode
        == 0
    )
    line = without((0, 1, 2), [sys.executable, "-m", "loadtests.bench", "--help"])
    assert subprocess.run(line, cwd=root, timeout=SOON, check=False).returncode == 0


def test_descriptors_that_are_open_stay_what_they_are() -> None:
    look = """
import os, sys
listening = __import__("socket").socket()
os.dup2(listening.fileno(), 0)
sys.stdin = None
before = [os.fstat(fd) for fd in (0, 1, 2)]
from gtcpserver.process.standard_descriptors import open_standard_descriptors
open_standard_descriptors()
assert all(map(os.path.samestat, before, [os.fstat(fd) for fd in (0, 1, 2)]))
assert sys.stdin is None
"""
    subprocess.run([sys.executable, "-c", look], check=True, timeout=SOON)
