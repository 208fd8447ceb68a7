"""Threads, jobs, greenlets and processes that handlers have begun get the rest of a stop's time, then are named."""

import re
import signal
import socket
import subprocess
import sys

import gevent
import pytest

from kit.patience import SOON
from kit.supervised import Master

#: Work of handlers, which leaves its name.
JOB = """
def job(name, seconds):
    time.sleep(seconds)
    note(name)

def note(line):
    with open("done", "a") as file:
        file.write(line + "\\n")
"""

APP = (
    """
import os, threading, time
from concurrent.futures import ThreadPoolExecutor
import gevent

pool = ThreadPoolExecutor(1, "jobs")
pool.submit(int).result()  # a thread that waits for jobs holds up nothing

def green_job(name, seconds):
    gevent.sleep(seconds)
    note(name)

def handler(conn):
    name, seconds = conn.recv_until(b"\\n").decode().split()
    seconds = float(seconds)
    if name == "executor":
        pool.submit(job, name, seconds)
        pool.submit(job, "queued", 0)
    elif name == "thread":
        threading.Thread(target=job, args=(name, seconds), name="helper").start()
    elif name == "daemon":
        threading.Thread(target=job, args=(name, seconds), daemon=True).start()
    elif name == "greenlet":
        gevent.spawn(gevent.spawn, green_job, name, seconds)
    elif name == "native":
        gevent.get_hub().threadpool.spawn(native_sleep, name, seconds)
    conn.sendall(b"begun\\n")

def native_sleep(name, seconds):
    gevent.monkey.get_original("time", "sleep")(seconds)
    note(name)

def on_stop(server):
    note("on_stop")

helper = gevent.spawn(gevent.sleep, 3600)  # the program's own, without an end
"""
    + JOB
)

KINDS = ("executor", "thread", "greenlet", "native")
SHORT, ENDLESS = 0.3, 3600


@pytest.fixture
def start(tmp_path):
    masters = []

    def start_with(*options, app=APP):
        (tmp_path / "app.py").write_text(app)
        command = ("serve", "app:handler", "--bind=127.0.0.1:0", "--on-stop=app:on_stop", *options)
        masters.append(Master(tmp_path, command).wait_listening())
        return masters[-1]

    yield start_with
    for master in masters:
        if master.process.poll() is None:
            master.process.kill()
        master.process.wait()


def begin(server, name, seconds):
    with socket.create_connection(("127.0.0.1", server.port), SOON) as client:
        client.sendall(f"{name} {seconds}\n".encode())
        assert client.recv(100) == b"begun\n"


def done(server):
    path = server.folder / "done"
    return sorted(path.read_text().split()) if path.exists() else []


WAYS = [
    pytest.param((), (), id="single"),
    pytest.param((), ("--no-monkey-patch",), id="single-unpatched"),
    pytest.param(("--workers=1",), (), id="workers"),
    pytest.param(("--workers=1",), ("--no-monkey-patch",), id="workers-unpatched"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "patched"), WAYS)
def test_work_that_ends_in_time_ends_whole(start, workers, patched):
    server = start(*workers, *patched, "--stop-timeout=20")
    for kind in KINDS:
        begin(server, kind, SHORT)
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    assert done(server) == sorted([*KINDS, "queued", "on_stop"])
    assert "cut" not in server.log().replace("0 cut", "")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "patched"), WAYS)
def test_work_without_an_end_is_cut_at_the_stop_time_and_named(start, workers, patched):
    server = start(*workers, *patched, "--stop-timeout=0.3")
    for kind in KINDS:
        begin(server, kind, ENDLESS)
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    log = server.log()
    found = re.search(r"cut 5 background jobs: (.*)", log)
    assert found, log
    names = found[1]
    for name in (
        r"job job of jobs_0 at app.py:\d+ in job",
        r"job queued for jobs",
        r"thread helper at app.py:\d+ in job",
        r"greenlet green_job at app.py:\d+ in green_job",
        r"job of gevent's thread pool",
    ):
        assert re.search(name, names), log
    assert done(server) == ["on_stop"]
    assert "stopped: 0 connections finished, 0 cut" in log


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "patched"), WAYS)
def test_a_second_signal_cuts_it_now(start, workers, patched):
    server = start(*workers, *patched, "--stop-timeout=none")
    begin(server, "thread", ENDLESS)
    server.process.terminate()
    server.wait_for("waiting for 1 background job: thread helper")
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    assert "cut 1 background job: thread helper" in server.log()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "patched"), WAYS)
def test_threads_that_are_daemons_and_the_program_s_own_greenlets_hold_up_nothing(start, workers, patched):
    server = start(*workers, *patched, "--stop-timeout=none")
    begin(server, "daemon", ENDLESS)
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    assert "background" not in server.log()


