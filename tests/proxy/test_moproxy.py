"""What moproxy gets wrong, and where other proxies stumble: end to end, where nothing else tests it."""

import base64
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from ipaddress import ip_address

import pytest

from gtcpserver import ConfigError
from gtcpserver.proxy import authenticate, passwords, socks_session
from gtcpserver.proxy.authenticate import HashedUsers
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, QUICK, OnePassword, full_listener, http, reply, socks
from kit.waiting import wait_until

WITH_PASSWORD = {
    "client_rules": [parse_client_rule("allow from any to any with auth staff")],
    "authenticators": {"staff": OnePassword()},
}


@pytest.fixture
def proxy(serve):
    def start(**options):
        return serve(ProxyHandler(Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})))

    return start


# -- moproxy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_", [b"GET http://[::1]/ HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT [::1]:80 HTTP/1.1\r\nHost: x\r\n\r\n"]
)
def test_requirement_28_an_ipv6_address_without_a_port(proxy, connect, in_thread, lines, request_):
    """Whether anybody listens on port 80 here or not: that is where it goes."""
    in_thread(http, connect(proxy()), request_)
    assert lines()[0]["asked"] == "[::1]:80"
    assert lines()[0]["result"] in ("ok", "refused", "unreachable")


def test_numbers_of_seconds_are_what_the_file_says():
    """0.5 s is not none, and 0 is not "forever" but a mistake."""
    made = make_proxy(parse_config("[timeouts]\nnegotiate = 0.5\nidle = 0.25\nconnect = 1"))
    timeouts = made.handler._only.gate.timeouts
    assert (timeouts.negotiate, timeouts.idle, timeouts.connect) == (0.5, 0.25, 1.0)
    for value in ("0", "0.0", "-1", "nan", "inf", "true", '"5"'):
        with pytest.raises(ConfigError, match=r"line 2: .*negotiate"):
            make_proxy(parse_config(f"[timeouts]\nnegotiate = {value}"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [True, False])
def test_requirement_36_tunnels_live_through_reloads_good_and_bad(serve, connect, in_thread, tmp_path, workers):
    """A broken file, and one with a listener that cannot be opened: it says why, and everything stays as it was."""
    target = serve(echo)
    path = tmp_path / "proxy.toml"
    text = '[[listener]]\nlisten = "127.0.0.1:0"\n[rules]\ndestinations = ["allow loopback"]\n'
    path.write_text(text)
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--config", str(path)]
    # A stop would not wait for the tunnel; a reload does.
    command += ["--stop-timeout", "0.1", *(["--workers", "1"] if workers else [])]
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        try:

            def wait_for(pattern):
                while line := process.stderr.readline():
                    if found := re.search(pattern, line):
                        return found
                raise AssertionError(pattern)

            port = int(in_thread(wait_for, r"listening on 127\.0\.0\.1:(\d+)")[1])
            tunnel = connect(f"127.0.0.1:{port}")
            assert in_thread(reply, tunnel, socks(target.port)) == 0

            def goes_on():
                tunnel.sendall(b"hello")
                assert in_thread(read, tunnel, 5) == b"hello"
                with connect(f"127.0.0.1:{port}") as client:
                    assert in_thread(reply, client, socks(target.port)) == 0

            cases = [
                (text + "[timeouts]\nconect = 5\n", r"(?:failed|nothing has changed).*line 6.*there is no conect"),
                (text.replace("allow loopback", "permit loopback"), r"(?:failed|nothing has changed).*line 4.*permit"),
                (text + "[[listener]\n", r"(?:failed|nothing has changed).*line 5"),
                (
                    text + f'[[listener]]\nname = "x"\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\n',
                    r"(?:failed|nothing has changed).*listen",
                ),
                (text + "[timeouts]\nconnect = 5\n", r"reload . is done|files reloaded"),
            ]
            for broken, said in cases:
                path.write_text(broken)
                process.send_signal(signal.SIGHUP)
                in_thread(wait_for, said)
                goes_on()
            assert process.poll() is None
        finally:
            tunnel.close()
            process.terminate()
            in_thread(process.communicate)


def test_requirement_27_passwords_are_compared_by_their_hashes_in_full(monkeypatch):
    """The time does not depend on how much of a name or password is right: unknown names are hashed as well."""
    compared = []
    real = authenticate.matches
    monkeypatch.setattr(authenticate, "matches", lambda kept, password: compared.append(kept) or real(kept, password))
    users = HashedUsers({b"ada": QUICK})
    monkeypatch.setattr(passwords, "FIRST_DELAY", 0.0)
    try:
        for name, password in ((b"ada", b"p"), (b"ada", b"pv"), (b"eve", b"pw"), (b"", b"")):
            assert not users.check(name, password, ip_address("192.0.2.1"))
        assert compared == [QUICK] * 4
    finally:
        users.close()


# -- SOCKS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offered", [b"\x05\x01\x00", b"\x05\x03\x01\x03\xfe", b"\x05\x00"])
def test_requirement_03_after_ff_the_client_hears_an_end_and_no_reset(proxy, connect, in_thread, offered):
    """Though it has sent more already, which nobody reads."""
    client = connect(proxy(**WITH_PASSWORD))
    in_thread(client.sendall, offered + socks(80)[3:] + bytes(100_000))
    assert in_thread(read, client, 100) == b"\x05\xff"


@pytest.mark.parametrize("methods", [b"\x00\x02", b"\x02\x00", b"\x00\x00\x02\x01"])
def test_requirement_05_a_password_is_asked_for_whatever_is_offered_first(proxy, connect, in_thread, methods):
    client = connect(proxy(**WITH_PASSWORD))
    client.sendall(b"\x05" + bytes([len(methods)]) + methods + socks(80)[3:])
    # The request is not taken for a password either.
    assert in_thread(read, client, 100) == b"\x05\x02\x01\x01"


@pytest.mark.slow
def test_requirement_07_nothing_is_granted_before_the_destination_has_accepted(proxy, connect, in_thread):
    with full_listener() as full:
        server = proxy(timeouts=Timeouts(connect=0.3))
        port = full.getsockname()[1]
        for request, before, after in (
            (socks(port), b"\x05\x00", b"\x05\x04"),
            (b"\x04\x01" + struct.pack("!H", port) + b"\x7f\0\0\x01\0", b"", b"\0\x5b"),
            (b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % port, b"", b"HTTP/1.1 504"),
        ):
            client = connect(server)
            client.sendall(request)
            assert in_thread(read, client, len(before)) == before
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                in_thread(client.recv, 1)
            client.settimeout(SOON)
            assert in_thread(read, client, len(after)) == after


@pytest.mark.parametrize("command", [2, 3])
def test_requirement_12_and_34_bind_and_udp_count_for_the_limit_of_a_user(serve, connect, in_thread, lines, command):
    text = f"""
    [[listener]]
    listen = "127.0.0.1:0"
    [rules]
    clients = ["allow from any to any with auth staff"]
    destinations = ["allow loopback"]
    [auth.staff]
    users = {{ada = '{QUICK}'}}
    [limits]
    user_connections = 1
    """
    server = serve(make_proxy(parse_config(text)).handler)

    def ask(kind):
        client = connect(server)
        client.sendall(b"\x05\x01\x02\x01\x03ada\x02pw" + bytes([5, kind, 0, 1, 127, 0, 0, 1, 0, 0]))
        return client, in_thread(read, client, 14)[5]

    first, granted = ask(command)
    assert granted == 0
    assert ask(command)[1] == 1
    assert lines()[0]["result"] == "limit"
    first.close()
    wait_until(lambda: len(lines(2)) == 2)
    assert ask(command)[1] == 0


@pytest.mark.parametrize("way", ["socks5", "connect"])
def test_requirement_32_a_reset_of_the_client_is_a_reset_for_the_destination(
    proxy, connect, in_thread, serve, lines, way
):
    ends = []

    def hold(conn):
        conn.sendall(b"x")
        try:
            ends.append(conn.recv(100))
        except ConnectionResetError:
            ends.append("reset")

    origin, server = serve(hold), proxy()
    client = connect(server)
    if way == "socks5":
        assert in_thread(reply, client, socks(origin.port)) == 0
    else:
        request = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port
        client.sendall(request)
        in_thread(read, client, len(b"HTTP/1.1 200 Connection established\r\n\r\n"))
    assert in_thread(read, client, 1) == b"x"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_until(lambda: ends)
    assert ends == ["reset"]
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("reset", "by the client")


def test_requirement_33_the_next_address_is_tried_when_the_first_refuses(proxy, connect, in_thread, serve):
    class Names:
        def resolve(self, name):
            return (ip_address("::1"), ip_address("127.0.0.1"))

        def close(self):
            pass

    origin = serve(echo)  # on IPv4 alone
    server = proxy(resolver=Names())
    for _ in range(2):
        assert in_thread(reply, connect(server), socks(origin.port, "both.example")) == 0


def test_requirement_36_a_fault_ends_one_connection_and_not_the_proxy(proxy, connect, in_thread, serve, caplog):
    class Broken:
        def resolve(self, name):
            raise RuntimeError("a fault of the program")

        def close(self):
            pass

    origin, server = serve(echo), proxy(resolver=Broken())
    client = connect(server)
    client.sendall(socks(80, "x.example"))
    assert in_thread(read, client, 100) == b"\x05\x00"  # and its end
    client = connect(server)
    client.sendall(b"GET http://x.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ConnectionResetError):  # an end in order could be taken for that of an answer
        in_thread(read, client, 100)
    assert in_thread(reply, connect(server), socks(origin.port)) == 0
    assert [record.levelname for record in caplog.records if "failed" in record.getMessage()].count("ERROR") == 2


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_requirements_22_and_23_what_a_connection_field_cannot_remove_and_what_goes_anyway(
    proxy, connect, in_thread, serve
):
    heads = []

    def answer(conn):
        heads.append(conn.recv_until(b"\r\n\r\n"))
        conn.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: X-Hop, Content-Length, Via, Set-Cookie\r\n"
            b"X-Hop: 1\r\nSet-Cookie: a=b\r\n"
            b"Keep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\nUpgrade: h2\r\n\r\nhello"
        )

    origin = serve(answer)
    request = (
        b"POST http://127.0.0.1:%d/ HTTP/1.1\r\nHost: y\r\nContent-Length: 5\r\n"
        b"Connection: close, X-Hop, Host, Content-Length, X-Forwarded-For, Via, Authorization\r\n"
        b"X-Hop: 1\r\nX-Forwarded-For: 192.0.2.1\r\nAuthorization: Bearer x\r\nProxy-Authorization: Basic QWRhOnB3\r\n"
        b"Keep-Alive: 5\r\nProxy-Connection: x\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: h2c\r\n\r\nhello" % origin.port
    )
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE)
    client = connect(serve(ProxyHandler(gate, forwarded="pass")))
    client.sendall(request)
    head, _, body = in_thread(read, client, 10_000).partition(b"\r\n\r\n")
    assert body == b"hello"
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert b"content-length" in names
    assert not {b"x-hop", b"keep-alive", b"proxy-authenticate", b"upgrade"} & set(names)
    sent = dict(line.split(b": ", 1) for line in heads[0].strip().split(b"\r\n")[1:])
    assert sent[b"Host"] == b"127.0.0.1:%d" % origin.port
    assert (sent[b"Content-Length"], sent[b"X-Forwarded-For"]) == (b"5", b"192.0.2.1")
    gone = {b"X-Hop", b"Proxy-Authorization", b"Keep-Alive", b"Proxy-Connection", b"TE", b"Trailer", b"Upgrade"}
    assert not gone & set(sent)


