"""HTTP messages as a proxy reads and changes them: no sockets here."""

from contextlib import suppress
from itertools import pairwise

import h11
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gtcpserver.http1.chunks import (
    LONGEST_LINE,
    MOST_OVERHEAD,
    ChunkError,
    ChunkReader,
    chunk,
    last_chunk,
)
from gtcpserver.http1.head import LONGEST_HEAD, LONGEST_TARGET, MOST_FIELDS, HttpError, check_head, find_end_of_head
from gtcpserver.proxy.http_fields import (
    basic_credentials,
    check_loop,
    end_to_end,
    forwarded_trailers,
    forwards_left,
    traced,
    unique_pseudonym,
    wanted_upgrade,
)
from gtcpserver.proxy.http_messages import absolute_target, connect_target, own_answer


def head_of(*fields, line="GET http://x/ HTTP/1.1"):
    if not any(field.lower().startswith("host") for field in fields):
        fields = ("Host: x", *fields)
    return check_head("\r\n".join([line, *fields, "", ""]).encode("latin-1"))


def status_of(call, *args):
    with pytest.raises(HttpError) as caught:
        call(*args)
    return caught.value.status


# -- heads -------------------------------------------------------------------------------------------------------------

TOKENS = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=8)
VALUES = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=20)


@pytest.mark.slow
@given(TOKENS, st.lists(st.tuples(TOKENS, VALUES), max_size=6), st.integers(0, 1))
def test_requirement_21_what_is_taken_is_read_in_the_same_way_by_h11(method, fields, minor):
    text = f"{method} http://x/ HTTP/1.{minor}\r\n" + "".join(f"{name}:{value}\r\n" for name, value in fields)
    raw = f"{text}Host: x\r\n\r\n".encode("latin-1")
    try:
        head = check_head(raw)
    except HttpError:
        assume(False)
    other = h11.Connection(h11.SERVER)
    other.receive_data(raw)
    event = other.next_event()
    assert (event.method, event.target, event.http_version) == (head.method, head.target, head.version)
    assert [(name.lower(), value) for name, value in head.headers] == list(event.headers)


@pytest.mark.slow
@given(st.binary(max_size=60), st.lists(st.integers(0, 80), max_size=5))
def test_requirement_01_a_head_may_come_in_any_pieces(junk, cuts):
    data = b"GET http://x/ HTTP/1.1\r\nA: b\r\n\r\n" + junk
    seen = searched = 0
    found = None
    for cut in sorted({*cuts, len(data)}):
        seen = min(cut, len(data))
        found = find_end_of_head(data[:seen], searched)
        if found is not None:
            break
        searched = seen
    assert found == len(data) - len(junk)


@pytest.mark.slow
@given(st.binary(max_size=300), st.sampled_from([b"", b"GET http://x/ HTTP/1.1\r\n", b"POST http://x/ HTTP/1.1\r\nA:"]))
def test_any_bytes_are_a_head_or_an_error_of_ours(junk, start):
    with suppress(HttpError):
        find_end_of_head(start + junk)
    with suppress(HttpError):
        head = check_head(start + junk + b"\r\n\r\n")
        end_to_end(head.headers)
        basic_credentials(head)
        wanted_upgrade(head)
        forwards_left(head)
        with suppress(HttpError):
            connect_target(head)
        absolute_target(head)


@pytest.mark.parametrize("size", [LONGEST_TARGET + 100, LONGEST_HEAD * 3])
def test_requirement_30_a_request_line_that_does_not_end_is_a_414(size):
    assert status_of(find_end_of_head, b"GET http://x/" + b"a" * size) == 414


def test_requirement_30_heads_have_limits():
    start = b"GET http://x/ HTTP/1.1\r\nHost: x\r\n"
    assert status_of(find_end_of_head, start + b"A: b\r\n" * 20_000) == 431
    assert status_of(find_end_of_head, start + b"A: " + b"b" * LONGEST_HEAD) == 431
    assert status_of(find_end_of_head, start + b"A: " + b"b" * LONGEST_HEAD + b"\r\n\r\n") == 431
    assert status_of(check_head, start + b"A: b\r\n" * (MOST_FIELDS + 1) + b"\r\n") == 431
    assert len(check_head(start + b"A: b\r\n" * (MOST_FIELDS - 1) + b"\r\n").headers) == MOST_FIELDS
    assert status_of(check_head, b"GET /" + b"a" * LONGEST_TARGET + b" HTTP/1.1\r\n\r\n") == 414


@pytest.mark.parametrize("data", [b"\n", b"GET http://x/ HTTP/1.1\n", b"GET http://x/ HTTP/1.1\r\nA: b\nC: d\r\n"])
def test_requirement_21_a_bare_lf_is_refused_as_soon_as_it_comes(data):
    assert status_of(find_end_of_head, data) == 400
    for cut in range(len(data)):
        with suppress(HttpError):
            find_end_of_head(data[:cut])
            assert status_of(find_end_of_head, data, cut) == 400


