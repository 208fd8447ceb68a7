"""The configuration of the proxy: every mistake is told with its line, and every key acts."""

import re
import signal
import subprocess
import sys

import pytest

from gtcpserver import ConfigError, Server
from gtcpserver.proxy.config import make_proxy, parse_config, read_config
from kit.commands import run_command
from kit.handlers import echo
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.proxying import QUICK

EXAMPLES = ROOT / "examples" / "proxy"
COMMAND = [sys.executable, "-m", "gtcpserver", "proxy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "proxy.toml line 1: there is no x"),
        ("\n[rules]\nclient = []", "proxy.toml line 3: there is no client"),
        ('[[listener]]\nlisten = "127.0.0.1:1"\n[[listener]]\nlisten = 5', "line 4: Expected str, got int"),
        ('[[listener]]\nspeaks = "ftp"', "line 2: Invalid enum value 'ftp' (at listener[0].speaks)"),
        ('[[listener]]\nlisten = "nowhere"', 'line 2: address must be "host:port"'),
        ('[[listener]]\nexternal = "eth0"', "line 2: external must be an address, or one of each family, or"),
        ('[[listener]]\nexternal = ["10.0.0.1", "10.0.0.2"]', "got '10.0.0.1', '10.0.0.2'"),
        ("[[listener]]\nexternal = []", "got none"),
        ('[[listener]]\nproxy_protocol = ["x"]', "line 2: proxy_protocol must be networks"),
        (
            '[[listener]]\nproxy_protocol = ["::1"]\nproxy_protocol_timeout = 0',
            "proxy_protocol_timeout must be a number",
        ),
        ('[[listener]]\ntls_client_ca = "/no/such"', "tls_client_ca needs tls_certfile"),
        ("[auth.staff]\ncertificate = true\ncommand = ['x']", "line 1: an authenticator needs users or"),
        ("[auth.staff]\ncommand = ['/bin/true']\nprocesses = 0", "line 1: processes must be 1 to 1000, got 0"),
        (
            "[auth.staff]\ncommand = ['/bin/true']\nremember = -1",
            "line 1: remember must be a number, 0 or more, got -1",
        ),
        ("[auth.staff]\ncommand = ['/bin/true']\ncertificate_users = []", "certificate_users needs certificate = true"),
        ("[upstream.a]", "line 1: an upstream needs a url, or members, got neither for 'a' (at upstream.a)"),
        ("[upstream.a]\nurl = 'http://x:1'\nstrategy = 'first'", "strategy is for groups, with members (upstream 'a'"),
        ("[upstream.a]\nurl = 'http://x:1'\nmembers = ['b']", "a group has members and no url, got both for 'a'"),
        ("[upstream.a]\nmembers = ['b']", "line 1: there is no upstream 'b', a member of 'a'"),
        (
            "[upstream.a]\nmembers = ['b']\n[upstream.b]\nmembers = ['a']",
            "line 1: members of a group must not be groups, got 'b' in 'a'",
        ),
        (
            "[upstream.b]\nurl = 'http://x:1'\n[upstream.a]\nmembers = ['b', 'b']",
            "line 3: members must differ (weights give one a larger share), got 'b' twice in 'a'",
        ),
        (
            "[upstream.b]\nurl = 'http://x:1'\n[upstream.a]\nmembers = ['b']\nweights = [1, 2]",
            "line 3: weights must have one number for each of 1 members, got [1, 2]",
        ),
        (
            "[upstream.b]\nurl = 'http://x:1'\n[upstream.a]\nmembers = ['b']\nweights = [0]",
            "line 3: weights must be a whole number from 1 to 65535, got 0",
        ),
        (
            "[upstream.b]\nurl = 'http://x:1'\n[upstream.a]\nmembers = ['b']\nresolve = 'there'",
            "line 3: resolve is for the members of a group, got 'there' for 'a'",
        ),
        (
            "[upstream.b]\nmembers = ['c']\n[upstream.c]\nurl = 'http://x:1'\n"
            "[upstream.a]\nurl = 'http://x:1'\nthrough = 'b'",
            "through must name an upstream, not a group, got 'b' for 'a'",
        ),
        (
            "[upstream.b]\nurl = 'http://x:1'\n[upstream.a]\nmembers = ['b']\nstrategy = 'last'",
            "Invalid enum value 'last'",
        ),
        ("[upstream.a]\nurl = 'ftp://x:1'", "line 1: the url of upstream 'a' must be socks5://"),
        ("[upstream.a]\nurl = 'http://ada:pw@x'", "got 'http://...@x' (expected host:port, got 'x')"),
        ("[upstream.a]\nurl = 'http://x:1'\nthrough = 'b'", "line 1: there is no upstream 'b', through which 'a' is"),
        ("[upstream.a]\nurl = 'http://x:1'\nthrough = 'a'", "line 1: the upstreams a lead through each other"),
        ("[upstream.direct]\nurl = 'http://x:1'", 'must be a word, and not "direct"'),
        ("[upstream.a]\nurl = 'http://127.0.0.1:1080'", "line 1: the upstream 'a' is this proxy itself"),
        ('[rules]\nupstreams = ["through a any"]', "line 2: there is no upstream 'a', in 'through a any'"),
        ('[rules]\nupstreams = ["any"]', """line 2: "through" expected, got 'any'"""),
        ("[limits]\nrate = 0", "line 1: rate must be a number, more than 0"),
        ("[limits]\nconnections = 1.5", "line 2: Expected int | null, got float"),
        ('[[listener]]\ntls_certfile = "/no/such"', "line 2: "),
        ('[[listener]]\ntls_keyfile = "/no/such"', "tls_keyfile needs tls_certfile"),
        ("[timeouts]\n\nconnect = 0", "line 3: connect must be more than 0 seconds, got 0"),
        ('[timeouts]\nconnect = "5"', "line 2: Expected float, got str"),
        ("[timeouts]\nconnect = nan", "line 2: connect must be more than 0 seconds, got nan"),
        ('[rules]\nclients = ["allow from any to home"]', "line 2: there is no listener 'home'"),
        ('[rules]\nclients = ["allow from any to any with auth x"]', "line 2: there is no authenticator 'x'"),
        (
            '[rules]\ndestinations = [\n"allow from any via x to any"]',
            "line 3: there is no listener or authenticator 'x'",
        ),
        ('[rules]\ndestinations = ["allow any all"]', "line 2: nothing more expected, got 'all' in 'allow any all'"),
        ("[auth.staff]", "line 1: an authenticator needs users or an htpasswd file, or a command"),
        ('[auth.staff]\nusers = {ada = "plain"}', "line 1: a password must be a hash"),
        ('[auth.staff]\nhtpasswd = "/no/such"', "line 1: cannot read /no/such: No such file or directory"),
        ('[auth.staff]\ncommand = ["/no/such/program"]', "line 1: "),
        ('[resolver]\nfamily = "ipx"', "line 2: Invalid enum value 'ipx'"),
        ("[resolver]\ntimeout = 0", "line 2: timeout must be"),
        ('[resolver]\nservers = ["ns.example"]', "line 2: servers must be addresses of name servers, got 'ns.example'"),
        ('[resolver]\nkind = "system"\nservers = ["192.0.2.1"]', 'servers are for kind = "dns"'),
        ('[log]\nstyle = "xml"', "line 2: Invalid enum value 'xml'"),
        ('[[listener]]\nlisten = "0.0.0.0:1"\n[rules]\nclients = ["allow any"]', "line 4: 'allow any' opens the proxy"),
        ("[[listener]\n", "proxy.toml line 1: expected "),
        ('[auth.staff.users]\n\nada = "plain"', "line 1: a password must be a hash"),
        ('[auth]\nstaff = { users = { ada = "plain" } }', "line 2: a password must be a hash"),
        ('auth.staff.htpasswd = "/no/such"', "line 1: cannot read /no/such"),
        ('[[listener]]\n\nname = "any"', "line 1: the name of a listener must be a word"),
        ("[auth.default]\ncertificate = true", "a listener and an authenticator must not have the same name"),
        ('[[listener]]\nlisten = "*:1"\n[[listener]]\nlisten = "localhost:1"', "must not have the same address"),
        ('\n[http]\npseudonym = "a b"', "line 3: pseudonym must be a word, as a host has for a name, got 'a b'"),
        (
            '[auth.c]\ncertificate = true\n[rules]\nclients = ["allow from any to default with auth c"]',
            "line 4: the listener 'default' needs tls_client_ca",
        ),
        ('[rules]\nclients = ["allow any"]\n[[listener]]\nlisten = "fd:3"', "line 2: 'allow any' opens the proxy"),
        (
            '[rules]\nclients = ["allow any"]\n[[listener]]\nlisten = "unix:/x"\nproxy_protocol = ["unix"]',
            "line 2: 'allow any' opens the proxy",
        ),
        ('[[listener]]\nlisten = "nowhere"', "(at listener[0].listen)"),
    ],
)
def test_mistakes_are_told_with_line_and_field(text, message):
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "proxy.toml")
    assert message in str(raised.value)
    assert str(raised.value).startswith("proxy.toml")


