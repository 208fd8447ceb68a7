"""Other proxies by TLS, SOCKS4, SOCKS4a and Unix sockets."""

import hashlib
import os
import socket
import subprocess
import textwrap

import pytest

from gtcpserver import ConfigError, TLSConfig
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.errors import ProtocolError
from gtcpserver.proxy.gate import Gate, Timeouts
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.socks4 import connect_request, hops_in, parse_request, user_of_hops
from gtcpserver.proxy.target import make_target
from gtcpserver.proxy.upstream import UnixPath
from gtcpserver.proxy.upstream_url import make_tls_context, parse_upstream
from kit.clients import read
from kit.forwarding import OK
from kit.handlers import echo
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.proxying import ANYBODY, ANYWHERE, QUICK, http, reply, socks
from kit.sshd import PROGRAMS, sshd
from kit.tls import Files
from kit.tls import read as content
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(files):
    return files.issue("proxy", "proxy.test", "127.0.0.1")


@pytest.fixture
def far(serve, pair, tmp_path):
    """`far(scheme)`: the URL of another proxy that goes everywhere, and what parse_upstream needs beside it."""
    made = []

    def start(scheme, **gate):
        unix = scheme.startswith("unix+")
        scheme = scheme.removeprefix("unix+")
        tls = TLSConfig(*pair) if scheme == "https" else None
        handler = ProxyHandler(Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, **gate), tls=tls)
        where = f"unix:{tmp_path}/far-{len(made)}" if unix else "127.0.0.1:0"
        server = serve(handler, where)
        made.append(server)
        return f"{scheme}://{where if unix else f'127.0.0.1:{server.port}'}"

    return start


@pytest.fixture
def up(far, files):
    """`up(scheme)`: an upstream of that kind."""

    def make(scheme, **options):
        if scheme.endswith("https"):
            options.setdefault("tls", make_tls_context(content(files.ca_file)))
            options.setdefault("tls_name", "proxy.test")
        return parse_upstream("up", far(scheme), **options)

    return make


