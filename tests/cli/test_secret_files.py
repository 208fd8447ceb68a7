"""Passwords that are not on the command line: from files that others cannot read, or standard input."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.cli.secret_files import LARGEST, read_url, read_users
from gtcpserver.errors import ConfigError
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import reply, socks

COMMAND = [sys.executable, "-m", "gtcpserver", "proxy"]
LOOPBACK = ["--mixed", "127.0.0.1:0", "--allow-destination", "loopback"]


@pytest.fixture
def start(in_thread):
    """`with start(*options, given=b"") as (process, port, lines)`: a proxy that listens, and what it has logged."""

    @contextmanager
    def run(*options, given=b""):
        command = [*COMMAND, *LOOPBACK, *options]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                process.stdin.write(given)
                process.stdin.close()
                process.stdin = None
                lines = []

                def port():
                    for line in process.stderr:
                        lines.append(line.decode())
                        if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", lines[-1]):
                            return int(found[1])
                    raise AssertionError(lines)

                yield process, in_thread(port), lines
            finally:
                process.send_signal(signal.SIGTERM)
                lines += in_thread(process.communicate)[1].decode().splitlines()

    return run


def secret(path, text, mode=0o600):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def ask(port, *request, **options):
    with socket.create_connection(("127.0.0.1", port), SOON) as client:
        return reply(client, socks(*request, **options))


def command_line(process):
    with open(f"/proc/{process.pid}/cmdline", "rb") as file:
        return file.read()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
def test_users_from_a_file(start, in_thread, serve, tmp_path, workers):
    target = serve(echo)
    path = secret(tmp_path / "users", "# ours\n\nada:se:cret\r\ngrace: pw \n")
    with start("--user-file", path, *(["--workers", "1"] if workers else [])) as (process, port, lines):
        assert in_thread(lambda: ask(port, target.port, user=b"ada", password=b"se:cret")) == 0
        assert in_thread(lambda: ask(port, target.port, user=b"grace", password=b" pw ")) == 0
        assert in_thread(lambda: ask(port, target.port, user=b"ada", password=b"secret")) is None
        assert in_thread(lambda: ask(port, target.port)) is None
        assert b"cret" not in command_line(process)
    assert "command line" not in "".join(lines)
    assert "cret" not in "".join(lines)


@pytest.mark.slow
def test_users_from_standard_input(start, in_thread, serve):
    target = serve(echo)
    with start("--user-file", "-", given=b"ada:secret\n") as (_, port, _lines):
        assert in_thread(lambda: ask(port, target.port, user=b"ada", password=b"secret")) == 0
        assert in_thread(lambda: ask(port, target.port)) is None


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_workers_without_rights_need_not_read_the_file(start, in_thread, serve, tmp_path):
    target = serve(echo)
    path = secret(tmp_path / "users", "ada:secret")
    options = ("--user-file", path, "--workers", "1", "--worker-user", "nobody")
    with start(*options) as (_, port, _lines):
        assert in_thread(lambda: ask(port, target.port, user=b"ada", password=b"secret")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["standard input", "file"])
def test_an_upstream_from_a_file(start, in_thread, serve, tmp_path, given):
    target = serve(echo)
    users = secret(tmp_path / "users", "ada:secret")
    with start("--user-file", users) as (_, upstream, _lines):
        url = f"socks5://ada:secret@127.0.0.1:{upstream}\n"
        path = "-" if given else secret(tmp_path / "upstream", url)
        with start("--upstream-file", path, given=url.encode()) as (process, port, lines):
            assert in_thread(lambda: ask(port, target.port)) == 0
            assert b"secret" not in command_line(process)
        assert "command line" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--user", "ada:secret", "--user", "grace:pw", "--upstream", "http://a:b@127.0.0.1:1"], True),
        (["--upstream", "socks5://ada:secret@127.0.0.1:1"], True),
        (["--upstream", "socks5://127.0.0.1:1"], False),
    ],
)
def test_a_password_on_the_command_line_is_warned_of_once(start, options, warned, workers):
    with start(*options, *(["--workers", "2"] if workers else [])) as (_, _port, lines):
        pass
    told = [line for line in lines if "passwords on the command line are visible" in line]
    assert len(told) == warned
    assert not [line for line in lines if "secret" in line]


@pytest.mark.slow
def test_hash_password_warns_too():
    done = subprocess.run([*COMMAND, "hash-password", "--password", "pw"], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0
    assert done.stdout.startswith("$")
    assert done.stderr.count("visible to every user") == 1


def refused(*options, given=""):
    """What a proxy says that does not start."""
    command = [*COMMAND, *LOOPBACK, *options]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.slow
def test_mistakes_name_the_option_and_no_password(tmp_path):
    users, url = secret(tmp_path / "users", "ada:a\nsecret\n"), secret(tmp_path / "url", "socks5://a:secret@h:99999")
    said = refused("--user-file", users)
    assert said == f"gtcpserver: --user-file: line 2 of {users!r} must be NAME:PASSWORD\n"
    assert "secret" not in refused("--upstream-file", url)
    assert "cannot be used together with --upstream" in refused("--upstream-file", url, "--upstream", "http://h:1")
    assert "cannot be used together with --config" in refused(
        "--user-file", secret(tmp_path / "u", "a:b"), "--config", "x"
    )
    said = refused("--user-file", "-", "--upstream-file", "-", given="a:b\n")
    assert said == "gtcpserver: --upstream-file: standard input is read by --user-file\n"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o620, 0o602, 0o666, 0o777])
def test_files_of_others(tmp_path, mode):
    path = secret(tmp_path / "users", "ada:secret", mode)
    with pytest.raises(ConfigError, match=f"its mode is {mode:04o}, and others than its owner can use"):
        read_users(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_files_of_ones_own(tmp_path, mode):
    path = secret(tmp_path / "users", "ada:secret", mode)
    link = tmp_path / "link"  # as Kubernetes mounts secrets
    link.symlink_to(path)
    assert read_users(str(link)) == [("ada", "secret")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_group_may_read_what_is_roots(tmp_path):
    path = secret(tmp_path / "users", "ada:secret", 0o640)
    assert read_users(path) == [("ada", "secret")]
    os.chown(path, 1, 1)
    with pytest.raises(ConfigError, match="its mode is 0640"):
        read_users(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root's files are read by their group")
def test_the_group_may_not_read_what_is_not_roots(tmp_path):
    with pytest.raises(ConfigError, match="its mode is 0640"):
        read_users(secret(tmp_path / "users", "ada:secret", 0o640))


def test_a_pipe_of_the_shell_is_read():
    reading, writing = os.pipe()
    os.write(writing, b"http://a:b@h:1\n")
    os.close(writing)
    try:
        assert read_url(f"/dev/fd/{reading}") == "http://a:b@h:1"
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "must have lines with NAME:PASSWORD"),
        (b"# a:b\n\n", "must have lines with NAME:PASSWORD"),
        (b"a:b\n:c", "line 2 of .* must be"),
        (b"a:", "line 1 of .* must be"),
        (b"a:\xff", "must be UTF-8"),
        (b"a" * (LARGEST + 1), "at most 1048576 bytes"),
    ],
)
def test_files_without_users(tmp_path, content, told):
    with pytest.raises(ConfigError, match=told):
        read_users(secret(tmp_path / "users", content))


@pytest.mark.parametrize(
    ("path", "told"), [("/no/such", "No such file"), ("/", "Is a directory"), ("a\0b", "null byte")]
)
def test_what_is_no_file(path, told):
    with pytest.raises(ConfigError, match=told):
        read_url(path)


@pytest.mark.slow
@given(st.text())
def test_any_text_has_users_or_a_mistake_without_the_text(tmp_path_factory, text):
    path = secret(tmp_path_factory.getbasetemp() / "any-secret", text)
    for read in (read_users, read_url):
        found, told = None, ""
        try:
            found = read(path)
        except ConfigError as error:
            told = str(error).replace(repr(path), "FILE")
        assert found or re.fullmatch(
            r"line \d+ of FILE must be NAME:PASSWORD|FILE must have lines with NAME:PASSWORD"
            r"|FILE must be one line with a URL, got \d+ words",
            told,
        )
