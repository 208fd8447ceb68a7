"""HTTP clients through the proxy: forwarding, CONNECT, and what must never be forwarded."""

import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import urllib.request
from contextlib import suppress

import gevent
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver import TLSConfig
from gtcpserver.http1.head import HttpError, check_head, find_end_of_head
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.http_fields import end_to_end
from gtcpserver.proxy.http_messages import absolute_target, connect_target
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.static_files import StaticFiles
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, answer_of
from kit.waiting import wait_for_port


@pytest.fixture
def proxy(serve):
    def start(**options):
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})
        return serve(ProxyHandler(gate, pseudonym="gtcpserver"))

    return start


@pytest.fixture
def origin(serve):
    """`origin(answer)` starts a server that reads a head, keeps it in `.heads`, and sends the answer."""

    def start(answer=b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", keep=False):
        heads = []

        def handler(conn):
            while True:
                try:
                    head = conn.recv_until(b"\r\n\r\n")
                except EOFError:
                    return
                heads.append(head.decode())
                given = answer(conn, head) if callable(answer) else answer
                if given:
                    conn.sendall(given)
                if not keep:
                    return

        server = serve(handler)
        server.heads = heads
        server.url = f"http://127.0.0.1:{server.port}"
        return server

    return start


@pytest.fixture
def ask(connect, in_thread):
    """`ask(server, bytes)`: the first answer to what is sent."""

    def send(server, data, method="GET"):
        with connect(server) as client:
            in_thread(client.sendall, data)
            with client.makefile("rb") as file:
                return in_thread(answer_of, file, method)

    return send


def test_a_request_is_forwarded_with_the_fields_that_belong_to_it(proxy, origin, ask, lines):
    target = origin()
    status, fields, body = ask(
        proxy(),
        f"GET {target.url}/a?b#c HTTP/1.1\r\nHost: other.example\r\nX-Own: 1\r\nConnection: X-Hop, keep-alive, Host\r\n"
        "X-Hop: gone\r\nProxy-Connection: keep-alive\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        "Proxy-Authorization: Basic eDp5\r\nCookie: a=b\r\n\r\n".encode(),
    )
    assert (status, body) == (200, b"hello")
    assert fields["via"] == "1.1 gtcpserver"
    head = target.heads[0]
    assert head.startswith("GET /a?b HTTP/1.1\r\n")  # requirement 20: and the URI's authority is the Host
    sent = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    assert sent == {"Host": f"127.0.0.1:{target.port}", "X-Own": "1", "Cookie": "a=b", "Via": "1.1 gtcpserver"}
    (line,) = lines()
    assert (line["command"], line["result"], line["received"], line["asked"]) == (
        "GET",
        "ok",
        5,
        f"127.0.0.1:{target.port}",
    )


def test_requirement_26_an_origin_that_closes_mute_is_a_502_and_an_idle_one_is_tried_again(
    proxy, origin, connect, in_thread
):
    mute = origin(lambda conn, head: b"")
    server = proxy()
    with connect(server) as client, client.makefile("rb") as file:
        client.sendall(f"GET {mute.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert in_thread(answer_of, file)[0] == 502
    assert len(mute.heads) == 1
    once = origin()  # says keep-alive, and closes
    with connect(server) as client, client.makefile("rb") as file:
        for number in range(3):
            client.sendall(f"GET {once.url}/{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert in_thread(answer_of, file)[::2] == (200, b"hello")
            gevent.sleep(0.02)
    assert [head.split()[1] for head in once.heads] == ["/0", "/1", "/2"]


def test_connections_are_kept_on_both_sides(proxy, origin, connect, in_thread):
    target = origin(keep=True)
    with connect(proxy()) as client, client.makefile("rb") as file:
        request = f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        client.sendall(request * 3)  # pipelined
        for _ in range(3):
            assert in_thread(answer_of, file)[0] == 200
        client.sendall(request)
        assert in_thread(answer_of, file)[0] == 200
    assert target.accepted_connections == 1
    assert len(target.heads) == 4


def test_requirement_25_bodies_of_requests(proxy, connect, in_thread, serve):
    got = []

    def handler(conn):
        head = conn.recv_until(b"\r\n\r\n").lower()
        if b"chunked" in head:
            body = b""
            while size := int(conn.recv_until(b"\r\n"), 16):
                body += conn.recv_exactly(size)
                conn.recv_until(b"\r\n")
            while conn.recv_until(b"\r\n") != b"\r\n":
                pass
        else:
            body = conn.recv_exactly(int(head.split(b"content-length: ")[1].split()[0]))
        got.append(hashlib.sha256(body).digest())
        conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    target, server = serve(handler), proxy()
    body = os.urandom(3_000_000)
    url = f"http://127.0.0.1:{target.port}/"
    with connect(server) as client, client.makefile("rb") as file:
        client.sendall(f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        in_thread(client.sendall, body)
        assert in_thread(answer_of, file)[0] == 204
        client.sendall(f"PUT {url} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for start in range(0, len(body), 70_000):
            piece = body[start : start + 70_000]
            in_thread(client.sendall, b"%x\r\n%b\r\n" % (len(piece), piece))
        client.sendall(b"0\r\nX-Trailer: 1\r\n\r\n")
        assert in_thread(answer_of, file)[0] == 204
    assert got == [hashlib.sha256(body).digest()] * 2


@pytest.mark.parametrize(
    ("answer", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", b"abc", True),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end", True),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    ],
)
def test_requirement_25_bodies_of_answers(proxy, origin, connect, in_thread, answer, body, kept):
    target, server = origin(answer), proxy()
    with connect(server) as client, client.makefile("rb") as file:
        for _ in range(2):
            client.sendall(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            found = in_thread(answer_of, file)
            if found[0] == 103:
                found = in_thread(answer_of, file)
            assert found[2] == body


def test_requirement_25_head_and_http_1_0_clients(proxy, origin, connect, in_thread):
    target, server = origin(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"), proxy()
    with connect(server) as client, client.makefile("rb") as file:
        client.sendall(f"HEAD {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert in_thread(answer_of, file, "HEAD")[1]["content-length"] == "1000"
    target = origin(
        b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    with connect(server) as client:
        client.sendall(f"GET {target.url}/ HTTP/1.0\r\n\r\n".encode())
        answer = in_thread(read, client, 10_000)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"chunked" not in answer.lower()
        assert answer.endswith(b"\r\n\r\nabc")


def test_requirement_25_expect_100_continue(proxy, connect, in_thread, serve):
    def handler(conn):
        head = conn.recv_until(b"\r\n\r\n")
        assert b"100-continue" in head
        conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + conn.recv_exactly(4))

    target = serve(handler)
    with connect(proxy()) as client, client.makefile("rb") as file:
        client.sendall(
            f"POST http://127.0.0.1:{target.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert in_thread(answer_of, file)[0] == 100
        client.sendall(b"body")
        assert in_thread(answer_of, file)[::2] == (200, b"body")


def test_an_answer_before_the_end_of_the_request_ends_the_connection(proxy, connect, in_thread, serve):
    def refuse(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")

    target = serve(refuse)
    with connect(proxy()) as client, client.makefile("rb") as file:
        client.sendall(
            f"POST http://127.0.0.1:{target.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc".encode()
        )
        assert in_thread(answer_of, file)[::2] == (413, b"no!")
        assert in_thread(file.read) == b""


def test_upgrades_become_tunnels(proxy, connect, in_thread, serve):
    def handler(conn):
        head = conn.recv_until(b"\r\n\r\n").lower()
        assert b"upgrade: websocket" in head
        assert b"connection: upgrade" in head
        conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst ")
        echo(conn)

    target = serve(handler)
    with connect(proxy()) as client, client.makefile("rb") as file:
        client.sendall(
            f"GET http://127.0.0.1:{target.port}/ HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\n\r\nearly ".encode()
        )
        status, fields, _ = in_thread(answer_of, file)
        assert (status, fields["upgrade"]) == (101, "websocket")
        client.sendall(b"late")
        assert in_thread(file.read, 16) == b"first early late"


def test_requirements_01_18_19_connect_with_early_bytes_and_half_close(proxy, connect, in_thread, serve, lines):
    target = serve(lambda conn: conn.sendall(b"".join(iter(lambda: conn.recv(100), b"")).upper()))
    for host in ("127.0.0.1", "localhost", "0x7f.1"):
        with connect(proxy()) as client:
            client.sendall(f"CONNECT {host}:{target.port} HTTP/1.1\r\nHost: x\r\n\r\nearly ".encode())
            head = in_thread(read, client, 39)
            assert head == b"HTTP/1.1 200 Connection established\r\n\r\n"
            client.sendall(b"late")
            client.shutdown(socket.SHUT_WR)
            assert in_thread(read, client, 100) == b"EARLY LATE"
    assert [(line["command"], line["result"], line["sent"]) for line in lines(3)] == [("CONNECT", "ok", 10)] * 3


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT a@127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET https://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET ftp://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET http://[fe80::1%25eth0]/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET http:///x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET http://10.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        ("CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        ("GET http://no-such-host.invalid/ HTTP/1.1\r\nHost: x\r\n\r\n", 502),
        ("GET http://127.0.0.1:CLOSED/ HTTP/1.1\r\nHost: x\r\n\r\n", 502),
        ("CONNECT [::1]:CLOSED HTTP/1.1\r\nHost: x\r\n\r\n", 502),
        ("GET http://127.0.0.1:CLOSED/ HTTP/1.1\r\nHost: x\r\nVia: 1.1 gtcpserver\r\n\r\n", 508),
        ("GET http://x/" + "a" * 20000 + " HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        ("GET http://x/ HTTP/1.1\r\n" + "A: b\r\n" * 200 + "\r\n", 431),
        ("GET http://x/ HTTP/1.1\r\nA: " + "b" * 70000, 431),
        ("GET http://x/ HTTP/3.0\r\n\r\n", 505),
    ],
)
def test_what_cannot_be_served_is_answered_properly(proxy, ask, request_, status):
    found = ask(proxy(), request_.replace("CLOSED", str(free_port())).encode())
    assert found[0] == status
    assert found[2].startswith(f"{status} ".encode())
    assert b"127.0.0.1" not in found[2] or "127.0.0.1" in request_


SMUGGLED = [
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length: 5\r\nContent-Length: 5",
    "Content-Length: 5, 5",
    "Content-Length: +5",
    "Content-Length: 0x5",
    "Content-Length: 5 5",
    "Content-Length: -1",
    "Content-Length : 5",
    "Content-Length\t: 5",
    " Content-Length: 5",
    "A: b\r\n Content-Length: 5",
    "A: b\r\n\tfolded",
    "A: b\nContent-Length: 5",
    "A: b\rContent-Length: 5",
    "A: b\0",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: identity, chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding:\x0bchunked",
    "Host: y",
    ": x",
    "A",
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", SMUGGLED)
def test_requirement_21_what_could_be_read_in_two_ways_is_refused_and_not_forwarded(proxy, origin, ask, fields):
    target = origin()
    request = f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\nhello0\r\n\r\n"
    assert ask(proxy(), request.encode("latin-1"))[0] in (400, 501)
    assert target.accepted_connections == 0


@pytest.mark.parametrize(
    "body",
    [
        b"fffffffffffffffff\r\nx",
        b"-1\r\nx",
        b"0x5\r\nhello",
        b"5 \r\nhello\r\n",
        b"zz\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"5\nhello\r\n",
    ],
)
def test_requirement_21_bad_chunks_are_not_forwarded(proxy, origin, ask, body):
    target = origin()
    head = f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert ask(proxy(), head.encode() + body)[0] == 400
    assert target.accepted_connections == 0


def test_requirement_27_407_keeps_the_connection_and_the_password_opens_it(proxy, origin, connect, in_thread, lines):
    target = origin(keep=True)
    server = proxy(
        client_rules=[parse_client_rule("allow from any to any with auth staff")],
        authenticators={"staff": OnePassword()},
    )
    with connect(server) as client, client.makefile("rb") as file:
        for field, status in [
            ("", 407),
            ("Proxy-Authorization: Basic QWRhOm5v\r\n", 407),
            ("Proxy-Authorization: Basic ???\r\n", 407),
            ("Proxy-Authorization: Bearer x\r\n", 407),
            ("Proxy-Authorization: bAsIc QWRhOnB3\r\n", 200),
            ("Proxy-Authorization: bAsIc QWRhOnB3\r\n", 200),
            ("", 407),
        ]:
            client.sendall(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n{field}\r\n".encode())
            found = in_thread(answer_of, file)
            assert found[0] == status
            assert (found[1]["proxy-authenticate"] is not None) is (status == 407)
    assert "Authorization" not in "".join(target.heads)
    assert [line["user"] for line in lines(7)] == [None] * 4 + ["Ada"] * 2 + [None]


def test_requirement_31_a_head_has_one_deadline(proxy, connect, in_thread, lines):
    with connect(proxy(timeouts=Timeouts(negotiate=0.1))) as client, client.makefile("rb") as file:
        client.sendall(b"GET http")
        assert in_thread(answer_of, file)[0] == 408


def test_a_slow_origin_is_a_504(proxy, origin, ask):
    target = origin(lambda conn, head: gevent.sleep(1))
    assert (
        ask(proxy(timeouts=Timeouts(answer=0.05)), f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())[0] == 504
    )


def test_an_answer_that_breaks_off_is_a_reset_for_the_client(proxy, origin, connect, in_thread):
    target = origin(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nonly")
    with connect(proxy()) as client:
        client.sendall(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            in_thread(read, client, 1000)


def test_clients_that_no_rule_lets_in_get_a_403(proxy, ask):
    server = proxy(client_rules=[])
    assert ask(server, b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 403


def test_requirement_28_ipv6_literals_without_a_port(proxy, ask):
    head = check_head(b"GET http://[::1]/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert str(absolute_target(head)[0]) == "[::1]:80"
    assert absolute_target(head)[1] == b"[::1]"


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; user root;
events {{ }}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder}; gzip on; gzip_types *;
    server {{ listen 127.0.0.1:{port}; root {folder}; dav_methods PUT; client_max_body_size 100m; }}
}}
"""


@pytest.fixture
def nginx(tmp_path):
    """The port of an nginx that serves tmp_path."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is missing")
    port = free_port()
    os.chmod(tmp_path, 0o755)
    (tmp_path / "nginx.conf").write_text(NGINX.format(folder=tmp_path, port=port))
    process = subprocess.Popen(["nginx", "-c", f"{tmp_path}/nginx.conf", "-e", f"{tmp_path}/log"])
    wait_for_port(port, process)
    yield port
    process.kill()
    process.wait()


def curl(server, *arguments):
    command = ["curl", "-sS", "--noproxy", "", "-x", f"http://{server.address}", *arguments]
    return subprocess.run(command, capture_output=True, timeout=SOON)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_and_nginx(proxy, nginx, in_thread, tmp_path):
    server, url = proxy(), f"http://127.0.0.1:{nginx}"
    content = os.urandom(1_000_000) * 20
    (tmp_path / "big").write_bytes(content)
    (tmp_path / "text").write_text("text " * 10_000)
    assert in_thread(curl, server, f"{url}/big").stdout == content
    assert in_thread(curl, server, "--proxytunnel", f"{url}/big").stdout == content
    assert in_thread(curl, server, "--compressed", f"{url}/text").stdout == b"text " * 10_000  # chunked
    assert in_thread(curl, server, "--http1.0", f"{url}/text").stdout == b"text " * 10_000
    assert in_thread(curl, server, "-r", "5-9", f"{url}/big", f"{url}/big").stdout == content[5:10] * 2
    assert b"404" in in_thread(curl, server, "-I", f"{url}/none").stdout
    several = in_thread(curl, server, *[f"{url}/text"] * 5, "-w", "%{num_connects}").stdout
    assert several == (b"text " * 10_000 + b"1") + (b"text " * 10_000 + b"0") * 4


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_uploads(proxy, serve, in_thread, tmp_path):
    (tmp_path / "up").write_bytes(os.urandom(2_000_000))

    def handler(conn):
        head = conn.recv_until(b"\r\n\r\n").lower()
        if b"expect" in head:
            conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(head.split(b"content-length: ")[1].split()[0])
        digest = hashlib.sha256(conn.recv_exactly(size)).hexdigest()
        conn.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n{digest}".encode())

    target = serve(handler)
    done = in_thread(curl, proxy(), "-T", str(tmp_path / "up"), f"http://127.0.0.1:{target.port}/")
    assert done.stdout.decode() == hashlib.sha256((tmp_path / "up").read_bytes()).hexdigest()


def test_the_standard_librarys_client(proxy, origin, in_thread):
    target, server = origin(), proxy()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://{server.address}"}))
    assert in_thread(lambda: opener.open(target.url, timeout=SOON).read()) == b"hello"


def test_rules_by_name_hold_for_http(proxy, origin, ask):
    target = origin()
    server = proxy(destination_rules=[parse_destination_rule("deny localhost"), *ANYWHERE])
    assert ask(server, f"GET http://localhost:{target.port}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())[0] == 403
    assert ask(server, f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())[0] == 200


@pytest.mark.slow
@given(st.binary(max_size=200), st.sampled_from([b"GET ", b"CONNECT ", b"GET http://", b""]))
def test_any_bytes_are_a_head_or_an_error_of_ours(junk, start):
    for raw in (start + junk, start + b"x HTTP/1.1\r\n" + junk, start + junk + b" HTTP/1.1\r\nHost: x"):
        raw += b"\r\n\r\n"
        with suppress(HttpError):
            end = find_end_of_head(raw)
            head = check_head(raw[:end])
            end_to_end(head.headers)
            with suppress(HttpError):
                connect_target(head)
            absolute_target(head)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_an_https_proxy_and_socks_in_tls(serve, in_thread, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    content = os.urandom(500_000)
    (tmp_path / "file").write_bytes(content)
    target = serve(StaticFiles(tmp_path))
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    server = serve(ProxyHandler(gate, tls=TLSConfig(tmp_path / "server.pem")))
    url = f"http://localhost:{target.port}/file"
    command = ["curl", "-sS", "--noproxy", "", "--proxy-cacert", f"{tmp_path}/ca.pem"]
    command += ["-x", f"https://localhost:{server.port}"]
    for option in ([], ["--proxytunnel"]):
        done = in_thread(
            lambda option=option: subprocess.run([*command, *option, url], capture_output=True, timeout=SOON)
        )
        assert (done.stderr, done.stdout == content) == (b"", True)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    def by_socks():
        with context.wrap_socket(
            socket.create_connection(("localhost", server.port), SOON), server_hostname="localhost"
        ) as sock:
            sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\x01" + target.port.to_bytes(2, "big"))
            sock.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            return read(sock, 1_000_000)

    assert in_thread(by_socks).endswith(content)


def test_a_client_that_speaks_no_tls_to_an_https_proxy(serve, connect, in_thread, tmp_path, lines):
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    client = connect(serve(ProxyHandler(gate, tls=TLSConfig(tmp_path / "server.pem"))))
    client.sendall(b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n")
    with suppress(ConnectionResetError):
        in_thread(read, client, 1000)
    assert lines()[0]["result"] == "tls_failed"
