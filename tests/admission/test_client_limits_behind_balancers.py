"""Limits of clients where a balancer names them: at once, or later by the handler, or not at all."""

import os
import socket
import struct
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import gevent
import pytest

from gtcpserver import ClientLimits, ClientRefused, ProxyProtocol
from gtcpserver.admission import client_limits as module
from gtcpserver.admission.proxy_header import network_address, read_proxy_header
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.proxy_protocol import ProxyHeader, Transport
from kit.clients import client_from, is_served
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, reply, socks
from kit.waiting import wait_until

HERE = ProxyProtocol(["127.0.0.0/8"], timeout=SOON)
TWO = (ip_address("192.0.2.1"), 443)


def header(source, **options):
    return ProxyHeader((ip_address(source), 1234), TWO, **options).to_bytes()


UNIX = ProxyHeader(b"/run/client", b"/run/balancer").to_bytes()
ADDRESSES = struct.pack("!4s4sHH", b"\x7f\0\0\1", b"\x7f\0\0\1", 1, 2)
#: Headers that name nobody on the network.
NAMELESS = {
    "unix": UNIX,
    "unnamed unix": ProxyHeader(b"", b"").to_bytes(),
    "abstract unix": ProxyHeader(b"\0name", b"\0other").to_bytes(),
    "unknown": b"PROXY UNKNOWN 127.0.0.1 127.0.0.1 1 2\r\n",
    "local": ProxyHeader(local=True, transport=Transport.UNSPECIFIED).to_bytes(),
    # What LOCAL, UNSPEC and datagrams carry of addresses is ignored.
    "local with an address": b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x0c" + ADDRESSES,
    "unspec with an address": b"\r\n\r\n\0\r\nQUIT\n\x21\x01\0\x0c" + ADDRESSES,
    "datagrams": header("127.0.0.1", transport=Transport.DATAGRAM),
    "datagrams of unix": ProxyHeader(b"/a", b"/b", transport=Transport.DATAGRAM).to_bytes(),
}


def reads_header(conn):
    """A handler that finds out by itself who its client is, as a listener of the proxy does."""
    read_proxy_header(conn, HERE)
    echo(conn)


def assigns(conn):
    conn.client_address = (conn.recv_until(b"\n")[:-1].decode(), 1)
    echo(conn)


# -- counted out as counted in -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("handler", [reads_header, assigns])
def test_connections_of_named_clients_are_counted_out_as_they_were_counted_in(serve, connect, in_thread, handler):
    """As the balancer in, and as the client out, would refuse everybody after some connections, for good."""
    limits = ClientLimits(connections=3)
    server = serve(handler, client_limits=limits)
    for number in range(10):
        client = connect(server)
        client.sendall(header(f"192.0.2.{number}") if handler is reads_header else b"192.0.2.%d\n" % number)
        assert is_served(client, in_thread), number
        client.close()
        wait_until(lambda: not server.active_connections)
    assert limits.counted == 0
    assert limits.refused == {}


def test_an_assigned_address_need_not_be_one(serve, connect, in_thread):
    limits = ClientLimits(connections=1)

    def handler(conn):
        conn.client_address = ("not an address",)
        echo(conn)

    server = serve(handler, client_limits=limits)
    for _ in range(3):
        client = connect(server)
        assert is_served(client, in_thread)
        client.close()
        wait_until(lambda: not server.active_connections)
    assert limits.counted == 0


@pytest.mark.parametrize("how", ["proxy_protocol", "by the handler"])
def test_the_proxy_serves_a_balancer_for_long(serve, connect, in_thread, how):
    """A listener's own proxy_protocol, with the limits of the server or of the proxy."""
    limits, keeper = ClientLimits(connections=2), LimitKeeper(Limits(client_connections=2))
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, limits=keeper)
    origin = serve(echo)
    if how == "by the handler":
        server = serve(ProxyHandler(gate, proxy_protocol=HERE), client_limits=limits)
    else:
        server = serve(ProxyHandler(gate), client_limits=limits, proxy_protocol=HERE)
    for number in range(6):
        client = connect(server)
        client.sendall(header(f"192.0.2.{number}"))
        assert in_thread(reply, client, socks(origin.port)) == 0
        client.close()
        wait_until(lambda: not server.active_connections)
    assert limits.counted == keeper.counted == 0
    assert keeper.connections == 0


