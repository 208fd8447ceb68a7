"""Groups of upstreams: which member is asked, and what happens when one cannot be reached."""

import errno
import logging
import socket
from collections import Counter
from ipaddress import ip_address

import pytest

from gtcpserver import ConfigError
from gtcpserver.proxy.errors import UpstreamUnreachable
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.upstream_group import UpstreamGroup
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.clients import read
from kit.handlers import echo
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, full_listener, http, reply, socks
from kit.waiting import wait_until

CLIENT = ip_address("192.0.2.1")
WHY = UpstreamUnreachable(5, "connection refused")


def group(*names, strategy="first", **options):
    return UpstreamGroup("pool", [parse_upstream(name, "http://192.0.2.1:1") for name in names], strategy, **options)


def order(one, client=CLIENT):
    return "".join(member.upstream.name for member in one.in_order(client))


class FakeConnection:
    """As far as a group knows one."""

    def fileno(self):
        return 7


@pytest.mark.parametrize("through", [None, parse_upstream("first", "http://192.0.2.2:1")])
def test_a_proxy_is_not_blamed_for_what_this_host_lacks(through):
    def dial(target):
        raise OSError(errno.EMFILE, "too many open files")

    with pytest.raises(OSError, match="too many open files") as caught:
        parse_upstream("a", "http://192.0.2.1:1", through).reach(dial, FakeConnection())
    assert not isinstance(caught.value, UpstreamUnreachable)


def test_first_and_round_robin():
    assert [order(group("a", "b", "c"))] * 3 == ["abc"] * 3
    turns = group("a", "b", "c", strategy="round-robin")
    assert [order(turns)[0] for _ in range(6)] == list("abcabc")
    turns = group("a", "b", "c", strategy="round-robin", weights=[4, 1, 1])
    taken = "".join(order(turns)[0] for _ in range(12))
    assert Counter(taken) == {"a": 8, "b": 2, "c": 2}
    assert "aaaaa" not in taken  # spread, not in blocks
    assert {"".join(sorted(order(turns))) for _ in range(6)} == {"abc"}


def test_least_connections():
    one = group("a", "b", strategy="least-connections", weights=[2, 1])
    open_now = [FakeConnection() for _ in range(3)]
    taken = ""
    for connection in open_now:
        chosen = one.in_order(CLIENT)[0]
        taken += chosen.upstream.name
        chosen.add(connection)
    assert taken in ("aba", "baa")
    del open_now[:], connection
    assert [member.connections for member in one.members] == [0, 0]


def test_a_client_keeps_its_member_and_its_second_choice():
    clients = [ip_address(f"192.0.2.{number}") for number in range(250)]
    one, less = group("a", "b", "c", strategy="hash-client"), group("a", "b", strategy="hash-client")
    for client in clients:
        assert order(one, client) == order(one, client)
        assert order(less, client) == order(one, client).replace("c", "")  # without c its clients alone move
    shares = Counter(order(one, client)[0] for client in clients)
    assert min(shares.values()) > 50
    heavy = group("a", "b", strategy="hash-client", weights=[9, 1])
    assert Counter(order(heavy, client)[0] for client in clients)["a"] > 200
    # An IPv6 client is its /64.
    assert len({order(one, ip_address(f"2001:db8::{number}")) for number in range(1, 50)}) == 1


def test_a_member_that_is_down_is_asked_last_until_it_is_up(caplog):
    caplog.set_level(logging.INFO, "gtcpserver")
    one = group("a", "b", fall=2, rise=2, check_every=0.001)
    a = one.members[0]
    answers = [WHY, None, WHY, None, None]

    def check(upstream, how):
        assert (upstream, how.kind) == (a.upstream, "tcp")
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    one.begin_checks(check)
    one.note_unreachable(a, WHY)
    one.note_reached(a)
    one.note_unreachable(a, WHY)
    assert order(one) == "ab"  # not in a row
    for _ in range(5):
        one.note_unreachable(a, WHY)
    assert order(one) == "ba"
    wait_until(lambda: order(one) == "ab")
    assert (answers, a.failures, one._checking) == ([], 0, {})
    assert [record.getMessage() for record in caplog.records] == [
        "upstream a of pool is down: connection refused",
        "upstream a of pool is up",
    ]
    assert one.counters == {"upstream_down": 1, "upstream_up": 1}
    for _ in range(2):
        one.note_unreachable(a, WHY)
    one.close()
    assert one._checking == {}


