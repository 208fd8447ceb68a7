"""A stop ends in its time, and does each of its steps, whatever fails on the way; what failed is told once."""

import errno
import gc
import logging
import os
import signal
import socket
import time

import gevent
import pytest

from gtcpserver import ClientLimits
from gtcpserver.listening import draining
from gtcpserver.server import State
from gtcpserver.server import stopping as stopping_module
from gtcpserver.server import watchdog as watchdog_module
from injection.strace import needs_strace, rule
from kit.forms import pure_only
from kit.patience import SOON
from kit.waiting import wait_until

ECHO = """
def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)
serve(Server("127.0.0.1:0", echo), 0.5)
"""


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def broken(*_, **__):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def no_memory(*_, **__):
    raise MemoryError


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("call", ["getsockname", "accept4", "setsockopt", "socket", "recvfrom", "close", "epoll_ctl"])
@pytest.mark.parametrize("when", ["1", "1+"])
def test_a_stop_ends_in_its_time_although_calls_fail(injected, call, when):
    subject = injected(ECHO)
    with subject.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        with subject.injecting(rule(call, "ENOMEM", when)):
            subject.send_signal(signal.SIGTERM)
            assert subject.wait() == 0
    assert subject.line() == "finished 0 ended 1"
    assert len(subject.log().splitlines()) < 10


@pytest.mark.slow
@needs_strace
def test_a_command_whose_stop_was_not_complete_ends_with_status_1(injected):
    program = """
    import threading
    def main():
        from gtcpserver.cli import main
        sys.argv = ["gtcpserver", "echo", "--bind", "127.0.0.1:0"]
        main()
    say(os.getpid())
    say(0)
    main()
    """
    subject = injected(program)
    log = subject.wait_for_log(r"listening on 127.0.0.1:\d+")
    assert "Traceback" not in log
    with socket.socket() as one:  # where filters are not allowed, IP_MINTTL is set before TCP_DEFER_ACCEPT
        when = "2" if draining._drop_by_filter(one) else "3"
    with subject.injecting(rule("setsockopt", "ENOMEM", when)):
        subject.send_signal(signal.SIGTERM)
        assert subject.wait() == 1
    assert subject.log().count("begin no new connections: ") == 2  # when it failed, and why the status is 1
    assert "Traceback" not in subject.log()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("acceptor", "mute"),
        ("acceptor", "stop_accepting"),
        ("acceptor", "drain"),
        ("stop", "_drain_and_close"),
        pytest.param("state", "idle_connections", marks=pure_only),
        ("stop", "_wait_until_nobody_is_connected"),
        ("stopping", "describe"),
        pytest.param("lingerer", "close_all", marks=pure_only),
        ("time_limits", "stop"),
    ],
)
def test_the_other_steps_of_a_stop_are_done(serve, connect, in_thread, monkeypatch, caplog, where, name):
    server = serve(echo)
    client = connect(server)
    client.sendall(b"x")
    assert in_thread(client.recv, 1) == b"x"
    place = {
        "acceptor": server._state.acceptors[0],
        "stop": server._stopping,
        "state": server._state,
        "stopping": stopping_module,
        "lingerer": server.lingerer,
        "time_limits": server._time_limits,
    }[where]
    acceptor = server._state.acceptors[0]
    listener = acceptor.listener
    with monkeypatch.context() as patched, gevent.Timeout(SOON), caplog.at_level(logging.ERROR, "gtcpserver"):
        patched.setattr(place, name, broken)
        report = server.stop(0.1)
        assert server.state is State.STOPPED
    acceptor.stop_accepting()  # not done where it was broken: the descriptor would be watched in the next test
    assert in_thread(client.recv, 1) == b""
    assert listener.closed
    assert server.active_connections == 0
    assert report.ended == 1
    if where != "stopping":
        assert all("Cannot allocate memory" in failure for failure in report.failures)
        assert len(report.failures) == (2 if name == "stop_accepting" else 1)  # which a close calls, too
        assert [r.message for r in caplog.records] == [f"stopping: {failure}" for failure in report.failures]


def test_a_stop_looks_itself_whether_anybody_is_connected(serve, monkeypatch):
    """Whatever has failed to set the event."""
    server = serve(echo)
    server._state.nobody_connected.clear()
    with gevent.Timeout(SOON):
        server.stop(1000)


