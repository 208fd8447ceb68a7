"""What origins read about the client is what the operator wants, and never what a client has made up."""

from ipaddress import ip_address

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.errors import ConfigError
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.http_fields import Forwarded, end_to_end, forwarded_trailers, with_client
from kit.patience import SOON

V4, V6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")
XFF, FORWARDED = "x-forwarded-for", "forwarded"

#: What clients send to be taken for somebody else.
FORGED = [
    (b"X-Forwarded-For", b"10.0.0.1"),
    (b"x-forwarded-for", b"10.0.0.2"),
    (b"Forwarded", b"for=10.0.0.3;proto=https"),
    (b"X-Forwarded-Host", b"inside"),
    (b"X-Forwarded-Proto", b"https"),
    (b"X-Forwarded-Prefix", b"/admin"),
    (b"X-Real-IP", b"10.0.0.4"),
    (b"True-Client-IP", b"10.0.0.5"),
    (b"Client-IP", b"10.0.0.6"),
    (b"X_Forwarded_For", b"10.0.0.7"),
    (b"X-Forwarded_For", b"10.0.0.8"),
    (b"X_REAL_IP", b"10.0.0.9"),
    (b"X.Forwarded.For", b"10.0.1.0"),
    (b"X!Forwarded~For", b"10.0.1.1"),
    (b"Forwarded-For", b"10.0.1.2"),
    (b"X-Forwarded", b"10.0.1.3"),
    (b"CF-Connecting-IP", b"10.0.1.4"),
    (b"X-Originating-IP", b"10.0.1.5"),
]
OTHERS = [(b"Accept", b"*/*"), (b"X-Forward", b"a"), (b"X-Forwards-For", b"b"), (b"X-Request-ID", b"c")]
HEADERS = [*OTHERS[:2], *FORGED, *OTHERS[2:]]


def test_nothing_is_told_unless_asked_for():
    assert with_client(HEADERS, V4, Forwarded()) == OTHERS
    assert parse_config("").http.forwarded == "remove"


def test_what_the_client_sent_can_go_on():
    assert with_client(HEADERS, V4, Forwarded("pass")) == HEADERS


@pytest.mark.parametrize(
    ("client", "field", "added"),
    [
        (V4, XFF, (b"X-Forwarded-For", b"192.0.2.1")),
        (V6, XFF, (b"X-Forwarded-For", b"2001:db8::1")),
        (V4, FORWARDED, (b"Forwarded", b"for=192.0.2.1")),
        (V6, FORWARDED, (b"Forwarded", b'for="[2001:db8::1]"')),
    ],
)
def test_replaced_by_the_address_the_client_has(client, field, added):
    assert with_client(HEADERS, client, Forwarded("replace", field)) == [*OTHERS, added]
    assert with_client(OTHERS, client, Forwarded("replace", field)) == [*OTHERS, added]
    assert with_client(OTHERS, client, Forwarded("append", field)) == [*OTHERS, added]


def test_appended_to_both_lists():
    found = dict(with_client(HEADERS, V4, Forwarded("append")))
    assert found[b"X-Forwarded-For"] == b"10.0.0.1, 10.0.0.2, 192.0.2.1"
    assert found[b"Forwarded"] == b"for=10.0.0.3;proto=https, for=192.0.2.1"
    assert found[b"x-forwarded-host"] == b"inside"
    assert not [name for name in found if set(name) & set(b"_.!")]
    only = dict(with_client([(b"Forwarded", b"for=a")], V6, Forwarded("append", FORWARDED)))
    assert only == {b"Forwarded": b'for=a, for="[2001:db8::1]"'}


@pytest.mark.parametrize("open_", [b'for="', b'for="a\\"', b'for=a, for="\\', b'"a" "'])
def test_what_is_appended_is_not_a_part_of_a_string_that_the_client_has_begun(open_):
    headers = [(b"Forwarded", b"for=b"), (b"Forwarded", open_), (b"Forwarded", b'for="c,d"')]
    found = with_client(headers, V4, Forwarded("append", FORWARDED))
    assert found == [(b"Forwarded", b'for=b, for="c,d", for=192.0.2.1')]


def test_an_empty_value_adds_nothing():
    assert with_client([(b"X-Forwarded-For", b"")], V4, Forwarded("append")) == [(b"X-Forwarded-For", b"192.0.2.1")]


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from([name for name, _ in HEADERS]), st.text('ab,;=" \\', max_size=9))),
    st.sampled_from([XFF, FORWARDED]),
)
def test_the_last_one_named_is_the_client(pairs, field):
    headers = [(name, value.encode()) for name, value in pairs]
    for mode in ("replace", "append"):
        found = with_client(headers, V4, Forwarded(mode, field))
        for name in (b"X-Forwarded-For", b"Forwarded"):
            values = [value for one, value in found if one.lower() == name.lower()]
            assert len(values) <= 1
            if name.lower() == field.encode():
                assert values
            assert all(value.endswith(b"192.0.2.1") for value in values)
            if mode == "append":
                assert all(_outside_strings(value) for value in values if name == b"Forwarded")


def _outside_strings(value):
    """Whether the end of a value is outside of quoted strings, as a parser of RFC 7239 reads it."""
    quoted = escaped = False
    for byte in value:
        if escaped:
            escaped = False
        elif quoted and byte == 0x5C:
            escaped = True
        elif byte == 0x22:
            quoted = not quoted
    return not quoted


@pytest.mark.parametrize(("name", "value"), FORGED)
def test_neither_connection_options_nor_trailers_change_it(name, value):
    headers = [(name, value), (b"Connection", name)]
    assert end_to_end(headers) == [(name, value)]
    assert forwarded_trailers([(name, value), (b"A", b"b")]) == [(b"A", b"b")]


# -- over sockets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("http", "expected"),
    [
        ("", []),
        ('forwarded = "replace"', [b"X-Forwarded-For: 127.0.0.1"]),
        ('forwarded = "replace"\nforwarded_field = "forwarded"', [b"Forwarded: for=127.0.0.1"]),
        ('forwarded = "append"', [b"X-Forwarded-For: 10.9.9.9, 127.0.0.1"]),
        ('forwarded = "pass"', [b"X-Forwarded-For: 10.9.9.9", b"X_Forwarded_For: 10.9.9.8"]),
    ],
)
def test_what_an_origin_gets(serve, connect, in_thread, http, expected):
    heads = []

    def answer(conn):
        heads.append(conn.recv_until(b"\r\n\r\n"))
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    origin = serve(answer)
    server = serve(make_proxy(parse_config(f'[http]\n{http}\n[rules]\ndestinations = ["allow loopback"]')).handler)
    client = connect(server)
    fields = b"X-Forwarded-For: 10.9.9.9\r\nX_Forwarded_For: 10.9.9.8\r\nConnection: X-Forwarded-For, close\r\n"
    client.sendall(b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n%b\r\n" % (origin.port, fields))
    with gevent.Timeout(SOON):
        assert in_thread(client.recv, 100).startswith(b"HTTP/1.1 200")
    assert [line for line in heads[0].split(b"\r\n") if b"orwarded" in line] == expected


def test_a_mode_that_there_is_not():
    with pytest.raises(ConfigError, match=r"proxy\.toml line 2: .*forwarded"):
        parse_config('[http]\nforwarded = "x-forwarded-for"', "proxy.toml")