@pytest.mark.parametrize(
    "options",
    [{"fall": 0}, {"rise": 1.5}, {"check_every": 0}, {"strategy": "x"}, {"weights": [1]}, {"weights": [1, -1]}],
)
def test_options_that_cannot_be(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        group("a", "b", **options)


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.fixture
def through(serve):
    """`through(*urls, **options)`: a proxy whose every connection goes through a group of these, and the group."""

    def start(*urls, connect=30.0, **options):
        members = [parse_upstream(f"m{number}", url) for number, url in enumerate(urls)]
        pool = UpstreamGroup("pool", members, **options)
        gate = Gate(
            client_rules=ANYBODY,
            destination_rules=ANYWHERE,
            upstreams={"pool": pool},
            upstream_rules=[parse_upstream_rule("through pool any")],
            timeouts=Timeouts(connect=connect),
        )
        return serve(ProxyHandler(gate)), pool

    return start


@pytest.fixture
def parent(serve):
    return serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))


def test_another_member_is_asked_when_one_cannot_be_reached(through, parent, serve, connect, in_thread, access_records):
    dead, origin = free_port(), serve(echo)
    server, pool = through(f"socks5://127.0.0.1:{dead}", f"http://{parent.address}", check_every=0.01)
    for _ in range(3):
        with connect(server) as client:
            assert in_thread(reply, client, socks(origin.port)) == 0
            client.sendall(b"hello")
            assert in_thread(read, client, 5) == b"hello"
    assert {record.access["upstream"] for record in access_records(6)} == {"m1", None}
    assert pool.members[0].is_down
    assert server.stats().handler_counters["upstream_down"] == 1
    with socket.create_server(("127.0.0.1", dead)):  # it is there again
        wait_until(lambda: not pool.members[0].is_down)


def test_requests_are_forwarded_by_another_member(through, parent, origin, connect, in_thread):
    server, _ = through(f"http://127.0.0.1:{free_port()}", f"http://{parent.address}")
    site = origin(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
    answer = in_thread(http, connect(server), b"GET %b/ HTTP/1.1\r\nHost: x\r\n\r\n" % site.url.encode())
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_silent_member_has_its_share_of_the_time(through, parent, serve, connect, in_thread):
    origin = serve(echo)
    with full_listener() as silent:
        server, pool = through(
            f"socks5://127.0.0.1:{silent.getsockname()[1]}", f"socks5://{parent.address}", connect=0.4
        )
        assert in_thread(reply, connect(server), socks(origin.port)) == 0
        assert pool.members[0].failures == 1


def test_what_a_client_asks_for_does_not_count_against_a_member(through, parent, serve, connect, in_thread):
    """Otherwise clients could have members passed over."""
    other = []

    def second(conn):
        other.append(conn)

    server, pool = through(f"socks5://{parent.address}", f"socks5://{serve(second).address}", fall=1)
    for host in ("127.0.0.1", "no-such.invalid"):
        assert in_thread(reply, connect(server), socks(free_port(), host)) in (4, 5)
    assert (pool.members[0].failures, other) == (0, [])


def test_all_members_are_tried_even_if_all_are_down(through, connect, in_thread, lines):
    server, pool = through(*[f"socks5://127.0.0.1:{free_port()}" for _ in range(2)], fall=1, check_every=60)
    for _ in range(2):
        assert in_thread(reply, connect(server), socks(80)) == 1
    assert [member.is_down for member in pool.members] == [True, True]
    assert {line["result"] for line in lines(2)} == {"upstream_failed"}
    assert [member.failures for member in pool.members] == [2, 2]
