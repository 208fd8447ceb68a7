"""The proxy's HTTP clients are told to connect again before a stop ends their connections: `Server.draining`."""

import pytest

from kit.forwarding import OK


@pytest.mark.parametrize("answer", [OK, b"nonsense\r\n\r\n"], ids=["of the origin", "of the proxy"])
def test_answers_say_close(http_proxy, origin, client, answer):
    server = http_proxy()
    visitor = client(server)
    assert visitor.get(f"{origin(answer).url}/")[1].get("connection") != "close"
    server.draining = True
    status, fields, _ = visitor.get(f"{origin(answer).url}/")
    assert (status, fields["connection"]) == (200 if answer == OK else 502, "close")
    assert visitor.read() == b""
