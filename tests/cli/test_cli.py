"""The gtcpserver command, run as a user runs it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import platform
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
import trustme

from gtcpserver import ClientLimits, ListenConfig, ProxyProtocol, Server, TLSConfig
from gtcpserver.cli import wants_monkey_patch
from gtcpserver.cli.commands import COMMANDS
from gtcpserver.cli.options import (
    ACME_OPTIONS,
    BALANCER_OPTIONS,
    CLIENT_OPTIONS,
    LISTEN_OPTIONS,
    OBJECT_OPTIONS,
    SERVER_OPTIONS,
    TLS_OPTIONS,
    name_option,
)
from kit.commands import run_command

COMMAND = [sys.executable, "-m", "gtcpserver"]

APP = """
import socket, sys, time
from gtcpserver import LimitExceeded

def handler(conn):
    conn.sendall(conn.recv_until(b"\\n").upper())

class Group:
    @staticmethod
    def handler(conn):
        conn.sendall(b"from an attribute\\n")

def patched(conn):
    conn.sendall(f"{'gevent' in socket.socket.__module__}\\n".encode())

def wait(conn):
    conn.sendall(b"waiting\\n")
    conn.recv_until(b"\\n")
    conn.sendall(b"done\\n")

def context(conn):
    conn.sendall(f"{conn.context}\\n".encode())

def fail(conn):
    raise ZeroDivisionError("in the handler")

def too_long(conn):
    raise LimitExceeded("x" * 100)

async def coroutine(conn): ...
def generator(conn): yield
def two(conn, more): ...
number = 5

def refuse(conn):
    return False
def left(conn):
    print("left", file=sys.stderr, flush=True)
def report(conn, error):
    print("reported", error, file=sys.stderr, flush=True)
"""


class Running:
    """A gtcpserver process that listens, and what it wrote on stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        self._stderr = process.stderr
        self.listening = self.wait_for("listening on ")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listening.partition("listening on ")[2].split(" (")[0].split(",")[0].rpartition(":")
        return host, int(port)

    def wait_for(self, text: str) -> str:
        for line in self._stderr:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"{text!r} never came, but: {self.lines}")

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 60)

    def ask(self, data: bytes = b"") -> bytes:
        with self.connect() as client:
            client.sendall(data)
            return client.makefile("rb").readline()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.lines += self._stderr.read().splitlines()
        return status


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Running]]:
    started = []

    def start_command(*arguments: str, **options: Any) -> Running:
        process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **options
        )
        started.append(process)
        # Whatever goes wrong, reading its stderr must come to an end.
        guard = threading.Timer(25, process.kill)
        guard.daemon = True
        guard.start()
        process.guard = guard  # type: ignore[attr-defined]
        return Running(process)

    yield start_command
    for process in started:
        process.guard.cancel()  # type: ignore[attr-defined]
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def complaint(*arguments: str, cwd: Path | None = None, status: int = 2) -> str:
    """Runs a command that must fail with one line on stderr, and returns the line without its "gtcpserver: "."""
    result = run_command(*arguments, cwd=cwd)
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("gtcpserver: ")
    return lines[0][len("gtcpserver: ") :]


@pytest.mark.slow
def test_version_names_all_that_matters() -> None:
    result = run("--version")
    assert result.returncode == 0
    words = ("gtcpserver", f"gevent {gevent.__version__}", platform.python_version(), platform.release())
    assert all(word in result.stdout for word in words)


@pytest.mark.slow
def test_help_names_every_command_and_the_exit_status() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)
    assert "Exit status" in result.stdout


@pytest.mark.slow
def test_without_click_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None; sys.argv[1:] = ['check']; import gtcpserver.cli as c; c.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "the command line needs click: pip install 'gtcpserver[cli]'\n"


