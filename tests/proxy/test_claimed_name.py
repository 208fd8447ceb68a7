"""The name in a client's first bytes: exactly one, by the letter of the RFCs, or none."""

from __future__ import annotations

import ssl
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver.proxy.claimed_name import LONGEST, MOST_RECORDS, NameReader

FEW = settings(max_examples=40)

REQUEST = b"GET / HTTP/1.1\r\nHost: www.example\r\n\r\n"


def real_hello(name="www.example"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def vector(size, data):
    return len(data).to_bytes(size, "big") + data


def server_name(*names, kind=0):
    return 0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names))


def message(*extensions, ciphers=b"\x13\x01", session=b"", compression=b"\0", tail=b""):
    body = b"\x03\x03" + bytes(32) + vector(1, session) + vector(2, ciphers) + vector(1, compression)
    body += vector(2, b"".join(kind.to_bytes(2, "big") + vector(2, data) for kind, data in extensions)) + tail
    return b"\x01" + vector(3, body)


def records(data, size=1 << 14):
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"\x16\x03\x01" + vector(2, piece) for piece in pieces)


def hello(*extensions, **fields):
    return records(message(*extensions, **fields))


WHOLE = [real_hello(), REQUEST, hello(server_name(b"a.b")), records(message(), 30)]


def name_in(data, size=None):
    """The name, if it arrives in pieces of this size; None: it is not complete."""
    reader, found = NameReader(), None
    for at in range(0, len(data), size or len(data)):
        found = reader.add(data[at : at + (size or len(data))])
        if found is not None:
            break
    return found


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize(
    ("data", "name"),
    [
        (real_hello(), "www.example"),
        (real_hello("straße.example"), "xn--strae-oqa.example"),
        (records(real_hello()[5:], 100), "www.example"),
        (hello((10, b""), server_name(b"WWW.Example.")), "www.example"),
        (REQUEST, "www.example"),
        (b"POST /a?b HTTP/1.0\r\nhost:\tWWW.example.:8080 \r\n\r\n", "www.example"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "a"),
    ],
)
def test_a_name_in_any_pieces(data, name, size):
    if name.startswith("xn--"):  # Python's own IDNA
        name = "strasse.example" if b"strasse" in data else name
    assert name_in(data, size) == name


