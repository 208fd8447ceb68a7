"""Request smuggling: what a proxy and an origin could read in two ways never gets from the one to the other."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress

import h11
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gtcpserver import Server
from gtcpserver.http1.head import check_head
from kit.patience import SOON
from kit.ports import free_port
from kit.smuggling import Recorder, exchange, serve_http
from kit.smuggling_corpus import BAD_CHUNKS, DISGUISES, LENGTHS, SMUGGLED
from kit.waiting import wait_for_port, wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture
def proxy(serve, records):
    return serve(lambda conn: serve_http(conn, records))


@pytest.fixture
def recorder(serve):
    return Recorder(serve)


# -- bodies that turn out to be bad when the request is on its way -----------------------------------------------------


@pytest.mark.parametrize("when", ["at once", "later"])
def test_requirement_21_a_body_in_bad_chunks_never_ends_for_the_origin(proxy, recorder, in_thread, when):
    """It may have got the head, if the chunks came later; but never an end, and nothing of what stands behind it."""
    url = recorder.url.encode()
    head = b"POST %b/first HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % url

    def the_head_is_there():
        give_up = time.monotonic() + SOON
        while len(recorder.heard) < number + 1 or b"\r\n\r\n" not in recorder.heard[number]:
            assert time.monotonic() < give_up
            time.sleep(0.001)

    for number, bad in enumerate(BAD_CHUNKS):  # noqa: B007 - the_head_is_there() looks at it
        body = bad + SMUGGLED % url
        pieces = [head, the_head_is_there, body] if when == "later" else [head + body]
        assert in_thread(exchange, proxy.address, *pieces) == (400, b""), bad
    # At once: it was looked at before anything was forwarded, but for the longest, which do not come in one piece.
    longest = sum(len(bad) > 4000 for bad in BAD_CHUNKS)
    assert len(recorder.heard) == len(BAD_CHUNKS) if when == "later" else len(recorder.heard) <= longest
    wait_until(lambda: recorder.ended == len(recorder.heard))
    for heard in recorder.heard:
        assert heard.startswith(b"POST /first HTTP/1.1\r\n")
        assert b"\r\n0\r\n" not in heard
        assert b"smuggled" not in heard


def test_requirement_21_extensions_and_paddings_are_not_forwarded(proxy, recorder, in_thread):
    """What is allowed, and read by some in their own way, is written anew."""
    head = f"POST {recorder.url}/ HTTP/1.1\r\nhOsT:x\r\nTRANSFER-ENCODING:\t ChUnKeD \t\r\n\r\n".encode()
    body = b'5;a="b\\"c;d"\r\nhello\r\n0005 ; x\r\nworld\r\n000;y\r\nContent-Length: 9\r\nHost: y\r\nX-T: 1\r\n\r\n'

    def talk():
        host, port = proxy.address.split(":")
        with socket.create_connection((host, int(port)), SOON) as sock:
            sock.sendall(head + body)
            wait_until_there()

    def wait_until_there():
        give_up = time.monotonic() + SOON
        while not recorder.heard or not recorder.heard[0].endswith(b"\r\n\r\n"):
            assert time.monotonic() < give_up
            time.sleep(0.001)

    in_thread(talk)
    fields, _, body = recorder.heard[0].partition(b"\r\n\r\n")
    assert fields.count(b"\r\nTransfer-Encoding: chunked") == 1
    # In as many chunks as came in one piece.
    assert body in (b"a\r\nhelloworld\r\n0\r\nX-T: 1\r\n\r\n", b"5\r\nhello\r\n5\r\nworld\r\n0\r\nX-T: 1\r\n\r\n")


# -- whatever is forwarded is read by the origin as it was by the proxy ------------------------------------------------

LINES = st.sampled_from(
    [
        *(b"Host: x", b"A: b", b"Content-Length: 0", b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        *(b"Connection: x", b"Connection: close", b"Connection: content-length, transfer-encoding, host"),
        *(b"TE: trailers, chunked", b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: upgrade"),
        *(b"Trailer: Content-Length", b"Via: 1.1 x", b"Proxy-Connection: transfer-encoding", b"Keep-Alive: 5"),
        *(b"Content-Length: 00", b"Content-Length:5 ", *DISGUISES, *LENGTHS),
    ]
)
METHODS = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"DELETE", b"PURGE", b"get", b"TRACE"])
BODIES = st.sampled_from(
    [
        *(b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"5\r\nhel", b"\r\n", b"0"),
        *(b"5;x\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\nContent-Length: 40\r\n\r\n", *BAD_CHUNKS[:12]),
    ]
)
REQUESTS = st.tuples(METHODS, st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0"]), st.lists(LINES, max_size=4), BODIES)


class Judge:
    """An origin that reads by h11, notes the requests, and answers each of them."""

    def __init__(self):
        self.requests = []
        self.faults = []

    def __call__(self, conn):
        reader = h11.Connection(h11.SERVER)
        head = None
        while True:
            try:
                event = reader.next_event()
            except h11.RemoteProtocolError as error:
                # An end in the midst of a body is how a bad one ends, and what the proxy does on purpose.
                if "without sending complete message body" not in str(error):
                    self.faults.append(error)
                return
            if event is h11.NEED_DATA:
                try:
                    reader.receive_data(conn.recv(65536))
                except OSError:
                    return
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.EndOfMessage):
                self.requests.append(head.method)
                keep = reader.their_state is h11.DONE
                conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                if not keep:
                    return
                reader = self._next(reader)
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                return

    def _next(self, reader):
        kept, _ = reader.trailing_data
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(kept)
        return reader


def answers(port, data):
    """All that is answered to these bytes, until the end."""
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        sock.settimeout(SOON)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        got = b""
        with suppress(ConnectionError):
            while more := sock.recv(65536):
                got += more
    return got


@pytest.mark.slow
def test_requirement_21_the_origin_reads_what_the_proxy_has_read(in_thread):
    """Several requests on one connection, of dangerous parts in any order: the origin gets those that the proxy
    believes to have forwarded, each once, in their order, and no other."""
    judge, records = Judge(), []
    with Server("127.0.0.1:0", judge) as origin, Server("127.0.0.1:0", lambda conn: serve_http(conn, records)) as proxy:

        @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(REQUESTS, min_size=1, max_size=4))
        @example([(b"POST", b"1.1", [b"Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n")] * 3)
        @example([(b"GET", b"1.1", [b"Connection: content-length", b"Content-Length: 5"], b"hello")] * 2)
        def smuggle(requests):
            judge.requests.clear()
            judge.faults.clear()
            records.clear()
            data = b"".join(
                b"%b http://127.0.0.1:%d/ HTTP/%b\r\n%b\r\n%b"
                % (method, origin.port, version, b"".join(line + b"\r\n" for line in lines), body)
                for method, version, lines, body in requests
            )
            in_thread(answers, proxy.port, data)
            wait_until(lambda: proxy.active_connections + origin.active_connections == 0)
            forwarded = [record.command.encode() for record in records if record.result == "ok"]
            assert judge.faults == []
            assert judge.requests == forwarded

        smuggle()


# -- and by nginx, too -------------------------------------------------------------------------------------------------

#: What the proxy takes, and others may stumble over.
TAKEN = [
    (b"GET", [b"Content-Length: 0"], b""),
    (b"GET", [b"Content-Length: 5"], b"hello"),
    (b"POST", [b"Content-Length: 0000000005"], b"hello"),
    (b"POST", [b"content-LENGTH:5\t"], b"hello"),
    (b"POST", [b"transfer-encoding:\tCHUNKED "], b"5;a=b\r\nhello\r\n0;c\r\nA: b\r\nContent-Length: 7\r\n\r\n"),
    (b"GET", [b"Transfer-Encoding: chunked"], b"0\r\n\r\n"),
    (b"POST", [b"Connection: close, content-length, transfer-encoding, host", b"Content-Length: 5"], b"hello"),
    (b"POST", [b"Connection: transfer-encoding", b"Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
    (
        b"GET",
        [b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA", b"Connection: Upgrade, HTTP2-Settings"],
        b"",
    ),
    (b"GET", [b"Expect: 100-continue", b"Content-Length: 5"], b"hello"),
    (b"GET", [b"A: \xff\xfe", b"B:", b"C: :", b"D:   x  "], b""),
    (b"GET", [b"X-Forwarded-Host: y", b"X-Original-URL: /smuggled", b"Content_Length: 40"], b""),
]

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error; user root;
events {{ }}
http {{
    log_format words '$request_method $request_uri $status $host';
    access_log {folder}/access words;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; location / {{ return 200 "x"; }} }}
}}
"""


