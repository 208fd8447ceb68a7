"""Names and the way to them: nobody waits for somebody else's name server, and a dead address costs 250 ms."""

import errno
import socket
import threading
import time
from ipaddress import ip_address

import gevent
import pytest

from gtcpserver import ConfigError
from gtcpserver.proxy import dial as dial_module
from gtcpserver.proxy import questions as questions_module
from gtcpserver.proxy import system_names
from gtcpserver.proxy.dial import dial
from gtcpserver.proxy.resolve import THREADS_OF_A_DOMAIN, Resolver, ResolveTimeout, in_order
from gtcpserver.proxy.system_names import THREADS
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_until

LOCAL = ip_address("127.0.0.1")


@pytest.fixture
def names(monkeypatch):
    """Names as a name server would know them; `asked` are the look-ups, `slow` those that wait for the event."""
    known, asked, slow = {}, [], threading.Event()

    def getaddrinfo(name, *_args):
        name = name.removesuffix(".")
        asked.append(name)
        if name.startswith("slow"):
            slow.wait(SOON)
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in known[name]]

    monkeypatch.setattr(system_names, "_getaddrinfo", getaddrinfo)
    known["both.example"] = ["192.0.2.1", "2001:db8::1", "192.0.2.2"]
    yield known, asked, slow
    slow.set()


