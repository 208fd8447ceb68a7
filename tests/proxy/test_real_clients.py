"""Programs of the real world through the proxy: a browser, ssh, DNS, curl; and what other proxies get wrong."""

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import gevent
import pytest
import trustme

from gtcpserver import TLSConfig
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.static_files import StaticFiles
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.proxying import QUICK, http, in_thread_for, reply, socks
from kit.sshd import PROGRAMS, sshd, through
from kit.waiting import wait_until

ANYBODY = [parse_client_rule("allow any")]
ANYWHERE = [parse_destination_rule("allow loopback"), parse_destination_rule("allow any")]


@pytest.fixture
def proxy(serve):
    def start(**options):
        return serve(ProxyHandler(Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})))

    return start


def run(*command, **options):
    return subprocess.run(command, capture_output=True, timeout=SOON, **options)


@pytest.mark.slow
@needs("chromium")
@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_a_browser_loads_an_https_page(proxy, serve, in_thread, tmp_path, lines, scheme):
    certificate = trustme.CA().issue_cert("page.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "key")
    key = run("openssl", "x509", "-in", tmp_path / "key", "-noout", "-pubkey").stdout
    der = run("openssl", "pkey", "-pubin", "-outform", "der", input=key).stdout
    pin = base64.b64encode(hashlib.sha256(der).digest()).decode()
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "page.html").write_text("<title>x</title><p id=a>before</p><script src=/script.js></script>")
    (tmp_path / "www" / "script.js").write_text("document.getElementById('a').textContent = 'it has run'")
    origin = serve(StaticFiles(tmp_path / "www"), tls=TLSConfig(tmp_path / "key"))

    class Names:
        def resolve(self, name):
            from ipaddress import ip_address

            if name != "page.example":
                raise socket.gaierror(socket.EAI_NONAME, "not here")
            return (ip_address("127.0.0.1"),)

        def close(self):
            pass

    server = proxy(resolver=Names())
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        f"--user-data-dir={tmp_path}/profile",
        f"--proxy-server={scheme}://{server.address}",
        f"--ignore-certificate-errors-spki-list={pin}",
        *("--virtual-time-budget=5000", "--dump-dom", f"https://page.example:{origin.port}/page.html"),
    ]
    done = in_thread_for(SOON, lambda: subprocess.run(command, capture_output=True, text=True, timeout=SOON))
    assert "it has run" in done.stdout, done.stderr[-2000:]
    assert any(line["asked"] == f"page.example:{origin.port}" and line["command"] == "CONNECT" for line in lines())


@pytest.mark.slow
@needs(*PROGRAMS)
@pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root")
@pytest.mark.parametrize("kind", ["socks5", "socks4", "http"])
def test_ssh(proxy, in_thread, tmp_path, kind):
    with sshd(tmp_path) as client:
        command = [*client, *through(proxy().address, kind), "root@127.0.0.1", "echo hello from sshd"]
        done = in_thread(lambda: run(*command))
        assert done.stdout == b"hello from sshd\n", done.stderr


@pytest.mark.slow
@needs("dnsmasq")
def test_a_dns_query_over_udp_associate(proxy, connect, in_thread):
    # It listens on both, and not where connections are in TIME-WAIT.
    port = free_port()
    with socket.socket(type=socket.SOCK_DGRAM) as too:
        too.bind(("127.0.0.1", port))
    command = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
    ]
    command += ["--listen-address=127.0.0.1", f"--port={port}", "--address=/name.example/192.0.2.55", "--pid-file="]
    dnsmasq = subprocess.Popen([*command, "--user=root"], stderr=subprocess.DEVNULL)
    try:
        client = connect(proxy())
        client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
        answer = in_thread(read, client, 12)
        relay_port = struct.unpack("!H", answer[10:])[0]
        question = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0" + b"\4name\7example\0" + b"\0\1\0\1"
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.5)

            def ask():
                for _ in range(20):
                    sock.sendto(
                        b"\0\0\0\x03\tlocalhost" + struct.pack("!H", port) + question, ("127.0.0.1", relay_port)
                    )
                    try:
                        return sock.recv(1000)
                    except TimeoutError:
                        assert dnsmasq.poll() is None
                raise AssertionError("no answer")

            told = in_thread(ask)
        assert told[:10] == b"\0\0\0\x01\x7f\0\0\x01" + struct.pack("!H", port)
        assert told[10:12] == b"\x12\x34"
        assert told.endswith(bytes([192, 0, 2, 55]))
    finally:
        dnsmasq.kill()
        dnsmasq.wait()


