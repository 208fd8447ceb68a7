"""How the WSGI server reads requests and their bodies, and who is to blame when one does not end well."""

import gc
import logging
import os
import socket
import struct
import weakref

import gevent
import pytest
from gevent.pywsgi import WSGIServer

from gtcpserver import from_wsgi
from gtcpserver.adapters import wsgi, wsgi_body
from kit.patience import SOON
from kit.waiting import wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def read_all(sock, *pieces, end=True):
    """Everything that is answered to these bytes, until the server closes."""
    for piece in pieces:
        sock.sendall(piece)
    if end:
        sock.shutdown(socket.SHUT_WR)
    answer = b""
    while more := sock.recv(65536):
        answer += more
    return answer


def read_until(sock, end):
    got = b""
    while not got.endswith(end) and (more := sock.recv(1000)):
        got += more
    return got


@pytest.fixture
def talk(serve, connect, in_thread):
    """`talk(application, *pieces)`: what is answered; the client then closes its side, unless end=False."""

    def exchange(application, *pieces, end=True):
        return in_thread(lambda client: read_all(client, *pieces, end=end), connect(server_of(application)))

    servers = {}

    def server_of(application):
        if application not in servers:
            servers[application] = serve(from_wsgi(application), timeout=SOON)
        return servers[application]

    exchange.server_of = server_of
    return exchange


def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def ignore(environ, start_response):
    start_response("200 OK", [("Content-Length", "7")])
    return [b"ignored"]


def chunked(content):
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(content[at : at + 3]), content[at : at + 3]) for at in (0, 3)) + (
        b"0\r\nTrailer: x\r\n\r\n"
    )


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"hello")


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(("application", "answer"), [(echo, b"hello"), (ignore, b"ignored")])
def test_requests_with_bodies_follow_each_other_in_whatever_pieces(talk, application, answer, size):
    data = POST + CHUNKS + b"\r\n" + POST + CHUNKS + b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"
    got = talk(application, *(data[at : at + size] for at in range(0, len(data), size)))
    assert got.count(b"HTTP/1.1 200 OK") == 5
    assert got.count(answer) == (4 if application is echo else 5)
    assert b"close" not in got


def test_the_ways_to_read_a_body(talk):
    content = b"one\ntwo\nthree\n" + os.urandom(100_000).replace(b"\n", b"") + b"\nlast"

    def read_in_pieces(environ, start_response):
        file = environ["wsgi.input"]
        assert file.readline() == b"one\n"
        assert file.readline(2) == b"tw"
        assert file.read(2) == b"o\n"
        assert next(iter(file)) == b"three\n"
        lines = file.readlines()
        assert b"one\ntwo\nthree\n" + b"".join(lines) == content
        assert file.read() == file.read(10) == file.readline() == b""
        start_response("200 OK", [("Content-Length", "0")])
        return []

    counted = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
    in_chunks = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    in_chunks += b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    assert talk(read_in_pieces, counted + in_chunks).count(b"200 OK") == 2


def test_a_large_body_that_is_not_read_does_not_cost_the_client_its_answer(talk):
    size = 5_000_000
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
    got = talk(ignore, head, bytes(size), GET)
    assert got.count(b"ignored") == 2


# -- 100 Continue ------------------------------------------------------------------------------------------------------

EXPECTING = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n"