KINDS = ["https", "socks4", "socks4a", "unix+socks5", "unix+socks4a", "unix+http", "unix+https"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tunnel(up, proxy_by, serve, connect, in_thread, lines, kind):
    origin = serve(echo)
    client = connect(proxy_by(up(kind)))
    assert in_thread(reply, client, socks(origin.port)) == 0
    for data in (b"hello", bytes(300_000)):
        client.sendall(data)
        assert in_thread(read, client, len(data)) == data
    client.shutdown(socket.SHUT_WR)
    assert in_thread(client.recv, 1) == b""
    assert {line["upstream"] for line in lines(2)} == {None, "up"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal(up, proxy_by, connect, in_thread, lines, kind):
    code = in_thread(reply, connect(proxy_by(up(kind))), socks(free_port()))
    if "socks4" in kind:
        assert code == 1  # SOCKS4 has one word for all
        assert "upstream up says: rejected" in [line["detail"] for line in lines(2)]
    else:
        assert code in (4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_the_other_proxy_looks_up(up, proxy_by, serve, connect, in_thread, kind):
    if kind == "socks4":
        with pytest.raises(ConfigError, match="SOCKS4 has no names"):
            up(kind, resolve="there")
        return
    origin = serve(echo)
    client = connect(proxy_by(up(kind, resolve="there")))
    assert in_thread(reply, client, socks(origin.port, host="localhost")) == 0


@pytest.mark.parametrize("kind", ["https", "unix+http", "unix+https"])
@pytest.mark.parametrize("size", [5, 3_000_000])
def test_requests_are_forwarded_over_one_connection(up, proxy_by, connect, in_thread, origin, kind, size):
    body = bytes(range(256)) * (size // 256 + 1)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    to = origin(answer, answer, answer)
    server = proxy_by(up(kind, resolve="there"))
    client = connect(server)

    def ask():
        client.sendall(f"GET {to.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert head.count(b"Via: ") + head.count(b"via: ") >= 1
        return hashlib.sha256(read(client, len(body))).digest()

    for _ in range(3):
        assert in_thread(ask) == hashlib.sha256(body).digest()
    assert to.accepted_connections == 1


def test_an_upload_through_tls(up, proxy_by, serve, connect, in_thread):
    got = []

    def take(conn):
        conn.recv_until(b"\r\n\r\n")
        got.append(conn.recv_exactly(2_000_000))
        conn.sendall(OK)

    origin = serve(take)
    client = connect(proxy_by(up("https", resolve="there")))
    head = f"POST http://127.0.0.1:{origin.port}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    assert in_thread(http, client, head.encode() + b"x" * 2_000_000).startswith(b"HTTP/1.1 200")
    assert got == [b"x" * 2_000_000]


@pytest.mark.parametrize("user", ["ada", "someone"])
def test_our_name_and_password_go_through_tls(proxy, proxy_by, serve, pair, files, connect, in_thread, user):
    certfile, keyfile = pair
    far = proxy(
        f'[auth.users]\nusers = {{ada = "{QUICK}"}}',
        listener=f'tls_certfile = "{certfile}"\ntls_keyfile = "{keyfile}"',
        rules='[rules]\nclients = ["allow from any to any with auth users"]\n'
        'destinations = ["allow loopback", "allow any"]\n',
    )
    context = make_tls_context(content(files.ca_file))
    near = proxy_by(parse_upstream("up", f"https://{user}:pw@127.0.0.1:{far.port}", tls=context))
    code = in_thread(reply, connect(near), socks(serve(echo).port))
    assert code == (0 if user == "ada" else 1)


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["no-ca", "other-name", "no-tls"])
def test_a_certificate_that_is_not_the_proxy_s(far, files, proxy_by, connect, in_thread, lines, what):
    trusted = make_tls_context(content(files.ca_file))
    url = far("http" if what == "no-tls" else "https").replace("http:", "https:")
    one = parse_upstream(
        "up", url, tls=None if what == "no-ca" else trusted, tls_name="other.test" if what == "other-name" else None
    )
    assert in_thread(reply, connect(proxy_by(one)), socks(80)) == 1
    line = next(line for line in lines(2) if line["upstream"])
    assert line["result"] == "upstream_failed"
    told = {
        "no-ca": "its certificate is not accepted: unable to get local issuer certificate",
        "other-name": "its certificate is not accepted: Hostname mismatch",
        "no-tls": "",
    }[what]
    assert line["detail"].startswith(f"upstream up cannot be reached: {told}")


def test_a_certificate_may_be_trusted_itself(far, pair, proxy_by, serve, connect, in_thread):
    context = make_tls_context(content(pair[0]))
    near = proxy_by(parse_upstream("up", far("https"), tls=context))
    assert in_thread(reply, connect(near), socks(serve(echo).port)) == 0


def test_a_chain_with_tls_at_its_end_and_at_its_beginning(far, files, proxy_by, serve, connect, in_thread):
    context = make_tls_context(content(files.ca_file))
    origin = serve(echo)
    for schemes in (("https", "socks5"), ("socks5", "https"), ("unix+http", "https"), ("https", "socks4")):
        first, second = (
            {"tls": context, "tls_name": "proxy.test"} if scheme.endswith("https") else {} for scheme in schemes
        )
        before = parse_upstream("before", far(schemes[0]), **first)
        near = proxy_by(parse_upstream("up", far(schemes[1]), before, **second))
        client = connect(near)
        assert in_thread(reply, client, socks(origin.port)) == 0
        client.sendall(b"hello")
        assert in_thread(read, client, 5) == b"hello"


def test_a_silent_proxy_has_the_time_of_a_connection(serve, files, connect, in_thread, proxy_by):
    silent = serve(lambda conn: conn.recv(1000) and conn.recv(1))
    one = parse_upstream("up", f"https://127.0.0.1:{silent.port}", tls=make_tls_context())
    near = proxy_by(one, timeouts=Timeouts(connect=0.3))
    assert in_thread(reply, connect(near), socks(80)) == 1  # as for one that cannot be connected to
    wait_until(lambda: not silent.active_connections)


# -- SOCKS4 ------------------------------------------------------------------------------------------------------------


def test_socks4_goes_to_ipv4_alone(up, proxy_by, connect, in_thread, lines):
    near = proxy_by(up("socks4a"))
    assert in_thread(http, connect(near), b"CONNECT [2606:4700::1]:80 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(
        b"HTTP/1.1 502"
    )
    line = lines(1)[0]
    assert (line["result"], line["detail"]) == ("unreachable", "no IPv4 address, for socks4a")


@pytest.mark.parametrize("hops", [0, 1, 15, 99])
def test_what_we_ask_is_what_we_read(hops):
    for host in ("192.0.2.1", "name.test"):
        data = connect_request(make_target(host, 443), user_of_hops(hops))
        request, size = parse_request(data)
        assert (str(request.target), size, hops_in(request.user)) == (f"{host}:443", len(data), hops)
    with pytest.raises(ValueError, match="no IPv6"):
        connect_request(make_target("2001:db8::1", 443), b"")
    with pytest.raises(ProtocolError):
        parse_request(b"\x04\x07" + data[2:])


def test_a_user_id_is_sent(far, proxy_by, serve, connect, in_thread, lines):
    url = far("socks4").replace("://", "://ada%20b@")
    client = connect(proxy_by(parse_upstream("up", url)))
    assert in_thread(reply, client, socks(serve(echo).port)) == 0
    client.close()
    assert "ada b" in [line["claimed"] for line in lines(2)]


def test_a_loop_of_socks4_proxies_is_found(serve, connect, in_thread, lines):
    ports = [free_port(), free_port()]
    servers = []
    for port, following in (ports, ports[::-1]):
        text = (
            f'[[listener]]\nlisten = "127.0.0.1:{port}"\n[rules]\ndestinations = ["allow loopback", "allow any"]\n'
            f'upstreams = ["through next any"]\n[upstream.next]\nurl = "socks4://127.0.0.1:{following}"\n'
        )
        servers.append(serve(make_proxy(parse_config(text)).handler, f"127.0.0.1:{port}"))
    assert in_thread(reply, connect(servers[0]), socks(80)) == 1
    assert sum(server.accepted_connections for server in servers) < 100
    assert "loop" in [line["result"] for line in lines(1)]


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "place", "user", "password"),
    [
        ("socks5://unix:/run/tor/socks", "unix:/run/tor/socks", b"", b""),
        ("socks5://ada:p%40w@unix:/run/a@b", "unix:/run/a@b", b"ada", b"p@w"),
        ("http://unix:@name", "unix:@name", b"", b""),
        ("socks5://a:b@unix:@name", "unix:@name", b"a", b"b"),
        ("socks4a://ada@x:1", "x:1", b"ada", b""),
        ("SOCKS4://x:1", "x:1", b"", b""),
        ("https://a:b@x:1/", "x:1", b"a", b"b"),
    ],
)
def test_urls(url, place, user, password):
    one = parse_upstream("a", url)
    assert (str(one.target), one.user, one.password) == (place, user, password)
    assert isinstance(one.target, UnixPath) == place.startswith("unix:")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ('url = "socks4://a:b@x:1"', "SOCKS4 has no passwords"),
        ('url = "socks4://a%00@x:1"', "SOCKS4 has users of 255 bytes at most, without NUL"),
        ('url = "socks5://unix:run"', "expected unix:/path or unix:@name, got 'unix:run'"),
        ('url = "socks5://unix:/"', "expected unix:/path or unix:@name"),
        (f'url = "socks5://unix:/{"x" * 200}"', "the path of a Unix socket has 107 bytes at most"),
        ('url = "https://unix:/run/x"', "tls_name is needed for https by a Unix socket"),
        ('url = "http://x:1"\ntls_name = "x"', "tls_ca and tls_name are for https, got http"),
        ('url = "https://x:1"\ntls_ca = "/missing"', 'tls_ca "/missing" cannot be read: No such file or directory'),
        ('url = "https://x:1"\ntls_ca = "/dev/null"', "tls_ca must be a PEM file with certificates of CAs"),
        ('url = "https://x:1"\nthrough = "tls"', "one proxy of a chain may be https, got a second one"),
        ('url = "http://unix:/x"\nthrough = "tls"', "a Unix socket is reached directly"),
        ('url = "socks4://x:1"\nresolve = "there"', 'resolve = "there" needs socks4a'),
        ('url = "socks5://unix:/run/own"', "the upstream 'up' is this proxy itself"),
        ('members = ["tls"]\ntls_name = "x"', "a group has members and no tls_name"),
    ],
)
def test_mistakes(table, told):
    from gtcpserver.proxy.config import parse_config

    text = f'[[listener]]\nlisten = "unix:/run/own"\n[upstream.tls]\nurl = "https://y:1"\n[upstream.up]\n{table}\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert told in str(caught.value)


