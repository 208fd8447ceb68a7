"""Proxies that lead through each other: a loop ends before descriptors do."""

import itertools

import pytest

from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.upstream import MOST_HOPS
from kit.handlers import echo
from kit.ports import free_port
from kit.proxying import LOOPBACK, http, reply, socks
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")

SCHEMES = ["socks5", "http"]


@pytest.fixture
def ring(serve):
    """`ring("http", "socks5")`: proxies each of which leads to the next by this protocol, the last to the first."""

    def start(*schemes):
        ports = [free_port() for _ in schemes]
        servers = []
        for port, scheme, following in zip(ports, schemes, [*ports[1:], ports[0]], strict=True):
            text = (
                f'[[listener]]\nlisten = "127.0.0.1:{port}"\n{LOOPBACK}upstreams = ["through next any"]\n'
                f'[upstream.next]\nurl = "{scheme}://127.0.0.1:{following}"\n'
            )
            servers.append(serve(make_proxy(parse_config(text)).handler, f"127.0.0.1:{port}"))
        return servers

    return start


@pytest.mark.parametrize("schemes", [*itertools.product(SCHEMES, repeat=2), ("socks5",) * 3], ids="-".join)
@pytest.mark.parametrize("asked", ["socks5", "connect"])
def test_a_loop_of_proxies_is_found(ring, connect, in_thread, lines, schemes, asked):
    servers = ring(*schemes)
    client = connect(servers[0])
    if asked == "socks5":
        assert in_thread(reply, client, socks(80)) in (1, 4)
    else:
        answer = in_thread(http, client, b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 502", b"HTTP/1.1 508"))
    assert sum(server.accepted_connections for server in servers) < 100
    assert "loop" in [line["result"] for line in lines(1)]
    wait_until(lambda: not any(server.active_connections for server in servers[1:]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_proxy_that_leads_to_itself_by_another_name(ring, connect, in_thread, scheme):
    server = ring(scheme, scheme)[0]
    answer = in_thread(http, connect(server), b"GET http://127.0.0.1:80/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 502", b"HTTP/1.1 508"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_chain_is_no_loop(serve, connect, in_thread, scheme):
    origin = serve(echo)
    port = None
    for _ in range(MOST_HOPS - 1):
        text = f'[[listener]]\nlisten = "127.0.0.1:0"\n{LOOPBACK}'
        if port is not None:
            text += f'upstreams = ["through next any"]\n[upstream.next]\nurl = "{scheme}://127.0.0.1:{port}"\n'
        server = serve(make_proxy(parse_config(text)).handler)
        port = server.port
    # Many at once: these are marked.
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.sendall(socks(origin.port))
    for client in clients:
        assert in_thread(client.recv, 2) == b"\x05\x00"
        assert in_thread(client.recv, 10)[1] == 0
