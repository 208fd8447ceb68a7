"""Programs that log in to the proxy for a tunnel. The 407 ends their connection, and they come back on another one."""

import asyncio
import base64
import hashlib
import http.client
import os
import ssl
import subprocess
import textwrap
from collections import Counter

import pytest
import trustme

from gtcpserver import TLSConfig
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.static_files import StaticFiles
from kit.browser import Browser
from kit.patience import SOON
from kit.programs import needs
from kit.proxying import ANYWHERE, OnePassword, in_thread_for
from kit.waiting import wait_until

pytestmark = pytest.mark.slow

CONTENT = os.urandom(100_000)


@pytest.fixture
def proxy(serve):
    """Lets Ada in, whose password is "pw"."""
    rules = [parse_client_rule("allow from any to any with auth staff")]
    return serve(
        ProxyHandler(Gate(client_rules=rules, destination_rules=ANYWHERE, authenticators={"staff": OnePassword()}))
    )


@pytest.fixture
def folder(tmp_path):
    """With a file, a page, and a certificate."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "file").write_bytes(CONTENT)
    (tmp_path / "www" / "page.html").write_text("<title>x</title><p id=a>it is here</p>")
    return tmp_path


@pytest.fixture
def origin(serve, folder):
    return serve(StaticFiles(folder / "www", hidden=True), tls=TLSConfig(folder / "server.pem"))


@pytest.fixture
def run(in_thread, folder):
    """Run a program without the proxy settings of this environment."""

    def start(*command, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, **environment}
        done = in_thread(lambda: subprocess.run(command, cwd=folder, env=clean, capture_output=True, timeout=SOON))
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return start


def logins(lines, **least):
    """How often a tunnel was asked for with what became of it, once each of these has come so often.

    The line of a connection comes at its end, and a client may end a later one before it closes an earlier one.
    """

    def found():
        results = [line["result"] for line in lines(1) if line["command"] == "CONNECT"]
        # Over TLS one side may close before it has read the other's close_notify. The tunnel was there.
        counts = Counter("ok" if result == "reset" else result for result in results)
        return all(counts[result] >= number for result, number in least.items()) and dict(counts)

    return wait_until(found)


@needs("curl")
@pytest.mark.parametrize("option", ["--proxy-anyauth", "--proxy-basic"])
def test_curl(proxy, origin, run, lines, option):
    url = f"https://localhost:{origin.port}/file"
    curl = ["curl", "-sS", "--cacert", "ca.pem", "-x", f"http://{proxy.address}", "--proxy-user", "Ada:pw", option]
    assert run(*curl, url) == CONTENT
    expected = {"ok": 1} if option == "--proxy-basic" else {"authentication_failed": 1, "ok": 1}
    assert logins(lines, **expected) == expected


@needs("wget")
def test_wget(proxy, origin, run, lines):
    command = ["wget", "-q", "-O", "-", "--ca-certificate=ca.pem", "--tries=1", "--proxy-user=Ada"]
    url = f"https://localhost:{origin.port}/file"
    assert run(*command, "--proxy-password=pw", url, https_proxy=f"http://{proxy.address}") == CONTENT
    assert logins(lines, ok=1)["ok"] == 1


@needs("git")
def test_git(proxy, origin, run, folder, lines):
    identity = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", "www"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["update-server-info"]):
        run(*identity, *arguments)
    url = f"https://localhost:{origin.port}/.git"
    run("git", "-c", f"http.proxy=http://Ada:pw@{proxy.address}", "clone", "-q", url, "copy", GIT_SSL_CAINFO="ca.pem")
    assert (folder / "copy" / "file").read_bytes() == CONTENT
    assert logins(lines, authentication_failed=1)  # git asks curl for --proxy-anyauth


@needs("ncat")
def test_ncat(proxy, origin, in_thread, lines):
    command = ["ncat", "--proxy", proxy.address, "--proxy-type", "http", "--proxy-auth", "Ada:pw"]
    command += ["--ssl", "localhost", str(origin.port)]
    request = b"GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    done = in_thread(lambda: subprocess.run(command, input=request, capture_output=True, timeout=SOON))
    assert done.stdout.endswith(CONTENT), done.stderr.decode()
    assert logins(lines, ok=1)["ok"] == 1


JAVA = """
    import java.net.*;
    import java.net.http.*;
    import java.security.cert.X509Certificate;
    import javax.net.ssl.*;

    class Fetch {
        public static void main(String[] arguments) throws Exception {
            var trust = new TrustManager[] { new X509ExtendedTrustManager() {
                public void checkClientTrusted(X509Certificate[] c, String t) {}
                public void checkServerTrusted(X509Certificate[] c, String t) {}
                public void checkClientTrusted(X509Certificate[] c, String t, Socket s) {}
                public void checkServerTrusted(X509Certificate[] c, String t, Socket s) {}
                public void checkClientTrusted(X509Certificate[] c, String t, SSLEngine e) {}
                public void checkServerTrusted(X509Certificate[] c, String t, SSLEngine e) {}
                public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
            }};
            var tls = SSLContext.getInstance("TLS");
            tls.init(null, trust, null);
            var proxy = new InetSocketAddress("127.0.0.1", Integer.parseInt(arguments[0]));
            var uri = URI.create(arguments[1]);
            var ada = new Authenticator() {
                protected PasswordAuthentication getPasswordAuthentication() {
                    return new PasswordAuthentication("Ada", "pw".toCharArray());
                }
            };
            Authenticator.setDefault(ada);
            HttpsURLConnection.setDefaultSSLSocketFactory(tls.getSocketFactory());
            var old = (HttpsURLConnection) uri.toURL().openConnection(new Proxy(Proxy.Type.HTTP, proxy));
            System.out.println(old.getInputStream().readAllBytes().length);
            var client = HttpClient.newBuilder().sslContext(tls).proxy(ProxySelector.of(proxy)).authenticator(ada);
            var request = HttpRequest.newBuilder(uri).build();
            System.out.println(client.build().send(request, HttpResponse.BodyHandlers.ofByteArray()).body().length);
        }
    }