@pytest.mark.parametrize(
    "line",
    [
        "GET  http://x/ HTTP/1.1",
        "GET\thttp://x/ HTTP/1.1",
        "GET http://x/ HTTP/1.1 ",
        " GET http://x/ HTTP/1.1",
        "GET http://x/ http/1.1",
        "GET http://x/ HTTP/1",
        "GET http://x/ HTTP/11.1",
        "GET http://x/ HTTP/1.1\x0b",
        "GET http://x/\x00 HTTP/1.1",
        "GET http://x/ä HTTP/1.1",
        "GET http://x/ b HTTP/1.1",
        "G(T http://x/ HTTP/1.1",
        "GET http://x/",
        "",
    ],
)
def test_requirement_21_request_lines_that_may_be_read_in_two_ways(line):
    assert status_of(lambda: head_of("Host: x", line=line)) == 400


@pytest.mark.parametrize(("version", "status"), [("2.0", 505), ("0.9", 505), ("3.1", 505)])
def test_other_major_versions_are_refused(version, status):
    assert status_of(lambda: head_of(line=f"GET http://x/ HTTP/{version}")) == status


def test_a_higher_minor_version_is_read_as_1_1():
    head = head_of("Host: x", line="GET http://x/ HTTP/1.7")
    assert head.version == b"1.1"
    assert not head.wants_close


@pytest.mark.parametrize("method", ["CONNECT", "TRACE"])
@pytest.mark.parametrize("field", ["Content-Length: 5", "Transfer-Encoding: chunked"])
def test_requirement_21_a_connect_cannot_have_a_body(method, field):
    assert status_of(lambda: head_of("Host: x", field, line=f"{method} x:80 HTTP/1.1")) == 400
    assert head_of("Host: x", "Content-Length: 0", line=f"{method} x:80 HTTP/1.1").length == 0


@pytest.mark.parametrize(
    ("fields", "line", "closes"),
    [
        ([], "GET http://x/ HTTP/1.1", False),
        (["Connection: keep-alive"], "GET http://x/ HTTP/1.1", False),
        (["Connection: keep-alive, CLOSE"], "GET http://x/ HTTP/1.1", True),
        (["Proxy-Connection: close"], "GET http://x/ HTTP/1.1", True),
        (["Connection: not-close"], "GET http://x/ HTTP/1.1", False),
        (["Connection: keep-alive"], "GET http://x/ HTTP/1.0", True),
    ],
)
def test_who_wants_the_connection_closed(fields, line, closes):
    assert head_of(*fields, line=line).wants_close is closes


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "where", "host", "path"),
    [
        ("http://[::1]/", "[::1]:80", b"[::1]", b"/"),
        ("http://[::1]", "[::1]:80", b"[::1]", b"/"),
        ("http://[::1]:8080/a", "[::1]:8080", b"[::1]:8080", b"/a"),
        ("HTTP://Example.COM./x?y#z", "example.com.:80", b"example.com.", b"/x?y"),
        ("http://example.com:80", "example.com:80", b"example.com", b"/"),
        ("http://example.com:180?q", "example.com:180", b"example.com:180", b"/?q"),
        ("http://0x7f.1/", "127.0.0.1:80", b"127.0.0.1", b"/"),
        ("http://[::ffff:127.0.0.1]/", "127.0.0.1:80", b"127.0.0.1", b"/"),
        ("http://x//y", "x:80", b"x", b"//y"),
        ("http://x/http://y/", "x:80", b"x", b"/http://y/"),
    ],
)
def test_requirements_20_28_absolute_targets(target, where, host, path):
    found = absolute_target(head_of("Host: other", line=f"GET {target} HTTP/1.1"))
    assert (str(found[0]), *found[1:]) == (where, host, path)


def test_options_for_a_whole_server():
    assert absolute_target(head_of(line="OPTIONS http://x HTTP/1.1"))[2] == b"*"
    assert absolute_target(head_of(line="OPTIONS http://x/ HTTP/1.1"))[2] == b"/"


@pytest.mark.parametrize(
    "target",
    [
        *("/", "*", "x:80", "//x/", "https://x/", "http:/x/", "file:///x"),
        *("http://", "http://x:0/", "http://x:65536/", "http://x:+80/", "http://x\\@y/", "http://x%00/"),
        *("http://[::1", "http://[::1]x/", "http://::1/", "http://[fe80::1%25eth0]/", "http://1.2.3.256/"),
    ],
)
def test_requirements_18_28_29_targets_that_are_refused(target):
    assert status_of(lambda: absolute_target(head_of(line=f"GET {target} HTTP/1.1"))) == 400


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["x", "x:", "x:0", "x:65536", "x:http", "u@x:80", "x:80/", "http://x:80", "::1:80", "[::1]", ":80", "*"]
)
def test_requirement_18_connect_needs_a_host_and_a_port(target):
    assert status_of(lambda: connect_target(head_of(line=f"CONNECT {target} HTTP/1.1"))) == 400