def test_every_option_of_server_listen_config_and_tls_config_is_there() -> None:
    server = set(inspect.signature(Server).parameters)
    server -= {"address", "handler", "listen", "tls", "proxy_protocol", "client_limits", "access_log"}
    server.remove("freeze_gc")  # an option of the program, with workers of their master
    assert {option[0] for option in (*SERVER_OPTIONS, *OBJECT_OPTIONS)} == server
    assert {name for name, _, _ in LISTEN_OPTIONS} == {field.name for field in dataclasses.fields(ListenConfig)}
    assert {name for name, _, _ in BALANCER_OPTIONS} == {field.name for field in dataclasses.fields(ProxyProtocol)}
    assert {name for name, _, _ in CLIENT_OPTIONS} == set(inspect.signature(ClientLimits).parameters)
    assert {name for name, _, _ in TLS_OPTIONS} == {field.name for field in dataclasses.fields(TLSConfig)} - {"managed"}
    acme = set(inspect.signature(TLSConfig.acme).parameters) - {"watch", "options"}  # other options of TLS
    assert {argument for _, argument, _, _ in ACME_OPTIONS} == acme


@pytest.mark.slow
def test_echo_sends_back_and_stops_with_a_report(start: Callable[..., Running]) -> None:
    server = start("echo", "--bind", "127.0.0.1:0", "--pool", "123")
    assert server.listening.endswith(f"(pid {server.process.pid}, 1 accept loop, pool 123)")
    assert server.ask(b"hello\n") == b"hello\n"
    assert server.stop() == 0
    assert "stopped:" in server.lines[-1]


@pytest.mark.slow
def test_sigterm_as_soon_as_it_listens_is_a_graceful_stop(start: Callable[..., Running]) -> None:
    assert start("echo", "--bind", "127.0.0.1:0").stop() == 0
    assert start("echo", "--bind", "127.0.0.1:0").stop(signal.SIGINT) == 0


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["app:handler", "app.py:handler", "./app.py:handler"])
def test_serve_runs_the_handler_named(start: Callable[..., Running], handler: str) -> None:
    server = start("serve", handler, "--bind", "127.0.0.1:0")
    assert server.ask(b"shout\n") == b"SHOUT\n"
    assert server.stop() == 0


@pytest.mark.slow
def test_handler_may_be_an_attribute(start: Callable[..., Running]) -> None:
    assert start("serve", "app:Group.handler", "--bind", "127.0.0.1:0").ask() == b"from an attribute\n"


@pytest.mark.slow
def test_file_finds_the_modules_beside_it(start: Callable[..., Running], folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "beside.py").write_text("answer = b'beside\\n'\n")
    (folder / "sub" / "main.py").write_text("import beside\ndef handler(conn): conn.sendall(beside.answer)\n")
    assert start("serve", "sub/main.py:handler", "--bind", "127.0.0.1:0").ask() == b"beside\n"


@pytest.mark.slow
def test_user_module_is_imported_after_the_patch(start: Callable[..., Running]) -> None:
    assert start("serve", "app:patched", "--bind", "127.0.0.1:0").ask() == b"True\n"


@pytest.mark.slow
def test_patch_can_be_left_out(start: Callable[..., Running]) -> None:
    assert start("serve", "app:patched", "--bind", "127.0.0.1:0", "--no-monkey-patch").ask() == b"False\n"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["serve", "app:handler"], True),
        (["echo"], True),
        (["echo", "--no-monkey-patch"], False),
        (["echo", "--no-monkey-patch", "--monkey-patch"], True),
        (["check"], False),
        (["serve", "--help"], False),
        (["--version"], False),
        ([], False),
    ],
)
def test_patch_is_decided_before_click_is_imported(arguments: list[str], wanted: bool) -> None:
    assert wants_monkey_patch(arguments) is wanted


@pytest.mark.slow
def test_several_addresses_are_listened_on(start: Callable[..., Running], folder: Path) -> None:
    path = folder / "sock"
    server = start("echo", "--bind", "127.0.0.1:0", "--bind", f"unix:{path}", "--accept-loops", "2")
    assert "3 accept loops" in server.listening
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"x")
        assert client.recv(10) == b"x"
    assert server.ask(b"y\n") == b"y\n"
    assert server.stop() == 0
    assert not path.exists()