# -- real programs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """`run(port, *command)`: a program that listens on this port, until the test's end."""
    processes = []

    def start(port, *command):
        process = subprocess.Popen(
            list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        processes.append(process)

        def is_up():
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_up, SOON)

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def talks(near, serve, connect, in_thread):
    client = connect(near)
    assert in_thread(reply, client, socks(serve(echo).port)) == 0
    for data in (b"hello", bytes(200_000)):
        client.sendall(data)
        assert in_thread(read, client, len(data)) == data


@needs("haproxy")
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_haproxy_ends_the_tls(run, far, files, pair, proxy_by, serve, connect, in_thread, origin, tmp_path, version):
    port = free_port()
    (tmp_path / "both.pem").write_bytes(b"".join(content(path) for path in pair))
    behind = far("http").removeprefix("http://")
    (tmp_path / "conf").write_text(
        textwrap.dedent(f"""
        defaults
          mode tcp
          timeout connect 5s
          timeout client 60s
          timeout server 60s
        listen tls
          bind 127.0.0.1:{port} ssl crt {tmp_path}/both.pem ssl-min-ver {version} ssl-max-ver {version}
          server far {behind}
        """)
    )
    run(port, "haproxy", "-f", "conf", "-db")
    context = make_tls_context(content(files.ca_file))
    one = parse_upstream("up", f"https://127.0.0.1:{port}", resolve="there", tls=context)
    near = proxy_by(one)
    talks(near, serve, connect, in_thread)
    to = origin(OK, OK)
    client = connect(near)
    for _ in range(2):
        request = f"GET {to.url}/ HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert in_thread(http, client, request).startswith(b"HTTP/1.1 200")


