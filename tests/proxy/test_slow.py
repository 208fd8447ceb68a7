"""Clients that drip, and others that do not answer, keep nobody out and do not stay forever."""

import socket
import ssl
import threading
import time
from pathlib import Path

import gevent
import pytest
import trustme

from gtcpserver import TLSConfig
from gtcpserver.proxy import handler, resolve, system_names
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.resolve import Resolver
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, reply, socks
from kit.waiting import wait_until


def gate(**options):
    return Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})


@pytest.mark.slow
def test_requirement_31_500_clients_that_drip_are_gone_in_time_and_a_good_one_is_served_meanwhile(
    serve, connect, in_thread, lines, need_descriptors
):
    """They send a byte again and again: the timeout is for all of the negotiation, and not for each byte."""
    need_descriptors(2000)  # both ends of each connection are in this process
    origin, server = serve(echo), serve(ProxyHandler(gate(timeouts=Timeouts(negotiate=2.0))))
    # What each of them sends, byte by byte; none has an end within the time.
    talks = [
        b"\x05\xff" + bytes(253),
        b"\x04\x01\0\x50\x7f\0\0\x01" + b"u" * 200,
        b"\x04\x01\0\x50\0\0\0\x01me\0" + b"n" * 200,
        b"GET http://x/" + b"a" * 200,
        b"CONNECT x:1 HTTP/1.1\r\nA: " + b"b" * 200,
        b"\r\n" * 10 + b"G",
        b"\x05\x01\x00\x05\x01\x00\x03\xff" + b"n" * 200,
    ]
    dripping = [connect(server) for _ in range(500)]
    for number, client in enumerate(dripping):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(talks[number % len(talks)][:4])

    def drip():
        for place in range(4, 200):
            for number, client in enumerate(dripping):
                try:
                    client.sendall(talks[number % len(talks)][place : place + 1])
                except OSError:
                    pass  # gone, as it should be
            gevent.sleep(0.05)

    wait_until(lambda: server.accepted_connections == 500)
    greenlet = gevent.spawn(drip)
    good = [connect(server) for _ in range(3)]
    for client in good:
        assert in_thread(reply, client, socks(origin.port)) == 0
    # All of them are gone while they still drip.
    assert [line["result"] for line in lines(500)] == ["negotiation_timeout"] * 500
    assert not greenlet.ready()
    greenlet.kill()


