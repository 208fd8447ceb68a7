"""Names with many addresses: each client's request tries a few of them, and holds a few sockets meanwhile."""

import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import gevent
import pytest

from gtcpserver.connection.connect import MOST_ADDRESSES, connect
from gtcpserver.proxy import dial as dial_module
from gtcpserver.proxy import resolve as resolve_module
from gtcpserver.proxy import system_names
from gtcpserver.proxy.dial import MOST_AT_ONCE, dial
from gtcpserver.proxy.errors import LimitReached
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.resolve import Resolver
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.proxying import ANYBODY, ANYWHERE, http, reply, socks
from kit.waiting import wait_until

MANY = [f"127.7.{number // 250}.{number % 250 + 1}" for number in range(300)]
CONNECT = b"CONNECT many.example:%d HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def silence(address, port=0):
    """Leaves attempts to connect unanswered, by a queue that is full; gives the port."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(0)
        port = listening.getsockname()[1]
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((address.replace("0.0.0.0", "127.0.0.1"), port))
        yield port


@pytest.fixture
def silent():
    """A port at which every address of 127.0.0.0/8 is silent."""
    with silence("0.0.0.0") as port:
        yield port


@pytest.fixture
def tried(monkeypatch):
    """Addresses that were connected to, in their order; the next one follows after 1 ms."""
    addresses = []
    original = dial_module._connect

    def note(ip, *args):
        addresses.append(str(ip))
        return original(ip, *args)

    monkeypatch.setattr(dial_module, "_connect", note)
    monkeypatch.setattr(dial_module, "STAGGER", 0.001)
    return addresses


@pytest.fixture
def many(monkeypatch):
    """many.example has 300 addresses."""
    monkeypatch.setattr(
        system_names, "_getaddrinfo", lambda name, *_: [(0, 0, 0, "", (address, 0)) for address in MANY]
    )


def gate(**options):
    timeouts = Timeouts(connect=options.pop("timeout", 0.4))
    options.setdefault("resolver", Resolver(kind="system"))
    return Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, timeouts=timeouts, **options)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_300_silent_addresses_of_a_name_hold_a_few_descriptors(silent, many, tried, serve, connect, spawn_thread):
    server = serve(ProxyHandler(gate()))
    clients = [connect(server) for _ in range(5)]
    wait_until(lambda: server.active_connections == 5)
    before, most = descriptors(), 0
    answers = [spawn_thread(reply, client, socks(silent, "many.example")) for client in clients]
    wait_until(lambda: tried)
    while not all(answer.ready() for answer in answers):
        most = max(most, descriptors() - before)
        gevent.sleep(0.005)
    # The event loop's own for threads come and go.
    assert most <= 5 * MOST_AT_ONCE + 3
    assert {answer.get() for answer in answers} == {4}
    assert len(set(tried)) <= MOST_ADDRESSES
    wait_until(lambda: descriptors() <= before + 3)


@pytest.mark.slow
def test_addresses_behind_silent_ones_have_their_turn(tried):
    """Those under way give up their places in time for the others."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.2", 0)))
        port = listening.getsockname()[1]
        dead = [f"127.7.7.{number}" for number in range(1, MOST_ADDRESSES)]
        for address in dead:
            stack.enter_context(silence(address, port))
        connection, ip = dial([ip_address(address) for address in [*dead, "127.0.0.2"]], port, timeout=2)
        connection.close()
    assert str(ip) == "127.0.0.2"
    assert tried == [*dead, "127.0.0.2"]


def test_all_of_a_few_addresses_keep_trying_until_the_end(silent, tried):
    """No more than may be tried at once: none has to give up its place."""
    with pytest.raises(TimeoutError):
        dial([ip_address(address) for address in MANY[:MOST_AT_ONCE]], silent, timeout=0.1)
    assert tried == MANY[:MOST_AT_ONCE]


def test_the_same_address_twice_is_no_endless_attempt():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            dial([ip_address("127.0.0.1")] * 2, closed.getsockname()[1], timeout=30)


@pytest.mark.parametrize("family", ["any", "prefer-ipv4"])
def test_both_families_are_among_the_addresses_that_are_tried(family):
    v6 = [ip_address(f"2001:db8::{number:x}") for number in range(1, 100)]
    v4 = [ip_address(address) for address in MANY]
    found = resolve_module.in_order([*v6, *v4], family)
    assert len(found) == MOST_ADDRESSES
    assert sum(ip.version == 6 for ip in found) == MOST_ADDRESSES // 2
    assert resolve_module.in_order(v4, family) == tuple(v4[:MOST_ADDRESSES])


def test_the_memory_for_the_addresses_of_a_name_is_bounded(many):
    resolver = Resolver(kind="system")
    assert len(resolver.resolve("many.example")) == len(resolver._results.get("many.example").found) == MOST_ADDRESSES
    resolver.close()


