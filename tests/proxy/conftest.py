"""Proxies and origins that many tests of the proxy start."""

from __future__ import annotations

import pytest

from gtcpserver import Server
from gtcpserver.proxy import resolve
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.http_fields import Forwarded
from gtcpserver.proxy.http_session import HttpSession
from gtcpserver.proxy.resolve import Resolver
from gtcpserver.proxy.rules import parse_client_rule
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.visitor import admit
from kit.dns_server import DnsServer
from kit.forwarding import CLOSE, Client
from kit.proxying import ANYBODY, ANYWHERE, LOOPBACK


@pytest.fixture
def proxy(tmp_path):
    """`proxy(text, listener="")` starts a proxy with this configuration on a port of its own."""
    servers = []

    def start(text="", listener="", top="", rules=LOOPBACK):
        text = f'{top}\n[[listener]]\nlisten = "127.0.0.1:0"\n{listener}\n{rules}\n{text}'
        made = make_proxy(parse_config(text))
        server = Server([str(address) for address in made.addresses], made.handler)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.halt()


@pytest.fixture
def proxy_by(serve):
    """`proxy_by(upstream, **gate)` starts a proxy that goes everywhere by another one."""

    def start(upstream, **options):
        options.setdefault("destination_rules", ANYWHERE)
        gate = Gate(
            client_rules=[parse_client_rule("allow any")],
            upstreams={upstream.name: upstream},
            upstream_rules=[parse_upstream_rule(f"through {upstream.name} any")],
            **options,
        )
        return serve(ProxyHandler(gate))

    return start


@pytest.fixture
def no_faults(caplog):
    """Whatever the others do, no handler of ours fails."""
    yield
    assert not [record for record in caplog.get_records("call") if record.levelname in ("ERROR", "CRITICAL")]


@pytest.fixture
def records():
    return []


@pytest.fixture
def http_proxy(serve, records):
    """`http_proxy(**options)`: a server that is nothing but an HttpSession; its records go to `records`."""

    def start(forwarded="pass", **options):
        gate = Gate(**{"client_rules": ANYBODY, "destination_rules": ANYWHERE, **options})

        def handler(conn):
            HttpSession(conn, admit(gate, conn), b"me", records.append, Forwarded(forwarded)).serve()

        return serve(handler)

    return start


@pytest.fixture
def origin(serve):
    """`origin(*answers)`: answers one request after another, each with the next of these; then it closes.

    An answer is bytes, or a function of the connection and the head. `.heads` are the requests.
    """

    def start(*answers):
        heads = []

        def handler(conn):
            while len(heads) < len(answers):
                try:
                    head = conn.recv_until(b"\r\n\r\n")
                except EOFError:
                    return
                heads.append(head)
                answer = answers[len(heads) - 1]
                given = answer(conn, head) if callable(answer) else answer
                if given is CLOSE:
                    return
                conn.sendall(given or b"")

        server = serve(handler)
        server.heads = heads
        server.url = f"http://127.0.0.1:{server.port}"
        return server

    return start


@pytest.fixture
def client(connect, in_thread):
    return lambda server, **options: Client(connect(server, **options), in_thread)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dns_server():
    one = DnsServer()
    yield one
    one.stop()


@pytest.fixture
def name_files(tmp_path, monkeypatch):
    """`name_files(resolv_conf, hosts, nsswitch)`: what this host's files say."""

    def write(conf="search\n", hosts="", nsswitch="hosts: files dns\n"):
        for name, text in (("RESOLV_CONF", conf), ("HOSTS", hosts), ("NSSWITCH_CONF", nsswitch)):
            (tmp_path / name).write_text(text)
            monkeypatch.setattr(resolve, name, str(tmp_path / name))

    monkeypatch.delenv("LOCALDOMAIN", raising=False)
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    write()
    return write


@pytest.fixture
def resolver_of(dns_server, name_files):
    """`resolver_of(conf, **options)`: a Resolver that asks `dns_server`."""
    made = []

    def make(conf="search\n", hosts="", **options):
        name_files(conf, hosts)
        options.setdefault("servers", [dns_server.address])
        made.append(Resolver(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()
