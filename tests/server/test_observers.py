"""Observers that fail harm neither the connection, nor its end, nor each other."""

import logging

import pytest
from greenlet import GreenletExit

from gtcpserver import ClientLimits
from kit.waiting import wait_until


class Noting:
    every = 1

    def __init__(self):
        self.requests = 0

    def request_ended(self, seconds, times):
        self.requests += times


class Failing(Noting):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def request_ended(self, seconds, times):
        super().request_ended(seconds, times)
        raise self.error


class WithoutEvery(Noting):
    @property
    def every(self):
        raise TypeError


def talk(conn):
    conn.sendall(conn.recv(100))


def talk_with_idle_blocks(conn):
    while True:
        with conn.idle():
            data = conn.recv(100)
        if not data:
            return
        conn.sendall(data)


def ask_and_leave(server, connect):
    with connect(server) as client:
        client.sendall(b"question")
        return client.recv(100)


@pytest.mark.parametrize("handler", [talk, talk_with_idle_blocks])
@pytest.mark.parametrize("error", [ValueError, MemoryError, GreenletExit])
def test_a_connection_ends_as_ever_when_an_observer_fails(serve, connect, in_thread, handler, error):
    # Each connection needs all that the one before it had taken.
    limits = ClientLimits(connections=1)
    server = serve(handler, pool=1, max_connections=1, client_limits=limits)
    failing = Failing(error)
    server.add_observer(failing)
    for number in range(1, 4):
        assert in_thread(ask_and_leave, server, connect) == b"question"
        wait_until(lambda: not server.active_connections)
        assert failing.requests == number
        assert server.pool.places.taken == 0
    assert server.stats().handler_errors == 0
    assert server.stop(timeout=5).ended == 0


@pytest.mark.parametrize("handler", [talk, talk_with_idle_blocks])
def test_an_observer_that_fails_keeps_no_figure_from_another(serve, connect, in_thread, handler):
    server = serve(handler)
    failing, noting = Failing(ValueError), Noting()
    server.add_observer(failing)
    server.add_observer(noting)
    in_thread(ask_and_leave, server, connect)
    wait_until(lambda: noting.requests)


def test_clients_cannot_fill_the_log_by_an_observer_that_fails(serve, connect, in_thread, caplog):
    caplog.set_level(logging.ERROR, "gtcpserver")
    server = serve(talk)
    failing = Failing(ValueError("no such figure"))
    server.add_observer(failing)
    for _ in range(20):
        in_thread(ask_and_leave, server, connect)
    wait_until(lambda: failing.requests == 20)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["an observer of requests failed"] * 5
    assert caplog.records[0].exc_info[1] is failing.error


def test_a_request_is_served_and_gives_its_place_back_when_its_observer_has_no_interval(serve, connect, in_thread):
    server = serve(talk_with_idle_blocks, pool=1)
    server.add_observer(WithoutEvery())
    for _ in range(3):
        assert in_thread(ask_and_leave, server, connect) == b"question"
        wait_until(lambda: not server.active_connections)
        assert server.pool.places.taken == 0
