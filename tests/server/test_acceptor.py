"""Acceptor: what an accept loop does when accept, or what comes after it, fails."""

import errno
import logging
import os
import socket
import time

import gevent
import gevent.socket
import pytest
from gevent.hub import get_hub

from gtcpserver import Connection
from gtcpserver.server import acceptor as acceptor_module
from gtcpserver.server.acceptor import Acceptor
from kit.patience import SOON
from kit.waiting import wait_until


class FaultyListener(socket.socket):
    """A real listening socket whose accept first fails as it is told."""

    def __init__(self):
        super().__init__()
        self.errors = []
        self.for_ever = None
        self.calls = 0
        self.bind(("127.0.0.1", 0))
        self.listen(100)
        self.setblocking(False)

    def _accept(self):
        self.calls += 1
        number = self.errors.pop(0) if self.errors else self.for_ever
        if number is not None:
            raise OSError(number, os.strerror(number))
        return super()._accept()


class LoopWithoutPauses:
    """The event loop, but timers fire at once; their seconds are noted."""

    def __init__(self):
        self.pauses = []

    def __getattr__(self, name):
        return getattr(get_hub().loop, name)

    def timer(self, seconds):
        self.pauses.append(seconds)
        return get_hub().loop.timer(0)


class Accepting:
    def __init__(self, listener, **options):
        self.listener = listener
        self.address = listener.getsockname()
        self.accepted = []
        self.fatal = []
        self.acceptor = Acceptor(listener, self.handle, on_fatal=self.fatal.append, **options)
        self.loop = self.acceptor.loop = LoopWithoutPauses()
        self.clients = []

    def handle(self, connection, address):
        self.accepted.append(connection)

    def connect(self):
        client = gevent.socket.create_connection(self.address)
        client.settimeout(SOON)
        self.clients.append(client)
        return client

    def close(self):
        self.acceptor.close()
        self.listener.close()
        for sock in self.clients + self.accepted:
            sock.close()


@pytest.fixture
def accepting():
    made = []

    def make(errors=(), **options):
        listener = FaultyListener()
        listener.errors = list(errors)
        made.append(Accepting(listener, **options))
        made[-1].acceptor.start()
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_accepts_connections_of_the_class_asked_for(accepting):
    class Mine(Connection):
        pass

    one = accepting(connection_class=Mine)
    clients = [one.connect() for _ in range(3)]
    wait_until(lambda: len(one.accepted) == 3)
    assert {type(connection) for connection in one.accepted} == {Mine}
    assert sorted(c.getpeername() for c in one.accepted) == sorted(c.getsockname() for c in clients)
    assert one.acceptor.accept_errors == 0
    assert one.loop.pauses == []


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_out_of_resources_backs_off_twice_as_long_each_time_up_to_a_second(accepting, error):
    one = accepting([error] * 9)
    one.connect()
    wait_until(lambda: one.accepted)
    assert one.loop.pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
    assert one.acceptor.accept_errors == 9


def test_an_accept_that_works_ends_the_back_off(accepting):
    one = accepting([errno.EMFILE] * 3)
    one.connect()
    wait_until(lambda: one.accepted)
    del one.loop.pauses[:]
    one.listener.errors += [errno.EMFILE] * 2
    one.connect()
    wait_until(lambda: len(one.accepted) == 2)
    assert one.loop.pauses == [0.01, 0.02]


def test_one_log_line_a_second(accepting, caplog, monkeypatch):
    clock = iter([100.0, 100.5, 100.99, 101.0, 101.5, 102.1, 102.2])
    monkeypatch.setattr(acceptor_module, "monotonic", lambda: next(clock))
    one = accepting([errno.EMFILE] * 7)
    with caplog.at_level(logging.INFO, "gtcpserver"):
        one.connect()
        wait_until(lambda: one.accepted)
    lines = [record.getMessage() for record in caplog.records if "cannot accept" in record.getMessage()]
    assert len(lines) == 3
    assert "Too many open files" in lines[0]
    assert str(one.address[1]) in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
        getattr(errno, "ENONET", errno.ENETDOWN),
        errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EINTR,
    ],
)  # fmt: skip
def test_an_error_of_one_connection_is_followed_by_the_next_accept(accepting, caplog, error):
    one = accepting([error] * 5)
    with caplog.at_level(logging.INFO, "gtcpserver"):
        one.connect()
        wait_until(lambda: one.accepted)
    assert one.loop.pauses == []
    assert one.acceptor.accept_errors == 5
    assert caplog.records == []
    assert one.fatal == []


