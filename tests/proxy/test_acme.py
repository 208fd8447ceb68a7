"""Certificates of the proxy's listeners that are ordered by themselves, from a real ACME authority."""

import os
import signal
import socket
import ssl
from contextlib import contextmanager

import gevent
import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.tls.acme.folder import Folder
from gtcpserver.tls.acme.settings import ACMESettings
from kit.patience import SOON
from kit.programs import needs
from kit.supervised import Master
from kit.waiting import wait_until

NAME = "a.example.com"


def listener(folder, *more, port=0):
    lines = [f'[[listener]]\nlisten = "127.0.0.1:{port}"', f'acme = ["{NAME}"]', f'acme_folder = "{folder}"', *more]
    return "\n".join(lines) + "\n"


def of(front):
    return f'acme_directory = "{front.directory}"', f'acme_ca_file = "{front.ca_file}"'


@contextmanager
def running(folder, *arguments):
    proxy = Master(folder, ("proxy", *arguments))
    try:
        yield proxy.wait_listening()
        assert proxy.stop() == 0
    finally:
        proxy.kill_all()


def handshake(port, protocols=()):
    """A client whose handshake is done; the caller closes it. None: it was refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(list(protocols))
    try:
        sock = socket.create_connection(("127.0.0.1", port), SOON)
    except ConnectionResetError:  # at once
        return None
    try:
        return context.wrap_socket(sock, server_hostname=NAME)
    except OSError:
        sock.close()
        return None


def socks_answer(port):
    with handshake(port) as client:
        client.sendall(b"\x05\x01\x00")
        return client.recv(2)


@pytest.mark.slow
@needs("pebble", "pebble-challtestsrv")
def test_a_listener_orders_its_certificate_though_its_rules_admit_no_authority(front, tmp_path):
    file = tmp_path / "proxy.toml"
    table = listener(tmp_path / "acme", *of(front), port=front.validates)
    file.write_text(table + '[rules]\nclients = ["allow 192.0.2.0/24"]\n')
    with running(tmp_path, "--config", str(file)) as proxy:
        proxy.wait_for(f"ACME: certificate for {NAME} issued")
        proxy.wait_for("result=acme_challenge")
        assert handshake(front.validates) is None
        proxy.wait_for("result=client_denied")
        file.write_text(table)
        proxy.send_signal(signal.SIGHUP)
        proxy.wait_for("files reloaded")
        assert socks_answer(front.validates) == b"\x05\x00"
        assert front.count("/order-plz") == 1  # what the reload has made anew finds it


@pytest.mark.slow
@needs("pebble", "pebble-challtestsrv")
def test_all_workers_have_the_certificate(front, tmp_path):
    (tmp_path / "proxy.toml").write_text(listener(tmp_path / "acme", *of(front), port=front.validates))
    with running(tmp_path, "--config", "proxy.toml", "--workers", "2", "--control", str(tmp_path / "ctl")) as proxy:
        proxy.wait_for(r"TLS certificates reloaded; the first expires on 20", count=2)
        assert {socks_answer(front.validates) for _ in range(8)} == {b"\x05\x00"}
        assert front.count("/order-plz") == 1


@pytest.mark.slow
@needs("pebble", "pebble-challtestsrv")
def test_options_of_every_server_order_one_for_all_listeners(front, tmp_path):
    options = ["--acme", NAME, "--acme-directory", front.directory, "--acme-folder", str(tmp_path / "acme")]
    options += ["--acme-ca-file", front.ca_file, "--mixed", f"127.0.0.1:{front.validates}"]
    with running(tmp_path, *options) as proxy:
        proxy.wait_for("TLS certificates reloaded")
        assert socks_answer(front.validates) == b"\x05\x00"


@pytest.fixture
def asked(tmp_path, serve, monkeypatch):
    """`asked(rule)`: a proxy whose client rule this is, while an authority is about to ask it."""
    from gtcpserver.tls.acme.ordering import challenge_certificate

    monkeypatch.setattr("gtcpserver.server.certificates.keep_certificate", lambda *_arguments: None)
    challenge = Folder(ACMESettings.checked([NAME], None, "staging", str(tmp_path / "acme"), None)).challenge(NAME)
    os.makedirs(os.path.dirname(challenge))
    with open(challenge, "wb") as file:
        file.write(challenge_certificate(NAME, "token.thumbprint"))

    def start(rule):
        made = make_proxy(parse_config(listener(tmp_path / "acme") + f'[rules]\nclients = ["{rule}"]\n'))
        return serve(made.handler), made.handler.counters

    return start


@pytest.mark.parametrize(
    ("rule", "result"), [("allow 127.0.0.1", "tls_failed"), ("allow 192.0.2.0/24", "client_denied")]
)
def test_the_question_is_answered_whoever_asks(asked, in_thread, rule, result):
    server, counters = asked(rule)
    with in_thread(handshake, server.port, ["acme-tls/1"]) as client:
        assert client.selected_alpn_protocol() == "acme-tls/1"
        assert in_thread(client.recv, 1) == b""
    wait_until(lambda: counters == {"acme_challenge": 1})
    assert server.stats().handshake_failures == {"acme_challenge": 1}
    # There is no certificate yet: other clients are refused, by a rule or by the handshake.
    assert in_thread(handshake, server.port) is None
    wait_until(lambda: counters == {"acme_challenge": 1, result: 1})


def test_a_question_in_pieces_is_answered(asked, connect, in_thread):
    server, counters = asked("allow 192.0.2.0/24")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["acme-tls/1"])
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(received, sent, server_hostname=NAME).do_handshake()
    hello = sent.read()
    client = connect(server)
    for piece in (hello[:1], hello[1:4], hello[4:100], hello[100:]):
        client.sendall(piece)
        gevent.sleep(0.03)  # so that they do not come as one
    assert in_thread(client.recv, 5)[:1] == b"\x16"
    client.close()
    wait_until(lambda: sum(counters.values()) == 1)
    assert counters["client_denied"] == 0


@pytest.mark.parametrize("data", [b"", b"\x05\x01\x00", b"\x16\x03\x01", b"\x16\x03\x01\xff\xff" + bytes(5000)])
def test_others_whom_no_rule_admits_get_nothing_within_a_second(asked, connect, in_thread, data):
    server, counters = asked("allow 192.0.2.0/24")
    client = connect(server)
    client.sendall(data)
    with pytest.raises(ConnectionResetError):
        in_thread(client.recv, 1)
    wait_until(lambda: counters == {"client_denied": 1})
    assert server.stats().handshake_failures == {}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['acme = ["*.example.com"]'], "line 3: acme must be without a wildcard"),
        (['acme = ["localhost"]'], "line 3: acme must be full host names"),
        ([f'acme = ["{NAME}"]', 'acme_email = "me"'], "line 3: acme_email must be one address"),
        ([f'acme = ["{NAME}"]', 'acme_directory = "http://x/"'], 'line 3: acme_directory must be "staging", '),
        ([f'acme = ["{NAME}"]', 'acme_ca_file = "/none"'], "line 3: acme_ca_file must be a PEM file"),
        ([f'acme = ["{NAME}"]', 'tls_certfile = "x"'], "tls_certfile cannot be used together with acme"),
        ([f'acme = ["{NAME}"]', 'tls_keyfile = "x"'], "tls_keyfile cannot be used together with acme"),
        ([f'acme = ["{NAME}"]', 'speaks = "transparent"'], 'acme is not for speaks = "transparent"'),
        (['acme_email = "me@example.com"'], "acme_email needs acme"),
        (['acme_folder = "x"'], "acme_folder needs acme"),
        (['tls_client_ca = "x"'], "tls_client_ca needs tls_certfile or acme"),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, lines, told):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        parse_config("\n".join(["[[listener]]", 'listen = "127.0.0.1:0"', *lines]), "proxy.toml")
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_two_listeners_may_share_a_certificate_but_not_its_folder_alone(tmp_path):
    one = listener(tmp_path / "acme")
    other = one.replace("127.0.0.1", "[::1]")
    assert len(make_proxy(parse_config(one + other)).handler.tls_credentials) == 2
    with pytest.raises(
        ConfigError, match=r"listeners whose first name in acme is 'a.example.com' need the same acme keys"
    ):
        parse_config(one + other.replace(f'"{NAME}"', f'"{NAME}", "b.example.com"'))
