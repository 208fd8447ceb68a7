"""A full server says so in the log, once in a while."""

import logging

import pytest
from gevent.event import Event

from gtcpserver import HandlerPool
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.server import full_log
from kit.waiting import wait_until


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "gtcpserver")
    return lambda: [record.getMessage() for record in caplog.records if record.getMessage().startswith("the server is")]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pool": 1}, "pool (1) is reached, new connections wait"),
        ({"pool": HandlerPool(1)}, "pool (1) is reached, new connections wait"),
        ({"pool": 1, "on_full": "reject"}, "pool (1) is reached, new connections are closed"),
        ({"pool": 1, "on_full": "close_idle"}, "pool (1) is reached, new connections wait"),
        ({"pool": None, "max_connections": 1}, "max_connections (1) is reached, new connections wait"),
        (
            {"pool": 1, "max_connections": 1, "on_full": "close_idle"},
            "max_connections (1) is reached, idle connections are closed to make room",
        ),
    ],
)
def test_a_full_server_says_so_once(serve, connect, said, options, line):
    server = serve(lambda conn: conn.recv(1), **options)
    first = connect(server)
    wait_until(lambda: server.active_connections)
    assert not said()
    for _ in range(5):
        connect(server)
    wait_until(said)
    first.close()
    connect(server)
    wait_until(lambda: not server.active_connections or server.accepted_connections > 1 or server.stats().rejected)
    assert said() == [f"the server is full: {line}"]


def test_the_next_line_tells_how_often(serve, connect, said, monkeypatch):
    monkeypatch.setattr(full_log, "INTERVAL", 0.2)
    server = serve(lambda conn: conn.recv(1), pool=1, on_full="reject")
    connect(server)
    wait_until(lambda: server.active_connections)
    for number in range(3):
        connect(server)
        wait_until(lambda number=number: server.stats().rejected > number)
    Event().wait(0.3)
    connect(server)
    wait_until(lambda: len(said()) == 2)
    assert said()[1].endswith("are closed (and 2 more like this)")


def test_the_proxy_logs_those_that_are_rejected(serve, connect, lines):
    text = '[[listener]]\nname = "office"\nlisten = "127.0.0.1:0"\n[rules]\ndestinations = []'
    server = serve(make_proxy(parse_config(text)).handler, pool=1, on_full="reject")
    connect(server)
    wait_until(lambda: server.active_connections)
    connect(server)
    line = lines()[0]
    assert (line["client"], line["listener"]) == ("127.0.0.1", "office")
    assert (line["result"], line["detail"]) == ("limit", "pool")
    wait_until(lambda: server.stats().handler_counters["limit"] == 1)