def test_an_endless_stream_of_errors_does_not_spin(accepting, caplog):
    one = accepting()
    one.listener.for_ever = errno.EPERM
    one.connect()
    wait_until(lambda: len(one.loop.pauses) >= 9)
    assert one.loop.pauses[:9] == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
    assert one.listener.calls < 100 + 20 + len(one.loop.pauses)
    assert any("Operation not permitted" in record.getMessage() for record in caplog.records)
    one.listener.for_ever = None
    wait_until(lambda: one.accepted)


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOTSOCK, errno.EINVAL])
def test_a_lost_listening_socket_is_fatal_and_reported(accepting, caplog, error):
    one = accepting([error])
    one.connect()
    wait_until(lambda: one.fatal)
    assert one.fatal[0].errno == error
    assert one.acceptor.closed
    assert not one.acceptor.started
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]
    assert one.acceptor.drain(one.handle) == 0


def test_a_listening_socket_shut_down_by_somebody_else_is_fatal(accepting):
    one = accepting()
    one.connect()
    wait_until(lambda: one.accepted)
    one.listener.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: one.fatal)
    assert one.fatal[0].errno == errno.EINVAL


def test_closing_during_a_back_off_ends_it(accepting):
    one = accepting([errno.EMFILE])
    one.acceptor.loop = get_hub().loop
    one.connect()
    wait_until(lambda: one.acceptor._timer)
    one.acceptor.close()
    assert one.acceptor._timer is None
    gevent.sleep(0.03)
    assert one.acceptor._watcher is None


@pytest.mark.parametrize("when", ["before", "after", "oserror", "ebadf"])
def test_a_connection_class_that_fails_costs_one_connection(accepting, monkeypatch, when):
    class Failing(Connection):
        left = 1

        def __init__(self, *args):
            if not Failing.left:
                super().__init__(*args)
                return
            Failing.left -= 1
            if when == "before":
                raise ValueError(when)
            super().__init__(*args)
            if when == "oserror":
                self.setsockopt(socket.IPPROTO_TCP, 9999, 1)  # ENOPROTOOPT
            if when == "ebadf":
                raise OSError(errno.EBADF, when)
            raise ValueError(when)

    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(value))
    one = accepting(connection_class=Failing)
    first = one.connect()
    assert first.recv(10) == b""  # closed, not left to hang
    one.connect()
    wait_until(lambda: one.accepted)
    assert len(reported) == 1
    assert "Failing could not be made" in str(reported[0])
    assert isinstance(reported[0].__cause__, (ValueError, OSError))
    assert one.fatal == []
    one.accepted[0].sendall(b"works")
    assert one.clients[1].recv(10) == b"works"


def test_a_connection_class_that_fails_does_not_end_a_drain(accepting, monkeypatch):
    class Failing(Connection):
        made = 0

        def __init__(self, *args):
            Failing.made += 1
            super().__init__(*args)
            if Failing.made == 2:
                raise ValueError("second")

    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(value))
    one = accepting(connection_class=Failing)
    one.acceptor.stop_accepting()
    for _ in range(3):
        one.connect()
    assert one.acceptor.drain(one.handle) == 2
    assert len(one.accepted) == 2
    assert len(reported) == 1


