"""Settings from a file and from the environment, in the real command; and that the documentation has all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.cli import wants_monkey_patch
from gtcpserver.cli.commands import load_command
from gtcpserver.cli.commands import run as run_command
from gtcpserver.cli.config import library_defaults
from gtcpserver.cli.settings import key_of, settings_of
from gtcpserver.files.toml_file import Lines, parse_text
from kit import commands
from kit.paths import ROOT
from kit.patience import SOON

COMMAND = [sys.executable, "-m", "gtcpserver"]

APP = """
import os, socket
def handle(conn):
    conn.settimeout(60)
    conn.sendall(conn.recv_until(b"\\n").upper())
def reverse(conn):
    conn.sendall(conn.recv_until(b"\\n").strip()[::-1] + b"\\n")
def patched(conn):
    conn.sendall(f"{'gevent' in socket.socket.__module__}\\n".encode())
def pool(conn):
    conn.sendall(f"{conn.server.pool.size} {conn.server.timeout} {conn.server.max_connections}\\n".encode())
"""


class Running:
    """A server's process and what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = 0

    def wait_for(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"{pattern!r} never came, but: {self.lines}")

    def ask(self, line: bytes = b"hello\n") -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), SOON) as client:
            client.sendall(line)
            with client.makefile("rb") as file:
                return file.readline().strip()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(SOON) == 0
        assert self.process.stderr is not None
        self.lines += self.process.stderr.read().splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def environment(variables: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GTCPSERVER_")}
    return clean | variables


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Running]]:
    started = []

    def begin(*arguments: str, **variables: str) -> Running:
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, env=environment(variables), stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        running = Running(process)
        running.port = int(running.wait_for(r"listening on 127\.0\.0\.1:(\d+)")[1])
        return running

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture
def run(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return commands.run_command(*arguments, cwd=folder, env=environment(variables))

    return call


@pytest.mark.slow
def test_a_file_is_enough(start, folder) -> None:
    (folder / "app.toml").write_text(
        'handler = "app:pool"\nbind = "127.0.0.1:0"\npool = 7\ntimeout = 5.5\nmax_connections = "none"\n'
    )
    server = start("serve", "--config", "app.toml")
    assert server.ask() == b"7 5.5 None"
    server.stop()


@pytest.mark.slow
def test_the_environment_is_enough(start) -> None:
    server = start("serve", GTCPSERVER_HANDLER="app:pool", GTCPSERVER_BIND="127.0.0.1:0", GTCPSERVER_POOL="9")
    assert server.ask() == b"9 None None"
    server.stop()


@pytest.mark.slow
def test_the_command_line_goes_before_the_environment_and_that_before_the_file(start, folder) -> None:
    (folder / "app.toml").write_text(
        'handler = "app:handle"\nbind = "127.0.0.1:0"\npool = 1\ntimeout = 1\nmax_connections = 1\n'
    )
    server = start(
        *("serve", "app:pool", "--pool", "3"),
        GTCPSERVER_CONFIG="app.toml",
        GTCPSERVER_POOL="2",
        GTCPSERVER_TIMEOUT="2",
    )
    assert server.ask() == b"3 2.0 1"


@pytest.mark.slow
def test_values_separated_by_spaces_are_several(start) -> None:
    server = start("echo", GTCPSERVER_BIND="127.0.0.1:0 127.0.0.1:0", GTCPSERVER_REUSE_PORT="no")
    assert server.lines[-1].count("127.0.0.1:") == 2
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "environment"])
def test_forward_and_files_have_settings_too(start, folder, place) -> None:
    target = start("echo", GTCPSERVER_BIND="127.0.0.1:0")
    if place == "file":
        (folder / "f.toml").write_text(
            f'bind = "127.0.0.1:0"\ntargets = ["127.0.0.1:{target.port}"]\nbalance = "least"'
        )
        forward = start("forward", "--config", "f.toml")
    else:
        variables = {"GTCPSERVER_BIND": "127.0.0.1:0", "GTCPSERVER_TARGETS": f"127.0.0.1:{target.port}"}
        forward = start("forward", **variables)
    assert forward.ask() == b"hello"
    files = start("files", GTCPSERVER_DIRECTORY=str(folder), GTCPSERVER_BIND="127.0.0.1:0")
    assert files.ask(b"GET /app.py HTTP/1.0\r\n\r\n") == b"HTTP/1.1 200 OK"


