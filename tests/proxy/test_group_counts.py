"""Connections of a group's members are counted in the same time however many are open, and none stays counted."""

import gc
import socket
import struct

import pytest

from gtcpserver import ConfigError, ConnectionPool, HandlerPool, ListenConfig, Server
from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.proxy import upstream_group
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.upstream_group import UpstreamGroup
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.forwarding import OK
from kit.handlers import echo
from kit.proxying import ANYBODY, ANYWHERE, http, reply, socks
from kit.waiting import wait_until


@pytest.fixture
def group(serve):
    far = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    urls = [f"socks5://127.0.0.1:{far.port}", f"http://127.0.0.1:{far.port}"]
    members = [parse_upstream(f"far-{number}", url) for number, url in enumerate(urls)]
    return UpstreamGroup("far", members, "least-connections")


@pytest.fixture
def near(serve, group):
    return serve(
        ProxyHandler(
            Gate(
                client_rules=ANYBODY,
                destination_rules=ANYWHERE,
                upstreams={"far": group},
                upstream_rules=[parse_upstream_rule("through far any")],
            )
        )
    )


@pytest.fixture
def no_gc():
    gc.disable()
    yield
    gc.enable()


def counts(group):
    return [member.connections for member in group.members]


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.usefixtures("no_gc")
def test_no_connection_stays_counted_however_it_ends(serve, connect, in_thread, group, near):
    origin = serve(echo)
    ways = [socket.socket.close, reset, lambda client: client.shutdown(socket.SHUT_WR)]
    clients = [connect(near) for _ in range(6)]
    for number, client in enumerate(clients, 1):
        assert in_thread(reply, client, socks(origin.port)) == 0
        assert sum(counts(group)) == number
    assert counts(group) == [3, 3]
    for number, client in enumerate(clients):
        ways[number % 3](client)
    wait_until(lambda: counts(group) == [0, 0], 5)


@pytest.mark.usefixtures("no_gc")
def test_no_connection_of_a_request_stays_counted(serve, connect, in_thread, group, near, origin):
    to = origin(OK, OK, OK)
    request = f"GET {to.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    client = connect(near)
    for _ in range(2):
        assert in_thread(http, client, request).startswith(b"HTTP/1.1 200")
        assert sum(counts(group)) == 1
    client.close()
    wait_until(lambda: counts(group) == [0, 0], 5)


@pytest.mark.usefixtures("no_gc")
def test_a_tunnel_that_is_ended_is_not_counted(serve, connect, in_thread, group, near):
    origin = serve(echo)
    assert in_thread(reply, connect(near), socks(origin.port)) == 0
    near.halt()
    wait_until(lambda: counts(group) == [0, 0], 5)


class Counting:
    """An open connection that knows how often it was looked at."""

    looks = 0
    fd = 7

    def fileno(self):
        Counting.looks += 1
        return self.fd


def test_open_connections_are_looked_at_once_a_second(group, monkeypatch):
    opened = [Counting() for _ in range(1000)]
    for one in opened:
        group.members[0].add(one)
    monkeypatch.setattr(upstream_group, "LOOK_EVERY", 60)
    for _ in range(100):
        assert counts(group) == [1000, 0]
    assert Counting.looks == 1000
    opened[0].fd = -1  # closed, and somebody still has it
    monkeypatch.setattr(upstream_group, "LOOK_EVERY", 0)
    assert counts(group) == [999, 0]


# -- numbers -----------------------------------------------------------------------------------------------------------

A, B = (parse_upstream(name, "http://192.0.2.1:1") for name in "ab")


@pytest.mark.parametrize("huge", [10**20, 10**400, 10**5000], ids=["20", "400", "5000"])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda huge: UpstreamGroup("g", [A, B], weights=[1, huge]), "weights must be a whole number from 1 to 65535"),
        (lambda huge: UpstreamGroup("g", [A], fall=huge), "fall must be a whole number from 1 to "),
        (lambda huge: UpstreamGroup("g", [A], check_every=-huge), "check_every must be a number, more than 0"),
        (lambda huge: HandlerPool(huge), "pool size must be a whole number from 0 to "),
        (lambda huge: HandlerPool(-huge), "pool size must be a whole number from 0"),
        (lambda huge: Server("127.0.0.1:0", echo, pool=huge), "pool size must be a whole number from 0 to "),
        (lambda huge: Server("127.0.0.1:0", echo, max_accepts=huge), "max_accepts must be a whole number from 1 to "),
        (lambda huge: ConnectionPool("127.0.0.1:1", size=huge), "size must be a whole number from 1 to "),
        (lambda huge: ListenConfig(backlog=huge), "backlog must be a whole number from 1 to "),
        (lambda huge: check_whole_number("n", huge, least=0), "n must be a whole number from 0 to "),
        (lambda huge: check_number("n", -huge, least=0), "n must be a number, 0 or more"),
    ],
)  # fmt: skip
def test_huge_numbers_are_refused_by_name(make, told, huge):
    with pytest.raises(ConfigError) as caught:
        make(huge)
    assert str(caught.value).startswith(told)
    assert len(str(caught.value)) < 200


def test_a_group_has_members():
    with pytest.raises(ConfigError, match="members must have at least one upstream, got none"):
        UpstreamGroup("g", [])