def test_drain_takes_all_that_is_queued_past_errors_of_single_connections(accepting):
    one = accepting()
    one.acceptor.stop_accepting()
    for _ in range(5):
        one.connect()
    one.listener.errors += [errno.ECONNABORTED, errno.EPROTO]
    assert one.acceptor.drain(one.handle) == 5
    assert one.acceptor.drain(one.handle) == 0
    one.connect()
    one.listener.errors += [errno.EMFILE]
    assert one.acceptor.drain(one.handle) == 0  # and does not wait for better times


def test_drain_passes_an_endless_stream_of_errors_by(accepting):
    one = accepting()
    one.acceptor.stop_accepting()
    one.listener.for_ever = errno.EPERM
    with gevent.Timeout(SOON):
        assert one.acceptor.drain(one.handle) == 0


def test_nothing_is_accepted_while_full_and_all_is_after_resume(accepting):
    limit = [2]
    accepted = []
    one = accepting(full=lambda: len(accepted) >= limit[0])
    one.accepted = accepted
    for _ in range(5):
        one.connect()
    wait_until(lambda: len(one.accepted) == 2)
    gevent.sleep(0.02)
    assert len(one.accepted) == 2
    assert one.acceptor._watcher is None
    limit[0] = 100
    one.acceptor.resume()
    wait_until(lambda: len(one.accepted) == 5)


def test_a_handler_that_fails_is_reported_and_the_loop_goes_on(accepting, monkeypatch):
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(value))
    one = accepting()

    def handle(connection, address):
        one.accepted.append(connection)
        if len(one.accepted) == 1:
            raise ValueError("first")

    one.acceptor._handle = handle
    one.connect()
    wait_until(lambda: reported)
    one.connect()
    wait_until(lambda: len(one.accepted) == 2)
    assert [str(error) for error in reported] == ["first"]


def test_a_handler_may_close_the_acceptor(accepting, monkeypatch):
    one = accepting()
    reported = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda context, kind, value, where: reported.append(value))

    def handle(connection, address):
        one.accepted.append(connection)
        one.acceptor.close()

    one.acceptor._handle = handle
    one.acceptor.stop_accepting()
    for _ in range(3):
        one.connect()
    one.acceptor.start_accepting()
    wait_until(lambda: one.accepted)
    gevent.sleep(0.01)
    assert len(one.accepted) == 1
    assert reported == []


@pytest.mark.slow
def test_a_process_out_of_descriptors_waits_and_recovers(python):
    server = python(
        """
        import logging, resource, sys, gevent
        from gtcpserver import StreamServer
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        def echo(sock, address):
            while data := sock.recv(100):
                sock.sendall(data)
        server = StreamServer(("127.0.0.1", 0), echo)
        server.start()
        gevent.get_hub().threadpool.apply(int)  # the thread below needs a descriptor or two for itself
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
        print(server.server_port, flush=True)
        gevent.get_hub().threadpool.apply(sys.stdin.readline)
        print(server.accept_errors, flush=True)
        """
    )
    port = int(server.stdout.readline())
    clients = []
    for _ in range(40):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"x")
        clients.append(client)
    clients[0].settimeout(SOON)
    assert clients[0].recv(1) == b"x"
    time.sleep(1.3)  # long enough for a second line
    answered = []
    for client in clients:
        client.setblocking(False)
        try:
            if client is clients[0] or client.recv(1) == b"x":
                answered.append(client)
        except BlockingIOError:
            pass
    assert 5 <= len(answered) <= 24
    waiting = [client for client in clients if client not in answered]
    while waiting:
        for client in answered:
            client.close()
        for client in waiting[: len(answered)]:
            client.settimeout(SOON)
            assert client.recv(1) == b"x"
        answered, waiting = waiting[: len(answered)], waiting[len(answered) :]
    for client in answered:
        client.close()
    server.stdin.write(b"\n")
    server.stdin.flush()
    errors = int(server.stdout.readline())
    server.wait(timeout=SOON)
    lines = [line for line in server.stderr.read().decode().splitlines() if line]
    assert all("cannot accept" in line and "Too many open files" in line for line in lines), lines
    assert 1 <= len(lines) <= 4
    assert 1 <= errors <= 30  # a loop that spins would have had tens of thousands
