"""Several monitors of one server, at once and one after another."""

import gc

import pytest

from gtcpserver import Server
from gtcpserver.monitoring import Monitor
from kit.waiting import wait_until

MANY = 1000


def idle_echo(conn):
    while True:
        with conn.idle():
            data = conn.recv(100)
        if not data:
            return
        conn.sendall(data)


def echo_once(conn):
    conn.sendall(conn.recv(100))


@pytest.fixture
def monitored():
    """`monitored(server)`: a monitor of it, that is stopped at the end."""
    monitors = []

    def monitor(server):
        monitors.append(Monitor(server, "127.0.0.1:0"))
        return monitors[-1]

    yield monitor
    for one in monitors:
        one.stop()


def requests_seen(monitor):
    latency = monitor._watch.stats()["latency"]  # noqa: SLF001  what it measured
    return sum(count for name, count in latency.items() if name != "sum")


def talk(server, connect, in_thread, times=1):
    client = connect(server)
    for _ in range(times):
        client.sendall(b"x")
        assert in_thread(client.recv, 10) == b"x"
    client.close()
    wait_until(lambda: server.active_connections == 0)


@pytest.mark.parametrize(("handler", "times"), [(idle_echo, 3), (echo_once, 1)])
def test_two_monitors_of_one_server_both_measure(serve, connect, in_thread, monitored, handler, times):
    server = serve(handler)
    one, two = monitored(server), monitored(server)
    talk(server, connect, in_thread, times)
    assert requests_seen(one) == requests_seen(two) == times


def test_a_monitor_that_stops_leaves_the_other_measuring(serve, connect, in_thread, monitored):
    server = serve(idle_echo)
    one, two = monitored(server), monitored(server)
    talk(server, connect, in_thread)
    one.stop()
    talk(server, connect, in_thread)
    one.stop()  # again, which does nothing
    talk(server, connect, in_thread)
    assert (requests_seen(one), requests_seen(two)) == (1, 3)


def test_a_connection_measures_for_the_monitors_of_each_moment(serve, connect, in_thread, monitored):
    server = serve(idle_echo)
    one = monitored(server)
    client = connect(server)

    def ask():
        client.sendall(b"x")
        assert in_thread(client.recv, 10) == b"x"

    ask()
    wait_until(lambda: requests_seen(one) == 1)
    one.stop()
    two = monitored(server)
    ask()
    client.close()
    wait_until(lambda: server.active_connections == 0)
    assert (requests_seen(one), requests_seen(two)) == (1, 1)


@pytest.mark.slow
def test_a_thousand_monitors_that_came_and_went_leave_nothing_behind(serve, connect, in_thread):
    server = serve(idle_echo)
    talk(server, connect, in_thread)
    attributes = set(vars(server))
    for _ in range(MANY):
        Monitor(server, "127.0.0.1:0").stop()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Monitor)]
    assert set(vars(server)) == attributes
    talk(server, connect, in_thread, 3)
    assert server.stats().handler_errors == 0
    client = connect(server)
    connection = wait_until(lambda: next(iter(server.connections()), None))
    wait_until(lambda: connection.is_idle)
    fresh = Server("127.0.0.1:0", idle_echo)
    assert type(connection.idle_block) is type(fresh.make_idle(connection))
    client.close()
