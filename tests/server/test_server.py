"""Server: construct, start, admit, limits, hooks, signals."""

import os
import signal
import socket
import threading

import gevent
import pytest
from gevent.event import Event
from gevent.socket import socket as gevent_socket
from greenlet import getcurrent

from gtcpserver import ConfigError, Connection, EarlyEOF, GtcpServerError, HandlerPool, ListenConfig, Server, State, run
from kit.clients import ask
from kit.handlers import echo, idle_echo
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs_ipv6
from kit.waiting import wait_until

# -- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "expectation"),
    [
        ("accept_loops", 0, "whole number from 1"),
        ("accept_loops", 1.5, "whole number from 1"),
        ("accept_loops", True, "whole number from 1"),
        ("accept_loops", None, "whole number from 1"),
        ("pool", -1, "whole number from 0"),
        ("pool", "10", "whole number from 0"),
        ("pool", True, "whole number from 0"),
        ("on_full", "drop", '"wait", "reject" or "close_idle"'),
        ("on_full", None, '"wait", "reject" or "close_idle"'),
        ("max_connections", 0, "whole number from 1"),
        ("max_connections", "many", "None for no limit"),
        ("max_accepts", 0, "whole number from 1"),
        ("max_accepts", -1, "None for no limit"),
        ("timeout", 0, "more than 0"),
        ("timeout", -1.0, "None to wait forever"),
        ("timeout", float("nan"), "number"),
        ("timeout", "30", "number"),
        ("handler_timeout", 0, "more than 0"),
        ("handler_timeout", float("inf"), "None for no limit"),
        ("min_rate", 0, "more than 0"),
        ("min_rate", [], "None for no limit"),
        ("min_rate_window", 0, "more than 0"),
        ("min_rate_window", None, "more than 0"),
        ("linger", -1, "0 or more"),
        ("linger", None, "0 or more"),
        ("listen", {"backlog": 5}, "ListenConfig"),
        ("connection_class", socket.socket, "subclass of Connection"),
        ("connection_class", "Connection", "subclass of Connection"),
        ("on_connect", 1, "is not callable, it is an int"),
        ("on_disconnect", "f", "is not callable, it is a str"),
        ("on_error", [], "is not callable, it is a list"),
        ("on_stop", 1, "is not callable, it is an int"),
    ],
)
def test_wrong_option_is_named_with_value_and_expectation(option, value, expectation):
    with pytest.raises(ConfigError) as caught:
        Server("127.0.0.1:0", echo, **{option: value})
    message = str(caught.value)
    assert message.startswith(option)
    assert expectation in message
    assert repr(value) in message


@pytest.mark.parametrize("handler", [None, "echo", 5])
def test_handler_must_be_callable(handler):
    with pytest.raises(ConfigError, match=rf"handler {handler!r} is not callable, it is an? \w+"):
        Server("127.0.0.1:0", handler)


@pytest.mark.parametrize("address", ["127.0.0.1:70000", "nonsense", 70000, ("127.0.0.1",), object()])
def test_wrong_address_is_a_config_error_and_can_be_tried_again(address):
    with pytest.raises(ConfigError):
        Server(address, echo).start()


@pytest.mark.parametrize("address", [[], ()])
def test_no_address_at_all_is_a_config_error(address):
    with pytest.raises(ConfigError, match="address"):
        Server(address, echo).start()


def test_pool_of_one_server_may_be_shared_or_a_number_or_unlimited():
    pool = HandlerPool(3)
    assert Server("127.0.0.1:0", echo, pool=pool).pool is pool
    assert Server("127.0.0.1:0", echo, pool=7).pool.size == 7
    assert Server("127.0.0.1:0", echo, pool=None).pool.size is None
    assert Server("127.0.0.1:0", echo).pool.size == 10_000


def test_not_started_server_says_so():
    server = Server("127.0.0.1:0", echo)
    assert server.state is State.NEW
    assert "127.0.0.1:0 new" in repr(server)
    assert server.addresses == ()
    with pytest.raises(GtcpServerError, match="before it is started"):
        _ = server.address
    with pytest.raises(GtcpServerError, match="before it is started"):
        _ = server.port


