"""Programs and libraries that people use, through the proxy."""

import asyncio
import hashlib
import os
import shutil
import subprocess

import pytest

from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.static_files import StaticFiles
from kit.patience import SOON
from kit.proxying import ANYBODY, ANYWHERE, OnePassword

CONTENT = os.urandom(300_000)


@pytest.fixture
def origin(serve, tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(CONTENT)
    server = serve(StaticFiles(tmp_path / "www"))
    return f"http://localhost:{server.port}/file"


@pytest.fixture(params=["open", "with a password"])
def where(request, serve):
    """The authority of a proxy: "127.0.0.1:1080" or "Ada:pw@127.0.0.1:1080"."""
    options = {"client_rules": ANYBODY}
    if request.param != "open":
        options = {
            "client_rules": [parse_client_rule("allow from any to any with auth staff")],
            "authenticators": {"staff": OnePassword()},
        }
    server = serve(ProxyHandler(Gate(destination_rules=ANYWHERE, **options)))
    return ("" if request.param == "open" else "Ada:pw@") + server.address


def test_pysocks(where, origin, in_thread):
    socks = pytest.importorskip("socks")
    user, _, address = where.rpartition("@")
    name, _, password = user.partition(":")
    host, port = address.split(":")

    def fetch():
        sock = socks.socksocket()
        sock.set_proxy(socks.SOCKS5, host, int(port), username=name or None, password=password or None)
        sock.settimeout(SOON)
        with sock:
            sock.connect(("localhost", int(origin.split(":")[2].split("/")[0])))
            sock.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            data = b""
            while more := sock.recv(65536):
                data += more
        return data

    assert in_thread(fetch).endswith(CONTENT)


@pytest.mark.parametrize("scheme", ["socks4", "socks5", "socks5h", "http"])
def test_python_socks(where, origin, in_thread, scheme):
    sync, python_socks = pytest.importorskip("python_socks.sync"), pytest.importorskip("python_socks")

    def fetch():
        proxy = sync.Proxy.from_url(f"{scheme.removesuffix('h')}://{where}", rdns=scheme.endswith("h"))
        with proxy.connect("localhost", int(origin.split(":")[2].split("/")[0]), timeout=SOON) as sock:
            sock.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            data = b""
            while more := sock.recv(65536):
                data += more
        return data

    if scheme == "socks4" and "@" in where:
        # It sends the name as the user id, which proves nothing.
        with pytest.raises(python_socks.ProxyError, match="rejected"):
            in_thread(fetch)
    else:
        assert in_thread(fetch).endswith(CONTENT)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "http"])
def test_requests(where, origin, in_thread, scheme):
    requests = pytest.importorskip("requests")
    pytest.importorskip("socks")
    proxies = {"http": f"{scheme}://{where}"}

    def fetch():
        with requests.Session() as session:
            session.trust_env = False
            return [session.get(origin, proxies=proxies, timeout=SOON).content for _ in range(3)]

    assert in_thread(fetch) == [CONTENT] * 3


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_httpx(where, origin, in_thread, scheme):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("socksio")

    def fetch():
        with httpx.Client(proxy=f"{scheme}://{where}", trust_env=False, timeout=SOON) as client:
            return [client.get(origin).content for _ in range(3)]

    assert in_thread(fetch) == [CONTENT] * 3


@pytest.mark.slow
def test_aiohttp_socks(where, origin, in_thread):
    aiohttp, aiohttp_socks = pytest.importorskip("aiohttp"), pytest.importorskip("aiohttp_socks")

    async def fetch():
        connector = aiohttp_socks.ProxyConnector.from_url(f"socks5://{where}", rdns=True)
        async with aiohttp.ClientSession(connector=connector) as session, session.get(origin) as answer:
            return await answer.read()

    assert in_thread(lambda: asyncio.run(fetch())) == CONTENT


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_clones_through_the_proxy(where, serve, in_thread, tmp_path):
    def git(*arguments, folder=tmp_path):
        clean = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "no_proxy": ""}
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=folder,
            env=clean,
            capture_output=True,
            timeout=SOON,
        )

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "big").write_bytes(CONTENT)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["update-server-info"]):
        assert git(*arguments, folder=tmp_path / "one").returncode == 0
    server = serve(StaticFiles(tmp_path, hidden=True))
    url = f"http://127.0.0.1:{server.port}/one/.git"
    for scheme in ("http", "socks5h"):
        done = in_thread(lambda scheme=scheme: git("-c", f"http.proxy={scheme}://{where}", "clone", "-q", url, scheme))
        assert (done.returncode, done.stderr) == (0, b"")
        copy = (tmp_path / scheme / "big").read_bytes()
        assert hashlib.sha256(copy).digest() == hashlib.sha256(CONTENT).digest()
