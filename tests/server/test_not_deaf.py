"""A server that lives hears: no error stops an accept loop for good, nor lets a connection wait forever."""

import logging
import signal

import gevent
import pytest

from gtcpserver import ProxyProtocol
from gtcpserver.admission import steps as steps_module
from gtcpserver.pool.places import Places
from gtcpserver.process import watcher as watcher_module
from gtcpserver.server import watchdog as watchdog_module
from gtcpserver.server.accept_loop import AcceptLoop
from gtcpserver.server.acceptor import Acceptor
from injection.started import receive_all, received_from
from injection.strace import needs_strace, rule
from kit.forms import pure_only
from kit.patience import SOON
from kit.waiting import wait_until

ECHO = """
def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)
serve(Server("127.0.0.1:0", echo))
"""

UPLOAD = """
def upload(conn):
    gevent.sleep(0.05)  # to be read in full pieces, and waited for
    size = 0
    while data := conn.recv(4096):
        size += len(data)
    conn.sendall(b"%d" % size)
serve(Server("127.0.0.1:0", upload))
"""

DOWNLOAD = """
serve(Server("127.0.0.1:0", lambda conn: conn.sendall(bytes(20_000_000))))
"""


def echo(conn):
    while data := conn.recv(4096):
        conn.sendall(data)


def is_served(server, connect, in_thread):
    def talk():
        client = connect(server)
        client.sendall(b"hello")
        return client.recv(100)

    return in_thread(talk) == b"hello"


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("when", [*map(str, range(2, 8)), "2..4"])  # the first is of the loop itself
def test_an_epoll_ctl_that_fails_makes_no_server_deaf(injected, when):
    subject = injected(ECHO, rule("epoll_ctl", "ENOMEM", when))
    with subject.connect() as early:
        for _ in range(2):
            assert subject.ask() == b"hello\n"
        early.sendall(b"late")
        assert early.recv(100) == b"late"
    subject.send_signal(signal.SIGTERM)
    assert subject.wait() == 0


@pytest.mark.slow
@needs_strace
def test_a_connection_that_cannot_be_watched_gives_its_handler_an_error(injected):
    subject = injected(ECHO)
    assert subject.ask() == b"hello\n"
    with subject.connect() as before:
        before.sendall(b"before")
        assert before.recv(100) == b"before"
        with subject.injecting(rule("epoll_ctl", "ENOSPC")):
            assert received_from(subject).how != "nothing"
            before.sendall(b"watched already")
            assert before.recv(100) == b"watched already"
        used = subject.cpu_seconds()
        assert subject.ask() == b"hello\n"
    assert subject.cpu_seconds() - used < 1
    assert "the event loop cannot watch this descriptor" in subject.log()


@pytest.mark.slow
@needs_strace
def test_a_connection_whose_answer_cannot_be_watched_gives_its_handler_an_error(injected):
    subject = injected(DOWNLOAD)
    with subject.injecting(rule("epoll_ctl", "ENOMEM")):
        assert received_from(subject, 4096, once="the event loop cannot watch this descriptor").size < 20_000_000
    assert subject.cpu_seconds() < 5


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("error", ["EAGAIN", "EBUSY", "EINTR", "EACCES", "ENOMEM", "ENOSPC"])
def test_an_upload_that_cannot_be_watched_is_reset(injected, error):
    """Whatever error epoll_ctl(2) gives: the client takes no orderly end for an answer."""
    subject = injected(UPLOAD)
    with subject.injecting(rule("epoll_ctl", error)), subject.connect() as client:
        client.sendall(bytes(1_000_000))
        assert receive_all(client).how == "reset"
    assert "the event loop cannot watch this descriptor: epoll_ctl(2): " in subject.log()


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("error", ["EAGAIN", "EBUSY"])
def test_a_download_whose_watcher_cannot_be_made_is_reset(injected, error):
    subject = injected(DOWNLOAD)
    with subject.injecting(rule("fcntl", error)):
        assert received_from(subject, 4096, once="the event loop cannot watch this descriptor").how == "reset"


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("when", ["1", "2", "3"])
def test_one_epoll_ctl_that_fails_costs_no_connection(injected, when):
    subject = injected(DOWNLOAD)
    with subject.injecting(rule("epoll_ctl", "ENOMEM", when)), subject.connect(receive_buffer=4096) as client:
        assert receive_all(client).size == 20_000_000


@pytest.mark.slow
@needs_strace
@pytest.mark.parametrize("when", ["1", "2", "3"])
def test_one_epoll_ctl_that_fails_loses_no_input(injected, when):
    subject = injected(UPLOAD)
    with subject.injecting(rule("epoll_ctl", "ENOMEM", when)), subject.connect() as client:
        client.sendall(bytes(1_000_000))
        gevent.sleep(0.1)
        client.sendall(bytes(1_000_000))
        client.shutdown(1)
        assert client.recv(100) == b"2000000"