def test_requirement_29_an_https_address_is_not_sent_in_clear(proxy, connect, in_thread, serve):
    origin, server = serve(echo), proxy()
    for target in (b"https://127.0.0.1:%d/", b"HTTPS://127.0.0.1:%d/", b"wss://127.0.0.1:%d/", b"//127.0.0.1:%d/"):
        head = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (target % origin.port, origin.port)
        assert in_thread(http, connect(server), head).startswith(b"HTTP/1.1 400 ")
    # And a request as for an origin is not sent to its Host, which may be the proxy itself.
    for path in (b"/", b"/http://127.0.0.1:%d/" % origin.port, b"*", b"127.0.0.1:%d" % origin.port):
        head = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (path, origin.port)
        assert in_thread(http, connect(server), head).startswith(b"HTTP/1.1 400 ")
    assert origin.accepted_connections == 0


SECRET = b"correct-horse-battery"


def test_requirement_37_no_password_is_in_a_log_or_an_answer(serve, connect, in_thread, caplog):
    """Right or wrong, by each protocol, also where a request is broken, with every logger at DEBUG."""
    caplog.set_level(logging.DEBUG)

    class Knows:
        def check(self, user, password, client):
            return password == SECRET

    gate = Gate(
        client_rules=WITH_PASSWORD["client_rules"],
        authenticators={"staff": Knows()},
        destination_rules=[parse_destination_rule("allow any")],
    )
    server = serve(ProxyHandler(gate))
    answers = []
    for password in (SECRET, SECRET + b"!"):
        encoded = base64.b64encode(b"ada:" + password)
        length = bytes([len(password)])
        for request in (
            socks(80, user=b"ada", password=password),
            b"\x05\x01\x02\x01\x03ada" + length + password + b"\x05\x09\x00\x01",
            b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n" % encoded,
            b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b!\r\n\r\n" % encoded,
            b"GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization : Basic %b\r\n\r\n" % encoded,
            b"GET http://ada:%b@127.0.0.1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n"
            % (password, encoded),
            b"CONNECT ada:%b@127.0.0.1:80 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic %b\r\n\r\n"
            % (password, encoded),
            b"TRACE http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\nMax-Forwards: 0\r\nProxy-Authorization: Basic %b\r\n\r\n"
            % encoded,
        ):
            client = connect(server)
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answers.append(in_thread(read, client, 100_000))
    wait_until(lambda: server.active_connections == 0)
    told = b"".join(answers) + "\n".join(record.getMessage() for record in caplog.records).encode()
    assert b"403" in told
    assert b"407" in told
    assert len(caplog.records) >= 16
    for secret in (SECRET, base64.b64encode(b"ada:" + SECRET)[:20]):
        assert secret not in told


