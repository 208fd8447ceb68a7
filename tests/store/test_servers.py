"""Servers and proxies that share limits: what their clients see. The two "machines" are members of one process."""

import base64
import os
import socket

import gevent
import pytest

from gtcpserver import ClientLimits, ClientRefused, ProxyProtocol, Server
from gtcpserver.admission.proxy_header import read_proxy_header
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.store import store
from kit.commands import run_command
from kit.handing import leave, mover_of
from kit.patience import SOON
from kit.programs import needs
from kit.proxying import QUICK, reply, socks
from kit.waiting import wait_until

pytest.importorskip("redis")
pytestmark = needs("redis-server", "redis-cli")


@pytest.fixture(autouse=True)
def forget_refusals(monkeypatch):
    monkeypatch.setattr(store, "REFUSED_SECONDS", 0.001)


def greet(conn):
    conn.sendall(b"+")
    conn.recv(1)


@pytest.fixture
def machines(redis_server, serve):
    """`machines(handler, **options)` starts two servers of one Redis, each with a store of its own."""

    def start(handler=greet, *, connections=2, more=None, **options):
        url = redis_server().url
        options = {"store_timeout": 10, **options}
        # The second URL differs, and means the same.
        return [
            serve(handler, client_limits=ClientLimits(connections=connections), shared_limits=one, **options)
            for one in (url, f"{url}?prefix=gtcpserver")
        ]

    return start


@pytest.fixture
def come(connect, in_thread):
    """`come(server, say=b"")` connects, and returns the socket if it was served, None if it was refused."""

    def come(server, say=b""):
        gevent.sleep(0.002)
        client = connect(server)
        try:
            client.sendall(say)
            return client if in_thread(client.recv, 1) == b"+" else None
        except ConnectionError:
            return None

    return come


def test_a_client_that_has_too_many_connections_on_all_machines_is_reset(machines, come, lines):
    one, two = machines(access_log="text")
    held = [come(one), come(two)]
    assert None not in held
    assert come(one) is come(two) is None
    assert one.stats().clients_refused == two.stats().clients_refused == {"client_connections": 1}
    assert [line["result"] for line in lines(2)] == ["client_connections"] * 2
    held[0].close()
    assert wait_until(lambda: come(two))


def test_a_rate_holds_for_all_machines(redis_server, serve, come):
    url = redis_server().url
    some = {"new_per_second": 0.01, "burst": 3}
    one, two = (
        serve(greet, client_limits=ClientLimits(**some), shared_limits=one, store_timeout=10)
        for one in (url, f"{url}?prefix=gtcpserver")
    )
    assert [come(server) is not None for server in (one, two) * 3] == [True] * 3 + [False] * 3


def test_clients_that_a_balancer_names_are_counted(machines, come):
    one, two = machines(proxy_protocol=ProxyProtocol(["127.0.0.1"]), connections=1)
    say = b"PROXY TCP4 192.0.2.%d 192.0.2.9 1 2\r\n"
    assert come(one, say % 1)
    assert come(two, say % 2)
    assert come(two, say % 1) is None


def test_clients_that_a_handler_finds_out_later_are_counted(machines, come):
    raised = []

    def handler(conn):
        try:
            read_proxy_header(conn, ProxyProtocol(["127.0.0.1"]))
        except ClientRefused as refused:
            raised.append(refused.reason)
            raise
        greet(conn)

    one, two = machines(handler, connections=1)
    say = b"PROXY TCP4 192.0.2.%d 192.0.2.9 1 2\r\n"
    assert come(one, say % 1)
    assert come(two, say % 2)  # the balancer is counted no more
    assert come(one, say % 2) is None
    assert raised == ["client_connections"]


@pytest.mark.parametrize("choice", ["local", "allow", "refuse"])
def test_what_holds_while_redis_is_away_is_an_option(serve, come, choice):
    options = {"shared_limits": "redis://127.0.0.1:1", "on_store_failure": choice}
    server = serve(greet, client_limits=ClientLimits(connections=2, deny=["192.0.2.1"]), **options)
    served = {"local": 2, "allow": 4, "refuse": 0}[choice]
    held = [come(server) for _ in range(4)]
    assert [sock is not None for sock in held] == [True] * served + [False] * (4 - served)
    stats = server.stats()
    refused = {"local": {"client_connections": 2}, "allow": {}, "refuse": {"store_failure": 4}}
    assert stats.clients_refused == refused[choice]
    assert (stats.store_away, stats.store_failures, stats.store_decided_alone) == (1, 1, 2 if choice == "local" else 4)
    for sock in filter(None, held):
        sock.close()
    wait_until(lambda: not server.active_connections)
    assert bool(come(server)) == (choice != "refuse")


