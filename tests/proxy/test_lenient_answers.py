"""Answers of origins that bend the rules, as other proxies take them. What the client gets keeps the rules."""

import gevent
import pytest
from gevent.event import Event

from gtcpserver.proxy import http_forward
from gtcpserver.proxy.gate import Timeouts
from gtcpserver.proxy.http_origin import LONGEST_ANSWER_HEAD
from kit.forwarding import CLOSE, OK

pytestmark = pytest.mark.usefixtures("no_faults")

CHUNKS = b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"

ANSWERS = {
    # RFC 9112 section 5.1
    "space before a colon": b"HTTP/1.1 200 OK\r\nA : b\r\nContent-Length \t: 5\r\n\r\nhello",
    "folded line that begins with a colon": b"HTTP/1.1 200 OK\r\nA :\r\n : b\r\nContent-Length: 5\r\n\r\nhello",
    "identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello",
    "IDENTITY and a space": b"HTTP/1.1 200 OK\nTransfer-Encoding : Identity \nContent-Length: 5\n\nhello",
    "identity until the end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nhello",
    # RFC 9112 section 6.3
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked" + CHUNKS,
    "length beside chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nTransfer-Encoding: chunked" + CHUNKS,
    "HTTP/2": b"HTTP/2 200\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "HTTP/3 with chunks": b"HTTP/3 200 OK\r\nTransfer-Encoding: chunked" + CHUNKS,
    "http/1.1": b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
}

#: Whose connection serves no other request.
UNCLEAR = ("identity until the end", "chunks in HTTP/1.0", "length beside chunks")


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_bends_the_rules_is_mended(http_proxy, origin, client, what):
    def answer(conn, head):
        conn.sendall(ANSWERS[what])
        return CLOSE if "until the end" in what else None

    target = origin(answer, OK)
    visitor = client(http_proxy())
    status, fields, body = visitor.get(f"{target.url}/")
    assert (status, body) == (200, b"hello")
    assert not (fields["content-length"] and fields["transfer-encoding"])
    assert fields["transfer-encoding"] in (None, "chunked")
    if "colon" in what:
        assert fields["a"].strip(" :") == "b"
    assert visitor.get(f"{target.url}/")[::2] == (200, b"hello")
    assert target.accepted_connections == 1 + (what in UNCLEAR)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nA b : c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n : c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity, chunked" + CHUNKS,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xidentity" + CHUNKS,
        b"HTTPS/1.1 200 OK\r\n\r\n",
        b"HTTP/12 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
    ],
)
def test_others_are_still_refused(http_proxy, origin, client, answer):
    target = origin(answer, OK)
    visitor = client(http_proxy())
    assert visitor.get(f"{target.url}/")[0] == 502
    assert visitor.get(f"{target.url}/")[::2] == (200, b"hello")


def test_mending_a_long_line_takes_no_time(http_proxy, origin, client):
    spaces = b" " * (LONGEST_ANSWER_HEAD - 1000)
    target = origin(b"HTTP/1.1 200 OK\r\nA%bB: c\r\n\r\n" % spaces)
    visitor = client(http_proxy())
    with gevent.Timeout(5):
        assert visitor.get(f"{target.url}/")[0] == 502


# -- interim answers ---------------------------------------------------------------------------------------------------

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"


def final(visitor, url):
    found, interim = visitor.get(url), 0
    while found[0] < 200:
        found, interim = visitor.answer(), interim + 1
    return found[0], interim


def test_a_hundred_interim_answers(http_proxy, origin, client):
    assert final(client(http_proxy()), f"{origin(HINTS * 100 + OK).url}/") == (200, 100)


def test_interim_answers_end_after_some_time(http_proxy, origin, client, monkeypatch, records):
    monkeypatch.setattr(http_forward, "MOST_TIMES_OF_INTERIM", 2)
    ended = Event()

    def endless(conn, head):
        while not ended.wait(0.05):
            conn.sendall(HINTS)

    visitor = client(http_proxy(timeouts=Timeouts(answer=0.3)))
    status, interim = final(visitor, f"{origin(endless).url}/")
    ended.set()
    assert status == 504
    assert interim > 2
    assert records[0].result == "answer_timeout"