@pytest.mark.slow
def test_what_cannot_be_drained_is_logged_once_and_told(serve, connect, monkeypatch, caplog):
    server = serve(echo)
    acceptor = server._state.acceptors[0]
    acceptor.stop_accepting()
    client = connect(server)

    def out_of_descriptors():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(acceptor, "do_read", out_of_descriptors)
    monkeypatch.setattr(acceptor, "mute", lambda: True)
    monkeypatch.setattr(stopping_module, "LONGEST_DRAIN", 0.2)
    with caplog.at_level(logging.ERROR, "gtcpserver"):
        report = server.stop(1)
    assert [r.message for r in caplog.records if "cannot drain" in r.message] == [
        f"cannot drain {acceptor.address}: [Errno {errno.EMFILE}] Too many open files"
    ]
    assert report.failures == (f"drain: 1 connection in the queue of {server.address} could not be accepted",)
    client.close()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.2, 0.0])
def test_a_lost_listening_socket_stops_the_server_within_its_stop_timeout(serve, connect, in_thread, seconds):
    server = serve(echo)
    client = connect(server)
    client.sendall(b"x")
    assert in_thread(client.recv, 1) == b"x"
    serving = gevent.spawn(server.serve_forever, seconds)
    gevent.sleep(0)
    began = time.monotonic()
    server._state.acceptors[0].socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(OSError, match="Invalid argument"):
        serving.get(timeout=SOON)
    assert time.monotonic() - began < 25  # the default stop_timeout is 30 s


def test_a_stop_that_had_no_memory_to_begin_can_be_asked_for_again(serve, monkeypatch):
    server = serve(echo)
    with monkeypatch.context() as patched:
        patched.setattr(gevent, "spawn", no_memory)
        with pytest.raises(MemoryError):
            server.stop(1)
    assert server.state is State.SERVING
    server.stop(1)
    assert server.state is State.STOPPED


def test_a_signal_whose_stop_had_no_memory_to_begin_stops_all_the_same(serve, monkeypatch):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    server = serve(echo)
    with monkeypatch.context() as patched:
        patched.setattr(gevent, "spawn", no_memory)
        with pytest.raises(MemoryError):
            server._stopping.by_signal(signal.SIGTERM, 1)
    assert server.wait_stopped(10)


def test_a_stop_whose_greenlet_could_not_start_is_begun_again(serve, monkeypatch):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    server = serve(echo)
    spawn = gevent.spawn
    with monkeypatch.context() as patched:

        def spawn_dead(function, *args):
            greenlet = spawn(function, *args)
            greenlet.kill()
            return greenlet

        patched.setattr(gevent, "spawn", spawn_dead)
        server._stopping.begin(1)
    server._stopping.spawn = lambda: spawn(server._stopping.run, 1, False, 0)
    assert server.wait_stopped(10)


@pytest.mark.slow
def test_a_limited_client_that_was_refused_keeps_no_stop_waiting(serve, connect, in_thread):
    server = serve(echo, client_limits=ClientLimits(deny=["127.0.0.1"]))
    with pytest.raises(ConnectionError):
        in_thread(connect(server).recv, 1)
    wait_until(lambda: server._state.nobody_connected.is_set())
    with gevent.Timeout(SOON):
        server.stop(1000)
    gc.collect()


@pytest.mark.parametrize("what", ["max_accepts", "lost"])
def test_a_stop_of_the_servers_own_that_had_no_memory_to_begin_begins_all_the_same(
    serve, connect, in_thread, monkeypatch, what
):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    server = serve(echo, max_accepts=1 if what == "max_accepts" else None)
    failed = []

    def fail_once(*args, **options):
        failed.append(monkeypatch.undo())
        raise MemoryError

    monkeypatch.setattr(gevent, "spawn", fail_once)
    if what == "max_accepts":
        client = connect(server)
        client.sendall(b"x")
        assert in_thread(client.recv, 1) == b"x"
        client.close()
    else:
        server._state.acceptors[0].socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: failed)
    assert server.wait_stopped(10)
    assert (server.fatal_error is not None) == (what == "lost")