def test_every_mistake_is_told():
    text = """\
[[listener]]
listen = 5
speak = "socks"
[timeouts]
idle = "x"
[auth.a]
user = 1
[auth.b]
users = 1
"""
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "f")
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [f"f line {n}" for n in (2, 3, 7, 9, 5)]
    text = """\
[rules]
clients = ["allow x", "deny any", "allow from any to nowhere"]
destinations = [
  "allow any",
  "permit any",
]
[timeouts]
connect = -1
"""
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "f")
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [f"f line {n}" for n in (2, 2, 5, 8)]


def test_requirement_35_nobody_opens_a_proxy_by_mistake():
    on_the_network = '[[listener]]\nname = "a"\nlisten = "0.0.0.0:1"\n'
    users = f"[auth.staff]\nusers = {{ada = '{QUICK}'}}\n"
    for text in (
        '[rules]\nclients = ["allow any"]',  # on loopback
        on_the_network,  # for this host alone
        on_the_network + '[rules]\nclients = ["allow 10.0.0.0/8"]',
        on_the_network + users + '[rules]\nclients = ["allow from any to any with auth staff"]',
        "allow_open = true\n" + on_the_network + '[rules]\nclients = ["allow any"]',
    ):
        parse_config(text)
    for rule in ("allow any", "allow from any to a", "allow 0.0.0.0/0", "allow ::/0"):
        with pytest.raises(ConfigError, match="opens the proxy"):
            parse_config(on_the_network + f'[rules]\nclients = ["{rule}"]')