def test_nothing_waits_for_a_redis_that_is_paused_but_the_connections_it_is_asked_about(redis_server, serve, come):
    redis = redis_server()
    server = serve(greet, client_limits=ClientLimits(connections=9), shared_limits=redis.url, store_timeout=0.3)
    beats = []
    beating = gevent.spawn(lambda: [beats.append(gevent.sleep(0.01)) for _ in range(1000)])
    redis.pause()
    assert come(server)
    assert len(beats) > 5
    beating.kill()
    redis.go_on()


def test_a_stop_waits_for_redis_and_a_hurried_one_does_not(redis_server, serve, connect, in_thread):
    redis = redis_server()
    redis_options = {"shared_limits": redis.url, "store_timeout": 10}
    server = serve(greet, client_limits=ClientLimits(connections=9), **redis_options)
    redis.pause()
    waiting = connect(server)
    wait_until(lambda: server.stats().store_questions)
    stop = gevent.spawn(server.stop, SOON)
    gevent.sleep(0.02)
    redis.go_on()
    assert in_thread(waiting.recv, 1) == b"+"
    waiting.close()
    assert stop.get().ended == 0

    server = serve(greet, client_limits=ClientLimits(connections=9), **redis_options)
    redis.pause()
    waiting = connect(server)
    wait_until(lambda: server.stats().store_questions)
    halting = gevent.spawn(server.halt)
    with pytest.raises(ConnectionResetError):
        in_thread(waiting.recv, 1)
    redis.go_on()
    halting.get()
    assert redis.ask("ZCARD", "gtcpserver:members") == "0"


def test_a_child_process_of_a_handler_leaves_the_store_to_its_parent(machines, come):
    def handler(conn):
        if (child := os.fork()) == 0:
            gevent.sleep(0.01)
            os._exit(0)
        os.waitpid(child, 0)
        greet(conn)

    one, two = machines(handler)
    assert come(one)
    assert come(two)
    assert come(one) is None
    assert one.stats().store_away == 0


def test_a_connection_that_moves_to_another_worker_is_counted_once(machines, come, redis_server):
    def handler(conn):
        if not conn.resumed:
            conn.sendall(b"+")
        with conn.idle():
            conn.recv(1)

    one, two = machines(handler, handover=True)
    mover_of(one), mover_of(two)
    held = [come(one), come(two)]
    assert None not in held
    leave(one, two)
    wait_until(lambda: two.active_connections == 2)
    wait_until(lambda: not one.active_connections)
    assert come(two) is None
    held[0].close()
    held[1].close()
    assert wait_until(lambda: come(two))


# -- the proxy ---------------------------------------------------------------------------------------------------------

CONFIG = """
shared_limits = "{url}"
store_timeout = 10
[[listener]]
listen = "127.0.0.1:0"
[rules]
clients = ["allow from 127.0.0.0/8 to any{auth}"]
destinations = ["allow loopback"]
[limits]
{limits}
[auth.staff]
users = {{ ada = '{hash}' }}
"""


@pytest.fixture
def proxies(redis_server, serve):
    """`proxies(limits, auth="")` starts two proxies of one Redis."""

    def start(limits, auth=""):
        url = redis_server().url
        texts = [
            CONFIG.format(url=one, auth=auth, limits=limits, hash=QUICK) for one in (url, url + "?prefix=gtcpserver")
        ]
        made = [make_proxy(parse_config(text)) for text in texts]
        return [serve(one.handler, [str(address) for address in one.addresses]) for one in made]

    return start


