"""Behind a balancer: the PROXY header in front of a connection, from trusted networks alone."""

import os
import shutil
import socket
import ssl
import subprocess
from ipaddress import ip_address
from pathlib import Path

import gevent
import pytest
import trustme

from gtcpserver import ConfigError, ProxyProtocol, TLSConfig
from gtcpserver.forwarder import Forwarder
from gtcpserver.proxy_protocol.header import LONGEST_V2, ProxyHeader, Transport, Type
from kit.clients import converse
from kit.commands import run_command
from kit.patience import SOON
from kit.ports import free_port
from kit.waiting import wait_for_port, wait_until

CLIENT = (ip_address("192.0.2.7"), 1234), (ip_address("198.51.100.1"), 443)
V1 = ProxyHeader(*CLIENT, version=1).to_bytes()
V2 = ProxyHeader(*CLIENT).to_bytes(checksum=True)
V6 = ProxyHeader((ip_address("2001:db8::7"), 1234), (ip_address("2001:db8::1"), 443)).to_bytes()
LOCAL = ProxyHeader(local=True, transport=Transport.UNSPECIFIED).to_bytes()

HERE = ProxyProtocol(["127.0.0.0/8"], timeout=SOON)


def who(conn):
    """Tells the client whom it is taken for, then sends back what it sends."""
    name, peer = conn.client_address, conn.peer_address
    conn.sendall(f"{name[0]} {name[1]} {peer[0] if peer else '-'} {conn.proxy_header is not None}\n".encode())
    while data := conn.recv(1000):
        conn.sendall(data)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (V1, b"192.0.2.7 1234 127.0.0.1 True\n"),
        (V2, b"192.0.2.7 1234 127.0.0.1 True\n"),
        (V6, b"2001:db8::7 1234 127.0.0.1 True\n"),
    ],
)
def test_the_client_is_whom_the_header_names(serve, connect, in_thread, header, name):
    server = serve(who, proxy_protocol=HERE)
    assert in_thread(converse, connect(server), header + b"hello") == name + b"hello"
    assert server.stats().proxy_header_failures == {}


@pytest.mark.parametrize("header", [LOCAL, b"PROXY UNKNOWN ffff::1 x 1 2\r\n"])
def test_a_balancer_on_its_own_account_is_the_client(serve, connect, in_thread, header):
    client = connect(serve(who, proxy_protocol=HERE))
    port = client.getsockname()[1]
    assert in_thread(converse, client, header + b"x") == f"127.0.0.1 {port} 127.0.0.1 True\nx".encode()


@pytest.mark.parametrize("header", [V1, V2])
def test_a_header_may_come_byte_by_byte(serve, connect, in_thread, header):
    client = connect(serve(who, proxy_protocol=HERE))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(len(header)):
        client.sendall(header[at : at + 1])
        gevent.sleep(0)
    assert in_thread(converse, client, b"hello") == b"192.0.2.7 1234 127.0.0.1 True\nhello"


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "invalid"),
        (b"PROXY TCP4 1.2.3.4", "invalid"),
        (b"PROXY TCP4 " + b"1" * 200, "invalid"),
        (V2[:14] + (LONGEST_V2).to_bytes(2, "big"), "invalid"),
        (V2[:-1] + b"\0", "invalid"),
        (b"", "invalid"),
    ],
)
def test_without_a_good_header_a_balancer_is_not_served(serve, connect, in_thread, sent, kind):
    server = serve(who, proxy_protocol=HERE)
    client = connect(server)
    try:
        assert in_thread(converse, client, sent) == b""
    except ConnectionResetError:
        pass  # closed with input unread
    assert server.stats().proxy_header_failures == {kind: 1}
    assert server.stats().active == 0


