"""What becomes at a stop of connections that are queued in the kernel, or whose handshake is under way."""

import socket

import gevent
import pytest
from gevent.event import Event

from gtcpserver import ListenConfig, StopReport
from gtcpserver.listening.draining import handshakes_under_way
from gtcpserver.server import drain, stopping
from kit.clients import reset
from kit.patience import SOON
from kit.waiting import wait_until

#: The kernel takes no connection for complete that has sent nothing: as if its last ACK were still on its way.
UNDER_WAY = ListenConfig(defer_accept=60)


def one_request(conn):
    conn.sendall(conn.recv(1))


def test_those_that_wait_for_a_place_get_one_after_the_other(serve, connect, in_thread):
    go = Event()

    def handler(conn):
        go.wait()
        gevent.sleep(0.001)
        conn.sendall(conn.recv(1))

    server = serve(handler, pool=2)
    clients = [connect(server) for _ in range(10)]
    for client in clients:
        client.sendall(b"x")
    wait_until(lambda: server.active_connections == 2)
    stopped = gevent.spawn(server.stop, SOON)
    server.listening_ended.wait(SOON)
    go.set()
    for client in clients:
        assert in_thread(client.recv, 1) == b"x"
        client.close()
    assert stopped.get(timeout=SOON) == StopReport(10, 0)
    assert server.stats().peak == 2


@pytest.mark.parametrize("first_ends", [False, True])
def test_those_that_come_with_the_stop_wait_for_a_place_also_where_a_full_server_rejects(
    serve, connect, in_thread, first_ends
):
    go = Event()

    def handler(conn):
        conn.sendall(conn.recv(1))
        if conn.recv(1) != b"q":
            go.wait()

    server = serve(handler, pool=1, max_connections=1, on_full="reject", listen=UNDER_WAY)
    first, *others = (connect(server) for _ in range(3))
    first.sendall(b"x")
    assert in_thread(first.recv, 1) == b"x"
    stopped = gevent.spawn(server.stop, SOON)
    server.stopping_event.wait()
    if first_ends:
        first.sendall(b"q")
        wait_until(lambda: server.active_connections == 0)
    else:
        first.sendall(b"y")
    for client in others:
        client.sendall(b"xy")
    wait_until(
        lambda: server.active_connections and server.active_connections + len(server._state.waiting) == 3 - first_ends
    )
    assert server.stats().handlers == 1
    go.set()
    for client in others:
        assert in_thread(client.recv, 1) == b"x"
        client.close()
    first.close()
    assert stopped.get(timeout=SOON) == StopReport(3, 0)
    assert server.stats().peak == 1


@pytest.mark.slow
def test_a_handshake_that_takes_its_time_is_waited_for(serve, connect, in_thread):
    server = serve(one_request, listen=UNDER_WAY)
    client = connect(server)
    stopped = gevent.spawn(server.stop, SOON)
    server.stopping_event.wait()
    gevent.sleep(0.2)
    client.sendall(b"x")
    assert in_thread(client.recv, 1) == b"x"
    client.close()
    assert stopped.get(timeout=SOON) == StopReport(1, 0)


@pytest.mark.slow
def test_a_client_under_way_that_waits_for_the_server_to_speak_is_served(serve, connect, in_thread):
    server = serve(lambda conn: conn.sendall(b"hello"), listen=UNDER_WAY)
    client = connect(server)
    stopped = gevent.spawn(server.stop, SOON)
    assert in_thread(client.recv, 10) == b"hello"  # when the kernel has repeated its SYN-ACK, after a second
    client.close()
    assert stopped.get(timeout=SOON) == StopReport(1, 0)


def test_handshakes_that_are_never_finished_hold_up_a_stop_for_a_limited_time(serve, monkeypatch):
    monkeypatch.setattr(drain, "handshakes_under_way", lambda listening: 1)
    monkeypatch.setattr(stopping, "LONGEST_DRAIN", 0.1)
    monkeypatch.setattr(stopping, "LONGEST_DRAIN_OF_DEFERRED", 0.1)
    server = serve(one_request)
    stopped = gevent.spawn(server.stop, SOON)
    assert stopped.get(timeout=SOON) == StopReport(0, 0)


def test_handshakes_of_a_socket_that_others_serve_are_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(drain, "handshakes_under_way", lambda listening: 1)
    monkeypatch.setattr(stopping, "LONGEST_DRAIN", SOON)
    monkeypatch.setattr(stopping, "LONGEST_DRAIN_OF_DEFERRED", SOON)
    with socket.create_server(("127.0.0.1", 0)) as theirs:
        server = serve(one_request, theirs.dup())
        stopped = gevent.spawn(server.stop, SOON)
        assert stopped.get(timeout=SOON) == StopReport(0, 0)


def test_handshakes_of_another_port_are_not_waited_for(serve, connect):
    server, other = serve(one_request), serve(one_request, listen=UNDER_WAY)
    connect(other)
    if handshakes_under_way(other._state.acceptors[0].socket) is None:
        pytest.skip("this kernel does not tell what is under way")
    assert handshakes_under_way(other._state.acceptors[0].socket) == 1
    assert handshakes_under_way(server._state.acceptors[0].socket) == 0


def test_clients_that_have_left_the_queue_are_not_served(serve, connect):
    go = Event()
    server = serve(lambda conn: go.wait(), pool=1)
    first = connect(server)
    wait_until(lambda: server.active_connections == 1)
    leaving = connect(server)
    leaving.sendall(b"x")
    reset(leaving)
    stopped = gevent.spawn(server.stop, SOON)
    server.listening_ended.wait(SOON)
    first.close()
    go.set()
    assert stopped.get(timeout=SOON) == StopReport(1, 0)
    assert server.stats().left_in_queue == 1
    assert server.accepted_connections == 1


def test_the_path_of_a_unix_socket_that_others_serve_stays(serve, connect, tmp_path):
    server = serve(one_request, f"unix:{tmp_path}/socket")
    with server._state.acceptors[0].socket.dup():
        server.stop(SOON, leave_listening=True)
        connect(server)


def test_a_halt_serves_nobody_who_is_still_queued(serve, connect):
    server = serve(one_request)
    client = connect(server)  # nothing has waited since: the event loop has not seen it
    client.sendall(b"x")
    assert server.halt() == StopReport(0, 0)
    assert server.accepted_connections == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_the_loops_that_stay_share_new_connections_evenly(serve, connect):
    server = serve(lambda conn: None, accept_loops=3)
    server.close_accept_loop(0)
    taken = [0, 0]
    for number, acceptor in enumerate(server._state.acceptors):

        def count(connection, address, number=number, handle=acceptor.hand_over):
            taken[number] += 1
            handle(connection, address)

        acceptor.hand_over = count
    for _ in range(400):
        connect(server).close()
    wait_until(lambda: sum(taken) == 400)
    # At random: 200 of 400, give or take 10 (a standard deviation).
    assert min(taken) > 140
