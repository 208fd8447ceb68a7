"""Every example is started as a program and used through a socket."""

import http.server
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

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

Start = Callable[..., tuple[str, int]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an example on a free port; at the end SIGTERM must end it with exit status 0."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: str) -> tuple[str, int]:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name), *(arguments or ["127.0.0.1:0"])], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        found = re.fullmatch(r"listening on (127\.0\.0\.1):(\d+)\n", process.stdout.readline())
        assert found is not None
        return found[1], int(found[2])

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        assert process.wait(20) == 0


def ask(address: tuple[str, int], request: bytes) -> bytes:
    """Send a request, end the sending side, and read until the server closes."""
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


class Lines:
    """A client that speaks lines."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=20)
        self.file = self.sock.makefile("rb")

    def send(self, line: str) -> None:
        self.sock.sendall(line.encode() + b"\n")

    def read(self) -> str:
        return self.file.readline().decode().strip()

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def test_echo_sends_back_what_comes(start: Start) -> None:
    assert ask(start("echo.py"), b"x" * 300_000) == b"x" * 300_000


@pytest.mark.parametrize("name", ["echo.py", "line_protocol.py", "chat.py", "blocking_code.py", "cpu_work.py"])
def test_a_wrong_address_is_one_line_and_exit_status_2(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "127.0.0.1:70000"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "port must be 0 to 65535" in done.stderr


def test_line_protocol_stores_values_with_any_bytes(start: Start) -> None:
    address = start("line_protocol.py")
    assert ask(address, b"GET name\nSET name 5\nA\nda \nGET name\nQUIT\n") == b"NONE\nOK\nVALUE 5\nA\nda \n"
    assert ask(address, b"GET name\n") == b"VALUE 5\nA\nda \n"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"NONSENSE\n", b"ERROR expected"),
        (b"SET name -1\n", b"ERROR expected"),
        (b"SET name 9999999\n", b"ERROR expected"),
        (b"G" * 1000, b"ERROR line too long"),
        (b"SET name 100\nonly this", b""),
    ],
)
def test_line_protocol_refuses_what_it_cannot_read(start: Start, request_: bytes, answer: bytes) -> None:
    assert ask(start("line_protocol.py"), request_).startswith(answer)


def test_chat_lines_reach_everybody_else(start: Start) -> None:
    address = start("chat.py")
    ada, bob = Lines(address), Lines(address)
    ada.send("Ada")
    ada.send("hello?")  # read after the name, so she is in the room when Bob comes
    bob.send("Bob")
    while (line := ada.read()) != "Your name? * Bob has come":
        assert line == "Your name?" or line.startswith("Your name? *")
    bob.send("hello Ada")
    assert ada.read() == "Bob: hello Ada"
    ada.send("hello Bob")
    assert bob.read() == "Your name? Ada: hello Bob"
    bob.close()
    assert ada.read() == "* Bob has left"
    ada.close()


def test_blocking_code_serves_others_while_one_waits(start: Start) -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow":
                asked.set()
                assert go_on.wait(20)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"page")

        def log_message(self, *_args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}"
        address = start("blocking_code.py")
        waiting = Lines(address)
        waiting.send(f"{url}/slow")
        assert asked.wait(20)
        for times in (1, 2):
            assert ask(address, f"{url}/quick\n".encode()) == f"4 bytes, asked for {times} times\n".encode()
        go_on.set()
        assert waiting.read() == "4 bytes, asked for 1 times"
        waiting.close()
        assert ask(address, b"ftp://x\n").startswith(b"ERROR expected")
        web.shutdown()


def test_cpu_work_in_a_thread_leaves_others_served(start: Start) -> None:
    address = start("cpu_work.py")
    computing = Lines(address)
    computing.send("THREAD 10")
    for _ in range(3):
        assert ask(address, b"PING\n") == b"PONG\n"
    computing.sock.settimeout(0.001)
    with pytest.raises(TimeoutError):
        computing.sock.recv(1)  # it still computes
    computing.close()
    assert ask(address, b"HERE 0.01\nTHREAD 0.01\n") == b"DONE\nDONE\n"
    assert ask(address, b"WHAT\n").startswith(b"ERROR")


HTTP = b"GET / HTTP/1.1\r\nHost: x\r\n"


def test_http_server_answers_one_request_after_another(start: Start) -> None:
    address = start("http_server.py", "--listen", "127.0.0.1:0", "--size", "3")
    kept = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nxxx"
    closing = kept.replace(b"keep-alive", b"close")
    assert ask(address, HTTP + b"\r\n" + HTTP + b"Connection: close\r\n\r\n") == kept + closing
    assert ask(address, b"GET / HTTP/1.0\r\n\r\n") == closing
    with socket.create_connection(address, timeout=20) as sock:
        for byte in HTTP + b"\r\n":
            sock.sendall(bytes([byte]))
        assert sock.recv(1000) == kept


def test_http_server_refuses_a_head_without_end(start: Start) -> None:
    address = start("http_server.py", "--listen", "127.0.0.1:0")
    assert ask(address, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000).startswith(b"HTTP/1.1 431 ")
    assert ask(address, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert ask(address, b"POST / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize("options", [["--sha"], ["--aes128"], ["--sleep", "1"], ["--sha", "--aes128", "--sleep", "1"]])
def test_http_server_works_for_each_answer(start: Start, options: list[str]) -> None:
    answer = ask(start("http_server.py", "--listen", "127.0.0.1:0", "--no-keepalive", *options), HTTP + b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert len(body) >= 1024


def test_http_server_stop_waits_for_the_request_and_not_for_the_client(start: Start) -> None:
    # The fixture's SIGTERM must end it although this client stays connected.
    address = start("http_server.py", "--listen", "127.0.0.1:0")
    sock = socket.create_connection(address, timeout=20)
    sock.sendall(HTTP + b"\r\n")
    assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_http_server_wrong_options_are_one_clear_line() -> None:
    for options in (["--accept-loops", "0"], ["--listen", "nowhere"], ["--size", "-1"]):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "http_server.py"), *options],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