@pytest.mark.slow
def test_a_header_has_its_time_however_slowly_bytes_come(serve, connect, in_thread):
    server = serve(who, proxy_protocol=ProxyProtocol(["127.0.0.1"], timeout=0.2))
    silent, slow = connect(server), connect(server)
    for at in range(4):
        slow.sendall(V1[at : at + 1])
        gevent.sleep(0.07)
    for client in (silent, slow):
        try:
            assert in_thread(client.recv, 100) == b""
        except ConnectionResetError:
            pass
    assert server.stats().proxy_header_failures == {"timeout": 2}


def test_who_is_not_trusted_is_a_client_and_may_claim_nothing(serve, connect, in_thread):
    server = serve(who, proxy_protocol=ProxyProtocol(["10.0.0.0/8", "::1"]))
    client = connect(server)
    port = client.getsockname()[1]
    assert in_thread(converse, client, V1) == f"127.0.0.1 {port} 127.0.0.1 False\n".encode() + V1


def test_a_unix_socket_can_be_trusted(serve, connect, in_thread, tmp_path):
    server = serve(who, f"unix:{tmp_path}/x", proxy_protocol=ProxyProtocol("unix"))
    client = connect(server)
    client.sendall(V1)
    assert in_thread(client.recv, 100).startswith(b"192.0.2.7 1234 ")


@pytest.mark.slow
def test_the_header_comes_before_tls(serve, connect, in_thread, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "x")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    server = serve(who, proxy_protocol=HERE, tls=TLSConfig(tmp_path / "x"))

    def ask(client, header):
        client.sendall(header)
        with trust.wrap_socket(client, server_hostname="localhost") as encrypted:
            encrypted.sendall(b"hello")
            data = b""
            while not data.endswith(b"hello"):
                data += encrypted.recv(100)
            return data

    for header in (V1, V2):
        assert in_thread(ask, connect(server), header) == b"192.0.2.7 1234 127.0.0.1 True\nhello"
    with pytest.raises(OSError):
        in_thread(ask, connect(server), b"")
    wait_until(lambda: server.stats().proxy_header_failures == {"invalid": 1})
    assert (server.stats().handshaking, server.stats().handshake_failures) == (0, {})


def test_a_stop_serves_those_whose_header_is_on_its_way(serve, connect, in_thread):
    server = serve(who, proxy_protocol=HERE)
    client = connect(server)
    client.sendall(V1[:5])
    wait_until(lambda: server.stats().proxy_headers_awaited == 1)
    stopping = gevent.spawn(server.stop, SOON)
    wait_until(lambda: server.stopping)
    assert in_thread(converse, client, V1[5:] + b"x") == b"192.0.2.7 1234 127.0.0.1 True\nx"
    assert stopping.get(timeout=SOON).finished == 1


def test_a_thousand_silent_ones_do_not_take_the_places_of_handlers(serve, connect, in_thread):
    server = serve(who, proxy_protocol=HERE, pool=2)
    silent = [connect(server) for _ in range(100)]
    assert in_thread(converse, connect(server), V1 + b"x").endswith(b"x")
    assert server.stats().proxy_headers_awaited == len(silent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trusted": []}, "trusted must name at least one network of balancers, got none"),
        ({"trusted": ["10.0.0.0/33"]}, "trusted must be networks, addresses or \"unix\", got '10.0.0.0/33'"),
        ({"trusted": ["10.0.0.1/8"]}, "has host bits set"),
        ({"trusted": "10.0.0.1", "timeout": 0}, "timeout must be a number, more than 0, got 0"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ConfigError) as raised:
        ProxyProtocol(**options)
    assert message in str(raised.value)


@pytest.mark.slow
def test_the_command_line_tells_it_too():
    for arguments, message in (
        (["--proxy-protocol", "x"], "--proxy-protocol: must be networks, addresses or \"unix\", got 'x'"),
        (["--proxy-protocol-timeout", "3"], "--proxy-protocol-timeout: needs --proxy-protocol"),
        (["--client-connections", "0"], "--client-connections: must be a whole number from 1"),
        (["--client-deny", "x"], "--client-deny: must be networks or addresses, got 'x'"),
        (["--client-burst", "3"], "--client-burst: must come together with new_per_second"),
    ):
        done = run_command("echo", "--bind", "127.0.0.1:0", *arguments)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(serve, in_thread):
    def http(conn):
        conn.recv_until(b"\r\n\r\n")
        text = conn.client_address[0].encode()
        conn.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text)

    server = serve(http, proxy_protocol=HERE)
    command = ["curl", "--silent", "--show-error", "--max-time", "10", f"http://{server.address}/"]
    more = ["--haproxy-protocol", "--haproxy-clientip", "192.0.2.9"]
    help_text = subprocess.run(["curl", "--help", "all"], capture_output=True, text=True).stdout
    if "--haproxy-clientip" not in help_text:
        more, expected = ["--haproxy-protocol"], "127.0.0.1"
    else:
        expected = "192.0.2.9"
    done = in_thread(lambda: subprocess.run([*command, *more], capture_output=True, text=True, timeout=SOON))
    assert done.stdout == expected, done.stderr
    assert in_thread(lambda: subprocess.run(command, capture_output=True, timeout=SOON)).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id,crc32c"])
