"""Handlers that take too long and clients that drip are ended; who works is not."""

import time

import gevent
import pytest
from gevent.event import Event

from gtcpserver import DeadlineExceeded
from gtcpserver.server.time_limits import HandlerTimedOut, TooSlow
from kit.clients import ask
from kit.handlers import echo, idle_echo
from kit.patience import SOON
from kit.waiting import wait_until

WINDOW = 0.2  # seconds


def drip(client, go_on):
    """One byte a tenth of the window until the server ends it; how it ended."""
    try:
        while not go_on():
            client.sendall(b"x")
            client.settimeout(WINDOW / 10)
            try:
                if not client.recv(1):
                    return "ended"
            except TimeoutError:
                pass
    except OSError:
        return "ended"
    return "still open"


@pytest.mark.slow
def test_client_that_drips_is_ended(serve, connect, spawn_thread):
    seen = []
    server = serve(
        lambda conn: conn.recv_exactly(10_000),
        min_rate=1000,
        min_rate_window=WINDOW,
        on_error=lambda conn, error: seen.append(error),
    )
    client = connect(server)
    assert spawn_thread(drip, client, lambda: False).get(timeout=SOON) == "ended"
    wait_until(lambda: seen)
    assert isinstance(seen[0], TooSlow)
    assert isinstance(seen[0], TimeoutError)
    assert "at least 200 wanted" in str(seen[0])
    stats = server.stats()
    assert (stats.slow_clients, stats.timeouts, stats.handler_errors) == (1, 0, 0)


@pytest.mark.slow
def test_client_that_does_not_read_is_ended(serve, connect):
    server = serve(lambda conn: conn.sendall(bytes(16 << 20)), min_rate=1000, min_rate_window=WINDOW)
    connect(server, receive_buffer=4096)
    wait_until(lambda: server.stats().slow_clients == 1)
    wait_until(lambda: server.active_connections == 0)


@pytest.mark.slow
def test_slow_clients_do_not_keep_good_ones_out(serve, connect, in_thread, python):
    server = serve(echo, pool=100, timeout=SOON, min_rate=100, min_rate_window=WINDOW)
    # 500 clients that send a byte in a while, without end.
    python(
        """
        import socket, sys, time
        clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(500)]
        print("connected", flush=True)
        while True:
            for client in clients:
                try:
                    client.send(b"x")
                except OSError:
                    pass
            time.sleep(float(sys.argv[2]))
        """,
        server.port,
        WINDOW / 4,
    ).stdout.readline()
    wait_until(lambda: server.active_connections == 100)
    for _ in range(3):
        assert in_thread(ask, connect(server)) == b"hello"
    assert server.stats().slow_clients >= 400
    assert server.stats().peak <= 100


@pytest.mark.slow
def test_handler_that_computes_or_waits_for_others_is_not_the_client_s_fault(serve, connect, in_thread):
    looks = []

    def handler(conn):
        conn.recv(1)
        for _ in range(15):  # three windows
            gevent.sleep(WINDOW / 5)
            looks.append(conn)
        conn.sendall(b"result")

    server = serve(handler, min_rate=1e9, min_rate_window=WINDOW)
    client = connect(server)
    client.sendall(b"x")
    assert in_thread(client.recv, 100) == b"result"
    assert len(looks) == 15
    assert server.stats().slow_clients == 0


@pytest.mark.slow
def test_client_that_is_fast_enough_is_left_alone(serve, connect, spawn_thread):
    server = serve(echo, min_rate=1, min_rate_window=WINDOW)
    client = connect(server)
    done = Event()
    ending = spawn_thread(drip, client, done.is_set)
    wait_until(lambda: server.stats().uptime > 5 * WINDOW)
    assert server.stats().slow_clients == 0
    done.set()
    assert ending.get(timeout=SOON) == "still open"


@pytest.mark.slow
def test_idle_connection_is_not_slow(serve, connect, in_thread):
    server = serve(idle_echo, min_rate=1e6, min_rate_window=WINDOW)
    client = connect(server)
    wait_until(lambda: server.stats().uptime > 5 * WINDOW)
    assert in_thread(ask, client) == b"hello"
    assert server.stats().slow_clients == 0


@pytest.mark.slow
def test_handler_may_catch_it_and_say_good_bye(serve, connect, in_thread):
    def handler(conn):
        try:
            conn.recv(1)
        except TimeoutError:
            conn.sendall(b"too slow\n")

    server = serve(handler, min_rate=100, min_rate_window=WINDOW)
    assert in_thread(connect(server).recv, 100) == b"too slow\n"
    assert server.stats().slow_clients == 0  # it did not end the handler


def test_handler_timeout_is_a_deadline(serve, connect):
    seen = []
    server = serve(
        lambda conn: Event().wait(), handler_timeout=0.1, on_error=lambda conn, error: seen.append((conn, error))
    )
    connect(server)
    wait_until(lambda: seen)
    ((_, error),) = seen
    assert isinstance(error, HandlerTimedOut)
    assert isinstance(error, DeadlineExceeded)
    assert str(error) == "the handler has run for more than 0.1 s"
    assert server.stats().handler_timeouts == 1


@pytest.mark.slow
def test_handler_timeout_ends_old_connections_and_no_young_ones(serve, connect, in_thread):
    server = serve(echo, handler_timeout=1.0)
    old = connect(server)
    assert in_thread(ask, old) == b"hello"
    wait_until(lambda: server.stats().uptime > 0.6)
    young = connect(server)
    assert in_thread(ask, young) == b"hello"
    assert in_thread(old.recv, 1) == b""
    assert in_thread(ask, young) == b"hello"
    assert server.stats().handler_timeouts == 1


def test_handler_that_swallows_its_time_out_is_told_again(serve, connect):
    told = []

    def handler(conn):
        for _ in range(2):
            with pytest.raises(HandlerTimedOut):
                Event().wait()
            told.append(conn)

    server = serve(handler, handler_timeout=0.05)
    connect(server)
    wait_until(lambda: len(told) == 2)
    wait_until(lambda: server.active_connections == 0)


def test_handler_timeout_does_not_follow_the_wall_clock(serve, connect, in_thread, monkeypatch):
    server = serve(echo, handler_timeout=60)
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    jumped = time.time() + 86_400
    monkeypatch.setattr("gtcpserver.process.clock.time", lambda: jumped)
    looked = Event()
    for look in (server._time_limits._end_long_ones, looked.set):
        gevent.get_hub().loop.run_callback(look)
    assert looked.wait(SOON)
    assert in_thread(ask, client) == b"hello"
    assert server.stats().handler_timeouts == 0


def test_time_limits_cost_nothing_when_they_are_not_asked_for(serve):
    assert serve(echo)._time_limits._timers == []


def test_timers_end_with_the_server(serve):
    server = serve(echo, handler_timeout=5, min_rate=5)
    assert len(server._time_limits._timers) == 2
    server.stop()
    assert server._time_limits._timers == []
