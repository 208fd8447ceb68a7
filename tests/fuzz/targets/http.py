"""HTTP: heads of requests and answers, chunks, targets, credentials."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Any, get_args
from urllib.parse import urlsplit

import h11

from fuzz.engine import Target
from fuzz.targets.helpers import REFUSED, Choices, cuts_of, outcome, pieces_of
from gtcpserver.errors import GtcpServerError
from gtcpserver.http1.chunks import LONGEST_LINE, ChunkError, ChunkReader, chunk, last_chunk
from gtcpserver.http1.head import END_OF_HEAD, LONGEST_HEAD, MOST_FIELDS, Head, HttpError, check_head, find_end_of_head
from gtcpserver.proxy.http_answer import Answer, AnswerReader, read_plain
from gtcpserver.proxy.http_body import OriginFailed
from gtcpserver.proxy.http_fields import (
    Forwarded,
    ForwardedField,
    ForwardedMode,
    basic_credentials,
    check_loop,
    end_to_end,
    forwarded_trailers,
    forwards_left,
    names_client,
    traced,
    wanted_upgrade,
    with_client,
)
from gtcpserver.proxy.http_messages import OriginRequest, absolute_target, connect_target, head_of_answer
from gtcpserver.proxy.http_origin import Origin
from gtcpserver.proxy.succession import Tenure
from gtcpserver.proxy.target import make_target
from gtcpserver.static_files.request import BadRequest, Request, is_unchanged, parse_head, wanted_range

TCHAR = set(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
VALUE = {9, *range(32, 127), *range(128, 256)}

# -- heads of requests -------------------------------------------------------------------------------------------------


def request_head(data: bytes) -> None:
    end = outcome(lambda: find_end_of_head(data), HttpError)
    _check_ends(data, end)
    if end is None:
        assert len(data) <= LONGEST_HEAD
        return
    if end is REFUSED:
        return
    raw = data[:end]
    static = outcome(lambda: parse_head(raw.removesuffix(END_OF_HEAD)), BadRequest)
    head = outcome(lambda: check_head(raw), HttpError)
    if head is REFUSED:
        if static is not REFUSED:
            _check_refused_by_one(raw, static)
        return
    _check_strictly(head)
    _check_by_h11(head)
    if static is not REFUSED:
        _check_static(static)
        assert (static.method.encode(), static.target.encode()) == (head.method, head.target)
        assert not (static.keep and (head.has_body or b"close" in (option.lower() for option in _options(head))))
    _check_forwarded(head)


def _check_ends(data: bytes, end: Any) -> None:
    """However much has come, the head ends at the same place, or is refused."""
    searched = 0
    for cut in [*cuts_of(data), len(data)]:
        part = outcome(lambda cut=cut, searched=searched: find_end_of_head(data[:cut], searched), HttpError)
        if part is REFUSED:
            # Before its end was there; a whole head is looked at by check_head.
            whole = end is None or end is REFUSED or outcome(lambda: check_head(data[:end]), HttpError)
            assert whole is REFUSED or end is REFUSED or len(data) > LONGEST_HEAD
            return
        if part is not None:
            assert part == end
            return
        searched = cut
    assert end is None


def _check_strictly(head: Head) -> None:
    """RFC 9112 character by character: what was read is all that there is."""
    start, *lines = head.raw.removesuffix(END_OF_HEAD).split(b"\r\n")
    method, target, version = start.split(b" ")
    assert (method, target) == (head.method, head.target)
    assert set(method) <= TCHAR
    assert method
    assert all(33 <= byte <= 126 for byte in target)
    assert target
    assert version[:7] == b"HTTP/1."
    assert version[7:].isdigit()
    assert len(version) == 8
    assert head.version == (b"1.0" if version == b"HTTP/1.0" else b"1.1")
    assert len(lines) == len(head.headers) <= MOST_FIELDS
    for line, (name, value) in zip(lines, head.headers, strict=True):
        assert name
        assert set(name) <= TCHAR
        assert set(value) <= VALUE
        assert line[: len(name) + 1] == name + b":"
        before, found, after = line[len(name) + 1 :].partition(value) if value else (line[len(name) + 1 :], b"", b"")
        assert found == value
        assert not (before + after).strip(b" \t")
        assert value[:1] not in (b" ", b"\t")
        assert value[-1:] not in (b" ", b"\t")
    names = [name.lower() for name, _ in head.headers]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert names.count(b"host") <= 1


def _check_by_h11(head: Head) -> None:
    """h11 reads the same request, with a body of the same length."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * LONGEST_HEAD)
    reader.receive_data(head.raw)
    request: Any = reader.next_event()
    assert type(request) is h11.Request, f"h11 reads {request!r}"
    assert (request.method, request.target) == (head.method, head.target)
    # It has the encoding in lower case.
    fields = [(name.lower(), value) for name, value in head.headers]
    assert [(n, v.lower() if n == b"transfer-encoding" else v) for n, v in fields] == list(request.headers)
    assert (request.http_version == b"1.0") == (head.version == b"1.0")
    lengths = [value for name, value in request.headers if name == b"content-length"]
    encodings = [value for name, value in request.headers if name == b"transfer-encoding"]
    assert head.length == (int(lengths[0]) if lengths else 0)
    assert head.is_chunked == bool(encodings)
    if head.length > 1000:
        return
    behind = b"GET"
    reader.receive_data((b"3\r\nabc\r\n0\r\n\r\n" if head.is_chunked else b"x" * head.length) + behind)
    read = 0
    while type(event := reader.next_event()) is h11.Data:
        read += len(event.data)
    assert type(event) is h11.EndOfMessage
    assert read == (3 if head.is_chunked else head.length)
    assert reader.trailing_data[0] == behind


