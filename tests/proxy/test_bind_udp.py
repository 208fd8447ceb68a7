"""BIND and UDP ASSOCIATE: clients that leave, peers that reset, addresses out of reach, unix sockets."""

import socket
import ssl
import struct
from ipaddress import ip_address

import gevent
import gevent.socket
import pytest
import trustme

from gtcpserver import ListenConfig, TLSConfig
from gtcpserver.proxy import socks_bind, socks_session
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from kit.clients import read
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, associate, bind_request, named_address, packet, udp_socket


@pytest.fixture
def proxy(serve):
    def start(address="127.0.0.1:0", tls=None, **options):
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})
        return serve(ProxyHandler(gate, tls=tls), address)

    return start


@pytest.fixture
def bound(in_thread):
    """`bound(client)` asks for BIND; where the proxy listens."""

    def ask(client, host="127.0.0.1"):
        client.sendall(b"\x05\x01\x00" + bind_request(host))
        return named_address(in_thread(read, client, 12)[2:])

    return ask


def has_reset(where):
    """Connect, and reset before anybody can have accepted it: our own event loop stands still meanwhile."""
    with socket.create_connection(where, SOON) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return peer.getsockname()


# -- BIND --------------------------------------------------------------------------------------------------------------


def test_requirement_12_a_peer_that_resets_at_once_is_named_in_the_second_reply(
    proxy, connect, in_thread, bound, lines
):
    client = connect(proxy())
    peer = has_reset(bound(client))
    assert named_address(in_thread(read, client, 10)) == peer
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    assert (lines()[0]["result"], lines()[0]["connected"]) == ("reset", f"127.0.0.1:{peer[1]}")


@pytest.fixture(params=["in plain text", "over TLS"])
def client(request, proxy, connect, in_thread, tmp_path):
    """A client of a proxy."""
    if request.param == "in plain text":
        return connect(proxy())
    ca = trustme.CA()
    ca.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    context = ssl.create_default_context()
    ca.configure_trust(context)
    plain = connect(proxy(tls=TLSConfig(tmp_path / "server.pem")))
    return in_thread(lambda: context.wrap_socket(plain, server_hostname="localhost"))


@pytest.mark.parametrize("early", [0, 5, 50_000])
def test_requirement_12_bind_ends_with_the_control_connection(client, in_thread, bound, lines, early):
    where = bound(client)
    in_thread(client.sendall, b"x" * early)
    client.close()
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("client_left", "the client left")
    with pytest.raises(ConnectionRefusedError):
        in_thread(socket.create_connection, where, SOON)


def test_requirement_01_what_is_sent_before_the_peer_has_come_reaches_it(client, in_thread, spawn_thread, bound):
    early = bytes(range(256)) * (socks_bind.MOST_EARLY // 32)
    where = bound(client)
    sending = spawn_thread(client.sendall, early)
    with in_thread(socket.create_connection, where, SOON) as peer:
        assert named_address(in_thread(read, client, 10)) == peer.getsockname()
        assert in_thread(read, peer, len(early)) == early
        sending.get(timeout=SOON)


def test_requirement_38_bind_probes_its_peer_as_clients_are_probed(proxy, connect, in_thread, bound, monkeypatch):
    seen = []
    tunnel = socks_session.tunnel

    def look(conn, upstream, visitor):
        seen.append([upstream.getsockopt(*option) for option in KEEP_ALIVE])
        tunnel(conn, upstream, visitor)

    monkeypatch.setattr(socks_session, "tunnel", look)
    client = connect(proxy())
    with in_thread(socket.create_connection, bound(client), SOON):
        in_thread(read, client, 10)
    config = ListenConfig()
    expected = [1, config.keepalive_idle, config.keepalive_interval, config.keepalive_count, 1]
    assert seen == [expected]


KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
]