@pytest.mark.slow
def test_the_environment_is_enough_for_the_proxy(start) -> None:
    pytest.importorskip("msgspec")
    variables = {
        "GTCPSERVER_MIXED": "127.0.0.1:0",
        "GTCPSERVER_PROXY_USER": "ada:secret eve:pw",
        "GTCPSERVER_USER": "www-data",  # of other commands, which run their workers so
        "GTCPSERVER_POOL": "33",
        "GTCPSERVER_ACCESS_LOG": "json",
    }
    proxy = start("proxy", **variables)
    assert proxy.lines[-1].endswith("pool 33)")
    assert not [line for line in proxy.lines if "WARNING" in line]  # as for passwords that ps shows to others
    assert proxy.ask(b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n").startswith(b"HTTP/1.1 407")
    assert proxy.wait_for('"result": ?"authentication_failed"')


@pytest.mark.slow
def test_the_proxys_command_line_goes_before_its_environment(start) -> None:
    pytest.importorskip("msgspec")
    proxy = start("proxy", "--mixed", "127.0.0.1:0", GTCPSERVER_MIXED="127.0.0.1:1")
    assert proxy.lines[-1].count("127.0.0.1:") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variables", "style"),
    [
        ([], {}, "text"),
        ([], {"GTCPSERVER_ACCESS_LOG": "json"}, "json"),
        (["--access-log", "text"], {"GTCPSERVER_ACCESS_LOG": "json"}, "text"),
        (["--access-log", "json", "--no-redact"], {"GTCPSERVER_REDACT": "yes"}, "json"),
    ],
)
def test_the_proxys_access_log_may_be_set_beside_its_file(start, folder, arguments, variables, style) -> None:
    pytest.importorskip("msgspec")
    (folder / "proxy.toml").write_text('[[listener]]\nlisten = "127.0.0.1:0"\n[log]\nstyle = "text"\n')
    proxy = start("proxy", "--config", "proxy.toml", *arguments, **variables)
    proxy.ask(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")
    assert proxy.wait_for('"asked": ?"127.0.0.1:1"' if style == "json" else "asked=127.0.0.1:1")


@pytest.mark.slow
def test_the_proxys_own_file_may_be_named_by_the_environment(start, run, folder) -> None:
    pytest.importorskip("msgspec")
    (folder / "proxy.toml").write_text('[[listener]]\nlisten = "127.0.0.1:0"\n')
    assert start("proxy", GTCPSERVER_CONFIG="proxy.toml").ask(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert run("proxy", "check", "proxy.toml", GTCPSERVER_CONFIG="no.toml").returncode == 0


@pytest.mark.slow
def test_a_variable_that_is_no_setting_is_a_warning(start) -> None:
    server = start(
        "echo", GTCPSERVER_BIND="127.0.0.1:0", GTCPSERVER_POOLL="3", GTCPSERVER_TARGETS="x", GTCPSERVER_CONTROL="y"
    )
    warnings = [line for line in server.lines if "WARNING" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith("there is no setting GTCPSERVER_POOLL; did you mean GTCPSERVER_POOL?")


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x = 1", ["line 1: there is no key x"]),
        ("\nbacklog = 1", ["line 2: there is no key backlog; did you mean listen.backlog?"]),
        ("stop-timeout = 1", ["line 1: there is no key stop-timeout; did you mean stop_timeout?"]),
        ("[listen]\nback_log = 1", ["line 2: there is no key listen.back_log; did you mean listen.backlog?"]),
        ('listen = "*:80"', ['line 1: listen: must be a table, [listen], got "*:80"; where to listen is "bind"']),
        ("pool = true", ['line 1: pool: must be a whole number or "none", got true']),
        ("pool = 1.5", ['line 1: pool: must be a whole number or "none", got 1.5']),
        ('pool = "5"', ['line 1: pool: must be a whole number or "none", got "5"']),
        ("pool = 0", ["line 1: pool: must have at least 1 place"]),
        ("timeout = -1", ["line 1: timeout: must be a number, more than 0"]),
        ("timeout = nan", ["line 1: timeout: must be a number, more than 0"]),
        ("stop_timeout = -1", ["line 1: stop_timeout: must be"]),
        ('preload = "yes"', ['line 1: preload: must be true or false, got "yes"']),
        ("on_full = 5", ["line 1: on_full: must be text in quotes, got 5"]),
        ('on_full = "drop"', ["line 1: on_full: 'drop' is not one of"]),
        ("workers = []", ['line 1: workers: must be a whole number or "auto", got []']),
        ("workers = 0", ["line 1: workers: must be"]),
        ('bind = ["127.0.0.1:0", "nowhere"]', ['line 1: bind: address must be "host:port"']),
        ("[listen]\nunix_mode = 0o660", ['line 2: listen.unix_mode: must be octal digits in quotes, such as "660"']),
        ('[listen]\nextra = [\n"x"\n]', ["line 2: listen.extra: must be LEVEL:OPTION:VALUE"]),
        ('[tls]\nsni = "a=b"', ["line 2: tls.sni: must be a table"]),
        ('[tls]\nsni = { "a.b" = 5 }', ['line 2: tls.sni: "a.b" must be a certificate file']),
        ("[tls]\npassword_file = '/no/such'", ["line 2: tls.password_file: cannot read '/no/such'"]),
        ("[client_limits]\nburst = 5", ["line 2: client_limits.burst: must come together with new_per_second"]),
        ("[client_limits]\nnew_per_second = 0\nburst = 5", ["line 2: client_limits.new_per_second: must be"]),
        ('[proxy_protocol]\ntrusted = "x"', ["line 2: proxy_protocol.trusted: must be"]),
        ("pid_file = 'x'", ["line 1: pid_file: needs --workers"]),
        (
            "handler = 5\n[tls]\nwatch = 'x'\n[listen]\nno = 1",
            ["line 1: handler", "line 3: tls.watch", "line 5: there"],
        ),
        (
            "pool = -1\ntimeout = 0\n[listen]\nbacklog = 0",
            ["line 1: pool", "line 2: timeout", "line 4: listen.backlog"],
        ),
    ],
)
def test_every_mistake_is_told_with_its_line(folder, monkeypatch, capsys, text, wanted) -> None:
    (folder / "bad.toml").write_text(text)
    monkeypatch.chdir(folder)
    assert run_command(["config", "check", "bad.toml"]) == 2
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == len(wanted), lines
    for line, start in zip(lines, wanted, strict=True):
        assert line.startswith(f"gtcpserver: bad.toml {start}")


@pytest.mark.slow
def test_a_file_that_is_none(run, folder) -> None:
    (folder / "bad.toml").write_text("pool = = 5")
    (folder / "latin.toml").write_bytes(b"handler = '\xe4'")
    for name, words in (
        ("bad.toml", "bad.toml line 1: invalid value (column"),
        ("latin.toml", "must be UTF-8"),
        ("no.toml", "cannot read no.toml"),
    ):
        result = run("serve", "app:handle", "--config", name)
        assert result.returncode == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_mistake_in_the_environment_is_told_by_its_name(run) -> None:
    for value, words in (("many", "must be a whole number"), ("0", "must have at least 1 place")):
        result = run("serve", "app:handle", GTCPSERVER_POOL=value)
        assert (result.returncode, result.stderr[:29]) == (2, "gtcpserver: GTCPSERVER_POOL: ")
        assert words in result.stderr
    result = run("serve", GTCPSERVER_HANDLER="app:nobody")
    assert (result.returncode, result.stderr) == (2, "gtcpserver: GTCPSERVER_HANDLER: app has no 'nobody'\n")


@pytest.mark.slow
def test_a_mistake_that_workers_find_is_told_by_its_line(run, folder) -> None:
    (folder / "app.toml").write_text('bind = "127.0.0.1:0"\nworkers = 1\nhandler = "app:nobody"')
    result = run("serve", "--config", "app.toml")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "gtcpserver: app.toml line 3: handler: app has no 'nobody'"


# -- config show, config check -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_show_says_what_holds_and_where_from(run, folder) -> None:
    (folder / "secret").write_text("s3cr3t\n")
    (folder / "app.toml").write_text(
        'handler = "no.such:handler"\npool = 5\n\n[tls]\npassword_file = "secret"\n[listen]\nunix_mode = "660"\n'
    )
    arguments = ("--config", "app.toml", "--linger", "3")
    result = run("config", "show", *arguments, GTCPSERVER_TIMEOUT="7", GTCPSERVER_TIMOUT="8")
    assert result.returncode == 0
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()}
    shown = {key: re.sub(r" {2,}", " | ", row) for key, row in rows.items()}
    assert shown["handler"] == "no.such:handler | app.toml:1"
    assert shown["pool"] == "5 | app.toml:2"
    assert shown["timeout"] == "7.0 | environment GTCPSERVER_TIMEOUT"
    assert shown["linger"] == "3.0 | command line"
    assert shown["min_rate_window"] == "10.0 | default"
    assert shown["tls.password_file"] == "(not shown) | app.toml:5"
    assert shown["listen.unix_mode"] == "660 | app.toml:7"
    assert "s3cr3t" not in result.stdout
    assert "did you mean GTCPSERVER_TIMEOUT?" in result.stderr
    told = json.loads(run("config", "show", "--json", *arguments).stdout)
    assert told["pool"] == {"value": 5, "source": "file", "path": "app.toml", "line": 2}
    assert told["timeout"] == {"value": None, "source": "default"}
    assert told.keys() == rows.keys()