# -- start -----------------------------------------------------------------------------------------------------------


def test_port_0_becomes_a_real_port(serve, connect, in_thread):
    server = serve(echo, "127.0.0.1:0")
    assert server.port > 0
    assert server.address == f"127.0.0.1:{server.port}"
    assert server.addresses == (server.address,)
    assert server.state is State.SERVING
    assert f"{server.address} serving" in repr(server)
    assert in_thread(ask, connect(server)) == b"hello"


@pytest.mark.parametrize("address", [0, ("127.0.0.1", 0), "*:0", "localhost:0"])
def test_addresses_in_other_forms(serve, in_thread, address):
    server = serve(echo, address)
    with socket.create_connection(("127.0.0.1", server.port), timeout=SOON) as client:
        assert in_thread(ask, client) == b"hello"


def test_several_addresses(serve, connect, in_thread, tmp_path):
    path = f"unix:{tmp_path}/s.sock"
    server = serve(echo, ["127.0.0.1:0", path, ("127.0.0.1", 0)])
    assert len(server.addresses) == 3
    assert server.addresses[1] == path
    for address in server.addresses:
        assert in_thread(ask, connect(address)) == b"hello"
    assert server.accepted_connections == 3


@needs_ipv6
def test_ipv6(serve, connect, in_thread):
    seen = []

    def handler(conn):
        seen.append((conn.client_address[0], conn.server_address[1]))
        echo(conn)

    server = serve(handler, "[::1]:0")
    assert server.address == f"[::1]:{server.port}"
    assert in_thread(ask, connect(server)) == b"hello"
    assert seen == [("::1", server.port)]


def test_unix_socket_has_port_0_and_its_path_goes_with_the_server(serve, connect, in_thread, tmp_path):
    path = tmp_path / "s.sock"
    server = serve(echo, f"unix:{path}")
    assert server.port == 0
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    server.stop(SOON)
    assert not path.exists()


def test_halt_removes_the_path_of_a_unix_socket(serve, tmp_path):
    path = tmp_path / "s.sock"
    server = serve(echo, f"unix:{path}")
    assert path.exists()
    server.halt()
    assert not path.exists()


def test_abstract_unix_socket(serve, connect, in_thread):
    server = serve(echo, f"unix:@gtcpserver-test-{os.getpid()}")
    assert in_thread(ask, connect(server)) == b"hello"


@pytest.mark.parametrize("make", [socket.socket, gevent_socket])
def test_given_socket_is_served_and_closed_with_the_server(serve, connect, in_thread, make):
    given = make(socket.AF_INET, socket.SOCK_STREAM)
    given.bind(("127.0.0.1", 0))
    address = "{}:{}".format(*given.getsockname())
    server = serve(echo, given)
    assert server.address == address
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    server.stop(SOON)
    assert given.fileno() == -1
    with pytest.raises(ConnectionRefusedError):
        connect(address)


def test_descriptor(serve, connect, in_thread):
    with socket.create_server(("127.0.0.1", 0)) as given:
        server = serve(echo, f"fd:{os.dup(given.fileno())}")
        assert server.port == given.getsockname()[1]
        assert in_thread(ask, connect(server)) == b"hello"


def test_start_twice_is_an_error_and_harms_nothing(serve, connect, in_thread):
    server = serve(echo)
    with pytest.raises(GtcpServerError, match="starts once; this one is serving"):
        server.start()
    assert in_thread(ask, connect(server)) == b"hello"
    server.halt()
    with pytest.raises(GtcpServerError, match="starts once; this one is stopped"):
        server.start()


