"""Answers that our HTTP servers give by themselves: what is left of a request is never read as the next one.

Each is driven with a body that is a request itself, counted or in chunks, and a second request behind it.
"""

import re
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import gevent
import pytest
from gevent.event import Event

import gtcpserver.proxy
from gtcpserver import Server
from gtcpserver.monitoring import Monitor
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.http_session import HttpSession
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.proxy.visitor import admit
from gtcpserver.static_files import StaticFiles
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.proxying import OnePassword
from kit.waiting import wait_for_port

PASSWORD = b"Proxy-Authorization: Basic QWRhOnB3\r\n"


class Target:
    """A careful origin: it reads each request with its body, notes its path, and answers with it."""

    def __init__(self, serve):
        self.paths = []
        self.pause = Event()
        self.url = b"http://127.0.0.1:%d" % serve(self).port

    def __call__(self, conn):
        with suppress(EOFError):
            while True:
                head = conn.recv_until(b"\r\n\r\n")
                path = head.split()[1]
                self.paths.append(path)
                if b"chunked" in head:
                    conn.recv_until(b"0\r\n\r\n")
                elif found := re.search(rb"content-length: (\d+)", head.lower()):
                    conn.recv_exactly(int(found[1]))
                if path == b"/mute":
                    return
                if path in (b"/silent", b"/smuggled"):
                    self.pause.wait(SOON)
                answer = b"nonsense" if path == b"/broken" else b"HTTP/1.1 200 OK"
                conn.sendall(answer + b"\r\nContent-Length: %d\r\n\r\n" % len(path) + path)


@pytest.fixture
def target(serve):
    target = Target(serve)
    yield target
    target.pause.set()


def proxy(serve, rules="allow any", limits=None, authenticators=None):
    gate = Gate(
        client_rules=[parse_client_rule(rules)],
        destination_rules=[parse_destination_rule("allow 127.0.0.1")],
        timeouts=Timeouts(answer=0.2),
        limits=LimitKeeper(limits),
        authenticators=authenticators or {},
    )
    return serve(lambda conn: HttpSession(conn, admit(gate, conn), b"me", lambda record: None).serve())


SERVERS = {
    "proxy": proxy,
    "proxy with a password": lambda serve: proxy(
        serve, "allow from any to any with auth staff", authenticators={"staff": OnePassword()}
    ),
    "proxy for nobody": lambda serve: proxy(serve, "deny any"),
    "proxy with a limit": lambda serve: proxy(serve, limits=Limits(request_body=4)),
}

#: Server, request line, more fields, status of its own answer.
OF_PROXY = [
    ("proxy", b"OPTIONS %b/", b"Max-Forwards: 0\r\n", 200),
    ("proxy", b"OPTIONS %b", b"Max-Forwards: 0\r\nExpect: 100-continue\r\n", 200),
    ("proxy", b"OPTIONS %b/", b"Max-Forwards: x\r\n", 400),
    ("proxy", b"TRACE %b/", b"Max-Forwards: 0\r\n", 400),
    ("proxy", b"POST /", b"", 400),
    ("proxy", b"POST https://x/", b"", 400),
    ("proxy", b"POST http://[/", b"", 400),
    ("proxy", b"POST http://10.0.0.1/", b"", 403),
    ("proxy", b"HEAD http://10.0.0.1/", b"", 403),
    ("proxy", b"POST http://10.0.0.1/", b"Expect: 100-continue\r\n", 403),
    ("proxy", b"POST http://127.0.0.1:1/", b"", 502),
    ("proxy", b"POST %b/mute", b"", 502),
    ("proxy", b"POST %b/broken", b"", 502),
    ("proxy", b"POST %b/silent", b"", 504),
    ("proxy", b"POST %b/", b"Via: 1.1 me\r\n", 508),
    ("proxy", b"CONNECT 127.0.0.1:1", b"", 400),
    ("proxy with a password", b"POST %b/", b"", 407),
    ("proxy with a password", b"OPTIONS %b/", b"Max-Forwards: 0\r\n", 407),
    ("proxy with a password", b"OPTIONS %b/", b"Max-Forwards: 0\r\n" + PASSWORD, 200),
    ("proxy for nobody", b"POST %b/", b"", 403),
    ("proxy with a limit", b"POST %b/", b"", None),
]


