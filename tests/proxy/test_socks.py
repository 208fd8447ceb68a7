"""SOCKS clients, through a real server to real destinations."""

import shutil
import socket
import struct
import subprocess

import gevent
import gevent.socket
import pytest

from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.resolve import Resolver
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, associate, bind_request, named_address, packet, udp_socket
from kit.waiting import wait_until


@pytest.fixture
def proxy(serve):
    """`proxy(**gate)` starts one that lets everybody go everywhere, unless told otherwise."""

    def start(**options):
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})
        return serve(ProxyHandler(gate))

    return start


@pytest.fixture
def origin(serve):
    return serve(echo)


def connect_request(host, port, version=5):
    if version == 4:
        return b"\x04\x01" + struct.pack("!H", port) + socket.inet_aton(host) + b"me\0"
    return b"\x05\x01\x00\x03" + bytes([len(host)]) + host.encode() + struct.pack("!H", port)


def test_requirement_01_everything_in_one_segment_and_early_bytes_reach_the_destination(
    proxy, origin, connect, in_thread, lines
):
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00" + connect_request("localhost", origin.port) + b"early")
    assert in_thread(read, client, 2) == b"\x05\x00"
    reply = in_thread(read, client, 10)
    assert reply[:4] == b"\x05\x00\x00\x01"
    assert in_thread(read, client, 5) == b"early"
    client.shutdown(socket.SHUT_WR)
    assert in_thread(client.recv, 10) == b""
    (line,) = lines()
    assert (line["result"], line["sent"], line["received"]) == ("ok", 5, 5)
    assert line["asked"] == f"localhost:{origin.port}"
    assert line["connected"] == f"127.0.0.1:{origin.port}"
    assert line["protocol"] == "socks5"


def test_requirement_01_one_byte_at_a_time(proxy, origin, connect, in_thread):
    client = connect(proxy())
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"\x05\x01\x00" + connect_request("127.0.0.1", origin.port):
        client.sendall(bytes([byte]))
        gevent.sleep(0.001)
    assert in_thread(read, client, 12)[2:4] == b"\x05\x00"
    client.sendall(b"ping")
    assert in_thread(read, client, 4) == b"ping"


def test_requirement_08_the_bound_address_is_that_of_the_way_out(proxy, connect, in_thread, serve):
    seen = []
    target = serve(lambda conn: seen.append(conn.client_address))
    for show in (True, False):
        client = connect(proxy(show_bound_address=show))
        client.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", target.port))
        reply = in_thread(read, client, 12)[2:]
        host, port = socket.inet_ntoa(reply[4:8]), struct.unpack("!H", reply[8:])[0]
        wait_until(lambda show=show: len(seen) == 2 - show)
        assert (host, port) == (seen[-1] if show else ("0.0.0.0", 0))


def test_requirements_03_04_and_05_passwords(proxy, origin, connect, in_thread, lines):
    server = proxy(
        client_rules=[parse_client_rule("allow from any to any with auth staff")],
        authenticators={"staff": OnePassword()},
    )

    def talk(*messages):
        client = connect(server)
        client.sendall(b"".join(messages))
        client.shutdown(socket.SHUT_WR)
        return in_thread(read, client, 1000)

    good, bad = b"\x01\x03Ada\x02pw", b"\x01\x03Ada\x02PW"
    request = connect_request("127.0.0.1", origin.port)
    assert talk(b"\x05\x01\x00", request) == b"\x05\xff"
    assert talk(b"\x05\x02\x00\x02", bad, request) == b"\x05\x02\x01\x01"
    assert talk(b"\x05\x02\x00\x02", good, request)[:6] == b"\x05\x02\x01\x00\x05\x00"
    assert talk(connect_request("127.0.0.1", origin.port, 4))[:2] == b"\0\x5b"
    assert [line["result"] for line in lines(4)] == ["authentication_failed"] * 2 + ["ok", "authentication_failed"]
    assert [line["user"] for line in lines(4)] == [None, None, "Ada", None]


def test_requirement_06_what_is_not_offered(proxy, connect, in_thread):
    for request, code in [
        (b"\x05\x09\x00\x01\x7f\0\0\x01\0\x50", 7),
        (b"\x05\x01\x00\x07\x7f\0\0\x01\0\x50", 8),
    ]:
        client = connect(proxy())
        client.sendall(b"\x05\x01\x00" + request)
        assert in_thread(read, client, 100)[2:] == bytes([5, code, 0, 1]) + bytes(6)


