"""A closed connection delivers what was written, and holds nothing for long."""

import socket
import threading

import gevent
import pytest
from gevent.event import Event

from gtcpserver.connection import lingering as linger
from gtcpserver.connection.lingering import Linger
from kit.clients import read_all, reset
from kit.patience import SOON
from kit.waiting import wait_until

ANSWER = bytes(range(256)) * 4096  # 1 MiB


def write_and_return(conn):
    conn.sendall(ANSWER)


def write_and_raise(conn):
    conn.sendall(ANSWER)
    raise ValueError("after the answer")


def write_and_close(conn):
    conn.sendall(ANSWER)
    conn.close()


def write_to_a_file(conn):
    with conn.makefile("wb") as file:
        file.write(ANSWER)


@pytest.mark.slow
@pytest.mark.parametrize("handler", [write_and_return, write_and_raise, write_and_close, write_to_a_file])
def test_unread_input_costs_the_peer_no_byte_of_the_answer(serve, connect, spawn_thread, handler):
    server = serve(handler, on_error=lambda conn, error: None)
    for _ in range(20):
        client = connect(server)
        client.sendall(b"a request that nobody reads" * 1000)
        data, end = spawn_thread(read_all, client).get(timeout=SOON)
        assert (len(data), end) == (len(ANSWER), "end")
        assert data == ANSWER
        client.close()
    wait_until(lambda: server.stats().lingering == 0)


@pytest.mark.slow
@pytest.mark.parametrize("handler", [write_and_return, write_and_raise, write_and_close])
def test_input_that_goes_on_coming_costs_the_peer_no_byte_of_the_answer(serve, connect, spawn_thread, handler):
    server = serve(handler, on_error=lambda conn, error: None)
    # It drips while the answer is read, and so before and after the server has closed.
    for _ in range(20):
        client = connect(server)

        def drip_and_read(client=client):
            data = bytearray()
            while more := client.recv(32 * 1024):
                data += more
                client.sendall(b"more input")
            return bytes(data)

        assert spawn_thread(drip_and_read).get(timeout=SOON) == ANSWER
        client.close()


def test_input_after_the_close_costs_the_peer_no_byte_of_the_answer(serve, connect, spawn_thread):
    server = serve(write_and_return)
    client = connect(server)
    # What the kernel cannot send yet is still in the server when its handler has returned.
    closed = threading.Event()
    answer = spawn_thread(lambda: (client.recv(1), closed.wait(SOON), client.sendall(b"late"), read_all(client)))
    wait_until(lambda: server.stats().lingering == 1)
    closed.set()
    assert answer.get(timeout=SOON)[3] == (ANSWER[1:], "end")


def test_without_linger_the_close_is_immediate(serve, connect, in_thread):
    server = serve(lambda conn: conn.sendall(b"x"), linger=0)
    client = connect(server)
    assert in_thread(client.recv, 10) == b"x"
    wait_until(lambda: server.active_connections == 0)
    assert server.stats().lingering == 0


def test_peer_that_does_not_close_is_closed_after_the_linger_time(serve, connect):
    server = serve(lambda conn: None, linger=0.05)
    clients = [connect(server) for _ in range(10)]
    wait_until(lambda: server.stats().lingering == 10)
    wait_until(lambda: server.stats().lingering == 0)
    assert [client.recv(1) for client in clients] == [b""] * 10
    # A second group after the timer has stopped once.
    connect(server)
    wait_until(lambda: server.accepted_connections == 11 and server.stats().lingering == 0)


def test_peer_that_has_closed_first_is_not_lingered_for(serve, connect):
    ended = []

    def handler(conn):
        while conn.recv(100):
            pass
        ended.append(conn.server.stats().lingering)

    server = serve(handler, linger=SOON)
    for _ in range(5):
        connect(server).close()
    wait_until(lambda: len(ended) == 5 and server.active_connections == 0)
    assert server.stats().lingering == 0