@pytest.mark.parametrize(
    "data",
    {
        "no extensions": records(b"\x01" + vector(3, b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0")),
        "no name": hello((10, b"")),
        "two extensions": hello(server_name(b"a.example"), server_name(b"b.example")),
        "the same one twice": hello(server_name(b"a.example"), server_name(b"a.example")),
        "two names": hello(server_name(b"a.example", b"b.example")),
        "another type": hello(server_name(b"a.example", kind=1)),
        "empty": hello(server_name(b"")),
        "no entry": hello((0, b"\0\0")),
        "empty extension": hello((0, b"")),
        "behind the list": hello((0, server_name(b"a.example")[1] + b"\0")),
        "NUL": hello(server_name(b"a.example\0.b.example")),
        "not ASCII": hello(server_name("ä.example".encode())),
        "space": hello(server_name(b"a. example")),
        "line": hello(server_name(b"a.example\r\nresult=ok")),
        "an address": hello(server_name(b"192.0.2.1")),
        "an IPv6 address": hello(server_name(b"2001:db8::1")),
        "a number": hello(server_name(b"0x7f.1")),
        "too long": hello(server_name(b"a." * 127 + b"example")),
        "a long label": hello(server_name(b"a" * 64 + b".example")),
        "behind the extensions": hello(server_name(b"a.example"), tail=b"\0"),
        "no cipher": hello(server_name(b"a.example"), ciphers=b""),
        "half a cipher": hello(server_name(b"a.example"), ciphers=b"\x13\x01\x13"),
        "no compression": hello(server_name(b"a.example"), compression=b""),
        "a long session": hello(server_name(b"a.example"), session=bytes(33)),
        "another message": records(b"\x02" + message(server_name(b"a.example"))[1:]),
        "an alert": b"\x15\x03\x01\0\x02\x01\0",
        "SSL 2": b"\x80\x2e\x01\0\x02",
        "another version": b"\x16\x02\x01\0\x02",
        "an empty record": b"\x16\x03\x01\0\0" + hello(server_name(b"a.example")),
        "a huge record": b"\x16\x03\x01\xff\xff",
        "a huge message": records(b"\x01\xff\xff\xff"),
        "many records": records(message(server_name(b"a.example")), 1),
        "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
        "SSH's beginning": b"SSH-2",
        "Redis": b"*1\r\n$4\r\nPING\r\n",
        "a word": b"PING\r\n",
        "SMTP": b"EHLO me\r\n",
        "SIP": b"REGISTER sip:a.example SIP/2.0\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /\r\n",
        "a proxy's request": b"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "a proxy's tunnel": b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "two hosts": b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n",
        "a list": b"GET / HTTP/1.1\r\nHost: a.example, b.example\r\n\r\n",
        "no host": b"GET / HTTP/1.0\r\n\r\n",
        "an empty host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "a user": b"GET / HTTP/1.1\r\nHost: a@b.example\r\n\r\n",
        "a host that is an address": b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
        "a folded host": b"GET / HTTP/1.1\r\nHost: a.\r\n example\r\n\r\n",
        "a space before the colon": b"GET / HTTP/1.1\r\nHost : a.example\r\n\r\n",
        "NUL in a host": b"GET / HTTP/1.1\r\nHost: a\0.example\r\n\r\n",
        "a host that is not ASCII": b"GET / HTTP/1.1\r\nHost: \xe4.example\r\n\r\n",
        "bare line feeds": b"GET / HTTP/1.1\nHost: a.example\n\n",
        "smuggling": b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "a long line": b"GET /" + b"a" * LONGEST,
        "a long head": b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * LONGEST,
        "nothing known": b"\0\1\2\3",
        "an empty line": b"\r\n",
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_does_not_name_exactly_one_host_names_none(data):
    assert name_in(data[1]) == ""


@FEW
@given(st.data())
def test_a_beginning_is_waited_for(data):
    whole = data.draw(st.sampled_from(WHOLE))
    end = data.draw(st.integers(1, len(whole) - 1))
    assert name_in(whole[:end]) is None


@FEW
@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_behind_any_beginning(noise, size):
    for begin in (
        b"",
        b"\x16\x03\x01",
        b"\x16\x03\x01\0\x50\x01\0\0\x4c\x03\x03",
        b"GET ",
        b"GET / HTTP/1.1\r\nHost: ",
    ):
        found = name_in(begin + noise, size) or ""
        assert found == found.encode().decode("ascii").lower()
        assert not set(found) & set(" \0\r\n=\"'/:")


@FEW
@given(st.data())
def test_a_hello_with_a_changed_byte_has_one_name_or_none(data):
    whole = bytearray(hello((10, b"\0\2\0\x1d"), server_name(b"www.example"), (43, b"\2\3\4")))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    found = name_in(bytes(whole))
    assert found is None or found == "" or len(found) <= len("www.example")


@FEW
@given(st.lists(st.integers(1, 30), max_size=MOST_RECORDS - 1))
def test_however_a_hello_is_divided_into_records(sizes):
    whole, divided = message(server_name(b"www.example")), b""
    for size in sizes:
        divided += records(whole[:size]) if whole else b""
        whole = whole[size:]
    assert name_in(divided + (records(whole) if whole else b"")) == "www.example"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x3f\xff\x01\0\x3f\xf0" + bytes(LONGEST),
        records(b"\x01\0\x3f\xf0" + bytes(LONGEST), 1100),
        b"GET /" + b"a" * LONGEST,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 2000 + b"A" * LONGEST,
    ],
    ids=["record", "records", "line", "head"],
)
def test_bytes_one_by_one_cost_little(data):
    began = time.process_time()
    assert name_in(data, 1) in ("", None)
    assert time.process_time() - began < 2  # 0.02 to 0.1
