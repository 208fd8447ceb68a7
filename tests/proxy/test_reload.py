"""A reload: each new request is judged by the new rules, also on a connection that was there before; tunnels go on."""

import re
import signal
import struct
import subprocess
import sys

import gevent
import pytest
from gevent.event import Event

from gtcpserver.proxy import passwords
from gtcpserver.proxy.config import make_proxy, parse_config
from kit.clients import read
from kit.forwarding import OK, Client
from kit.handlers import echo
from kit.proxying import QUICK, associate, packet, reply, socks, udp_socket
from kit.waiting import wait_until

LISTENER = '[[listener]]\nlisten = "127.0.0.1:0"\n'
OPEN = '[rules]\ndestinations = ["allow loopback"]\n'
DENIED = '[rules]\ndestinations = ["deny 127.0.0.0/8"]\n'
NO_CLIENT = '[rules]\nclients = []\ndestinations = ["allow loopback"]\n'
END = "[reload]\nend_forbidden = true\n"


def users(*names):
    listed = "".join(f'{name} = "{QUICK}"\n' for name in names)
    rules = 'clients = ["allow from 127.0.0.1 to any with auth all"]\ndestinations = ["allow loopback"]\n'
    return f"[rules]\n{rules}[auth.all.users]\n{listed}"


ADA = "Proxy-Authorization: Basic QWRhOnB3"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(passwords, "FIRST_DELAY", 0.0)


def reload(server, text):
    """What SIGHUP does in a single process."""
    new = make_proxy(parse_config(text)).handler
    old, server.handler = server.handler, new
    old.retire(new)
    return old


@pytest.fixture
def start(serve):
    """`start(text)`: a proxy with this configuration; `.dispatcher` is its handler."""
    return lambda text: serve(make_proxy(parse_config(text)).handler)


@pytest.mark.parametrize("text", [DENIED, NO_CLIENT, '[[listener]]\ncommands = ["connect"]\n' + OPEN])
def test_a_kept_connection_is_judged_by_the_new_rules(start, origin, client, text):
    target, server = origin(OK, OK), start(OPEN)
    visitor = client(server)
    assert visitor.get(f"{target.url}/")[0] == 200
    reload(server, text)
    assert visitor.get(f"{target.url}/")[0] in (403, 405)
    assert len(target.heads) == 1


def test_a_kept_connection_of_a_removed_user(start, origin, client, lines):
    target, server = origin(OK, OK), start(users("Ada", "Eve"))
    visitor = client(server)
    assert visitor.get(f"{target.url}/", ADA)[0] == 200
    reload(server, users("Eve"))
    assert visitor.get(f"{target.url}/", ADA)[0] == 407
    reload(server, users("Eve", "Ada"))
    assert visitor.get(f"{target.url}/", ADA)[0] == 200
    assert [line["result"] for line in lines(3)] == ["ok", "authentication_failed", "ok"]


def test_a_kept_connection_of_a_client_that_now_needs_a_password(start, origin, client):
    target, server = origin(OK, OK), start(OPEN)
    visitor = client(server)
    assert visitor.get(f"{target.url}/")[0] == 200
    reload(server, users("Ada"))
    assert visitor.get(f"{target.url}/")[0] == 407
    assert visitor.get(f"{target.url}/", ADA)[0] == 200


@pytest.mark.parametrize("asked", ["http", "connect", "socks5", "socks4"])
def test_a_connection_that_was_silent_until_the_reload(start, connect, origin, in_thread, asked):
    target, server = origin(OK), start(OPEN)
    client = connect(server)
    wait_until(lambda: server.active_connections)
    reload(server, DENIED)
    where = f"127.0.0.1:{target.port}"
    client.sendall(
        {
            "http": f"GET http://{where}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
            "connect": f"CONNECT {where} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
            "socks5": socks(target.port),
            "socks4": b"\x04\x01" + struct.pack("!H", target.port) + b"\x7f\0\0\x01\0",
        }[asked]
    )
    said = in_thread(client.recv, 100)
    if asked == "socks5":
        said += in_thread(client.recv, 100)
    assert said.startswith({"socks5": b"\x05\0\x05\x02", "socks4": b"\0\x5b"}.get(asked, b"HTTP/1.1 403"))


