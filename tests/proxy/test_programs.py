"""More programs through the proxy: curl by every way there is, FTP both ways, wget, and what they say of failures."""

import ftplib
import hashlib
import io
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import trustme

from gtcpserver import TLSConfig
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from gtcpserver.static_files import StaticFiles
from kit.clients import read
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.proxying import ANYBODY, ANYWHERE, OnePassword, bind_request, named_address, reply, socks
from kit.waiting import wait_for_port

CONTENT = os.urandom(700_000)
WITH_PASSWORD = {
    "client_rules": [parse_client_rule("allow from any to any with auth staff")],
    "authenticators": {"staff": OnePassword()},
}


@pytest.fixture
def proxy(serve):
    def start(tls=None, **options):
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})
        return serve(ProxyHandler(gate, tls=tls))

    return start


@pytest.fixture
def folder(tmp_path):
    """With a file, and the certificates of an authority."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1", "::1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def curl(in_thread, folder):
    def run(*arguments, data=None):
        command = ["curl", "-sS", "--noproxy", "", "--max-time", "10", "--cacert", folder / "ca.pem"]
        command += ["--proxy-cacert", folder / "ca.pem", *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return in_thread(lambda: subprocess.run(command, input=data, capture_output=True, timeout=SOON, env=clean))

    return run


# -- curl --------------------------------------------------------------------------------------------------------------

WAYS = {
    "socks4": ["--socks4", "{address}"],
    "socks4a": ["--socks4a", "{address}"],
    "socks5": ["--socks5", "{address}"],
    "socks5-hostname": ["--socks5-hostname", "{address}"],
    "http": ["-x", "http://{address}"],
    "proxytunnel": ["--proxytunnel", "-x", "http://{address}"],
    "https": ["-x", "https://localhost:{port}"],
    "https proxytunnel": ["--proxytunnel", "-x", "https://localhost:{port}"],
}


@pytest.mark.slow
@needs("curl")
@pytest.mark.parametrize("password", [False, True], ids=["open", "with a password"])
@pytest.mark.parametrize("way", WAYS)
def test_curl_by_every_way_to_http_and_https(proxy, serve, folder, curl, way, password):
    tls = TLSConfig(folder / "server.pem")
    plain, encrypted = serve(StaticFiles(folder / "www")), serve(StaticFiles(folder / "www"), tls=tls)
    server = proxy(tls=tls if way.startswith("https") else None, **(WITH_PASSWORD if password else {}))
    options = [word.format(address=server.address, port=server.port) for word in WAYS[way]]
    urls = [f"http://localhost:{plain.port}/file", f"https://localhost:{encrypted.port}/file"]
    if password and way.startswith("socks4"):
        # There is no password in SOCKS4, and its user id is none.
        assert curl(*options, "--proxy-user", "Ada:pw", urls[0]).returncode == 97  # CURLE_PROXY
        return
    for url in urls:
        done = curl(*options, *(["--proxy-user", "Ada:pw"] if password else []), url)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == CONTENT
    if password:
        for user in ("Ada:PW", "Ada:", "Eve:pw"):
            done = curl(*options, "--proxy-user", user, "-o", os.devnull, "-w", "%{http_code} %{http_connect}", urls[0])
            if way.startswith("socks"):
                assert done.returncode == 97
            else:
                assert b"407" in done.stdout
        # curl asks without a password first, and is told what is expected.
        done = curl(*options, "--proxy-anyauth", "--proxy-user", "Ada:pw", urls[0])
        assert done.stdout == CONTENT


@pytest.mark.slow
@needs("curl")
@pytest.mark.parametrize("way", ["socks4a", "socks5", "socks5-hostname", "http", "proxytunnel"])
def test_curl_to_ipv6_with_a_chunked_upload_and_to_where_nobody_is(proxy, serve, folder, curl, way):
    def take(conn):
        head = conn.recv_until(b"\r\n\r\n").lower()
        assert b"transfer-encoding: chunked" in head
        if b"expect" in head:
            conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        digest = hashlib.sha256()
        while size := int(conn.recv_until(b"\r\n"), 16):
            digest.update(conn.recv_exactly(size))
            conn.recv_until(b"\r\n")
        conn.recv_until(b"\r\n")
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + digest.hexdigest().encode())

    files, taker, server = serve(StaticFiles(folder / "www"), "[::1]:0"), serve(take), proxy()
    options = [word.format(address=server.address, port=server.port) for word in WAYS[way]]
    if way != "socks4a":  # for which curl makes no name of an IPv6 address
        assert curl(*options, f"http://[::1]:{files.port}/file").stdout == CONTENT
    done = curl(*options, "-T", "-", f"http://127.0.0.1:{taker.port}/", data=CONTENT)
    assert done.stdout.decode() == hashlib.sha256(CONTENT).hexdigest()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        done = curl(*options, "-w", "%{http_code} %{http_connect}", url)
    if way.startswith("socks"):
        assert done.returncode == 97
    else:
        assert b"502" in done.stdout
    if way == "socks5":
        assert b"(5)" in done.stderr  # connection refused


@needs("wget")
def test_wget_resumes_and_asks_again_with_its_password(proxy, serve, folder, in_thread):
    origin = serve(StaticFiles(folder / "www"))
    server = proxy(**WITH_PASSWORD)
    (folder / "part").write_bytes(CONTENT[:100_000])
    environment = {**os.environ, "http_proxy": f"http://{server.address}", "no_proxy": ""}
    command = ["wget", "-q", "-c", "-O", folder / "part", "--proxy-user=Ada", "--proxy-password=pw"]
    command += ["--tries=1", f"http://127.0.0.1:{origin.port}/file"]
    done = in_thread(lambda: subprocess.run(command, capture_output=True, timeout=SOON, env=environment))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (folder / "part").read_bytes() == CONTENT


# -- FTP ---------------------------------------------------------------------------------------------------------------

VSFTPD = """
listen=YES
listen_address=127.0.0.1
listen_port={port}
background=NO
anonymous_enable=YES
local_enable=NO
no_anon_password=YES
anon_root={folder}
write_enable=YES
anon_upload_enable=YES
anon_umask=022
port_enable=YES
connect_from_port_20=NO
pasv_enable=YES
pasv_address=127.0.0.1
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
xferlog_enable=NO
secure_chroot_dir={empty}
"""


@pytest.fixture
def vsftpd():
    """(port, folder) of an FTP server for everybody, with a folder for uploads."""
    if shutil.which("vsftpd") is None:
        pytest.skip("not installed: vsftpd")
    if os.geteuid() != 0:
        pytest.skip("vsftpd needs root")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "root" / "up").mkdir(parents=True)
        (folder / "empty").mkdir()
        os.chmod(folder, 0o755)
        shutil.chown(folder / "root" / "up", "ftp")
        (folder / "root" / "file").write_bytes(CONTENT)
        port = free_port()
        configuration = VSFTPD.format(port=port, folder=folder / "root", empty=folder / "empty")
        (folder / "conf").write_text(configuration.lstrip())
        process = subprocess.Popen(["vsftpd", folder / "conf"], stderr=subprocess.PIPE)
        try:
            wait_for_port(port, process)
            yield port, folder / "root"
        finally:
            process.kill()
            process.communicate()


class ActiveFTP(ftplib.FTP):
    """The standard library's client, whose data connections come back to it through BIND."""

    def __init__(self, proxy, port):
        super().__init__(timeout=SOON)
        self.proxy = proxy
        self.host, self.port, self.af = "127.0.0.1", port, socket.AF_INET
        self.sock = self.open(socks(port))
        self.file = self.sock.makefile("r", encoding="utf-8")
        self.welcome = self.getresp()

    def open(self, request=None):
        sock = socket.create_connection(("127.0.0.1", self.proxy.port), SOON)
        if request is not None:
            assert reply(sock, request) == 0
        return sock

    def ntransfercmd(self, cmd, rest=None):
        sock = self.open()
        sock.sendall(b"\x05\x01\x00" + bind_request())
        if rest is not None:
            self.sendcmd(f"REST {rest}")
        self.sendport(*named_address(read(sock, 12)[2:]))
        answer = self.sendcmd(cmd)
        assert answer[0] == "1"
        assert named_address(read(sock, 10))[0] == "127.0.0.1"  # the second reply: the server is there
        return sock, None


