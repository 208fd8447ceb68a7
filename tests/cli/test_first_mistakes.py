"""What a new user does wrong first: one line that says what to do instead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from gtcpserver import ConfigError, Server
from gtcpserver.address import check_none_twice
from gtcpserver.plural import counted
from kit.commands import run_command
from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import COMMAND, wait_until

APP = """
import socket
def handle(conn):
    conn.sendall(b"hello\\n")
class Chat:
    def __init__(self, conn): ...
patched = socket.socket.__module__ != "socket"
def only_patched(conn): ...
if not patched:
    del only_patched
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(*arguments, cwd=folder)


def complaint(folder: Path, *arguments: str, status: int = 2) -> str:
    done = run_command(*arguments, cwd=folder)
    assert done.returncode == status, done.stderr
    return done.stderr.splitlines()[-1].removeprefix("gtcpserver: ")


# -- what is named -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "name", "hint"),
    [
        ("", "pkg/app.py:handle", 'use "pkg.app:..."'),
        ("pkg", "app.py:handle", 'use "pkg.app:...", in the folder {folder}'),
        ("pkg", "app:handle", 'use "pkg.app:...", in the folder {folder}'),
        ("", "pkg/inner/app.py:handle", 'use "pkg.inner.app:..."'),
    ],
)
def test_a_part_of_a_package_is_told_its_name(folder: Path, at: str, name: str, hint: str) -> None:
    for package in (folder / "pkg", folder / "pkg" / "inner"):
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "other.py").touch()
        (package / "app.py").write_text("from . import other\ndef handle(conn): ...\n")
    said = complaint(folder / at, "serve", name, status=1)
    assert said.endswith("; it is part of a package: " + hint.format(folder=folder))


@pytest.mark.slow
def test_a_class_is_told_what_to_give_instead(folder: Path) -> None:
    assert "app:Chat is a class; give a function" in complaint(folder, "serve", "app:Chat")


# -- files of settings -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[lisen]\nbacklog = 5", "line 1: there is no table [lisen]; did you mean [listen]?"),
        ("[client-limit]\nrate = 5", "line 1: there is no table [client-limit]; did you mean [client_limits]?"),
        ("[xyz]\nrate = 5", "line 1: there is no table [xyz]; there are [client_limits], [listen], "),
        ("\npool = = 5", "line 2: invalid value (column 8)"),
        ("\nbind = [1,\n2\n\n", "line 3: unclosed array (at the end of the file)"),
        ('bind = ["127.0.0.1:5", "localhost:5"]', 'line 1: bind: address "localhost:5" is given twice, the other time'),
    ],
)
def test_mistakes_in_a_file_have_one_form(folder: Path, text: str, said: str) -> None:
    (folder / "app.toml").write_text(text)
    assert complaint(folder, "config", "check", "app.toml").startswith(f"app.toml {said}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limit]\n", "line 1: there is no limit (at limit); did you mean limits?"),
        ("[rules]\nclient = []\n", "line 2: there is no client (at rules.client); did you mean clients?"),
        ("[[listener]]\nlisten-on = 1\n", "line 2: there is no listen-on (at listener[0].listen-on); did you mean"),
        ("\nx = = 1", "line 2: invalid value (column 5)"),
    ],
)
def test_so_do_those_in_the_file_of_a_proxy(folder: Path, text: str, said: str) -> None:
    (folder / "proxy.toml").write_text(text)
    assert complaint(folder, "proxy", "check", "proxy.toml").startswith(f"proxy.toml {said}")


