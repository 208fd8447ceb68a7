"""Upstreams: through other proxies, real ones and such as misbehave."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
from ipaddress import ip_address

import gevent
import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.proxy.errors import RuleError
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.resolve import Resolver
from gtcpserver.proxy.rules import RuleMatch, decide_destination, parse_client_rule, parse_destination_rule
from gtcpserver.proxy.target import make_target
from gtcpserver.proxy.upstream_rules import DIRECT, choose_upstream, parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYWHERE, http, reply, socks
from kit.waiting import wait_until

# -- rules and urls ----------------------------------------------------------------------------------------------------


def way(rules, host, port=443, user=None, found=()):
    target = make_target(host, port)
    match = RuleMatch(ip_address("192.0.2.7"), "office", "staff" if user else None, user, port)
    addresses = (target.ip,) if target.ip is not None else tuple(map(ip_address, found))
    name = None if target.ip is not None else target.host
    return choose_upstream([parse_upstream_rule(rule) for rule in rules], match, name, lambda: addresses)


def test_the_first_rule_that_matches_chooses():
    rules = [
        "through direct .internal",
        "through tor from any user ada to any",
        "through corp from 192.0.2.0/24 via office to 10.0.0.0/8:443",
        "through other from 198.51.100.0/24 to any",
    ]
    assert way(rules, "db.internal") == DIRECT
    assert way(rules, "example.com", user="ada") == "tor"
    assert way(rules, "10.1.2.3") == "corp"
    assert way(rules, "10.1.2.3", port=80) == DIRECT
    assert way(rules, "example.com", found=["10.0.0.1"]) == "corp"
    assert way(rules, "example.com", found=["192.0.2.1"]) == DIRECT
    assert way([], "example.com") == DIRECT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow any", '"through" expected'),
        ("through", 'the name of an upstream, or "direct", expected'),
        ("through a", "a destination expected"),
        ("through a any any", "nothing more expected, got 'any'"),
        ("through a b c d", "nothing more expected"),
        ("through a/b any", "the name of an upstream"),
    ],
)
def test_rules_that_cannot_be_read(text, message):
    with pytest.raises(RuleError, match=message):
        parse_upstream_rule(text)


def test_urls():
    one = parse_upstream("a", "socks5://a%3Ab:p%40w@[2001:db8::1]:1080")
    assert (one.scheme, one.user, one.password, str(one.target)) == ("socks5", b"a:b", b"p@w", "[2001:db8::1]:1080")
    assert parse_upstream("a", "http://proxy.example:3128/").target.host == "proxy.example"
    assert "p@w" not in repr(one)
    for url in (
        *(
            "http://x",
            "x:1",
            "ftp://x:1",
            "socks4://u:p@x:1",
            "http://x:1/path",
            "http://x:1?q",
            "http://u@x:1",
            "http://:p@x:1",
        ),
        "http://u%3Av:p@x:1",  # which is the user "u"
        "http://u\udcff:p@x:1",  # an argument that is not UTF-8
    ):
        with pytest.raises(ConfigError, match="the url of upstream 'a' must be"):
            parse_upstream("a", url)
    with pytest.raises(ConfigError) as raised:
        parse_upstream("a", "ftp://ada:secret@x:1")
    assert "secret" not in str(raised.value)


def test_names_that_another_proxy_looks_up_meet_the_rules_about_names():
    def allowed(rules, name):
        match = RuleMatch(ip_address("192.0.2.7"), "office", None, None, 443)
        return decide_destination([parse_destination_rule(rule) for rule in rules], match, name, None).allowed

    assert allowed(["allow any"], "example.com")
    assert not allowed(["deny .example.com", "allow any"], "www.example.com")
    assert not allowed(["allow 10.0.0.0/8"], "example.com")
    assert not allowed(["allow any"], "localhost")
    assert not allowed(["allow any"], "x.localhost")
    assert allowed(["allow loopback"], "localhost")


# -- ways --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_failures_are_told_as_if_they_were_ours(proxy_by, serve, connect, in_thread, lines, scheme):
    other = serve(ProxyHandler(Gate(client_rules=[parse_client_rule("allow any")], destination_rules=ANYWHERE[:1])))
    server = proxy_by(parse_upstream("up", f"{scheme}://{other.address}", resolve="there"))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        refused = 5 if scheme == "socks5" else 4  # a 502 does not tell
        assert in_thread(reply, connect(server), socks(nobody.getsockname()[1])) == refused
    assert in_thread(reply, connect(server), socks(1, "8.8.8.8")) == 2
    head = b"CONNECT 8.8.8.8:1 HTTP/1.1\r\nHost: x\r\n\r\n"
    assert in_thread(http, connect(server), head).startswith(b"HTTP/1.1 502 ")
    assert in_thread(reply, connect(server), socks(1, "no-such.invalid")) == 4
    ours = [line for line in lines(8) if line["upstream"] == "up"]
    assert [line["result"] for line in ours] == [
        "refused" if scheme == "socks5" else "unreachable",
        "upstream_failed",
        "upstream_failed",
        "unreachable",
    ]


BAD = {
    "closes": (b"", "socks5"),
    "speaks something else": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "socks5"),
    "wants a password": (b"\x05\x02", "socks5"),
    "wants another method": (b"\x05\x01", "socks5"),
    "accepts none": (b"\x05\xff", "socks5"),
    "an unknown reply": (b"\x05\x00\x05\x77\x00\x01\0\0\0\0\0\0", "socks5"),
    "ends in its reply": (b"\x05\x00\x05\x00\x00\x01\0", "socks5"),
    "no HTTP": (b"\x05\x00hello\r\n\r\n", "http"),
    "407": (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "http"),
    "a head without end": (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 5000, "http"),
    "interim answers forever": (b"HTTP/1.1 100 Continue\r\n\r\n" * 10, "http"),
}


@pytest.mark.parametrize("what", BAD)
def test_proxies_that_misbehave(proxy_by, serve, connect, in_thread, lines, what):
    said, scheme = BAD[what]

    def misbehave(conn):
        conn.recv(1000)
        conn.sendall(said)
        conn.settimeout(SOON)

    server = proxy_by(parse_upstream("up", f"{scheme}://{serve(misbehave).address}"))
    assert in_thread(reply, connect(server), socks(80)) in (1, 2)
    assert lines()[0]["result"] in ("upstream_failed", "reset", "failed")


def test_a_proxy_that_says_nothing_has_its_time(proxy_by, serve, connect, in_thread, lines):
    silent = serve(lambda conn: gevent.sleep(SOON))
    upstream = parse_upstream("up", f"socks5://{silent.address}")
    server = proxy_by(upstream, timeouts=Timeouts(connect=0.1))
    assert in_thread(reply, connect(server), socks(80)) == 4
    assert lines()[0]["result"] == "connect_timeout"
    wait_until(lambda: silent.stats().active == 0 or silent.halt())


def test_early_bytes_behind_the_other_proxys_answer_are_the_clients(proxy_by, serve, connect, in_thread):
    def greet(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
        conn.recv(1)

    server = proxy_by(parse_upstream("up", f"http://{serve(greet).address}"))
    client = connect(server)
    assert in_thread(reply, client, socks(80)) == 0
    assert in_thread(read, client, 5) == b"hello"


def test_requests_are_forwarded_to_an_http_proxy_and_not_tunnelled(proxy_by, serve, connect, in_thread, lines):
    heads = []

    def other(conn):
        while True:
            heads.append(conn.recv_until(b"\r\n\r\n"))
            status = b"407 Proxy Authentication Required" if b"/407" in heads[-1] else b"200 OK"
            conn.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")

    server = proxy_by(parse_upstream("up", f"http://ada:pw@{serve(other).address}"))
    client = connect(server)
    ask = b"GET http://127.0.0.1:81/%b HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eDp5\r\n\r\n"
    assert in_thread(http, client, ask % b"a").startswith(b"HTTP/1.1 200")
    assert in_thread(http, client, ask % b"b").startswith(b"HTTP/1.1 200")
    assert in_thread(http, client, ask % b"407").startswith(b"HTTP/1.1 502")
    assert heads[0].startswith(b"GET http://127.0.0.1:81/a HTTP/1.1\r\nHost: 127.0.0.1:81\r\n")
    assert heads[1].startswith(b"GET http://127.0.0.1:81/b ")
    assert all(b"Proxy-Authorization: Basic YWRhOnB3\r\n" in head for head in heads)
    assert not any(b"eDp5" in head for head in heads)
    assert [line["result"] for line in lines(3)] == ["ok", "ok", "upstream_failed"]


@pytest.mark.parametrize(
    ("resolve", "head"), [("here", b"CONNECT 127.0.0.1:81 "), ("there", b"GET http://localhost:81/ ")]
)
def test_requirement_15_the_address_that_was_checked_is_the_one_another_proxy_gets(
    proxy_by, serve, connect, in_thread, resolve, head
):
    heads = []

    def other(conn):
        heads.append(conn.recv_until(b"\r\n\r\n"))

    server = proxy_by(
        parse_upstream("up", f"http://{serve(other).address}", resolve=resolve), resolver=Resolver("ipv4")
    )
    in_thread(http, connect(server), b"GET http://localhost:81/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert heads[0].startswith(head)


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_another_proxy_that_is_down_is_not_taken_for_the_destination(proxy_by, connect, in_thread, lines, scheme):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        server = proxy_by(parse_upstream("up", f"{scheme}://127.0.0.1:{nobody.getsockname()[1]}"))
        assert in_thread(reply, connect(server), socks(80)) == 1
        answer = in_thread(http, connect(server), b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"next proxy" in answer
    for line in lines(2):
        assert (line["result"], line["upstream"]) == ("upstream_failed", "up")
        assert line["detail"] == "upstream up cannot be reached: Connection refused"


@pytest.mark.skipif(shutil.which("tinyproxy") is None, reason="tinyproxy is not installed")
def test_by_way_of_tinyproxy(proxy_by, serve, connect, in_thread, tmp_path):
    port = free_port()
    (tmp_path / "conf").write_text(f"Port {port}\nListen 127.0.0.1\nTimeout 10\nAllow 127.0.0.1\n")
    process = subprocess.Popen(["tinyproxy", "-d", "-c", str(tmp_path / "conf")], stdout=subprocess.DEVNULL)
    try:

        def answer(conn):
            conn.recv_until(b"\r\n\r\n")
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

        origin, talk = serve(answer), serve(echo)
        server = proxy_by(parse_upstream("tiny", f"http://127.0.0.1:{port}"))

        def ask():
            while True:
                with socket.create_connection(("127.0.0.1", server.port), SOON) as client:
                    data = http(client, b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port)
                if not data.startswith(b"HTTP/1.1 502"):  # it is not up yet
                    return data

        answered = in_thread(ask)
        assert answered.startswith(b"HTTP/1.1 200 OK")
        assert b"tinyproxy" in answered  # its Via
        client = connect(server)
        assert in_thread(reply, client, socks(talk.port)) == 0
        client.sendall(b"hello")
        assert in_thread(read, client, 5) == b"hello"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_bind_and_udp_are_not_led_past_the_other_proxy(proxy_by, serve, connect, in_thread):
    server = proxy_by(parse_upstream("up", f"socks5://{serve(echo).address}"))
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x02\x00\x01\x7f\0\0\x01\0\x50")
    assert in_thread(read, client, 4)[2:] == b"\x05\x02"
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
    said = in_thread(read, client, 12)
    assert said[3] == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as origin, socket.socket(type=socket.SOCK_DGRAM) as ours:
        origin.bind(("127.0.0.1", 0))
        ours.bind(("127.0.0.1", 0))
        packet = b"\0\0\0\x01\x7f\0\0\x01" + struct.pack("!H", origin.getsockname()[1]) + b"x"
        ours.sendto(packet, ("127.0.0.1", struct.unpack("!H", said[10:12])[0]))
        origin.settimeout(0.2)
        with pytest.raises(TimeoutError):
            in_thread(origin.recv, 10)


# -- TCP Fast Open -----------------------------------------------------------------------------------------------------

FAST_OPEN = """
    import socket, sys
    from ipaddress import ip_address
    from gtcpserver import ListenConfig, Server, parse_address
    from gtcpserver.proxy.gate import Gate
    from gtcpserver.proxy.handler import ProxyHandler
    from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule

    TCPI_OPT_SYN_DATA = 32
    heads = []

    def answer(conn):
        heads.append(conn.recv_until(b"\\r\\n\\r\\n"))
        in_syn = bool(conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] & TCPI_OPT_SYN_DATA)
        conn.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: 1\\r\\n\\r\\n%d" % in_syn)

    origin = Server("127.0.0.1:0", answer, listen=ListenConfig(fast_open=16))
    gate = Gate(
        client_rules=[parse_client_rule("allow any")],
        destination_rules=[parse_destination_rule("allow loopback")],
        fast_open=True,
    )
    import gevent.socket
    with origin, Server("127.0.0.1:0", ProxyHandler(gate)) as proxy:
        for _ in range(3):
            client = gevent.socket.create_connection(("127.0.0.1", proxy.port), 60)
            client.sendall(b"GET http://127.0.0.1:%d/ HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" % origin.port)
            data = b""
            while not data.endswith((b"\\r\\n\\r\\n0", b"\\r\\n\\r\\n1")):
                data += client.recv(1000)
            print(chr(data[-1]), end="", flush=True)
            client.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")
def test_requests_go_in_the_syn_where_the_origin_has_given_a_cookie(in_thread):
    # In a network namespace, where fast open can be switched on.
    setup = 'ip link set lo up && sysctl -qw net.ipv4.tcp_fastopen=3 && exec "$0" -c "$1"'
    command = ["unshare", "--net", "sh", "-c", setup, sys.executable, textwrap.dedent(FAST_OPEN)]
    done = in_thread(lambda: subprocess.run(command, capture_output=True, text=True, timeout=SOON))
    assert done.stdout == "011", done.stderr