@pytest.mark.slow
def test_show_takes_the_options_of_another_command(run) -> None:
    result = run("config", "show", "--command", "forward", "--balance", "least", "127.0.0.1:0", "127.0.0.1:1")
    assert re.search(r'^targets +\["127.0.0.1:1"\] +command line$', result.stdout, re.MULTILINE)
    wrong = run("config", "show", "--no-such")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.match("gtcpserver: no such option:? '?--no-such", wrong.stderr)


@pytest.mark.slow
def test_check_says_that_a_file_is_good(run, folder) -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    example = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    made = re.sub(r"\[tls\].*?\n\n", "", example[1], flags=re.DOTALL)  # files that are not here
    (folder / "app.toml").write_text(made.replace("/var/log/app/", ""))
    result = run("config", "check", "app.toml")
    assert (result.returncode, result.stdout, result.stderr) == (0, "app.toml is good\n", "")
    assert sorted(path.name for path in folder.iterdir()) == ["app.py", "app.toml"]  # nothing was begun


# -- a reload ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reload_reads_the_file_again(start, folder) -> None:
    file = folder / "app.toml"
    text = 'bind = "127.0.0.1:0"\nworkers = 1\n'
    file.write_text(text + 'handler = "app:pool"\npool = 5\n')
    server = start("serve", "--config", "app.toml")
    assert server.ask() == b"5 None None"

    file.write_text(text + 'handler = "app:pool"\npool = "many"\nx = 1\n')
    server.process.send_signal(signal.SIGHUP)
    failed = server.wait_for("reload 1 failed.*")[0]
    assert "app.toml line 4: pool: must be a whole number" in failed
    assert "app.toml line 5: there is no key x" in failed
    assert server.ask() == b"5 None None"

    changed = text.replace("= 1", "= 2") + 'stop_timeout = 5\nmetrics = "127.0.0.1:0"\nlisten.backlog = 9\n'
    file.write_text(changed + 'handler = "app:reverse"\npool = 6\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(r"reload \d+ is done")
    assert {line.partition("app.toml: ")[2] for line in server.lines if "changed: that takes" in line} == {
        "listen.backlog changed: that takes a restart",
        "workers changed: that takes gtcpserver ctl scale, or a restart",
        "stop_timeout changed: that takes an upgrade (SIGUSR2) or a restart",
        "metrics changed: that takes an upgrade (SIGUSR2) or a restart",
    }
    assert server.ask() == b"olleh"
    server.stop()


# -- before click ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "variables", "wanted"),
    [
        (["serve", "a:b", "--config", "off.toml"], {}, False),
        (["serve", "a:b", "--config=off.toml"], {}, False),
        (["serve", "a:b"], {"GTCPSERVER_CONFIG": "off.toml"}, False),
        (["serve", "a:b", "--config", "on.toml"], {"GTCPSERVER_CONFIG": "off.toml"}, True),
        (["serve", "a:b", "--config", "off.toml"], {"GTCPSERVER_MONKEY_PATCH": "Yes"}, True),
        (["serve", "a:b", "--config", "off.toml", "--monkey-patch"], {"GTCPSERVER_MONKEY_PATCH": "0"}, True),
        (["serve", "a:b"], {"GTCPSERVER_MONKEY_PATCH": "off"}, False),
        (["serve", "a:b"], {"GTCPSERVER_MONKEY_PATCH": ""}, True),
        (["serve", "a:b", "--config"], {}, True),
        (["serve", "a:b", "--config", "no.toml"], {}, True),
        (["serve", "a:b", "--config", "bad.toml"], {}, True),
        (["forward", "--config", "on.toml"], {}, False),
    ],
)
def test_the_patch_obeys_file_and_environment(folder, monkeypatch, arguments, variables, wanted) -> None:
    (folder / "off.toml").write_text("monkey_patch = false")
    (folder / "on.toml").write_text("monkey_patch = true")
    (folder / "bad.toml").write_text("monkey_patch = = false")
    monkeypatch.chdir(folder)
    assert wants_monkey_patch(arguments, variables) is wanted