def test_failed_start_leaves_nothing_open_and_may_be_repeated(serve, connect, in_thread):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        free = f"127.0.0.1:{free_port()}"
        server = Server([free, taken], echo)
        with pytest.raises(OSError, match=f"{taken} is already in use"):
            server.start()
        assert server.state is State.NEW
        assert server.addresses == ()
        with pytest.raises(ConnectionRefusedError):
            connect(free)
    server.start()
    try:
        assert server.addresses == (free, taken)
        assert in_thread(ask, connect(free)) == in_thread(ask, connect(taken)) == b"hello"
    finally:
        server.halt()


def test_context_manager_starts_and_stops(connect, in_thread):
    with Server("127.0.0.1:0", echo) as server:
        client = connect(server)
        assert in_thread(ask, client) == b"hello"
        client.shutdown(socket.SHUT_WR)
    assert server.state is State.STOPPED
    assert server.stopping
    assert client.recv(10) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_serve_forever_starts_waits_and_returns_the_report(connect, in_thread):
    server = Server("127.0.0.1:0", echo)
    waiting = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.state is State.SERVING)
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    report = server.stop(SOON)
    assert waiting.get(timeout=SOON) is report
    assert server.wait_stopped(0)


def test_serve_forever_outside_the_main_thread_leaves_signals_alone(in_thread):
    before = signal.getsignal(signal.SIGTERM)

    def other_thread():
        server = Server("127.0.0.1:0", echo)
        gevent.spawn_later(0.01, server.stop)
        report = server.serve_forever()
        gevent.get_hub().destroy()
        return report

    box = []
    thread = threading.Thread(target=lambda: box.append(other_thread()))
    thread.start()
    in_thread(thread.join)
    assert len(box) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_run_serves_with_options(connect, in_thread, monkeypatch):
    servers = []
    monkeypatch.setattr(Server, "start", lambda self, start=Server.start: (servers.append(self), start(self)))
    running = gevent.spawn(run, echo, "127.0.0.1:0", max_accepts=1)
    server = wait_until(lambda: servers and servers[0].state is State.SERVING and servers[0])
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    client.close()
    assert running.get(timeout=SOON).finished == 1


# -- what a handler gets ---------------------------------------------------------------------------------------------


def test_context_server_addresses_and_class(serve, connect, in_thread):
    class Mine(Connection):
        __slots__ = ("note",)

    seen = []

    def handler(conn):
        conn.note = "kept"
        seen.append((type(conn), conn.context, conn.server, conn.client_address, conn.server_address, conn.note))
        conn.context = "own"  # is this connection's alone
        echo(conn)

    context = {"database": 1}
    server = serve(handler, connection_class=Mine, context=context)
    clients = [connect(server) for _ in range(2)]
    for client in clients:
        assert in_thread(ask, client) == b"hello"
    assert seen == [
        (Mine, context, server, client.getsockname(), ("127.0.0.1", server.port), "kept") for client in clients
    ]


def test_timeout_ends_a_silent_client_and_is_counted(serve, connect, in_thread, caplog):
    server = serve(echo, timeout=0.05)
    client = connect(server)
    assert in_thread(client.recv, 1) == b""
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().timeouts == 1
    assert server.stats().handler_errors == 0
    assert not caplog.records


def test_handler_may_change_its_time_out(serve, connect):
    seen = []

    def handler(conn):
        seen.append(conn.gettimeout())
        conn.settimeout(0.01)
        with pytest.raises(TimeoutError):
            conn.recv(1)
        conn.settimeout(None)
        seen.append(conn.recv(1))

    server = serve(handler, timeout=1000)
    client = connect(server)
    wait_until(lambda: seen)
    gevent.sleep(0.05)
    client.sendall(b"x")
    wait_until(lambda: len(seen) == 2)
    assert seen == [1000, b"x"]


