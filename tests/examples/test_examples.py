"""Every example is started as a program and used through a socket. (http_server.py: test_http_server.py)"""

import ast
import http.server
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.examples import EXAMPLES, Client, Example, Start, run_example
from kit.patience import SOON

ALL = sorted(path.name for path in EXAMPLES.glob("*.py"))
# The TLS ones and the benchmark's HTTP server have tests of their own.
NAMES = [name for name in ALL if name != "http_server.py" and "TLSConfig" not in (EXAMPLES / name).read_text()]
# Those that start by themselves; the others need a program of another's: test_drivers.py.
ALONE = [name for name in NAMES if name not in ("database.py", "redis_queue.py")]
# Those that answer by themselves; the forwarder needs somebody behind it: test_files.py.
ANSWERING = [name for name in ALONE if name != "port_forwarder.py"]

Connect = Callable[..., Client]


def ask(example: Example, request: bytes) -> bytes:
    """Send a request, end the sending side, and read until the server closes."""
    client = Client(example.address)
    try:
        client.sock.sendall(request)
        return client.rest()
    finally:
        client.close()


# -- what all have in common -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_each_can_be_copied_alone(name: str) -> None:
    tree = ast.parse((EXAMPLES / name).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {path.stem for path in EXAMPLES.iterdir()}
    assert f"python examples/{name}" in (ast.get_docstring(tree) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_the_last_line_tells_of_a_wrong_address(name: str) -> None:
    done = run_example(name, "127.0.0.1:70000")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gtcpserver: port must be 0 to 65535, got '127.0.0.1:70000'\n"


@pytest.mark.slow
def test_the_last_line_tells_of_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_example("echo.py", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "in use" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_signal_right_after_it_listens_is_a_graceful_stop(start: Start, name: str) -> None:
    start(name).stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ANSWERING if name != "echo.py"])
def test_a_silent_client_holds_up_no_stop(start: Start, connect: Connect, name: str) -> None:
    example = start(name)
    connect(example)
    ask(example, b"")  # answered, so the one before was accepted
    assert ", 0 cut" in example.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERING)
def test_serves_a_unix_socket_too(start: Start, tmp_path: Path, name: str) -> None:
    example = start(name, f"unix:{tmp_path}/socket")
    assert ask(example, b"no such request\n")
    assert ", 0 cut" in example.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ANSWERING if name != "echo.py"])
def test_a_flood_without_a_line_ends_that_client_alone(start: Start, name: str) -> None:
    example = start(name)
    ask(example, b"x" * 10_000)
    ask(example, b"\xff\xfe\x00\n" * 10)
    assert ask(example, b"no such request\n")
    example.stop()  # and no fault of the handler's was logged


# -- echo.py -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_echo_sends_back_what_comes(start: Start) -> None:
    assert ask(start("echo.py"), b"x" * 300_000) == b"x" * 300_000


# -- line_protocol.py --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_line_protocol_stores_values_with_any_bytes(start: Start) -> None:
    example = start("line_protocol.py")
    assert ask(example, b"GET name\nSET name 5\nA\nda \nGET name\nQUIT\nGET name\n") == b"NONE\nOK\nVALUE 5\nA\nda \n"
    assert ask(example, b"SET none 0\n\nGET none\nGET name\n") == b"OK\nVALUE 0\n\nVALUE 5\nA\nda \n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"NONSENSE\n", b"ERROR expected"),
        (b"\n", b"ERROR expected"),
        (b"SET name -1\n", b"ERROR expected"),
        (b"SET name 9999999\n", b"ERROR expected"),
        (b"SET name 3\nlonger\n", b"ERROR the value is longer"),
        (b"G" * 1000, b"ERROR line too long"),
        (b"SET name 100\nonly this", b""),
        (b"GET na", b""),
    ],
)
def test_line_protocol_refuses_what_it_cannot_read(start: Start, request_: bytes, answer: bytes) -> None:
    example = start("line_protocol.py")
    got = ask(example, request_)
    assert got.startswith(answer)
    assert bool(got) == bool(answer)
    assert ask(example, b"GET name\n") == b"NONE\n"


@pytest.mark.slow
def test_line_protocol_ends_a_request_that_takes_too_long(start: Start, connect: Connect) -> None:
    example = start("line_protocol.py", REQUEST_SECONDS=0.2)
    slow, silent = connect(example), connect(example)
    slow.send("SET name 100", "only this")
    assert slow.read() == ""  # closed, although the client is still there
    silent.send("GET name")
    assert silent.read() == "NONE"  # the deadline is the request's, not the connection's


# -- chat.py -----------------------------------------------------------------------------------------------------------