@pytest.mark.parametrize("limit", ["connections", "client_connections"])
def test_proxies_share_connections_and_refuse_in_the_protocol_of_the_client(proxies, connect, in_thread, lines, limit):
    one, two = proxies(f"{limit} = 2")

    def greeting(server):
        gevent.sleep(0.002)
        client = connect(server)
        client.sendall(b"\x05\x01\x00")
        return client, in_thread(client.recv, 2)

    held = [greeting(one), greeting(two)]
    assert [answer for _, answer in held] == [b"\x05\x00"] * 2
    assert greeting(two)[1] == b"\x05\xff"
    client = connect(one)
    client.sendall(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"You have too many connections to this proxy." in in_thread(client.recv, 1000)
    assert [(line["result"], line["detail"]) for line in lines(2)] == [("limit", limit)] * 2
    held[0][0].close()
    wait_until(lambda: greeting(two)[1] == b"\x05\x00")


def test_proxies_share_the_connections_of_a_user(proxies, connect, in_thread):
    one, two = proxies("user_connections = 1", " with auth staff")
    with socket.create_server(("127.0.0.1", 0)) as origin:
        port = origin.getsockname()[1]
        first, second = connect(one), connect(two)
        assert in_thread(reply, first, socks(port, "127.0.0.1", b"ada")) == 0
        assert in_thread(reply, second, socks(port, "127.0.0.1", b"ada")) not in (0, None)
        origin.accept()[0].close()
        first.close()

        def again():
            client = connect(two)
            return in_thread(reply, client, socks(port, "127.0.0.1", b"ada")) == 0

        wait_until(again)


def test_a_reload_of_a_single_process_goes_on_with_the_same_redis(proxies, connect, in_thread, caplog):
    one, two = proxies("client_connections = 1")
    first = connect(one)
    first.sendall(b"\x05\x01\x00")
    assert in_thread(first.recv, 2) == b"\x05\x00"
    url = two.handler.store_settings.url
    old = two.handler
    two.handler = make_proxy(
        parse_config(CONFIG.format(url=url, auth="", limits="client_connections = 1", hash=QUICK))
    ).handler
    old.retire(two.handler)
    second = connect(two)
    second.sendall(b"\x05\x01\x00")
    assert in_thread(second.recv, 2) == b"\x05\xff"
    assert "shared_limits" not in caplog.text
    text = CONFIG.format(url="redis://127.0.0.1:1", auth="", limits="", hash=QUICK)
    two.handler = make_proxy(parse_config(text)).handler
    assert "shared_limits: only a restart, or a reload of worker processes, can change it" in caplog.text


def test_who_guesses_passwords_is_refused_by_all_proxies(proxies, connect, in_thread, monkeypatch):
    monkeypatch.setattr("gtcpserver.proxy.passwords.FIRST_DELAY", 0.0)
    one, two = proxies("rate = 1000000", " with auth staff")

    def status(server, user, password):
        client = connect(server)
        words = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = f"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {words}\r\n\r\n"
        client.sendall(request.encode())
        return int(in_thread(client.recv, 1000).split()[1])

    assert status(two, "ada", "wrong") == 407
    assert status(two, "ada", "pw") == 502  # nobody listens there, and ada's one is forgotten
    for number in range(5):
        assert status(one, f"user{number}", "wrong") == status(two, f"user{number}", "wrong") == 407
    assert status(one, "ada", "pw") == 407  # she has not been here yet
    assert status(two, "bob", "pw") == 407


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--shared-limits", "localhost:6379"), "--shared-limits: must be a URL that begins with one of redis://"),
        (("--shared-limits", "redis://:secret@host:port/0"), "--shared-limits: must be a URL with a host, and a port"),
        (("--on-store-failure", "pray"), "--on-store-failure"),
        (("--store-timeout", "0"), "--store-timeout: must be a number, more than 0"),
    ],
)
def test_mistakes_are_told_at_the_start(arguments, told):
    done = run_command("echo", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr


def test_mistakes_in_the_file_of_a_proxy_are_told_with_their_line(tmp_path):
    (tmp_path / "proxy.toml").write_text('allow_open = false\nshared_limits = "redis://a,b"\non_store_failure = "x"\n')
    done = run_command("proxy", "check", "proxy.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "proxy.toml line 3" in done.stderr
    (tmp_path / "proxy.toml").write_text('allow_open = false\nshared_limits = "redis://a,b"\n')
    done = run_command("proxy", "check", "proxy.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "proxy.toml line 2: shared_limits must be a URL with one host" in done.stderr


def test_a_server_without_limits_says_that_there_is_nothing_to_share(serve, caplog):
    serve(greet, shared_limits="redis://127.0.0.1:1")
    assert "shared_limits: there are no limits that it could share" in caplog.text
    assert isinstance(Server("127.0.0.1:0", greet, shared_limits="redis://127.0.0.1:1"), Server)