"""


@needs("java", "javac")
def test_both_clients_of_java(proxy, origin, folder, lines):
    (folder / "Fetch.java").write_text(textwrap.dedent(JAVA))
    # Java does not log in by Basic for a tunnel unless it is told to.
    command = ["java", "-Djdk.http.auth.tunneling.disabledSchemes=", "Fetch.java", str(proxy.port)]
    url = f"https://localhost:{origin.port}/file"
    done = in_thread_for(SOON, lambda: subprocess.run([*command, url], cwd=folder, capture_output=True, timeout=SOON))
    assert done.stdout.split() == [str(len(CONTENT)).encode()] * 2, done.stderr.decode()
    assert logins(lines, authentication_failed=2, ok=2) == {"authentication_failed": 2, "ok": 2}


@needs("chromium", "openssl")
def test_a_browser(proxy, origin, folder, lines):
    der = subprocess.run(
        "openssl x509 -in server.pem -noout -pubkey | openssl pkey -pubin -outform der",
        shell=True,
        cwd=folder,
        capture_output=True,
        check=True,
    ).stdout
    pin = base64.b64encode(hashlib.sha256(der).digest()).decode()
    arguments = [f"--proxy-server=http://{proxy.address}", "--proxy-bypass-list=<-loopback>"]
    arguments += [f"--ignore-certificate-errors-spki-list={pin}", "--disable-background-networking"]

    def visit():
        browser = Browser(folder / "profile", *arguments)
        try:
            browser.log_in("Ada", "pw")
            browser.open(f"https://localhost:{origin.port}/page.html")
            return browser.value("document.getElementById('a').textContent")
        finally:
            browser.close()

    assert in_thread_for(50, visit) == "it is here"
    assert logins(lines, ok=1)


def test_libraries_of_python(proxy, origin, folder, in_thread, lines):
    """They send the password at once; one that is wrong gives an error and no hang."""
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    url = f"https://localhost:{origin.port}/file"

    def standard_library(user):
        client = http.client.HTTPSConnection("127.0.0.1", proxy.port, context=context, timeout=SOON)
        encoded = base64.b64encode(user.encode()).decode()
        client.set_tunnel("localhost", origin.port, {"Proxy-Authorization": f"Basic {encoded}"})
        client.request("GET", "/file")
        return client.getresponse().read()

    def requests(user):
        library = pytest.importorskip("requests")
        with library.Session() as session:
            session.trust_env = False
            where = {"https": f"http://{user}@{proxy.address}"}
            return session.get(url, proxies=where, verify=folder / "ca.pem", timeout=SOON).content

    def httpx(user):
        library = pytest.importorskip("httpx")
        with library.Client(proxy=f"http://{user}@{proxy.address}", verify=context, trust_env=False) as client:
            return client.get(url).content

    def aiohttp(user):
        library = pytest.importorskip("aiohttp")

        async def fetch():
            where = f"http://{user}@{proxy.address}"
            async with library.ClientSession() as session, session.get(url, proxy=where, ssl=context) as answer:
                return await answer.read()

        return asyncio.run(fetch())

    for number, fetch in enumerate((standard_library, requests, httpx, aiohttp), 1):
        assert in_thread(fetch, "Ada:pw") == CONTENT
        with pytest.raises(Exception, match="407"):
            in_thread(fetch, "Ada:no")
        expected = {"authentication_failed": number, "ok": number}
        assert logins(lines, **expected) == expected