def test_haproxy(serve, connect, in_thread, tmp_path, option):
    seen = []

    def note(conn):
        seen.append((conn.client_address, conn.proxy_header))
        conn.sendall(conn.recv(10))

    server = serve(note, proxy_protocol=HERE)
    port = free_port()
    unique = "  unique-id-format %rt\n" if "unique-id" in option else ""
    (tmp_path / "cfg").write_text(
        f"defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n"
        f"listen x\n  bind 127.0.0.1:{port}\n{unique}  server a {server.address} {option}\n"
    )
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", str(tmp_path / "cfg")], stderr=subprocess.DEVNULL)
    try:

        def through():
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), SOON) as client:
                        name = client.getsockname()
                        client.sendall(b"hello")
                        return name, client.recv(10)
                except ConnectionRefusedError:
                    assert haproxy.poll() is None

        name, answer = in_thread(through)
        assert answer == b"hello"
        assert seen[0][0] == name
        assert seen[0][1].destination == (ip_address("127.0.0.1"), port)
    finally:
        haproxy.kill()
        haproxy.wait()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_forwarder_names_its_clients(serve, connect, in_thread, version):
    target = serve(who, proxy_protocol=HERE)
    middle = serve(Forwarder([target.address], send_proxy=version), proxy_protocol=HERE)
    client = connect(serve(Forwarder([middle.address], send_proxy=version)))
    port = client.getsockname()[1]
    assert in_thread(converse, client, b"hello") == f"127.0.0.1 {port} 127.0.0.1 True\nhello".encode()


@pytest.mark.slow
@pytest.mark.parametrize("certificate", [False, True])
def test_a_forwarder_tells_what_it_knows_of_the_clients_tls(certificate, serve, connect, in_thread, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "x")
    authority.cert_pem.write_to_path(tmp_path / "ca")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    trust.set_alpn_protocols(["h2"])
    if certificate:
        authority.issue_cert("ada@example.com", common_name="Ada").configure_cert(trust)
    seen, agreed = [], []
    target = serve(lambda conn: seen.append(conn.proxy_header), proxy_protocol=HERE)
    tls = TLSConfig(tmp_path / "x", alpn=("h2",), client_auth="optional", client_ca=tmp_path / "ca")
    server = serve(Forwarder([target.address], send_proxy="v2"), tls=tls)

    def ask(session=None):
        with trust.wrap_socket(connect(server), server_hostname="localhost", session=session) as encrypted:
            assert encrypted.recv(1) == b""
            agreed.append((encrypted.version(), encrypted.cipher()[0]))
            assert encrypted.session_reused is (session is not None)
            return encrypted.session

    session = in_thread(ask)
    in_thread(ask, session)
    assert (seen[0].authority, seen[0].alpn) == ("localhost", b"h2")
    assert seen[0].destination == (ip_address("127.0.0.1"), server.port)
    told = [header.tls for header in seen]
    assert [(one.text(Type.SSL_VERSION), one.text(Type.SSL_CIPHER)) for one in told] == agreed
    assert [one.text(Type.SSL_CN) for one in told] == 2 * ["Ada" if certificate else None]
    assert [one.has_certificate for one in told] == 2 * [certificate]
    # Section 2.2.6: by TLS; a certificate in this connection; one in this session.
    assert [one.client for one in told] == ([1 | 2 | 4, 1 | 4] if certificate else [1, 1])


NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; {modules}
events {{ }}
http {{
    access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port";
    }}
}}
{stream}
"""


@pytest.fixture
def nginx(tmp_path):
    """`nginx(stream="...", at=PORT)` starts one whose HTTP port wants the PROXY protocol, and returns that port."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    processes = []

    def start(stream="", modules="", at=None):
        port = free_port()
        user = "user root; " if os.getuid() == 0 else ""
        text = NGINX.format(folder=tmp_path, port=port, stream=stream, modules=user + modules)
        (tmp_path / "conf").write_text(text)
        processes.append(subprocess.Popen(["nginx", "-c", f"{tmp_path}/conf", "-e", f"{tmp_path}/log"]))
        for one in (port, at or port):  # it listens on one after the other
            wait_for_port(one, processes[0])
        return port

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nginx_understands_a_forwarder(nginx, serve, connect, in_thread, version):
    server = serve(Forwarder([f"127.0.0.1:{nginx()}"], send_proxy=version))
    client = connect(server)
    answer = in_thread(converse, client, b"GET / HTTP/1.0\r\n\r\n")
    assert answer.endswith(f"\r\n\r\n127.0.0.1 {client.getsockname()[1]} {server.port}".encode())


def test_nginx_as_the_balancer(nginx, serve, connect, in_thread):
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    if not module.exists():
        pytest.skip("nginx has no stream module (libnginx-mod-stream)")
    server = serve(who, proxy_protocol=HERE)
    port = free_port()
    options = "proxy_protocol on; proxy_half_close on;"
    stream = f"stream {{ server {{ listen 127.0.0.1:{port}; proxy_pass {server.address}; {options} }} }}"
    in_thread(nginx, stream, f"load_module {module};", port)
    client = connect(f"127.0.0.1:{port}")
    name = client.getsockname()[1]
    assert in_thread(converse, client, b"hello") == f"127.0.0.1 {name} 127.0.0.1 True\nhello".encode()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_haproxys_health_checks_are_its_own(serve, in_thread, tmp_path):
    """They are LOCAL: the client is haproxy itself, and its header is no fault."""
    seen = []
    server = serve(lambda conn: seen.append((conn.proxy_header, conn.client_address)), proxy_protocol=HERE)
    (tmp_path / "cfg").write_text(
        "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n  timeout check 5s\n"
        f"listen x\n  bind 127.0.0.1:{free_port()}\n  option tcp-check\n  tcp-check connect send-proxy\n"
        f"  server a {server.address} send-proxy-v2 check inter 100ms\n"
    )
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", str(tmp_path / "cfg")], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(seen) >= 2)
    finally:
        haproxy.kill()
        haproxy.wait()
    assert all(header.local and header.source is None for header, _ in seen)
    assert {address[0] for _, address in seen} == {"127.0.0.1"}
    assert server.stats().proxy_header_failures == {}


def test_clients_by_a_unix_socket_are_unknown(serve, connect, in_thread, tmp_path):
    target = serve(who, proxy_protocol=HERE)
    for version in ("v1", "v2"):
        server = serve(Forwarder([target.address], send_proxy=version), f"unix:{tmp_path}/{version}")
        answer = in_thread(converse, connect(server), b"x")
        assert answer.startswith(b"127.0.0.1 ")
        assert answer.endswith(b" 127.0.0.1 True\nx")


def test_a_version_that_is_none():
    with pytest.raises(ConfigError, match='send_proxy must be "v1" or "v2", or None for no header, got 2'):
        Forwarder(["127.0.0.1:1"], send_proxy=2)
