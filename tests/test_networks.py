"""Addresses and networks in one form: an IPv4 address is the same one, in whatever form it is configured or comes."""

import socket
from ipaddress import ip_address, ip_network

import pytest

from gtcpserver import ClientLimits, ConfigError, ProxyProtocol
from gtcpserver.address import parse_address
from gtcpserver.monitoring.monitor import is_loopback
from gtcpserver.networks import as_ip, is_in, parse_network
from gtcpserver.proxy.build import make_external
from gtcpserver.proxy.errors import RuleError
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.proxy.settings import ListenerTable
from kit.clients import is_served
from kit.handlers import echo
from kit.programs import needs_ipv6


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
        ("::FFFF:C000:200/120", "192.0.2.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        # These are wider than IPv4, and mean IPv6.
        ("::/0", "::/0"),
        ("::/95", "::/95"),
    ],
)
def test_mapped_networks_are_ipv4(text, network):
    assert parse_network(text) == ip_network(network)


@pytest.mark.parametrize("text", ["192.0.2.1/24", "x", "::ffff:192.0.2.1/120", "fe80::1%eth0", "fe80::%eth0/64", ""])
def test_what_is_no_network(text):
    for make in (lambda: ClientLimits(deny=[text]), lambda: ProxyProtocol([text])):
        with pytest.raises(ConfigError, match="must be networks"):
            make()
    with pytest.raises(RuleError):
        parse_client_rule(f"allow {text}")


@pytest.mark.parametrize("configured", ["127.0.0.1", "::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "::ffff:0:0/96"])
@pytest.mark.parametrize("listen", ["127.0.0.1:0", pytest.param("[::]:0", marks=needs_ipv6)])
def test_a_denied_client_is_denied_in_whatever_form(serve, in_thread, configured, listen):
    """By a socket for both families an IPv4 client comes from ::ffff:127.0.0.1."""
    allowed = serve(echo, listen, client_limits=ClientLimits(allow=[configured]))
    denied = serve(echo, listen, client_limits=ClientLimits(deny=[configured]))
    for server, expected in ((allowed, True), (denied, False)):
        with socket.create_connection(("127.0.0.1", server.port), 60) as client:
            assert is_served(client, in_thread) is expected
    assert denied.stats().clients_refused == {"client_denied": 1}


@pytest.mark.parametrize("trusted", ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104"])
def test_a_balancer_is_trusted_in_whatever_form(serve, connect, in_thread, trusted):
    server = serve(lambda conn: conn.sendall(conn.client_address[0].encode()), proxy_protocol=ProxyProtocol([trusted]))
    client = connect(server)
    client.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2\r\n")
    assert in_thread(client.recv, 100) == b"192.0.2.7"
    assert ProxyProtocol([trusted]).trusts(("::ffff:127.0.0.1", 1, 0, 0))


def test_a_client_that_a_balancer_names_by_a_mapped_address(serve, connect, in_thread):
    here = ProxyProtocol(["127.0.0.1"])
    server = serve(echo, client_limits=ClientLimits(deny=["192.0.2.7"]), proxy_protocol=here)
    client = connect(server)
    client.sendall(b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n")
    assert not is_served(client, in_thread)


def test_rules_of_the_proxy():
    assert parse_client_rule("allow ::ffff:10.0.0.0/104").clients == ip_network("10.0.0.0/8")
    assert parse_destination_rule("deny [::ffff:0:0/96]").destinations.network == ip_network("0.0.0.0/0")
    assert make_external(ListenerTable(external="::ffff:127.0.0.9")) == [ip_address("127.0.0.9")]
    with pytest.raises(ConfigError, match="one of each family"):
        make_external(ListenerTable(external=["::ffff:127.0.0.9", "127.0.0.8"]))


def test_addresses_are_compared_without_zone_and_unmapped():
    assert as_ip("fe80::1%eth0") == ip_address("fe80::1")
    assert as_ip("::ffff:192.0.2.1") == ip_address("192.0.2.1")
    assert is_in(as_ip("::ffff:192.0.2.1"), [ip_network("2001:db8::/32"), ip_network("192.0.2.0/24")])
    assert not is_in(as_ip("2001:db9::"), [ip_network("0.0.0.0/0"), ip_network("2001:db8::/32")])
    assert is_loopback(parse_address("[::ffff:127.0.0.1]:80"))