@pytest.mark.parametrize(("names", "code"), [(["Ada", "Eve"], 0), (["Eve"], 2)])
def test_a_reload_in_the_midst_of_a_negotiation(start, connect, serve, in_thread, lines, names, code):
    target, server = serve(echo), start(users("Ada"))
    client, said = connect(server), socks(target.port, user=b"Ada")
    client.sendall(said[:-5])
    assert in_thread(read, client, 4) == b"\x05\x02\x01\x00"
    reload(server, users(*names))
    client.sendall(said[-5:])
    assert in_thread(read, client, 10)[1] == code
    if code:
        assert lines()[0]["result"] == "authentication_failed"


def test_a_client_that_gave_no_password_before_the_reload(start, connect, serve, in_thread):
    target, server = serve(echo), start(OPEN)
    client, said = connect(server), socks(target.port)
    client.sendall(said[:-5])
    assert in_thread(read, client, 2) == b"\x05\x00"
    reload(server, users("Ada"))
    client.sendall(said[-5:])
    assert in_thread(read, client, 10)[1] == 2


def test_pipelined_requests_are_judged_one_by_one(start, origin, client):
    go_on = Event()
    target, server = origin(lambda conn, head: go_on.wait() and OK, OK), start(OPEN)
    visitor = client(server)
    visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    wait_until(lambda: target.heads)
    reload(server, DENIED)
    go_on.set()
    assert visitor.answer()[0] == 200
    assert visitor.answer()[0] == 403


# -- what is open ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tunnel(connect, in_thread):
    def open_tunnel(server, port, **options):
        client = connect(server)
        assert in_thread(reply, client, socks(port, **options)) == 0
        return client

    return open_tunnel


def goes_on(client, in_thread):
    client.sendall(b"hello")
    return in_thread(client.recv, 5) == b"hello"


@pytest.mark.parametrize("text", [DENIED, NO_CLIENT, users("Eve"), END + OPEN, END + users("Ada", "Eve")])
def test_a_tunnel_goes_on(start, serve, tunnel, in_thread, text):
    target = serve(echo)
    server = start(users("Ada") if "Ada" in text else OPEN)
    client = tunnel(server, target.port, user=b"Ada" if "Ada" in text else None)
    reload(server, text)
    gevent.sleep(0.01)
    assert goes_on(client, in_thread)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (DENIED, "destination_denied"),
        (NO_CLIENT, "client_denied"),
        (users("Eve"), "authentication_failed"),
        ('[[listener]]\ncommands = ["forward"]\n' + OPEN, "command_denied"),
    ],
)
def test_end_forbidden_ends_tunnels_that_the_new_rules_do_not_allow(
    start, serve, tunnel, in_thread, lines, text, result
):
    target, server = serve(echo), start(users("Ada"))
    client = tunnel(server, target.port, user=b"Ada")
    assert goes_on(client, in_thread)
    reload(server, END + OPEN)  # which allows it
    assert goes_on(client, in_thread)
    reload(server, END + text)
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    line = lines()[0]
    assert (line["result"], line["sent"], line["received"]) == (result, 10, 10)
    wait_until(lambda: not target.active_connections)


def test_end_forbidden_ends_responses_too(start, origin, client, in_thread):
    def endless(conn, head):
        conn.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        assert conn.recv(1) == b""

    target, server = origin(OK, endless), start(OPEN)
    visitor = client(server)
    assert visitor.get(f"{target.url}/")[0] == 200
    visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert in_thread(visitor.file.readline) == b"HTTP/1.1 200 OK\r\n"
    reload(server, END + DENIED)
    with pytest.raises(ConnectionResetError):
        visitor.read()