def answers_to(address, request, body, second, *, later):
    """What is answered to these: [(status, body)] until the end; `later`: the body is not sent before an answer."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), SOON) as sock, sock.makefile("rb") as file:
        received = []
        if later:
            sock.sendall(request)
            received.append(answer(file, request))
            with suppress(ConnectionError):
                sock.sendall(body + second)
                sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):  # it may have closed long ago
                while found := answer(file, second):
                    received.append(found)
        else:
            sock.sendall(request + body + second)
            sock.shutdown(socket.SHUT_WR)
            received.append(answer(file, request))
            while found := answer(file, second):
                received.append(found)
        return received


def answer(file, request):
    """(status, keeps, body) of the next answer; None at the end."""
    head = b"".join(iter(file.readline, b"\r\n")) if file.peek(1) else b""
    if not head:
        return None
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    body = b"" if request.startswith(b"HEAD") else file.read(int(length[1]) if length else -1)
    return int(head.split()[1]), b"\r\nconnection: close" not in head.lower(), body


def with_body(request, framing, body):
    """The head of a request, and its body."""
    if framing == "counted":
        return request + b"Content-Length: %d\r\n\r\n" % len(body), body
    return request + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def check(received, status, second):
    """The connection ends with the first answer, which says so; or goes on with the second request."""
    assert received[0][0] == status
    if len(received) == 1:
        assert not received[0][1]
    else:
        assert [found[::2] for found in received[1:]] == [second]


WAYS = pytest.mark.parametrize(
    ("framing", "later"), [("counted", False), ("counted", True), ("chunked", False), ("chunked", True)]
)

AT_ONCE_OR_LATER = pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize(("server", "line", "fields", "status"), OF_PROXY)
def test_no_body_of_a_request_that_the_proxy_answers_itself_is_read_as_a_request(
    serve, target, in_thread, server, line, fields, status, framing, later
):
    smuggled = b"GET %b/smuggled HTTP/1.1\r\nHost: x\r\n%b\r\n" % (target.url, PASSWORD)
    second = b"GET %b/second HTTP/1.1\r\nHost: x\r\n%b\r\n" % (target.url, PASSWORD)
    if status is None:
        status = 413 if framing == "counted" else 411
    later = later and status not in (502, 504)  # the origin waits for the body
    line = line % target.url if b"%b" in line else line
    request, body = with_body(b"%b HTTP/1.1\r\nHost: x\r\n%b" % (line, fields), framing, smuggled)
    address = SERVERS[server](serve).address
    received = in_thread(lambda: answers_to(address, request, body, second, later=later))
    check(received, status, (403, received[-1][2]) if server == "proxy for nobody" else (200, b"/second"))
    assert b"/smuggled" not in target.paths


def test_one_function_sends_all_own_answers_of_the_proxy():
    """It knows what is left of the request's body, which an answer that is written elsewhere would forget."""
    sources = "".join(path.read_text() for path in Path(gtcpserver.proxy.__file__).parent.glob("*.py"))
    assert len(re.findall(r"(?<!def )\bown_answer\(", sources)) == 1


# -- a refused CONNECT -------------------------------------------------------------------------------------------------

REFUSED = [
    ("proxy", b"10.0.0.1:80", b"", 403),
    ("proxy", b"127.0.0.1:1", b"", 502),
    ("proxy", b"127.0.0.1", b"", 400),
    ("proxy", b"127.0.0.1:80", b"Via: 1.1 me\r\n", 508),
    ("proxy with a password", b"127.0.0.1:80", b"", 407),
    ("proxy for nobody", b"127.0.0.1:80", b"", 403),
]


@AT_ONCE_OR_LATER
@pytest.mark.parametrize(("server", "asked", "fields", "status"), REFUSED)
def test_what_a_client_sends_ahead_for_a_refused_tunnel_is_no_request(
    serve, target, in_thread, server, asked, fields, status, later
):
    request = b"CONNECT %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (asked, fields)
    ahead = b"GET %b/smuggled HTTP/1.1\r\nHost: x\r\n%b\r\n" % (target.url, PASSWORD)
    address = SERVERS[server](serve).address
    received = in_thread(lambda: answers_to(address, request, b"", ahead, later=later))
    assert [found[:2] for found in received] == [(status, False)]
    assert target.paths == []


@AT_ONCE_OR_LATER
def test_nor_is_it_for_the_other_servers(serve, folder, monitor, in_thread, later):
    for address in (serve(StaticFiles(folder)).address, monitor.address):
        request = b"CONNECT 127.0.0.1:80 HTTP/1.1\r\nHost: localhost\r\n\r\n"
        ahead = b"GET /second HTTP/1.1\r\nHost: localhost\r\n\r\n"
        received = in_thread(lambda: answers_to(address, request, b"", ahead, later=later))  # noqa: B023
        assert len(received) == 1
        assert received[0][0] >= 400
        assert not received[0][1]


# -- static files and metrics ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("smuggled", "second", "large"):
        (tmp_path / name).write_bytes(b"/" + name.encode() * (50_000 if name == "large" else 1))
    (tmp_path / "listed").mkdir()
    return tmp_path


