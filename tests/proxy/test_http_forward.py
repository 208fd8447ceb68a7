"""Forwarding where it is difficult: broken origins, bodies that do not end, connections that must not be shared."""

import hashlib
import os
import socket
from contextlib import suppress

import gevent
import pytest
from gevent.event import Event

from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.http_body import MOST_DISCARDED, SPLICE_FROM
from gtcpserver.proxy.http_origin import MOST_IDLE
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from kit.forwarding import CLOSE, OK
from kit.patience import SOON
from kit.proxying import ANYWHERE
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


def everything(conn):
    """What comes until the end; a reset is noted at its end."""
    data = b""
    try:
        while more := conn.recv(65536):
            data += more
    except ConnectionResetError:
        return data + b"RESET"
    return data


# -- what origins send -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b" + b"c" * 300_000,
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",  # nobody has asked for it
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3000 + OK,
    ],
)
def test_requirement_21_answers_that_cannot_be_trusted_are_a_502(http_proxy, origin, client, answer):
    visitor = client(http_proxy())
    found = visitor.get(f"{origin(answer).url}/")
    while found[0] == 103:
        found = visitor.answer()
    assert found[0] == 502
    assert b"127.0.0.1" not in found[2]
    # The connection is in step: another request gets its own answer.
    assert visitor.get(f"{origin(OK).url}/")[::2] == (200, b"hello")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nA: b", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_requirement_26_an_origin_that_closes_before_its_answer_is_a_502(http_proxy, origin, client, records, answer):
    visitor = client(http_proxy())
    found = visitor.get(f"{origin(answer).url}/")
    if found[0] == 100:
        found = visitor.answer()
    assert found[0] == 502
    wait_until(lambda: records)
    assert (records[0].result, records[0].detail) == ("failed", "closed without an answer")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nonly",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nonly",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nonly\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nonlyX",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x4\r\nonly",
    ],
)
def test_requirement_32_an_answer_that_breaks_off_is_a_reset(http_proxy, origin, client, records, answer):
    visitor = client(http_proxy())
    visitor.send(f"GET {origin(answer).url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        visitor.read()
    wait_until(lambda: records)
    assert records[0].result == "failed"


def test_an_origin_that_stops_in_the_midst_is_a_reset_after_its_time(http_proxy, origin, client):
    pause = Event()
    target = origin(lambda conn, head: conn.sendall(OK[:-1]) or (pause.wait() and b""))
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        visitor.read()


def test_requirement_31_silence_after_an_interim_answer_is_a_504(http_proxy, origin, client):
    pause = Event()
    target = origin(lambda conn, head: conn.sendall(b"HTTP/1.1 102 Processing\r\n\r\n") or (pause.wait() and b""))
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    assert visitor.get(f"{target.url}/")[0] == 102
    assert visitor.answer()[0] == 504
    pause.set()


def test_requirement_25_a_204_has_no_length_and_bytes_behind_it_are_dropped(http_proxy, origin, client):
    target = origin(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", OK)
    visitor = client(http_proxy())
    status, fields, _ = visitor.get(f"{target.url}/")
    assert (status, fields["content-length"]) == (204, None)
    assert visitor.get(f"{target.url}/")[::2] == (200, b"hello")
    assert target.accepted_connections == 2  # the first one is out of step


def test_requirement_25_trailers_of_both_sides(http_proxy, origin, client):
    got = []

    def answer(conn, head):
        got.append(conn.recv_until(b"X-Sum: 1\r\n\r\n"))
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-End: 1\r\nSet-Cookie: a\r\n\r\n"

    visitor = client(http_proxy())
    visitor.send(f"POST {origin(answer).url}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nabc")
    visitor.send("\r\n3\r\ndef\r\n0\r\nHost: evil\r\nX-Sum: 1\r\n\r\n")
    head = visitor.in_thread(lambda: b"".join(iter(visitor.file.readline, b"\r\n")))
    assert b"Transfer-Encoding: chunked" in head
    assert visitor.in_thread(visitor.file.read, 22) == b"2\r\nok\r\n0\r\nX-End: 1\r\n\r\n"
    assert b";" not in got[0]
    assert b"evil" not in got[0]
    assert got[0].endswith(b"0\r\nX-Sum: 1\r\n\r\n")


# -- large bodies ------------------------------------------------------------------------------------------------------

LARGE = os.urandom(1 << 20) * 8


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_large_answers_arrive_whole(http_proxy, origin, client, records, framing, version):
    def answer(conn, head):
        if framing == "length":
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LARGE) + LARGE)
        elif framing == "chunked":
            conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(LARGE), 100_000):
                piece = LARGE[start : start + 100_000]
                conn.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            conn.sendall(b"0\r\n\r\n")
        else:
            conn.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + LARGE)
            return CLOSE
        return b""

    visitor = client(http_proxy())
    visitor.send(f"GET {origin(answer).url}/ HTTP/{version}\r\nHost: x\r\n\r\n")
    status, fields, body = visitor.answer()
    assert (status, body == LARGE) == (200, True)
    if version == "1.0":
        assert fields["transfer-encoding"] is None
        assert visitor.read() == b""
    wait_until(lambda: records)
    assert (records[0].result, records[0].received) == ("ok", len(LARGE))