@pytest.mark.slow
def test_options_reach_server_and_sockets(start: Callable[..., Running]) -> None:
    server = start(
        *("serve", "app:context", "--bind", "127.0.0.1:0", "--context", "app:number", "--max-accepts", "2"),
        *(
            "--timeout",
            "none",
            "--pool",
            "none",
            "--unix-mode",
            "600",
            "--delay",
            "--extra",
            "SOL_SOCKET:SO_PRIORITY:3",
        ),
    )
    assert "pool no limit" in server.listening
    assert server.ask() == b"5\n"
    assert server.ask() == b"5\n"
    assert server.process.wait(60) == 0


@pytest.mark.slow
def test_hooks_are_called(start: Callable[..., Running]) -> None:
    server = start(
        "serve", "app:fail", "--bind", "127.0.0.1:0", "--on-error", "app:report", "--on-disconnect", "app:left"
    )
    assert server.ask() == b""
    server.wait_for("reported in the handler")
    server.wait_for("left")
    refusing = start("serve", "app:handler", "--bind", "127.0.0.1:0", "--on-connect", "app:refuse")
    assert refusing.ask() == b""


@pytest.mark.slow
def test_tls_options_encrypt(start: Callable[..., Running], folder: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    server = start(
        "echo", "--bind", "127.0.0.1:0", "--tls-certfile", "server.pem", "--tls-alpn", "a", "--tls-alpn", "b"
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["b"])
    with server.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
        assert client.selected_alpn_protocol() == "b"
        client.sendall(b"secret")
        assert client.recv(10) == b"secret"


@pytest.mark.slow
def test_stop_waits_for_handlers(start: Callable[..., Running]) -> None:
    server = start("serve", "app:wait", "--bind", "127.0.0.1:0")
    with server.connect() as client:
        lines = client.makefile("rb")
        assert lines.readline() == b"waiting\n"
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM")
        client.sendall(b"go on\n")
        assert lines.readline() == b"done\n"
    assert server.process.wait(60) == 0
    assert "1 connection finished, 0 cut" in server.wait_for("stopped:")


@pytest.mark.slow
def test_each_cut_connection_is_reported(start: Callable[..., Running]) -> None:
    server = start("serve", "app:wait", "--bind", "127.0.0.1:0", "--stop-timeout", "0")
    with server.connect() as client:
        assert client.makefile("rb").readline() == b"waiting\n"
        host, port = client.getsockname()
        assert server.stop() == 0
    cut = [line for line in server.lines if " cut " in line]
    assert f"{host}:{port}" in cut[0]
    assert "app.py" in cut[0]
    assert "0 connections finished, 1 cut" in server.lines[-1]


@pytest.mark.slow
def test_log_is_json_where_asked_for_with_the_counters(start: Callable[..., Running]) -> None:
    server = start("echo", "--bind", "127.0.0.1:0", "--log-format", "json", "--stats-interval", "0.05")
    assert json.loads(server.listening)["level"] == "INFO"
    fields = json.loads(server.wait_for("stats:"))
    assert fields["stats"]["active"] == 0
    assert server.stop() == 0
    assert all(json.loads(line) for line in server.lines)


@pytest.mark.slow
def test_log_level_hides_what_is_below(start: Callable[..., Running]) -> None:
    server = start("serve", "app:too_long", "--bind", "127.0.0.1:0", "--log-level", "info")
    assert server.ask() == b""
    assert server.stop() == 0
    assert not any("xxx" in line for line in server.lines)
    server = start("serve", "app:too_long", "--bind", "127.0.0.1:0", "--log-level", "debug")
    assert server.ask() == b""
    assert "DEBUG" in server.wait_for("xxx")


@pytest.mark.slow
def test_soft_limit_of_descriptors_is_raised_to_the_hard_one(start: Callable[..., Running]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = start(
        "echo", "--bind", "127.0.0.1:0", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    )
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "frozen"), [("--freeze-gc", True), ("--no-freeze-gc", False)])
def test_garbage_collector_is_frozen_unless_told_otherwise(
    start: Callable[..., Running], folder: Path, option: str, frozen: bool
) -> None:
    (folder / "frozen.py").write_text(
        "import gc\n"
        "def handler(conn):\n"
        # CPython 3.12 begins with 375.
        "    conn.sendall(f'{gc.get_freeze_count() > 1000} {gc.get_threshold()[0]}\\n'.encode())\n"
    )
    answer = start("serve", "frozen:handler", "--bind", "127.0.0.1:0", option).ask()
    assert answer.startswith(b"True 10000" if frozen else b"False ")


