"""Empty lines before a request (RFC 9112 section 2.2): some are skipped, all at once, and not any number of them."""

import gevent
import pytest

from gtcpserver.http1.head import MOST_EMPTY_LINES
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from kit.forwarding import OK
from kit.proxying import ANYBODY, ANYWHERE

pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.mark.parametrize("dripped", [False, True])
@pytest.mark.parametrize("lines", [1, MOST_EMPTY_LINES])
def test_some_are_skipped_before_each_request(http_proxy, origin, client, lines, dripped):
    target = origin(OK, OK)
    visitor = client(http_proxy())
    for _ in range(2):
        for piece in ["\r", "\n"] * lines if dripped else ["\r\n" * lines]:
            visitor.send(piece)
            gevent.sleep(0)
        assert visitor.get(f"{target.url}/")[::2] == (200, b"hello")


@pytest.mark.parametrize("dripped", [False, True])
def test_more_are_a_bad_request(http_proxy, origin, client, records, dripped):
    target = origin(OK)
    visitor = client(http_proxy())
    for piece in ["\r\n"] * (MOST_EMPTY_LINES + 1) if dripped else ["\r\n" * (MOST_EMPTY_LINES + 1)]:
        visitor.send(piece)
    if not dripped:
        visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    status, fields, _ = visitor.answer()
    assert (status, fields["connection"]) == (400, "close")
    assert records[0].result == "bad_request"
    assert not target.accepted_connections


@pytest.mark.parametrize("mixed", [False, True])
def test_a_flood_of_them_is_read_no_further(http_proxy, serve, client, mixed):
    """Each cost a copy of all that came behind it: 0.4 s of CPU a MiB, of clients without a password."""
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    visitor = client(serve(ProxyHandler(gate)) if mixed else http_proxy())
    visitor.send(b"\r\n" * 5000 + b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer()[0] == 400
    assert visitor.read() == b""
    visitor = client(serve(ProxyHandler(gate)) if mixed else http_proxy())
    visitor.send(b"\r\n" * 5000)
    assert visitor.read() == b"" if mixed else visitor.answer()[0] == 400
