"""The counters of a server."""

import dataclasses
import json
import time

import pytest
from gevent.event import Event

from gtcpserver import ServerStats, StopReport
from gtcpserver.server.serving import QUEUE_WAIT_EVERY
from kit.clients import ask, reset
from kit.handlers import echo, idle_echo
from kit.waiting import wait_until


def test_stats_are_a_plain_dataclass_of_plain_values(serve):
    stats = serve(echo, pool=7).stats()
    assert isinstance(stats, ServerStats)
    values = dataclasses.asdict(stats)
    assert json.loads(json.dumps(values)) == values
    uptime = values.pop("uptime")
    assert 0 <= uptime < 60
    assert values.pop("pool_size") == 7
    tables = ("handshake_failures", "proxy_header_failures", "clients_refused", "handler_counters", "tls_floods")
    for name in (*tables, "staying", "handler_gauges"):
        assert values.pop(name) == {}
    assert set(values.values()) == {0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.accepted = 5


def test_every_counter_is_explained():
    assert all(f"\n        {field.name}: " in ServerStats.__doc__ for field in dataclasses.fields(ServerStats))


def test_snapshot_does_not_change(serve, connect, in_thread):
    server = serve(echo)
    before = server.stats()
    assert in_thread(ask, connect(server)) == b"hello"
    assert before.accepted == 0
    assert server.stats().accepted == 1


def test_connections_and_bytes(serve, connect, in_thread):
    server = serve(idle_echo)
    clients = [connect(server) for _ in range(3)]
    for client in clients:
        assert in_thread(ask, client, b"x" * 1000) == b"x" * 1000
    wait_until(lambda: server.stats().idle == 3)
    stats = server.stats()
    assert (stats.accepted, stats.active, stats.peak, stats.handlers) == (3, 3, 3, 0)
    assert (stats.bytes_received, stats.bytes_sent) == (3000, 3000)
    for client in clients[1:]:
        client.close()
    wait_until(lambda: server.active_connections == 1)
    last = connect(server)
    assert in_thread(ask, last) == b"hello"
    stats = server.stats()
    assert (stats.accepted, stats.active, stats.peak) == (4, 2, 3)
    assert (stats.bytes_received, stats.bytes_sent) == (3005, 3005)
    assert server.accepted_connections == 4
    assert server.active_connections == 2


def test_pool_size_follows_the_pool(serve):
    server = serve(echo, pool=None)
    assert server.stats().pool_size is None
    server.pool.resize(9)
    assert server.stats().pool_size == 9


def test_counters_outlive_the_stop(serve, connect, in_thread):
    server = serve(echo)
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    assert server.stop().ended == 0
    stats = server.stats()
    assert (stats.accepted, stats.active, stats.bytes_received) == (1, 0, 5)


def test_clients_that_left_while_the_server_was_full_reach_no_handler(serve, connect, in_thread):
    served = []
    go = Event()

    def handler(conn):
        served.append(conn)
        conn.recv(1)
        go.wait()

    server = serve(handler, pool=1)
    first = connect(server)
    first.sendall(b"x")
    wait_until(lambda: len(served) == 1)
    leave_at_once(server, connect)
    wait_until(lambda: server._state.acceptors[0]._accept_loop.behind)
    for _ in range(9):
        leave_at_once(server, connect)
    last = connect(server)
    last.sendall(b"x")
    go.set()
    wait_until(lambda: len(served) == 2)
    stats = server.stats()
    assert (stats.left_in_queue, stats.accepted, stats.resets, stats.handler_errors) == (10, 2, 0, 0)


def test_of_many_clients_that_left_while_the_loop_was_held_up_few_reach_a_handler(serve, connect, in_thread):
    served = []

    def handler(conn):
        served.append(conn)
        conn.recv(1)

    server = serve(handler)
    for _ in range(50):  # the event loop does not run meanwhile
        leave_at_once(server, connect)
    last = connect(server)
    last.sendall(b"x")
    wait_until(lambda: served and served[-1].bytes_received)
    stats = server.stats()
    assert (stats.left_in_queue, stats.accepted, stats.handler_errors) == (46, 5, 0)


def leave_at_once(server, connect):
    client = connect(server)
    client.sendall(b"request")
    reset(client)


def test_client_that_closed_in_order_while_queued_is_served(serve, connect, in_thread):
    seen = []
    server = serve(lambda conn: seen.append(conn.recv_until(b"\n")))
    client = connect(server)
    client.sendall(b"fire and forget\n")
    client.close()
    wait_until(lambda: seen)
    assert seen == [b"fire and forget\n"]
    assert server.stats().left_in_queue == 0


@pytest.mark.slow
def test_time_in_the_queue_is_measured_on_one_connection_in_many(serve, connect):
    go = Event()
    server = serve(lambda conn: go.wait(), pool=1)
    for _ in range(QUEUE_WAIT_EVERY):
        connect(server)
    waited_from = time.monotonic()
    wait_until(lambda: server.active_connections == 1 and time.monotonic() - waited_from >= 0.2)
    assert server.stats().queue_wait_samples == 0
    go.set()
    wait_until(lambda: server.accepted_connections == QUEUE_WAIT_EVERY)
    stats = server.stats()
    assert stats.queue_wait_samples == 1
    assert 0.15 < stats.queue_wait_max == stats.queue_wait_mean < 30


def test_time_in_the_queue_is_not_measured_on_unix_sockets(serve, connect, tmp_path):
    server = serve(lambda conn: None, f"unix:{tmp_path}/s.sock")
    for _ in range(QUEUE_WAIT_EVERY):
        connect(server)
    wait_until(lambda: server.accepted_connections == QUEUE_WAIT_EVERY)
    assert server.stats().queue_wait_samples == 0


def test_accept_errors_are_counted_once_before_and_after_the_stop(serve, monkeypatch, connect, in_thread):
    server = serve(echo)
    acceptor = server._state.acceptors[0]
    errors = [ConnectionAbortedError(103, "aborted"), OSError(71, "protocol error")]

    def do_read(real=acceptor.do_read):
        if errors:
            raise errors.pop()
        return real()

    monkeypatch.setattr(acceptor, "do_read", do_read)
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    assert server.stats().accept_errors == 2
    assert server.stop() == StopReport(1, 0)
    assert server.stats().accept_errors == 2


@pytest.mark.parametrize("counters", [5, [1], {1: 2}, {"a": "b"}, dict])
def test_an_attribute_that_only_has_the_name_is_no_counter(serve, counters):
    class Handler:
        def __call__(self, conn):
            pass

    handler = Handler()
    handler.counters = counters
    server = serve(handler)
    assert server.stats().handler_counters == {}
    handler.counters = {"seen": 3}
    assert server.stats().handler_counters == {"seen": 3}
