"""What the command line says of the program: a factory, its folder, its environment, its logging."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gtcpserver.cli import env_file
from gtcpserver.cli.commands import run as run_command
from gtcpserver.cli.env_file import BadEnvFile, parse
from kit.patience import SOON
from kit.supervised import Master, Start, masters

APP = """
import logging, os
def make():
    logging.getLogger("app").info("made")
    return lambda conn: conn.sendall(os.environ.get("WORD", "none").encode())
def wsgi():
    def application(environ, start_response):
        start_response("200 OK", [("Content-Length", "4")])
        return [b"wsgi"]
    return application
def number():
    return 5
def fails():
    raise LookupError("no such table")
def needs(more):
    pass
async def later():
    pass
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with masters(tmp_path, control=False) as start:
        yield start


def ask(master: Master, line: bytes = b"") -> bytes:
    with master.connect() as client:
        client.sendall(line)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


# -- factory, folder ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_factory_in_another_folder(start, tmp_path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "app.py").write_text(APP)
    master = start("--factory", "--app-dir", "src", handler="app:make", app="raise RuntimeError('the wrong one')")
    assert ask(master) == b"none"
    assert master.stop() == 0


@pytest.mark.slow
def test_a_factory_of_a_wsgi_application_in_workers(start) -> None:
    master = start("--factory", "--wsgi", "-w", "1", handler="app:wsgi", app=APP)
    assert ask(master, b"GET / HTTP/1.0\r\n\r\n").endswith(b"wsgi")
    assert master.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (
            ["app_of_factories:number", "--factory"],
            2,
            "what app_of_factories:number returned is not callable, it is an int",
        ),
        (["app_of_factories:needs", "--factory"], 2, "app_of_factories:needs must take no arguments; it takes (more)"),
        (["app_of_factories:later", "--factory"], 2, "app_of_factories:later is async; a factory is a plain function"),
        (["app_of_factories:fails", "--factory"], 1, "app_of_factories:fails raised LookupError"),
        (["app_of_factories:make", "--app-dir", "nowhere"], 2, "app_dir: there is no folder 'nowhere'"),
        (["app_of_factories:make"], 2, "app_of_factories:make must take one argument, the connection"),
    ],
)
def test_mistakes_in_the_program_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, status, told) -> None:
    (tmp_path / "app_of_factories.py").write_text(APP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "app_of_factories", raising=False)
    (tmp_path / "app.toml").write_text(
        f"handler = {arguments[0]!r}\nfactory = {str('--factory' in arguments).lower()}\n"
    )
    if "--app-dir" in arguments:
        with (tmp_path / "app.toml").open("a") as file:
            file.write(f"app_dir = {arguments[-1]!r}\n")
    assert run_command(["config", "check", "--load", "app.toml"]) == status
    assert told in capsys.readouterr().err.splitlines()[-1]


# -- environment -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_variables_of_a_file_are_settings_and_the_program_s(start, tmp_path) -> None:
    (tmp_path / "app.env").write_text("GTCPSERVER_WORKERS=1\nGTCPSERVER_FACTORY=yes\nWORD=from-file\nHOME=/nowhere\n")
    options = ("--env-file", "app.env", "--probation", "0")
    master = start(*options, handler="app:make", app=APP, env=os.environ | {"HOME": "/root"})
    assert "1 worker" in master.log()
    assert ask(master) == b"from-file"
    (tmp_path / "app.env").write_text("GTCPSERVER_WORKERS=1\nGTCPSERVER_FACTORY=yes\nWORD=new\n")
    master.send_signal(signal.SIGUSR2)
    master.pid = int(master.wait_for(r"listening on .* \(pid (\d+)", 2))
    master.wait_for("has left")
    assert ask(master) == b"new"
    assert master.stop() == 0


