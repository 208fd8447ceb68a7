"""Every key of the proxy's configuration acts: a file with it, a real proxy, and what is different."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
from typing import get_args

import gevent
import msgspec
import pytest
import trustme

from gtcpserver import ConfigError, Server
from gtcpserver.proxy import settings
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.record import Result
from gtcpserver.proxy.target import KINDS
from gtcpserver.proxy_protocol import ProxyHeader
from gtcpserver.tls.acme.settings import ACMESettings
from kit.clients import read
from kit.handlers import echo
from kit.paths import ROOT
from kit.patience import SOON
from kit.proxying import (
    LOOPBACK,
    QUICK,
    associate,
    bind_request,
    full_listener,
    http,
    named_address,
    reply,
    socks,
)
from kit.tls import Files
from kit.waiting import wait_until

#: test -> the keys that it is about; at the end it is compared with what there is.
ABOUT: dict[str, set[str]] = {}


def about(*keys):
    def note(test):
        ABOUT[test.__name__] = set(keys)
        return test

    return note


@pytest.fixture
def origin(serve):
    return serve(echo)


# -- listeners ---------------------------------------------------------------------------------------------------------


@about("listener.name", "listener.listen", "listener.speaks", "rules.clients", "rules.destinations")
def test_listeners_have_names_and_protocols(proxy, connect, in_thread, origin):
    rules = (
        '[rules]\nclients = ["allow from any to a", "allow from any to b"]\n'
        'destinations = ["allow from any via a to loopback"]\n'
        f'[[listener]]\nname = "b"\nlisten = "unix:@gtcpserver-test-{os.getpid()}"\n'
    )
    server = proxy(rules=rules, listener='name = "a"\nspeaks = "socks"')
    assert in_thread(reply, connect(server), socks(origin.port)) == 0
    assert in_thread(http, connect(server), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    assert in_thread(reply, connect(server.addresses[1]), socks(origin.port)) == 2  # not this way


@pytest.mark.slow
@about("listener.commands")
def test_commands_that_a_listener_does_not_have(proxy, connect, in_thread, origin):
    assert in_thread(reply, connect(proxy(listener='commands = ["connect"]')), socks(origin.port)) == 0
    assert in_thread(reply, connect(proxy(listener='commands = ["udp"]')), socks(origin.port)) == 7


@about("rules.nat64")
def test_addresses_behind_nat64_are_looked_at(proxy, connect, in_thread, origin):
    server = proxy(rules='[rules]\nnat64 = ["2a00:64::/96"]\n')
    for inner in ("127.0.0.1", "10.0.0.1", "169.254.169.254"):
        assert in_thread(reply, connect(server), socks(origin.port, f"2a00:64::{inner}")) == 2


@pytest.mark.slow
@about("listener.external")
@pytest.mark.parametrize(
    ("external", "expected"),
    [
        ('"127.0.0.9"', "127.0.0.9"),
        ('["127.0.0.8", "::1"]', "127.0.0.8"),
        ('"same"', "127.0.0.7"),
        ('"system"', "127.0.0.1"),
        ('"auto"', "127.0.0.1"),  # not from 127.0.0.7: see test_network.py
    ],
)
def test_from_where_destinations_are_connected(proxy, in_thread, serve, external, expected):
    server = proxy(listener=f'listen = "0.0.0.0:0"\nexternal = {external}'.partition("\n")[2])
    everywhere = Server("127.0.0.7:0", server.handler)
    seen = []
    origin = serve(lambda conn: seen.append(conn.client_address[0]))
    with everywhere, socket.create_connection(("127.0.0.7", everywhere.port), SOON) as client:
        assert in_thread(reply, client, socks(origin.port)) == 0
        wait_until(lambda: seen == [expected])


def test_an_address_family_that_external_does_not_have_is_out_of_reach(proxy, connect, in_thread, origin):
    server = proxy(listener='external = "::1"')
    assert in_thread(reply, connect(server), socks(origin.port)) == 3


@pytest.mark.slow
@about(
    "listener.tls_certfile",
    "listener.tls_keyfile",
    "listener.tls_client_ca",
    "listener.tls_client_auth",
    "auth.certificate",
    "auth.certificate_users",
)
@pytest.mark.parametrize("required", ["required", "optional"])
def test_clients_are_known_by_their_certificates(proxy, connect, in_thread, origin, tmp_path, access_records, required):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca")
    own = authority.issue_cert("localhost")
    own.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    own.private_key_pem.write_to_path(tmp_path / "key")
    listener = (
        f'tls_certfile = "{tmp_path}/cert"\ntls_keyfile = "{tmp_path}/key"\n'
        f'tls_client_ca = "{tmp_path}/ca"\ntls_client_auth = "{required}"\n'
    )
    rules = '[rules]\nclients = ["allow from any to any with auth staff"]\ndestinations = ["allow loopback"]\n'
    server = proxy('[auth.staff]\ncertificate = true\ncertificate_users = ["Ada"]', listener, rules=rules)

    def ask(name, request):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if name is not None:
            authority.issue_cert("client.example", common_name=name).configure_cert(context)
        with context.wrap_socket(connect(server), server_hostname="localhost") as client:
            try:
                return request(client)
            except OSError:
                return "refused"

    def by_socks(client):
        return reply(client, socks(origin.port))

    def by_http(client):
        return http(client, b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port)[9:12]

    assert in_thread(ask, "Ada", by_socks) == 0
    assert in_thread(ask, "Ada", by_http) == b"200"
    assert in_thread(ask, "Bob", by_socks) is None
    assert in_thread(ask, "Bob", by_http) == b"403"
    without = in_thread(ask, None, by_http)
    assert without == (b"403" if required == "optional" else "refused")
    assert access_records(2)[0].access["user"] == access_records(2)[1].access["user"] == "Ada"


@pytest.mark.slow
@about("listener.proxy_protocol", "listener.proxy_protocol_timeout")
def test_requirement_37_balancers_name_their_clients(proxy, connect, in_thread, origin, access_records):
    from ipaddress import ip_address

    server = proxy(
        listener='proxy_protocol = ["127.0.0.0/8"]\nproxy_protocol_timeout = 0.2',
        rules='[rules]\nclients = ["allow 192.0.2.0/24"]\ndestinations = ["allow loopback"]',
    )
    header = ProxyHeader((ip_address("192.0.2.7"), 1), (ip_address("192.0.2.1"), 2)).to_bytes()
    client = connect(server)
    client.sendall(header)
    assert in_thread(reply, client, socks(origin.port)) == 0
    client.close()
    assert access_records()[0].access["client"] == "192.0.2.7"
    stranger = ProxyHeader((ip_address("198.51.100.7"), 1), (ip_address("192.0.2.1"), 2)).to_bytes()
    client = connect(server)
    client.sendall(stranger)
    assert in_thread(reply, client, socks(origin.port)) is None
    assert in_thread(connect(server).recv, 1) == b""  # says nothing
    with pytest.raises(OSError):
        client = connect(server)
        assert in_thread(reply, client, socks(origin.port)) is None
        raise OSError
    results = [record.access["result"] for record in access_records(4)]
    assert sorted(results) == ["client_denied", "ok", "proxy_header", "proxy_header"]
    clients = {record.access["client"] for record in access_records(4) if record.access["result"] == "proxy_header"}
    assert clients == {"127.0.0.1"}  # the balancer
    assert server.stats().handler_counters["proxy_header"] == 2


# -- authenticators ----------------------------------------------------------------------------------------------------

WITH_AUTH = '[rules]\nclients = ["allow from any to any with auth staff"]\ndestinations = ["allow loopback"]\n'


@pytest.mark.slow
@about("auth.users", "auth.htpasswd")
def test_users_and_a_file_of_users(proxy, connect, in_thread, origin, tmp_path):
    (tmp_path / "users").write_text(f"bob:{QUICK}\n")
    text = f'[auth.staff]\nusers = {{ ada = "{QUICK}" }}\nhtpasswd = "{tmp_path}/users"'
    server = proxy(text, rules=WITH_AUTH)
    for user, expected in ((b"ada", 0), (b"bob", 0), (b"eve", None)):
        assert in_thread(reply, connect(server), socks(origin.port, user=user)) == expected


COMMAND = """
import os, sys, time
for line in sys.stdin:
    with open(sys.argv[1], "a") as file:
        print(os.getpid(), line.strip(), file=file)
    user, password = line.split()
    if user == "slow":
        time.sleep(20)
    print("OK" if password == "pw" else "ERR", flush=True)
