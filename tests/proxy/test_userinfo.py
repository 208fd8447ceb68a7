"""``http://user:password@host/``: the origin gets it as Authorization, and nobody else sees it."""

import base64
import subprocess
import sys

import pytest

from gtcpserver.http1.head import HttpError, check_head
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.http_fields import traced
from gtcpserver.proxy.http_messages import absolute_target, basic_authorization, connect_target
from gtcpserver.proxy.rules import parse_destination_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.forwarding import OK
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE

pytestmark = pytest.mark.usefixtures("no_faults")


def head_of(target, *fields, method="GET"):
    return check_head("\r\n".join([f"{method} {target} HTTP/1.1", "Host: x", *fields, "", ""]).encode("latin-1"))


def basic(text):
    return b"Basic " + base64.b64encode(text)


@pytest.mark.parametrize(
    ("userinfo", "credentials"),
    [
        ("ada:secret", b"ada:secret"),
        ("ada", b"ada:"),
        ("ada:", b"ada:"),
        (":secret", b":secret"),
        ("ada:se:cret", b"ada:se:cret"),
        ("a%40b:s%2Fe%3Acr%C3%A9t", b"a@b:s/e:cr\xc3\xa9t"),
        ("ada:%0d%0aX", b"ada:\r\nX"),  # encoded, it is harmless
    ],
)
def test_userinfo_becomes_basic_credentials(userinfo, credentials):
    head = head_of(f"http://{userinfo}@x:81/a@b?c@d")
    target, host, path = absolute_target(head)
    assert (str(target), host, path) == ("x:81", b"x:81", b"/a@b?c@d")
    assert basic_authorization(head) == basic(credentials)


@pytest.mark.parametrize("target", ["http://x/", "http://x/a@b", "http://x?a@b", "http://@x/", "http://:@x/"])
def test_no_userinfo_makes_no_credentials(target):
    head = head_of(target)
    assert str(absolute_target(head)[0]) == "x:80"
    assert basic_authorization(head) is None


def test_the_credentials_of_the_request_come_first():
    assert basic_authorization(head_of("http://ada:secret@x/", "Authorization: Bearer t")) is None
    assert basic_authorization(head_of("http://ada:secret@x/", "Authorization:")) is None


def test_a_trace_shows_and_gets_none():
    # RFC 9110 section 9.3.8
    head = head_of("http://ada:secret@x/", method="TRACE")
    assert basic_authorization(head) is None
    assert traced(head) == b"TRACE http://x/ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "target",
    [
        # Other readers see another host, or another user.
        *("http://ada:secret@x@y/", "http://x\\@y/", "http://ada%3A:secret@x/", "http://ada[:secret@x/"),
        *("http://ada:secret@/", "http://ada:secret@x:0/", "http://ada:secret@fe80::1/", "https://ada:secret@x/"),
    ],
)
def test_what_cannot_be_used_is_refused_without_showing_it(target):
    with pytest.raises(HttpError) as caught:
        head = head_of(target)
        absolute_target(head)
        basic_authorization(head)
    assert caught.value.status == 400
    assert "ada" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_connect_has_no_userinfo():
    with pytest.raises(HttpError):
        connect_target(head_of("ada:secret@x:80", method="CONNECT"))


def test_rules_logs_and_hosts_never_see_it(serve, origin, client, lines):
    rules = [parse_destination_rule("deny 127.0.0.2"), *ANYWHERE]
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=rules)))
    target = origin(OK, OK)
    visitor = client(server)
    assert visitor.get(f"http://ada:secret@127.0.0.1:{target.port}/a")[0] == 200
    assert visitor.get(f"http://127.0.0.2:80@127.0.0.1:{target.port}/a", "Authorization: Basic own")[0] == 200
    status, _, body = visitor.get("http://ada:secret@127.0.0.2/")
    assert status == 403
    assert b"ada" not in body
    assert b"\r\nAuthorization: %b\r\n" % basic(b"ada:secret") in target.heads[0]
    assert target.heads[1].count(b"Authorization") == 1
    for head in target.heads:
        assert head.startswith(b"GET /a HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % target.port)
        assert b"secret" not in head
    for line in lines(3):
        assert not [word for word in ("secret", "ada", "@") if word in str(line)]


def test_a_parent_gets_it_as_a_field_too(proxy_by, origin, client):
    parent = origin(OK)
    server = proxy_by(parse_upstream("parent", f"http://127.0.0.1:{parent.port}", resolve="there"))
    assert client(server).get("http://ada:secret@name.test/a")[0] == 200
    assert parent.heads[0].startswith(b"GET http://name.test/a HTTP/1.1\r\nHost: name.test\r\n")
    assert basic(b"ada:secret") in parent.heads[0]


def test_urllib_works(serve, origin, in_thread):
    server = serve(ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)))
    target = origin(OK)
    code = (
        "import sys, urllib.request as u; "
        "print(u.build_opener(u.ProxyHandler({'http': sys.argv[1]})).open(sys.argv[2]).read())"
    )
    run = [sys.executable, "-c", code, f"http://127.0.0.1:{server.port}", f"http://ada:pw@127.0.0.1:{target.port}/"]
    done = in_thread(lambda: subprocess.run(run, capture_output=True, text=True, timeout=SOON))
    assert done.stdout == "b'hello'\n", done.stderr
    assert basic(b"ada:pw") in target.heads[0]
