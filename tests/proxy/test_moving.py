"""Clients of the proxy move to another worker: in a tunnel, and between two HTTP requests."""

from __future__ import annotations

import socket

import gevent
import pytest

from gtcpserver.proxy import passwords
from gtcpserver.proxy.config import make_proxy, parse_config
from kit.clients import read
from kit.forwarding import OK
from kit.handing import leave
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import QUICK, associate, bind_request, http, named_address, reply, socks
from kit.waiting import wait_until

LISTENER = '[[listener]]\nlisten = "127.0.0.1:0"\n'
OPEN = '[rules]\ndestinations = ["allow loopback"]\n'
DENIED = '[rules]\ndestinations = ["deny 127.0.0.0/8"]\n'
END = "[reload]\nend_forbidden = true\n"
USERS = (
    '[rules]\nclients = ["allow from 127.0.0.1 to any with auth all"]\ndestinations = ["allow loopback"]\n'
    f'[auth.all.users]\nAda = "{QUICK}"\n'
)
ADA = "Proxy-Authorization: Basic QWRhOnB3"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(passwords, "FIRST_DELAY", 0.0)
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.1)


@pytest.fixture
def start(serve):
    """`start(text)`: a worker of a proxy with this configuration."""
    return lambda text, **options: serve(make_proxy(parse_config(LISTENER + text)).handler, handover=True, **options)


@pytest.fixture
def target(serve):
    return serve(echo)


@pytest.fixture
def tunnel(connect, in_thread, target):
    """`tunnel(server)`: a client that is connected to the target; `ways` has the ways to ask for it."""

    def open_one(server, way="socks5", user=None):
        client = connect(server)
        if way == "socks5":
            assert in_thread(reply, client, socks(target.port, user=user)) == 0
        else:
            more = f"{ADA}\r\n" if user else ""
            head = f"CONNECT 127.0.0.1:{target.port} HTTP/1.1\r\nHost: x\r\n{more}\r\n"
            assert in_thread(http, client, head.encode()).startswith(b"HTTP/1.1 200")
        return client

    return open_one


@pytest.fixture
def talks(in_thread):
    def ask(client, data=b"hello"):
        in_thread(client.sendall, data)
        return in_thread(client.recv, 100) == data

    return ask


def moves(giver, taker):
    leave(giver, taker)
    wait_until(lambda: taker.active_connections and not giver.active_connections)


WAYS = pytest.mark.parametrize("way", ["socks5", "http"])


@WAYS
def test_a_tunnel_moves_and_has_one_line(start, tunnel, talks, way, lines):
    a, b = start(USERS), start(USERS)
    client = tunnel(a, way, b"Ada")
    assert talks(client)
    moves(a, b)
    assert talks(client)
    client.close()
    (line,) = lines()
    told = [line[name] for name in ("protocol", "user", "command", "result", "sent", "received", "client", "listener")]
    assert told == [way, "Ada", "CONNECT", "ok", 10, 10, "127.0.0.1", "default"]
    assert line["connected"] == line["asked"]
    assert line["duration"] >= line["negotiated"] + line["opened"] > 0
    assert (a.handler.counters, b.handler.counters) == ({}, {"ok": 1})


@WAYS
def test_a_tunnel_moves_along_a_chain_and_back(start, tunnel, talks, way):
    a, b, c = (start(OPEN) for _ in "abc")
    client = tunnel(a, way)
    for giver, taker in ((a, b), (b, c)):
        moves(giver, taker)
        assert talks(client)
    (conn,) = c.connections()
    assert conn.context.connection_fields()["destination"].startswith("127.0.0.1:")


@WAYS
def test_limits_count_a_tunnel_where_it_is(start, tunnel, talks, way):
    text = USERS + "[limits]\nconnections = 1\nclient_connections = 1\nuser_connections = 1\n"
    a, b = start(text), start(text)
    client = tunnel(a, way, b"Ada")
    moves(a, b)
    assert [server.handler._only.gate.limits.connections for server in (a, b)] == [0, 1]
    with pytest.raises((AssertionError, ConnectionError)):
        tunnel(b, way, b"Ada")
    assert talks(client)
    client.close()
    wait_until(lambda: not b.active_connections)
    assert talks(tunnel(b, way, b"Ada"))