# -- limits of attempts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["connect_attempts", "client_connect_attempts"])
def test_attempts_of_a_client_have_a_limit(silent, tried, serve, connect, in_thread, spawn_thread, lines, which):
    keeper = LimitKeeper(Limits(**{which: 2}))
    server = serve(ProxyHandler(gate(limits=keeper, timeout=30.0)))
    held = [connect(server) for _ in range(2)]
    for client in held:
        client.sendall(socks(silent))
    wait_until(lambda: len(tried) == 2)
    # For what the third one wants there is no place; the proxy says so at once, in each protocol.
    assert in_thread(reply, connect(server), socks(silent)) == 1
    answer = in_thread(http, connect(server), b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % silent)
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert [(line["result"], line["detail"]) for line in lines(2)] == [("limit", which)] * 2
    assert len(tried) == 2
    server.halt()
    wait_until(lambda: not keeper.attempts)
    assert not keeper.attempts_by_client


def test_another_client_has_its_own_attempts(silent, tried, serve, connect, in_thread):
    server = serve(ProxyHandler(gate(limits=LimitKeeper(Limits(client_connect_attempts=1)), timeout=30.0)))
    connect(server).sendall(socks(silent))
    wait_until(lambda: len(tried) == 1)
    with socket.create_server(("127.0.0.1", 0)) as there, socket.socket() as other:
        other.bind(("127.0.0.5", 0))
        other.settimeout(60)
        other.connect(("127.0.0.1", server.port))
        assert in_thread(reply, other, socks(there.getsockname()[1])) == 0


def test_an_attempt_that_has_ended_makes_room(serve, connect, in_thread):
    keeper = LimitKeeper(Limits(client_connect_attempts=1, connect_attempts=1))
    server = serve(ProxyHandler(gate(limits=keeper)))
    with socket.create_server(("127.0.0.1", 0)) as there, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for _ in range(3):
            assert in_thread(reply, connect(server), socks(there.getsockname()[1])) == 0
            assert in_thread(reply, connect(server), socks(closed.getsockname()[1])) == 5
    assert keeper.attempts == 0


def test_a_name_is_tried_by_fewer_attempts_where_there_is_no_room_for_more(silent, tried):
    """The limit refuses who has none under way; one more address beside the first may wait."""
    keeper = LimitKeeper(Limits(client_connect_attempts=1))
    attempts = keeper.attempts_of(("192.0.2.1", 1))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            dial(
                [ip_address("127.0.0.1"), ip_address("127.0.0.2")],
                closed.getsockname()[1],
                timeout=30,
                attempts=attempts,
            )
    with pytest.raises(TimeoutError):
        dial([ip_address(address) for address in MANY[:3]], silent, timeout=0.1, attempts=attempts)
    assert tried[2:] == MANY[:1]
    gevent.sleep(0.01)
    assert keeper.attempts == 0


def test_attempts_are_counted_out_when_they_are_killed_before_they_begin(silent):
    """Which greenlets may be: then nothing of them runs."""
    keeper = LimitKeeper(Limits(connect_attempts=100))
    attempts = keeper.attempts_of(("192.0.2.1", 1))

    def give_up():
        with gevent.Timeout(0, False):
            dial([ip_address(address) for address in MANY[:3]], silent, timeout=30, attempts=attempts)

    gevent.spawn(give_up).join()
    greenlet = gevent.spawn(give_up)
    greenlet.kill()
    wait_until(lambda: not keeper.attempts)
    with pytest.raises(LimitReached, match="connect_attempts"):
        for _ in range(101):
            attempts.begin()


@pytest.mark.slow
def test_attempts_to_reach_an_upstream_count_as_well(silent, tried, serve, connect, in_thread, lines):
    server = serve(
        ProxyHandler(
            gate(
                upstreams={"up": parse_upstream("up", f"socks5://127.0.0.1:{silent}")},
                upstream_rules=[parse_upstream_rule("through up any")],
                limits=LimitKeeper(Limits(client_connect_attempts=1)),
                timeout=30.0,
            )
        )
    )
    connect(server).sendall(socks(80, "8.8.8.8"))
    wait_until(lambda: len(tried) == 1)
    assert in_thread(reply, connect(server), socks(80, "8.8.8.8")) == 1
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("limit", "client_connect_attempts")


# -- connect() ---------------------------------------------------------------------------------------------------------


def test_connect_tries_a_few_addresses_of_a_name_of_both_families(monkeypatch, listening):
    port = listening.getsockname()[1]
    found = [(socket.AF_INET6, 0, 0, "", (f"100::{number:x}", 1, 0, 0)) for number in range(1, 301)]
    found += [(socket.AF_INET, 0, 0, "", ("127.0.0.1", port))] * 2
    monkeypatch.setattr(gevent.socket, "getaddrinfo", lambda *args, **options: found)
    tried = []
    module = sys.modules["gtcpserver.connection.connect"]
    original = module._connect

    def note(cls, family, sockaddr, source):
        if family == socket.AF_INET6:
            tried.append(sockaddr[0])
            raise ConnectionRefusedError
        return original(cls, family, sockaddr, source)

    monkeypatch.setattr(module, "_connect", note)
    connect("many.example:1", 5).close()
    assert tried == [address[4][0] for address in found[: MOST_ADDRESSES - 1]]