@pytest.fixture
def nginx(tmp_path):
    """(port, access log) of an nginx that answers everything."""
    if shutil.which("nginx") is None:
        pytest.skip("not installed: nginx")
    port = free_port()
    os.chmod(tmp_path, 0o755)
    (tmp_path / "conf").write_text(NGINX.format(folder=tmp_path, port=port))
    process = subprocess.Popen(["nginx", "-c", f"{tmp_path}/conf", "-e", f"{tmp_path}/error"])
    wait_for_port(port, process)
    yield port, tmp_path / "access"
    process.kill()
    process.wait()


def test_requirement_21_nginx_reads_what_the_proxy_has_read(proxy, records, nginx, in_thread):
    port, log = nginx
    for number, (method, lines, body) in enumerate(TAKEN):
        head = b"%b http://127.0.0.1:%d/%d HTTP/1.1\r\nHost: y\r\n" % (method, port, number)
        data = head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body
        data += b"GET http://127.0.0.1:%d/%d/behind HTTP/1.1\r\nHost: x\r\n\r\n" % (port, number)
        in_thread(answers, proxy.port, data)
    wait_until(lambda: proxy.active_connections == 0)
    believed = [(record.command, record.result) for record in records]
    assert {result for _, result in believed} == {"ok"}
    # nginx writes a line when a request has ended, which may be after its answer is here.
    wait_until(lambda: len(log.read_text().splitlines()) >= len(believed))
    found = [line.split() for line in log.read_text().splitlines()]
    assert [words[0] for words in found] == [command for command, _ in believed]
    expected = []
    for number, (_, lines, _) in enumerate(TAKEN):
        expected.append(f"/{number}")
        if not any(b"close" in line for line in lines):
            expected.append(f"/{number}/behind")
    assert [words[1:] for words in found] == [[path, "200", "127.0.0.1"] for path in expected]


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
def test_what_an_origin_sends_behind_its_answer_is_nobodys_answer(proxy, serve, in_thread, framing):
    """Answer splitting: the origin of the first request does not answer the second, which goes elsewhere, nor the one
    that goes to itself."""
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
    first = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n0\r\n\r\n",
        "none": b"HTTP/1.1 204 No Content\r\n\r\n",
    }[framing]

    def bad(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(first + forged)

    def good(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")

    origins = [serve(bad), serve(good), serve(bad)]
    data = b"".join(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port for origin in origins)
    data += b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origins[0].port
    got = in_thread(answers, proxy.port, data)
    assert got.count(b"HTTP/1.1 20") == 4
    assert got.count(b"good") == 1
    assert b"forged" not in got


# -- and no head takes long --------------------------------------------------------------------------------------------

LONG = 60_000


@pytest.mark.parametrize(
    "field",
    [
        b"A:" + b" " * LONG + b"\0",
        b"A:" + b"\t" * LONG + b"\0",
        b"A: b" + b" " * LONG + b"\0",
        b"A" * LONG + b"\0",
        b"A:" + b" b" * (LONG // 2) + b"\0",
        b"Connection: " + b"," * LONG,
        b"Via: " + b"1.1 x," * (LONG // 6),
        b"Proxy-Authorization: Basic" + b" " * LONG + b"\0",
    ],
)
def test_requirement_30_no_head_keeps_the_event_loop_busy(field):
    """With a pattern that has many ways to divide white space the first of these took 15 seconds."""
    began = time.process_time()
    with suppress(Exception):
        check_head(b"GET http://x/ HTTP/1.1\r\n" + field + b"\r\n\r\n")
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    "field",
    [
        b"A:" + b" " * LONG + b"\0",
        b"A:" + b"\t" * LONG + b"\0",
        b"A:" + b"\r\n " * (LONG // 3) + b"\0",
        b"A: b" + b"\r\n " * (LONG // 3) + b"\0",
        b"A" + b" " * LONG + b": b",
        b"\r\n".join([b"A: b"] * (LONG // 6)),
    ],
)
def test_requirement_30_no_answer_keeps_the_event_loop_busy(proxy, serve, in_thread, field):
    """The first two of these took 13 seconds in h11; an origin may send four times as much, and then it is 16 times
    as long."""

    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\n" + field + b"\r\nContent-Length: 0\r\n\r\n")

    request = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % serve(answer).port
    began = time.process_time()
    assert in_thread(answers, proxy.port, request).startswith((b"HTTP/1.1 502", b"HTTP/1.1 200"))
    assert time.process_time() - began < 1


def test_folded_lines_of_an_answer_are_unfolded(proxy, serve, in_thread):
    """RFC 9112 section 5.2: a proxy may do that. And white space before a value is no part of it."""

    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nA: b\r\n  c\r\n\td\r\nB: \t  e:   f\r\nC:\r\nContent-Length:  5\r\n\r\nhello")

    request = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % serve(answer).port
    head, _, body = in_thread(answers, proxy.port, request).partition(b"\r\n\r\n")
    assert body == b"hello"
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert (fields[b"A"], fields[b"B"], fields[b"C"]) == (b"b c d", b"e:   f", b"")
