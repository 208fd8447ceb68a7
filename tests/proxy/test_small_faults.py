"""Clients and networks that are a little unusual."""

import socket
from ipaddress import ip_address

import pytest

from gtcpserver.proxy import dial as dialling
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_destination_rule
from kit.clients import read
from kit.forwarding import OK
from kit.handlers import echo
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, LOOPBACK, reply, socks
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


class Names:
    def __init__(self, *addresses):
        self.addresses = tuple(map(ip_address, addresses))

    def resolve(self, name):
        return self.addresses

    def close(self):
        pass


@pytest.mark.parametrize(
    ("addresses", "code"),
    [
        (["2001:db8::1", "127.0.0.1"], 5),
        (["127.0.0.1", "2001:db8::1"], 5),
        (["2001:db8::1"], 3),
        (["2001:db8::1", "2001:db8::2"], 3),
    ],
)
def test_the_reply_is_about_the_destination_and_not_about_the_lack_of_ipv6(
    serve, connect, in_thread, monkeypatch, addresses, code
):
    connect_to = dialling._connect

    def without_ipv6(ip, *arguments):
        if ip.version == 6:
            raise OSError(101, "Network is unreachable")
        return connect_to(ip, *arguments)

    monkeypatch.setattr(dialling, "_connect", without_ipv6)
    rules = [*ANYWHERE, parse_destination_rule("allow 2001:db8::/32")]
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=rules, resolver=Names(*addresses))))
    assert in_thread(reply, connect(server), socks(free_port(), "both.test")) == code


def test_a_socks5_client_that_offers_a_password_alone_is_let_in_where_none_is_needed(serve, connect, in_thread, lines):
    origin = serve(echo)
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port, user=b"ada", password=b"any")) == 0
    client.sendall(b"hello")
    assert in_thread(read, client, 5) == b"hello"
    client.close()
    assert (lines()[0]["user"], lines()[0]["claimed"]) == (None, "ada")


def test_a_client_that_offers_both_is_not_asked(serve, connect, in_thread):
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY)))
    client = connect(server)
    client.sendall(b"\x05\x02\x02\x00")
    assert in_thread(read, client, 2) == b"\x05\x00"


@pytest.mark.parametrize("protocol", ["socks5", "connect"])
@pytest.mark.parametrize("back", [False, True])
def test_an_urgent_byte_stays_in_its_place(serve, connect, in_thread, protocol, back):
    got = []

    def origin(conn):
        if back:
            conn.recv(1)
            conn.sendall(b"ab")
            conn.stream.sock.send(b"\xf2", socket.MSG_OOB)
            conn.sendall(b"cd")
            conn.recv(1)
            return
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        got.append(conn.recv_exactly(5))

    target, server = serve(origin), serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    client = connect(server)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    if protocol == "socks5":
        assert in_thread(reply, client, socks(target.port)) == 0
    else:
        client.sendall(f"CONNECT 127.0.0.1:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in in_thread(client.recv, 100)
    if back:
        client.sendall(b"!")
        assert in_thread(read, client, 5) == b"ab\xf2cd"
        return
    client.sendall(b"ab")
    client.send(b"\xf2", socket.MSG_OOB)
    client.sendall(b"cd")
    wait_until(lambda: got)
    assert got == [b"ab\xf2cd"]


@pytest.mark.parametrize("via", ["on", "off"])
def test_via_can_be_left_out(serve, origin, client, via):
    target = origin(OK)
    text = f'[[listener]]\nlisten = "127.0.0.1:0"\n[http]\nvia = "{via}"\npseudonym = "me"\n{LOOPBACK}'
    visitor = client(serve(make_proxy(parse_config(text)).handler))
    _, fields, _ = visitor.get(f"{target.url}/", "Via: 1.1 other")
    assert fields["via"] == ("1.1 me" if via == "on" else None)
    assert (b"Via: 1.1 me" in target.heads[0]) == (via == "on")
    assert b"Via: 1.1 other" in target.heads[0]
