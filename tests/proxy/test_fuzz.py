"""Any bytes, cut anywhere, into a whole proxy: an end, no fault, and bounded memory. tests/fuzz has its parsers."""

import logging
import socket
import struct
import time
import tracemalloc
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gtcpserver import Server
from gtcpserver.errors import GtcpServerError
from gtcpserver.http1.head import LONGEST_HEAD, HttpError, find_end_of_head
from gtcpserver.proxy import socks4
from gtcpserver.proxy.errors import ProtocolError
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.proxy.sniff import sniff
from gtcpserver.proxy.target import make_target, parse_authority
from gtcpserver.proxy_protocol.trust import ProxyProtocol
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, reply, socks
from kit.waiting import wait_until

WITH_PASSWORD = [parse_client_rule("allow from any to any with auth staff")]

#: From which conversations are made: whole messages, their parts, and what does not belong there.
PARTS = st.sampled_from(
    [
        *(b"\x05\x01\x00", b"\x05\x01\x02", b"\x05\x02\x00\x02", b"\x05\xff", b"\x05\x00", b"\x05", b"\x04", b"\x01"),
        *(b"\x01\x03Ada\x02pw", b"\x01\x03Ada\x02no", b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255, b"\x01\x00\x00"),
        *(b"\x05\x01\x00\x01\x7f\0\0\x01PO", b"\x05\x01\x00\x03\x09localhostPO"),
        b"\x05\x01\x00\x04" + bytes(15) + b"\1PO",
        *(b"\x05\x02\x00\x01\x7f\0\0\x01\0\0", b"\x05\x03\x00\x01\0\0\0\0\0\0", b"\x05\x01\x00\x03\x00PO"),
        *(b"\x04\x01PO\x7f\0\0\x01me\0", b"\x04\x01PO\0\0\0\x01me\0localhost\0", b"\x04\x02\0\0\x7f\0\0\x01\0"),
        *(b"\x04\x01PO", b"\x05\x09\x00\x01"),
        *(
            b"GET http://127.0.0.1:PORT/ HTTP/1.1\r\n",
            b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\n",
            b"OPTIONS * HTTP/1.1\r\n",
        ),
        *(
            b"Host: x\r\n",
            b"Content-Length: 5\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Connection: close\r\n",
            b"\r\n",
        ),
        *(b"Proxy-Authorization: Basic QWRhOnB3\r\n", b"Expect: 100-continue\r\n", b"Max-Forwards: 0\r\n", b"hello"),
        *(b"Upgrade: x\r\nConnection: upgrade\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"\0", b"\n", b"\r", b"\x16\x03"),
        *(
            b"PROXY TCP4 192.0.2.1 192.0.2.2 5 6\r\n",
            b"PROXY UNKNOWN\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
            b"PROXY ",
        ),
    ]
)
TALKS = st.lists(st.one_of(PARTS, PARTS, PARTS, st.binary(max_size=20)), max_size=8).map(b"".join)


def talk(port, pieces):
    """Send these pieces, and read until the end."""
    with socket.create_connection(("127.0.0.1", port), SOON) as sock, suppress(ConnectionError):
        sock.settimeout(SOON)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["open", "with passwords", "behind a balancer"])
def test_requirement_36_any_bytes_end_one_connection_and_nothing_else(in_thread, caplog, kind):
    """Each connection has an end and a line in the log, no handler fails, and a good client is served afterwards."""
    caplog.set_level(logging.INFO, "gtcpserver.access")
    options = {"client_rules": ANYBODY}
    if kind == "with passwords":
        options = {"client_rules": WITH_PASSWORD, "authenticators": {"staff": OnePassword()}}
    timeouts = Timeouts(negotiate=1, connect=1, idle=1, answer=1, keep_alive=1)
    gate = Gate(destination_rules=ANYWHERE, timeouts=timeouts, **options)
    balancers = ProxyProtocol(["127.0.0.0/8"]) if kind == "behind a balancer" else None

    def access_lines():
        return [record for record in caplog.records if record.name == "gtcpserver.access"]

    handler = ProxyHandler(gate, proxy_protocol=balancers)
    with Server("127.0.0.1:0", echo) as origin, Server("127.0.0.1:0", handler) as proxy:

        @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(TALKS, st.lists(st.integers(0, 200), max_size=4))
        def fuzz(data, cuts):
            caplog.clear()
            data = data.replace(b"PORT", b"%d" % origin.port).replace(b"PO", struct.pack("!H", origin.port))
            places = [0, *sorted(cuts), len(data)]
            pieces = [data[start:end] for start, end in pairwise(places) if data[start:end]]
            in_thread(talk, proxy.port, pieces)
            wait_until(lambda: proxy.active_connections == 0)
            assert [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING] == []
            assert all("\n" not in record.getMessage() for record in access_lines())

        fuzz()
        user = b"Ada" if kind == "with passwords" else None
        greeting = b"PROXY UNKNOWN\r\n" if balancers is not None else b""

        def good():
            with socket.create_connection(("127.0.0.1", proxy.port), SOON) as sock:
                sock.sendall(greeting)
                assert reply(sock, socks(origin.port, user=user)) == 0
                sock.sendall(b"hello")
                assert read(sock, 5) == b"hello"

        in_thread(good)


