"""gevent's event loops: libev is served by, compiled or by CFFI; libuv is refused."""

import os
import subprocess
import sys

import pytest

from injection.strace import command, needs_strace

pytestmark = pytest.mark.slow

PROGRAM = """
import gevent.socket
from gtcpserver import Server

def echo(conn):
    while data := conn.recv(65536):
        conn.sendall(data)

with Server("127.0.0.1:0", echo) as server:
    for _ in range(2):
        client = gevent.socket.create_connection(("127.0.0.1", server.port))
        client.sendall(b"hello")
        print(client.recv(5).decode())
        client.close()
"""


def run_with(loop, *command):
    command = [sys.executable, *command]
    environment = {**os.environ, "GEVENT_LOOP": loop}
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("loop", ["libev-cext", "libev-cffi"])
def test_libev_serves(loop):
    done = run_with(loop, "-c", PROGRAM)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nhello\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["echo", "--bind", "127.0.0.1:0"],
        ["echo", "--bind", "127.0.0.1:0", "--workers", "1"],
        ["forward", "127.0.0.1:0", "127.0.0.1:1"],
        ["proxy", "--mixed", "127.0.0.1:0"],
    ],
)
def test_libuv_is_refused_in_one_line(arguments):
    done = run_with("libuv", "-m", "gtcpserver", *arguments)
    assert done.returncode in (2, 3)
    assert done.stderr.count("GEVENT_LOOP=libuv is not supported") == 1
    assert "Traceback" not in done.stderr


def test_libuv_is_refused_for_a_connection_to_another_server():
    done = run_with("libuv", "-c", "import gtcpserver; gtcpserver.connect('127.0.0.1:1')")
    assert "ConfigError: gevent's event loop must be libev" in done.stderr


@needs_strace
@pytest.mark.parametrize("options", [(), ("--metrics", "0")], ids=["", "metrics"])
def test_a_loop_that_cannot_wait_ends_the_process_with_one_line(tmp_path, options):
    """None of epoll_wait(2)'s errors but EINTR is one that passes."""
    words = [sys.executable, "-m", "gtcpserver", "echo", "--bind", "127.0.0.1:0", *options]
    strace = command(["epoll_wait:error=EINVAL:when=4+", "epoll_pwait2:error=EINVAL:when=4+"], tmp_path / "trace")
    done = subprocess.run([*strace, *words], capture_output=True, text=True, timeout=60, check=False)
    assert "gtcpserver: the event loop failed: epoll_wait: Invalid argument" in done.stderr.splitlines()
    if sys.version_info < (3, 13):  # since then gevent waits in the loop once more when the interpreter ends
        assert "Traceback" not in done.stderr
    assert done.returncode == 1