# -- the client is counted where it is named ---------------------------------------------------------------------------


def test_the_named_client_is_counted_and_refused(serve, connect, in_thread, lines):
    limits = ClientLimits(connections=2, deny=["198.51.100.0/24"])
    server = serve(reads_header, client_limits=limits, access_log="json")

    def come_as(source):
        client = connect(server)
        client.sendall(header(source))
        return client

    held = [come_as("192.0.2.7") for _ in range(2)]
    assert all(is_served(client, in_thread) for client in held)
    assert not is_served(come_as("192.0.2.7"), in_thread)
    assert not is_served(come_as("198.51.100.1"), in_thread)
    # The balancer's own places are free again.
    assert all(is_served(come_as(f"192.0.2.{number}"), in_thread) for number in (8, 9, 10))
    assert [line["result"] for line in lines(2)] == ["client_connections", "client_denied"]
    assert server.stats().clients_refused == {"client_connections": 1, "client_denied": 1}
    assert server.stats().handler_errors == 0
    held[0].close()
    wait_until(lambda: server.active_connections == 4)
    assert is_served(come_as("192.0.2.7"), in_thread)
    server.stop(0)
    assert limits.counted == 0


def test_what_is_refused_is_reset_and_the_handler_told(serve, connect, in_thread):
    raised = []

    def handler(conn):
        try:
            read_proxy_header(conn, HERE)
        except ClientRefused as error:
            raised.append(error.reason)
            raise

    server = serve(handler, client_limits=ClientLimits(deny=["192.0.2.7"]))
    client = connect(server)
    client.sendall(header("192.0.2.7"))
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    assert raised == ["client_denied"]


def test_refusals_write_no_line_each(serve, connect, in_thread, caplog):
    server = serve(reads_header, client_limits=ClientLimits(deny=["192.0.2.7"]))
    for _ in range(20):
        client = connect(server)
        client.sendall(header("192.0.2.7"))
        assert not is_served(client, in_thread)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]
    assert server.stats().clients_refused == {"client_denied": 20}


def test_the_rate_of_a_balancer_is_not_used_up_by_its_clients(serve, connect, in_thread, monkeypatch):
    monkeypatch.setattr(module, "monotonic", lambda: 1000.0)
    limits = ClientLimits(new_per_second=0.1, burst=2)
    server = serve(reads_header, client_limits=limits)
    for number in range(6):
        client = connect(server)
        client.sendall(header(f"192.0.2.{number}"))
        assert is_served(client, in_thread)
    for expected in (True, False, False):
        client = connect(server)
        client.sendall(header("192.0.2.0"))
        assert is_served(client, in_thread) is expected
    assert limits.refused == {"client_rate": 2}


def test_the_proxy_refuses_whom_the_limits_of_the_server_refuse(serve, connect, in_thread, lines):
    limits = ClientLimits(connections=1, deny=["198.51.100.1"])
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    server, origin = serve(ProxyHandler(gate, proxy_protocol=HERE), client_limits=limits), serve(echo)
    first = connect(server)
    first.sendall(header("192.0.2.7"))
    assert in_thread(reply, first, socks(origin.port)) == 0
    for source in ("192.0.2.7", "198.51.100.1"):
        client = connect(server)
        client.sendall(header(source))
        with pytest.raises(ConnectionResetError):
            in_thread(client.recv, 1)
        lines(1 if source == "192.0.2.7" else 2)
    said = [(line["client"], line["result"], line["detail"]) for line in lines(2)]
    assert said == [
        ("192.0.2.7", "limit", "client_connections"),
        ("198.51.100.1", "client_denied", "client_denied"),
    ]