def test_100_continue_is_sent_when_the_body_is_read(talk, connect, in_thread):
    client = connect(talk.server_of(echo))
    for _ in range(2):
        client.sendall(EXPECTING)
        assert in_thread(client.recv, 1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hello")
        assert in_thread(read_until, client, b"\r\n\r\nhello").startswith(b"HTTP/1.1 200 OK")
    # It has come already, or is none of HTTP/1.1.
    assert talk(echo, EXPECTING + b"hello").startswith(b"HTTP/1.1 200 OK")
    assert talk(echo, EXPECTING.replace(b"1.1", b"1.0") + b"hello").startswith(b"HTTP/1.1 200 OK")


def test_without_100_continue_nobody_knows_whether_the_body_will_come(talk):
    """It would be a request of its own, or the next request the body."""
    got = talk(ignore, EXPECTING + GET, end=False)
    assert got.count(b"HTTP/1.1") == 1
    assert b"\r\nConnection: close\r\n" in got


# -- the answer --------------------------------------------------------------------------------------------------------


def test_the_answer_to_head_has_no_body_whatever_the_application_sends(talk):
    def pieces(environ, start_response):
        start_response("200 OK", [])
        yield b"HTTP/1.1 200 OK\r\n"
        yield b"more"

    head = GET.replace(b"GET", b"HEAD")
    for application in (ignore, pieces):
        got = talk(application, head + head)
        assert got.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert got.endswith(b"\r\n\r\n")
        assert got.count(b"\r\n\r\n") == 2


def test_http_1_0_is_kept_if_the_client_asks_for_it_and_the_answer_has_a_length(talk):
    def without_length(environ, start_response):
        start_response("200 OK", [])
        yield b"all"

    old = b"GET / HTTP/1.0\r\n\r\n"
    keep = b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    got = talk(ignore, keep + keep + old + keep, end=False)
    assert (got.count(b"ignored"), got.count(b"keep-alive"), got.count(b"Connection: close")) == (3, 2, 1)
    got = talk(without_length, keep + keep, end=False)
    assert got.endswith(b"\r\nConnection: close\r\n\r\nall")


def test_an_application_that_does_not_answer_is_a_500(talk, caplog):
    assert talk(lambda environ, start_response: [], GET, end=False).startswith(b"HTTP/1.1 500 ")
    assert "did not call start_response()" in caplog.text


def test_an_upgrade_gets_the_connection_as_a_file(talk):
    """As gevent.pywsgi hands it over, and as simple-websocket finds the socket there."""
    seen = []

    def websocket(environ, start_response):
        seen.append(environ["wsgi.input"].raw._sock)  # noqa: SLF001  what the input reads from
        start_response("101 Switching Protocols", [("Upgrade", "websocket"), ("Connection", "Upgrade")])(b"")
        return [environ["wsgi.input"].readline()]

    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    got = talk(websocket, head + b"frame\n" + GET, end=False)
    assert got.startswith(b"HTTP/1.1 101 ")
    assert got.endswith(b"\r\n\r\nframe\n")
    assert b"\r\nConnection: Upgrade\r\n" in got
    assert seen[0].server is talk.server_of(websocket)


# -- the environment ---------------------------------------------------------------------------------------------------

HEADS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /a%20b/%C3%A4?c=d%20e?f HTTP/1.1\r\nHost: x:80\r\nA: 1\r\nA: 2\r\nA_B: 3\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\nCookie: c=d\r\nX-Cookie: 1\r\n\r\n",
    b"POST /? HTTP/1.1\r\nhost:x\r\ncontent-TYPE:  text/plain\r\nContent-Length: 05\r\nX-Y:\r\nZ: \xe4\r\n\r\nhello",
    b"PUT * HTTP/1.0\r\nTransfer: a\r\nProxy: b\r\nContent-Length: 0\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
    b"GET //x/../y;z=1 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
]


def test_the_environment_is_gevents(serve, connect, in_thread):
    seen = []

    def note(environ, start_response):
        seen.append({name: value for name, value in environ.items() if isinstance(value, (str, bool, tuple))})
        start_response("200 OK", [("Connection", "close")])
        return []

    stock = WSGIServer(("127.0.0.1", 0), note, log=None)
    stock.start()
    ours = serve(from_wsgi(note))
    for head in HEADS:
        for address in (f"127.0.0.1:{stock.server_port}", ours.address):
            in_thread(lambda: read_all(connect(address), head, end=False))  # noqa: B023
        expected, found = seen[-2:]
        for name in ("SERVER_PORT", "REMOTE_PORT", "SERVER_NAME"):
            assert found.pop(name)
            expected.pop(name)
        assert found == expected
    stock.stop()


def test_each_request_has_the_fields_of_its_own(talk):
    seen = []

    def note(environ, start_response):
        seen.append((environ["PATH_INFO"], environ.get("HTTP_X_A"), environ.get("HTTP_X_B"), "HTTP_LEFT" in environ))
        environ["HTTP_X_A"] = "the application's"
        environ["HTTP_LEFT"] = "too"
        start_response("200 OK", [("Content-Length", "0")])
        return []

    def request(path, *fields):
        return b"\r\n".join((b"GET %b HTTP/1.1" % path, b"Host: x", *fields, b"", b""))

    one, two = (b"X-A: 1",), (b"X-A: 2", b"X-B: 3")
    talk(note, *(request(b"/%d" % number, *fields) for number, fields in enumerate((one, one, two, one, ()))))
    expected = [("/0", "1", None), ("/1", "1", None), ("/2", "2", "3"), ("/3", "1", None), ("/4", None, None)]
    assert seen == [(*one, False) for one in expected]


# -- whose fault it is -------------------------------------------------------------------------------------------------


def wrapped(environ, start_response):
    """As frameworks do it."""
    try:
        return echo(environ, start_response)
    except OSError as error:
        raise RuntimeError("the body could not be read") from error


HALF = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello"
HALF_CHUNK = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\na\r\nhello"