def _check_refused_by_one(raw: bytes, static: Request) -> None:
    """The static file server may take what the proxy refuses, if it has no body or is the last request."""
    _check_static(static)
    fields = raw.lower().split(b"\r\n")[1:]
    framed = [line for line in fields if line.startswith((b"content-length:", b"transfer-encoding:"))]
    assert not static.keep or all(line.split(b":")[1].strip(b" \t") == b"0" for line in framed)


CLIENT = ip_address("192.0.2.9")
FORWARDED = [Forwarded(mode, field) for mode in get_args(ForwardedMode) for field in get_args(ForwardedField)]


def _check_client(headers: list[tuple[bytes, bytes]], how: Forwarded) -> None:
    """The last client in a list is the one that we see, whatever it says of itself; no other field names one."""
    named = [(name.lower(), value) for name, value in headers if names_client(name)]
    if how.mode == "remove":
        assert not named
    elif how.mode == "replace":
        assert [name for name, _ in named] == [how.field.encode()]
        assert named[0][1] in (b"192.0.2.9", b"for=192.0.2.9")
    elif how.mode == "append":
        lists = [(name, value) for name, value in named if name in (b"x-forwarded-for", b"forwarded")]
        assert len(lists) == len(dict(lists))
        for _, value in lists:
            # Outside of any quoted string, where it would not count.
            last = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", value).rpartition(b",")[2].strip()
            assert last in (b"192.0.2.9", b"for=192.0.2.9")
        assert how.field.encode() in dict(lists)


def _options(head: Head) -> list[bytes]:
    return [option.strip() for value in head.values(b"connection") for option in value.split(b",")]


def _check_forwarded(head: Head) -> None:
    """What is forwarded is a subset of what came, and nothing of it concerns one hop only."""
    kept = end_to_end(head.headers)
    assert set(kept) <= set(head.headers)
    names = {name.lower() for name, _ in kept}
    assert not names & {b"connection", b"proxy-connection", b"transfer-encoding", b"te", b"upgrade", b"keep-alive"}
    assert not names & {b"proxy-authorization", b"proxy-authenticate", b"proxy-authentication-info"}
    for how in FORWARDED:
        _check_client(with_client(kept, CLIENT, how), how)
    wanted_upgrade(head)
    user = basic_credentials(head)
    assert user is None or b":" not in user[0]
    assert b"secret" not in traced(head).lower() or b"secret" in head.raw.lower()
    for call in (lambda: check_loop(head, b"us"), lambda: forwards_left(head)):
        outcome(call, HttpError)


FIELDS_OF_CLIENT = (b"X-Forwarded-For", b"Forwarded", b"X_Forwarded_For", b"X-Real-IP", b"x-forwarded-host", b"Via")


def forwarded(data: bytes) -> None:
    """Fields that name a client or hops, a line each: which one, and its value."""
    lines = [line for line in data.split(b"\n")[:20] if line]
    fields = [b"%b:%b\r\n" % (FIELDS_OF_CLIENT[line[0] % len(FIELDS_OF_CLIENT)], line[1:]) for line in lines]
    try:
        head = check_head(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"".join(fields) + b"\r\n")
    except HttpError:
        return
    _check_forwarded(head)