def test_a_connection_that_ended_meanwhile_is_counted_for_nobody(serve, connect):
    limits, noted = ClientLimits(connections=5), []

    def handler(conn):
        gevent.spawn_later(0, late, conn)

    def late(conn):
        conn.note_proxy_header(ProxyHeader((ip_address("192.0.2.7"), 1), TWO))
        noted.append(conn.client_address)

    server = serve(handler, client_limits=limits)
    connect(server).close()
    wait_until(lambda: noted)
    assert limits.counted == 0


# -- those who are named by no address ---------------------------------------------------------------------------------


@contextmanager
def seen_by(serve, header_bytes, source="127.0.0.2"):
    """What a handler learns of a connection with this header."""
    seen = []

    def handler(conn):
        seen.append((conn.client_address, network_address(conn), conn.proxy_header))
        echo(conn)

    server = serve(handler, proxy_protocol=HERE)
    with client_from(server, source) as client:
        client.sendall(header_bytes)
        wait_until(lambda: seen)
        yield seen[0]


@pytest.mark.parametrize("kind", NAMELESS)
def test_who_has_no_address_is_known_by_the_balancers(serve, kind):
    with seen_by(serve, NAMELESS[kind]) as (client, known_by, told):
        assert known_by[0] == "127.0.0.2"
        if "unix" in kind and kind != "datagrams of unix":
            assert client == os.fsdecode(told.source)
        else:
            assert client == known_by


@pytest.mark.parametrize("reader", ["server", "listener"])
@pytest.mark.parametrize("kind", NAMELESS)
def test_a_nameless_client_is_not_on_this_host_for_the_rules_of_the_proxy(serve, in_thread, lines, kind, reader):
    """A process on the balancer's host is not one on the proxy's, however its balancer was reached."""
    gate = Gate(client_rules=[parse_client_rule("allow 127.0.0.1")], destination_rules=ANYWHERE)
    if reader == "server":
        server = serve(ProxyHandler(gate), proxy_protocol=HERE)
    else:
        server = serve(ProxyHandler(gate, proxy_protocol=HERE))
    origin = serve(echo)
    with client_from(server, "127.0.0.2") as client:
        client.sendall(NAMELESS[kind])
        assert in_thread(reply, client, socks(origin.port)) is None
    assert [(line["client"], line["result"]) for line in lines()] == [("127.0.0.2", "client_denied")]


@pytest.mark.parametrize("kind", NAMELESS)
def test_nameless_clients_have_the_limits_of_their_balancer(serve, in_thread, kind):
    limits = ClientLimits(connections=1, deny=["127.0.0.3"])
    server = serve(echo, client_limits=limits, proxy_protocol=HERE)
    with ExitStack() as stack:
        for source, expected in (("127.0.0.2", True), ("127.0.0.2", False), ("127.0.0.3", False)):
            client = stack.enter_context(client_from(server, source))
            client.sendall(NAMELESS[kind])
            assert is_served(client, in_thread) is expected
        server.halt()
    assert limits.counted == 0


def test_a_unix_client_of_another_host_is_no_balancer_by_a_unix_socket(serve, connect, in_thread):
    """Two headers, as where the server reads one and a listener another: the first does not make its sender ours."""
    second = ProxyProtocol(["unix"], timeout=SOON)
    seen = []

    def handler(conn):
        read_proxy_header(conn, second)
        seen.append(conn.recv(8))

    server = serve(handler, proxy_protocol=HERE)
    client = connect(server)
    client.sendall(UNIX + header("10.0.0.1", version=1))
    wait_until(lambda: seen)
    assert seen == [b"PROXY TC"]


def test_by_a_unix_socket_from_a_balancer_on_this_host(serve, connect, in_thread, tmp_path):
    gate = Gate(client_rules=[parse_client_rule("allow 127.0.0.1")], destination_rules=ANYWHERE)
    server = serve(ProxyHandler(gate), f"unix:{tmp_path}/sock", proxy_protocol=ProxyProtocol(["unix"]))
    origin = serve(echo)
    client = connect(server)
    client.sendall(UNIX)
    assert in_thread(reply, client, socks(origin.port)) == 0
    client.sendall(b"x")
    assert in_thread(client.recv, 1, socket.MSG_WAITALL) == b"x"
