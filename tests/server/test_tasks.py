"""`on_start` and `Server.spawn`: what runs beside the handlers begins and ends with the server."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time

import gevent
import pytest
from gevent.event import Event

from gtcpserver import ConfigError, GtcpServerError, Server, State
from gtcpserver.server import tasks as tasks_module
from kit.clients import ask
from kit.handlers import echo
from kit.patience import SOON
from kit.waiting import wait_until

# -- on_start ----------------------------------------------------------------------------------------------------------


def test_on_start_knows_the_port_and_comes_before_the_first_connection(serve):
    seen = []

    def handler(conn):
        seen.append("connection")
        conn.sendall(b"x")

    def on_start(server):
        seen.append(server.port)
        client = socket.create_connection(("127.0.0.1", server.port), SOON)  # the kernel accepts it
        gevent.sleep(0)
        seen.append(server.accepted_connections)
        clients.append(client)

    clients: list[socket.socket] = []
    server = serve(handler, on_start=on_start)
    with clients[0]:
        wait_until(lambda: len(seen) == 3)
        assert seen == [server.port, 0, "connection"]


def test_a_server_whose_on_start_raises_does_not_start_and_may_start_later():
    fails = [True]
    ended = Event()

    def task():
        try:
            gevent.sleep(3600)
        finally:
            ended.set()

    def on_start(server):
        ports.append(server.port)
        server.spawn(task)
        gevent.sleep(0)
        if fails.pop():
            raise OSError("no database")

    ports: list[int] = []
    server = Server("127.0.0.1:0", echo, on_start=on_start)
    with pytest.raises(OSError, match="no database"):
        server.start()
    assert server.state is State.NEW
    assert ended.is_set()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), SOON)
    fails.append(False)
    server.start()
    server.stop(SOON)


@pytest.mark.parametrize("do", ["start", "stop"])
def test_on_start_cannot_start_or_stop_the_server(do):
    server = Server("127.0.0.1:0", echo, on_start=lambda server: getattr(server, do)() and None)
    with pytest.raises(GtcpServerError, match="this one is starting" if do == "start" else "stopped while it started"):
        server.start()
    assert not server.listeners()


def test_on_start_is_a_plain_function_of_the_server():
    async def wrong(server): ...

    with pytest.raises(ConfigError, match=r"on_start .* is async"):
        Server("127.0.0.1:0", echo, on_start=wrong)  # type: ignore[arg-type]


def test_a_child_that_on_start_forks_leaves_the_listening_socket(connect, in_thread):
    pids = []

    def on_start(server):
        child = os.fork()
        if not child:
            try:
                found = [one.fileno() for one in server.listeners()]
                os._exit(0 if all(fd < 0 for fd in found) else 1)
            finally:
                os._exit(2)
        pids.append(child)

    server = Server("127.0.0.1:0", echo, on_start=on_start)
    server.start()
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    with connect(server) as client:
        assert in_thread(ask, client, b"x") == b"x"
    server.stop(SOON)


# -- spawn -------------------------------------------------------------------------------------------------------------


def test_a_task_ends_after_the_last_handler_and_before_on_stop(serve, connect, in_thread):
    seen = []

    def task(name, *, more):
        seen.append(name + more)
        try:
            gevent.sleep(3600)
        finally:
            gevent.sleep(0.01)  # what it flushes may wait
            seen.append("task")

    def handler(conn):
        conn.sendall(conn.recv(1))
        conn.server.stopping_event.wait()
        gevent.sleep(0.01)
        seen.append("handler")

    server = serve(
        handler, on_start=lambda server: server.spawn(task, "be", more="gun"), on_stop=lambda _: seen.append("on_stop")
    )
    with connect(server) as client:
        assert in_thread(ask, client, b"x") == b"x"
        report = server.stop(SOON)
    assert seen == ["begun", "handler", "task", "on_stop"]
    assert report.failures == ()


def test_a_task_that_fails_is_logged_and_the_server_serves_on(serve, connect, in_thread, caplog):
    def fail(error):
        raise error

    server = serve(echo)
    for error in (ValueError("a"), SystemExit(3)):
        assert server.spawn(fail, error).get(timeout=SOON) is None
    assert [record.getMessage() for record in caplog.records] == [
        "task test_a_task_that_fails_is_logged_and_the_server_serves_on.<locals>.fail failed"
    ] * 2
    with connect(server) as client:
        assert in_thread(ask, client, b"x") == b"x"


def test_a_task_s_result_is_that_of_its_greenlet(serve):
    assert serve(echo).spawn(divmod, 7, 2).get(timeout=SOON) == (3, 1)


def test_tasks_of_a_server_that_never_starts_end_with_it():
    server = Server("127.0.0.1:0", echo)
    waiting, never_began = server.spawn(gevent.sleep, 3600), None
    gevent.sleep(0)
    never_began = server.spawn(gevent.sleep, 3600)
    server.stop()
    assert waiting.dead
    assert never_began.dead
    with pytest.raises(GtcpServerError, match="spawns no tasks"):
        server.spawn(int)


def test_a_task_can_stop_the_server(serve):
    server = serve(echo)
    task = server.spawn(server.stop, SOON)
    assert server.wait_stopped(SOON)
    assert task.ready()


def test_only_functions_can_be_spawned(serve):
    with pytest.raises(GtcpServerError, match="spawn needs a function, got 5"):
        serve(echo).spawn(5)


@pytest.mark.parametrize("hurried", [False, True])
def test_a_task_that_does_not_end_is_cut_and_named(serve, caplog, monkeypatch, hurried):
    monkeypatch.setattr(tasks_module, "END_SECONDS", 0.02)
    caplog.set_level(logging.ERROR)

    def stubborn():
        for _ in range(2):
            try:
                gevent.sleep(3600)
            except BaseException:
                pass

    server = serve(echo)
    task = server.spawn(stubborn)
    gevent.sleep(0)
    if hurried:
        gevent.spawn_later(0.01, server.halt)
    report = server.stop(None if hurried else 0)
    assert task.dead
    assert "tasks did not end within the time of the stop and were cut: test_a_task_that" in caplog.text
    assert report.failures == ()


def test_a_task_s_last_words_are_not_interrupted(serve, monkeypatch):
    monkeypatch.setattr(tasks_module, "LOOK_SECONDS", 0.01)
    said = []

    def task():
        try:
            gevent.sleep(3600)
        finally:
            for word in range(5):
                gevent.sleep(0.01)
                said.append(word)

    server = serve(echo)
    server.spawn(task)
    gevent.sleep(0)
    server.stop(SOON)
    assert said == [0, 1, 2, 3, 4]


def test_many_short_tasks_leave_nothing(serve):
    server = serve(echo)
    gevent.joinall([server.spawn(int) for _ in range(100)], timeout=SOON)
    gevent.sleep(0)
    assert not server._tasks._running


# -- in the command ----------------------------------------------------------------------------------------------------

APP = """
import os, sys, gevent
def note(text):
    print(text, os.getpid(), file=sys.stderr, flush=True)