# -- targets of requests -----------------------------------------------------------------------------------------------


def request_target(data: bytes) -> None:
    """Where a request goes is what urlsplit reads, too, or an address in another spelling."""
    make_target.cache_clear()
    choices = Choices(data)
    method = [b"GET", b"OPTIONS", b"CONNECT"][choices.number(2)]
    raw = choices.rest()
    text = b"%b %b HTTP/1.1\r\nHost: h\r\n\r\n" % (method, raw)
    try:
        head = check_head(text)
        if method == b"CONNECT":
            target, url = connect_target(head), "http://" + raw.decode()
        else:
            target, name, path = absolute_target(head)
            url = raw.decode()
            assert path.startswith(b"/") or (path == b"*" and method == b"OPTIONS")
            assert not set(path) & set(b" \r\n#")
            assert raw.count(path) >= (path not in (b"*", b"/") and path[:2] != b"/?")
            assert make_target(*_split(name)) == target
            # The origin reads the request line that is written, and the same Host.
            check_head(b"%b %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (method, path, name))
    except HttpError:
        return
    split = urlsplit(url)
    if method == b"CONNECT":
        assert split.username is None
        assert split.password is None
    assert (split.port if split.port is not None else 80) == target.port
    assert split.hostname is not None
    assert make_target(split.hostname, target.port) == target
    assert method == b"CONNECT" or split.scheme == "http"


def _split(authority: bytes) -> tuple[str, int]:
    host, colon, port = authority.decode().rpartition(":")
    if not colon or authority.endswith(b"]"):
        return authority.decode(), 80
    return host, int(port)


# -- heads of answers --------------------------------------------------------------------------------------------------


class _Peer:
    """An origin that sends these pieces, and what was given back of them."""

    peeked = b""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.given_back = b""

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        pass

    def recv(self, size: int, flags: int = 0) -> bytes:
        if not self._pieces:
            return b""
        piece, rest = self._pieces[0][:size], self._pieces[0][size:]
        self._pieces[:1] = [rest] if rest else []
        return piece

    def unread(self, data: bytes) -> None:
        self.given_back = data

    def left(self) -> bytes:
        return self.given_back + b"".join(self._pieces)


class _NoBody:
    is_pumping = False

    def begin(self, connection: Any, head: bytes) -> None:
        connection.sendall(head)


def _read_answers(method: bytes, pieces: list[bytes]) -> tuple[list[Answer], bytes] | None:
    """The interim answers and the final one, and what comes behind them; None for what is no answer."""
    peer: Any = _Peer(pieces)
    body: Any = _NoBody()
    origin = Origin((make_target("h", 80), None, Tenure()), peer, "", 1.0)
    origin.ask(OriginRequest(method, b"/", b"Host: h\r\n"), body)
    answers = []
    while True:
        try:
            answer = origin.next_answer(body)
        except OriginFailed:
            return None
        answers.append(answer)
        if answer.status >= 200 or answer.status == 101:
            return answers, origin.at_hand(LONGEST_HEAD) + peer.left()


def answer_head(data: bytes) -> None:
    choices = Choices(data)
    method = [b"GET", b"HEAD", b"POST"][choices.number(2)]
    answer = choices.rest()
    end = answer.find(END_OF_HEAD) + len(END_OF_HEAD)
    plain = read_plain(answer[:end], method)
    assert plain is None or AnswerReader(method).read(answer[:end]) == plain, "h11 reads another answer"
    whole = _read_answers(method, [answer] if answer else [])
    assert _read_answers(method, pieces_of(answer)) == whole, "another answer in pieces"
    if len(answer) < 300:
        assert _read_answers(method, [answer[at : at + 1] for at in range(len(answer))]) == whole
    if whole is None:
        return
    answers, left = whole
    assert answer.endswith(left)
    for one in answers:
        _check_answer(method, one)


def _check_answer(method: bytes, answer: Answer) -> None:
    """A client reads the head as we do; so it knows where the body ends, and the next answer begins."""
    assert (answer.framing == "length") == (answer.length > 0) or answer.length == 0
    without_body = method == b"HEAD" or answer.status < 200 or answer.status in (204, 304)
    assert (answer.framing == "none") == without_body
    assert answer.closes or answer.framing != "close"
    written = head_of_answer(answer.status, answer.reason, answer.fields)
    assert re.findall(rb"\r(?!\n)|(?<!\r)\n|\0", written) == []
    reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    reader.send(h11.Request(method=method, target=b"/", headers=[(b"Host", b"h")]))
    reader.receive_data(written)
    event: Any = reader.next_event()
    assert event.status_code == answer.status
    kept = list(event.headers.raw_items())
    assert kept == end_to_end(kept)
    assert not {name.lower() for name, _ in kept} & {b"connection", b"transfer-encoding", b"keep-alive"}


# -- chunks ------------------------------------------------------------------------------------------------------------


def _read_chunks(of_answer: bool, pieces: list[bytes]) -> tuple[bytes, bool, bytes, list[tuple[bytes, bytes]]] | None:
    reader = ChunkReader(of_answer)
    content = b""
    for piece in pieces:
        try:
            content += reader.feed(piece)
        except ChunkError:
            return None
        assert len(reader._kept) <= LONGEST_LINE + 2
    return content, reader.done, reader.rest, reader.trailers


def chunks(data: bytes) -> None:
    choices = Choices(data)
    of_answer = bool(choices.number(1))
    body = choices.rest()
    whole = _read_chunks(of_answer, [body])
    assert _read_chunks(of_answer, pieces_of(body)) == whole, "pieces make a difference"
    if len(body) <= 120:
        for cut in range(len(body)):
            assert _read_chunks(of_answer, [body[:cut], body[cut:]]) == whole, f"a cut at {cut} makes a difference"
    if len(body) <= 4096:
        assert _read_chunks(of_answer, [body[at : at + 1] for at in range(len(body))]) == whole
    if whole is None:
        return
    content, done, rest, trailers = whole
    assert body.endswith(rest)
    assert done or not rest
    assert len(content) <= len(body)
    if not {name.lower() for name, _ in trailers} & {b"content-length", b"transfer-encoding"}:
        # Which h11 refuses, and we do not forward.
        _check_chunks_by_h11(body, content, done, rest, trailers)
    if done:
        kept = forwarded_trailers(trailers)
        written = (chunk(content) if content else b"") + last_chunk(kept)
        assert _read_chunks(False, [written + b"GET"]) == (content, True, b"GET", kept)


def _check_chunks_by_h11(
    body: bytes, content: bytes, done: bool, rest: bytes, trailers: list[tuple[bytes, bytes]]
) -> None:
    if re.search(rb"[ \t];", body):
        return  # h11 has no space before an extension, which RFC 9112 allows (section 7.1.1)
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    reader.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
    reader.next_event()
    for piece in (body[: len(body) - len(rest)], rest):
        if piece:  # b"" is the end of the connection
            reader.receive_data(piece)
    read = b""
    while type(event := reader.next_event()) is h11.Data:
        read += bytes(event.data)
    assert read == content
    assert (type(event) is h11.EndOfMessage) == done
    if done:
        assert isinstance(event, h11.EndOfMessage)
        assert reader.trailing_data[0] == rest
        assert list(event.headers.raw_items()) == trailers


# -- static files ------------------------------------------------------------------------------------------------------

ETAG = '"1-2-3"'


def static_request(data: bytes) -> None:
    """The head of a request for a file, with every condition that it may have."""
    size = Choices(data[:2]).number(65535) >> Choices(data[2:3]).number(16)
    try:
        request = parse_head(data[3:])
    except BadRequest:
        return
    _check_static(request)
    found = outcome(lambda: wanted_range(request.fields, size, ETAG, 1_000_000_000), BadRequest)
    if found is not None and found is not REFUSED:
        offset, count = found
        assert 0 <= offset < size
        assert 0 < count <= size - offset
    if found is REFUSED:
        assert "range" in request.fields
    outcome(lambda: is_unchanged(request.fields, ETAG, 1_000_000_000), BadRequest)


def _check_static(request: Request) -> None:
    try:
        path = request.path
    except BadRequest:
        return
    assert path
    for segment in path:
        assert segment != b".."
        assert segment != b"."
        assert b"/" not in segment
        assert b"\0" not in segment
    assert b"" not in path[:-1]


# -- credentials -------------------------------------------------------------------------------------------------------


REQUEST = b"GET / HTTP/1.1\r\nHost: h\r\nProxy-Authorization:%b\r\n\r\n"


def credentials(data: bytes) -> None:
    try:
        head = check_head(REQUEST % data)
    except GtcpServerError:
        return
    found = basic_credentials(head)
    if found is not None:
        user, _ = found
        assert b":" not in user
        assert len(user) <= 255


_FIELDS = (
    *(b"Host: h\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"Connection: keep-alive, x\r\n", b"Upgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Via: 1.1 us\r\n"),
    *(
        b"Max-Forwards: 0\r\n",
        b"Proxy-Authorization: Basic QWRhOnB3\r\n",
        b"X-Forwarded-For: 1.2.3.4\r\n",
        b"Cookie: a=b\r\n",
    ),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\x0b",
        b"\x85",
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
    ),
    *(b'X-Forwarded-For: "', b"Forwarded: for=", b'\\"', b'"', b"X_Forwarded_For: ", b","),
    *(b"gzip, ", b"identity", b"chunked", b"Content-Length", b"Transfer-Encoding"),
)

TARGETS = [
    Target(
        "request_head",
        request_head,
        tokens=(*_FIELDS, b"GET / HTTP/1.1\r\n", b"CONNECT h:1 HTTP/1.1\r\n", b"TRACE * HTTP/1.1\r\n", b"If-Range: "),
        lines=(30_000, 100),
    ),
    Target(
        "forwarded",
        forwarded,
        tokens=(
            b'"',
            b'\\"',
            b"\\",
            b",",
            b", ",
            b"for=",
            b"for=192.0.2.9",
            b";",
            b"\n0",
            b"\n1",
            b"\n2",
            b"\n5",
            b" 1.1 us",
        ),
    ),
    Target(
        "request_target",
        request_target,
        tokens=(
            *(
                b"http://",
                b"HTTP://",
                b"//",
                b"@",
                b":80",
                b":",
                b"/",
                b"?",
                b"#",
                b"[::1]",
                b"[::ffff:127.0.0.1]",
                b"%25",
            ),
            *(b"127.0.0.1", b"0x7f.1", b"017700000001", b"2130706433", b"localhost", b"example.com", b".", b"\\", b"*"),
        ),
        longest=20_000,
    ),
    Target(
        "answer_head",
        answer_head,
        tokens=(
            *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 101 S\r\n"),
            *(
                b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n",
                b"HTTP/1.1 204 No\r\n",
                b"HTTP/1.1 304 No\r\n",
                b"\r\n x",
                b"\n\t",
            ),
            *_FIELDS,
        ),
        longest=300_000,
        # h11, and the same in pieces.
        lines=(60_000, 100),
        seconds=(0.3, 10e-6),
    ),
    Target(
        "chunks",
        chunks,
        tokens=(
            *(
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"0\r\n",
                b"\r\n",
                b"a",
                b"A",
                b"ffffffffffffff",
                b";a=b",
                b" ;c",
                b";",
                b" ",
            ),
            *(b"1\r\nx\r\n", b"X: y\r\n", b"Content-Length: 1\r\n", b"000", b"0x", b"+1", b"-1", b"\n", b"\r", b"\t"),
        ),
        # Byte by byte, and cut everywhere.
        lines=(400_000, 100),
        seconds=(0.3, 10e-6),
    ),
    Target(
        "static_request",
        static_request,
        tokens=(
            *(
                b"GET /a/b HTTP/1.1\r\nHost: h",
                b"\r\nRange: bytes=",
                b"0-",
                b"-5",
                b"5-9",
                b"\r\nIf-Range: ",
                ETAG.encode(),
            ),
            *(b"\r\nIf-None-Match: W/", b"\r\nIf-Match: *", b"\r\nIf-Modified-Since: Sun, 09 Sep 2001 01:46:40 GMT"),
            *(
                b"\r\nIf-Unmodified-Since: ",
                b"Sun, 09 Sep 2001 01:46:40 GMT",
                b"-0000",
                b"9999",
                b"%2e",
                b"%2f",
                b"%00",
            ),
            *(b"/../", b"/./", b"//", b"?", b"#", b"http://h", *_FIELDS),
        ),
    ),
    Target(
        "credentials", credentials, tokens=(b" Basic ", b"QWRhOnB3", b"Og==", b"=", b"\t", b"Bearer ", b"Negotiate ")
    ),
]