# -- fields ------------------------------------------------------------------------------------------------------------


def test_requirement_22_hop_by_hop_fields_and_those_that_are_named_are_removed():
    names = "Connection Proxy-Connection Keep-Alive TE Trailer Transfer-Encoding Upgrade Proxy-Authorization"
    names += " Proxy-Authenticate Proxy-Authentication-Info HTTP2-Settings"
    fields = [(name.encode(), b"1") for name in names.split()]
    own = [(b"CONNECTION", b"x-a ,  X-B"), (b"Proxy-Connection", b"x-c"), (b"X-a", b"1"), (b"x-b", b"1"), (b"X-C", b"")]
    assert end_to_end([*fields, *own, (b"X-D", b"1")]) == [(b"X-D", b"1")]


def test_requirement_23_a_connection_field_cannot_strip_what_others_rely_on():
    kept = b"Host Content-Length X-Forwarded-For Forwarded Via Cookie Authorization Cache-Control Content-Type Range"
    fields = [(name, b"1") for name in kept.split()]
    assert end_to_end([(b"Connection", kept.replace(b" ", b", ")), *fields]) == fields


def test_trailers_cannot_say_what_belongs_into_a_head():
    wrong = [(name, b"1") for name in b"Content-Length Transfer-Encoding Host Authorization Set-Cookie Via".split()]
    assert forwarded_trailers([*wrong, (b"Digest", b"x")]) == [(b"Digest", b"x")]


@pytest.mark.parametrize(
    ("fields", "line", "wanted"),
    [
        (["Connection: Upgrade", "Upgrade: websocket"], "GET http://x/ HTTP/1.1", b"websocket"),
        (["Connection: x, UPGRADE", "Upgrade: a", "Upgrade: b"], "GET http://x/ HTTP/1.1", b"a, b"),
        (["Upgrade: websocket"], "GET http://x/ HTTP/1.1", None),
        (["Connection: upgrade"], "GET http://x/ HTTP/1.1", None),
        (["Connection: upgrade", "Upgrade: websocket"], "GET http://x/ HTTP/1.0", None),
        (["Connection: upgrade", "Upgrade: websocket", "Content-Length: 3"], "GET http://x/ HTTP/1.1", None),
    ],
)
def test_upgrades(fields, line, wanted):
    assert wanted_upgrade(head_of(*fields, line=line)) == wanted


@pytest.mark.parametrize(
    ("via", "loop"),
    [
        ("1.1 me", True),
        ("1.0 a, 1.1 me (comment), 1.1 b", True),
        ("HTTP/1.1 me", True),
        ("1.1 me2", False),
        ("1.1 a (me)", False),
        ("me", False),
        ("", False),
        (", ,", False),
    ],
)
def test_requirement_24_loops(via, loop):
    head = head_of(f"Via: {via}")
    if loop:
        assert status_of(check_loop, head, b"me") == 508
    else:
        check_loop(head, b"me")


def test_requirement_24_two_proxies_in_a_chain_have_different_names():
    one, other = unique_pseudonym(), unique_pseudonym()
    assert one != other
    check_loop(head_of(f"Via: 1.1 {one}"), other.encode())


def test_requirement_24_max_forwards():
    for method in ("TRACE", "OPTIONS"):
        line = f"{method} http://x/ HTTP/1.1"
        assert forwards_left(head_of("Max-Forwards: 0", line=line)) == 0
        assert forwards_left(head_of("Max-Forwards: 15", line=line)) == 15
        assert forwards_left(head_of(line=line)) is None
        for wrong in ("-1", "+1", "x", "", "1, 2", "9999999999"):
            assert status_of(forwards_left, head_of(f"Max-Forwards: {wrong}", line=line)) == 400
    assert forwards_left(head_of("Max-Forwards: x")) is None


def test_a_trace_shows_no_secrets():
    head = head_of("Cookie: a=b", "A: b", "Proxy-Authorization: c", "authorization: d", line="TRACE http://x/ HTTP/1.1")
    assert traced(head) == b"TRACE http://x/ HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Basic QWRhOnB3", (b"Ada", b"pw")),
        ("bAsIc  QWRhOnB3", (b"Ada", b"pw")),
        ("Basic QWRhOnA6dzo=", (b"Ada", b"p:w:")),  # colons in the password
        ("Basic Og==", (b"", b"")),
        ("Basic QWRh", None),
        ("Basic QWRhOnB3!", None),
        ("Basic", None),
        ("Bearer QWRhOnB3", None),
        ("", None),
    ],
)
def test_requirement_27_basic_credentials(value, found):
    assert basic_credentials(head_of(f"Proxy-Authorization: {value}")) == found