@pytest.mark.slow
@pytest.mark.parametrize("patched", [(), ("--no-monkey-patch",)], ids=["patched", "unpatched"])
@pytest.mark.parametrize("way", ["reload", "recycling"])
def test_workers_that_are_replaced_finish_their_work(start, way, patched):
    recycle = ("--recycle-after=4", "--recycle-jitter=0") if way == "recycling" else ()
    server = start("--workers=1", *recycle, *patched)
    for kind in KINDS:
        begin(server, kind, SHORT)
    if way == "reload":
        server.process.send_signal(signal.SIGHUP)
    server.wait_for("has left")
    assert done(server) == sorted([*KINDS, "queued", "on_stop"])
    server.process.terminate()
    assert server.process.wait(SOON) == 0


@pytest.mark.slow
def test_work_of_a_replaced_worker_is_cut_after_the_stop_time_although_connections_would_not_be(start):
    server = start("--workers=1", "--stop-timeout=0.3")
    begin(server, "thread", ENDLESS)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("cut 1 background job: thread helper")
    server.wait_for("has left")


SCRIPT = """
import atexit, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import gevent
from gtcpserver import Server

pool = ThreadPoolExecutor(2)

def endless():
    while True:
        time.sleep(0.01)

def handler(conn):
    pool.submit(endless)
    threading.Thread(target=endless, name="mine").start()

def client():
    from gevent.socket import create_connection
    with create_connection(("127.0.0.1", server.port)) as sock:
        assert sock.recv(1) == b""
    os.kill(os.getpid(), signal.SIGTERM)

server = Server("127.0.0.1:0", handler)
server.start()
gevent.spawn(client)
report = server.serve_forever(stop_timeout=0.1)
print(len(report.background), flush=True)
other = ThreadPoolExecutor(1)
other.submit(lambda: (time.sleep(0.2), print("later work is waited for", flush=True)))
atexit.register(print, "exit functions run", flush=True)
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("patch", [True, False])
def test_a_script_goes_on_and_its_exit_waits_for_what_was_not_cut_alone(tmp_path, patch):
    patches = "from gevent import monkey; monkey.patch_all()" if patch else ""
    (tmp_path / "script.py").write_text(patches + SCRIPT)
    process = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SOON,  # and kills it
    )
    output = process.stdout
    assert process.returncode == 7, output
    assert output.endswith("2\nlater work is waited for\nexit functions run\n"), output
    assert "cut 2 background jobs" in output


PROCESSES = (
    """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

spawning = get_context("spawn")  # not by a fork of a process with handlers
pool = None

def handler(conn):
    global pool
    name, seconds = conn.recv_until(b"\\n").decode().split()
    if name == "process":
        spawning.Process(target=job, args=(name, float(seconds)), name="mine").start()
    else:
        pool = pool or ProcessPoolExecutor(1, spawning)
        pool.submit(job, name, float(seconds))
    conn.sendall(b"begun\\n")

def on_stop(server):
    pass
"""
    + JOB
)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers=1",)], ids=["single", "workers"])
def test_processes_end_whole_in_time(start, workers):
    server = start(*workers, "--no-monkey-patch", "--stop-timeout=20", app=PROCESSES)
    begin(server, "process", SHORT)
    begin(server, "pool", SHORT)
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    assert done(server) == ["pool", "process"]
    assert not re.search(r"cut \d+ background", server.log())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers=1",)], ids=["single", "workers"])
def test_processes_without_an_end_are_cut_and_named(start, workers):
    server = start(*workers, "--no-monkey-patch", "--stop-timeout=0.3", app=PROCESSES)
    begin(server, "process", ENDLESS)
    begin(server, "pool", ENDLESS)
    server.process.terminate()
    assert server.process.wait(SOON) == 0
    assert re.search(r"cut 2 background jobs: job of a ProcessPoolExecutor, process mine \(pid \d+\)", server.log())


# -- the hook ----------------------------------------------------------------------------------------------------------


def test_on_stop_is_called_when_the_last_connection_has_ended(serve, connect):
    seen = []
    server = serve(lambda conn: conn.recv(1), on_stop=lambda own: seen.append((own is server, own.active_connections)))
    client = connect(server)
    stopping = gevent.spawn(server.stop, None)
    assert server.listening_ended.wait(SOON)
    assert seen == []
    client.sendall(b"x")
    client.close()
    stopping.get(timeout=SOON)
    assert seen == [(True, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [0, None])
def test_on_stop_has_a_second_and_is_cut_then(serve, monkeypatch, caplog, timeout):
    monkeypatch.setattr("gtcpserver.server.stopping.ON_STOP_SECONDS", 0.05)
    ended = []

    def on_stop(_server):
        try:
            gevent.sleep(3600)
        finally:
            ended.append(True)

    server = serve(lambda conn: None, on_stop=on_stop)
    stopping = gevent.spawn(server.stop, timeout)
    if timeout is None:
        gevent.sleep(0.2)
        assert not stopping.ready()
        server.halt()
    assert stopping.get(timeout=SOON).failures == ()
    assert ended == [True]
    assert "on_stop did not end within the time of the stop" in caplog.text


def test_a_fault_of_on_stop_is_logged_and_the_stop_goes_on(serve, caplog):
    server = serve(lambda conn: None, on_stop=lambda own: 1 / 0)
    assert server.stop(None).failures == ()
    assert "on_stop failed" in caplog.text