"""


@pytest.mark.slow
@about("auth.command", "auth.processes", "auth.timeout", "auth.remember", "timeouts.authenticate")
def test_a_command_and_its_options(proxy, connect, in_thread, origin, tmp_path, access_records):
    (tmp_path / "helper.py").write_text(COMMAND)
    asked = tmp_path / "asked"
    command = json.dumps([sys.executable, str(tmp_path / "helper.py"), str(asked)])
    options = f"[auth.staff]\ncommand = {command}\nremember = 0\n"

    def questions():
        return asked.read_text().splitlines()

    server = proxy(options + "processes = 1\ntimeout = 3\n", rules=WITH_AUTH)
    for _ in range(2):
        assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 0
    assert len(questions()) == 2  # nothing is remembered
    assert len({line.split()[0] for line in questions()}) == 1  # one process
    assert in_thread(reply, connect(server), socks(origin.port, user=b"slow")) is None
    assert access_records(1)[-1].access["result"] == "authentication_failed"
    pid = int(questions()[0].split()[0])
    server.stop(5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # it went with the server
    asked.unlink()
    server = proxy(options.replace("remember = 0", "remember = 60"), rules=WITH_AUTH)
    for _ in range(2):
        assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 0
    assert len(questions()) == 1
    server = proxy(options + "[timeouts]\nauthenticate = 0.2", rules=WITH_AUTH)
    assert in_thread(reply, connect(server), socks(origin.port, user=b"slow")) is None
    wait_until(lambda: access_records()[-1].access["result"] == "authentication_timeout")


# -- timeouts ---------------------------------------------------------------------------------------------------------


def ends_as(result, access_records, number=1):
    wait_until(lambda: access_records(number)[-1].access["result"] == result)


@pytest.mark.slow
@about("timeouts.negotiate")
def test_requirement_31_negotiate(proxy, connect, in_thread, access_records):
    client = connect(proxy("[timeouts]\nnegotiate = 0.1"))
    client.sendall(b"\x05")
    assert in_thread(client.recv, 1) == b""
    ends_as("negotiation_timeout", access_records)


@pytest.mark.slow
@about("timeouts.connect")
def test_requirement_31_connect(proxy, connect, in_thread, access_records):
    with full_listener() as full:
        client = connect(proxy("[timeouts]\nconnect = 0.2"))
        assert in_thread(reply, client, socks(full.getsockname()[1])) == 4
    ends_as("connect_timeout", access_records)


@pytest.mark.slow
@about("timeouts.idle", "timeouts.half_closed", "timeouts.lifetime")
@pytest.mark.parametrize("which", ["idle", "half_closed", "lifetime"])
def test_requirement_31_tunnels(proxy, connect, in_thread, serve, access_records, which):
    origin = serve(lambda conn: gevent.sleep(SOON))
    server = proxy(f"[timeouts]\n{which} = 0.1")
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port)) == 0
    if which == "half_closed":
        client.shutdown(socket.SHUT_WR)
    assert in_thread(client.recv, 1) == b""
    ends_as(which, access_records)
    wait_until(lambda: server.stats().handler_counters == {which: 1})


@pytest.mark.slow
@about("timeouts.answer", "timeouts.keep_alive")
def test_requirement_31_http(proxy, connect, in_thread, serve, access_records):
    def answer(conn):
        head = conn.recv_until(b"\r\n\r\n")
        if b"slow" in head:
            gevent.sleep(SOON)
        conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    origin = serve(answer)
    client = connect(proxy("[timeouts]\nanswer = 0.1\nkeep_alive = 0.1"))
    request = b"GET http://127.0.0.1:%d/%b HTTP/1.1\r\nHost: x\r\n\r\n"
    assert in_thread(http, client, request % (origin.port, b"slow")).startswith(b"HTTP/1.1 504")
    assert in_thread(http, client, request % (origin.port, b"")).startswith(b"HTTP/1.1 204")
    assert in_thread(client.recv, 1) == b""


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@about("limits.connections", "limits.client_connections", "limits.user_connections", "limits.new_per_second")
@pytest.mark.parametrize("which", ["connections", "client_connections", "new_per_second"])
def test_requirement_34_connections(proxy, connect, in_thread, origin, access_records, which):
    server = proxy(f"[limits]\n{which} = {2 if which != 'new_per_second' else 2.0}")
    first, second = connect(server), connect(server)
    assert in_thread(reply, first, socks(origin.port)) == 0
    assert in_thread(reply, second, socks(origin.port)) == 0
    assert in_thread(reply, connect(server), socks(origin.port)) is None
    answer = in_thread(http, connect(server), b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert {record.access["result"] for record in access_records(2)} == {"limit"}
    assert {record.access["detail"] for record in access_records(2)} == {which}
    if which != "new_per_second":
        first.close()
        wait_until(lambda: len(access_records(3)) == 3)
        assert in_thread(reply, connect(server), socks(origin.port)) == 0


def test_requirement_34_connections_of_a_user(proxy, connect, in_thread, origin, access_records):
    text = f'[auth.staff]\nusers = {{ ada = "{QUICK}", bob = "{QUICK}" }}\n[limits]\nuser_connections = 1'
    server = proxy(text, rules=WITH_AUTH)
    first = connect(server)
    assert in_thread(reply, first, socks(origin.port, user=b"ada")) == 0
    assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 1
    assert in_thread(reply, connect(server), socks(origin.port, user=b"bob")) == 0
    head = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic YWRhOnB3\r\n\r\n" % origin.port
    assert in_thread(http, connect(server), head).startswith(b"HTTP/1.1 429 ")
    first.close()
    wait_until(lambda: len(access_records(3)) == 3)
    assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 0


@about("limits.udp_associations", "limits.client_udp_associations")
@pytest.mark.parametrize("which", ["udp_associations", "client_udp_associations"])
def test_associations(proxy, connect, in_thread, lines, which):
    server = proxy(f"[limits]\n{which} = 1")
    associate(connect(server), in_thread)
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01" + bytes(6))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x01"
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("limit", which)


@about("quota.bytes", "quota.users", "quota.period", "quota.file")
def test_quotas(proxy, connect, in_thread, origin, lines, tmp_path):
    text = f'[auth.staff]\nusers = {{ ada = "{QUICK}", bob = "{QUICK}" }}\n'
    text += f'[quota]\nbytes = 0\nusers = {{ bob = 1000 }}\nperiod = "day"\nfile = "{tmp_path}/quota"'
    server = proxy(text, rules=WITH_AUTH)
    assert in_thread(reply, connect(server), socks(origin.port, user=b"ada")) == 2
    assert in_thread(reply, connect(server), socks(origin.port, user=b"bob")) == 0
    assert (lines()[0]["result"], lines()[0]["detail"].split(", ")[0]) == ("quota", "0 bytes a day")


@about("udp.advertise", "udp.ports", "udp.full_cone")
def test_what_udp_clients_are_told(proxy, connect, in_thread):
    server = proxy('[udp]\nadvertise = "192.0.2.7"\nports = "20000-29999"\nfull_cone = true')
    host, port = associate(connect(server), in_thread)
    assert (host, 20000 <= port <= 29999) == ("192.0.2.7", True)
    assert server.handler._only.gate.udp.full_cone  # tests/proxy/test_udp.py


@pytest.mark.slow
@about("limits.connect_attempts", "limits.client_connect_attempts")
@pytest.mark.parametrize("which", ["connect_attempts", "client_connect_attempts"])
def test_attempts_to_connect(proxy, connect, in_thread, access_records, which):
    server = proxy(f"[limits]\n{which} = 1")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, socket.socket() as filler:
        # With one more in its queue it leaves attempts unanswered.
        filler.connect(silent.getsockname())
        port = silent.getsockname()[1]
        first = connect(server)
        first.sendall(socks(port))
        limits = server.handler._only.gate.limits
        wait_until(lambda: limits.attempts)
        assert in_thread(reply, connect(server), socks(port)) == 1
        record = access_records()[0].access
        assert (record["result"], record["detail"]) == ("limit", which)
        server.halt()
        wait_until(lambda: not limits.attempts)


@about("shared_limits", "on_store_failure", "store_timeout")  # with a real one: tests/store
def test_what_holds_without_the_redis_of_shared_limits(proxy, connect, in_thread, access_records, caplog):
    pytest.importorskip("redis")
    top = 'shared_limits = "redis://127.0.0.1:1"\nstore_timeout = 0.5\non_store_failure = "refuse"'
    server = proxy("[limits]\nclient_connections = 9", top=top)
    assert in_thread(http, connect(server), b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(
        b"HTTP/1.1 503 "
    )
    record = access_records()[0].access
    assert (record["result"], record["detail"]) == ("limit", "store_failure")
    assert "Redis at 127.0.0.1:1 is away" in caplog.text
    assert server.handler.store_settings.timeout == 0.5


@about("limits.request_body")
@pytest.mark.parametrize(
    ("framing", "status"),
    [("Content-Length: 11", b"413"), ("Transfer-Encoding: chunked", b"411"), ("Content-Length: 10", b"200")],
)
def test_bodies_of_requests_have_a_limit(proxy, connect, in_thread, serve, framing, status):
    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.recv_exactly(10)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    client = connect(proxy("[limits]\nrequest_body = 10"))
    client.sendall(f"PUT http://127.0.0.1:{serve(answer).port}/ HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    client.sendall(b"x" * 10)
    assert in_thread(read, client, 12)[9:] == status


@pytest.mark.slow
@about("limits.rate", "limits.user_rate")
@pytest.mark.parametrize("which", ["rate", "user_rate"])
def test_requirement_34_bytes_a_second(proxy, connect, in_thread, serve, access_records, which):
    size = 40_000

    def send(conn):
        head = conn.recv(1000)
        if head.startswith(b"GET"):
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        conn.sendall(bytes(size))

    origin = serve(send)
    text = f'[auth.staff]\nusers = {{ ada = "{QUICK}" }}\n[limits]\n{which} = 60_000'
    server = proxy(text, rules=WITH_AUTH)

    def by_socks():
        client = connect(server)
        assert reply(client, socks(origin.port, user=b"ada")) == 0
        client.sendall(b"x")
        assert len(read(client, size)) == size
        client.close()

    def by_http():
        client = connect(server)
        url = b"http://127.0.0.1:%d/" % origin.port
        client.sendall(b"GET %b HTTP/1.0\r\nProxy-Authorization: Basic YWRhOnB3\r\n\r\n" % url)
        assert len(read(client, 1_000_000)) > size
        client.close()

    in_thread(by_socks)
    in_thread(by_http)
    for record in access_records(2):
        # The first quarter of a second's worth, or 16 KiB, is for nothing; the last piece was read without a rest.
        assert record.access["duration"] >= (size - 16384 - 16384) / 60_000 * 0.9


# -- upstreams ---------------------------------------------------------------------------------------------------------


@about("upstream.url", "upstream.through", "upstream.resolve", "rules.upstreams")
def test_a_chain_of_three(proxy, connect, in_thread, origin, access_records):
    last = proxy(
        f'[auth.staff]\nusers = {{ ada = "{QUICK}" }}\n',
        rules='[rules]\nclients = ["allow from any to any with auth staff"]\ndestinations = ["allow loopback"]',
    )
    middle = proxy()
    first = proxy(
        f'[upstream.middle]\nurl = "http://{middle.address}"\n'
        f'[upstream.last]\nurl = "socks5://ada:pw@{last.address}"\nthrough = "middle"\nresolve = "there"\n',
        rules='[rules]\nupstreams = ["through last localhost", "through direct 127.0.0.1"]\n'
        'destinations = ["allow loopback"]',
    )
    client = connect(first)
    assert in_thread(reply, client, socks(origin.port, "localhost")) == 0
    client.sendall(b"hello")
    assert in_thread(read, client, 5) == b"hello"
    client.close()
    seen = [record.access for record in access_records(3)]
    assert {one["asked"] for one in seen} == {f"localhost:{origin.port}", last.address}
    assert [one["user"] for one in seen if one["upstream"] is None and one["asked"] != last.address] == ["ada"]
    assert [one["upstream"] for one in seen if one["upstream"]] == ["last"]
    client = connect(first)
    assert in_thread(reply, client, socks(origin.port)) == 0  # directly
    client.close()
    assert access_records(4)[3].access["upstream"] is None


@about(
    *(f"upstream.{key}" for key in ("members", "strategy", "weights", "fall", "rise", "check_every")),
)
def test_a_group(proxy, connect, in_thread, origin, access_records):
    members = [proxy() for _ in range(2)]
    server = proxy(
        "".join(f'[upstream.{name}]\nurl = "http://{one.address}"\n' for name, one in zip("ab", members, strict=True))
        + '[upstream.pool]\nmembers = ["a", "b"]\nstrategy = "round-robin"\nweights = [2, 1]\n'
        "fall = 1\nrise = 1\ncheck_every = 0.01\n",
        rules='[rules]\nupstreams = ["through pool any"]\ndestinations = ["allow loopback"]',
    )
    for _ in range(3):
        with connect(server) as client:
            assert in_thread(reply, client, socks(origin.port)) == 0
    ways = [record.access["upstream"] for record in access_records(6) if record.access["upstream"]]
    assert sorted(ways) == ["a", "a", "b"]


@about("upstream.send_proxy")
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_next_proxy_is_told_the_client(proxy, connect, in_thread, origin, access_records, version):
    last = proxy(listener='proxy_protocol = ["127.0.0.1"]')
    first = proxy(
        f'[upstream.last]\nurl = "socks5://{last.address}"\nsend_proxy = "{version}"\n',
        rules='[rules]\nupstreams = ["through last any"]\ndestinations = ["allow loopback"]',
    )
    with socket.socket() as client:
        client.settimeout(SOON)
        client.bind(("127.0.0.5", 0))
        client.connect(("127.0.0.1", first.port))
        assert in_thread(reply, client, socks(origin.port)) == 0
    assert [line.access["client"] for line in access_records(2)] == ["127.0.0.5"] * 2


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@about("resolver.family", "resolver.kind", "resolver.timeout")
def test_the_resolver(proxy, connect, in_thread, origin, monkeypatch):
    from gtcpserver.proxy import system_names

    def getaddrinfo(name, *_args):
        if name == "slow.example.":
            import time

            time.sleep(0.5)
        return [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("::1", 0))]

    monkeypatch.setattr(system_names, "_getaddrinfo", getaddrinfo)
    rules = '[rules]\ndestinations = ["allow 127.0.0.1"]'
    server = proxy('[resolver]\nkind = "system"\nfamily = "ipv6"\ntimeout = 0.1', rules=rules)
    assert in_thread(reply, connect(server), socks(origin.port, "x.example")) == 2  # ::1 is not allowed
    assert in_thread(reply, connect(server), socks(origin.port, "slow.example")) == 4
    server = proxy('[resolver]\nkind = "system"\nfamily = "ipv4"', rules=rules)
    assert in_thread(reply, connect(server), socks(origin.port, "x.example")) == 0


@about("resolver.servers")
def test_name_servers_of_ones_own(proxy, connect, in_thread, origin, dns_server):
    dns_server.add("x.example", "A", "127.0.0.1")
    server = proxy(f'[resolver]\nservers = ["{dns_server.address}"]')
    assert in_thread(reply, connect(server), socks(origin.port, "x.example")) == 0


@pytest.mark.slow
@about("http.forwarded", "http.forwarded_field", "http.pseudonym")
@pytest.mark.parametrize(
    ("how", "field"), [("remove", None), ("append", b"X-Forwarded-For"), ("replace", b"Forwarded")]
)
def test_what_origins_are_told(proxy, connect, in_thread, serve, how, field):
    heads = []

    def answer(conn):
        heads.append(conn.recv_until(b"\r\n\r\n"))
        conn.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    origin = serve(answer)
    written = 'forwarded_field = "forwarded"\n' if field == b"Forwarded" else ""
    client = connect(proxy(f'[http]\nforwarded = "{how}"\n{written}pseudonym = "us"'))
    in_thread(http, client, b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % origin.port)
    assert b"Via: 1.1 us\r\n" in heads[0]
    told = {line.partition(b":")[0] for line in heads[0].split(b"\r\n")}
    assert told & {b"X-Forwarded-For", b"Forwarded"} == ({field} if field else set())


@about("log.style", "log.redact")
def test_the_log(proxy, connect, in_thread, origin, access_records):
    for style in ("text", "json"):
        client = connect(proxy(f'[log]\nstyle = "{style}"\nredact = true'))
        assert in_thread(reply, client, socks(origin.port)) == 0
        client.close()
    text, as_json = (record.getMessage() for record in access_records(2))
    assert f":{origin.port}" not in text + as_json
    assert text.startswith("client=127.0.0.1 listener=default protocol=socks5 command=CONNECT")
    assert json.loads(as_json)["asked"] == "-"


@about("log.at")
@pytest.mark.parametrize(("at", "results"), [("end", ["ok"]), ("both", ["open", "ok"])])
@pytest.mark.parametrize("asked", ["socks5", "connect", "bind", "udp"])
def test_a_line_when_a_tunnel_begins(proxy, connect, in_thread, origin, lines, at, results, asked):
    server = proxy(f'[log]\nat = "{at}"')
    client = connect(server)
    if asked == "udp":
        associate(client, in_thread)
    elif asked == "connect":
        client.sendall(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in in_thread(client.recv, 100)
    elif asked == "bind":
        client.sendall(b"\x05\x01\x00" + bind_request())
        told = named_address(in_thread(read, client, 12)[2:])
        peer = connect("{}:{}".format(*told))
        assert in_thread(read, client, 10)[1] == 0
        peer.close()
    else:
        assert in_thread(reply, client, socks(origin.port)) == 0
    if at == "both":
        first = lines()[0]
        assert first["result"] == "open"
        assert asked == "udp" or first["connected"]
    client.close()
    found = lines(len(results))
    assert [line["result"] for line in found] == results
    assert len({line["time"] for line in found}) == 1
    wait_until(lambda: server.handler.counters == {"ok": 1})


@pytest.mark.slow
@about("log.file")
@pytest.mark.parametrize("style", ["text", "json"])
def test_the_log_has_a_file_of_its_own(in_thread, serve, tmp_path, style):
    origin = serve(echo)
    path = tmp_path / "access.log"
    rules = LOOPBACK.replace("[rules]", f'[log]\nstyle = "{style}"\nfile = "{path}"\n[rules]')
    (tmp_path / "proxy.toml").write_text(f'[[listener]]\nlisten = "127.0.0.1:0"\n{rules}')
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--config", str(tmp_path / "proxy.toml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:

            def use():
                with socket.create_connection(("127.0.0.1", port), SOON) as client:
                    assert reply(client, socks(origin.port)) == 0

            port = int(re.search(r"127\.0\.0\.1:(\d+)", in_thread(process.stderr.readline))[1])
            in_thread(use)
            wait_until(lambda: path.read_text())
            path.rename(tmp_path / "old.log")
            in_thread(use)
            wait_until(lambda: path.exists() and path.read_text())
        finally:
            process.terminate()
            rest = in_thread(process.stderr.read)
    assert "socks5" not in rest
    for name in ("old.log", "access.log"):
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == 1
        if style == "json":
            assert json.loads(lines[0])["result"] == "ok"
        else:
            assert re.match(r"20\d\d-\d\d-\d\dT\S+ client=127\.0\.0\.1 .* result=ok ", lines[0])


@pytest.mark.slow
def test_a_log_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "proxy.toml").write_text('[log]\nfile = "/no/such/log"')
    command = [sys.executable, "-m", "gtcpserver", "proxy", "--config", str(tmp_path / "proxy.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 2
    assert done.stderr == "gtcpserver: cannot open the access log /no/such/log: No such file or directory\n"


@about("show_bound_address", "fast_open", "allow_open")
def test_the_top(proxy, connect, in_thread, serve):
    origin = serve(echo)

    def bound(server):
        client = connect(server)
        client.sendall(socks(origin.port))
        return in_thread(read, client, 12)[6:10]

    assert bound(proxy()) == b"\x7f\0\0\1"
    assert bound(proxy(top="show_bound_address = false")) == bytes(4)
    assert proxy(top="fast_open = true").handler._only.gate.fast_open
    everywhere = '[[listener]]\nlisten = "0.0.0.0:0"\n[rules]\nclients = ["allow any"]\n'
    with pytest.raises(ConfigError, match="opens the proxy to everybody"):
        make_proxy(parse_config(everywhere))
    make_proxy(parse_config("allow_open = true\n" + everywhere))


@about("listener.tproxy", "listener.connect_to", "listener.name_timeout")
def test_a_transparent_listener(proxy, connect, in_thread):
    server = proxy(listener='speaks = "transparent"\ntproxy = true\nconnect_to = "name"\nname_timeout = 0.25')
    found = server.handler._only._interception
    assert (found.tproxy, found.connect_to, found.name_timeout) == (True, "name", 0.25)
    with pytest.raises(ConnectionResetError):
        in_thread(connect(server).recv, 1)  # it was not redirected


@about("http.pac", "http.pac_direct")
def test_the_script_for_browsers(proxy, connect, in_thread):
    request = b"GET /proxy.pac HTTP/1.1\r\nHost: x:80\r\nConnection: close\r\n\r\n"
    assert in_thread(http, connect(proxy()), request).startswith(b"HTTP/1.1 400 ")
    server = proxy('[http]\npac = true\npac_direct = [".corp.test"]')
    assert b'dnsDomainIs(host, ".corp.test")' in in_thread(http, connect(server), request)


@about("http.via")
@pytest.mark.parametrize(("via", "name"), [("on", b"me"), ("off", b"")])
def test_via(proxy, via, name):
    assert proxy(f'[http]\nvia = "{via}"\npseudonym = "me"').handler._only._pseudonym == name


@about("reload.end_forbidden")
@pytest.mark.parametrize("ends", [True, False])
def test_what_a_reload_ends(proxy, connect, in_thread, origin, ends):
    server = proxy()
    client = connect(server)
    assert in_thread(reply, client, socks(origin.port)) == 0
    old = server.handler
    text = f'[[listener]]\nlisten = "127.0.0.1:0"\n[reload]\nend_forbidden = {str(ends).lower()}\n'
    server.handler = make_proxy(parse_config(text + "[rules]\ndestinations = []")).handler
    old.retire(server.handler)
    if ends:
        with pytest.raises(ConnectionResetError):
            in_thread(client.recv, 1)
    else:
        client.sendall(b"hello")
        assert in_thread(read, client, 5) == b"hello"


@about("listener.acme", *(f"listener.acme_{name}" for name in ("email", "directory", "folder", "ca_file")))
def test_the_certificate_of_a_listener_may_be_ordered(tmp_path):
    """test_acme.py does it."""
    ca_file = Files(tmp_path).ca_file
    text = (
        '[[listener]]\nacme = ["a.example.com", "b.example.com"]\nacme_email = "me@example.com"\n'
        f'acme_directory = "https://ca.test/dir"\nacme_folder = "{tmp_path}/acme"\nacme_ca_file = "{ca_file}"\n'
    )
    (credentials,) = make_proxy(parse_config(text)).handler.tls_credentials
    names = ["a.example.com", "b.example.com"]
    assert credentials.config.managed == ACMESettings.checked(
        names, "me@example.com", "https://ca.test/dir", f"{tmp_path}/acme", ca_file
    )


@about("upstream.tls_ca", "upstream.tls_name", "upstream.check", "upstream.check_target")
@pytest.mark.parametrize("name", ["far.test", "other.test"])
def test_an_upstream_by_https_that_is_checked(proxy, connect, in_thread, serve, tmp_path, name):
    files = Files(tmp_path)
    certfile, keyfile = files.issue("far", "far.test")
    far = proxy(listener=f'tls_certfile = "{certfile}"\ntls_keyfile = "{keyfile}"')
    origin, checked = serve(echo), serve(echo)
    near = proxy(
        f'[upstream.far]\nurl = "https://{far.address}"\ntls_ca = "{files.ca_file}"\ntls_name = "{name}"\n'
        f'[upstream.out]\nmembers = ["far"]\nfall = 1\ncheck_every = 0.01\ncheck = "connect"\n'
        f'check_target = "127.0.0.1:{checked.port}"',
        rules=LOOPBACK + 'upstreams = ["through out any"]\n',
    )
    is_good = name == "far.test"
    assert in_thread(reply, connect(near), socks(origin.port)) == (0 if is_good else 1)
    wait_until(lambda: near.stats().handler_gauges["upstream_up:out/far"] == is_good)
    wait_until(lambda: bool(checked.accepted_connections) == is_good)


def keys(table, prefix=""):
    for field in msgspec.structs.fields(table):
        kinds = [field.type, *getattr(field.type, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
        if inner:
            yield from keys(inner[0], f"{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_has_a_test():
    assert set(keys(settings.ProxyConfig)) == set().union(*ABOUT.values())


def test_every_key_result_and_kind_is_in_the_docs():
    text = (ROOT / "docs" / "proxy.md").read_text()
    names = {key.rpartition(".")[2] for key in keys(settings.ProxyConfig)} | set(KINDS) | set(get_args(Result))
    words = set(re.findall(r"`(?:[a-z]+\.)?([a-z0-9_-]+)`", text))
    assert names - words == set()