def test_peer_that_resets_while_lingering_is_forgotten(serve, connect):
    server = serve(lambda conn: None, linger=SOON)
    client = connect(server)
    wait_until(lambda: server.stats().lingering == 1)
    reset(client)
    wait_until(lambda: server.stats().lingering == 0)


def test_lingering_connection_holds_no_place(serve, connect, in_thread):
    server = serve(lambda conn: conn.sendall(b"x"), pool=1, linger=SOON)
    clients = [connect(server) for _ in range(5)]
    assert [in_thread(client.recv, 1) for client in clients] == [b"x"] * 5
    wait_until(lambda: server.stats().lingering == 5)
    assert server.stats().handlers == 0


def test_input_thrown_away_is_bounded(serve, connect, spawn_thread):
    server = serve(lambda conn: None, linger=SOON)
    client = connect(server)

    def pour():
        sent = 0
        try:
            while sent < 100 * linger.MOST_DISCARDED:
                sent += client.send(b"x" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            return sent
        return sent

    # What fits into the sockets' buffers comes on top.
    assert spawn_thread(pour).get(timeout=SOON) < 50 * linger.MOST_DISCARDED
    wait_until(lambda: server.stats().lingering == 0)


def test_number_of_lingering_connections_is_bounded(serve, connect, monkeypatch):
    monkeypatch.setattr(linger, "MOST_LINGERING", 3)
    server = serve(lambda conn: None, linger=SOON)
    clients = [connect(server) for _ in range(8)]
    wait_until(lambda: server.accepted_connections == 8 and server.active_connections == 0)
    wait_until(lambda: server.stats().lingering == 3)
    for client in clients:
        assert client.recv(1) == b""


def test_linger_alone():
    mine, peer = socket.socketpair()
    with peer:
        mine.setblocking(False)
        polite = Linger(SOON)
        assert polite.nobody_lingers.is_set()
        assert polite.take(mine)
        assert len(polite) == 1
        assert not polite.nobody_lingers.is_set()
        assert peer.recv(1) == b""
        peer.sendall(b"thrown away")
        gevent.sleep(0.01)
        assert len(polite) == 1
        peer.shutdown(socket.SHUT_WR)
        assert polite.nobody_lingers.wait(SOON)
        assert len(polite) == 0
        assert mine.fileno() == -1


@pytest.mark.slow
def test_each_peer_has_its_time_and_is_closed_after_it_though_others_came_before():
    pairs = [socket.socketpair() for _ in range(3)]
    polite = Linger(0.1)
    for mine, _ in pairs:
        mine.setblocking(False)
        polite.take(mine)
        gevent.sleep(0.04)
    wait_until(lambda: len(polite) == 0)
    for mine, peer in pairs:
        assert mine.fileno() == -1
        peer.close()


def test_linger_takes_no_socket_that_is_reset_or_when_its_time_is_0():
    mine, peer = socket.socketpair()
    with mine, peer:
        assert not Linger(0).take(mine)
    unconnected = socket.socket()
    with unconnected:
        assert not Linger(1).take(unconnected)
        assert unconnected.fileno() >= 0


def test_those_not_awaited_linger_too():
    mine, peer = socket.socketpair()
    with peer:
        mine.setblocking(False)
        polite = Linger(SOON)
        polite.take(mine, awaited=False)
        assert polite.nobody_lingers.is_set()
        assert len(polite) == 1
        polite.close_all()
        polite.close_all()
        assert len(polite) == 0
        assert mine.fileno() == -1


def test_handler_that_hands_its_descriptor_on_keeps_it_open(serve, connect, in_thread):
    handed = []
    go = Event()

    def handler(conn):
        handed.append(socket.socket(fileno=conn.detach()))
        go.set()

    server = serve(handler)
    client = connect(server)
    assert go.wait(SOON)
    wait_until(lambda: server.active_connections == 0)
    with handed[0] as own:
        own.setblocking(True)
        own.sendall(b"still open")
        assert in_thread(client.recv, 100) == b"still open"