def sink(conn, head):
    """Answer an upload with its hash."""
    digest = hashlib.sha256()
    left = int(head.lower().split(b"content-length: ")[1].split()[0])
    while left:
        data = conn.recv(min(left, 65536))
        assert data
        left -= len(data)
        digest.update(data)
    return b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + digest.hexdigest().encode()


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 70_000, len(LARGE)])
def test_large_uploads_arrive_whole_and_pipelined_requests_behind_them(http_proxy, origin, client, records, size):
    target = origin(sink, OK)
    visitor = client(http_proxy())
    head = f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
    visitor.send(head, LARGE[:size] + f"GET {target.url}/2 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert visitor.answer()[2].decode() == hashlib.sha256(LARGE[:size]).hexdigest()
    assert visitor.answer()[::2] == (200, b"hello")
    assert target.accepted_connections == 1
    wait_until(lambda: len(records) == 2)
    assert [(record.result, record.sent) for record in records] == [("ok", size), ("ok", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_requirement_30_a_client_that_does_not_read_stops_the_origin(http_proxy, origin, client, framing):
    sent = [0]

    def answer(conn, head):
        start = {
            "length": b"Content-Length: 1000000000\r\n\r\n",
            "chunked": b"Transfer-Encoding: chunked\r\n\r\n",
            "close": b"\r\n",
        }
        conn.sendall(b"HTTP/1.1 200 OK\r\n" + start[framing])
        piece = b"x" * 65536
        if framing == "chunked":
            piece = b"10000\r\n" + piece + b"\r\n"
        with suppress(OSError):
            while True:
                conn.sendall(piece)
                sent[0] += 1
        return CLOSE

    visitor = client(http_proxy(), receive_buffer=4096)
    target = origin(answer)
    visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: sent[0])
    before = -1
    while sent[0] != before:
        before = sent[0]
        gevent.sleep(0.1)
    assert before * 65536 < 32 << 20  # kernel buffers on both sides, and one piece here
    visitor.sock.close()
    visitor.file.close()
    wait_until(lambda: not target.active_connections)


@pytest.mark.slow
def test_requirement_30_an_origin_that_does_not_read_stops_the_client(
    http_proxy, origin, client, in_thread, spawn_thread
):
    pause = Event()
    target = origin(lambda conn, head: pause.wait() and CLOSE)
    visitor = client(http_proxy())
    visitor.send(f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    sent = [0]

    def upload():
        with suppress(OSError):
            while True:
                visitor.sock.sendall(b"x" * 65536)
                sent[0] += 1

    done = spawn_thread(upload)
    wait_until(lambda: sent[0])
    before = -1
    while sent[0] != before:
        before = sent[0]
        gevent.sleep(0.1)
    assert before * 65536 < 32 << 20
    visitor.sock.shutdown(socket.SHUT_RDWR)
    done.get(timeout=SOON)
    pause.set()


# -- bodies of requests that do not go well ----------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_an_early_answer_to_an_upload_reaches_the_client(http_proxy, origin, client, spawn_thread, large):
    def refuse(conn, head):
        conn.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nno!")
        return CLOSE

    visitor = client(http_proxy())
    size = 100_000_000 if large else 200_000
    head = f"POST {origin(refuse).url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()

    def upload():
        with suppress(OSError):  # it is cut off while it sends: that is what it should notice
            visitor.sock.sendall(head)
            for _ in range(size // 50_000):
                visitor.sock.sendall(b"x" * 50_000)

    done = spawn_thread(upload)
    status, fields, body = visitor.answer()
    assert (status, body) == (413, b"no!")
    assert not large or fields["connection"] == "close"
    done.get(timeout=SOON)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 10 * SPLICE_FROM])
def test_an_upload_may_take_longer_than_an_answer(http_proxy, origin, client, size):
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.6)))
    visitor.send(f"POST {origin(sink).url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n")
    for start in range(0, size, size // 5):
        gevent.sleep(0.15)
        visitor.send(LARGE[start : start + size // 5])
    assert visitor.answer()[2].decode() == hashlib.sha256(LARGE[:size]).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 10 * SPLICE_FROM])
def test_requirement_31_an_answer_is_awaited_from_the_end_of_the_upload(http_proxy, origin, client, size):
    pause = Event()
    target = origin(lambda conn, head: sink(conn, head) and pause.wait() and b"")
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    visitor.send(f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n")
    visitor.send(LARGE[:size])
    assert visitor.answer()[0] == 504
    pause.set()


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Content-Length: 10000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("how", ["half-close", "reset", "silence"])
def test_a_body_that_breaks_off_is_not_taken_for_a_whole_one(http_proxy, client, serve, framing, how):
    got = []
    target = serve(lambda conn: got.append(everything(conn)))
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.2)))
    visitor.send(f"PUT http://127.0.0.1:{target.port}/ HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n")
    wait_until(lambda: target.active_connections)
    visitor.send("3\r\nabc\r\n")
    if how == "reset":
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        visitor.file.close()
        visitor.sock.close()
    else:
        if how == "half-close":
            visitor.sock.shutdown(socket.SHUT_WR)
        assert visitor.answer()[0] == (400 if how == "half-close" else 408)
    wait_until(lambda: got)
    assert got[0].endswith(b"RESET")