@pytest.mark.slow
def test_server_goes_on_when_nobody_reads_its_stderr(start: Callable[..., Running]) -> None:
    server = start("serve", "app:too_long", "--bind", "127.0.0.1:0", "--log-level", "debug")
    connections = 1500  # of which each logs a line of more than 100 bytes, into a pipe that holds 65,536
    for _ in range(connections):
        assert server.ask() == b""
    assert server.stop() == 0
    assert 0 < len(server.lines) < connections


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], f"missing command; choose from {', '.join(COMMANDS)}"),
        (["sevre"], "no command 'sevre'; choose from"),
        (["serve"], "missing MODULE:HANDLER"),
        (["echo", "--bimd", "x"], "no such option '--bimd'"),
        (["echo", "--bind"], "option '--bind' requires an argument"),
        (["echo", "--bind", "127.0.0.1:70000"], "--bind: port must be 0 to 65535, got '127.0.0.1:70000'"),
        (["echo", "--bind", "nonsense"], "--bind: address must be"),
        (["echo", "--fast-open", "-3"], "--fast-open: must be a whole number from 0 to 65535, got -3"),
        (["echo", "--pool", "many"], "--pool: must be a whole number or \"none\", got 'many'"),
        (["echo", "--timeout", "-1"], "--timeout: must be a number, more than 0"),
        (["echo", "--stop-timeout", "-1"], "--stop-timeout: must be 0 or more"),
        (["echo", "--stats-interval", "nan"], "--stats-interval: must be 0 or more"),
        (["echo", "--on-full", "panic"], "--on-full: 'panic' is not one of"),
        (["echo", "--shared", "--no-reuse-port"], "--shared: "),
        (["echo", "--congestion", "nope"], "--congestion: "),
        (["echo", "--unix-mode", "999"], "--unix-mode: must be permission bits in octal"),
        (["echo", "--extra", "SOL_SOCKET:7"], "--extra: must be LEVEL:OPTION:VALUE"),
        (["echo", "--tls-certfile", "/does/not/exist"], "--tls-certfile: "),
        (["echo", "--tls-keyfile", "key.pem"], "--tls-keyfile: needs --tls-certfile"),
        (["echo", "--tls-sni", "name"], "--tls-sni: must be NAME=CERTFILE"),
        (["echo", "--log-level", "loud"], "--log-level: 'loud' is not one of"),
        (["serve", "app"], 'MODULE:HANDLER: must be "module:name" or "path/to/file.py:name", got \'app\''),
        (["serve", "ap:handler"], "MODULE:HANDLER: no module 'ap'; did you mean 'app'"),
        (["serve", "app.sub:handler"], "MODULE:HANDLER: no module 'app.sub': 'app' is a module, not a package"),
        (["serve", "app:handlr"], "MODULE:HANDLER: app has no 'handlr'; did you mean 'handler'"),
        (["serve", "app:Group.handlr"], "MODULE:HANDLER: app.Group has no 'handlr'; did you mean 'handler'"),
        (["serve", "app:number"], "MODULE:HANDLER: app:number is not callable, it is an int"),
        (["serve", "app:two"], "MODULE:HANDLER: app:two must take one argument, the connection; it takes (conn, more)"),
        (["serve", "app:coroutine"], "MODULE:HANDLER: app:coroutine is async"),
        (["serve", "app:generator"], "MODULE:HANDLER: app:generator is a generator"),
        (["serve", "app:Group"], "MODULE:HANDLER: app:Group is a class; give a function"),
        (["serve", "app:handler", "--on-connect", "app:coroutine"], "--on-connect: app:coroutine is async; a hook is"),
        (["serve", "nope.py:handler"], "MODULE:HANDLER: no file 'nope.py'"),
        (["serve", "app:handler", "--on-error", "app:refuse"], "--on-error: app:refuse must take two arguments"),
        (["serve", "app:handler", "--connection-class", "app:Group"], "--connection-class: must be a subclass"),
        (["check", "extra"], "got unexpected extra argument (extra)"),
    ],
)
def test_wrong_call_is_one_line_and_status_2(folder: Path, arguments: list[str], said: str) -> None:
    assert complaint(*arguments, cwd=folder).startswith(said)