@needs("danted")
@pytest.mark.skipif(os.geteuid() != 0, reason="danted becomes another user")
@pytest.mark.parametrize("scheme", ["socks4", "socks5"])
def test_dante(run, proxy_by, serve, connect, in_thread, tmp_path, scheme):
    port = free_port()
    (tmp_path / "conf").write_text(
        f"logoutput: /dev/null\ninternal: 127.0.0.1 port = {port}\nexternal: 127.0.0.1\nclientmethod: none\n"
        "socksmethod: none\nuser.unprivileged: nobody\n"
        "client pass { from: 127.0.0.0/8 to: 0.0.0.0/0 }\nsocks pass { from: 127.0.0.0/8 to: 0.0.0.0/0 }\n"
    )
    run(port, "danted", "-f", "conf", "-p", tmp_path / "pid")
    talks(proxy_by(parse_upstream("up", f"{scheme}://127.0.0.1:{port}")), serve, connect, in_thread)


@pytest.mark.slow
@needs(*PROGRAMS)
@pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root")
def test_ssh_d_is_a_parent(run, proxy_by, serve, connect, in_thread, tmp_path):
    forward = free_port()
    with sshd(tmp_path) as client:
        run(forward, *client, "-N", "-D", f"127.0.0.1:{forward}", "root@127.0.0.1")
        for scheme in ("socks5", "socks4", "socks4a"):
            talks(proxy_by(parse_upstream("up", f"{scheme}://127.0.0.1:{forward}")), serve, connect, in_thread)
        near = proxy_by(parse_upstream("up", f"socks4a://127.0.0.1:{forward}", resolve="there"))
        assert in_thread(reply, connect(near), socks(serve(echo).port, host="localhost")) == 0


@needs("curl")
def test_curl_by_a_parent_of_its_kind(up, proxy_by, in_thread, origin):
    to = origin(*[b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"] * 3)
    near = proxy_by(up("unix+socks4a"))

    def fetch():
        command = ["curl", "-sS", "-m", "30", "-x", f"socks5h://127.0.0.1:{near.port}", to.url]
        return subprocess.run(command, capture_output=True, check=False)

    done = in_thread(fetch)
    assert (done.stdout, done.stderr) == (b"hello", b"")
