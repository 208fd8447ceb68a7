"""Clients that send TLS records by the thousand which bring no data, or hardly any: counts, not clocks, judge."""

import contextlib
import logging
import ssl
import time

import gevent
import pytest

from gtcpserver import TLSFlood
from gtcpserver.connection import tls_layer as handshake
from gtcpserver.connection.tls_layer import MAX_HANDSHAKE_RECORDS, MAX_RECORDS_WITHOUT_DATA, RECORDS_IN_A_TURN
from kit.handlers import echo
from kit.patience import SOON
from kit.tls import MemoryClient, client_context
from kit.tls_records import (
    ALERT,
    APPLICATION_DATA,
    CHANGE_CIPHER_SPEC,
    HANDSHAKE,
    HELLO_REQUEST,
    NEW_SESSION_TICKET,
    WARNING_USER_CANCELED,
    Forger,
    plain,
)
from kit.waiting import wait_until

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture
def forge(connect, in_thread, tmp_path):
    """`forge(server, version)` gives a Forger whose handshake is done."""
    return lambda server, version=V13: in_thread(Forger, connect(server), tmp_path, version)


@pytest.fixture
def turns():
    """`turns()`: how often the event loop has come round to others since the first call.

    A loop that goes round without a pause keeps the GIL from the threads of clients: 5 ms for each call in which they
    give it up, which is a minute for a thousand records.
    """
    count = [0]
    others = []

    def go_round():
        while True:
            count[0] += 1
            gevent.sleep(0)

    def so_far():
        if not others:
            others.append(gevent.spawn(go_round))
        return count[0]

    yield so_far
    gevent.killall(others)


@pytest.fixture
def processed(monkeypatch):
    """What OpenSSL got: a list of (bytes of the record, turns of the loop until then)."""
    records = []
    feed = handshake.TLSLayer._feed_record  # noqa: SLF001  counts, or changes keys

    def noted(layer, ahead=True):
        record = feed(layer, ahead)
        records.append(len(record))
        return record

    monkeypatch.setattr(handshake.TLSLayer, "_feed_record", noted)
    return records


def send_to_the_end(sock, data):
    """Send until the server has had enough; True if it has reset the connection."""
    try:
        sock.sendall(data)
        while sock.recv(65536):
            pass
    except ConnectionError:
        return True
    return False


FLOODS = {
    "key updates": (V13, lambda client: client.key_update(), "key_update"),
    "key updates to be answered": (V13, lambda client: client.key_update(requested=True), "key_update"),
    "padded key updates": (V13, lambda client: client.key_update(padding=50), "other"),
    "a byte between key updates": (
        V13,
        lambda client: client.key_update() + client.record(APPLICATION_DATA, b"x"),
        "key_update",
    ),
    "key updates in pieces": (
        V13,
        lambda client: client.record(HANDSHAKE, b"\x18\0\0") + client.record(HANDSHAKE, b"\1\0") + rekey(client),
        "other",
    ),
    "empty records": (V13, lambda client: client.record(APPLICATION_DATA), "empty"),
    "padding alone": (V13, lambda client: client.record(APPLICATION_DATA, padding=500), "empty"),
    "alerts": (V13, lambda client: client.record(ALERT, WARNING_USER_CANCELED), "alert"),
    "empty records of TLS 1.2": (V12, lambda client: client.record(APPLICATION_DATA), "empty"),
    "alerts of TLS 1.2": (V12, lambda client: client.record(ALERT, WARNING_USER_CANCELED), "alert"),
    "renegotiation": (V12, lambda client: client.record(HANDSHAKE, client_hello()), "handshake"),
}


def rekey(client):
    secret = client._secret  # noqa: SLF001  of the client of these tests
    client._use(client._expand(secret, b"traffic upd", len(secret)))  # noqa: SLF001
    return b""


def client_hello():
    outgoing = ssl.MemoryBIO()
    client = client_context(version=V12).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()[5:]


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_without_data_is_ended(serve, tls, forge, in_thread, spawn_thread, turns, processed, caplog, flood):
    caplog.set_level(logging.DEBUG, "gtcpserver")
    version, make, kind = FLOODS[flood]
    seen = []

    def handle(conn):
        try:
            echo(conn)
        except Exception as error:
            seen.append(error)
            with pytest.raises(type(error)):  # it stays ended
                conn.recv(10)
            raise

    server = serve(handle, tls=tls)
    client = forge(server, version)
    data = in_thread(lambda: b"".join(make(client) for _ in range(2000)))
    del processed[:]
    before = turns()
    assert spawn_thread(send_to_the_end, client.sock, data).get(timeout=SOON)
    wait_until(lambda: not server.active_connections)
    assert len(processed) <= 2 * (MAX_RECORDS_WITHOUT_DATA + 2)
    assert turns() - before >= 4  # OpenSSL itself allows five alerts
    stats = server.stats()
    assert stats.tls_floods == {kind: 1}
    assert (stats.resets, stats.handler_errors) == (1, 0)
    assert isinstance(seen[0], TLSFlood)
    assert seen[0].kind == kind
    (about,) = (record for record in caplog.records if "TLS" in record.getMessage())
    assert about.levelno == logging.DEBUG


@pytest.mark.slow
def test_others_get_a_turn_after_each_record_without_data(serve, tls, forge, in_thread, turns):
    server = serve(echo, tls=tls)
    client = forge(server)
    data = b"".join(client.key_update() for _ in range(MAX_RECORDS_WITHOUT_DATA)) + client.record(
        APPLICATION_DATA, b"hello"
    )
    before = turns()
    client.sock.sendall(data)
    assert in_thread(client.read, 10) == b"hello"
    assert turns() - before >= MAX_RECORDS_WITHOUT_DATA
    assert server.stats().tls_floods == {}


