"""Idle connections to origins: one that its origin has ended is closed soon, not at the client's next request."""

import pytest
from gevent.event import Event

from gtcpserver.proxy.gate import Timeouts
from kit.forwarding import OK
from kit.patience import SOON
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")

PIECES = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"


def ending(serve, pieces, how):
    """An origin that answers in pieces, ends its side, and waits for the proxy's end."""
    closed = Event()

    def handler(conn):
        conn.recv_until(b"\r\n\r\n")
        for piece in pieces:
            conn.sendall(piece)
            conn.server.context.wait(0.05)
        origin.context.wait()
        how(conn)
        try:
            assert conn.recv(1) == b""
        except ConnectionResetError:
            pass  # unread bytes
        closed.set()

    origin = serve(handler, context=Event())
    origin.closed = closed
    return origin


@pytest.mark.parametrize("pieces", [[OK], PIECES], ids=["at once", "in pieces"])
@pytest.mark.parametrize(
    "how",
    [lambda conn: conn.shutdown(1), lambda conn: conn.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")],
    ids=["end", "bytes"],
)
def test_an_idle_connection_that_the_origin_ends_is_closed_soon(http_proxy, serve, origin, client, pieces, how):
    target, other = ending(serve, pieces, how), origin(*[OK] * 3)
    visitor = client(http_proxy())
    assert visitor.get(f"http://127.0.0.1:{target.port}/")[::2] == (200, b"hello")
    target.context.set()
    assert target.closed.wait(5)
    # The client's connection goes on, also to the same origin.
    assert visitor.get(f"{other.url}/")[::2] == (200, b"hello")
    assert visitor.get(f"http://127.0.0.1:{target.port}/")[::2] == (200, b"hello")
    assert target.accepted_connections == 2


def test_an_idle_connection_that_the_origin_resets_is_closed(http_proxy, serve, client):
    go_on = Event()

    def handler(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(OK)
        go_on.wait()
        conn.abort()

    target = serve(handler)
    visitor = client(http_proxy())
    assert visitor.get(f"http://127.0.0.1:{target.port}/")[::2] == (200, b"hello")
    go_on.set()
    wait_until(lambda: not target.active_connections)
    assert visitor.get(f"http://127.0.0.1:{target.port}/")[::2] == (200, b"hello")


def test_an_idle_connection_outlives_the_time_for_an_answer(http_proxy, origin, client):
    target = origin(*[OK] * 3)
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    for _ in range(3):
        assert visitor.get(f"{target.url}/")[::2] == (200, b"hello")
        Event().wait(0.25)
    assert target.accepted_connections == 1


def test_idle_connections_end_with_the_client(http_proxy, serve, client):
    closed = Event()

    def handler(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(OK)
        assert conn.recv(1) == b""
        closed.set()

    visitor = client(http_proxy())
    assert visitor.get(f"http://127.0.0.1:{serve(handler).port}/")[::2] == (200, b"hello")
    visitor.file.close()
    visitor.sock.close()
    assert closed.wait(SOON)


STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"
EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "method", "status", "body"),
    [
        (OK + STRAY, "GET", 200, b"hello"),
        (OK + b"s", "GET", 200, b"hello"),
        (EARLY + OK + STRAY, "GET", 200, b"hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + STRAY, "GET", 200, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n" + STRAY, "GET", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n" + STRAY, "GET", 304, b""),
        (OK + STRAY, "HEAD", 200, b""),
        (b"".join(PIECES) + STRAY, "GET", 200, b"hello"),
    ],
    ids=["answer", "byte", "interim", "empty", "204", "304", "HEAD", "chunked"],
)
@pytest.mark.parametrize("cut", [0, 1, -len(STRAY), -len(STRAY) - 2], ids=["at once", "early", "stray", "body"])
def test_what_comes_behind_an_answer_is_not_the_next_one(http_proxy, serve, client, answer, method, status, body, cut):
    """Not even a part of it, wherever the origin's bytes are cut."""
    answers, sent = iter((answer, OK)), Event()

    def handler(conn):
        conn.recv_until(b"\r\n\r\n")
        data = next(answers)
        conn.sendall(data[:cut])
        if cut:
            conn.server.context.wait(0.02)
        conn.sendall(data[cut:])
        sent.set()
        conn.recv(1)

    target = serve(handler, context=Event())
    visitor = client(http_proxy())
    url = f"http://127.0.0.1:{target.port}/"
    first = visitor.get(url, method=method)
    while first[0] == 103:
        first = visitor.answer(method)
    assert first[::2] == (status, body)
    assert sent.wait(5)  # what comes after the next request is its answer, for all that a proxy can know
    assert visitor.get(url)[::2] == (200, b"hello")
    assert target.accepted_connections == 2