@pytest.mark.slow
@pytest.mark.parametrize("application", [echo, wrapped])
@pytest.mark.parametrize("body", [HALF, HALF_CHUNK])
@pytest.mark.parametrize("how", ["closed", "reset", "silent"])
def test_a_body_that_the_client_cuts_is_no_failure_of_the_application(
    serve, connect, in_thread, caplog, application, body, how
):
    server = serve(from_wsgi(application), timeout=SOON if how != "silent" else 0.05)
    client = connect(server)
    client.sendall(body)
    wait_until(lambda: server.stats().bytes_received)
    if how == "closed":
        assert in_thread(read_all, client).startswith(b"HTTP/1.1 400 ")
    elif how == "silent":
        assert in_thread(lambda: read_all(client, end=False)).startswith(b"HTTP/1.1 408 ")
    else:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait_until(lambda: server.active_connections == 0)
    stats = server.stats()
    assert (stats.resets, stats.timeouts) == ((0, 1) if how == "silent" else (1, 0))
    assert (stats.handler_errors, stats.handler_counters) == (0, {})
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_a_client_that_does_not_read_is_no_failure_of_the_application(serve, connect, caplog):
    def large(environ, start_response):
        start_response("200 OK", [])
        for _ in range(1000):
            yield bytes(100_000)

    server = serve(from_wsgi(large), timeout=0.05)
    client = connect(server, receive_buffer=4096)
    client.sendall(GET)
    wait_until(lambda: server.stats().timeouts == 1)
    assert server.stats().handler_errors == 0
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_an_application_that_is_out_of_time_is_a_500_and_counted_as_such(serve, connect, in_thread, caplog):
    def slow(environ, start_response):
        gevent.sleep(SOON)

    server = serve(from_wsgi(slow), handler_timeout=0.05)
    assert in_thread(read_all, connect(server), GET).startswith(b"HTTP/1.1 500 ")
    wait_until(lambda: server.stats().handler_timeouts == 1)
    assert server.stats().handler_errors == 0
    assert "application failed" not in caplog.text


def test_an_application_that_swallows_the_error_of_a_bad_body_ends_the_connection_all_the_same(talk):
    def swallow(environ, start_response):
        try:
            environ["wsgi.input"].read()
        except OSError:
            pass
        return ignore(environ, start_response)

    got = talk(swallow, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\n" + GET, end=False)
    assert got.count(b"HTTP/1.1") == 1


def test_a_cut_answer_that_only_the_end_delimits_is_reset(serve, connect, in_thread, caplog):
    def half(environ, start_response):
        start_response("200 OK", [])
        yield b"half"
        raise RuntimeError("as expected")

    client = connect(serve(from_wsgi(half)))
    with pytest.raises(ConnectionResetError):
        in_thread(lambda: read_all(client, b"GET / HTTP/1.0\r\n\r\n", end=False))
    assert "as expected" in caplog.text


def test_bad_requests_are_counted_and_said_to_the_client(talk, caplog):
    got = talk(echo, b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n" + GET, end=False)
    assert got.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert got.endswith(b"\r\n\r\nHeader line 2 must be: Name: value\n")
    talk(echo, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\n", end=False)
    assert talk.server_of(echo).stats().handler_counters == {"bad_request": 2}
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


@pytest.mark.parametrize("piece", [1, 10_000])
def test_a_few_empty_lines_may_stand_before_a_request(talk, piece):
    """A flood of them was read for 30 seconds: 43 ms of CPU a MiB."""
    data = GET + 16 * b"\r\n" + GET
    answer = talk(ignore, *(data[at : at + piece] for at in range(0, len(data), piece)))
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
    answer = talk(ignore, *([b"\r\n"] * 17 if piece == 1 else [b"\r\n" * 17]), end=False)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_head_that_drips_is_ended(talk, connect, in_thread, monkeypatch):
    monkeypatch.setattr(wsgi, "HEAD_TIMEOUT", 0.05)
    client = connect(talk.server_of(echo))
    client.sendall(b"GET / HTTP/1.1\r\nHost:")
    assert in_thread(lambda: read_all(client, end=False)).startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: talk.server_of(echo).stats().timeouts == 1)
    assert talk.server_of(echo).stats().handler_counters == {}


def test_a_rest_that_does_not_come_is_not_waited_for(talk, monkeypatch):
    monkeypatch.setattr(wsgi_body, "DISCARD_SECONDS", 0.05)
    assert talk(ignore, HALF, end=False).count(b"ignored") == 1


@pytest.mark.slow
@pytest.mark.parametrize("data", [POST, CHUNKS, HALF_CHUNK, HALF, b"nonsense\r\n\r\n", POST.replace(b"hello", b"")])
def test_nothing_is_left_of_a_request(serve, connect, in_thread, data):
    """Without the garbage collector."""
    requests = weakref.WeakSet()

    def application(environ, start_response):
        requests.add(environ["wsgi.input"])
        return echo(environ, start_response)

    server = serve(from_wsgi(application))
    gc.collect()
    gc.disable()
    try:
        in_thread(read_all, connect(server), data)
        wait_until(lambda: server.active_connections == 0)
        wait_until(lambda: not requests, 2)
    finally:
        gc.enable()


@pytest.mark.parametrize("body", [b"frame", b"frame\nmore"])
def test_a_client_that_resets_an_upgraded_connection_is_no_failure_of_the_application(serve, connect, caplog, body):
    def websocket(environ, start_response):
        start_response("101 Switching Protocols", [("Upgrade", "websocket"), ("Connection", "Upgrade")])(b"")
        while environ["wsgi.input"].read(1):
            pass
        return []

    def broken(environ, start_response):
        environ["wsgi.input"].read(1)
        raise ConnectionRefusedError("of a data base")

    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    server = serve(from_wsgi(websocket))
    client = connect(server)
    client.sendall(head + body)
    wait_until(lambda: server.stats().bytes_sent)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_until(lambda: server.stats().resets == 1)
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    server = serve(from_wsgi(broken))
    client = connect(server)
    client.sendall(head + body)
    wait_until(lambda: "of a data base" in caplog.text)