OF_FILES = [
    (b"GET /second", b"", 200),
    (b"GET /large", b"", 200),
    (b"HEAD /second", b"", 200),
    (b"GET /second", b"Range: bytes=1-2\r\n", 206),
    (b"GET /second", b"Range: bytes=100-\r\n", 416),
    (b"GET /second", b"If-None-Match: *\r\n", 304),
    (b"GET /second", b"If-Match: x\r\n", 412),
    (b"GET /second", b"Expect: 100-continue\r\n", 200),
    (b"GET /listed", b"", 301),
    (b"GET /listed/", b"", 200),
    (b"GET /none", b"", 404),
    (b"GET *", b"", 400),
    (b"POST /second", b"", 405),
    (b"OPTIONS *", b"Max-Forwards: 0\r\n", 405),
    (b"TRACE /", b"Max-Forwards: 0\r\n", 400),  # cannot have a body (RFC 9110 section 9.3.8)
    (b"GET http://x/second", b"", 200),
]


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize(("line", "fields", "status"), OF_FILES)
def test_nor_is_that_of_a_request_for_files(serve, folder, in_thread, line, fields, status, framing, later):
    address = serve(StaticFiles(folder, listing=True)).address
    smuggled, second = (b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % name for name in (b"smuggled", b"second"))
    request, body = with_body(b"%b HTTP/1.1\r\nHost: x\r\n%b" % (line, fields), framing, smuggled)
    received = in_thread(lambda: answers_to(address, request, body, second, later=later))
    check(received, status, (200, b"/second"))


@pytest.fixture
def monitor():
    with Server("127.0.0.1:0", lambda conn: None) as server, Monitor(server, "127.0.0.1:0") as monitor:
        yield monitor


OF_METRICS = [
    *((b"GET " + path, b"Host: localhost\r\n", 200) for path in (b"/", b"/metrics", b"/readyz", b"/stats")),
    (b"HEAD /connections", b"Host: localhost\r\n", None),
    (b"GET /none", b"Host: localhost\r\n", 404),
    (b"POST /stats", b"Host: localhost\r\n", 405),
    (b"OPTIONS *", b"Host: localhost\r\nMax-Forwards: 0\r\n", 404),
    (b"GET /", b"Host: name.example\r\n", 421),
    (b"GET /", b"Host: localhost\r\nExpect: 100-continue\r\n", 200),
]


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize(("line", "fields", "status"), OF_METRICS)
def test_nor_is_that_of_a_request_for_metrics(monitor, in_thread, line, fields, status, framing, later):
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    second = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    request, body = with_body(b"%b HTTP/1.1\r\n%b" % (line, fields), framing, smuggled)
    received = in_thread(lambda: answers_to(monitor.address, request, body, second, later=later))
    if status is None:  # gevent refuses a HEAD with Content-Length
        status = received[0][0]
    check(received, status, (200, b"ready\n"))


# -- behind a program that shares its connections to us between its clients --------------------------------------------

HAPROXY = """
defaults
    mode http
    timeout connect 10s
    timeout client 10s
    timeout server 10s
frontend here
    bind 127.0.0.1:{port}
    default_backend proxy
backend proxy
    http-reuse always
    server proxy {address}
"""


@pytest.mark.slow
@needs("haproxy")
@pytest.mark.parametrize("framing", ["counted", "chunked"])
def test_no_client_gets_the_answer_to_anothers_hidden_request(serve, target, in_thread, tmp_path, framing):
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(port=port, address=proxy(serve).address))
    with subprocess.Popen(["haproxy", "-db", "-f", tmp_path / "haproxy.cfg"], stderr=subprocess.DEVNULL) as haproxy:
        try:
            in_thread(wait_for_port, port, haproxy)
            host = target.url.removeprefix(b"http://")  # haproxy wants both to be the same
            smuggled, second = (
                b"GET %b/%b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target.url, name, host)
                for name in (b"smuggled", b"second")
            )
            request, body = with_body(
                b"OPTIONS %b/ HTTP/1.1\r\nHost: %b\r\nMax-Forwards: 0\r\n" % (target.url, host), framing, smuggled
            )

            def ask(sock, data):
                sock.sendall(data)
                with sock.makefile("rb") as file:
                    return answer(file, data)

            with (
                socket.create_connection(("127.0.0.1", port), SOON) as attacker,
                socket.create_connection(("127.0.0.1", port), SOON) as other,
            ):
                assert in_thread(ask, attacker, request + body)[0] == 200
                # The hidden request would be answered when that of the other client is under way.
                timer = gevent.spawn_later(0.2, target.pause.set)
                assert in_thread(ask, other, second)[::2] == (200, b"/second")
                timer.kill()
            assert target.paths == [b"/second"]
        finally:
            haproxy.kill()
