"""A SOCKS client that shuts its side right behind its request has not given up."""

import socket
import struct
from ipaddress import ip_address

import gevent
import pytest
from gevent.event import Event

from gtcpserver.proxy import departures, handler
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.visitor import admit
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, bind_request
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(departures, "INTERVAL", 0.03)
    monkeypatch.setattr(departures, "ROUND_TRIP", 0.03)
    monkeypatch.setattr(departures, "GRACE", 0.1)


class SlowNames:
    def __init__(self):
        self.go_on = Event()
        self.asked = 0

    def resolve(self, name):
        self.asked += 1
        self.go_on.wait()
        return (ip_address("127.0.0.1"),)

    def close(self):
        pass


@pytest.fixture
def names():
    return SlowNames()


@pytest.fixture
def proxy(serve, names):
    keeper = LimitKeeper(Limits(client_connections=1))
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, limits=keeper, resolver=names)))
    server.keeper = keeper
    return server


def requests(port):
    where = struct.pack("!H", port)
    return {
        "socks5": (b"\x05\x01\x00", b"\x05\x01\x00\x03\x09name.test" + where),
        "socks4a": (b"", b"\x04\x01" + where + b"\0\0\0\x01me\0name.test\0"),
    }


def ask(client, protocol, port, data=b""):
    """State the request, and shut the writing side right behind it."""
    greeting, request = requests(port)[protocol]
    if greeting:
        client.sendall(greeting)
        assert client.recv(2) == b"\x05\x00"
    client.sendall(request + data)
    client.shutdown(socket.SHUT_WR)


def everything(client):
    data = b""
    while more := client.recv(65536):
        data += more
    return data


def wait_for_probe(names):
    wait_until(lambda: names.asked)
    gevent.sleep(0.3)  # many looks, and more than GRACE


@pytest.mark.parametrize("protocol", ["socks5", "socks4a"])
@pytest.mark.parametrize("data", [b"", b"data"])
def test_it_gets_its_reply_and_what_the_destination_sends(
    proxy, serve, names, connect, in_thread, spawn_thread, protocol, data
):
    origin = serve(lambda conn: conn.sendall(b"hello " + (conn.recv(10))))
    client = connect(proxy)
    in_thread(ask, client, protocol, origin.port, data)
    got = spawn_thread(everything, client)
    wait_for_probe(names)
    names.go_on.set()
    reply = got.get(timeout=SOON)
    size = 10 if protocol == "socks5" else 8
    assert reply[:2] == (b"\x05\x00" if protocol == "socks5" else b"\x00\x5a")
    assert reply[size:] == b"hello " + data


@pytest.mark.parametrize("protocol", ["socks5", "socks4a"])
def test_it_is_told_that_the_destination_refuses(proxy, names, connect, in_thread, spawn_thread, protocol):
    client = connect(proxy)
    in_thread(ask, client, protocol, free_port())
    got = spawn_thread(everything, client)
    wait_for_probe(names)
    names.go_on.set()
    expected = b"\x05\x05\x00\x01" + bytes(6) if protocol == "socks5" else b"\x00\x5b" + bytes(6)
    assert got.get(timeout=SOON) == expected


@pytest.mark.parametrize("version", [4, 5])
def test_a_probe_is_the_beginning_of_the_first_reply_to_bind(proxy, names, connect, in_thread, spawn_thread, version):
    client = connect(proxy)
    if version == 5:
        client.sendall(b"\x05\x01\x00")
        assert in_thread(client.recv, 2) == b"\x05\x00"
        request = b"\x05\x02\x00\x03\x09name.test\0\0"
    else:
        request = b"\x04\x02\0\0\0\0\0\x01me\0name.test\0"
    assert request[:2] == bind_request(version=version)[:2]
    client.sendall(request)
    client.shutdown(socket.SHUT_WR)
    got = spawn_thread(client.recv, 1)
    wait_for_probe(names)
    assert got.get(timeout=SOON) == (b"\x05" if version == 5 else b"\0")
    names.go_on.set()
    assert in_thread(client.recv, 1) == (b"\0" if version == 5 else b"\x5a")


@pytest.mark.parametrize("protocol", ["socks5", "socks4a"])
def test_one_that_is_gone_is_still_noticed(proxy, names, connect, in_thread, lines, protocol):
    client = connect(proxy)
    in_thread(ask, client, protocol, 80)
    client.close()
    wait_until(lambda: not proxy.keeper.connections, 5)
    assert lines(1)[0]["result"] == "client_left"


def test_the_hops_of_a_failed_connect_do_not_count_for_the_next_request(serve, connect, in_thread, monkeypatch):
    visitors = []

    def noting(gate, conn):
        visitors.append(admit(gate, conn))
        return visitors[-1]

    monkeypatch.setattr(handler, "admit", noting)
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    client = connect(server)
    request = f"CONNECT 127.0.0.1:{free_port()} HTTP/1.1\r\nHost: x\r\nVia: 1.1 gtcpserver (hop 7)\r\n\r\n"
    client.sendall(request.encode())
    assert in_thread(client.recv, 1000).startswith(b"HTTP/1.1 502")
    assert [visitor.hops for visitor in visitors] == [0]
