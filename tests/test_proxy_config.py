"""The configuration of the proxy: every mistake is told with its line, and every key acts."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SOON
from test_proxy_passwords import QUICK
from test_server import echo

from gtcpserver import ConfigError, Server
from gtcpserver.proxy.config import make_proxy, parse_config, read_config

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "proxy"
COMMAND = [sys.executable, "-m", "gtcpserver", "proxy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "proxy.toml line 1: there is no x"),
        ("\n[rules]\nclient = []", "proxy.toml line 3: there is no client"),
        ('[[listener]]\nlisten = "127.0.0.1:1"\n[[listener]]\nlisten = 5', "line 4: Expected str, got int"),
        ('[[listener]]\nspeaks = "ftp"', "line 2: Invalid enum value 'ftp' (at listener[0].speaks)"),
        ('[[listener]]\nlisten = "nowhere"', 'line 2: address must be "host:port"'),
        ('[[listener]]\nsource = "eth0"', "line 2: 'eth0' does not appear to be an IPv4 or IPv6 address"),
        ('[[listener]]\ntls_certfile = "/no/such"', "line 2: "),
        ('[[listener]]\ntls_keyfile = "/no/such"', "tls_keyfile needs tls_certfile"),
        ("[timeouts]\n\nconnect = 0", "line 3: connect must be more than 0 seconds, got 0"),
        ('[timeouts]\nconnect = "5"', "line 2: Expected float, got str"),
        ("[timeouts]\nconnect = nan", "line 2: connect must be more than 0 seconds, got nan"),
        ('[rules]\nclients = ["allow from any to home"]', "line 2: there is no listener 'home'"),
        ('[rules]\nclients = ["allow from any to any with auth x"]', "line 2: there is no authenticator 'x'"),
        (
            '[rules]\ndestinations = [\n"allow from any via x to any"]',
            "line 2: there is no listener or authenticator 'x'",
        ),
        ('[rules]\ndestinations = ["allow any all"]', "line 2: nothing more expected, got 'all' in 'allow any all'"),
        ("[auth.staff]", "line 1: an authenticator needs users, an htpasswd file or a command"),
        ('[auth.staff]\nusers = {ada = "plain"}', "line 1: a password must be a hash"),
        ('[auth.staff]\nhtpasswd = "/no/such"', "line 1: cannot read /no/such: No such file or directory"),
        ('[auth.staff]\ncommand = ["/no/such/program"]', "line 1: "),
        ('[resolver]\nfamily = "ipx"', "line 2: Invalid enum value 'ipx'"),
        ("[resolver]\ntimeout = 0", "line 2: timeout must be"),
        ('[log]\nstyle = "xml"', "line 2: Invalid enum value 'xml'"),
        ('[[listener]]\nlisten = "0.0.0.0:1"\n[rules]\nclients = ["allow any"]', "line 4: 'allow any' opens the proxy"),
        ("[[listener]\n", "proxy.toml: "),
    ],
)
def test_mistakes_are_told_with_line_and_field(text, message):
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "proxy.toml")
    assert message in str(raised.value)
    assert str(raised.value).startswith("proxy.toml")


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


def test_two_listeners_on_one_port():
    with pytest.raises(ConfigError, match="must not have the same port"):
        make_proxy(parse_config('[[listener]]\nlisten = "127.0.0.1:1"\n[[listener]]\nlisten = "127.0.0.2:1"'))


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
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=SOON)
    return done.returncode, (done.stderr or done.stdout).strip()


def test_the_command_says_what_is_wrong(tmp_path):
    (tmp_path / "bad.toml").write_text("[timeouts]\nconect = 5\n")
    wrong = f"gtcpserver: {tmp_path}/bad.toml line 2: there is no conect (at timeouts.conect)"
    assert run("check", f"{tmp_path}/bad.toml") == (2, wrong)
    assert run("--config", f"{tmp_path}/bad.toml") == (2, wrong)
    assert run("--user", "ada") == (2, "gtcpserver: --user: must be NAME:PASSWORD, got 'ada'")
    assert "opens the proxy" in run("--mixed", "0.0.0.0:0", "--allow-client", "0.0.0.0/0")[1]
    assert run("--config", "x", "--socks", "127.0.0.1:1")[1].endswith("--socks: cannot be used together with --config")
    status, said = run("check", str(EXAMPLES / "personal.toml"))
    assert (status, said) == (0, f"{EXAMPLES}/personal.toml is good: it listens on 127.0.0.1:1080")
    assert run("hash-password", "--password", "x")[1].startswith("$argon2id$")


def test_the_command_serves_and_reloads(serve, connect, in_thread, tmp_path):
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

    with subprocess.Popen(
        [*COMMAND, "--config", str(path), "--workers", "1"], stderr=subprocess.PIPE, text=True
    ) as process:
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
            in_thread(wait_for, "reload 1 failed")
            assert in_thread(reply, port) == 0
            path.write_text(text % "any")
            process.send_signal(signal.SIGHUP)
            in_thread(wait_for, "reload . is done")
            assert in_thread(reply, port) == 2
        finally:
            process.terminate()
            process.communicate()