def test_two_listeners_on_one_port(in_thread):
    for first, second in (("127.0.0.1:1", "127.0.0.1:1"), ("*:1", "localhost:1"), ("unix:/x", "unix:/x")):
        with pytest.raises(ConfigError, match="must not have the same address"):
            make_proxy(parse_config(f'[[listener]]\nlisten = "{first}"\n[[listener]]\nlisten = "{second}"'))
    import socket

    port = free_port()
    listeners = [f'[[listener]]\nlisten = "{host}:{port}"\n' for host in ("127.0.0.1", "127.0.0.2")]
    made = make_proxy(parse_config(listeners[0] + 'speaks = "socks"\n' + listeners[1] + 'speaks = "http"\n'))

    def answer(host):
        with socket.create_connection((host, port), SOON) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return sock.recv(12)

    with Server([str(address) for address in made.addresses], made.handler):
        assert in_thread(answer, "127.0.0.1") == b""
        assert in_thread(answer, "127.0.0.2") == b"HTTP/1.1 400"


def test_the_examples_can_be_used():
    for path in EXAMPLES.glob("*.toml"):
        assert make_proxy(read_config(str(path))).addresses


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot read /no/such: No such file or directory"):
        read_config("/no/such")
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="must be UTF-8"):
        read_config(str(tmp_path / "x"))


def test_each_listener_has_its_protocols_and_rules(serve, connect, in_thread, tmp_path):
    target = serve(echo)
    config = parse_config(
        f'[[listener]]\nname = "a"\nlisten = "unix:{tmp_path}/a"\nspeaks = "socks"\n'
        f'[[listener]]\nname = "b"\nlisten = "unix:{tmp_path}/b"\nspeaks = "http"\n'
        '[rules]\nclients = ["allow from any to any"]\ndestinations = ["allow from any via b to loopback"]\n'
    )
    made = make_proxy(config)
    with Server([str(address) for address in made.addresses], made.handler):
        import socket

        def ask(name, data):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"{tmp_path}/{name}")
                sock.sendall(data)
                return sock.recv(1000)

        connect_to = f"CONNECT 127.0.0.1:{target.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert in_thread(ask, "b", connect_to).startswith(b"HTTP/1.1 200")
        assert in_thread(ask, "a", connect_to) == b""
        assert in_thread(ask, "a", b"\x05\x01\x00") == b"\x05\x00"
        assert in_thread(ask, "b", b"\x05\x01\x00") == b""


def run(*arguments):
    done = run_command(*COMMAND[3:], *arguments)
    return done.returncode, (done.stderr or done.stdout).strip()


@pytest.mark.slow
def test_the_command_says_what_is_wrong(tmp_path):
    (tmp_path / "bad.toml").write_text("[timeouts]\nconect = 5\n")
    wrong = f"gtcpserver: {tmp_path}/bad.toml line 2: there is no conect (at timeouts.conect); did you mean connect?"
    assert run("check", f"{tmp_path}/bad.toml") == (2, wrong)
    assert run("--config", f"{tmp_path}/bad.toml") == (2, wrong)
    assert run("--user", "ada") == (2, "gtcpserver: --user: must be NAME:PASSWORD, got 'ada'")
    assert run("--user", "ad\udcff:secret") == (2, "gtcpserver: --user: must be UTF-8")
    assert run("hash-password", "--password", "\udcff")[1].endswith("gtcpserver: --password: must be UTF-8")
    assert "opens the proxy" in run("--mixed", "0.0.0.0:0", "--allow-client", "0.0.0.0/0")[1]
    assert run("--config", "x", "--socks", "127.0.0.1:1")[1].endswith("--socks: cannot be used together with --config")
    status, said = run("check", str(EXAMPLES / "personal.toml"))
    assert (status, said) == (0, f"{EXAMPLES}/personal.toml is good: it listens on 127.0.0.1:1080")
    assert run("hash-password", "--password", "x")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [True, False])
