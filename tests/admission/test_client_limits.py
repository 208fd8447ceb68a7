"""Limits of each client: who may connect, how many connections at once, how many a second."""

from ipaddress import ip_address

import gevent
import pytest

from gtcpserver import ClientLimits, ConfigError, ProxyProtocol
from gtcpserver.admission import client_limits as module
from gtcpserver.proxy_protocol import ProxyHeader
from gtcpserver.testing import certificates
from kit.clients import client_from, is_served
from kit.handlers import echo
from kit.waiting import wait_until


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


def test_networks_that_may_connect(serve, in_thread):
    limits = ClientLimits(allow=["127.0.0.0/30"], deny=["127.0.0.2"])
    server = serve(echo, client_limits=limits)
    for source, served in (("127.0.0.1", True), ("127.0.0.2", False), ("127.0.0.9", False)):
        with client_from(server, source) as client:
            assert is_served(client, in_thread) is served
    assert server.stats().clients_refused == {"client_denied": 2}
    wait_until(lambda: server.stats().active == 0)


def test_connections_of_one_client(serve, in_thread):
    limits = ClientLimits(connections=2)
    server = serve(echo, client_limits=limits)
    first, second = client_from(server, "127.0.0.1"), client_from(server, "127.0.0.1")
    with first, second, client_from(server, "127.0.0.1") as third, client_from(server, "127.0.0.2") as other:
        assert is_served(first, in_thread)
        assert is_served(second, in_thread)
        assert not is_served(third, in_thread)
        assert is_served(other, in_thread)
    wait_until(lambda: server.stats().active == 0)
    with client_from(server, "127.0.0.1") as again:
        assert is_served(again, in_thread)
    assert server.stats().clients_refused == {"client_connections": 1}
    server.stop(5)
    assert limits.counted == 0


def test_the_client_is_whom_the_balancer_names(serve, in_thread):
    here = ProxyProtocol("127.0.0.0/8")
    server = serve(echo, client_limits=ClientLimits(connections=1), proxy_protocol=here)

    def come_as(host):
        sock = client_from(server, "127.0.0.1")
        sock.sendall(ProxyHeader((ip_address(host), 1), (ip_address(host), 2)).to_bytes())
        return sock

    with come_as("2001:db8::1") as first:
        assert is_served(first, in_thread)
        with come_as("2001:db8::ffff:1") as neighbour, come_as("2001:db8:0:1::1") as other:
            assert not is_served(neighbour, in_thread)  # of the same /64
            assert is_served(other, in_thread)


def test_a_failed_handshake_counts_no_longer(serve, connect, in_thread):
    with certificates() as made:
        server = serve(echo, client_limits=ClientLimits(connections=1), tls=made.server)
        for number in (1, 2):
            client = connect(server)
            client.sendall(b"no TLS\n")
            assert in_thread(client.recv, 100)  # an alert
            wait_until(lambda number=number: server.stats().handshake_failures == {"not_tls": number})
    assert server.stats().clients_refused == {}


def test_limits_that_servers_share_survive_a_stop_of_one(serve, connect):
    limits = ClientLimits(connections=2)
    server = serve(
        lambda conn: gevent.sleep(10), client_limits=limits, pool=1, proxy_protocol=ProxyProtocol("127.0.0.1")
    )
    here = ip_address("127.0.0.1")
    for _ in range(2):
        connect(server).sendall(ProxyHeader((here, 1), (here, 2)).to_bytes())
    # One is served, and one waits for a place.
    wait_until(lambda: server.stats().accepted == 2 and not server.stats().proxy_headers_awaited)
    assert server.stats().active == 1
    server.stop(0.05)
    assert limits.counted == 0


def test_new_connections_a_second(clock):
    limits = ClientLimits(new_per_second=2, burst=3)
    ada, bob = ("192.0.2.1", 1), ("192.0.2.2", 1)
    assert [limits.enter(ada) for _ in range(4)] == [None, None, None, "client_rate"]
    assert limits.enter(bob) is None
    clock(0.5)
    assert [limits.enter(ada) for _ in range(2)] == [None, "client_rate"]
    clock(100)
    assert [limits.enter(ada) for _ in range(4)] == [None, None, None, "client_rate"]
    assert limits.refused == {"client_rate": 3}


def test_less_than_one_a_second(clock):
    limits = ClientLimits(new_per_second=0.1)
    assert [limits.enter(("192.0.2.1", 1)) for _ in range(2)] == [None, "client_rate"]
    clock(9)
    assert limits.enter(("192.0.2.1", 1)) == "client_rate"
    clock(1)
    assert limits.enter(("192.0.2.1", 1)) is None


def test_what_is_remembered_of_clients_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_CLIENTS", 10)
    limits = ClientLimits(new_per_second=1)
    for number in range(100):
        limits.enter((f"192.0.2.{number}", 1))
    assert limits.remembered == 10


def test_mapped_addresses_and_zones_and_unix_sockets():
    limits = ClientLimits(connections=1, deny=["fe80::/10"])
    assert limits.enter(("::ffff:192.0.2.1", 1, 0, 0)) is None
    assert limits.enter(("192.0.2.1", 1)) == "client_connections"
    limits.leave(("192.0.2.1", 1))
    assert limits.enter(("192.0.2.1", 1)) is None
    assert limits.enter(("fe80::1%eth0", 1, 0, 2)) == "client_denied"
    assert [limits.enter("") for _ in range(3)] == [None, None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow": ["10.0.0.1/8"]}, "allow must be networks or addresses, got '10.0.0.1/8'"),
        ({"deny": "x"}, "deny must be networks or addresses, got 'x'"),
        ({"connections": 0}, "connections must be a whole number from 1, or None for no limit, got 0"),
        ({"new_per_second": 0}, "new_per_second must be a number, more than 0, or None for no limit, got 0"),
        ({"burst": 3}, "burst must come together with new_per_second"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ConfigError) as raised:
        ClientLimits(**options)
    assert message in str(raised.value)
