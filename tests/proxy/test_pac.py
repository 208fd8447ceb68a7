"""The script for browsers: served at /proxy.pac, and what it says in a JavaScript engine."""

import json
import shutil
import subprocess

import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.pac import check_direct, pac_script
from gtcpserver.proxy.rules import parse_client_rule
from kit.patience import SOON
from kit.proxying import ANYBODY, OnePassword

pytestmark = pytest.mark.usefixtures("no_faults")

DIRECT = [".corp.test", "one.test", "10.0.0.0/8", "192.0.2.1"]

# As in Mozilla's netwerk/base/ascii_pac_utils.js.
FUNCTIONS = """
function isPlainHostName(host) { return host.search("(\\\\.)|:") == -1; }
function dnsDomainIs(host, domain) {
    return host.length >= domain.length && host.substring(host.length - domain.length) == domain;
}
function number(text) { return text.split(".").reduce((sum, part) => sum * 256 + Number(part), 0); }
function isInNet(host, pattern, mask) {
    if (!/^\\d+\\.\\d+\\.\\d+\\.\\d+$/.test(host)) throw new Error("it would look up " + host);
    return (number(host) & number(mask)) == (number(pattern) & number(mask));
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_what_the_script_says(tmp_path):
    expected = {
        "www.example.com": "PROXY p.test:1080",
        "intranet": "DIRECT",
        "corp.test": "DIRECT",
        "WWW.Corp.Test": "DIRECT",
        "notcorp.test": "PROXY p.test:1080",
        "one.test": "DIRECT",
        "a.one.test": "PROXY p.test:1080",
        "10.1.2.3": "DIRECT",
        "11.1.2.3": "PROXY p.test:1080",
        "192.0.2.1": "DIRECT",
        "192.0.2.2": "PROXY p.test:1080",
        "2001:db8::1": "PROXY p.test:1080",
    }
    calls = f"console.log(JSON.stringify({json.dumps(list(expected))}.map(host => FindProxyForURL('http://x/', host))))"
    path = tmp_path / "pac.js"
    path.write_text(FUNCTIONS + pac_script("PROXY p.test:1080", DIRECT).decode() + calls)
    done = subprocess.run(["node", path], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    assert dict(zip(expected, json.loads(done.stdout), strict=True)) == expected


@pytest.fixture
def start(serve):
    return lambda **options: serve(ProxyHandler(Gate(client_rules=ANYBODY), pac=DIRECT, **options))


@pytest.mark.parametrize("path", ["/proxy.pac", "/wpad.dat"])
def test_clients_get_it_with_the_address_at_which_they_asked(start, client, lines, path):
    server = start()
    visitor = client(server)
    for host, way in {
        "proxy.corp.test:3128": "proxy.corp.test:3128",
        "PROXY.test": f"proxy.test:{server.port}",
        "[2001:db8::1]:1": "[2001:db8::1]:1",
        '";alert(1)//': f"127.0.0.1:{server.port}",
    }.items():
        visitor.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
        status, fields, body = visitor.answer()
        assert (status, fields["content-type"]) == (200, "application/x-ns-proxy-autoconfig")
        assert f'return "PROXY {way}";'.encode() in body
    assert {line["result"] for line in lines(4)} == {"ok"}
    visitor.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer("HEAD")[0] == 200
    visitor.send(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    assert visitor.answer()[0] == 405


@pytest.mark.parametrize(
    ("speaks", "commands", "auth", "way"),
    [
        ("mixed", ["connect"], "", "SOCKS5"),
        ("mixed", ["connect", "forward"], "", "PROXY"),
        ("http", ["connect"], "", "PROXY"),
        # Browsers send no passwords by SOCKS.
        ("mixed", ["connect"], " with auth users", "PROXY"),
    ],
)
def test_without_forwarding_browsers_speak_socks(serve, client, speaks, commands, auth, way):
    gate = Gate(
        client_rules=[parse_client_rule(f"allow from any to any{auth}")],
        authenticators={"users": OnePassword()},
        commands=commands,
    )
    visitor = client(serve(ProxyHandler(gate, speaks, pac=[])))
    visitor.send("GET /proxy.pac HTTP/1.1\r\nHost: p.test:1080\r\n\r\n")
    assert f'return "{way} p.test:1080";'.encode() in visitor.answer()[2]


def test_a_password_is_not_needed_but_admission_is(serve, client):
    rule = parse_client_rule("allow from any to any with auth users")
    gate = Gate(client_rules=[rule], authenticators={"users": OnePassword()})
    visitor = client(serve(ProxyHandler(gate, pac=[])))
    visitor.send("GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer()[0] == 200
    visitor.send("GET /other HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer()[0] == 407
    visitor = client(serve(ProxyHandler(Gate(), pac=[])))
    visitor.send("GET /proxy.pac HTTP/1.1\r\nHost: x\r\n\r\n")
    assert visitor.answer()[0] == 403


@pytest.mark.parametrize("wrong", ["UPPER.test", "a b", "", ".", "10.0.0.0/33", "10.0.0.1/8", '"x"', "a.test."])
def test_what_is_no_destination_is_refused(wrong):
    with pytest.raises(ConfigError, match="pac_direct must have names"):
        check_direct([wrong])
    with pytest.raises(ConfigError, match="line 2: pac_direct must have names"):
        make_proxy(parse_config(f"[http]\npac_direct = [{json.dumps(wrong)}]"))
