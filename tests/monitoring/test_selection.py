"""Which connections `gtcpserver ctl connections` and `ctl end` mean, and what handlers tell of theirs."""

import gevent
import pytest
from gevent.event import Event

from gtcpserver.errors import ConfigError
from gtcpserver.monitoring.selection import Selection, end, rows_of
from kit.waiting import wait_until


class Tells:
    def __init__(self, fields):
        self.fields = fields

    def connection_fields(self):
        if isinstance(self.fields, Exception):
            raise self.fields
        return self.fields


@pytest.fixture
def server(serve, connect):
    """A server with one connection, whose handler has `server.context`."""
    server = serve(lambda conn: conn.recv(1), context=Tells({}))
    connect(server)
    wait_until(lambda: server.active_connections)
    return server


def found(server, **fields):
    return rows_of(server, Selection.of(fields), 10)[1]


@pytest.mark.parametrize(
    ("destination", "asked"),
    [
        ("a.test:443", ["a.test", "A.TEST", "a.test:443", ".test", ".a.test"]),
        ("[2001:db8::1]:443", ["2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:443"]),
    ],
)
def test_destinations(server, destination, asked):
    server.context.fields = {"destination": destination}
    for one in asked:
        assert found(server, destination=one) == 1, one
    for one in ("test", ".est", "b.a.test", "a.test:80", "", ".", "2001:db8::", "443"):
        assert found(server, destination=one) == 0, one


def test_a_handler_that_tells_nonsense_hides_nothing(server):
    for fields in (ValueError("x"), None, [], {"user": Tells}, {"user": "x" * 10_000}):
        server.context.fields = fields
        (row,), number = rows_of(server, Selection(), 10)
        assert number == 1
        assert row["user"] is None or len(row["user"]) <= 255


def test_a_client_whose_address_is_no_address(server):
    connection = next(iter(server.connections()))
    for address in (("here", 1), "", b"\0x", None):
        connection.client_address = address
        assert found(server, client="0.0.0.0/0") == 0
    connection.client_address = ("::ffff:10.0.0.1", 1, 0, 0)
    assert found(server, client="10.0.0.0/8") == 1


def test_more_rows_than_are_wanted_are_counted(server, connect):
    for _ in range(3):
        connect(server)
    wait_until(lambda: server.active_connections == 4)
    rows, number = rows_of(server, Selection(), 2)
    assert (len(rows), number) == (2, 4)


@pytest.mark.parametrize(
    "fields", [{"user": 1}, {"client": "x"}, {"client": "10.0.0.1/8"}, {"client": 1}, {"ids": "x"}, {"ids": [1]}]
)
def test_wrong_requests(fields):
    with pytest.raises(ConfigError):
        Selection.of(fields)


def test_ended_connections_are_those_that_were_there(serve, connect):
    """A greenlet that serves another connection by then is left alone."""
    left, go_on = [], Event()

    def handler(conn):
        try:
            go_on.wait()
        finally:
            left.append(conn.recv(10) if go_on.is_set() else b"")

    server = serve(handler)
    first = connect(server)
    wait_until(lambda: server.active_connections)
    (row,), _ = rows_of(server, Selection(), 10)
    assert end(server, Selection.of({"ids": [row["id"]]})) == 1
    wait_until(lambda: left)
    assert end(server, Selection.of({"ids": [row["id"]]})) == 0
    second = connect(server)
    wait_until(lambda: server.active_connections == 1)
    gevent.sleep(0)
    go_on.set()
    second.sendall(b"hello")
    wait_until(lambda: left == [b"", b"hello"])
    first.close()