@pytest.mark.parametrize(
    ("endless", "limit"),
    [
        (b"\x04\x01\0\x50\x7f\0\0\x01" + b"u" * 2_000_000, 300),
        (b"\x04\x01\0\x50\0\0\0\x01me\0" + b"n" * 2_000_000, 600),
        (b"\r\n" * 1_000_000, 100),
        (b"G" * 2_000_000, LONGEST_HEAD),
        (b"GET http://x/" + b"a" * 2_000_000, LONGEST_HEAD),
        (b"GET http://x/ HTTP/1.1\r\nA: " + b"b" * 2_000_000, LONGEST_HEAD),
        (b"GET http://x/ HTTP/1.1\r\n" + b"A: b\r\n" * 400_000, LONGEST_HEAD),
        (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n".replace(b"\r\n\r\n", b"\r\nA:" + b" " * 2_000_000), LONGEST_HEAD),
    ],
    ids=["user id", "name", "empty lines", "method", "target", "field", "fields", "spaces"],
)
def test_requirements_09_and_30_what_has_no_end_is_cut_off(endless, limit):
    """No parser waits for more than its limit, however much comes: nobody makes the proxy remember two megabytes."""
    piece = 4096
    read_so_far = None
    for end in range(0, len(endless) + 1, piece):
        data = endless[:end]
        try:
            protocol = sniff(data)
            if protocol == "socks4":
                assert socks4.parse_request(data) is None
            elif protocol == "http":
                assert find_end_of_head(data, max(0, end - piece)) is None
        except (ProtocolError, HttpError):
            read_so_far = end
            break
    assert read_so_far is not None
    assert read_so_far <= limit + piece


ENDLESS = b"a" * 1_000_000


def test_requirements_09_and_30_memory_of_endless_clients_is_bounded(serve, spawn_thread):
    """A hundred, each with a megabyte that means nothing yet; the proxy reads no more of it than a head may have."""
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    starts = [b"\x04\x01\0\x50\x7f\0\0\x01", b"\x04\x01\0\x50\0\0\0\x01me\0", b"GET http://x/", b"G", b"GET http://x/ "]

    def pour(start):
        with socket.create_connection(("127.0.0.1", server.port), SOON) as sock, suppress(ConnectionError):
            sock.sendall(start)
            sock.sendall(ENDLESS)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass

    spawn_thread(pour, starts[0]).get(timeout=SOON)
    tracemalloc.start()
    try:
        for one in [spawn_thread(pour, starts[number % len(starts)]) for number in range(100)]:
            one.get(timeout=SOON)
        wait_until(lambda: server.active_connections == 0)
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5_000_000
    assert left < 1_000_000


@pytest.mark.parametrize(
    "text",
    ["a" * 16000, "a-" * 8000, "1." * 8000, "0x" + "f" * 16000, "9" * 16000, ":" * 16000, "[" * 16000, "a." * 8000],
)
def test_requirement_30_no_name_takes_long(text):
    began = time.process_time()
    for host in (text, f"[{text}]", f"{text}:80", f"[{text}]:80", f"{text}@x:80"):
        with suppress(GtcpServerError):
            parse_authority(host, 80)
        with suppress(GtcpServerError):
            make_target(host, 80)
    assert time.process_time() - began < 0.3
