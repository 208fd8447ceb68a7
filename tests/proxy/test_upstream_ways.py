"""Upstreams: which way names lead, and what is said when one does not get there."""

import socket
import struct
from ipaddress import ip_address

import gevent.socket
import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.resolve import ResolveTimeout
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.clients import read
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYWHERE, http, reply, socks

# -- which way, when names change or are not known ---------------------------------------------------------------------


class Names:
    """A resolver that gives these answers, one after the other: addresses, or an error."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def resolve(self, name):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return tuple(map(ip_address, answer))

    def close(self):
        pass


@pytest.fixture
def proxy_with(serve):
    """`proxy_with(resolver, *rules)` starts a proxy whose upstream "up" leads to nobody."""

    def start(resolver, *rules):
        gate = Gate(
            client_rules=[parse_client_rule("allow any")],
            destination_rules=ANYWHERE,
            upstreams={"up": parse_upstream("up", f"socks5://127.0.0.1:{free_port()}")},
            upstream_rules=[parse_upstream_rule(rule) for rule in rules],
            resolver=resolver,
        )
        return serve(ProxyHandler(gate))

    return start


NOT_NOW = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
TOO_LATE = ResolveTimeout("no answer about name.example within 10 seconds")


@pytest.mark.parametrize(("error", "result"), [(NOT_NOW, "unresolved"), (TOO_LATE, "resolve_timeout")])
def test_requirement_15_a_name_that_is_not_known_goes_no_way_where_its_address_decides(
    proxy_with, serve, connect, in_thread, lines, error, result
):
    came = []
    # A second look-up would find it, and what is left of the rules leads directly there.
    origin = serve(lambda conn: came.append(conn))
    servers = [proxy_with(Names(error, ["127.0.0.1"]), "through up 10.0.0.0/8") for _ in range(2)]
    assert in_thread(reply, connect(servers[0]), socks(origin.port, "name.example")) == 4
    head = b"GET http://name.example:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port
    status = b"504" if error is TOO_LATE else b"502"
    assert in_thread(http, connect(servers[1]), head).split()[1] == status
    for line in lines(2):
        assert (line["result"], line["upstream"], line["resolved"] is None) == (result, None, False)
    assert not came


def test_a_name_whose_way_its_name_decides_is_not_looked_up_first(proxy_with, connect, in_thread, lines):
    server = proxy_with(Names(["127.0.0.1"]), "through up .example", "through direct 10.0.0.0/8")
    assert in_thread(reply, connect(server), socks(80, "name.example")) == 1
    assert lines()[0]["upstream"] == "up"


@pytest.mark.parametrize(("found", "by"), [("127.0.0.1", "up"), ("127.0.0.2", None)])
def test_requirement_15_the_addresses_that_choose_the_way_are_those_that_are_checked_and_connected_to(
    proxy_with, serve, connect, in_thread, lines, found, by
):
    names = Names([found], ["127.0.0.1"], ["127.0.0.2"])
    server = proxy_with(names, "through up 127.0.0.1")
    origin = serve(lambda conn: None, "127.0.0.2:0")
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port, "name.example")) == (1 if by else 0)
    client.close()
    assert lines()[0]["upstream"] == by
    assert len(names.answers) == 2


def test_requirement_15_neither_bind_nor_datagrams_go_past_an_upstream_that_may_be_meant(
    proxy_with, connect, in_thread, lines
):
    server = proxy_with(Names(NOT_NOW, NOT_NOW, ["127.0.0.1"]), "through up 10.0.0.0/8")
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x02\x00\x03\x0cname.example\x00\x00")
    assert in_thread(read, client, 4)[2:] == b"\x05\x04"
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
    where = ("127.0.0.1", struct.unpack("!H", in_thread(read, client, 12)[10:])[0])
    with socket.socket(type=socket.SOCK_DGRAM) as origin, gevent.socket.socket(type=socket.SOCK_DGRAM) as ours:
        origin.bind(("127.0.0.1", 0))
        ours.bind(("127.0.0.1", 0))
        ours.settimeout(SOON)
        for data in (b"lost", b"sent"):
            ours.sendto(b"\0\0\0\x03\x0cname.example" + struct.pack("!H", origin.getsockname()[1]) + data, where)
        origin.settimeout(SOON)
        assert in_thread(origin.recv, 10) == b"sent"


# -- several addresses, several proxies --------------------------------------------------------------------------------


@pytest.mark.slow
def test_requirement_31_an_address_that_does_not_answer_leaves_time_for_the_others(
    proxy_by, serve, connect, in_thread, lines
):
    def other(conn):
        conn.recv(3)
        conn.sendall(b"\x05\x00")
        if conn.recv_exactly(10)[7] == 1:
            conn.recv(1)  # it does not answer about 127.0.0.1
            return
        conn.sendall(b"\x05\x00\x00\x01" + bytes(6) + b"hello")
        conn.recv(1)

    server = proxy_by(
        parse_upstream("up", f"socks5://{serve(other).address}"),
        resolver=Names(["127.0.0.1", "127.0.0.2"]),
        timeouts=Timeouts(connect=0.4),
    )
    client = connect(server)
    assert in_thread(reply, client, socks(80, "name.example")) == 0
    assert in_thread(read, client, 5) == b"hello"
    client.close()
    (line,) = lines()
    assert line["connected"] == "127.0.0.2:80"
    assert 0.2 <= line["opened"] < 0.4


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_requirement_07_a_chain_whose_second_proxy_refuses_is_not_taken_for_the_destination(
    proxy_by, serve, connect, in_thread, lines, scheme
):
    first = serve(ProxyHandler(Gate(client_rules=[parse_client_rule("allow any")], destination_rules=ANYWHERE)))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        one = parse_upstream("one", f"socks5://{first.address}")
        two = parse_upstream("two", f"{scheme}://127.0.0.1:{nobody.getsockname()[1]}", one)
        server = proxy_by(two, resolver=Names(["127.0.0.1", "127.0.0.2"]))
        assert in_thread(reply, connect(server), socks(80, "name.example")) == 1
        answer = in_thread(http, connect(server), b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"next proxy" in answer
    ours = [line for line in lines(4) if line["upstream"]]
    # Once, and not for each address of the destination.
    assert len(lines(4)) == 4
    for line in ours:
        assert (line["result"], line["upstream"]) == ("upstream_failed", "two")
        assert line["detail"] == "upstream two cannot be reached: upstream one says: connection refused"


def test_requirement_07_ttl_expired_is_passed_on(proxy_by, serve, connect, in_thread, lines):
    def other(conn):
        conn.recv(3)
        conn.sendall(b"\x05\x00")
        conn.recv_exactly(10)
        conn.sendall(b"\x05\x06\x00\x01" + bytes(6))
        conn.recv(1)

    server = proxy_by(parse_upstream("up", f"socks5://{serve(other).address}"))
    assert in_thread(reply, connect(server), socks(80)) == 6
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("unreachable", "upstream up says: ttl expired")


def test_a_proxy_that_resets_has_failed(proxy_by, serve, connect, in_thread, lines):
    server = proxy_by(parse_upstream("up", f"socks5://{serve(lambda conn: (conn.recv(3), conn.abort())).address}"))
    assert in_thread(reply, connect(server), socks(80)) == 1
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("upstream_failed", "upstream up: Connection reset by peer")


# -- passwords ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["socks5://ada:{}@x", "socks5://ada:{}@x:1/p", "ftp://ada:{}@x:1", "ada:{}@x:1"])
@pytest.mark.parametrize(
    "password", ["sec/ret", "sec@ret", "sec#ret", "sec?ret", "sec:ret", "[sec]ret", "s\u2100sec/ret"]
)
def test_requirement_37_no_message_has_the_password_of_an_upstream(url, password):
    with pytest.raises(ConfigError) as raised:
        parse_upstream("a", url.format(password))
    assert "sec" not in str(raised.value)
    assert "ret" not in str(raised.value)
    assert "@x" in str(raised.value)
    # Where the rest is right it is the password that was meant.
    one = parse_upstream("a", f"socks5://ada:{password}@x:1")
    assert (one.user, one.password, str(one.target)) == (b"ada", password.encode(), "x:1")
    assert "sec" not in repr(one)