def test_handler_timeout_ends_a_handler_wherever_it_waits(serve, connect, in_thread):
    ended = []

    def handler(conn):
        try:
            Event().wait()
        finally:
            ended.append(True)

    server = serve(handler, handler_timeout=0.05)
    client = connect(server)
    assert in_thread(client.recv, 1) == b""
    assert ended == [True]
    wait_until(lambda: server.active_connections == 0)
    assert (server.stats().handler_timeouts, server.stats().timeouts) == (1, 0)


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order_in_the_connection_s_greenlet(serve, connect):
    calls = []

    def note(name):
        return lambda conn: calls.append((name, gevent.getcurrent(), conn.fileno() >= 0))

    server = serve(note("handler"), on_connect=note("connect"), on_disconnect=note("disconnect"))
    connect(server)
    wait_until(lambda: len(calls) == 3)
    assert [name for name, _, _ in calls] == ["connect", "handler", "disconnect"]
    assert len({greenlet for _, greenlet, _ in calls}) == 1
    assert all(is_open for _, _, is_open in calls)


def test_on_connect_refuses_with_false_alone(serve, connect, in_thread):
    served = []
    answers = [False, None, 0]
    server = serve(served.append, on_connect=lambda conn: answers.pop(0))
    for _ in range(3):
        assert in_thread(connect(server).recv, 1) == b""
    assert len(served) == 2
    assert server.stats().refused == 1


def test_on_error_gets_every_exception_instead_of_the_log(serve, connect, caplog):
    errors = []

    def handler(conn):
        if len(errors) == 2:
            conn.settimeout(0.01)
            conn.recv(1)
        raise [ValueError("mine"), EarlyEOF("theirs"), None, SystemExit(3)][len(errors)]

    server = serve(handler, on_error=lambda conn, error: errors.append((conn.server, type(error))))
    for number in range(4):
        connect(server)
        wait_until(lambda wanted=number + 1: len(errors) == wanted)
    assert errors == [(server, kind) for kind in (ValueError, EarlyEOF, TimeoutError, SystemExit)]
    assert not caplog.records
    stats = server.stats()
    assert (stats.handler_errors, stats.resets, stats.timeouts) == (2, 1, 1)


@pytest.mark.parametrize("hook", ["on_connect", "on_disconnect", "on_error"])
def test_hook_that_raises_ends_its_connection_alone(serve, connect, in_thread, caplog, hook):
    def bad(*args):
        raise RuntimeError("a bad hook")

    def handler(conn):
        conn.sendall(b"served")
        if hook == "on_error":
            raise ValueError

    server = serve(handler, **{hook: bad})
    for _ in range(3):
        client = connect(server)
        assert in_thread(client.recv, 10) == (b"" if hook == "on_connect" else b"served")
        client.close()
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handlers == 0
    assert "a bad hook" in caplog.text
    assert server.state is State.SERVING


def test_hook_killed_while_it_waits_loses_nothing(serve, connect, caplog):
    waiting = Event()

    def hook(conn, error):
        waiting.set()
        Event().wait()

    def handler(conn):
        raise ValueError

    server = serve(handler, on_error=hook)
    connect(server)
    waiting.wait(SOON)
    report = server.stop(0)
    assert report.ended == 1
    assert report.cut[0].ended
    assert server.active_connections == server.stats().handlers == 0
    assert not caplog.records


def test_log_handler_that_waits_and_is_killed_loses_nothing(serve, connect, monkeypatch):
    waiting = Event()

    def slow_log(*args, **kwargs):
        waiting.set()
        Event().wait()

    monkeypatch.setattr("gtcpserver.server.server.log.error", slow_log)
    server = serve(lambda conn: 1 / 0)
    connect(server)
    waiting.wait(SOON)
    assert server.stop(0).ended == 1
    assert server.active_connections == server.stats().handlers == 0


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [1, 2])
def test_max_accepts_serves_exactly_so_many_and_stops(serve, connect, spawn_thread, loops):
    go = Event()
    served = []

    def handler(conn):
        go.wait()
        served.append(conn.recv(1))
        conn.sendall(b"!")

    server = serve(handler, max_accepts=5, accept_loops=loops)
    clients = [connect(server) for _ in range(40)]  # queued before the accept loops have run once

    def talk(client):
        try:
            client.sendall(b"?")
            return client.recv(1)
        except ConnectionError:
            return b""
        finally:
            client.close()

    answers = [spawn_thread(talk, client) for client in clients]
    wait_until(lambda: server.accepted_connections == 5)
    go.set()
    assert sorted(answer.get(timeout=SOON) for answer in answers) == [b""] * 35 + [b"!"] * 5
    assert server.wait_stopped(SOON)
    assert served == [b"?"] * 5
    assert server.accepted_connections == 5
    assert server.state is State.STOPPED


