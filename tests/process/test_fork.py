"""Forks in a serving process: nothing of the server is in the child, over real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from kit.forks import FILE, Program, read_all, sockets_of
from kit.patience import SOON
from kit.supervised import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """`start(how, kind, first="")` runs the program; it and its children are killed after the test."""
    processes = []

    def run(how="patched", kind="server", first=""):
        process = subprocess.Popen(
            [sys.executable, FILE, how, kind, *([first] if first else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        return Program(process, tls=kind.endswith("tls"))

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def both(function):
    return pytest.mark.parametrize("how", ["patched", "plain"])(function)


def stderr_of(program):
    program.process.terminate()
    return program.process.communicate(timeout=SOON)[1].decode()


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


LINES = "".join(f"line {number}\n" for number in range(20))


# What a handler is asked, and how many of the parent's sockets the child has. Not multiprocessing.Pool in a patched
# program: the greenlets that are its threads block each other, with gevent alone as well.
FORKS = [("process", 1), ("fork", 1), ("thread", 0), ("pool futures", 0), ("pool pool", 0)]


@pytest.mark.parametrize(
    ("how", "kind", "request_"),
    [
        *(("patched", "server", request) for request in ("process", "fork", "program", "thread", "pool futures")),
        *(
            ("plain", "server", request)
            for request in ("process", "fork", "program", "thread", "pool futures", "pool pool")
        ),
        *(("patched", "stream", request) for request in ("process", "fork", "program")),
    ],
)
def test_other_clients_get_their_answers_once_from_the_parent(start, how, kind, request_):
    program = start(how, kind)
    clients = [program.ask("lines") for _ in range(3)]
    child = program.ask(request_)
    assert child.makefile().readline().split()
    served_by = {program.answer("pid") for _ in range(200 if request_ == "fork" else 20)}
    assert served_by == {f"{program.pid}\n"}
    assert [read_all(client) for client in clients] == [LINES] * 3


@pytest.mark.parametrize(("how", "kind"), [("patched", "tls"), ("plain", "tls"), ("patched", "stream-tls")])
def test_tls_clients_get_their_answers_once_from_the_parent(start, how, kind):
    program = start(how, kind)
    clients = [program.ask("lines") for _ in range(4)]
    with program.ask("fork") as child:
        assert child.recv(100)
        assert [read_all(client) for client in clients] == [LINES] * 4


@pytest.mark.parametrize(
    ("how", "kind", "request_", "own"),
    [
        *(
            (how, "server", *case)
            for how in ("patched", "plain")
            for case in FORKS
            if (how, case[0]) != ("patched", "pool pool")
        ),
        *(("patched", kind, *case) for kind in ("stream", "tls", "stream-tls") for case in FORKS[:2]),
    ],
)
def test_a_child_has_no_socket_but_its_handlers(start, how, kind, request_, own):
    program = start(how, kind)
    # They say nothing; of TLS they are in the midst of their handshakes.
    others = [socket.create_connection(("127.0.0.1", program.port), timeout=SOON) for _ in range(3)]
    closed = program.ask("pid")  # lingers: the client has not closed its side
    assert closed.recv(100)
    client = program.ask(request_)
    pids = client.makefile().readline().split()
    of_parent = sockets_of(program.pid)
    assert len(of_parent) >= 1 + len(others)
    for pid in map(int, pids):
        # It is forked, and may not have come to close them yet.
        wait_until(lambda pid=pid: len(sockets_of(pid) & of_parent) == own)
    for other in (*others, closed, client):
        other.close()


@both
@pytest.mark.parametrize("request_", ["fork", "pool futures"])
def test_the_port_is_free_after_a_stop_while_a_child_lives_on(start, how, request_):
    program = start(how)
    client = program.ask(request_)
    pid = int(client.makefile().readline().split()[0])
    client.close()
    program.process.terminate()
    wait_until(lambda: not listens(program.port))  # multiprocessing waits for its processes before the program ends
    if request_ != "pool futures":  # which ends with its maker
        os.kill(pid, 0)
    socket.create_server(("127.0.0.1", program.port)).close()


@pytest.mark.parametrize(("how", "kind"), [("patched", "server"), ("plain", "server"), ("patched", "stream")])
@pytest.mark.parametrize(("end", "status"), [("return", 0), ("exit", 5), ("raise", 1), ("close", 0)])
def test_the_end_of_a_child_is_not_the_end_of_the_connection(start, how, kind, end, status):
    program = start(how, kind)
    answer = program.answer(f"fork_and_end {end}")
    assert answer == f"child\nstatus {status}\nparent\n"
    # Told once, by the process that has raised it.
    assert stderr_of(program).count("raised in the child\n") == (end == "raise")


@pytest.mark.parametrize(("how", "kind"), [("patched", "tls"), ("plain", "tls"), ("patched", "stream-tls")])
@pytest.mark.parametrize("end", ["return", "exit", "close"])
def test_the_end_of_a_child_sends_no_close_notify(start, how, kind, end):
    """Of two processes that write records with the same keys the client would understand one at most."""
    assert start(how, kind).answer(f"fork_quietly {end}") == "parent\n"


@both
@pytest.mark.parametrize(("end", "status"), [("return", 0), ("exit", 5), ("raise", 1)])
def test_the_end_of_a_greenlet_that_has_forked_ends_the_child(start, how, end, status):
    program = start(how)
    assert program.answer(f"greenlet {end}") == f"status {status}\n"
    assert stderr_of(program).count("raised in the child\n") == (end == "raise")


@both
def test_a_task_of_a_thread_that_has_forked_ends_the_child(start, how):
    assert start(how).answer("end_in_thread") == "status 0\n"


@both
@pytest.mark.parametrize(("end", "status"), [("return", 0), ("raise", 1)])
def test_a_fork_in_the_event_loop_itself_ends_with_the_callback(start, how, end, status):
    assert start(how).answer(f"callback {end}") == f"status {status}\n"


def test_the_child_of_a_wsgi_application_does_not_answer_too(start):
    program = start("patched", "wsgi")
    with program.ask("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r") as client:
        answer = read_all(client)
    assert answer.count("HTTP/1.1") == 1
    assert answer.endswith("\r\n\r\nstatus 0")


@both
@pytest.mark.parametrize("kind", ["server", "stream"])
def test_terminate_ends_a_process_at_once(start, how, kind):
    assert start(how, kind).answer("terminate 10") == f"{[-signal.SIGTERM] * 10}\n"


def test_terminate_ends_a_process_where_gevent_catches_the_signal(start):
    first = "import gevent, signal; gevent.signal_handler(signal.SIGTERM, print)"
    assert start("patched", "server", first).answer("terminate 3") == f"{[-signal.SIGTERM] * 3}\n"


@both
@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("asyncio", "'asyncio'"),
        ("program", r"b'program\n'"),
        ("look_up", "1"),
        ("locks", "[]"),
        ("sockets", "b'x'"),
        ("timeout", "'in time'"),
        ("serve", r"b'child\nstatus 0\nparent\n'"),
        ("collect", "[]"),
        ("endless", "'LoopExit'"),
    ],
)
def test_the_child_goes_on_with_an_event_loop_of_its_own(start, how, what, result):
    program = start(how)
    assert program.answer(f"in_child {what}") == f"{result} 0\n"
    assert stderr_of(program) == ""


@pytest.mark.parametrize("kind", ["server", "stream", "tls"])
def test_at_fork_hooks_that_wait_see_nothing_of_the_server(start, kind):
    first = "import os, time; os.register_at_fork(after_in_child=lambda: time.sleep(0.1))"
    program = start("patched", kind, first)
    clients = [program.ask("lines") for _ in range(3)]
    with program.ask("program") as client:
        assert client.recv(100)
        assert {program.answer("pid") for _ in range(20)} == {f"{program.pid}\n"}
    assert [read_all(client) for client in clients] == [LINES] * 3


@both
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_start_methods_work_too(start, how, method):
    if sys.version_info >= (3, 14) and (how, method) == ("patched", "forkserver"):
        pytest.skip("with gevent 26.9 it fails on Python 3.14 in any patched program")
    program = start(how)
    assert int(program.answer(f"process {method} 0"))


@both
@pytest.mark.parametrize("kind", ["server", "stream"])
def test_a_client_that_has_closed_its_side_sees_the_end_while_a_child_has_the_connection(start, how, kind):
    program = start(how, kind)
    client = program.ask("at_end")
    client.shutdown(socket.SHUT_WR)
    assert int(read_all(client))


MAIN = """
import os, sys, time
from gevent import monkey
monkey.patch_all()
import gevent
from gtcpserver import Server