@pytest.mark.slow
def test_a_program_is_as_unpatched_as_its_file_says(start, folder) -> None:
    (folder / "app.toml").write_text('handler = "app:patched"\nbind = "127.0.0.1:0"\nmonkey_patch = false')
    assert start("serve", "--config", "app.toml").ask() == b"False"
    assert start("serve", "--config", "app.toml", GTCPSERVER_MONKEY_PATCH="1").ask() == b"True"


# -- lines, and the documentation --------------------------------------------------------------------------------------

NAMES = st.text("abcxyz-_0189", min_size=1, max_size=8)
VALUES = st.sampled_from(["1", '"x"', '"""\n[x]\ny = 1\n"""', "[\n1, # [\n2,\n]", '["[", "["]', "{ a = 1 }", "'\\'"])


@pytest.mark.slow
@given(st.lists(st.tuples(NAMES, VALUES, st.integers(0, 2)), unique_by=lambda one: one[0], max_size=8))
def test_each_key_is_found_in_its_line(entries) -> None:
    text, wanted, table = "", {}, ""
    for name, value, kind in entries:
        if kind == 2:
            table = f"t-{name}"
            text += f"# a comment\n\n[{table}]\r\n"
        wanted[f"{table}.{name}" if table else name] = text.count("\n") + 1
        text += f"{name} = {value}\n"
    parse_text(text, "a test")
    lines = Lines(text)
    assert {key: lines.of(key) for key in wanted} == wanted
    assert lines.of("nowhere") is None