def test_requirement_07_failures_have_their_replies(proxy, connect, in_thread, lines):
    cases = [("127.0.0.1", free_port(), 5, "refused"), ("10.1.2.3", 80, 2, "destination_denied")]
    cases += [("no-such-host.invalid", 80, 4, "unresolved")]
    server = proxy(timeouts=Timeouts(connect=20))
    for number, (host, port, code, result) in enumerate(cases, 1):
        client = connect(server)
        client.sendall(b"\x05\x01\x00" + connect_request(host, port))
        assert in_thread(read, client, 100)[2:4] == bytes([5, code])
        assert lines(number)[-1]["result"] == result


@pytest.mark.parametrize("host", ["127.1", "localhost", "0.0.0.0", "127.0.0.5"])
def test_requirement_16_the_proxy_does_not_connect_to_itself(proxy, connect, in_thread, lines, host):
    server = proxy(destination_rules=[*ANYWHERE, parse_destination_rule("allow unspecified")])
    client = connect(server)
    client.sendall(b"\x05\x01\x00" + connect_request(host, server.port))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x02"
    assert lines()[0]["result"] == "destination_denied"


def test_requirement_16_by_default_nobody_goes_anywhere_special(proxy, connect, in_thread, origin):
    client = connect(proxy(destination_rules=[parse_destination_rule("allow any")]))
    client.sendall(b"\x05\x01\x00" + connect_request("0x7f.1", origin.port))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x02"


@pytest.mark.slow
def test_requirement_31_negotiation_has_one_deadline_however_slowly_bytes_come(proxy, connect, in_thread, lines):
    server = proxy(timeouts=Timeouts(negotiate=0.2))
    for first in (b"", b"\x05", b"\x05\x01\x00\x05\x01"):
        client = connect(server)
        client.sendall(first)
        in_thread(read, client, 100)
    assert [line["result"] for line in lines(3)] == ["negotiation_timeout"] * 3


def test_requirement_32_ends_and_resets_are_passed_on(proxy, connect, in_thread, serve, lines):
    target = serve(lambda conn: (conn.recv(1), conn.abort()))
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", target.port))
    in_thread(read, client, 12)
    client.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("reset", "by the destination")


def test_clients_that_no_rule_lets_in(proxy, connect, in_thread, lines):
    server = proxy(client_rules=[parse_client_rule("deny 127.0.0.0/8")])
    client = connect(server)
    client.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", 80))
    assert in_thread(read, client, 100) == b"\x05\xff"
    other = connect(server)
    other.sendall(connect_request("127.0.0.1", 80, 4))
    assert in_thread(read, other, 100)[:2] == b"\0\x5b"
    assert [line["detail"] for line in lines(2)] == ["deny 127.0.0.0/8"] * 2


def test_the_user_id_of_socks4_is_noted_as_what_it_is(proxy, origin, connect, in_thread, lines, access_records):
    server = proxy()
    for user in (b"ada\xff =\n", b""):
        client = connect(server)
        client.sendall(connect_request("127.0.0.1", origin.port, 4)[:8] + user + b"\0")
        assert in_thread(read, client, 8)[:2] == b"\0\x5a"
        client.close()
    assert [(line["user"], line["claimed"]) for line in lines(2)] == [(None, "ada\\xff =\n"), (None, None)]
    first, second = [record.getMessage() for record in access_records(2)]
    assert ' claimed="ada\\\\xff =\\n" ' in first
    assert "claimed" not in second


def test_the_line_says_what_took_the_time(proxy, origin, connect, in_thread, access_records):
    class Late(OnePassword):
        def check(self, user, password, client):
            gevent.sleep(0.02)
            return super().check(user, password, client)

    class LateNames(Resolver):
        def resolve(self, *asked):
            gevent.sleep(0.02)
            return super().resolve(*asked)

    names = LateNames()
    server = proxy(
        client_rules=[parse_client_rule("allow from any to any with auth staff")],
        authenticators={"staff": Late()},
        resolver=names,
    )
    client = connect(server)
    client.sendall(b"\x05\x01\x02\x01\x03Ada\x02pw" + connect_request("localhost", origin.port))
    assert in_thread(read, client, 14)[4:6] == b"\x05\x00"
    client.close()
    (record,) = access_records()
    line = record.access
    assert 0.02 <= line["authenticated"] <= line["negotiated"]
    assert 0.02 <= line["resolved"] <= line["opened"]
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", origin.port))
    in_thread(read, client, 12)
    client.close()
    last = access_records(2)[1].getMessage()  # of what there was not, nothing is said
    assert "authenticated" not in last
    assert "resolved" not in last


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00", b"\x05\x00", b"\x05\x01", b"\x04\x01\0"]
)
def test_clients_that_speak_something_else_or_leave(proxy, connect, in_thread, lines, junk):
    client = connect(proxy())
    client.sendall(junk)
    client.shutdown(socket.SHUT_WR)
    in_thread(read, client, 100)
    assert lines()[0]["result"] == "bad_request"