def test_requirement_38_outgoing_connections_have_the_options_of_a_proxy(proxy, connect, in_thread, serve, monkeypatch):
    """No delay of small pieces on either side, and dead peers are noticed."""
    found = {}
    real = socks_session.relay

    def relay(conn, upstream, **options):
        for name, sock in (("client", conn), ("destination", upstream)):
            found[name] = (
                sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0,
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0,
            )
        return real(conn, upstream, **options)

    monkeypatch.setattr(socks_session, "relay", relay)
    client = connect(proxy())
    assert in_thread(reply, client, socks(serve(echo).port)) == 0
    wait_until(lambda: len(found) == 2)
    assert found["destination"] == (True, True)
    assert found["client"][0]


@pytest.mark.slow
def test_requirement_39_a_password_need_not_be_on_the_command_line(tmp_path):
    """It can come from a file of hashes, and the hash from a prompt: neither is in the list of processes."""
    (tmp_path / "users").write_text(f"ada:{QUICK}\n")
    os.chmod(tmp_path / "users", 0o600)
    (tmp_path / "proxy.toml").write_text(
        f'[rules]\nclients = ["allow from any to any with auth staff"]\n[auth.staff]\nhtpasswd = "{tmp_path}/users"\n'
    )
    command = [sys.executable, "-m", "gtcpserver", "proxy"]
    done = subprocess.run([*command, "check", tmp_path / "proxy.toml"], capture_output=True, text=True, timeout=SOON)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [*command, "hash-password"], input="secret\nsecret\n", capture_output=True, text=True, timeout=SOON
    )
    assert done.returncode == 0
    assert "$argon2id$" in done.stdout
    assert "secret" not in done.stdout + done.stderr