def test_requirement_27_two_credentials_are_none():
    assert basic_credentials(head_of(*["Proxy-Authorization: Basic QWRhOnB3"] * 2)) is None


def test_own_answers():
    assert own_answer(502, b"text", close=True) == (
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 4\r\n"
        b"Connection: close\r\n\r\ntext"
    )
    assert own_answer(502, b"text", close=False, of_head=True).endswith(
        b"Content-Length: 4\r\nConnection: keep-alive\r\n\r\n"
    )


# -- chunks ------------------------------------------------------------------------------------------------------------


def read(reader, data, cuts=()):
    content = b""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    for start, end in pairwise(places):
        content += reader.feed(data[start:end])
    return content


CUTS = st.lists(st.integers(0, 200), max_size=8)


@pytest.mark.slow
@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.binary(max_size=10), CUTS)
def test_what_is_written_in_chunks_is_read_again_however_it_is_cut(pieces, rest, cuts):
    trailers = [(b"A", b"b"), (b"C", b"")]
    data = b"".join(map(chunk, pieces)) + last_chunk(trailers) + rest
    reader = ChunkReader()
    assert read(reader, data, cuts) == b"".join(pieces)
    assert (reader.done, reader.rest, reader.trailers) == (True, rest, trailers)


PARTS = [b"0", b"3", b"a", b"A", b"\r\n", b"\n", b"\r", b";", b" ", b"x=y", b"abc", b"X: y", b"-", b"+", b"\0", b"0x"]


@pytest.mark.slow
@given(st.lists(st.sampled_from(PARTS), max_size=14).map(b"".join), CUTS, st.booleans())
def test_any_chunks_are_read_as_h11_reads_them_or_refused(data, cuts, of_answer):
    reader = ChunkReader(of_answer)
    try:
        content = read(reader, data, cuts)
    except ChunkError:
        with pytest.raises(ChunkError):
            read(ChunkReader(of_answer), data)
        return
    other = h11.Connection(h11.SERVER)
    other.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    other.next_event()
    expected, ended = b"", False
    while (event := other.next_event()) is not h11.NEED_DATA and event is not h11.PAUSED:
        if isinstance(event, h11.EndOfMessage):
            ended = True
            break
        expected += bytes(event.data)
    assert content == expected
    assert reader.done is ended
    if ended:
        assert reader.rest == other.trailing_data[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"5\nhello\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloXX0\r\n\r\n",
        b"5\r\nhello\r\r",
        b"0x5\r\n",
        b"+5\r\n",
        b"-1\r\n",
        b"5 \r\n",
        b" 5\r\n",
        b"\r\n",
        b";a\r\n",
        b"5\0\r\n",
        b"5;a\rb\r\n",
        b"5;a\nb\r\n",
        b"1_0\r\n",
        b"\xb2\r\n",  # a digit of another script
        b"ffffffffffffffff\r\n",  # more than 63 bits
        b"00000000000000005\r\n",
        b"0\r\nA : b\r\n",
        b"0\r\n A: b\r\n",
        b"0\r\nA\r\n",
        b"0\r\n\n",
        b"0\r\n" + b"A: b\r\n" * (MOST_FIELDS + 1),
        b"1" * (LONGEST_LINE + 1),
        b"5;" + b"a" * (LONGEST_LINE + 1),
        b"0\r\n" + b"A: b" + b"c" * (LONGEST_LINE + 1),
        (b"1;" + b"a" * 100 + b"\r\nx\r\n") * (MOST_OVERHEAD // 100 + 1),
    ],
)
def test_requirement_21_chunks_that_are_refused(data):
    with pytest.raises(ChunkError):
        ChunkReader().feed(data)
    reader = ChunkReader()
    with pytest.raises(ChunkError):
        for place in range(len(data)):
            reader.feed(data[place : place + 1])


def test_extensions_are_dropped_and_padding_is_for_answers_only():
    reader = ChunkReader()
    assert reader.feed(b'5;a="b" ; c\r\nhello\r\n0;x\r\n\r\n') == b"hello"
    assert reader.done
    assert ChunkReader(of_answer=True).feed(b"5   \r\nhello\r\n0\r\n\r\n") == b"hello"


def test_memory_of_a_chunk_reader_is_bounded():
    reader = ChunkReader()
    assert len(reader.feed(b"fffffff\r\n" + b"x" * 100_000)) == 100_000
    for _ in range(50):
        assert len(reader.feed(b"x" * 100_000)) == 100_000
    assert not reader._kept
