"""Heads of answers: the quick way and the lenient one read the same."""

import random
import time
from itertools import product

import pytest

from gtcpserver.http1.head import END_OF_HEAD
from gtcpserver.proxy.http_answer import Answer, AnswerReader, BadAnswer, read_plain

LINES = [
    b"Content-Length: 5",
    b"content-length: 0",
    b"Content-Length: 5, 5",
    b"Content-Length: +5",
    b"Content-Length: 12345678901234567890",
    b"Transfer-Encoding: chunked",
    b"transfer-encoding: CHUNKED",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: identity",
    b"Connection: close",
    b"Connection: Keep-Alive",
    b"Connection: close, X-A",
    b"Connection: X-A",
    b"Proxy-Connection: close",
    b"Keep-Alive: timeout=5",
    b"Upgrade: h2c",
    b"Trailer: X-A",
    b"TE: trailers",
    b"Proxy-Authenticate: Basic realm=x",
    b"X-A: b",
    b"X-A:b",
    b"X-A:  b ",
    b"X-A: ",
    b"X-A : b",
    b"X-A: b\xff\tc",
    b"X-A: b\0c",
    b"X-A: b\x7fc",
    b"X-A: b\rc",
    b"X-A: b\n c",
    b"X-A",
    b": b",
    b"Set-Cookie: a=b; Path=/",
    b"X-Connection: close",
    b"Connection-X: close",
    b"Via: 1.1 other",
]

STATUS_LINES = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 200 ",
    b"HTTP/1.1 200",
    b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 304 Not Modified",
    b"HTTP/1.1 599 \xfcber",
    b"HTTP/1.1 099 OK",
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 101 Switching",
    b"HTTP/1.1 2000 OK",
    b"HTTP/1.0 200 OK",
    b"HTTP/1.2 200 OK",
    b"HTTP/2 200 OK",
    b"HTTP/1.1  200 OK",
    b"HTTP/1.1 200 a\0b",
]


def by_h11(head: bytes, method: bytes) -> Answer | None:
    try:
        return AnswerReader(method).read(head)
    except BadAnswer:
        return None


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
def test_what_is_plain_is_what_h11_reads(method):
    chance = random.Random(5)
    some = [tuple(chance.choices(LINES, k=chance.randint(3, 6))) for _ in range(1500)]
    sets = [(), *((line,) for line in LINES), *product(LINES, LINES), *some]
    plain = 0
    for lines in sets:
        status_line = chance.choice(STATUS_LINES) if chance.random() < 0.3 else STATUS_LINES[0]
        for line in (status_line, *(STATUS_LINES if len(lines) < 2 else ())):
            head = b"\r\n".join((line, *lines)) + END_OF_HEAD
            found = read_plain(head, method)
            if found is not None:
                plain += 1
                assert found == by_h11(head, method), head
    assert plain > 200


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Tue, 01 Dec 2026 01:00:00 GMT\r\n"
        b"Content-Type: text/html\r\nContent-Length: 612\r\nLast-Modified: Tue, 01 Dec 2026 00:00:00 GMT\r\n"
        b'Connection: keep-alive\r\nETag: "6565-264"\r\nAccept-Ranges: bytes\r\n\r\n',
        b"HTTP/1.1 200 OK\r\nDate: Tue, 01 Dec 2026 01:00:00 GMT\r\nServer: Apache/2.4.57 (Debian)\r\n"
        b"Keep-Alive: timeout=5, max=100\r\nConnection: Keep-Alive\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: text/html;charset=UTF-8\r\n\r\n",
        b'HTTP/1.1 304 Not Modified\r\nETag: W/"1"\r\nConnection: close\r\n\r\n',
    ],
)
def test_what_servers_usually_send_is_plain(head):
    answer = read_plain(head, b"GET")
    assert answer is not None
    assert answer == by_h11(head, b"GET")
    assert b"onnection" not in answer.fields
    assert b"eep-Alive" not in answer.fields


@pytest.mark.parametrize("end", [b"", b"\x01"])
def test_no_head_takes_more_than_linear_time(end):
    began = time.process_time()
    for line in (b"A: b" + 60_000 * b" " + b"c", b"A: " + 60_000 * b" ", 60_000 * b"a", 15_000 * b"a: b\r\n"):
        read_plain(b"HTTP/1.1 200 OK\r\n" + line + end + END_OF_HEAD, b"GET")
        read_plain(b"HTTP/1.1 200 " + line.replace(b"\r\n", b"") + end + END_OF_HEAD, b"GET")
    assert time.process_time() - began < 2  # 0.01 to 0.05; in quadratic time some 10 s for each