@pytest.mark.slow
@given(st.text())
def test_any_key_has_a_line_or_none(keys) -> None:
    assert Lines("[[a]]\nb = 1\n[[a]]\nb.c = 1\n").of(keys) in (None, 1, 2, 3, 4)
    assert Lines("[[a]]\nb = 1\n[[a]]\nb.c = 1\n").of("a[1].b.c") == 4


def rows_of_settings() -> list[str]:
    """The table of docs/settings.md."""
    defaults = library_defaults()
    seen: dict[str, str] = {}
    for name in ("serve", "forward", "files"):
        for parameter in settings_of(load_command(name)):
            text = " ".join((getattr(parameter, "help", None) or ARGUMENTS[str(parameter.name)]).split())
            default = parameter.to_info_dict()["default"] if str(parameter.name) not in defaults else None
            if default is not None and "[default:" not in text and not isinstance(default, bool) and default != ():
                text += f" [default: {default[0] if isinstance(default, tuple) else default}]"
            if name != "serve" and key_of(parameter) not in seen:
                text = f"({name}) {text}"
            seen.setdefault(key_of(parameter), f"| `{key_of(parameter)}` | `{parameter.envvar}` | {text} |")
    return list(seen.values())


ARGUMENTS: dict[str, Any] = {
    "handler": "The handler, module:name or path/to/file.py:name.",
    "targets": "Where to forward to, a list of addresses.",
    "directory": "The directory to serve.",
    "bind": "Where to listen.",
}


def rows_of_the_proxy() -> list[str]:
    pytest.importorskip("msgspec")
    from gtcpserver.cli.proxy import OF_THE_PROXY

    return [
        f"| `{parameter.opts[0]}` | `{parameter.envvar}` |"
        for parameter in load_command("proxy").params
        if parameter.name in OF_THE_PROXY
    ]


def test_every_option_of_a_server_has_a_variable() -> None:
    for name in ("serve", "echo", "forward", "files", "proxy"):
        parameters = [one for one in load_command(name).params if one.name not in ("help", "print_config")]
        variables = [one.envvar for one in parameters]
        assert all(variables), name
        assert len(set(variables)) == len(variables)


def test_every_setting_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert [row for row in rows_of_the_proxy() if row not in text] == []
    missing = [row for row in rows_of_settings() if row not in text]
    assert not missing, "docs/settings.md needs:\n" + "\n".join(missing)
