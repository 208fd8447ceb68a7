"""The rate of a user: what was moved by one connection counts for the next."""

import base64
import gc
import socket
import struct
import time
from contextlib import closing

import pytest

from gtcpserver.proxy import buckets
from gtcpserver.proxy import limits as module
from gtcpserver.proxy.limits import LimitKeeper, Limits
from kit.clients import read
from kit.proxying import QUICK, reply, socks
from kit.waiting import wait_until

pytestmark = pytest.mark.slow

USERS = "\n".join(f'{name} = "{QUICK}"' for name in ("ada", "bob"))
RULES = '[rules]\nclients = ["allow from any to any with auth staff"]\ndestinations = ["allow loopback"]\n'
PIECE = 16 * 1024


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(buckets, "monotonic", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


@pytest.fixture
def origin(serve):
    """Sends for as long as it can; answers requests by HTTP, too."""

    def send(conn):
        if conn.recv(1000).startswith(b"GET"):
            conn.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            conn.sendall(bytes(PIECE))

    return serve(send)


def by_socks(client, origin, user):
    assert reply(client, socks(origin.port, user=user)) == 0
    client.sendall(b"x")


def by_http(client, origin, user):
    credentials = base64.b64encode(user + b":pw")
    head = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n"
    client.sendall(head % (origin.port, credentials))


def by_connect(client, origin, user):
    credentials = base64.b64encode(user + b":pw")
    head = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n"
    client.sendall(head % (origin.port, credentials))
    assert b" 200 " in client.recv(1000)
    client.sendall(b"x")


def got(client):
    """Bytes that come until nothing has come for a moment."""
    size = 0
    client.settimeout(0.2)
    try:
        while more := client.recv(65536):
            size += len(more)
    except TimeoutError:
        pass
    return size


@pytest.mark.parametrize("ask", [by_socks, by_http, by_connect])
def test_a_user_who_comes_again_and_again_is_no_faster(proxy, connect, in_thread, serve, access_records, ask):
    """Each connection moves no more than what a new one may at once."""

    def send(conn):
        if conn.recv(1000).startswith(b"GET"):
            conn.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        conn.sendall(bytes(PIECE))

    server, origin = proxy(f"[auth.staff.users]\n{USERS}\n[limits]\nuser_rate = 60_000", rules=RULES), serve(send)

    def come():
        with closing(connect(server)) as client:
            ask(client, origin, b"ada")
            assert len(read(client, PIECE)) == PIECE

    began = time.monotonic()
    for number in range(1, 5):
        in_thread(come)
        access_records(number)  # the proxy has seen its end, too
        gc.collect()
    # The first piece is for nothing; after the last one nothing rests.
    assert time.monotonic() - began >= 2 * PIECE / 60_000 * 0.9


@pytest.mark.parametrize("ask", [by_socks, by_http, by_connect])
def test_a_connection_begins_when_its_user_has_paid_for_the_others(proxy, connect, in_thread, origin, ask):
    server = proxy(f"[auth.staff.users]\n{USERS}\n[limits]\nuser_rate = 100", rules=RULES)

    def come(user):
        client = connect(server)
        ask(client, origin, user)
        return got(client)

    assert in_thread(come, b"ada") >= PIECE
    assert sum(in_thread(come, b"ada") for _ in range(3)) == 0
    assert in_thread(come, b"bob") >= PIECE


def test_datagrams_as_well(proxy, connect, in_thread):
    server = proxy(f"[auth.staff.users]\n{USERS}\n[limits]\nuser_rate = 100", rules=RULES)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        there.settimeout(0.2)
        port = there.getsockname()[1]

        def send():
            with closing(connect(server)) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                client.sendall(b"\x05\x01\x02\x01\x03ada\x02pw\x05\x03\x00\x01\0\0\0\0\0\0")
                answer = read(client, 14)
                sock.sendto(
                    b"\0\0\0\x01" + socket.inet_aton("127.0.0.1") + struct.pack("!H", port) + bytes(1000),
                    ("127.0.0.1", struct.unpack("!H", answer[-2:])[0]),
                )
                try:
                    return len(there.recv(2000))
                except TimeoutError:
                    return 0

        assert in_thread(send) == 1000
        wait_until(lambda: not server.active_connections)
        assert in_thread(send) == 0


def test_what_a_user_has_moved_outlives_its_connections(clock):
    keeper = LimitKeeper(Limits(user_rate=100))
    assert keeper.enter_user("ada") == ""
    pace = keeper.pace("ada", None)
    assert pace(0) == 0.0
    assert pace(1100) == 10.0
    del pace
    keeper.leave_user("ada")
    gc.collect()
    clock(4)
    assert keeper.pace("ada", None)(0) == 6.0
    clock(7)
    assert keeper.pace("ada", None)(0) == 0.0
    assert keeper.pace("bob", None)(0) == 0.0


def test_what_is_remembered_of_users_is_bounded(clock, monkeypatch):
    """Those who are there are never forgotten; of the others, the one longest not seen."""
    monkeypatch.setattr(module, "MOST_USERS", 3)
    keeper = LimitKeeper(Limits(user_rate=100))
    staying = keeper.pace("staying", None)
    staying(1100)
    for number in range(10):
        name = f"user{number}"
        keeper.enter_user(name)
        keeper.pace(name, None)(1100)
        keeper.leave_user(name)
    gc.collect()
    assert len(keeper._kept) == 3
    assert len(keeper._buckets) == 4
    assert keeper.pace("staying", None)(0) == 10.0
    assert keeper.pace("user9", None)(0) == 10.0
    assert keeper.pace("user1", None)(0) == 0.0
    # Seen last is who has left last.
    keeper.enter_user("staying")
    for number in range(3):
        keeper.pace(f"another{number}", None)
    keeper.leave_user("staying")
    del staying
    gc.collect()
    assert keeper.pace("staying", None)(0) == 10.0


def test_the_rate_of_a_connection_does_not_begin_anew_with_each_user(proxy, connect, in_thread, serve):
    """Who has two accounts may change between them with each request of one HTTP connection."""

    def answer(conn):
        while True:
            conn.recv_until(b"\r\n\r\n")
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (PIECE, bytes(PIECE)))

    origin = serve(answer)
    server = proxy(f"[auth.staff.users]\n{USERS}\n[limits]\nrate = 60_000", rules=RULES)

    def come():
        with closing(connect(server)) as client:
            for number in range(4):
                by_http(client, origin, (b"ada", b"bob")[number % 2])
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += client.recv(1)
                assert len(read(client, PIECE)) == PIECE

    began = time.monotonic()
    in_thread(come)
    assert time.monotonic() - began >= 2 * PIECE / 60_000 * 0.9