def test_max_accepts_does_not_count_rejected_ones(serve, connect, in_thread):
    server = serve(echo, max_accepts=2, pool=1, on_full="reject")
    first = connect(server)
    assert in_thread(ask, first) == b"hello"
    rejected = connect(server)
    assert in_thread(rejected.recv, 1) == b""
    first.close()
    wait_until(lambda: server.active_connections == 0)
    last = connect(server)
    assert in_thread(ask, last) == b"hello"
    last.close()
    rejected.close()
    assert server.wait_stopped(SOON)
    assert (server.stats().accepted, server.stats().rejected) == (2, 1)


def test_full_pool_leaves_new_connections_in_the_queue(serve, connect, in_thread):
    server = serve(echo, pool=1)
    first, second = connect(server), connect(server)
    assert in_thread(ask, first) == b"hello"
    second.sendall(b"later")
    assert in_thread(ask, first) == b"hello"
    assert server.accepted_connections == 1
    first.close()
    assert in_thread(second.recv, 10) == b"later"
    assert server.stats().rejected == 0


def test_full_pool_rejects(serve, connect, in_thread):
    server = serve(echo, pool=1, on_full="reject")
    first, second = connect(server), connect(server)
    assert in_thread(ask, first) == b"hello"
    second.sendall(b"unread input must not turn the end into a reset")
    assert in_thread(second.recv, 10) == b""
    assert (server.stats().rejected, server.stats().accepted, server.active_connections) == (1, 1, 1)
    first.close()
    wait_until(lambda: server.active_connections == 0)
    assert in_thread(ask, connect(server)) == b"hello"


def test_max_connections_waits_and_counts_idle_ones(serve, connect, in_thread, caplog):
    server = serve(idle_echo, max_connections=2)
    first, second, third = (connect(server) for _ in range(3))
    assert in_thread(ask, first) == in_thread(ask, second) == b"hello"
    third.sendall(b"hello")
    wait_until(lambda: server.stats().idle == 2)
    assert server.active_connections == 2
    first.close()
    assert in_thread(third.recv, 10) == b"hello"
    assert server.stats().peak == 2
    # And nobody had to find out that it stands still.
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the server is full"]


def test_max_connections_rejects(serve, connect, in_thread):
    server = serve(idle_echo, max_connections=1, on_full="reject")
    first = connect(server)
    assert in_thread(ask, first) == b"hello"
    assert in_thread(connect(server).recv, 1) == b""
    assert server.stats().rejected == 1


def test_close_idle_makes_room_for_one_that_is_queued(serve, connect, in_thread):
    server = serve(idle_echo, max_connections=2, on_full="close_idle")
    clients = [connect(server) for _ in range(2)]
    for client in clients:
        assert in_thread(ask, client) == b"hello"
    wait_until(lambda: server.stats().idle == 2)
    assert server.stats().idle_closed == 0  # nobody needs room yet
    third = connect(server)
    assert in_thread(ask, third) == b"hello"
    assert in_thread(clients[0].recv, 1) == b""  # the oldest
    assert in_thread(ask, clients[1]) == b"hello"
    assert server.stats().idle_closed == 1
    assert server.stats().peak == 2


