"""Clients that do not encode a path: raw UTF-8 in it is percent-encoded (RFC 3986 section 2.1); nowhere else."""

import pytest

from gtcpserver.http1.head import LONGEST_TARGET, HttpError, check_head
from gtcpserver.proxy.http_messages import with_ascii_target
from kit.forwarding import OK

pytestmark = pytest.mark.usefixtures("no_faults")


def target_of(target):
    raw = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % (target if isinstance(target, bytes) else target.encode())
    return check_head(with_ascii_target(raw)).target


@pytest.mark.parametrize(
    ("target", "encoded"),
    [
        ("http://x/straße", b"http://x/stra%C3%9Fe"),
        ("http://x/a%20b/ж?q=日#ü", b"http://x/a%20b/%D0%B6?q=%E6%97%A5#%C3%BC"),
        ("http://x?ü", b"http://x?%C3%BC"),
        ("HTTP://x:80/😀", b"HTTP://x:80/%F0%9F%98%80"),
        ("http://x/plain", b"http://x/plain"),
    ],
)
def test_raw_utf_8_in_a_path_is_encoded(target, encoded):
    assert target_of(target) == encoded


@pytest.mark.parametrize(
    "target",
    [
        *("http://ü/", "http://ü@x/ü", "ü://x/", "/ü", "ü:80", "http:ü"),
        *(b"http://x/\xff", b"http://x/\xc0\xaf", b"http://x/\xed\xa0\x80", b"http://x/\xc3", b"http://x/\xc2\x85 "),
        "http://x/" + "ü" * (LONGEST_TARGET // 4),
    ],
)
def test_whatever_else_is_not_ascii_is_refused(target):
    with pytest.raises(HttpError):
        target_of(target)


def test_fields_are_left_alone():
    raw = b"GET http://x/\xc3\xbc HTTP/1.1\r\nHost: x\r\nA: \xc3\xbc\r\n\r\n"
    assert check_head(with_ascii_target(raw)).values(b"a") == [b"\xc3\xbc"]


def test_the_origin_gets_it_encoded(http_proxy, origin, client):
    target = origin(OK)
    visitor = client(http_proxy())
    visitor.send(f"GET {target.url}/straße?ü HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert visitor.answer()[0] == 200
    assert target.heads[0].startswith(b"GET /stra%C3%9Fe?%C3%BC HTTP/1.1\r\n")