@pytest.mark.slow
def test_a_flood_of_key_updates_costs_next_to_nothing(serve, tls, forge, in_thread, spawn_thread):
    """In CPU: 8,000 key updates took 0.2 s, in one piece."""
    server = serve(echo, tls=tls)
    client = forge(server)
    data = in_thread(lambda: b"".join(client.key_update() for _ in range(8000)))
    before = time.process_time()
    assert spawn_thread(send_to_the_end, client.sock, data).get(timeout=SOON)
    assert time.process_time() - before < 0.1


def test_key_updates_with_time_or_data_between_are_no_flood(serve, tls, forge, in_thread, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(handshake, "monotonic", lambda: now[0])
    server = serve(echo, tls=tls)
    client = forge(server)

    def talk():
        for _ in range(3 * MAX_RECORDS_WITHOUT_DATA):
            now[0] += 1
            client.sock.sendall(client.key_update(requested=True) + client.record(APPLICATION_DATA, b"x"))
            assert client.read(10) == b"x"
        for _ in range(3 * MAX_RECORDS_WITHOUT_DATA):
            client.sock.sendall(client.key_update(requested=True) + client.record(APPLICATION_DATA, b"y" * 1024))
            assert client.read(2000) == b"y" * 1024

    in_thread(talk)
    assert server.stats().tls_floods == {}


@pytest.mark.parametrize("version", [V12, V13])
def test_tiny_records_all_arrive_and_leave_others_their_turns(serve, tls, forge, in_thread, turns, version):
    received = []
    server = serve(lambda conn: received.extend(iter(lambda: conn.recv(100), b"")), tls=tls)
    client = forge(server, version)
    number = 20 * RECORDS_IN_A_TURN
    data = b"".join(client.record(APPLICATION_DATA, bytes([i % 256])) for i in range(number))
    before = turns()
    in_thread(client.sock.sendall, data)
    wait_until(lambda: len(received) == number)
    assert b"".join(received) == bytes(i % 256 for i in range(number))
    assert turns() - before >= number // RECORDS_IN_A_TURN
    assert server.stats().resets == 0


@pytest.mark.parametrize(
    ("version", "make"),
    [
        (V13, lambda client: client.record(HANDSHAKE, NEW_SESSION_TICKET)),
        (V13, lambda client: plain(CHANGE_CIPHER_SPEC, b"\1")),
        (V12, lambda client: client.record(CHANGE_CIPHER_SPEC, b"\1")),
        (V12, lambda client: client.record(HANDSHAKE, HELLO_REQUEST)),
    ],
    ids=["tickets", "change_cipher_spec", "change_cipher_spec of TLS 1.2", "hello requests"],
)
def test_what_clients_must_not_send_ends_the_connection(serve, tls, forge, spawn_thread, processed, version, make):
    server = serve(echo, tls=tls)
    client = forge(server, version)
    data = b"".join(make(client) for _ in range(500))
    del processed[:]
    spawn_thread(send_to_the_end, client.sock, data).get(timeout=SOON)
    wait_until(lambda: server.stats().resets == 1)
    assert len(processed) <= 2 * (MAX_RECORDS_WITHOUT_DATA + 2)
    assert server.stats().handler_errors == 0


def in_records(message, size):
    return b"".join(plain(HANDSHAKE, message[i : i + size]) for i in range(0, len(message), size))


HANDSHAKE_FLOODS = {
    "hello in one byte a record": lambda: in_records(b"\1\0\xff\xff\3\3" + bytes(40000), 1),
    "change_cipher_spec": lambda: plain(CHANGE_CIPHER_SPEC, b"\1") * 20000,
    "change_cipher_spec after the hello": lambda: (
        plain(HANDSHAKE, client_hello()) + plain(CHANGE_CIPHER_SPEC, b"\1") * 20000
    ),
    "empty records": lambda: plain(HANDSHAKE) * 20000,
    "alerts": lambda: plain(ALERT, WARNING_USER_CANCELED) * 20000,
    "hello requests": lambda: plain(HANDSHAKE, HELLO_REQUEST) * 20000,
}


@pytest.mark.parametrize("flood", HANDSHAKE_FLOODS)
@pytest.mark.parametrize("started", ["at once", "by start_tls"])
def test_a_flood_in_the_handshake_is_ended(serve, tls, connect, spawn_thread, processed, flood, started):
    def start(conn):
        conn.start_tls(tls)

    server = serve(echo, tls=tls) if started == "at once" else serve(start)
    data = HANDSHAKE_FLOODS[flood]()
    client = connect(server)
    spawn_thread(send_to_the_end, client, data).get(timeout=SOON)
    failures = wait_until(lambda: server.stats().handshake_failures)
    assert list(failures.values()) == [1]
    if flood == "hello in one byte a record":
        assert failures == {"too_many_records": 1}
    assert len(processed) <= MAX_HANDSHAKE_RECORDS + 1


def test_a_hello_in_some_pieces_is_none(serve, tls, connect, shared, in_thread):
    server = serve(echo, tls=tls)
    client = MemoryClient(connect(server), client_context(shared.ca_file))

    def send(data):
        if data[:1] == b"\x16" and data[5] == 1:
            data = in_records(data[5:], 10)
        client.sock.sendall(data)

    in_thread(client.handshake, send)
    assert server.stats().handshake_failures == {}
