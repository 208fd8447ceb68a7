"""The TLS examples are started as programs and used by other programs. sslyze looks for what is known to be weak."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from kit.paths import ROOT

EXAMPLES = ROOT / "examples"
SECONDS = 20

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an example on a free port and returns the port; at the end SIGTERM must end it with exit status 0."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: str) -> int:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), "127.0.0.1:0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"listening on 127\.0\.0\.1:(\d+) ", said)
        assert found is not None, said + process.stderr.read()
        return int(found[1])

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        output, log = process.communicate(timeout=SECONDS)
        assert (process.returncode, output) == (0, ""), log
        assert not re.search(r" (ERROR|CRITICAL) |Traceback", log), log


def unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


@pytest.mark.slow
def test_tls_echo(start: Start) -> None:
    port = start("tls_echo.py")
    with unverified().wrap_socket(connect(port)) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


@pytest.mark.slow
def test_tls_echo_with_files(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    port = start("tls_echo.py", str(tmp_path / "both.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with context.wrap_socket(connect(port), server_hostname="localhost") as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


@pytest.mark.slow
def test_starttls_lines(start: Start) -> None:
    port = start("starttls_lines.py")

    def ask(sock: socket.socket, line: bytes) -> bytes:
        sock.sendall(line + b"\r\n")
        return sock.recv(1000)

    sock = connect(port)
    assert sock.recv(100).startswith(b"220 ")
    assert b"STARTTLS" in ask(sock, b"EHLO me")
    assert ask(sock, b"NOTE secret").startswith(b"530 ")
    assert ask(sock, b"STARTTLS").startswith(b"220 ")
    with unverified().wrap_socket(sock) as client:
        assert b"STARTTLS" not in ask(client, b"EHLO me")
        assert ask(client, b"NOTE secret") == b"250 noted 6 bytes\r\n"
        assert ask(client, b"STARTTLS").startswith(b"503 ")
        assert ask(client, b"QUIT").startswith(b"221 ")
        assert client.recv(100) == b""


@pytest.mark.slow
def test_starttls_lines_hears_nothing_that_came_behind_starttls(start: Start) -> None:
    with connect(start("starttls_lines.py")) as sock:
        sock.sendall(b"STARTTLS\r\nNOTE by somebody else\r\n")
        answers = b"".join(iter(lambda: sock.recv(1000), b""))
    assert answers == b"220 notes ready\r\n220 go ahead\r\n554 nothing may follow STARTTLS\r\n"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_starttls_lines_with_the_openssl_command(start: Start) -> None:
    port = start("starttls_lines.py")
    done = subprocess.run(
        ["openssl", "s_client", "-quiet", "-starttls", "smtp", "-connect", f"127.0.0.1:{port}"],
        input="NOTE secret\r\nquit\r\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert "250 noted 6 bytes" in done.stdout
    assert "221 bye" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_sni(start: Start) -> None:
    port = start("sni.py")
    for name, answer in (("one.example", "one"), ("two.example", "two"), ("three.example", "by that name")):
        done = subprocess.run(
            ["curl", "-sSk", "--resolve", f"{name}:{port}:127.0.0.1", f"https://{name}:{port}/"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert answer in done.stdout, done.stderr
    certificates = set()
    for name in ("one.example", "two.example", None):
        with unverified().wrap_socket(connect(port), server_hostname=name) as client:
            certificates.add(client.getpeercert(binary_form=True))
    assert len(certificates) == 3


@pytest.mark.slow
def test_mutual_tls(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    port = start("mutual_tls.py", str(tmp_path / "ca.pem"))
    context = unverified()
    authority.issue_cert("ada@example.com", common_name="Ada").configure_cert(context)
    with context.wrap_socket(connect(port)) as client:
        assert client.recv(100) == b"Hello Ada, ada@example.com.\n"
    with unverified().wrap_socket(connect(port)) as stranger, pytest.raises(ssl.SSLError, match="required"):
        stranger.recv(100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tls_echo.py", ["127.0.0.1:0", "/nonexistent"], "/nonexistent"),
        ("starttls_lines.py", ["127.0.0.1:0", "/nonexistent"], "/nonexistent"),
        ("mutual_tls.py", [], "usage: python mutual_tls.py ADDRESS CLIENT_CA [CERTFILE [KEYFILE]]"),
        ("mutual_tls.py", ["127.0.0.1:0", "/nonexistent"], "/nonexistent"),
    ],
)
def test_the_last_line_tells_of_wrong_usage(name: str, arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr.splitlines()[-1]


def test_a_wrong_address_is_told_in_one_line() -> None:
    command = [sys.executable, str(EXAMPLES / "tls_echo.py"), "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"gtcpserver: .*address.*'nonsense'\n", done.stderr.splitlines(keepends=True)[-1])


# -- sslyze -----------------------------------------------------------------------------------------------------------


def find_sslyze() -> str | None:
    """sslyze wants an older cryptography than ours, so it has an environment of its own (see the Makefile)."""
    own = ROOT / ".venv-sslyze" / "bin" / "sslyze"
    return os.environ.get("SSLYZE") or (str(own) if own.exists() else shutil.which("sslyze"))


@pytest.mark.skipif(find_sslyze() is None, reason="needs sslyze: make sslyze")
def test_sslyze_finds_nothing(start: Start, tmp_path: Path) -> None:
    port = start("tls_echo.py")
    report = tmp_path / "report.json"
    scans = ["sslv2", "sslv3", "tlsv1", "tlsv1_1", "tlsv1_2", "tlsv1_3", "heartbleed", "robot", "openssl_ccs", "reneg",
             "compression", "fallback", "resum"]  # fmt: skip
    command = [str(find_sslyze()), *(f"--{scan}" for scan in scans), f"--json_out={report}", "--mozilla_config=disable"]
    done = subprocess.run([*command, f"localhost:{port}"], capture_output=True, text=True, timeout=60, check=False)
    assert report.exists(), done.stderr
    (found,) = json.loads(report.read_text())["server_scan_results"]
    assert found["scan_status"] == "COMPLETED"
    results = {name: outcome["result"] for name, outcome in found["scan_result"].items() if outcome is not None}
    for name in ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1"):
        assert results[f"{name}_cipher_suites"]["accepted_cipher_suites"] == [], name
    accepted = {
        suite["cipher_suite"]["name"]
        for name in ("tls_1_2", "tls_1_3")
        for suite in results[f"{name}_cipher_suites"]["accepted_cipher_suites"]
    }
    assert accepted
    weak = re.compile("NULL|EXPORT|anon|RC4|DES|MD5|TLS_RSA_")
    assert [name for name in accepted if weak.search(name)] == []
    assert results["heartbleed"]["is_vulnerable_to_heartbleed"] is False
    assert results["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"] is False
    assert results["robot"]["robot_result"].startswith("NOT_VULNERABLE")
    assert results["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"] is False
    assert results["session_renegotiation"]["supports_secure_renegotiation"] is True
    assert results["tls_compression"]["supports_compression"] is False
    assert results["tls_fallback_scsv"]["supports_fallback_scsv"] is True