@pytest.mark.slow
def test_check_imports_the_program_where_it_is_asked_to(folder: Path) -> None:
    (folder / "good.toml").write_text('handler = "app:only_patched"\non_connect = "app:handle"\n')
    done = run(folder, "config", "check", "--load", "good.toml")
    said = "good.toml is good: app:only_patched, app:handle can be loaded\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    (folder / "bad.toml").write_text('\nhandler = "app:handel"\n')
    assert run(folder, "config", "check", "bad.toml").returncode == 0
    said = complaint(folder, "config", "check", "--load", "bad.toml")
    assert said == "bad.toml line 2: handler: app has no 'handel'; did you mean 'handle'?"
    (folder / "none.toml").write_text("pool = 5\n")
    assert complaint(folder, "config", "check", "none.toml", "--load") == "--load: the settings name no handler"
    (folder / "fails.py").write_text("1 / 0")
    (folder / "fails.toml").write_text('handler = "fails:handle"')
    said = complaint(folder, "config", "check", "--load", "fails.toml", status=1)
    assert said == "fails raised ZeroDivisionError while it was imported"


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_an_address_that_is_given_twice_is_told_before_anything_is_opened(
    folder: Path, workers: tuple[str, ...]
) -> None:
    twice = ["--bind", "127.0.0.1:5", "--bind", "localhost:5"]
    said = complaint(folder, "serve", "app:handle", *twice, *workers)
    assert said == '--bind: address "localhost:5" is given twice, the other time as "127.0.0.1:5"'
    said = complaint(folder, "serve", "app:handle", "--bind", "127.0.0.1:5", "--metrics", "5", *workers)
    assert said == '--metrics: address "5" is given twice, the other time as "127.0.0.1:5"'


def test_addresses_are_the_same_where_they_cannot_both_be_had() -> None:
    for same in (
        ["*:5", ":5"],
        [5, ("127.0.0.1", 5)],
        ["unix:/x", "unix:/x"],
        ["fd:3", "fd:3"],
        ["LOCALHOST:5", "[::1]:5"],
    ):
        with pytest.raises(ConfigError, match="is given twice"):
            Server(same, print)  # type: ignore[arg-type]
    check_none_twice(["127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:5", "127.0.0.2:5", "[::1]:5", "unix:/x", "fd:3"])


def test_a_part_of_every_address_is_told_to_be_ours() -> None:
    ours = "already in use by this process: given twice, by another name, or"
    with Server("127.0.0.1:0", print) as one, pytest.raises(OSError, match=ours):
        Server(f"*:{one.port}", print).start()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", "1")])
def test_nothing_is_said_to_have_stopped_that_did_not_start(folder: Path, workers: tuple[str, ...]) -> None:
    done = run(folder, "serve", "app:nobody", "--bind", "127.0.0.1:0", *workers)
    assert done.returncode == 2
    assert "stopped:" not in done.stderr


# -- ctl and signals ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctl_takes_its_options_behind_the_command_as_well(folder: Path) -> None:
    before = complaint(folder, "ctl", "--control", "nobody", "status", status=1)
    assert "No such file" in before
    assert complaint(folder, "ctl", "status", "--control", "nobody", status=1) == before
    assert complaint(folder, "ctl", "--control", "another", "scale", "2", "--control", "nobody", status=1) == before
    assert "--timeout" in complaint(folder, "ctl", "status", "--timeout", "0")


@pytest.mark.slow
def test_a_single_process_is_not_ended_by_the_signals_of_a_master(folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "serve", "app:handle", "--bind", "unix:socket"], cwd=folder, stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        wait_until(lambda: b"listening on" in (folder / "log").read_bytes())
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: b"SIGUSR1: no log file" in (folder / "log").read_bytes())
        process.send_signal(signal.SIGUSR2)
        wait_until(lambda: b"SIGUSR2: an upgrade needs worker processes" in (folder / "log").read_bytes())
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SOON)
            client.connect(os.path.relpath(folder / "socket"))
            assert client.recv(6) == b"hello\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SOON) == 0
        assert b"stopped: " in (folder / "log").read_bytes()
    finally:
        process.kill()
        process.wait()


# -- words -------------------------------------------------------------------------------------------------------------


def test_one_is_not_several() -> None:
    assert [counted(n, "connection") for n in (0, 1, 2)] == ["0 connections", "1 connection", "2 connections"]


def test_make_load_listens_on_this_host_alone() -> None:
    root = ROOT
    command = subprocess.run(
        ["make", "--dry-run", "--silent", "load"], cwd=root, capture_output=True, text=True, timeout=SOON, check=True
    ).stdout
    assert "--web-host 127.0.0.1" in command.splitlines()[-1]