def test_requirement_21_a_bad_chunk_behind_good_ones_resets_the_origin(http_proxy, client, serve, records):
    got = []
    target = serve(lambda conn: got.append(everything(conn)))
    visitor = client(http_proxy())
    visitor.send(
        f"POST http://127.0.0.1:{target.port}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    )
    wait_until(lambda: target.active_connections)
    visitor.send("3\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer()[0] == 400
    assert visitor.read() == b""
    wait_until(lambda: got and records)
    assert got[0].endswith(b"RESET")
    assert b"smuggled" not in got[0]
    assert records[0].result == "bad_request"


def test_requirement_25_expect_is_no_dead_lock(http_proxy, origin, client):
    # An origin that does not know it: the client loses patience and sends.
    visitor = client(http_proxy())
    target = origin(sink)
    visitor.send(f"PUT {target.url}/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    wait_until(lambda: target.heads)
    visitor.send("abc")
    assert visitor.answer()[0] == 200
    # One that refuses: the client need not send.
    target = origin(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
    visitor.send(f"PUT {target.url}/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    status, fields, _ = visitor.answer()
    assert (status, fields["connection"]) == (417, "close")


# -- connections -------------------------------------------------------------------------------------------------------


class Everyone:
    """An authenticator: the password is the name."""

    def check(self, user, password, client):
        return user == password


def test_an_origin_connection_is_not_shared_between_users(http_proxy, origin, client, records):
    target = origin(OK, OK, OK, OK)
    server = http_proxy(
        client_rules=[parse_client_rule("allow from any to any with auth all")],
        authenticators={"all": Everyone()},
        destination_rules=[parse_destination_rule("allow from any user ada to 127.0.0.0/8")],
    )
    visitor = client(server)
    ada, bob = "Proxy-Authorization: Basic YWRhOmFkYQ==", "Proxy-Authorization: Basic Ym9iOmJvYg=="
    found = [visitor.get(f"{target.url}/", field)[0] for field in (ada, bob, ada)]
    assert found == [200, 403, 200]
    assert target.accepted_connections == 1
    wait_until(lambda: len(records) == 3)
    assert [record.user for record in records] == ["ada", "bob", "ada"]
    assert b"Authorization" not in b"".join(target.heads)


def test_idle_origin_connections_are_kept_for_each_destination_up_to_a_limit(http_proxy, origin, client):
    targets = [origin(*[OK] * 10) for _ in range(MOST_IDLE + 1)]
    visitor = client(http_proxy())
    for _ in range(2):
        for target in targets[:-1]:
            assert visitor.get(f"{target.url}/")[0] == 200
    assert [target.accepted_connections for target in targets[:-1]] == [1] * MOST_IDLE
    assert visitor.get(f"{targets[-1].url}/")[0] == 200
    wait_until(lambda: not targets[0].active_connections)
    visitor.file.close()
    visitor.sock.close()
    wait_until(lambda: not any(target.active_connections for target in targets))


@pytest.mark.slow
def test_requirement_26_what_is_not_idempotent_is_not_repeated(http_proxy, origin, client):
    mute = lambda conn, head: CLOSE  # noqa: E731
    for method, fields, body, status in [
        ("GET", [], b"", 200),
        ("DELETE", [], b"", 200),
        ("PUT", ["Content-Length: 3"], b"abc", 200),  # its body came with it
        ("POST", [], b"", 502),
        ("POST", ["Content-Length: 3"], b"abc", 502),
        ("PATCH", [], b"", 502),
    ]:

        def closes_now(conn, head, body=body):
            conn.recv_exactly(len(body))
            return CLOSE

        target = origin(OK, closes_now, OK)
        visitor = client(http_proxy())
        assert visitor.get(f"{target.url}/1")[0] == 200
        assert visitor.get(f"{target.url}/2", *fields, method=method, body=body)[0] == status
        assert [head.split()[1] for head in target.heads] == [b"/1", b"/2", b"/2"][: 3 if status == 200 else 2]
    # And a fresh connection that ends mute is not tried again.
    target = origin(mute, OK)
    assert client(http_proxy()).get(f"{target.url}/")[0] == 502
    assert len(target.heads) == 1


def test_requirement_27_a_refused_request_with_a_small_body_leaves_the_connection_open(http_proxy, origin, client):
    server = http_proxy(destination_rules=[parse_destination_rule("allow 127.0.0.1")])
    visitor = client(server)
    url = "http://10.0.0.1/"
    assert visitor.get(url, f"Content-Length: {MOST_DISCARDED}", method="POST", body=b"x" * MOST_DISCARDED)[0] == 403
    assert visitor.get(url, "Transfer-Encoding: chunked", method="POST", body=b"3\r\nabc\r\n0\r\n\r\n")[0] == 403
    visitor.send(f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
    assert visitor.answer()[0] == 403
    visitor.send("abc")
    assert visitor.get(f"{origin(OK).url}/")[0] == 200
    for field in (f"Content-Length: {MOST_DISCARDED + 1}", "Content-Length: 3\r\nExpect: 100-continue"):
        visitor = client(server)
        status, fields, _ = visitor.get(url, field, method="POST")
        assert (status, fields["connection"]) == (403, "close")
        assert visitor.read() == b""


def test_http_1_0_clients_get_one_answer(http_proxy, origin, client):
    visitor = client(http_proxy())
    visitor.send(f"GET {origin(OK).url}/ HTTP/1.0\r\nConnection: keep-alive\r\nProxy-Connection: keep-alive\r\n\r\n")
    status, fields, body = visitor.answer()
    assert (status, fields["connection"], body) == (200, "close", b"hello")
    assert visitor.read() == b""


def test_an_upgrade_with_a_body_is_an_ordinary_request(http_proxy, origin, client):
    target = origin(sink)
    fields = ["Connection: upgrade", "Upgrade: websocket", "Content-Length: 3"]
    assert client(http_proxy()).get(f"{target.url}/", *fields, method="POST", body=b"abc")[0] == 200
    assert b"pgrade" not in target.heads[0]


def test_requirement_21_bytes_behind_a_connect_with_a_length_are_not_a_tunnel(http_proxy, origin, client):
    target = origin(OK)
    visitor = client(http_proxy())
    assert visitor.get(f"127.0.0.1:{target.port}", "Content-Length: 3", method="CONNECT", body=b"abc")[0] == 400
    assert not target.accepted_connections


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_requirement_24_via_on_both_ways_and_max_forwards(http_proxy, origin, client):
    target = origin(OK, OK)
    visitor = client(http_proxy())
    _, fields, _ = visitor.get(f"{target.url}/", "Via: 1.0 other", "Max-Forwards: 3", method="OPTIONS")
    assert fields["via"] == "1.1 me"
    assert target.heads[0].count(b"Via: ") == 2
    assert b"Max-Forwards: 2\r\n" in target.heads[0]
    status, fields, body = visitor.get(f"{target.url}/", "Max-Forwards: 0", "Cookie: a=b", method="TRACE")
    assert (status, fields["content-type"]) == (200, "message/http")
    assert body.startswith(b"TRACE http://")
    assert b"Cookie" not in body
    assert visitor.get(f"{target.url}/", "Max-Forwards: 0", method="OPTIONS")[0] == 200
    assert len(target.heads) == 1
    assert visitor.get(f"{target.url}/", "Max-Forwards: x", method="OPTIONS")[0] == 400


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("remove", []),
        ("pass", [b"X-Forwarded-For: 10.9.9.9"]),
        ("append", [b"X-Forwarded-For: 10.9.9.9, 127.0.0.1"]),
        ("replace", [b"X-Forwarded-For: 127.0.0.1"]),
    ],
)
def test_requirement_37_clients_are_named_by_option(http_proxy, origin, client, how, expected):
    target = origin(OK)
    client(http_proxy(forwarded=how)).get(f"{target.url}/", "X-Forwarded-For: 10.9.9.9", "Connection: X-Forwarded-For")
    assert [line for line in target.heads[0].split(b"\r\n") if b"orwarded" in line] == expected


@pytest.mark.slow
def test_requirement_30_a_head_that_drips_has_one_deadline(http_proxy, client, records):
    visitor = client(http_proxy(timeouts=Timeouts(negotiate=0.3)))
    dripped = 0
    with suppress(OSError):
        for letter in "GET http://x/ HTTP/1.1\r\nHost: " + "x" * 200:
            visitor.send(letter)
            dripped += 1
            gevent.sleep(0.02)
            if records:
                break
    assert dripped < 100
    assert visitor.answer()[0] == 408
    assert records[0].result == "negotiation_timeout"


def test_empty_lines_before_a_request_are_skipped_however_they_come(http_proxy, origin, client):
    target = origin(OK, OK)
    visitor = client(http_proxy())
    for pieces in (["\r\n\r\n"], ["\r", "\n", "\r", "\n"]):
        for piece in pieces:
            visitor.send(piece)
        assert visitor.get(f"{target.url}/")[0] == 200


def test_requirement_36_a_stop_in_the_midst_of_an_answer_is_noted(http_proxy, origin, client, records):
    pause = Event()
    target = origin(lambda conn, head: pause.wait() and b"")
    server = http_proxy()
    visitor = client(server)
    visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_until(lambda: target.heads)
    server.halt()
    wait_until(lambda: records)
    assert records[0].result == "stopped"
    pause.set()


def test_an_embedded_proxy_is_a_few_lines(serve, origin, client):
    gate = Gate(
        client_rules=[parse_client_rule("allow any")],
        destination_rules=[parse_destination_rule("allow 127.0.0.1")],
    )
    server = serve(ProxyHandler(gate, "http"))
    assert client(server).get(f"{origin(OK).url}/")[::2] == (200, b"hello")


# -- the stages of a connection, one after another ---------------------------------------------------------------------


@pytest.mark.slow
def test_requirement_31_the_pause_between_requests_is_no_limit_of_their_bodies(http_proxy, origin, client):
    target = origin(lambda conn, head: b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + conn.recv_exactly(3))
    visitor = client(http_proxy(timeouts=Timeouts(keep_alive=0.05)))
    visitor.send(f"POST {target.url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
    gevent.sleep(0.2)
    visitor.send("abc")
    assert visitor.answer()[0] == 200


def test_requirement_31_a_client_that_stops_in_its_head_is_told_and_logged(http_proxy, client, records):
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    visitor.send("GET http://x/ HT")
    assert visitor.answer()[0] == 408
    wait_until(lambda: [record.result for record in records] == ["negotiation_timeout"])


def test_a_reset_within_a_head_is_logged(http_proxy, client, records):
    visitor = client(http_proxy())
    visitor.send("GET http://x/ HT")
    gevent.sleep(0.05)
    visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    visitor.file.close()
    visitor.sock.close()
    wait_until(lambda: [record.result for record in records] == ["reset"])


def test_requirement_31_a_mute_origin_has_a_counter_of_its_own(http_proxy, origin, client, records):
    pause = Event()
    target = origin(lambda conn, head: pause.wait() and b"")
    visitor = client(http_proxy(timeouts=Timeouts(answer=0.1)))
    assert visitor.get(target.url + "/")[0] == 504
    pause.set()
    wait_until(lambda: [record.result for record in records] == ["answer_timeout"])


def test_requirement_27_a_password_is_asked_for_with_each_request(serve, connect, in_thread, origin):
    class Knows:
        right = True

        def check(self, user, password, client):
            return self.right

    target, knows = origin(lambda conn, head: b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), Knows()
    rules = [parse_client_rule("allow from any to any with auth staff")]
    server = serve(
        ProxyHandler(Gate(client_rules=rules, destination_rules=ANYWHERE, authenticators={"staff": knows}), "http")
    )
    client = connect(server)
    request = f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic YWRhOnB3\r\n\r\n".encode()

    def ask():
        client.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += client.recv(1000)
        return answer[9:12]

    assert in_thread(ask) == b"200"
    knows.right = False
    assert in_thread(ask) == b"407"


def test_a_request_needs_a_host(http_proxy, client):
    visitor = client(http_proxy())
    visitor.send("GET http://x/ HTTP/1.1\r\n\r\n")
    assert visitor.answer()[0] == 400


# -- what is remembered from one request to the next -------------------------------------------------------------------


def test_each_request_gets_the_fields_of_its_own(http_proxy, origin, client):
    first, second = origin(*[OK] * 20), origin(*[OK] * 20)
    visitor = client(http_proxy())
    # Host is that of the target, whatever the client says; the same bytes of fields come behind another request line.
    fields = "Host: whatever\r\nCookie: a={}\r\nConnection: X-B\r\nX-B: gone\r\n\r\n"

    def ask(line, target, number=1):
        visitor.send(f"{line}\r\n" + fields.format(number))
        assert visitor.answer()[0] == 200
        return target.heads[-1]

    for target in (first, second, first):
        for number in (1, 1, 2):
            head = ask(f"GET {target.url}/a{number}?b HTTP/1.1", target, number)
            assert head.startswith(b"GET /a%d?b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (number, target.port))
            assert b"Cookie: a=%d\r\n" % number in head
            assert b"X-B" not in head
            assert head.count(b"\r\nVia: 1.1 ") == 1
    with_user = ask(f"GET {first.url.replace('//', '//u:p@')}/ HTTP/1.1", first)
    assert b"Authorization: Basic dTpw\r\n" in with_user
    assert b"Authorization" not in ask(f"GET {first.url}/ HTTP/1.1", first)
    assert ask(f"OPTIONS {first.url} HTTP/1.1", first).startswith(b"OPTIONS * HTTP/1.1\r\n")
    assert b"\r\nVia: 1.0 " in ask(f"GET {first.url}/ HTTP/1.0", first)