@pytest.mark.slow
@needs("curl")
@pytest.mark.parametrize("option", ["-x http://", "--proxytunnel -x http://", "--socks5-hostname ", "--socks4a "])
def test_curl_resumes_and_uploads(proxy, serve, in_thread, tmp_path, option):
    content = os.urandom(400_000)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "part").write_bytes(content[:150_000])

    def take(conn):
        head = conn.recv_until(b"\r\n\r\n").lower()
        conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" if b"expect" in head else b"")
        digest = hashlib.sha256(conn.recv_exactly(int(head.split(b"content-length: ")[1].split()[0]))).hexdigest()
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + digest.encode())

    files, taker = serve(StaticFiles(tmp_path)), serve(take)
    *words, last = option.split(" ")
    words = [*words, last + proxy().address] if last else [*words, proxy().address]
    curl = ["curl", "-sS", "--noproxy", "", "--max-time", "10", *words]
    done = in_thread(lambda: run(*curl, "-C", "-", "-o", tmp_path / "part", f"http://localhost:{files.port}/file"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "part").read_bytes() == content
    done = in_thread(lambda: run(*curl, "-T", tmp_path / "file", f"http://localhost:{taker.port}/"))
    assert done.stdout.decode() == hashlib.sha256(content).hexdigest()


def test_python_socks(proxy, serve, in_thread):
    python_socks = pytest.importorskip("python_socks.sync")
    target, server = serve(echo), proxy()

    def talk(scheme):
        client = python_socks.Proxy.from_url(f"{scheme}://{server.address}")
        with client.connect("localhost", target.port, timeout=SOON) as sock:
            sock.sendall(b"hello")
            return sock.recv(10)

    for scheme in ("socks4", "socks5", "http"):
        assert in_thread(talk, scheme) == b"hello"


@pytest.mark.slow
def test_500_clients_that_drip_do_not_keep_a_good_one_out(proxy, serve, connect, in_thread, need_descriptors):
    need_descriptors(2000)
    origin, server = serve(echo), proxy()
    dripping = [connect(server) for _ in range(500)]
    for number, client in enumerate(dripping):
        client.sendall((b"\x05", b"\x04", b"G", b"CONNECT x:1 HTTP/1.1\r\nHo", b"\x05\x01")[number % 5])
    for _ in range(3):
        for number, client in enumerate(dripping):
            if number % 5 == 2:
                client.sendall(b"E")
        assert in_thread(reply, connect(server), socks(origin.port)) == 0


INSIDE = [
    *(
        "127.0.0.1",
        "127.1",
        "0x7f.1",
        "2130706433",
        "0177.0.0.1",
        "127.0.0.1.",
        "localhost",
        "LOCALHOST.",
        "0.0.0.0",
        "0",
    ),
    *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "[::]"),
    *("169.254.169.254", "0xa9fea9fe", "2852039166", "[::ffff:169.254.169.254]", "[fd00:ec2::254]", "10.0.0.1"),
    *("192.168.1.1", "172.16.0.1", "100.64.0.1", "[fe80::1]", "[fc00::1]", "224.0.0.1", "255.255.255.255"),
]


@pytest.mark.slow
@pytest.mark.parametrize("host", INSIDE)
def test_requirements_11_14_16_nobody_is_led_inside_by_any_spelling(proxy, connect, in_thread, lines, host):
    server = proxy(destination_rules=[parse_destination_rule("allow any")])
    assert in_thread(reply, connect(server), socks(80, host)) == 2
    name = host.strip("[]").encode()
    client = connect(server)
    client.sendall(b"\x04\x01\0\x50\0\0\0\x01me\0" + name + b"\0")
    assert in_thread(read, client, 8)[:2] == b"\0\x5b"
    asked = host.encode()
    for head in (b"CONNECT %b:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://%b/ HTTP/1.1\r\nHost: example.com\r\n\r\n"):
        assert in_thread(http, connect(server), head % asked)[9:12] == b"403"
    assert {line["result"] for line in lines(4)} == {"destination_denied"}


