"""Transparent mode: what a client's claims mean for rules, upstreams and the log. The firewall is only said to be there
(test_transparent_network.py has it)."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from types import SimpleNamespace

import gevent
import pytest
from click.testing import CliRunner

from gtcpserver.cli import proxy as command
from gtcpserver.cli.options import make_listen_config, was_given
from gtcpserver.errors import ConfigError
from gtcpserver.proxy import loops, transparent
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy_protocol.header import parse_header
from kit.handing import leave
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import socks
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")

HTTP = b"GET / HTTP/1.1\r\nHost: %s\r\n\r\n"


@pytest.fixture
def redirect(monkeypatch):
    """`redirect(port, host)`: where the clients of all transparent listeners have connected to."""

    def to(port, host="127.0.0.1"):
        monkeypatch.setattr(transparent, "original_destination", lambda sock: ((ip_address(host), port), True))

    return to


@pytest.fixture
def start(serve, dns_server, name_files, redirect):
    """`start(destinations, to=server)`: a transparent proxy to whose clients this is the destination."""

    def begin(destinations=("allow loopback",), to=None, host="127.0.0.1", text="", listener="", **options):
        if to is not None:
            redirect(to.port, host)
        rules = (
            f'[rules]\ndestinations = {list(destinations)!r}\n{text}\n[resolver]\nservers = ["{dns_server.address}"]\n'
        )
        if "name_timeout" not in listener:
            listener += f"\nname_timeout = {SOON}"  # clients speak first
        made = make_proxy(
            parse_config(f'[[listener]]\nlisten = "127.0.0.1:0"\nspeaks = "transparent"\n{listener}\n{rules}')
        )
        return serve(made.handler, **options)

    return begin


@pytest.fixture
def target(serve):
    return serve(echo)


@pytest.fixture
def ask(connect, in_thread):
    """`ask(server, data)`: the beginning of what comes back; b"" if the proxy has reset the connection."""

    def ask(server, data=b"hello"):
        client = connect(server)
        try:
            in_thread(client.sendall, data)
            return in_thread(client.recv, 1000)
        except ConnectionResetError:
            return b""
        finally:
            client.close()

    return ask


def test_a_destination_without_a_name(start, target, ask, lines):
    assert ask(start(to=target)) == b"hello"
    (line,) = lines()
    place = f"127.0.0.1:{target.port}"
    assert [line[name] for name in ("asked", "original", "connected")] == [place] * 3
    assert [line[name] for name in ("protocol", "command", "sent", "received")] == ["transparent", "CONNECT", 5, 5]


@pytest.mark.parametrize(
    ("destinations", "name", "looked_up", "result"),
    [
        (["allow loopback"], "www.example", False, "ok"),
        (["deny .example", "allow loopback"], "www.example", False, "destination_denied"),
        (["deny .example", "allow loopback"], "other.test", False, "ok"),
        # What is allowed must be true.
        (["allow www.example", "allow 127.0.0.1:9"], "www.example", True, "destination_denied"),  # a special address
        (["deny false.example", "allow loopback"], "false.example", False, "destination_denied"),
        (["deny 127.0.0.1", "allow loopback"], "www.example", False, "destination_denied"),
    ],
)
def test_rules_about_a_name(start, target, ask, lines, dns_server, destinations, name, looked_up, result):
    dns_server.add("www.example", "A", "127.0.0.1")
    dns_server.add("false.example", "A", "127.0.0.9")
    data = HTTP % name.encode()
    assert ask(start(destinations, to=target), data) == (data if result == "ok" else b"")
    (line,) = lines()
    assert (line["result"], line["asked"]) == (result, f"{name}:{target.port}")
    assert bool(dns_server.asked) == looked_up


@pytest.fixture
def public(monkeypatch):
    """127.0.0.0/8 is an ordinary network: a name is enough to allow it."""
    monkeypatch.setattr("gtcpserver.proxy.rules.kind_of", lambda ip, own=False: None)


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("www.example", "ok"),
        ("false.example", "destination_denied"),  # it has another address
        ("missing.example", "destination_denied"),
        ("other.test", "destination_denied"),
    ],
)
def test_an_allowed_name_is_believed_only_if_it_has_the_address(start, target, ask, lines, dns_server, name, result):
    dns_server.add("www.example", "A", "127.0.0.9", "127.0.0.1")
    dns_server.add("false.example", "A", "127.0.0.9")
    data = HTTP % name.encode()
    assert ask(start(["allow .example"], to=target), data) == (data if result == "ok" else b"")
    (line,) = lines()
    assert (line["result"], line["original"]) == (result, f"127.0.0.1:{target.port}")
    if result == "ok":
        assert line["connected"] == line["original"]


@pytest.mark.usefixtures("public")
def test_a_denied_name_is_not_looked_up_to_be_believed(start, target, ask, dns_server):
    assert ask(start(["deny secret.example", "allow .example"], to=target), HTTP % b"secret.example") == b""
    assert not dns_server.asked


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("data", [b"hello", HTTP % b"www.example\r\nHost: b", HTTP % b"127.0.0.1", b"\x16\x03\x01\0\0"])
def test_without_exactly_one_name_no_name_is_allowed(start, target, ask, dns_server, data):
    dns_server.add("www.example", "A", "127.0.0.1")
    assert ask(start(["allow .example"], to=target), data) == b""


def test_connect_to_name_leads_to_the_names_own_address(start, target, ask, lines, dns_server, redirect):
    dns_server.add("www.example", "A", "127.0.0.1")
    server = start(["allow loopback"], listener='connect_to = "name"')
    redirect(target.port, "127.0.0.2")
    data = HTTP % b"www.example"
    assert ask(server, data) == data
    (line,) = lines()
    told = [line[name] for name in ("asked", "original", "connected")]
    assert told == [f"{host}:{target.port}" for host in ("www.example", "127.0.0.2", "127.0.0.1")]


@pytest.mark.parametrize(("connect_to", "asked"), [("address", "127.0.0.1"), ("name", "www.example")])
def test_what_an_upstream_is_asked_for(start, target, serve, connect, in_thread, connect_to, asked):
    seen = []

    def upstream(conn):
        header, size = parse_header(conn.recv_exactly(28))
        assert size == 28
        seen.append(header)
        conn.recv_exactly(3)
        conn.sendall(b"\x05\0")
        kind = conn.recv_exactly(4)[3]
        host = conn.recv_exactly(4) if kind == 1 else conn.recv_exactly(conn.recv_exactly(1)[0])
        seen.append(socket.inet_ntoa(host) if kind == 1 else host.decode())
        conn.recv_exactly(2)
        conn.sendall(b"\x05\0\0\x01" + bytes(6))
        echo(conn)

    there = serve(upstream)
    text = (
        'upstreams = ["through there any"]\n'
        f'[upstream.there]\nurl = "socks5://127.0.0.1:{there.port}"\nresolve = "there"\nsend_proxy = "v2"\n'
    )
    server = start(["allow loopback", "allow any"], to=target, text=text, listener=f'connect_to = "{connect_to}"')
    client = connect(server)
    data = HTTP % b"www.example"
    in_thread(client.sendall, data)
    assert in_thread(client.recv, 1000) == data
    header, host = seen
    assert host == asked
    assert header.destination == (ip_address("127.0.0.1"), target.port)
    assert header.source == (ip_address("127.0.0.1"), client.getsockname()[1])


@pytest.mark.usefixtures("public")
def test_a_name_does_not_choose_an_upstream_by_a_lie(start, target, ask, lines, dns_server):
    dns_server.add("false.example", "A", "127.0.0.9")
    dns_server.add("www.example", "A", "127.0.0.1")
    text = 'upstreams = ["through there .example"]\n[upstream.there]\nurl = "socks5://127.0.0.1:1"\n'
    server = start(["allow any"], to=target, text=text)
    data = HTTP % b"false.example"
    assert ask(server, data) == data
    assert ask(server, HTTP % b"www.example") == b""
    assert [line["upstream"] for line in lines(2)] == [None, "there"]


# -- who speaks first --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listener", ["name_timeout = 0", "name_timeout = 0.01"])
def test_a_server_that_speaks_first(start, serve, connect, in_thread, listener):
    server = start(to=serve(lambda conn: conn.sendall(b"220 hello\r\n")), listener=listener)
    assert in_thread(connect(server).recv, 100) == b"220 hello\r\n"


def test_a_client_that_only_listens(start, serve, connect, in_thread):
    client = connect(start(to=serve(lambda conn: conn.sendall(b"it is late\r\n"))))
    client.shutdown(socket.SHUT_WR)
    assert in_thread(client.recv, 100) == b"it is late\r\n"


def test_a_name_in_single_bytes_is_waited_for_beyond_name_timeout(start, target, connect, lines):
    client = connect(start(to=target))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = HTTP % b"www.example"
    for byte in data:
        client.sendall(bytes([byte]))
        gevent.sleep(0)
    wait_until(lambda: target.active_connections)
    client.close()
    assert lines()[0]["asked"] == f"www.example:{target.port}"


def test_a_name_that_never_ends(start, target, connect, in_thread, lines):
    client = connect(start(to=target, text="[timeouts]\nnegotiate = 0.05"))
    client.sendall(HTTP[:20])
    assert in_thread(client.recv, 100) == HTTP[:20]  # the destination's to wait for
    client.close()
    assert lines()[0]["asked"] == f"127.0.0.1:{target.port}"


# -- who is refused ----------------------------------------------------------------------------------------------------


def test_a_client_that_was_not_redirected(start, ask, lines):
    server = start(listener="tproxy = true")
    assert ask(server) == b""
    assert lines()[0]["result"] == "not_redirected"
    assert server.handler.counters == {"not_redirected": 1}


@pytest.mark.parametrize(
    ("text", "result"), [('clients = ["deny any"]', "client_denied"), ("[limits]\nconnections = 1", "limit")]
)
def test_a_client_that_is_not_admitted_is_reset_at_once(start, target, connect, ask, lines, text, result):
    server = start(to=target, text=text)
    if result == "limit":
        connect(server)
        wait_until(lambda: server.active_connections)
    assert ask(server) == b""
    assert lines()[0]["result"] == result


def test_another_port_of_the_proxy(start, ask, lines, redirect):
    server = start()
    redirect(server.port)
    object.__setattr__(server.handler._only.gate, "own_ports", frozenset({server.port}))
    assert ask(server) == b""
    assert lines()[0]["detail"] == "this is the proxy itself"


# -- loops -------------------------------------------------------------------------------------------------------------


def test_the_proxys_own_connection_is_found(start, ask, lines, redirect):
    server = start()
    redirect(server.port)
    assert ask(server) == b""
    assert "loop" in [line["result"] for line in lines(2)]
    assert server.accepted_connections < 5
    wait_until(lambda: not server.active_connections)


def test_many_connections_without_an_answer_are_a_loop(start, serve, connect, ask, lines, monkeypatch):
    monkeypatch.setattr(loops, "MOST_UNANSWERED", 3)
    silent = serve(lambda conn: conn.recv(100))
    server = start(to=silent, listener="name_timeout = 0.01")
    held = [connect(server) for _ in range(3)]
    wait_until(lambda: silent.active_connections == 3)
    assert ask(server, b"") == b""
    assert lines()[0]["result"] == "loop"
    held.pop().close()
    wait_until(lambda: silent.active_connections == 2)
    held.append(connect(server))
    wait_until(lambda: silent.active_connections == 3)


def test_connections_that_are_answered_are_no_loop(start, target, connect, in_thread, monkeypatch):
    monkeypatch.setattr(loops, "MOST_UNANSWERED", 2)
    server = start(to=target)
    for _ in range(4):
        client = connect(server)
        client.sendall(b"x")
        assert in_thread(client.recv, 10) == b"x"
    watch = server.handler._only.gate.loops
    assert [len(last) for last in watch._last.values()] == [2]


def test_nothing_is_left_of_clients_that_are_gone(start, target, ask):
    server = start(to=target)
    assert [ask(server) for _ in range(3)] == [b"hello"] * 3
    wait_until(lambda: not server.active_connections)
    watch = server.handler._only.gate.loops
    assert [watch._last, watch._clients, watch._ours] == [{}, set(), set()]


# -- as for other clients ----------------------------------------------------------------------------------------------


def test_a_tunnel_moves_with_its_claims(start, target, connect, in_thread, lines, monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.1)
    rules, end = ["deny .test", "allow loopback"], "[reload]\nend_forbidden = true"
    a = start(rules, to=target, text=end, handover=True)
    b = start(rules, text=end, handover=True)
    client = connect(a)
    data = HTTP % b"www.example"
    client.sendall(data)
    assert in_thread(client.recv, 1000) == data
    leave(a, b)
    wait_until(lambda: b.active_connections and not a.active_connections)
    (conn,) = b.connections()
    assert conn.context.connection_fields()["destination"] == f"www.example:{target.port}"
    assert conn.context.original == (ip_address("127.0.0.1"), target.port)
    client.close()
    (line,) = lines()
    assert (line["asked"], line["original"]) == (f"www.example:{target.port}", f"127.0.0.1:{target.port}")


def test_a_reload_ends_a_tunnel_whose_claimed_name_is_denied_now(start, target, connect, in_thread, lines):
    server = start(to=target, text="[reload]\nend_forbidden = true")
    client = connect(server)
    data = HTTP % b"www.example"
    client.sendall(data)
    assert in_thread(client.recv, 1000) == data
    text = '[rules]\ndestinations = ["deny .example", "allow loopback"]\n[reload]\nend_forbidden = true\n'
    new = make_proxy(parse_config('[[listener]]\nlisten = "127.0.0.1:0"\nspeaks = "transparent"\n' + text)).handler
    old, server.handler = server.handler, new
    old.retire(new)
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 100)
    assert lines()[0]["result"] == "destination_denied"


def test_redacted_lines_have_no_destination(start, target, ask, lines):
    ask(start(to=target, text="[log]\nredact = true"))
    (line,) = lines()
    assert [line[name] for name in ("asked", "original", "connected")] == ["-"] * 3


def test_other_clients_have_no_original(proxy, target, ask, lines):
    ask(proxy(), socks(target.port))
    assert lines()[0]["original"] is None


# -- the configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('speaks = "http"\ntproxy = true', 'tproxy is for speaks = "transparent", got speaks = "http"'),
        ('connect_to = "name"', 'connect_to is for speaks = "transparent"'),
        ("name_timeout = 1.0", "name_timeout is for"),
        ('speaks = "transparent"\nname_timeout = -1', "name_timeout must be a number, 0 or more, got -1"),
        ('speaks = "transparent"\nname_timeout = inf', "name_timeout must be a number, 0 or more, got inf"),
        ('speaks = "transparent"\nconnect_to = "host"', "connect_to"),
        ('speaks = "transparent"\nproxy_protocol = ["10.0.0.0/8"]', "proxy_protocol is not for"),
        ('speaks = "transparent"\ntls_certfile = "x.pem"', "tls_certfile is not for"),
        ('speaks = "transparent"\nexternal = "same"', 'external cannot be "same"'),
        ('speaks = "transparent"\nlisten = "unix:/tmp/x"', "needs a TCP address"),
        ('speaks = "transparent"\ncommands = ["bind"]', "commands must have one of connect"),
        ('speaks = "transparent"\nname = "lan"\n[rules]\nclients = ["allow from 10.0.0.0/8 to any with auth a"]\n'
         '[auth.a]\nusers = {}\nhtpasswd = "/dev/null"', "clients of the transparent listener 'lan' cannot be asked"),
        ('speaks = "transparent"\ntproxy = true\nlisten = "*:1"\n[[listener]]\nspeaks = "transparent"\ntproxy = true\n'
         'listen = "[::1]:2"', "only one listener can have tproxy = true for IPv6"),
    ],
)  # fmt: skip
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError) as error:
        parse_config("[[listener]]\n" + text + "\n")
    assert message in str(error.value)
    assert " line " in str(error.value)


def test_tproxy_beside_other_listeners_is_told_from_them_by_the_address(monkeypatch):
    text = '[[listener]]\nname = "{}"\nspeaks = "{}"\nlisten = "{}"\n'
    config = text.format("socks", "socks", "*:1080") + text.format("lan", "transparent", "*:1081") + "tproxy = true\n"
    made = make_proxy(parse_config(config + '[rules]\nclients = ["allow 10.0.0.0/8"]\n'))
    assert made.needs_transparent
    of = made.handler._handler_of_socket
    names = [of((host, port)).gate.listener for host in ("127.0.0.1", "192.0.2.1") for port in (1080, 1081, 80)]
    assert names == ["socks", "lan", "lan", "lan", "lan", "lan"]
    # A tunnel by TPROXY moves to any worker that has such a listener; that of a listener that is gone does not.
    moved = SimpleNamespace(server_address=("192.0.2.1", 443), session={"tunnel": {"record": {"original": "a:1"}}})
    assert made.handler.may_take_over(moved)
    moved.session = {"tunnel": {"record": {}}}
    assert not made.handler.may_take_over(moved)
    made.handler.server_stopped()


@pytest.fixture
def proxy_command(monkeypatch):
    """`proxy_command(*arguments)`: the result of the command, and the context with which it would serve."""
    seen = []
    monkeypatch.setattr(command, "serve_with", lambda context, load, **_: seen.append((context, load())))

    def run(*arguments):
        result = CliRunner().invoke(command.proxy, arguments)
        for _, handler in seen:
            handler.server_stopped()
        return result, seen[-1][0] if seen else None

    return run


def test_intercept_on_the_command_line(proxy_command):
    arguments = ["--intercept", "*:1081", "--allow-client", "10.0.0.0/8"]
    printed = proxy_command(*arguments, "--print-config")[0].output
    (listener,) = parse_config(printed).listener
    assert [listener.name, listener.speaks, listener.listen, listener.tproxy] == [
        "transparent",
        "transparent",
        "*:1081",
        False,
    ]
    printed = proxy_command(*arguments, "--transparent", "--print-config")[0].output
    assert parse_config(printed).listener[0].tproxy
    assert not make_listen_config(proxy_command(*arguments)[1]).transparent


def test_an_address_for_intercept_that_is_none(proxy_command):
    result = proxy_command("--intercept", "nowhere")[0]
    assert (result.exit_code, "--intercept: " in result.output) == (2, True)


def test_tproxy_in_a_file_makes_the_sockets_transparent(proxy_command, tmp_path, monkeypatch):
    file = tmp_path / "proxy.toml"
    file.write_text('[[listener]]\nspeaks = "transparent"\ntproxy = true\n')
    asked = []

    def refused(**options):
        asked.append(options)
        raise ConfigError("transparent=True: the system refuses it")

    monkeypatch.setattr(command, "ListenConfig", lambda **options: asked.append(options))
    context = proxy_command("--config", str(file))[1]
    assert (asked, was_given(context, "transparent"), context.params["transparent"]) == (
        [{"transparent": True}],
        True,
        True,
    )
    monkeypatch.setattr(command, "ListenConfig", refused)
    result = proxy_command("--config", str(file))[0]
    assert isinstance(result.exception, ConfigError) or result.exit_code == 2
    assert "CAP_NET_ADMIN" in str(result.exception) + result.output