def test_a_tunnel_through_an_upstream_moves_and_counts_for_its_member(start, tunnel, talks):
    other = start(OPEN)
    through = (
        f'[upstream.one]\nurl = "socks5://127.0.0.1:{other.port}"\n'
        '[upstream.all]\nmembers = ["one"]\nstrategy = "least-connections"\n'
        '[rules]\ndestinations = ["allow loopback"]\nupstreams = ["through all any"]\n'
    )
    a, b = start(through), start(through)
    client = tunnel(a)
    moves(a, b)
    assert talks(client)
    groups = [server.handler._only.gate.groups[0] for server in (a, b)]
    wait_until(lambda: [group.members[0].connections for group in groups] == [0, 1])


def test_a_limited_rate_holds_after_a_move(start, connect, in_thread, serve):
    sink = serve(lambda conn: [conn.sendall(b"x" * 60_000), conn.recv(1)])
    text = OPEN + "[limits]\nrate = 100_000\n"
    a, b = start(text), start(text)
    client = connect(a)
    assert in_thread(reply, client, socks(sink.port)) == 0
    began = gevent.get_hub().loop.now()
    moves(a, b)
    got = 0
    while got < 60_000:
        got += len(in_thread(client.recv, 65_536))
    assert gevent.get_hub().loop.now() - began > 0.1


@WAYS
@pytest.mark.parametrize("ends", [True, False])
def test_new_rules_judge_a_tunnel_as_after_any_reload(start, tunnel, talks, in_thread, way, ends, lines, target):
    a, b = start(OPEN), start(DENIED + (END if ends else ""))
    client = tunnel(a, way)
    leave(a, b)
    if ends:
        with pytest.raises(ConnectionResetError):
            in_thread(client.recv, 1)
        (line,) = lines()
        assert (line["result"], line["detail"]) == ("destination_denied", "deny 127.0.0.0/8")
        wait_until(lambda: target.stats().resets)
    else:
        wait_until(lambda: b.active_connections)
        assert talks(client)


def test_clients_move_between_two_http_requests(start, origin, client, lines):
    where = origin(OK, OK, OK)
    a, b = start(USERS), start(USERS)
    visitor = client(a)
    assert visitor.get(f"{where.url}/", ADA)[0] == 200
    moves(a, b)
    assert visitor.get(f"{where.url}/")[0] == 407
    assert visitor.get(f"{where.url}/", ADA)[0] == 200
    assert [line["result"] for line in lines(3)] == ["ok", "authentication_failed", "ok"]
    assert a.stats().handler_errors == b.stats().handler_errors == 0


def test_a_client_that_new_rules_do_not_admit_is_told_so_after_a_move(start, origin, client):
    where = origin(OK)
    a, b = start(OPEN), start('[rules]\nclients = []\ndestinations = ["allow loopback"]\n')
    visitor = client(a)
    assert visitor.get(f"{where.url}/")[0] == 200
    moves(a, b)
    assert visitor.get(f"{where.url}/")[0] == 403


def test_a_udp_association_stays(start, connect, in_thread):
    a, b = start(OPEN), start(OPEN)
    client = connect(a)
    associate(client, in_thread)
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"busy": 1})


def test_a_bind_stays_until_its_peer_has_come_and_moves_then(start, connect, in_thread):
    a, b = start(OPEN), start(OPEN)
    client = connect(a)
    client.sendall(b"\x05\x01\x00" + bind_request())
    where = named_address(in_thread(read, client, 12)[2:])
    leave(a, b, stop=True)
    wait_until(lambda: a.mover.staying() == {"bind": 1})
    with socket.create_connection(where, SOON) as peer:
        assert named_address(in_thread(read, client, 10)) == peer.getsockname()
        wait_until(lambda: b.active_connections and not a.active_connections)
        in_thread(peer.sendall, b"from the peer")
        assert in_thread(read, client, 13) == b"from the peer"
        client.sendall(b"hello")
        assert in_thread(read, peer, 5) == b"hello"


X, Y = ('[[listener]]\nname = "x"\nlisten = "127.0.0.2:1"\n', '[[listener]]\nname = "y"\nlisten = "127.0.0.3:1"\n')


@pytest.mark.parametrize("listeners", [X, X + Y], ids=["one", "two"])
def test_a_tunnel_whose_listener_is_gone_stays_and_an_idle_client_is_closed(
    serve, start, tunnel, talks, origin, client, listeners
):
    where = origin(OK)
    a = start(OPEN)
    b = serve(make_proxy(parse_config(listeners + OPEN)).handler, handover=True)
    opened, visitor = tunnel(a), client(a)
    assert visitor.get(f"{where.url}/")[0] == 200
    leave(a, b, stop=True)
    assert visitor.read() == b""
    wait_until(lambda: a.mover.staying() == {"listener": 1})
    assert talks(opened)
    assert (b.active_connections, b.stats().taken_over, b.stats().handler_errors) == (0, 0, 0)
