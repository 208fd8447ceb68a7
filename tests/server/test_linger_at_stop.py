"""A stop waits for lingering clients only as long as something of theirs can still be lost."""

import socket
import threading
import time

import gevent
import pytest

from gtcpserver.adapters.stream_server import StreamServer
from gtcpserver.connection import lingering as linger
from gtcpserver.connection.lingering import Linger
from gtcpserver.linux import NO_OPTION
from gtcpserver.server import Server
from kit.forms import pure_only
from kit.patience import SOON
from kit.waiting import wait_until

LONG = 3600.0  # no test waits for it
ANSWER = b"x" * (8 << 20)  # more than two sockets' buffers hold


@pytest.fixture(autouse=True)
def short_silence(monkeypatch):
    monkeypatch.setattr(linger, "SILENT_SECONDS", 0.1)


def send_answer(conn):
    conn.recv(1)
    conn.sendall(b"answer")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_a_client_that_has_everything_and_stays_open_does_not_hold_up_a_stop(
    serve, connect, in_thread, tmp_path, address
):
    server = serve(send_answer, f"unix:{tmp_path / 's'}" if address == "unix" else address, linger=LONG)
    clients = [connect(server) for _ in range(3)]
    for client in clients:
        client.sendall(b"request")  # of which one byte is read
        assert in_thread(client.recv, 10) == b"answer"
    with gevent.Timeout(SOON):
        assert server.stop(None).ended == 0
    assert [in_thread(client.recv, 1) for client in clients] == [b""] * 3


def test_a_client_that_has_read_nothing_yet_does_not_hold_up_a_stop_and_loses_nothing(serve, connect, in_thread):
    server = serve(send_answer, linger=LONG)
    client = connect(server)
    client.sendall(b"?")
    wait_until(lambda: server.stats().lingering == 1)
    with gevent.Timeout(SOON):
        server.stop(None)
    assert in_thread(client.recv, 10) == b"answer"
    assert in_thread(client.recv, 10) == b""


@pytest.mark.slow
def test_a_client_whose_system_has_not_acknowledged_everything_is_waited_for(serve, connect, spawn_thread, in_thread):
    server = serve(lambda conn: conn.sendall(ANSWER), linger=LONG)
    client = connect(server, receive_buffer=4096)
    read = 0
    while server.stats().lingering == 0:
        read += len(in_thread(client.recv, 65536))
    stopping = gevent.spawn(server.stop, None)
    gevent.sleep(4 * linger.SILENT_SECONDS)
    assert not stopping.ready()

    def read_the_rest():
        size = 0
        while more := client.recv(65536):
            size += len(more)
        return size

    rest = spawn_thread(read_the_rest)
    stopping.get(timeout=SOON)
    assert read + rest.get(timeout=SOON) == len(ANSWER)


@pytest.mark.slow
def test_a_client_that_still_sends_is_waited_for(serve, connect, spawn_thread):
    """A reset would make its next send fail, and it may give up before it reads the answer."""
    server = serve(send_answer, linger=LONG)
    client = connect(server)
    enough = threading.Event()

    def upload():
        while not enough.is_set():
            client.sendall(b"more")
            time.sleep(0.01)
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)

    uploading = spawn_thread(upload)
    wait_until(lambda: server.stats().lingering == 1)
    stopping = gevent.spawn(server.stop, None)
    gevent.sleep(4 * linger.SILENT_SECONDS)
    assert not stopping.ready()
    enough.set()
    assert uploading.get(timeout=SOON) == b"answer"
    stopping.get(timeout=SOON)


@pure_only
@pytest.mark.slow
def test_clients_that_are_not_waited_for_have_the_time_of_those_who_are(serve, connect):
    """Only the end of the stop closes their sockets."""
    server = serve(send_answer, linger=LONG)
    silent, sending = connect(server), connect(server)
    for client in silent, sending:
        client.sendall(b"?")
    wait_until(lambda: server.stats().lingering == 2)
    stopping = gevent.spawn(server.stop, None)
    for _ in range(10):
        gevent.sleep(linger.SILENT_SECONDS / 2)
        sending.sendall(b"more")
    assert server.stats().lingering == 2
    assert server.lingerer._awaited == 1
    sending.close()
    stopping.get(timeout=SOON)


@pytest.mark.slow
def test_without_a_stop_a_silent_client_has_the_whole_linger_time(serve, connect):
    server = serve(send_answer, linger=LONG)
    connect(server).sendall(b"?")
    wait_until(lambda: server.stats().lingering == 1)
    gevent.sleep(3 * linger.SILENT_SECONDS)
    assert server.stats().lingering == 1


@pure_only
@pytest.mark.slow
def test_where_the_system_does_not_tell_what_has_arrived_the_peer_is_waited_for(monkeypatch):
    monkeypatch.setattr(linger, "TCP_INFO", NO_OPTION)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as peer:
        mine, _ = listening.accept()
        mine.setblocking(False)
        polite = Linger(LONG)
        polite.take(mine)
        wait_until(lambda: polite._lingering)
        gevent.sleep(2 * linger.SILENT_SECONDS)
        polite.let_silent_peers_be()
        assert not polite.nobody_lingers.is_set()
        peer.close()
        assert polite.nobody_lingers.wait(SOON)


def test_a_stream_server_does_not_wait_for_them_either(connect, in_thread):
    class Lingering(StreamServer):
        linger = LONG

    def handle(sock, _address):
        sock.sendall(b"answer")
        sock.close()

    server = Lingering(("127.0.0.1", 0), handle)
    server.start()
    client = connect(f"127.0.0.1:{server.server_port}")
    assert in_thread(client.recv, 10) == b"answer"
    with gevent.Timeout(SOON):
        server.finish_before_exit()


def test_the_default_stop_is_short():
    """The figure that operators see: 2.3 s before, with a client that does not close."""
    server = Server("127.0.0.1:0", send_answer)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"?")
        wait_until(lambda: server.stats().lingering == 1)
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < server.lingerer.seconds / 2