def task():
    try:
        gevent.sleep(3600)
    finally:
        note("task ended")
def begin(server):
    note("on_start")
    server.spawn(task)
def fail(server):
    raise ConnectionRefusedError("no database")
def end(server):
    note("on_stop")
def handle(conn):
    os.kill(os.getppid() if os.environ.get("GTCPSERVER_WORKERS") else os.getpid(), 15)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True])
def test_hooks_of_one_process_and_of_each_worker(tmp_path, workers):
    (tmp_path / "app.py").write_text(APP)
    hooks = ["--on-start", "app:begin", "--on-stop", "app:end"]
    command = [sys.executable, "-m", "gtcpserver", "serve", "app:handle", "-b", "127.0.0.1:0", *hooks]
    environment = os.environ | ({"GTCPSERVER_WORKERS": "1"} if workers else {})
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        for line in process.stderr or ():
            lines.append(line)
            if "listening on" in line:
                port = int(line.partition("127.0.0.1:")[2].split()[0])
                socket.create_connection(("127.0.0.1", port), SOON).close()
        assert process.wait(SOON) == 0
    noted = [line.split()[0] for line in lines if line.startswith(("on_", "task"))]
    assert noted == ["on_start", "task", "on_stop"]
    assert "".join(lines).index("on_start") < "".join(lines).index("listening on")


@pytest.mark.slow
def test_the_command_says_what_on_start_raised(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "gtcpserver", "serve", "app:handle", "-b", "127.0.0.1:0", "--on-start", "app:fail"]
    began = time.monotonic()
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SOON, check=False)
    assert result.returncode == 1
    assert "ConnectionRefusedError: no database (in fail, " in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - began < SOON