def test_close_idle_waits_while_none_is_idle(serve, connect, in_thread):
    go = Event()

    def handler(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            go.wait()
            conn.sendall(data)

    server = serve(handler, max_connections=1, on_full="close_idle")
    first = connect(server)
    first.sendall(b"first")
    wait_until(lambda: server.active_connections == 1 and server.stats().idle == 0)
    second = connect(server)
    second.sendall(b"second")
    gevent.sleep(0.05)  # the accept loop finds the server full and nobody idle
    assert server.accepted_connections == 1
    go.set()
    assert in_thread(first.recv, 10) == b"first"
    assert in_thread(first.recv, 10) == b""
    assert in_thread(second.recv, 10) == b"second"
    assert server.stats().idle_closed == 1


def test_close_idle_one_that_has_just_got_a_request_is_served(serve, connect, in_thread):
    server = serve(idle_echo, max_connections=1, on_full="close_idle")
    first = connect(server)
    assert in_thread(ask, first) == b"hello"
    wait_until(lambda: server.stats().idle == 1)
    first.sendall(b"again")  # in the kernel before the accept loop sees the next one
    second = connect(server)
    second.sendall(b"second")
    assert in_thread(first.recv, 10) == b"again"
    assert in_thread(second.recv, 10) == b"second"


def test_pool_shared_by_two_servers_limits_both(serve, connect, in_thread):
    pool = HandlerPool(1)
    one, two = serve(echo, pool=pool), serve(echo, pool=pool)
    first = connect(one)
    assert in_thread(ask, first) == b"hello"
    second = connect(two)
    second.sendall(b"hello")
    assert in_thread(ask, first) == b"hello"
    assert (one.stats().handlers, two.stats().handlers, two.active_connections) == (1, 1, 0)
    first.close()
    assert in_thread(second.recv, 10) == b"hello"


# -- idle ------------------------------------------------------------------------------------------------------------


def test_idle_connections_hold_no_place(serve, connect, in_thread):
    server = serve(idle_echo, pool=2)
    clients = [connect(server) for _ in range(50)]
    for client in clients:
        assert in_thread(ask, client) == b"hello"
    wait_until(lambda: server.stats().idle == 50)
    assert server.stats().handlers == 0
    assert in_thread(ask, connect(server)) == b"hello"
    for client in clients:
        assert in_thread(ask, client) == b"hello"
    assert server.pool.size == 2


def test_leaving_idle_with_a_full_pool_waits_for_a_place(serve, connect, in_thread):
    go = Event()

    def handler(conn):
        with conn.idle():
            request = conn.recv(10)
        if request == b"slow":
            go.wait()
        conn.sendall(request)

    server = serve(handler, pool=1)
    slow, quick = connect(server), connect(server)
    wait_until(lambda: server.stats().idle == 2)
    slow.sendall(b"slow")
    wait_until(lambda: server.stats().idle == 1)
    quick.sendall(b"quick")
    wait_until(lambda: server.stats().idle == 0)
    gevent.sleep(0.02)
    assert server.stats().bytes_sent == 0
    assert server.stats().handlers == 1
    go.set()
    assert in_thread(quick.recv, 10) == b"quick"
    assert in_thread(slow.recv, 10) == b"slow"
    for client in (slow, quick):
        client.close()
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handlers == 0


def test_a_connection_that_becomes_idle_makes_room_for_one_that_is_queued(serve, connect, in_thread, caplog):
    go = Event()

    def handler(conn):
        conn.sendall(conn.recv(10))
        go.wait()
        with conn.idle():
            conn.recv(10)

    server = serve(handler, pool=1)
    first = connect(server)
    assert in_thread(ask, first) == b"hello"
    second = connect(server)
    second.sendall(b"second")
    gevent.sleep(0.02)  # the accept loop finds the pool full
    assert server.accepted_connections == 1
    go.set()
    assert in_thread(second.recv, 10) == b"second"
    # And nobody had to find out that it stands still.
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["the server is full"]


def test_a_request_does_not_overtake_one_that_waits_for_a_place(serve, connect):
    go = Event()
    order = []

    def handler(conn):
        with conn.idle():
            name = conn.recv(10)
            if name == b"late":
                go.wait()  # is told just after the busy one, whose place is free then
        order.append(name)
        if name == b"busy":
            go.wait()

    server = serve(handler, pool=1)
    clients = [connect(server) for _ in range(3)]
    wait_until(lambda: server.stats().idle == 3)
    for client, name, idle in zip(clients, (b"busy", b"waiting", b"late"), (2, 1, 1), strict=True):
        client.sendall(name)
        wait_until(lambda idle=idle: server.stats().idle == idle)
    wait_until(lambda: server.stats().bytes_received == 15)
    go.set()
    wait_until(lambda: len(order) == 3)
    assert order == [b"busy", b"waiting", b"late"]


def test_a_handler_killed_while_it_waits_for_a_place_keeps_the_count_of_places(serve, connect):
    go = Event()
    handlers = []

    def handler(conn):
        handlers.append(getcurrent())
        with conn.idle():
            conn.recv(10)
        go.wait()

    server = serve(handler, pool=1)
    clients = [connect(server) for _ in range(2)]
    wait_until(lambda: server.stats().idle == 2)
    for idle, client in zip((1, 0), clients, strict=True):
        client.sendall(b"x")
        wait_until(lambda idle=idle: server.stats().idle == idle)
    handlers[1].kill(block=False)
    wait_until(lambda: server.active_connections == 1)
    assert server.stats().handlers == 1
    go.set()
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handlers == 0


def test_idle_client_that_leaves_while_the_pool_is_full_is_gone_at_once(serve, connect):
    go = Event()

    def handler(conn):
        with conn.idle():
            request = conn.recv(10)
        if request:
            go.wait()

    server = serve(handler, pool=1)
    busy, *others = (connect(server) for _ in range(5))
    wait_until(lambda: server.stats().idle == 5)
    busy.sendall(b"x")
    wait_until(lambda: server.stats().idle == 4)
    for client in others:
        client.close()
    wait_until(lambda: server.active_connections == 1)
    assert server.stats().handlers == 1
    go.set()
    busy.close()
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handlers == 0


def test_error_in_an_idle_block_keeps_the_count_of_places(serve, connect):
    def handler(conn):
        with conn.idle():
            raise ValueError

    server = serve(handler, pool=3, on_error=lambda conn, error: None)
    for number in range(10):
        connect(server)
        wait_until(lambda wanted=number + 1: server.stats().handler_errors == wanted)
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().handlers == 0


def test_connections_that_were_idle_are_freed_without_the_garbage_collector(serve, connect, in_thread):
    import gc
    import weakref

    alive = []

    def handler(conn):
        alive.append(weakref.ref(conn))
        idle_echo(conn)

    server = serve(handler)
    gc.disable()
    try:
        for _ in range(5):
            client = connect(server)
            assert in_thread(ask, client) == b"hello"
            client.close()
        wait_until(lambda: len(alive) == 5 and not any(conn() for conn in alive))
    finally:
        gc.enable()


# -- signals ---------------------------------------------------------------------------------------------------------

SIGNAL_SERVER = """
    import signal, sys, gevent, gtcpserver

    def handler(conn):
        print("begun", flush=True)
        conn.server.stopping_event.wait()
        print("stopping", flush=True)
        conn.sendall(conn.recv_exactly(3))

    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.getsignal(signal.SIGINT)
    mine = signal.getsignal(signal.SIGTERM)
    server = gtcpserver.Server("127.0.0.1:0", handler)
    server.start()
    print(server.address, flush=True)
    report = server.serve_forever()
    print(report.finished, report.ended, flush=True)
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is before[1]
    print("handlers restored", flush=True)
"""


def read_line_with(process, wanted):
    while (line := process.stdout.readline().decode().strip()) != wanted:
        assert line, f"the process has ended before it wrote {wanted!r}: {process.stderr.read().decode()}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_gracefully(python, connect, in_thread, number):
    process = python(SIGNAL_SERVER)
    client = connect(process.stdout.readline().decode().strip())
    read_line_with(process, "begun")
    process.send_signal(number)
    read_line_with(process, "stopping")
    client.sendall(b"end")
    assert client.recv(10) == b"end"
    assert client.recv(10) == b""
    client.close()
    output, errors = in_thread(process.communicate)
    assert process.returncode == 0
    assert output.decode().split("\n") == ["1 0", "handlers restored", ""]
    assert errors == b""


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_second_signal_ends_handlers_at_once(python, connect, in_thread, numbers):
    process = python(SIGNAL_SERVER)
    client = connect(process.stdout.readline().decode().strip())
    read_line_with(process, "begun")
    process.send_signal(numbers[0])
    read_line_with(process, "stopping")
    process.send_signal(numbers[1])
    assert client.recv(10) == b""
    output, _ = in_thread(process.communicate)
    assert process.returncode == 0
    assert output.decode().split("\n") == ["0 1", "handlers restored", ""]


SIGNAL_AT_START = """
    import os, signal, sys
    import gtcpserver, gtcpserver.server.server as module

    real = module.open_listeners

    def open_and_signal(*arguments):
        found = []
        if sys.argv[1] != "before":
            found = real(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        if sys.argv[1] == "before":
            module.gevent.sleep(0.01)  # as if a name were looked up
            found = real(*arguments)
        return found

    module.open_listeners = open_and_signal
    server = gtcpserver.Server("127.0.0.1:0", lambda conn: None)
    print(server.serve_forever(), flush=True)
"""


SIGNAL_JUST_BEFORE_THE_LOOP_SLEEPS = """
    import os, signal
    import gevent, gevent.event
    from gtcpserver.server.signals import StopSignals

    kept = []
    told = gevent.event.Event()

    def arm():
        # Called once by libev, behind gevent's own look for signals and with no bytecode after it: the last thing
        # before epoll_wait(2).
        killer = gevent.get_hub().loop.prepare(priority=-2)
        killer.start(os.kill, os.getpid(), signal.SIGTERM)
        stopper = gevent.get_hub().loop.prepare(priority=-1)
        turns = []
        stopper.start(lambda: turns.append(1) or (len(turns) == 2 and killer.stop()))
        kept.extend([killer, stopper])

    with StopSignals(lambda number: told.set()):
        gevent.get_hub().loop.timer(0.05).start(arm)
        told.wait()
    print("told", flush=True)
"""


@pytest.mark.slow
def test_a_signal_just_before_the_event_loop_sleeps_is_noticed(python, in_thread):
    process = python(SIGNAL_JUST_BEFORE_THE_LOOP_SLEEPS)
    output, errors = in_thread(process.communicate)
    assert output == b"told\n", errors


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_around_the_moment_it_begins_to_listen_is_a_graceful_stop(python, in_thread, when):
    process = python(SIGNAL_AT_START, when)
    output, _ = in_thread(process.communicate)
    assert process.returncode == 0
    assert output == b"StopReport(finished=0, ended=0, cut=(), failures=(), background=())\n"


# -- a listening socket that is lost ---------------------------------------------------------------------------------


def test_lost_listening_socket_stops_the_server_with_the_error(connect, in_thread):
    server = Server("127.0.0.1:0", echo)
    waiting = gevent.spawn(server.serve_forever)
    wait_until(lambda: server.state is State.SERVING)
    client = connect(server)
    assert in_thread(ask, client) == b"hello"
    server._state.acceptors[0].listener.socket.shutdown(socket.SHUT_RD)  # accept: EINVAL
    wait_until(lambda: server.state is State.STOPPING)
    assert in_thread(ask, client) == b"hello"  # the connections that are open are served to their end
    client.close()
    with pytest.raises(OSError, match="Invalid argument") as caught:
        waiting.get(timeout=SOON)
    assert server.fatal_error is caught.value
    assert server.state is State.STOPPED


# -- reuse of the port -----------------------------------------------------------------------------------------------


def test_second_server_on_the_port_is_refused_unless_shared(serve):
    server = serve(echo, accept_loops=2)
    with pytest.raises(OSError, match="already in use"):
        Server(server.address, echo, accept_loops=2).start()
    shared = ListenConfig(shared=True)
    first = serve(echo, listen=shared)
    assert serve(echo, first.address, listen=shared).port == first.port