def join(client: Client, name: str) -> None:
    client.send(name)
    greeting = client.read()
    assert greeting.startswith("Your name? * here are: ")
    assert name in greeting


@pytest.mark.slow
def test_chat_lines_reach_everybody_else(start: Start, connect: Connect) -> None:
    example = start("chat.py")
    ada, bob = connect(example), connect(example)
    join(ada, "Ada")
    join(bob, "Bob")
    assert ada.read() == "* Bob has come"
    bob.send("hello Ada", "", "how \x1b[2Jare you?")
    assert [ada.read(), ada.read()] == ["Bob: hello Ada", "Bob: how [2Jare you?"]
    ada.send("hello Bob")
    assert bob.read() == "Ada: hello Bob"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Ada", "", "x" * 33])
def test_chat_takes_no_name_that_is_taken_or_unfit(start: Start, connect: Connect, name: str) -> None:
    example = start("chat.py")
    ada = connect(example)
    join(ada, "Ada")
    assert b"Expected a name" in ask(example, name.encode() + b"\n")
    bob = connect(example)
    join(bob, "Bob")
    assert ada.read() == "* Bob has come"  # and nobody came or left before


@pytest.mark.slow
def test_chat_members_who_leave_in_any_way_are_gone(start: Start, connect: Connect) -> None:
    example = start("chat.py")
    ada = connect(example)
    join(ada, "Ada")
    for leave in (Client.close, Client.reset, lambda client: client.sock.sendall(b"x" * 5000), Client.rest):
        bob = connect(example)
        join(bob, "Bob")
        assert ada.read() == "* Bob has come"
        leave(bob)
        assert ada.read() == "* Bob has left"


@pytest.mark.slow
def test_chat_slow_members_hold_up_nobody_and_hear_what_they_missed(start: Start, connect: Connect) -> None:
    example = start("chat.py")
    slow = connect(example, receive_buffer=4096)
    ada, bob = connect(example), connect(example)
    for client, name in ((slow, "Slow"), (ada, "Ada"), (bob, "Bob")):
        join(client, name)
    ada.read_until("* Bob has come")
    # More than all buffers of a connection hold (net.ipv4.tcp_wmem: 4 MiB), in batches that Bob keeps up with.
    batch = ["x" * 1000] * 100
    for _ in range(80):
        ada.send(*batch)
        assert [bob.read() for _ in batch] == [f"Ada: {line}" for line in batch]
    bob.close()
    assert ada.read() == "* Bob has left"
    heard = 0
    while not (line := slow.read()).startswith("* you have missed "):
        assert line
        heard += line.startswith("Ada: ")
    missed = int(line.split()[4])
    assert 0 < heard < 8000
    # What was said, Bob's coming and leaving, and Ada's coming, which Slow heard or did not.
    assert 8000 <= heard + missed <= 8003


@pytest.mark.slow
def test_chat_a_flood_of_short_lines_arrives_whole(start: Start, connect: Connect) -> None:
    example = start("chat.py")
    ada, bob = connect(example), connect(example)
    join(ada, "Ada")
    join(bob, "Bob")
    lines = [str(number) for number in range(2000)]
    ada.send(*lines)
    assert [bob.read() for _ in lines] == [f"Ada: {line}" for line in lines]