def test_what_is_set_stays_and_the_names_of_the_rest_are_kept(tmp_path) -> None:
    path = tmp_path / "env"
    path.write_text("\ufeffA=file\nB=file\n")
    environment = {"A": "before", "GTCPSERVER_ENV_FILE": str(path)}
    env_file.load(["serve", "app:handle"], environment)
    assert environment == {
        "A": "before",
        "B": "file",
        "GTCPSERVER_ENV_FILE": str(path),
        "GTCPSERVER_FROM_ENV_FILE": "B",
    }
    path.write_text("C=file\n")  # and another start that inherits these, as in an upgrade
    env_file.load(["serve", "app:handle"], environment)
    assert {name: environment.get(name) for name in "ABC"} == {"A": "before", "B": None, "C": "file"}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("X=plain text ", "plain text"),
        ("X=a # comment", "a"),
        ("X=a#b", "a#b"),
        ("X=", ""),
        ("export X = 1", "1"),
        ("X='single \\n # $HOME' # comment", "single \\n # $HOME"),
        ('X="two\\nlines \\"quoted\\" \\\\"', 'two\nlines "quoted" \\'),
        ("X=a=b", "a=b"),
        ("X=it's", "it's"),
        ("X=ü", "ü"),
        ("X=a\u2028b\x0cc", "a\u2028b\x0cc"),  # for str.splitlines these are ends of lines
    ],
)
def test_values(line, value) -> None:
    assert parse(f"\n# comment\n{line}\n", "env") == {"X": value}


@pytest.mark.parametrize(
    "line", ["secret", "1X=secret", "X='secret", 'X="secret', "X='a'secret", "=secret", "X=sec\0ret"]
)
def test_a_line_that_is_no_assignment_is_named_but_not_shown(line) -> None:
    with pytest.raises(BadEnvFile) as caught:
        parse(f"A=1\n{line}\n", "app.env")
    assert str(caught.value) == "app.env line 2: must be NAME=VALUE"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read"),
        (b"\xff", "cannot read"),
        (b"\xef\xbb\xbfoops", "env line 1: must be"),
        (b"A=" + b"a" * env_file.LARGEST, "must have at most 1048576 characters"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_usage_error(tmp_path, content, told) -> None:
    if content is not None:
        (tmp_path / "env").write_bytes(content)
    command = [sys.executable, "-m", "gtcpserver", "echo", "--env-file=env"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("gtcpserver: --env-file: ")
    assert told in line


# -- logging -----------------------------------------------------------------------------------------------------------

LOG_TOML = """
[formatters.json]
"()" = "gtcpserver.diagnostics.logs.JsonFormatter"
[handlers.file]
class = "logging.FileHandler"
filename = "app.log"
formatter = "json"
[loggers.app]
level = "INFO"
handlers = ["file"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
def test_logging_by_a_file(start, tmp_path, workers) -> None:
    (tmp_path / "log.toml").write_text(LOG_TOML)
    more = ["-w", "1"] if workers else []
    master = start("--log-config", "log.toml", "--factory", *more, handler="app:make", app=APP)
    assert ask(master) == b"none"
    assert master.stop() == 0
    (line,) = (tmp_path / "app.log").read_text().splitlines()
    assert json.loads(line)["message"] == "made"
    assert "listening on" in master.log()  # what the file does not name stays as it is


MISTAKES = [
    ("log.toml", "handlers = 5", "--log-config: log.toml: "),
    ("log.toml", "[handlers.a]\nclass = 'no.such.Class'", "--log-config: log.toml: Unable to configure handler 'a': "),
    ("log.toml", "a = ", "--log-config: log.toml line 1: "),
    ("log.json", "[]", "--log-config: log.json: must be an object, got list"),
    ("log.json", "{", "--log-config: log.json: Expecting property name"),
    ("log.json", "\udcff", "--log-config: log.json must be UTF-8"),
    ("log.toml", None, "--log-config: cannot read log.toml: No such file or directory"),
]


def test_mistakes_in_the_logging_are_told_in_one_line(tmp_path) -> None:
    program = f"""
import os
from gtcpserver.cli.commands import run
for name, text, told in {MISTAKES!r}:
    if text is None:
        os.unlink(name)
    else:
        open(name, "w", errors="surrogateescape").write(text)
    print(told, flush=True)
    assert run(["echo", "-b", "127.0.0.1:0", "--log-config", name]) == 2
assert run(["echo", "--log-config", "log.json", "--log-level", "debug"]) == 2
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON, check=False)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stderr.splitlines()
    assert last == "gtcpserver: --log-level: cannot be used together with --log-config, which has its own"
    for line, told in zip(lines, result.stdout.splitlines(), strict=True):
        assert line.startswith(f"gtcpserver: {told}")