@pytest.mark.parametrize("method", [pytest.param("has_left", marks=pure_only), "is_full", "do_read"])
def test_an_exception_in_the_accept_loop_does_not_end_it(serve, connect, in_thread, monkeypatch, method):
    server = serve(echo)
    acceptor = server._state.acceptors[0]
    acceptor._accept_loop.behind = True
    owner = AcceptLoop if method == "has_left" else acceptor
    real = getattr(owner, method)
    calls = []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(owner, method, fail_once)
    first = connect(server)
    wait_until(lambda: calls)
    assert is_served(server, connect, in_thread)
    first.close()


@pytest.mark.slow
def test_a_back_off_without_a_timer_goes_on(serve, connect, in_thread, monkeypatch):
    server = serve(echo)
    acceptor = server._state.acceptors[0]
    calls = []

    def no_timer():
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        Acceptor._back_off(acceptor)

    monkeypatch.setattr(acceptor, "_back_off", no_timer)
    monkeypatch.setattr(acceptor, "full", lambda: False if calls else 1 / 0)
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    assert is_served(server, connect, in_thread)


@pytest.mark.slow
def test_an_accept_loop_that_has_stopped_without_a_reason_starts_again(serve, connect, in_thread, monkeypatch, caplog):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    server = serve(echo)
    server._state.acceptors[0].stop_accepting()
    with caplog.at_level(logging.ERROR, "gtcpserver"):
        assert is_served(server, connect, in_thread)
        gevent.sleep(0.2)
    assert [r.message for r in caplog.records] == [
        f"{server.address} had stopped accepting without a reason; accepting again"
    ]


@pytest.mark.slow
def test_reasons_not_to_accept_are_no_deafness(serve, connect, monkeypatch, caplog):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.02)
    full = serve(echo, pool=1)
    clients = [connect(full), connect(full)]
    waiting = serve(echo)
    waiting._state.acceptors[0].delay = 0.5
    waiting._state.acceptors[0]._back_off()
    several = serve(echo, accept_loops=2)
    with caplog.at_level(logging.ERROR, "gtcpserver"):
        closing = gevent.spawn(several.close_accept_loop, 0)
        gevent.sleep(0.2)
        closing.get(timeout=60)
    assert not caplog.records
    assert full.stats().accepted == 1
    for client in clients:
        client.close()


def test_a_last_connection_that_failed_still_stops_the_server(serve, connect, monkeypatch):
    server = serve(echo, max_accepts=1)
    monkeypatch.setattr(server.pool, "run_one", lambda *_: 1 / 0)
    connect(server)
    assert server.wait_stopped(10)


def test_a_watcher_of_another_loop_is_taken_as_it_is():
    class Other:
        def io(self, fd, events):
            return fd, events

    assert watcher_module.watch(Other(), 5, 1) == (5, 1)


@pure_only
@pytest.mark.parametrize("stops", [False, True])
def test_a_connection_of_which_the_pool_could_not_be_told_is_served_when_there_is_a_place(
    serve, connect, in_thread, monkeypatch, stops
):
    monkeypatch.setattr(watchdog_module, "WATCHDOG_SECONDS", 0.05)
    server = serve(echo, pool=1, linger=0, proxy_protocol=None if stops else ProxyProtocol(["127.0.0.1"]))
    header = b"" if stops else b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    first, second, third = clients = [connect(server) for _ in range(3)]
    wait_until(lambda: server.active_connections if stops else len(server._state.admission) == 3)
    stopping = gevent.spawn(server.stop, SOON) if stops else None
    for come, client in enumerate(clients, 1):
        client.sendall(header + b"x")
        wait_until(lambda come=come: server.active_connections + len(server._state.waiting) >= come)
    real, calls = Places.rawlink, []

    def fail_once(places, callback):
        calls.append(callback)
        if len(calls) == 1:
            raise MemoryError
        real(places, callback)

    monkeypatch.setattr(Places, "rawlink", fail_once)
    for client in first, second, third:
        assert in_thread(client.recv, 100) == b"x"
        client.close()
    assert calls
    if stopping is not None:
        assert stopping.get().ended == 0


@pytest.mark.parametrize("step", ["failed", "_start_timer"])
def test_silent_clients_are_ended_although_memory_was_short_when_the_first_was(serve, connect, monkeypatch, step):
    monkeypatch.setattr(steps_module, "AGAIN_SECONDS", 0.05)
    server = serve(echo, proxy_protocol=ProxyProtocol(["127.0.0.1"], timeout=0.2))
    first = connect(server)
    wait_until(lambda: len(server._state.admission) == 1)
    gevent.sleep(0.1 if step == "_start_timer" else 0)
    others = [connect(server) for _ in range(2)]
    wait_until(lambda: len(server._state.admission) == 3)
    stage = server._state.admission._headers
    real, calls = getattr(stage, step), []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(stage, step, fail_once)
    stopping = gevent.spawn(server.stop)
    wait_until(lambda: not server._state.admission)
    assert calls
    assert stopping.get(timeout=SOON).ended == 0
    for client in first, *others:
        client.close()
