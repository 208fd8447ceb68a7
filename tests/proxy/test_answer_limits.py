"""What an origin may send the proxy: fields, bytes and interim answers are limited, nothing keeps others waiting."""

import http.client

import pytest

from gtcpserver.http1.chunks import MANY_LINES, ChunkReader
from gtcpserver.proxy.http_body import PACED_PIECE
from gtcpserver.proxy.http_origin import LONGEST_ANSWER_HEAD, MOST_ANSWER_FIELDS
from kit.forwarding import OK

pytestmark = pytest.mark.usefixtures("no_faults")

BODY = b"Content-Length: 5\r\n\r\nhello"
HINTS = b"HTTP/1.1 103 Early Hints\r\n"


def padded(size):
    """An answer whose head has this many bytes."""
    head = OK.removesuffix(b"\r\n\r\nhello") + b"\r\nX: "
    return head + b"x" * (size - len(head) - 4) + b"\r\n\r\nhello"


GOOD = {
    "fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * (MOST_ANSWER_FIELDS - 1) + BODY,
    "bytes": padded(LONGEST_ANSWER_HEAD),
    "bytes of interim answers": (HINTS + b"Link: " + b"x" * 8000 + b"\r\n\r\n") * 7 + OK,
}

BAD = {
    "fields": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * MOST_ANSWER_FIELDS + BODY,
    "many fields": b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * 65_000 + BODY,
    "fields of an interim answer": HINTS + b"a:\n" * 10_000 + b"\r\n" + OK,
    "folded lines": b"HTTP/1.1 200 OK\r\nA: b\r\n" + b" c\r\n" * 10_000 + BODY,
    "bytes": padded(LONGEST_ANSWER_HEAD + 1),
    "a head without an end": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000,
    "interim answers": (HINTS + b"\r\n") * 2500 + OK,
    "bytes of interim answers": (HINTS + b"Link: " + b"x" * 8200 + b"\r\n\r\n") * 8 + OK,
}


def final(visitor, url):
    """The answer behind the interim ones, and their number."""
    found, interim = visitor.get(url), 0
    while found[0] < 200:
        found, interim = visitor.answer(), interim + 1
    return found, interim


@pytest.mark.parametrize("what", GOOD)
def test_an_answer_may_have_this_much(http_proxy, origin, client, monkeypatch, what):
    monkeypatch.setattr(http.client, "_MAXHEADERS", 1000)
    (status, _, body), _ = final(client(http_proxy()), f"{origin(GOOD[what]).url}/")
    assert (status, body) == (200, b"hello")


@pytest.mark.parametrize("what", BAD)
def test_more_is_a_502_and_ends_the_connection_to_the_origin(http_proxy, origin, client, records, what):
    target = origin(lambda conn, head: BAD[what], OK)
    visitor = client(http_proxy())
    (status, _, _), _ = final(visitor, f"{target.url}/")
    assert status == 502
    assert records[0].result == "failed"
    assert visitor.get(f"{target.url}/")[0] == 200
    assert target.accepted_connections == 2


@pytest.mark.slow
@pytest.mark.parametrize("of", ["request", "answer"])
def test_a_body_of_tiny_chunks_is_taken_in_small_pieces(http_proxy, origin, client, monkeypatch, of):
    """16 KiB of chunks of one byte take 4 ms; as much as a read gives, and 16 reads without a wait, took 275 ms."""
    fed = []
    feed = ChunkReader.feed

    def noted(reader, data):
        content = feed(reader, data)
        fed.append((len(data), reader.crowded))
        return content

    monkeypatch.setattr(ChunkReader, "feed", noted)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n"
    if of == "answer":
        target = origin(b"HTTP/1.1 200 OK\r\n" + chunked)
        assert client(http_proxy()).get(f"{target.url}/")[2] == b"a" * 50_000
    else:
        target = origin(lambda conn, head: conn.recv_until(b"0\r\n\r\n", 1 << 20) and OK)
        visitor = client(http_proxy())
        visitor.send(f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\n".encode() + chunked)
        assert visitor.answer()[0] == 200
    assert sum(size for size, _ in fed) == len(chunked) - len(b"Transfer-Encoding: chunked\r\n\r\n")
    # What came with a head may be a little more than a read.
    assert max(size for size, _ in fed) <= 2 * PACED_PIECE
    assert sum(crowded for _, crowded in fed) > 10


def test_a_body_of_large_chunks_is_not_crowded():
    reader = ChunkReader()
    assert reader.crowded
    assert reader.feed(b"") == b""
    assert reader.crowded
    reader.feed(b"1000\r\n" + bytes(4096) + b"\r\n")
    assert not reader.crowded
    reader.feed(b"1\r\na\r\n" * (MANY_LINES + 1))
    assert reader.crowded