# -- what moproxy gets wrong -------------------------------------------------------------------------------------------


def test_a_user_name_of_255_bytes(serve, connect, in_thread):
    class Knows:
        def check(self, user, password, client):
            return (user, password) == (b"u" * 255, b"p" * 255)

    rules = [parse_client_rule("allow from any to any with auth staff")]
    gate = Gate(client_rules=rules, destination_rules=ANYWHERE, authenticators={"staff": Knows()})
    origin, server = serve(echo), serve(ProxyHandler(gate))
    assert in_thread(reply, connect(server), socks(origin.port, user=b"u" * 255, password=b"p" * 255)) == 0


def test_bytes_behind_a_connect_are_not_lost_and_its_200_has_no_length(proxy, serve, connect, in_thread):
    origin = serve(echo)
    client = connect(proxy())
    client.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\nearly" % origin.port)
    head = in_thread(read, client, len(b"HTTP/1.1 200 Connection established\r\n\r\nearly"))
    assert head == b"HTTP/1.1 200 Connection established\r\n\r\nearly"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"\x05\x01\x00\x05\x01\x00\x09", b"\x05\x00\x05\x08\x00\x01\0\0\0\0\0\0"),  # address type
        (b"\x05\x01\x00\x05\x09\x00\x01\x7f\0\0\x01\0\x50", b"\x05\x00\x05\x07\x00\x01\0\0\0\0\0\0"),  # command
        (b"\x06\x01\x00", b""),  # version: an end, and no reset
    ],
)
def test_what_is_unknown_gets_a_proper_end(proxy, connect, in_thread, sent, answer):
    client = connect(proxy())
    client.sendall(sent)
    assert in_thread(read, client, 100) == answer


@pytest.mark.slow
def test_a_numeric_timeout_below_a_second_is_kept(proxy, connect, in_thread):
    from gtcpserver.proxy.gate import Timeouts

    client = connect(proxy(timeouts=Timeouts(negotiate=0.2)))
    began = time.monotonic()
    assert in_thread(client.recv, 1) == b""
    assert time.monotonic() - began > 0.15