def test_ftp_in_active_mode(proxy, vsftpd, in_thread):
    """A real use of BIND: the server connects back to where the client is reached, which is the proxy."""
    port, folder = vsftpd
    server = proxy()

    def session():
        with ActiveFTP(server, port) as client:
            client.login()
            names = client.nlst()
            got = io.BytesIO()
            client.retrbinary("RETR file", got.write)
            rest = io.BytesIO()
            client.retrbinary("RETR file", rest.write, rest=600_000)
            client.storbinary("STOR up/new", io.BytesIO(CONTENT))
            return names, got.getvalue(), rest.getvalue()

    names, whole, rest = in_thread(session)
    assert sorted(names) == ["file", "up"]
    assert whole == CONTENT
    assert rest == CONTENT[600_000:]
    assert (folder / "up" / "new").read_bytes() == CONTENT


@pytest.mark.slow
@needs("curl")
@pytest.mark.parametrize("way", ["socks4", "socks5-hostname", "proxytunnel"])
def test_ftp_in_passive_mode(proxy, vsftpd, curl, way):
    """Two tunnels, one of which the server chooses the port of."""
    server = proxy(destination_rules=[parse_destination_rule("allow 127.0.0.1")])
    options = [word.format(address=server.address, port=server.port) for word in WAYS[way]]
    done = curl(*options, f"ftp://127.0.0.1:{vsftpd[0]}/file")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == CONTENT
    assert curl(*options, "-T", "-", f"ftp://127.0.0.1:{vsftpd[0]}/up/{way}", data=CONTENT).returncode == 0
    assert (vsftpd[1] / "up" / way).read_bytes() == CONTENT