def test_the_command_serves_and_reloads(serve, connect, in_thread, tmp_path, workers):
    import socket

    target = serve(echo)
    path = tmp_path / "proxy.toml"
    text = '[[listener]]\nlisten = "127.0.0.1:0"\n[rules]\ndestinations = ["allow %s"]\n'
    path.write_text(text % "loopback")

    def reply(port):
        with socket.create_connection(("127.0.0.1", port), SOON) as sock:
            sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\x01" + target.port.to_bytes(2, "big"))
            data = b""
            while len(data) < 4:
                data += sock.recv(100)
            return data[3]

    command = [*COMMAND, "--config", str(path), *(["--workers", "1"] if workers else [])]
    failed, done = ("reload . failed", "reload . is done") if workers else ("nothing has changed", "files reloaded")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:

            def wait_for(pattern):
                while line := process.stderr.readline():
                    if found := re.search(pattern, line):
                        return found
                raise AssertionError(pattern)

            port = int(in_thread(wait_for, r"listening on 127\.0\.0\.1:(\d+)")[1])
            assert in_thread(reply, port) == 0
            path.write_text("broken")
            process.send_signal(signal.SIGHUP)
            in_thread(wait_for, failed)
            assert in_thread(reply, port) == 0
            path.write_text(text % "any")
            process.send_signal(signal.SIGHUP)
            in_thread(wait_for, done)
            assert in_thread(reply, port) == 2
            # Sockets stay as they are.
            path.write_text(text.replace("127.0.0.1:0", "127.0.0.1:1") % "loopback")
            process.send_signal(signal.SIGHUP)
            in_thread(wait_for, f"{failed}.*the listeners were 127.0.0.1:0 and are now 127.0.0.1:1")
            assert in_thread(reply, port) == 2
        finally:
            process.terminate()
            in_thread(process.communicate)  # the origin, which is here, must see the end of its connections


def test_a_list_without_rules_allows_nothing():
    made = make_proxy(parse_config("[rules]\nclients = []\ndestinations = []"))
    gate = made.handler._only.gate
    assert (gate.client_rules, gate.destination_rules) == ([], [])
    gate = make_proxy(parse_config("")).handler._only.gate
    assert [rule.text for rule in gate.client_rules] == ["allow 127.0.0.0/8", "allow ::1"]
    assert [rule.text for rule in gate.destination_rules] == ["allow any"]


def test_rules_about_a_listener_of_this_host_do_not_open_another_one():
    two = '[[listener]]\nname = "here"\n[[listener]]\nname = "there"\nlisten = "0.0.0.0:1"\n[rules]\nclients = ["%s"]'
    make_proxy(parse_config(two % "allow from any to here"))
    for rule in ("allow from any to there", "allow any"):
        with pytest.raises(ConfigError, match="opens the proxy to everybody"):
            parse_config(two % rule)
    # Rules may name the listener that is there without a word about it.
    make_proxy(parse_config('[rules]\nclients = ["allow from any to default"]'))


@pytest.mark.slow
def test_allow_open_by_itself_serves_everybody(in_thread):
    import socket

    command = [*COMMAND, "--mixed", "0.0.0.0:0", "--allow-open", "--allow-destination", "any"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r"listening on 0\.0\.0\.0:(\d+)", in_thread(process.stderr.readline))[1])
            with socket.create_connection(("127.0.0.1", port), SOON) as client:
                client.sendall(b"\x05\x01\x00")
                assert in_thread(client.recv, 2) == b"\x05\x00"
        finally:
            process.terminate()
    status, said = run("--config", "x", "--allow-open")
    assert status == 2
    assert said.endswith("--allow-open: cannot be used together with --config")


@pytest.mark.slow
def test_sockets_from_systemd_may_be_public(tmp_path):
    """What a unit file says is not in ours, so that a rule for everybody is refused."""
    (tmp_path / "proxy.toml").write_text('[rules]\nclients = ["allow any"]')
    code = (
        "import os, sys; os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}; "
        "os.execv(sys.executable, sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, "--config", str(tmp_path / "proxy.toml")],
        capture_output=True,
        text=True,
        timeout=SOON,
    )
    assert done.returncode == 2
    assert "'allow any' opens the proxy to everybody" in done.stderr
