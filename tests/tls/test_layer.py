"""What the TLS layer holds between OpenSSL and the socket: nothing of it is lost, and nothing waits for nothing."""

import contextlib
import socket
import ssl

import gevent
import gevent.socket
import pytest

from kit.handlers import echo
from kit.patience import SOON
from kit.tls import MemoryClient, client_context, memory_shutdown, read_all, read_exactly, strict_context
from kit.waiting import wait_until

PLENTY = bytes(range(256)) * 4096  # 1 MiB


@pytest.mark.slow
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 6, 100, 1000, 16384])
def test_records_arrive_however_they_are_cut(serve, tls, memory_client, in_thread, size, version):
    received = []
    server = serve(lambda conn: received.extend(iter(lambda: conn.recv(300), b"")), tls=tls)
    client = memory_client(server, version)
    messages = [bytes([i]) * (1 + i % 7 * 50) for i in range(40)]
    data = client.records(*messages)

    def send():
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(0, len(data), size):
            client.sock.sendall(data[place : place + size])
        client.sock.shutdown(socket.SHUT_WR)

    in_thread(send)
    wait_until(lambda: not server.active_connections)
    assert b"".join(received) == b"".join(messages)


def test_a_read_of_nothing_takes_nothing(serve, tls, memory_client):
    seen = []

    def handle(conn):
        seen.append(conn.recv(0))
        seen.append(conn.recv(2))
        seen.append(conn.recv(0))
        seen.append(conn.recv(10))

    client = memory_client(serve(handle, tls=tls))
    client.sock.sendall(client.records(b"hello"))
    wait_until(lambda: len(seen) == 4)
    assert seen == [b"", b"he", b"", b"llo"]


def test_pending_tells_of_what_the_socket_does_not(serve, tls, memory_client):
    seen = []

    def handle(conn):
        seen.append(conn.recv(4))
        while conn.pending():
            seen.append(conn.recv(10))
        seen.append("end")

    client = memory_client(serve(handle, tls=tls))
    client.sock.sendall(client.records(b"12345", b"678", b"9"))
    wait_until(lambda: "end" in seen)
    assert seen == [b"1234", b"5", b"678", b"9", "end"]


@pytest.mark.parametrize("end", ["timeout", "kill", "non-blocking"])
def test_a_write_that_was_broken_off_leaves_whole_records(serve, tls, tls_client, in_thread, end):
    """What is written afterwards is not taken for the rest of it, nor put into its midst."""
    client_reads = gevent.event.Event()

    def handle(conn):
        if end == "timeout":
            conn.settimeout(0.02)
            with pytest.raises(TimeoutError):
                conn.sendall(PLENTY * 32)
            conn.settimeout(None)
        elif end == "kill":
            writing = gevent.spawn(conn.sendall, PLENTY * 32)
            gevent.sleep(0.02)
            writing.kill()
        else:
            conn.settimeout(0)
            with pytest.raises(BlockingIOError):
                while True:
                    conn.send(PLENTY)
            conn.settimeout(None)
        client_reads.set()
        conn.sendall(b"the end")

    client = tls_client(serve(handle, tls=tls), context=strict_context())
    client_reads.wait(SOON)
    received = in_thread(read_all, client)
    assert received.endswith(b"the end")
    if end != "non-blocking":  # whoever does not repeat the call which could not wait may lose its bytes
        assert (PLENTY * 32).startswith(received[: -len(b"the end")])


def test_a_write_that_could_not_wait_is_repeated(serve, tls, tls_client, in_thread):
    def handle(conn):
        conn.settimeout(0)
        left = memoryview(PLENTY * 16)
        while left:
            try:
                left = left[conn.send(left) :]
            except BlockingIOError:
                gevent.sleep(0.001)
        conn.settimeout(None)

    client = tls_client(serve(handle, tls=tls), context=strict_context())
    assert in_thread(read_all, client) == PLENTY * 16


