"""Clients that give up while the proxy waits for others; half-closed ones have not given up."""

import socket
import struct
from ipaddress import ip_address

import gevent
import pytest
from gevent.event import Event

from gtcpserver.proxy import departures
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.rules import parse_client_rule
from kit.forwarding import OK
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, full_listener, reply, socks
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(departures, "INTERVAL", 0.05)
    monkeypatch.setattr(departures, "GRACE", 0.2)


class SilentNames:
    def __init__(self):
        self.asked = 0

    def resolve(self, name):
        self.asked += 1
        Event().wait()

    def close(self):
        pass


class SlowPassword(OnePassword):
    def __init__(self):
        self.asked = 0

    def check(self, user, password, client):
        self.asked += 1
        try:
            Event().wait()
        except Exception:
            return True


@pytest.fixture
def start(serve):
    """`start(**gate)`: a proxy that admits one connection at a time."""

    def start(**options):
        keeper = LimitKeeper(Limits(client_connections=1))
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, "limits": keeper, **options})
        server = serve(ProxyHandler(gate))
        server.keeper = keeper
        return server

    return start


def requests(host, port):
    name = host.encode()
    return {
        "socks5": b"\x05\x01\x00\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack("!H", port),
        "socks4a": b"\x04\x01" + struct.pack("!H", port) + b"\0\0\0\x01me\0" + name + b"\0",
        "connect": f"CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        "http": f"GET http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        "upload": f"POST http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc".encode(),
    }


PROTOCOLS = list(requests("x", 1))


def close(client):
    client.close()


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def gone(server, lines):
    """The client's place is free again, and the log says why."""
    wait_until(lambda: not server.keeper.connections, 5)
    assert lines(1)[0]["result"] == "client_left"


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_leaves_while_a_name_is_looked_up_is_gone(start, connect, lines, protocol, leave):
    names = SilentNames()
    server = start(resolver=names)
    client = connect(server)
    client.sendall(requests("name.test", 80)[protocol])
    wait_until(lambda: names.asked)
    leave(client)
    gone(server, lines)


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_leaves_while_the_destination_is_connected_is_gone(start, connect, lines, protocol, leave):
    with full_listener() as full:
        server = start()
        client = connect(server)
        client.sendall(requests("127.0.0.1", full.getsockname()[1])[protocol])
        wait_until(lambda: server.keeper.connections)
        gevent.sleep(0.05)
        leave(client)
        gone(server, lines)


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize("answer", [b"", CHUNKED, CHUNKED.replace(b"Transfer-Encoding: chunked\r\n\r\n5\r\n", b"\r\n")])
def test_a_client_that_leaves_during_a_silent_answer_is_gone(start, serve, connect, lines, in_thread, answer, leave):
    ended = Event()

    def silent(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(answer)
        assert conn.recv(1) == b""
        ended.set()

    origin, server = serve(silent), start()
    client = connect(server)
    client.sendall(requests("127.0.0.1", origin.port)["http"])
    wait_until(lambda: origin.accepted_connections)
    if answer:
        assert in_thread(client.recv, 1000)
    leave(client)
    gone(server, lines)
    assert ended.wait(SOON)


@pytest.mark.parametrize("leave", [close, reset])
def test_a_client_that_leaves_while_its_password_is_checked_is_gone(start, connect, lines, leave):
    users = SlowPassword()
    server = start(
        client_rules=[parse_client_rule("allow from any to any with auth users")], authenticators={"users": users}
    )
    client = connect(server)
    client.sendall(socks(80, user=b"Ada")[:-11])
    wait_until(lambda: users.asked)
    leave(client)
    gone(server, lines)


# -- half-closed -------------------------------------------------------------------------------------------------------


def everything(client):
    data = b""
    while more := client.recv(65536):
        data += more
    return data


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_http_client_that_shuts_its_side_gets_its_answer(start, serve, connect, spawn_thread, version):
    go_on = Event()

    def slow(conn):
        conn.recv_until(b"\r\n\r\n")
        go_on.wait()
        conn.sendall(CHUNKED)
        go_on.clear()
        go_on.wait()
        conn.sendall(b"3\r\nend\r\n0\r\n\r\n")

    origin, server = serve(slow), start()
    client = connect(server)
    client.sendall(f"GET http://127.0.0.1:{origin.port}/ HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    client.shutdown(socket.SHUT_WR)
    got = spawn_thread(everything, client)
    gevent.sleep(0.5)
    go_on.set()
    gevent.sleep(0.5)
    go_on.set()
    data = got.get(timeout=SOON)
    interim, _, answer = data.rpartition(b"HTTP/1.1 200 OK\r\n")
    body = answer.partition(b"\r\n\r\n")[2]
    if version == "1.1":
        assert interim == b"HTTP/1.1 102 Processing\r\n\r\n"
        assert body == b"5\r\nhello\r\n3\r\nend\r\n0\r\n\r\n"
    else:
        assert not interim
        assert body == b"helloend"


def test_a_client_that_shuts_its_side_in_the_midst_of_an_answer_gets_the_rest(
    start, serve, connect, spawn_thread, in_thread
):
    go_on = Event()

    def slow(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(CHUNKED)
        go_on.wait()
        conn.sendall(b"3\r\nend\r\n0\r\n\r\n")

    origin, server = serve(slow), start()
    client = connect(server)
    client.sendall(requests("127.0.0.1", origin.port)["http"])
    first = in_thread(client.recv, 1000)
    client.shutdown(socket.SHUT_WR)
    got = spawn_thread(everything, client)
    gevent.sleep(0.5)
    go_on.set()
    body = (first + got.get(timeout=SOON)).partition(b"\r\n\r\n")[2]
    assert body == b"5\r\nhello\r\n03\r\nend\r\n0\r\n\r\n"  # RFC 9112 section 7.1: a size may begin with zeros


@pytest.mark.parametrize("protocol", ["socks5", "connect"])
def test_a_client_that_has_sent_its_data_and_shut_its_side_gets_its_tunnel(
    start, serve, connect, spawn_thread, protocol
):
    class SlowNames:
        def resolve(self, name):
            gevent.sleep(0.8)
            return (ip_address("127.0.0.1"),)

        def close(self):
            pass

    def shout(conn):
        data = b""
        while more := conn.recv(1000):
            data += more
        conn.sendall(data.upper())

    origin, server = serve(shout), start(resolver=SlowNames())
    client = connect(server)
    client.sendall(requests("name.test", origin.port)[protocol] + b"hello")
    client.shutdown(socket.SHUT_WR)
    assert spawn_thread(everything, client).get(timeout=SOON).endswith(b"HELLO")


def test_four_abandoned_attempts_do_not_lock_a_client_out(serve, connect, in_thread):
    keeper = LimitKeeper(Limits(client_connections=4))
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, limits=keeper)))
    echo = serve(lambda conn: conn.sendall(OK))
    with full_listener() as full:
        for client in [connect(server) for _ in range(4)]:
            client.sendall(socks(full.getsockname()[1]))
            wait_until(lambda: keeper.connections)
            client.close()
        wait_until(lambda: not keeper.connections, 5)
        assert in_thread(reply, connect(server), socks(echo.port)) == 0
