"""examples/http_server.py as its clients see it: a process on port 0, spoken to in plain HTTP."""

import hashlib
import re
import socket
import ssl
import subprocess
import sys

import pytest

from kit.paths import ROOT

pytestmark = pytest.mark.slow

PROGRAM = ROOT / "examples" / "http_server.py"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"a" * 1024


@pytest.fixture
def start():
    """`start("--option", ...)` runs the server and gives the address to connect to."""
    processes = []

    def run(*options):
        command = [sys.executable, str(PROGRAM), "--listen", "127.0.0.1:0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        said = process.stdout.readline()
        found = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", said)
        assert found, said + process.stderr.read()
        return "127.0.0.1", int(found[1])

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def connect():
    """`connect(address)` gives a socket and a file to read from it; both are closed after the test."""
    opened = []

    def to(address):
        sock = socket.create_connection(address, timeout=60)
        file = sock.makefile("rb")
        opened.extend((file, sock))
        return sock, file

    yield to
    for thing in opened:
        thing.close()


def read_answer(file):
    """Read one answer: status line, headers with names in lower case, body."""
    status = file.readline().decode().rstrip("\r\n")
    headers = {}
    while line := file.readline().decode().rstrip("\r\n"):
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, file.read(int(headers["content-length"]))


def test_keepalive_answers_several_requests_on_one_connection(start, connect):
    sock, file = connect(start())
    for _ in range(3):
        sock.sendall(REQUEST)
        status, headers, body = read_answer(file)
        assert (status, headers["connection"], body) == ("HTTP/1.1 200 OK", "keep-alive", BODY)


def test_pipelined_requests_are_answered_each_and_in_order(start, connect):
    sock, file = connect(start())
    last = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    sock.sendall(REQUEST * 3 + last)
    assert [read_answer(file)[1]["connection"] for _ in range(4)] == ["keep-alive"] * 3 + ["close"]
    assert file.read() == b""


def test_a_pipelined_request_that_is_cut_in_two_is_answered(start, connect):
    sock, file = connect(start())
    sock.sendall(REQUEST + REQUEST[:-3])
    assert read_answer(file)[2] == BODY
    sock.sendall(REQUEST[-3:])
    assert read_answer(file)[2] == BODY


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"], ids=["1.0", "close"]
)
def test_closes_after_a_request_that_asks_for_it(start, connect, request_):
    sock, file = connect(start())
    sock.sendall(request_)
    status, headers, body = read_answer(file)
    assert (status, headers["connection"], body) == ("HTTP/1.1 200 OK", "close", BODY)
    assert file.read() == b""


def test_no_keepalive_closes_after_each_answer(start, connect):
    sock, file = connect(start("--no-keepalive"))
    sock.sendall(REQUEST)
    assert read_answer(file)[1]["connection"] == "close"
    assert file.read() == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000, "431 Request Header Fields Too Large"),
        (b"nonsense\r\n\r\n", "400 Bad Request"),
        (b"POST / HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
    ],
    ids=["oversized", "nonsense", "post"],
)
def test_refuses_what_it_cannot_serve_and_closes(start, connect, sent, status):
    sock, file = connect(start())
    sock.sendall(sent)
    assert read_answer(file) == (f"HTTP/1.1 {status}", {"connection": "close", "content-length": "0"}, b"")
    assert file.read() == b""


def test_timeout_closes_a_silent_connection(start, connect):
    _, file = connect(start("--timeout", "0.05"))
    assert file.read() == b""


def test_size_is_that_of_the_body(start, connect):
    sock, file = connect(start("--size", "3", "--sleep", "1"))
    sock.sendall(REQUEST)
    assert read_answer(file)[2] == b"aaa"


def test_sha_puts_the_hash_before_the_body(start, connect):
    sock, file = connect(start("--sha", "--size", "10"))
    sock.sendall(REQUEST)
    content = b"a" * 10
    assert read_answer(file)[2] == hashlib.sha256(content).hexdigest().encode() + content


def test_aes128_encrypts_each_body_with_a_new_vector(start, connect):
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    sock, file = connect(start("--aes128", "--size", "10"))
    bodies = []
    for _ in range(2):
        sock.sendall(REQUEST)
        bodies.append(read_answer(file)[2])
    assert bodies[0] != bodies[1]
    for body in bodies:
        vector, encrypted = body[:16], body[16:]
        cipher = ciphers.Cipher(ciphers.algorithms.AES128(b"0123456789ABCDEF"), ciphers.modes.CBC(vector))
        assert cipher.decryptor().update(encrypted) == b"a" * 10 + b"\x06" * 6


def test_tls_answers_the_same(start):
    pytest.importorskip("cryptography")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(start("--tls"), timeout=60) as plain,
        context.wrap_socket(plain) as sock,
        sock.makefile("rb") as file,
    ):
        sock.sendall(REQUEST)
        assert read_answer(file)[2] == BODY


@pytest.mark.parametrize(
    "options",
    [
        ["--bogus"],
        ["--size", "many"],
        ["--size", "-1"],
        ["--sleep", "nan"],
        ["--timeout", "-1"],
        ["--accept-loops", "0"],
        ["--listen", "127.0.0.1:70000"],
        ["--tls-cert", "/does/not/exist.pem"],
        ["--tls-key", "/does/not/exist.pem"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line_and_exit_code_2(options):
    done = subprocess.run([sys.executable, str(PROGRAM), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert options[0].strip("-").split("-")[0] in done.stderr or options[-1] in done.stderr
    assert done.stdout == ""