def handle(conn):
    try:
        conn.sendall(b"begun\\n")
        gevent.sleep(0.1)
    finally:
        conn.sendall(b"end\\n")

with Server("127.0.0.1:0", handle) as server:
    print(server.port, flush=True)
    gevent.get_hub().threadpool.apply(sys.stdin.readline)
    pid = os.fork()
    if not pid:
        time.sleep(0.01)
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    gevent.sleep(0.2)
"""


def test_the_interpreters_end_in_a_child_runs_no_handlers_finally(python):
    """A fork in the main greenlet, which goes on as any program's, within the `with` of its server."""
    process = python(MAIN)
    client = socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=SOON)
    assert client.recv(6) == b"begun\n"
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"3\n"
    assert read_all(client) == "end\n"
    assert process.wait(SOON) == 0
    assert process.stderr.read() == b""


PREFORK = """
import os, gevent
from gtcpserver import StreamServer

def handle(sock, address):
    sock.sendall(b"%d" % os.getpid())

server = StreamServer(("127.0.0.1", 0), handle)
server.init_socket()
print(server.server_port, flush=True)
pid = gevent.fork()
server.serve_forever()
"""


def test_a_server_that_does_not_accept_yet_is_the_childs_too(python):
    """gevent's way to serve with several processes."""
    process = python(PREFORK, start_new_session=True)
    try:
        port = int(process.stdout.readline())
        served, give_up = set(), time.monotonic() + SOON
        while len(served) < 2:
            assert time.monotonic() < give_up
            served.add(read_all(socket.create_connection(("127.0.0.1", port), timeout=SOON)))
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_programs_that_do_not_serve_fork_as_gevent_has_it(python):
    """Greenlets go on in the child, which some programs rely on."""
    process = python("""
        import os, gtcpserver, gevent
        greenlet = gevent.spawn_later(0.01, print, "greenlet", flush=True)
        pid = gevent.fork()
        if not pid:
            greenlet.join()
            os._exit(0)
        greenlet.join()
        try:
            os.waitpid(pid, 0)  # gevent's may miss the end of a child
        except ChildProcessError:
            pass  # its event loop was quicker
        """)
    assert process.wait(SOON) == 0
    assert process.stdout.read() == b"greenlet\ngreenlet\n"