@pytest.mark.slow
def test_many_slow_clients_do_not_keep_a_good_one_out(proxy, origin, connect, in_thread):
    server = proxy()
    slow = [connect(server) for _ in range(400)]
    for sock in slow:
        sock.sendall(b"\x05")
    client = connect(server)
    client.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", origin.port) + b"ping")
    assert in_thread(read, client, 16)[12:] == b"ping"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("option", ["--socks4", "--socks4a", "--socks5", "--socks5-hostname"])
def test_curl(proxy, serve, in_thread, option):
    content = b"x" * 1_000_000
    head = b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    target = serve(lambda conn: (conn.recv_until(b"\r\n\r\n"), conn.sendall(head + content)))
    command = ["curl", "-4sS", "--noproxy", "", option, proxy().address, f"http://localhost:{target.port}/"]
    done = in_thread(lambda: subprocess.run(command, capture_output=True, timeout=SOON))
    assert (done.stderr, done.stdout == content) == (b"", True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_with_a_password(proxy, serve, in_thread):
    target = serve(lambda conn: (conn.recv_until(b"\r\n\r\n"), conn.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")))
    server = proxy(
        client_rules=[parse_client_rule("allow from any to any with auth staff")],
        authenticators={"staff": OnePassword()},
    )

    def curl(user):
        command = ["curl", "-4sS", "--socks5", server.address, "--proxy-user", user, f"http://localhost:{target.port}/"]
        return subprocess.run(command, capture_output=True, timeout=SOON)

    assert in_thread(curl, "Ada:pw").stdout == b"hello"
    assert in_thread(curl, "Ada:no").returncode == 97  # CURLE_PROXY


# -- BIND --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
def test_requirement_12_bind_tells_where_it_listens_and_who_has_come(proxy, connect, in_thread, lines, version):
    client = connect(proxy())
    size = 8 if version == 4 else 10
    if version == 5:
        client.sendall(b"\x05\x01\x00")
        in_thread(read, client, 2)
    client.sendall(bind_request(version=version))
    where = named_address(in_thread(read, client, size))
    assert where[0] == "127.0.0.1"
    with in_thread(socket.create_connection, where, SOON) as peer:
        assert named_address(in_thread(read, client, size)) == peer.getsockname()
        peer.sendall(b"from the peer")
        assert in_thread(read, client, 13) == b"from the peer"
        client.sendall(b"back")
        assert in_thread(read, peer, 4) == b"back"
    client.close()
    assert (lines()[0]["command"], lines()[0]["result"], lines()[0]["received"]) == ("BIND", "ok", 13)


def test_requirement_12_strangers_are_turned_away(proxy, connect, in_thread):
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00" + bind_request("127.0.0.5"))
    where = named_address(in_thread(read, client, 12)[2:])
    with in_thread(socket.create_connection, where, SOON) as stranger:
        assert in_thread(stranger.recv, 10) == b""
    with socket.socket() as peer:
        peer.bind(("127.0.0.5", 0))
        in_thread(peer.connect, where)
        assert named_address(in_thread(read, client, 10))[0] == "127.0.0.5"


def test_requirement_12_bind_ends_in_time_and_with_the_control_connection(proxy, connect, in_thread, lines):
    server = proxy(timeouts=Timeouts(connect=0.1))
    client = connect(server)
    client.sendall(b"\x05\x01\x00" + bind_request())
    assert in_thread(read, client, 100)[12:14] == b"\x05\x01"
    server = proxy()
    client = connect(server)
    client.sendall(b"\x05\x01\x00" + bind_request())
    where = named_address(in_thread(read, client, 12)[2:])
    client.close()
    assert [line["detail"] for line in lines(2)] == ["nobody connected within 0.1 seconds", "the client left"]
    with pytest.raises(ConnectionRefusedError):
        in_thread(socket.create_connection, where, SOON)


def test_requirement_12_rules_hold_for_bind(proxy, connect, in_thread, lines):
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00" + bind_request("10.0.0.1"))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x02"
    assert lines()[0]["result"] == "destination_denied"


def test_ftp_in_active_mode_through_bind(proxy, connect, in_thread, serve):
    """A real use: the server of a file transfer connects back to where the client says."""
    data = b"x" * 500_000

    def ftp_server(conn):
        conn.sendall(b"220 ready\r\n")
        host = port = None
        while line := conn.recv_until(b"\r\n"):
            if line.startswith(b"PORT"):
                *numbers, high, low = map(int, line[5:].split(b","))
                host, port = ".".join(map(str, numbers)), high * 256 + low
                conn.sendall(b"200 ok\r\n")
            elif line.startswith(b"RETR"):
                conn.sendall(b"150 opening\r\n")
                with gevent.socket.create_connection((host, port)) as back:
                    back.sendall(data)
                conn.sendall(b"226 done\r\n")
            else:
                conn.sendall(b"221 bye\r\n")
                return

    target, server = serve(ftp_server), proxy()
    control = connect(server)
    control.sendall(b"\x05\x01\x00" + connect_request("127.0.0.1", target.port))
    in_thread(read, control, 12)
    replies = control.makefile("rb")
    assert in_thread(replies.readline) == b"220 ready\r\n"
    transfer = connect(server)
    transfer.sendall(b"\x05\x01\x00" + bind_request())
    host, port = named_address(in_thread(read, transfer, 12)[2:])
    control.sendall(f"PORT {host.replace('.', ',')},{port >> 8},{port & 255}\r\nRETR file\r\n".encode())
    in_thread(read, transfer, 10)
    assert in_thread(read, transfer, len(data) + 1) == data
    assert [in_thread(replies.readline)[:3] for _ in range(3)] == [b"200", b"150", b"226"]
    replies.close()


# -- UDP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def udp_echo():
    """The port of a UDP server that sends everything back, and the addresses it has heard from."""
    sock = gevent.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    heard = []

    def run():
        while True:
            data, source = sock.recvfrom(65535)
            heard.append(source)
            sock.sendto(data, source)

    greenlet = gevent.spawn(run)
    yield sock.getsockname()[1], heard
    greenlet.kill()
    sock.close()


def test_requirement_13_datagrams_there_and_back_until_the_connection_ends(proxy, connect, in_thread, udp_echo, lines):
    client = connect(proxy())
    where = associate(client, in_thread)
    with udp_socket() as sock:
        sock.sendto(packet(udp_echo[0], b"question"), where)
        assert sock.recvfrom(1000) == (packet(udp_echo[0], b"question"), where)
        sock.sendto(b"\0\0\0\x03\x09localhost" + struct.pack("!H", udp_echo[0]) + b"by name", where)
        assert sock.recv(1000)[10:] == b"by name"
        client.close()
        assert (lines()[0]["command"], lines()[0]["sent"], lines()[0]["received"]) == ("UDP_ASSOCIATE", 15, 15)
        sock.settimeout(0.05)
        sock.sendto(packet(udp_echo[0], b"too late"), where)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            sock.recv(1000)


def test_requirement_13_fragments_strangers_and_what_is_not_allowed_are_dropped(proxy, connect, in_thread, udp_echo):
    port, heard = udp_echo
    client = connect(proxy())
    where = associate(client, in_thread)
    with udp_socket() as sock, udp_socket() as stranger, udp_socket() as third:
        stranger.sendto(b"junk", where)  # from the client's address: it is taken for the client's port
        sock.settimeout(0.05)
        sock.sendto(packet(port, b"x"), where)
        with pytest.raises(TimeoutError):
            sock.recv(1000)
        stranger.sendto(packet(port, b"x", fragment=1), where)
        stranger.sendto(packet(port, b"x", host="10.0.0.1"), where)
        stranger.sendto(packet(port, b"at last"), where)
        assert stranger.recv(1000)[10:] == b"at last"
        assert len(heard) == 1
        third.sendto(b"unasked", heard[0])  # to the proxy's own socket, by somebody the client has not written to
        third.sendto(b"unasked", ("127.0.0.1", heard[0][1]))
        stranger.settimeout(0.05)
        with pytest.raises(TimeoutError):
            stranger.recv(1000)


def test_an_association_ends_when_nothing_moves(proxy, connect, in_thread, lines):
    client = connect(proxy(timeouts=Timeouts(idle=0.05)))
    associate(client, in_thread)
    assert in_thread(client.recv, 10) == b""
    assert lines()[0]["result"] == "idle"