@pytest.mark.slow
def test_requirement_31_clients_that_stop_in_a_tls_handshake(serve, connect, in_thread, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = TLSConfig(tmp_path / "server.pem", handshake_timeout=0.3)
    origin, server = serve(echo), serve(ProxyHandler(gate(), tls=tls))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    stuck = [connect(server) for _ in range(100)]
    for number, client in enumerate(stuck):
        client.sendall(
            (b"", b"\x16", b"\x16\x03\x01\x02\x00", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")[number % 4]
        )

    def good():
        with (
            socket.create_connection(("localhost", server.port), SOON) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as client,
        ):
            assert reply(client, socks(origin.port)) == 0
            client.sendall(b"hello")
            return read(client, 5)

    assert in_thread(good) == b"hello"
    wait_until(lambda: server.active_connections == 0)


@pytest.mark.slow
def test_requirement_31_balancers_that_do_not_say_who_is_there(serve, connect, in_thread, lines):
    balancers = ProxyProtocol(["127.0.0.0/8"], timeout=0.2)
    origin, server = serve(echo), serve(ProxyHandler(gate(), proxy_protocol=balancers))
    stuck = [connect(server) for _ in range(50)]
    for number, client in enumerate(stuck):
        client.sendall((b"", b"PROXY", b"PROXY TCP4 192.0.2.1", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00")[number % 4])
    client = connect(server)
    client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 5 6\r\n")
    assert in_thread(reply, client, socks(origin.port)) == 0
    assert {line["result"] for line in lines(50)} == {"proxy_header"}


@pytest.mark.slow
def test_requirement_33_names_that_are_not_answered_hold_up_no_others(serve, connect, in_thread, monkeypatch):
    """As many of them as there are threads for look-ups, and more: addresses and names that are known go on, each
    client waits as long as it should, and then other names have their turn."""
    answered, asked, threads = threading.Event(), [], 32

    def getaddrinfo(name, *_):
        asked.append(name)
        if name.startswith("slow"):
            answered.wait(SOON)
        return [(0, 0, 0, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(system_names, "_getaddrinfo", getaddrinfo)
    monkeypatch.setattr(resolve, "THREADS", threads)
    resolver = Resolver(timeout=0.5, kind="system")
    origin, server = serve(echo), serve(ProxyHandler(gate(resolver=resolver)))
    try:
        assert in_thread(reply, connect(server), socks(origin.port, "known.example")) == 0
        slow = [connect(server) for _ in range(3 * threads)]
        for number, client in enumerate(slow):
            client.sendall(socks(origin.port, f"slow{number}.example"))
        wait_until(lambda: len(resolver._questions.under_way) == 3 * threads)
        began = time.monotonic()
        assert in_thread(reply, connect(server), socks(origin.port, "known.example")) == 0
        assert in_thread(reply, connect(server), socks(origin.port, "127.0.0.1")) == 0
        # None of the threads has become free: the last of them wait no longer than the first.
        for client in slow:
            assert in_thread(read, client, 12)[2:4] == b"\x05\x04"
        assert time.monotonic() - began < SOON / 2
    finally:
        answered.set()
    wait_until(lambda: not resolver._questions.under_way)
    assert in_thread(reply, connect(server), socks(origin.port, "other.example")) == 0
    # Nobody waited any more for those that had not begun: they were not looked up.
    assert len(asked) == threads + 2


@pytest.mark.slow
def test_requirement_30_a_tunnel_whose_one_side_does_not_read_holds_little(serve, connect, in_thread, spawn_thread):
    """The sender is stopped by the receiver's window, through the proxy; what is under way is in the kernel."""
    sent = []

    def pour(conn):
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        while True:
            conn.sendall(bytes(65536))
            sent.append(65536)

    origin, server = serve(pour), serve(ProxyHandler(gate()))
    client = connect(server, receive_buffer=65536)
    assert in_thread(reply, client, socks(origin.port)) == 0

    def stands_still():
        before = len(sent)
        gevent.sleep(0.1)
        return sent and len(sent) == before

    wait_until(stands_still)
    # What the kernel lets the buffers of one connection grow to, of each of the two, and a pipe (tcp(7)).
    buffers = sum(int(Path(f"/proc/sys/net/ipv4/tcp_{kind}mem").read_text().split()[2]) for kind in "rw")
    assert sum(sent) < 2 * buffers + 2**20
    other = connect(server)  # and nobody else is held up
    assert in_thread(reply, other, socks(origin.port)) == 0
    assert len(in_thread(read, other, 1_000_000)) == 1_000_000


@pytest.mark.slow
def test_requirement_34_clients_beyond_a_limit_hold_nothing_by_silence(serve, connect, in_thread, monkeypatch, lines):
    monkeypatch.setattr(handler, "TIME_OF_REFUSED", 0.2)
    monkeypatch.setattr(handler, "MOST_REFUSED", 20)
    server = serve(ProxyHandler(gate(limits=LimitKeeper(Limits(connections=2)))))
    good = [connect(server) for _ in range(2)]
    wait_until(lambda: server.active_connections == 2)
    silent = [connect(server) for _ in range(30)]
    wait_until(lambda: server.active_connections == 2)
    assert server.stats().lingering + 2 <= 22  # 10 were reset, the others had a moment to say what they speak
    assert [line["result"] for line in lines(30)] == ["limit"] * 30
    for client in silent:
        client.close()
    origin = serve(echo)
    assert in_thread(reply, good[0], socks(origin.port)) == 0


def test_requirement_34_who_may_not_come_in_gets_no_tls_handshake(serve, connect, in_thread, lines, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    server = serve(ProxyHandler(gate(client_rules=()), tls=TLSConfig(tmp_path / "cert.pem")))
    client = connect(server)
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    assert lines()[0]["result"] == "client_denied"