@pytest.fixture
def resolver():
    made = []

    def make(*args, **options):
        made.append(Resolver(*args, kind="system", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_families_are_interleaved(names, resolver):
    for family, expected in {
        "any": "2001:db8::1 192.0.2.1 192.0.2.2",
        "prefer-ipv4": "192.0.2.1 2001:db8::1 192.0.2.2",
        "ipv4": "192.0.2.1 192.0.2.2",
        "ipv6": "2001:db8::1",
    }.items():
        assert " ".join(map(str, resolver(family).resolve("both.example"))) == expected
    assert in_order([ip_address("::ffff:192.0.2.1"), ip_address("192.0.2.1")], "any") == (ip_address("192.0.2.1"),)


def test_answers_and_failures_are_remembered_for_a_while(names, resolver, monkeypatch):
    known, asked, _ = names
    one = resolver()
    for _ in range(3):
        one.resolve("both.example")
        with pytest.raises(socket.gaierror):
            one.resolve("none.example")
    assert asked == ["both.example", "none.example"]
    clock = time.monotonic
    monkeypatch.setattr(questions_module, "monotonic", lambda: clock() + 6)
    known["none.example"] = ["192.0.2.9"]
    assert one.resolve("none.example") == (ip_address("192.0.2.9"),)
    assert one.resolve("both.example")
    assert len(asked) == 3


def test_requirement_33_slow_names_hold_up_nobody_else(names, resolver):
    one = resolver()
    waiting = [gevent.spawn(one.resolve, f"slow{number}.example") for number in range(THREADS - 1)]
    gevent.sleep(0)
    one.resolve("both.example")
    assert not any(greenlet.ready() for greenlet in waiting)
    names[2].set()
    gevent.joinall(waiting)


@pytest.mark.slow
def test_requirement_33_the_name_server_of_one_domain_holds_up_no_other_names(names, resolver):
    known, asked, slow = names
    known["www.fast.example"] = ["192.0.2.3"]
    one = resolver()
    # Longer names have these last labels in common.
    waiting = [gevent.spawn(one.resolve, f"slow{number}.a.b.example") for number in range(THREADS + 100)]
    wait_until(lambda: len(asked) == THREADS_OF_A_DOMAIN)
    assert one.resolve("www.fast.example") == (ip_address("192.0.2.3"),)
    assert len(asked) == THREADS_OF_A_DOMAIN + 1
    slow.set()
    gevent.joinall(waiting)
    assert not one._questions._domains._keys


def test_names_that_are_not_known_print_nothing(resolver, capfd):
    with pytest.raises(socket.gaierror):
        resolver().resolve("no-such-host.invalid")
    with pytest.raises(socket.gaierror):
        resolver().resolve("x" * 64 + ".invalid")  # no label is as long
    assert capfd.readouterr() == ("", "")


def test_clients_that_ask_for_the_same_name_share_a_look_up(names, resolver):
    known, asked, slow = names
    known["slow.example"] = ["192.0.2.5"]
    one = resolver()
    clients = [gevent.spawn(one.resolve, "slow.example") for _ in range(100)]
    gevent.sleep(0)
    slow.set()
    gevent.joinall(clients)
    assert {client.value for client in clients} == {(ip_address("192.0.2.5"),)}
    assert asked == ["slow.example"]


def test_a_client_waits_no_longer_than_its_time_but_the_answer_serves_the_next(names, resolver):
    known, asked, slow = names
    known["slow.example"] = ["192.0.2.5"]
    one = resolver(timeout=0.05)
    with pytest.raises(ResolveTimeout, match=r"no answer about slow.example within 0.05 seconds"):
        one.resolve("slow.example")
    slow.set()
    while one._questions.under_way:
        gevent.sleep(0.001)
    assert one.resolve("slow.example")
    assert asked == ["slow.example"]


def test_the_memory_for_names_is_bounded(names, resolver, monkeypatch):
    monkeypatch.setattr(questions_module, "MOST_REMEMBERED", 3)
    one = resolver()
    for number in range(10):
        names[0][f"{number}.example"] = ["192.0.2.1"]
        one.resolve(f"{number}.example")
    assert list(one._results._entries) == ["7.example", "8.example", "9.example"]


def test_resolver_refuses_unknown_families():
    with pytest.raises(ConfigError, match="family must be one of any, ipv4, ipv6, prefer-ipv4, got 'x'"):
        Resolver("x")


@pytest.fixture
def unanswering():
    """(address, port) that leaves connection attempts unanswered: a listener whose queue is full."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free_port()))  # at 127.0.0.2, too
        listening.listen(0)
        port = listening.getsockname()[1]
        fill = []
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            fill.append(sock)
        time.sleep(0.05)
        yield LOCAL, port
        for sock in fill:
            sock.close()


def listener_on(address, port=0):
    sock = socket.create_server((address, port))
    return sock, sock.getsockname()[1]


def test_connects_with_the_options_of_a_proxy():
    sock, port = listener_on("127.0.0.1")
    with sock:
        connection, ip = dial([LOCAL], port, timeout=5, source=lambda ip: ip_address("127.0.0.9"))
        with connection:
            assert ip == LOCAL
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.accept()[1][0] == "127.0.0.9"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_requirement_38_a_destination_is_probed_as_clients_are(host, serve, connect):
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    options += [(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
    seen = []

    def look(conn):
        seen.append([conn.getsockopt(*option) for option in options])

    server = serve(look, f"[{host}]:0" if ":" in host else f"{host}:0")
    connection, _ = dial([ip_address(host)], server.port, timeout=5)
    with connection:
        wait_until(lambda: seen)
        assert [connection.getsockopt(*option) for option in options] == seen[0] == [1, 60, 15, 4]
        if ":" in host:  # what a router says must not end it
            assert connection.getsockopt(socket.IPPROTO_IPV6, dial_module.IPV6_RECVERR) == 0


def test_the_next_address_is_tried_when_one_refuses_and_the_first_error_is_told():
    sock, port = listener_on("127.0.0.2")
    with sock:
        connection, ip = dial([LOCAL, ip_address("127.0.0.2")], port, timeout=5)
        connection.close()
        assert str(ip) == "127.0.0.2"
    with pytest.raises(ConnectionRefusedError):
        dial([LOCAL, ip_address("127.0.0.2")], port, timeout=5)


def test_an_address_that_does_not_answer_costs_a_quarter_of_a_second(unanswering, monkeypatch):
    monkeypatch.setattr(dial_module, "STAGGER", 0.02)
    dead, port = unanswering
    sock, _ = listener_on("127.0.0.2", port)
    with sock:
        connection, ip = dial([dead, ip_address("127.0.0.2")], port, timeout=5)
        connection.close()
        assert str(ip) == "127.0.0.2"


@pytest.mark.slow
def test_the_time_is_for_all_addresses_together(unanswering):
    dead, port = unanswering
    with pytest.raises(TimeoutError, match=r"not connected within 0.1 seconds"):
        dial([dead, dead], port, timeout=0.1)
    with pytest.raises(TimeoutError):
        dial([dead], port, timeout=0.1)


@pytest.mark.slow
def test_no_socket_is_left_by_the_losers(unanswering):
    import os

    dead, port = unanswering
    gevent.sleep(0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError) as raised:
            dial([dead, ip_address("127.0.0.3"), ip_address("127.0.0.4")], port, timeout=0.02)
        assert raised.value.errno in (None, errno.ECONNREFUSED)
    gevent.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