def test_datagrams_are_judged_by_the_new_rules(start, connect, in_thread):
    server, client = start(OPEN), connect(start(OPEN))
    client = connect(server)
    where = associate(client, in_thread)
    with udp_socket() as peer, udp_socket() as mine:
        mine.sendto(packet(peer.getsockname()[1], b"one"), where)
        assert peer.recv(100) == b"one"
        reload(server, DENIED)
        mine.sendto(packet(peer.getsockname()[1], b"two"), where)
        gevent.sleep(0.05)
        reload(server, OPEN)
        mine.sendto(packet(peer.getsockname()[1], b"three"), where)
        assert peer.recv(100) == b"three"


# -- what an old configuration has started -----------------------------------------------------------------------------


def test_an_old_configuration_ends_when_no_client_uses_it(start, serve, tunnel, origin, client, in_thread):
    target, server = serve(echo), start(users("Ada"))
    ended = []

    def watch(number):
        gate = server.handler._only.gate
        authenticator = next(iter(gate.authenticators.values()))
        close = authenticator.close
        authenticator.close = lambda: (ended.append(number), close())

    watch(0)
    go_on = Event()
    slow = origin(lambda conn, head: go_on.wait() and OK, OK)
    visitor = client(server)
    visitor.send(f"GET {slow.url}/ HTTP/1.1\r\nHost: x\r\n{ADA}\r\n\r\n")
    wait_until(lambda: slow.heads)
    tunnel(server, target.port, user=b"Ada")
    reload(server, users("Ada"))
    watch(1)
    assert not ended  # a request is under way
    reload(server, users("Ada"))
    watch(2)
    assert ended == [1]  # the tunnel has followed
    go_on.set()
    assert visitor.answer()[0] == 200
    assert visitor.get(f"{slow.url}/", ADA)[0] == 200
    assert ended == [1, 0]


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_sighup_reaches_connections_that_are_open(serve, connect, origin, in_thread, tmp_path, workers, ends):
    path = tmp_path / "proxy.toml"
    path.write_text(LISTENER + OPEN)
    go_on = Event()
    target = origin(OK, lambda conn, head: go_on.wait() and OK, OK, OK)
    other = serve(echo)
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--config", str(path)]
    command += ["--stop-timeout", "0.1", *(["--workers", "1"] if workers else [])]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:

            def wait_for(pattern):
                while line := process.stderr.readline():
                    if found := re.search(pattern, line):
                        return found
                raise AssertionError(pattern)

            address = "127.0.0.1:" + in_thread(wait_for, r"listening on 127.0.0.1:(\d+)")[1]
            kept, silent, tunnel = (connect(address) for _ in range(3))
            assert in_thread(reply, tunnel, socks(other.port)) == 0
            visitor = Client(kept, in_thread)
            assert visitor.get(f"{target.url}/")[0] == 200
            visitor.send(f"GET {target.url}/ HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
            wait_until(lambda: len(target.heads) == 2)
            path.write_text(LISTENER + (END if ends else "") + '[rules]\ndestinations = ["allow [::1]"]\n')
            process.send_signal(signal.SIGHUP)
            in_thread(wait_for, r"reload . is done|files reloaded")
            if ends:
                with pytest.raises(ConnectionResetError):
                    in_thread(tunnel.recv, 1)
            else:
                assert goes_on(tunnel, in_thread)
            go_on.set()
            if ends:
                with pytest.raises(ConnectionResetError):
                    visitor.read()
            else:
                assert visitor.answer()[0] == 200
                assert visitor.answer()[0] == 403
            assert in_thread(reply, silent, socks(other.port)) == 2
            assert in_thread(reply, connect(address), socks(other.port)) == 2
        finally:
            process.terminate()
            in_thread(process.communicate)
    assert len(target.heads) == 2