@pytest.mark.slow
def test_address_in_use_is_one_line_and_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = complaint("echo", "--bind", f"127.0.0.1:{port}", status=1)
    assert line.startswith(f"cannot listen: 127.0.0.1:{port} is already in use")
    assert "--shared" in line


@pytest.mark.slow
def test_address_of_another_host_is_one_line_and_status_1() -> None:
    # RFC 5737: an address that no host has.
    assert complaint("echo", "--bind", "192.0.2.1:0", status=1).startswith("cannot listen: 192.0.2.1:0: ")


@pytest.mark.slow
def test_exception_in_the_users_module_shows_his_frames_alone(folder: Path) -> None:
    (folder / "broken.py").write_text("import helper\n")
    (folder / "helper.py").write_text("def load():\n    return 1 / 0\nload()\n")
    result = run("serve", "broken:handler", cwd=folder)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[-1] == "gtcpserver: broken raised ZeroDivisionError while it was imported"
    frames = [line for line in lines if line.lstrip().startswith("File ")]
    assert [os.path.basename(frame.split('"')[1]) for frame in frames] == ["broken.py", "helper.py", "helper.py"]
    assert any(line == "ZeroDivisionError: division by zero" for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["broken:handler", "broken.py:handler"])
@pytest.mark.parametrize(
    ("source", "kind"),
    [("import not_installed_at_all", "ModuleNotFoundError"), ("def x(:", "SyntaxError"), ("exit(0)", "SystemExit")],
)
def test_fault_in_the_users_module_is_told_apart_from_a_wrong_name(
    folder: Path, reference: str, source: str, kind: str
) -> None:
    (folder / "broken.py").write_text(source + "\n")
    result = run("serve", reference, cwd=folder)
    assert result.returncode == 1
    name = reference.partition(":")[0]
    assert result.stderr.splitlines()[-1] == f"gtcpserver: {name} raised {kind} while it was imported"
    assert "gtcpserver/cli" not in result.stderr
    assert "importlib" not in result.stderr


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("fast_open must be 0 or more, got -1", "--fast-open: must be 0 or more, got -1"),
        ("device='x': the system refuses it", "--device: device='x': the system refuses it"),
        ("port must be 0 to 65535", "port must be 0 to 65535"),
        ("use ListenConfig(free_bind=True)", "use --free-bind"),
        ("", ""),
    ],
)
def test_fields_are_named_as_options(message: str, named: str) -> None:
    assert name_option(message) == named


@pytest.mark.slow
def test_a_self_signed_certificate_is_made_for_a_first_try_and_said_so(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gtcpserver", "echo", "--bind", "127.0.0.1:0", "--tls-self-signed"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        warned = False
        for line in lines:
            warned = warned or "self-signed" in line
            if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                break
        assert warned
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as plain,
            context.wrap_socket(plain) as sock,
        ):
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
    finally:
        process.terminate()
        assert process.wait(60) == 0
    both = [sys.executable, "-m", "gtcpserver", "echo", "--tls-self-signed", "--tls-cert", str(tmp_path / "x.pem")]
    done = subprocess.run(both, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--tls-self-signed" in done.stderr


@pytest.mark.slow
def test_sighup_reads_certificates_again_and_says_what_it_cannot_do(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    server = start("echo", "--bind", "127.0.0.1:0")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("SIGHUP: reloading the program needs worker processes")
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    server = start("echo", "--bind", "127.0.0.1:0", "--tls-cert", str(tmp_path / "cert.pem"))
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("SIGHUP: files reloaded")
    (tmp_path / "cert.pem").write_text("broken")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("SIGHUP: nothing has changed: ")
    assert server.process.poll() is None