def test_half_close_with_part_of_a_record_unread(serve, tls, memory_client, in_thread):
    seen = []

    def handle(conn):
        seen.append(conn.recv(1))
        conn.shutdown(socket.SHUT_WR)
        seen.append(conn.recv_exactly(8))
        seen.append(conn.bytes_received)

    client = memory_client(serve(handle, tls=tls))
    client.sock.sendall(client.records(b"1234", b"56", b"789"))
    wait_until(lambda: len(seen) == 3)
    assert seen == [b"1", b"23456789", 9]


def test_plain_text_behind_the_end_of_tls(serve, tls, connect, shared, in_thread):
    """The client's goodbye and what follows it in the clear come in one packet."""
    seen = []

    def handle(conn):
        conn.start_tls(tls)
        seen.append(conn.recv(100))
        seen.append(conn.recv(100))
        conn.stop_tls()
        seen.append(conn.recv_until(b"\n"))

    client = MemoryClient(connect(serve(handle)), client_context(shared.ca_file))
    in_thread(client.handshake)
    data = client.records(b"hello")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.tls.unwrap()
    client.sock.sendall(data + client.outgoing.read() + b"plain\n")
    wait_until(lambda: len(seen) == 3)
    assert seen == [b"hello", b"", b"plain\n"]


def test_a_request_that_came_with_the_handshake_is_served(serve, tls, shared, connect, in_thread):
    client = MemoryClient(connect(serve(echo, tls=tls)), client_context(shared.ca_file))

    def send(data):
        # The last flight, with which the client is done, and the first request in one packet.
        if client.tls.version():
            data += client.records(b"hello")
        client.sock.sendall(data)

    in_thread(client.handshake, send)

    def answer():
        while True:
            try:
                return client.tls.read(100)
            except ssl.SSLWantReadError:
                client.incoming.write(client.sock.recv(65536))

    assert in_thread(answer) == b"hello"


def test_what_comes_before_a_goodbye_is_read(serve, tls, tls_client, in_thread):
    received = []
    server = serve(lambda conn: received.extend(iter(lambda: conn.recv(65536), b"")), tls=tls)
    client = tls_client(server)
    in_thread(client.sendall, PLENTY)
    memory_shutdown(client)
    wait_until(lambda: not server.active_connections)
    assert b"".join(received) == PLENTY


def test_reading_into_a_buffer(serve, tls, tls_client, in_thread):
    def handle(conn):
        buffer = bytearray(70000)
        while size := conn.recv_into(buffer):
            conn.sendall(memoryview(buffer)[:size])

    client = tls_client(serve(handle, tls=tls))
    for _ in range(3):
        client.sendall(PLENTY[:50000])
        assert in_thread(read_exactly, client, 50000) == PLENTY[:50000]


def test_a_write_that_timed_out_does_not_end_in_order(serve, tls, tls_client, in_thread):
    def handle(conn):
        conn.settimeout(0.02)
        conn.sendall(PLENTY * 32)

    server = serve(handle, tls=tls)
    client = tls_client(server, context=strict_context())
    client.suppress_ragged_eofs = False
    wait_until(lambda: server.stats().timeouts == 1)
    with pytest.raises((ConnectionError, ssl.SSLError)):
        in_thread(read_all, client)


def test_a_handler_that_has_caught_the_timeout_of_its_write_does_not_end_in_order(serve, tls, tls_client, in_thread):
    """There is room for the rest of the record and a close_notify behind it again; they would say that all is there."""
    timed_out = gevent.event.Event()

    def handle(conn):
        conn.settimeout(0.02)
        with pytest.raises(TimeoutError):
            conn.sendall(PLENTY * 32)
        timed_out.set()
        gevent.socket.wait_write(conn.fileno())

    server = serve(handle, tls=tls)
    client = tls_client(server, context=strict_context())
    client.suppress_ragged_eofs = False
    assert timed_out.wait(SOON)
    with pytest.raises(ssl.SSLError, match=r"(?i)EOF"):  # SSLEOFError, but for some releases of CPython 3.11
        in_thread(read_all, client)
    assert server.stats().handler_errors == 0