def test_requirement_38_bind_listens_on_no_address_but_those_of_external(proxy, connect, in_thread, bound, lines):
    client = connect(proxy(external=[ip_address("::1")]))
    client.sendall(b"\x05\x01\x00" + bind_request())
    assert in_thread(read, client, 100)[2:] == b"\x05\x03\x00\x01" + bytes(6)
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("unreachable", "no address of the families in external")
    assert bound(connect(proxy(external=[ip_address("127.0.0.9")])))[0] == "127.0.0.9"


def test_requirement_12_bind_names_the_reason_of_a_refusal(proxy, connect, in_thread, lines):
    client = connect(proxy())
    client.sendall(b"\x05\x01\x00\x05\x02\x00\x03\x0fno-such.invalid\x00\x00")
    assert in_thread(read, client, 100)[2:4] == b"\x05\x04"
    assert lines()[0]["result"] == "unresolved"


# -- UDP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """`heard(host)`: the port of a UDP server on a loopback address that sends back what comes, and what has come."""
    started = []

    def start(host):
        sock = gevent.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        came = []

        def run():
            while True:
                data, source = sock.recvfrom(1000)
                came.append((data, source[0]))
                sock.sendto(data, source)

        started.append((sock, gevent.spawn(run)))
        return sock.getsockname()[1], came

    yield start
    for sock, greenlet in started:
        greenlet.kill()
        sock.close()


def test_requirement_38_datagrams_leave_by_no_address_but_those_of_external(proxy, connect, in_thread, heard):
    (port4, came4), (port6, came6) = heard("127.0.0.1"), heard("::1")
    where = associate(connect(proxy(external=[ip_address("::1")])), in_thread)
    with udp_socket() as sock:
        sock.sendto(packet(port4, b"past external"), where)
        sock.sendto(b"\0\0\0\x04" + ip_address("::1").packed + struct.pack("!H", port6) + b"by it", where)
        assert sock.recv(1000)[22:] == b"by it"
    assert (came4, came6) == ([], [(b"by it", "::1")])


def test_requirement_38_a_name_is_reached_at_an_address_that_external_reaches(proxy, connect, in_thread, heard):
    class Both:
        def resolve(self, name):
            return ip_address("::1"), ip_address("127.0.0.1")

        def close(self):
            pass

    port, came = heard("127.0.0.1")
    server = proxy(external=[ip_address("127.0.0.9")], resolver=Both())
    where = associate(connect(server), in_thread)
    with udp_socket() as sock:
        sock.sendto(b"\0\0\0\x03\x04both" + struct.pack("!H", port) + b"x", where)
        assert sock.recv(1000)[10:] == b"x"
    assert came == [(b"x", "127.0.0.9")]


@pytest.mark.parametrize("name", ["unix:{}/proxy", "unix:@gtcpserver-{}"])
def test_requirement_06_udp_is_not_offered_by_a_unix_socket(proxy, connect, in_thread, lines, tmp_path, name):
    client = connect(proxy(name.format(tmp_path)))
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
    assert in_thread(read, client, 100)[2:] == b"\x05\x07\x00\x01" + bytes(6)
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("bad_request", "UDP ASSOCIATE by a unix socket")


def test_bind_and_connect_work_by_a_unix_socket(proxy, connect, in_thread, bound, tmp_path):
    client = connect(proxy(f"unix:{tmp_path}/proxy"))
    with in_thread(socket.create_connection, bound(client), SOON) as peer:
        assert named_address(in_thread(read, client, 10)) == peer.getsockname()


def test_a_dual_stack_listener_associates_ipv4_clients(proxy, connect, in_thread, heard):
    port, came = heard("127.0.0.1")
    server = proxy("[::]:0")
    client = socket.create_connection(("127.0.0.1", server.port), SOON)
    with client, udp_socket() as sock:
        sock.sendto(packet(port, b"x"), associate(client, in_thread))
        assert sock.recv(1000)[10:] == b"x"
    assert len(came) == 1