# -- blocking_code.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[Any]:
    """A web server whose page /slow comes when ``go_on`` is set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow":
                server.asked.set()
                assert server.go_on.wait(SOON)
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"page")

        def log_message(self, *_args: Any) -> None:
            pass

    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.go_on = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_blocking_code_serves_others_while_one_waits(start: Start, connect: Connect, web: Any) -> None:
    example = start("blocking_code.py")
    waiting = connect(example)
    waiting.send(f"{web.url}/slow")
    assert web.asked.wait(SOON)
    for times in (1, 2):
        assert ask(example, f"{web.url}/quick\n".encode()) == f"4 bytes, asked for {times} times\n".encode()
    web.go_on.set()
    assert waiting.read() == "4 bytes, asked for 1 times"


@pytest.mark.slow
def test_blocking_code_does_not_wait_for_a_page_for_ever(start: Start, connect: Connect, web: Any) -> None:
    client = connect(start("blocking_code.py", FETCH_SECONDS=0.2))
    client.send(f"{web.url}/slow")
    assert "not fetched within 0.2 seconds" in client.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "answer"), [("/none", "ERROR HTTP Error 404"), ("/a b", "ERROR "), ("\0", "ERROR "), (None, "ERROR expec")]
)
def test_blocking_code_says_what_is_wrong_with_a_url(start: Start, web: Any, path: str | None, answer: str) -> None:
    url = "ftp://127.0.0.1/" if path is None else web.url + path
    example = start("blocking_code.py")
    assert ask(example, f"{url}\n".encode()).decode().startswith(answer)
    example.stop()  # no traceback was logged


# -- cpu_work.py -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cpu_work_in_a_thread_leaves_others_served(start: Start, connect: Connect) -> None:
    example = start("cpu_work.py")
    computing = connect(example)
    computing.send("THREAD 10")
    for _ in range(3):
        assert ask(example, b"PING\n") == b"PONG\n"
    computing.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        computing.sock.recv(1)  # it still computes
    example.process.kill()
    example.process.wait()
    assert ask(start("cpu_work.py"), b"THREAD 0.01\nPING\n") == b"DONE\nPONG\n"


@pytest.mark.slow
def test_cpu_work_in_a_process_leaves_others_served(start: Start, connect: Connect) -> None:
    example = start("cpu_work.py")
    computing, waiting = connect(example), connect(example)
    waiting.send("PING")
    assert waiting.read() == "PONG"
    computing.send("PROCESS 1")
    served = 0
    while not select.select([computing.sock], [], [], 0)[0]:
        waiting.send("PING")
        assert waiting.read() == "PONG"
        served += 1
    assert served > 3
    assert computing.read() == "DONE"
    example.stop()


@pytest.mark.slow
def test_cpu_work_in_the_handler_holds_up_others(start: Start, connect: Connect) -> None:
    example = start("cpu_work.py")
    computing, waiting = connect(example), connect(example)
    for client in (computing, waiting):
        client.send("PING")
        assert client.read() == "PONG"
    computing.send("HERE 1")
    began, longest = time.monotonic(), 0.0
    while not select.select([computing.sock], [], [], 0)[0]:
        asked = time.monotonic()
        waiting.send("PING")
        assert waiting.read() == "PONG"
        longest = max(longest, time.monotonic() - asked)
    # All of the time but that of what was asked before it began, and of this process.
    assert longest > (time.monotonic() - began) / 2
    assert computing.read() == "DONE"
    log = example.stop()
    if time.monotonic() - began < 1.8:  # it has got a CPU for most of the second
        assert "cpu_work.py" in log.split("the event loop was blocked for ")[1].split("\n")[0]
        assert "This is computation" in log


@pytest.mark.slow
def test_cpu_work_refuses_what_is_no_number(start: Start) -> None:
    example = start("cpu_work.py")
    for request in (b"WHAT\n", b"HERE\n", b"HERE .\n", b"HERE -1\n", b"THREAD nan\n", b"HERE \xc2\xb2\n"):
        assert ask(example, request).startswith(b"ERROR expected")


# -- graceful.py -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_graceful_finishes_requests_and_lets_idle_clients_go(start: Start, connect: Connect) -> None:
    example = start("graceful.py", WATCH_SECONDS=0.02)
    idle, working, watching = (connect(example) for _ in range(3))
    idle.send("WORK 0")
    assert idle.read() == "DONE"
    watching.send("WATCH")
    assert watching.read() == "3 accepted, 3 open, 2 idle"
    working.send("WORK 1")
    watching.read_until("3 accepted, 3 open, 1 idle")  # its handler works
    example.process.send_signal(signal.SIGTERM)
    assert idle.read() == ""
    watching.read_until("BYE")
    assert working.read() == "DONE"
    assert "stopped: 3 connections finished, 0 cut\n" in example.wait()
    assert example.process.returncode == 0


@pytest.mark.slow
def test_graceful_cuts_and_reports_what_takes_too_long(start: Start, connect: Connect) -> None:
    example = start("graceful.py", STOP_SECONDS=0.1)
    working = connect(example)
    working.send("WORK 0", "WORK 60")
    assert working.read() == "DONE"
    example.process.send_signal(signal.SIGTERM)
    assert working.read() == "SORRY, the server has stopped"
    log = example.wait()
    assert example.process.returncode == 1
    assert "stopped: 0 connections finished, 1 cut\n" in log
    assert re.search(r" cut 127\.0\.0\.1:\d+, \d\.\d s old, 15 bytes in, 5 out, at .* in work < .* in handle\n", log)


@pytest.mark.slow
def test_graceful_refuses_too_many_from_one_address(start: Start, connect: Connect) -> None:
    example = start("graceful.py", MOST_FROM_ONE_ADDRESS=2)
    first, second, third = (connect(example) for _ in range(3))
    assert third.read() == ""
    third.close()
    first.send("WORK 0")
    assert first.read() == "DONE"
    assert first.rest() == b""
    again = connect(example)  # there is a place when the first has gone
    again.send("WORK 0")
    assert again.read() == "DONE"
    second.close()
    again.close()
    assert example.stop().endswith(", 0 cut\n")
