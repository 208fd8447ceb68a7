"""What programs do at a stop besides serving: hooks that end the program, background work that forks."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gevent
import pytest

from kit.patience import SOON
from kit.supervised import Start, masters

APP = """
import os, sys
import gevent

def job():
    while not conn.server.stopping:
        gevent.sleep(0.01)
    gevent.sleep(0.2)  # the server has stopped
    pid = os.fork()
    if not pid:
        gevent.sleep(1.5)  # the parent says what it waits for
        os._exit(0)
    os.waitpid(pid, 0)

def handler(connection):
    global conn
    conn = connection
    if conn.recv_until(b"\\n") == b"job\\n":
        gevent.spawn(job)
    conn.sendall(b"begun\\n")

def leave(_):
    pid = os.fork()
    if not pid:
        sys.exit(6)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=sys.stderr)
    sys.exit(7)
"""

WAYS = [pytest.param((), id="single"), pytest.param(("--workers", "1"), id="workers")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with masters(tmp_path, control=False) as start:
        yield partial(start, app=APP)


@pytest.mark.slow
@pytest.mark.parametrize("workers", WAYS)
def test_background_work_may_fork(start, workers):
    master = start(*workers)
    with socket.create_connection(("127.0.0.1", master.port), SOON) as client:
        client.sendall(b"job\n")
        assert client.recv(100) == b"begun\n"
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait(SOON) == 0
    assert master.log().count("waiting for 1 background job") == 1, master.log()  # and not in the child too
    assert master.log().count("stopped: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", WAYS)
def test_a_hook_that_would_end_the_program_ends_no_stop(start, workers):
    hooks = ("--on-stop", "app:leave", *(("--worker-stop", "app:leave") if workers else ()))
    master = start(*workers, *hooks)
    master.process.send_signal(signal.SIGTERM)
    assert master.process.wait(SOON) == 0, master.log()
    assert master.log().count("on_stop failed") == 1, master.log()
    assert re.findall("^[0-9]$", master.log(), re.M) == ["6"] * (2 if workers else 1)
    assert "exited with status" not in master.log()
    assert "stopped: " in master.log()


@pytest.mark.parametrize("error", [SystemExit(7), gevent.Timeout(1)])
def test_a_handler_that_would_end_the_program_when_it_is_told_ends_no_stop(serve, error, caplog):
    class Handler:
        def __call__(self, conn):
            pass

        def server_stopped(self):
            raise error

    server = serve(Handler())
    with gevent.Timeout(SOON):
        server.stop()
    assert "server_stopped() of the handler failed" in caplog.text