def test_error_bodies_say_nothing_of_the_inside(proxy, connect, in_thread):
    server = proxy()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        answer = in_thread(http, connect(server), b"GET http://localhost:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % port)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"127.0.0.1" not in answer
    assert str(port).encode() not in answer


def test_each_request_has_one_line_in_the_log(proxy, serve, connect, in_thread, lines):
    def answer(conn):
        while True:
            conn.recv_until(b"\r\n\r\n")
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    client = connect(proxy())
    request = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % serve(answer).port
    for _ in range(3):
        assert in_thread(http, client, request).startswith(b"HTTP/1.1 200")
    client.close()
    other = connect(proxy())
    other.sendall(b"\x05")
    other.close()  # whose line comes behind those of the first
    assert [line["protocol"] for line in lines(4)] == ["http", "http", "http", "socks5"]


def test_the_proxy_is_not_reached_through_itself_by_another_address(serve, connect, in_thread):
    rules = [parse_destination_rule("allow any"), parse_destination_rule("allow loopback")]
    own = own_address()
    rules.append(parse_destination_rule(f"allow {own}"))
    gate = Gate(client_rules=ANYBODY, destination_rules=rules)
    server = serve(ProxyHandler(gate), "0.0.0.0:0")
    origin = serve(echo, "0.0.0.0:0")
    with socket.create_connection(("127.0.0.1", server.port), SOON) as client:
        assert in_thread(reply, client, socks(server.port, own)) == 2
    with socket.create_connection(("127.0.0.1", server.port), SOON) as client:
        assert in_thread(reply, client, socks(origin.port, own)) == 0


def own_address():
    """One of this host's that is not loopback."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has no address but loopback")
        return probe.getsockname()[0]


@pytest.mark.slow
def test_a_head_that_drips_has_the_time_of_one_negotiation(proxy, connect, in_thread, monkeypatch):
    from gtcpserver.proxy.gate import Timeouts
    from gtcpserver.proxy.http_session import HttpSession

    allowed, time_for_head = [], HttpSession._time_for_head
    monkeypatch.setattr(HttpSession, "_time_for_head", lambda self: allowed.append(time_for_head(self)) or allowed[-1])
    server = proxy(timeouts=Timeouts(negotiate=1.0))
    client = connect(server)
    wait_until(lambda: server.active_connections)
    gevent.sleep(0.3)
    client.sendall(b"G")
    assert in_thread(client.recv, 100).startswith(b"HTTP/1.1 408 ")
    assert 0 < allowed[0] <= 0.7


# -- the system --------------------------------------------------------------------------------------------------------

EXHAUSTED = """
    import gevent, gevent.socket, struct, sys
    from ipaddress import ip_address
    from gtcpserver import Server
    from gtcpserver.proxy.gate import Gate
    from gtcpserver.proxy.handler import ProxyHandler
    from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule

    def hold(conn):
        conn.recv(1)

    gate = Gate(
        client_rules=[parse_client_rule("allow any")],
        destination_rules=[parse_destination_rule("allow loopback")],
        external=[ip_address("127.0.0.9")],
    )
    handler = ProxyHandler(gate)
    with Server("127.0.0.1:5001", hold), Server("127.0.0.1:5002", hold), Server("127.0.0.1:5003", handler):
        def ask(data, size, source):
            sock = gevent.socket.socket()
            sock.bind(("127.0.0.2", source))  # ports of the clients' own
            sock.connect(("127.0.0.1", 5003))
            sock.sendall(data)
            answer = b""
            while len(answer) < size:
                answer += sock.recv(size - len(answer))
            kept.append(sock)
            return answer

        kept = []
        for number, port in enumerate((5001, 5001, 5001, 5002)):
            request = b"\\x05\\x01\\x00\\x05\\x01\\x00\\x01\\x7f\\0\\0\\x01" + struct.pack("!H", port)
            print(ask(request, 12, 6000 + number)[3], end=" ")
        print(ask(b"CONNECT 127.0.0.1:5001 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n", 12, 6010).decode(), end=" ")
        print(dict(handler.counters))
        for sock in kept:
            sock.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip(8)")
def test_requirement_38_ports_are_for_each_destination_and_their_end_is_told(in_thread):
    # In a network namespace with two ports for outgoing connections.
    setup = 'ip link set lo up && sysctl -qw net.ipv4.ip_local_port_range="40000 40001" && exec "$0" -c "$1"'
    command = ["unshare", "--net", "sh", "-c", setup, sys.executable, textwrap.dedent(EXHAUSTED)]
    done = in_thread(lambda: run(*command, text=True))
    # Two to the one, none is left; but there are two to the other.
    assert done.stdout == "0 0 1 0 HTTP/1.1 503 {'no_port': 2}\n", done.stderr


@pytest.fixture
def public_folder():
    """That another user can read as well."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up being root")
def test_requirement_39_the_workers_are_not_root_and_passwords_are_in_a_file(serve, in_thread, public_folder):
    origin = serve(echo)
    users = public_folder / "users"
    users.write_text(f"ada:{QUICK}\n")
    os.chmod(users, 0o644)
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--socks", "127.0.0.1:0", "--workers", "1"]
    command += ["--worker-user", "nobody", "--htpasswd", str(users), "--allow-destination", "loopback"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as master:
        try:

            def listening():
                while line := master.stderr.readline():
                    if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", line):
                        return int(found[1])
                raise AssertionError("it does not listen")

            port = in_thread(listening)

            def use(user):
                with socket.create_connection(("127.0.0.1", port), SOON) as client:
                    return reply(client, socks(origin.port, user=user))

            assert in_thread(use, b"ada") == 0
            assert in_thread(use, b"eve") is None
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
            owners = {os.stat(f"/proc/{pid}").st_uid for pid in children}
            assert owners == {65534}
        finally:
            master.terminate()
            in_thread(master.communicate)


def test_json_lines_are_json(proxy, serve, connect, in_thread, caplog):
    caplog.set_level(logging.INFO, "gtcpserver.access")
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    server = serve(ProxyHandler(gate, log_style="json"))
    client = connect(server)
    assert in_thread(reply, client, socks(serve(echo).port, "localhost")) == 0
    client.close()
    wait_until(lambda: caplog.records)
    assert json.loads(caplog.records[-1].getMessage())["asked"].startswith("localhost:")
