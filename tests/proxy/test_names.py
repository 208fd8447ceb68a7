"""Names mean what they say: the name that is looked up is the one that rules see, and an answer is one to our question.

The name server is one of dnspython's messages, over loopback.
"""

import socket
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver import ConfigError
from gtcpserver.proxy import name_files as name_files_module
from gtcpserver.proxy import questions, system_names
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.resolve import Resolver, ResolveTimeout
from gtcpserver.proxy.rules import RuleMatch, decide_destination, names_to_look_up, parse_destination_rule
from gtcpserver.proxy.upstream_rules import parse_upstream_rule
from gtcpserver.proxy.upstream_url import parse_upstream
from kit.dns_server import SILENT
from kit.handlers import echo
from kit.proxying import ANYBODY, ANYWHERE, http, reply, socks
from kit.resolving import found, refused

LOCAL = ip_address("127.0.0.1")


# -- which name --------------------------------------------------------------------------------------------------------


def test_a_final_dot_makes_a_name_absolute(dns_server, resolver_of):
    dns_server.add("svc.ns.corp.test", "A", "192.0.2.66")
    one = resolver_of("search corp.test\n")
    assert refused(one, "svc.ns.").errno == socket.EAI_NONAME
    assert {name for name, _ in dns_server.asked} == {"svc.ns"}
    relative = one.resolve("svc.ns")
    assert (found(one, "svc.ns"), relative.name, relative.also) == ("192.0.2.66", "svc.ns.corp.test", ("svc.ns",))
    dns_server.add("svc.ns", "A", "192.0.2.1")
    assert found(resolver_of("search corp.test\n"), "svc.ns.") == "192.0.2.1"


def test_the_search_list_is_applied_as_by_glibc(dns_server, resolver_of):
    one = resolver_of("search a.test b.test\noptions ndots:2\n", family="ipv4")
    refused(one, "x.y")
    assert [name for name, _ in dns_server.asked] == ["x.y.a.test", "x.y.b.test", "x.y"]
    dns_server.asked.clear()
    refused(one, "x.y.z")
    assert [name for name, _ in dns_server.asked] == ["x.y.z", "x.y.z.a.test", "x.y.z.b.test"]


def test_a_server_that_fails_about_a_candidate_does_not_end_the_search_but_silence_does(dns_server, resolver_of):
    """Another candidate would otherwise be taken for the name while its server is overloaded."""
    dns_server.add("x.b.test", "A", "192.0.2.2")
    dns_server.tricks["x.a.test"] = dns_server.fail
    assert found(resolver_of("search a.test b.test\n"), "x") == "192.0.2.2"
    dns_server.tricks["x.a.test"] = lambda *_: SILENT
    refused(resolver_of("search a.test b.test\n", timeout=0.1), "x", ResolveTimeout)
    dns_server.tricks.clear()
    dns_server.tricks["y.b.test"] = dns_server.fail
    assert refused(resolver_of("search a.test b.test\n"), "y").errno == socket.EAI_AGAIN


@pytest.mark.parametrize(
    ("rules", "host", "expected"),
    [
        (["deny .corp.test", "allow any", "allow loopback"], "secret", 2),
        (["deny secret", "allow any", "allow loopback"], "secret", 2),
        (["deny secret.corp.test", "allow any", "allow loopback"], "secret", 2),
        (["allow .corp.test", "allow loopback"], "secret", 0),
        (["allow secret.corp.test:1-65535", "allow loopback"], "secret", 0),
        (["deny .corp.test", "allow any", "allow loopback"], "secret.", 4),
        (["deny secret", "allow any", "allow loopback"], "secret.corp.test.", 0),
        (["deny secret.corp.test", "allow any", "allow loopback"], "secret.corp.test.", 2),
        (["deny secret.corp.test.", "allow any", "allow loopback"], "SECRET.corp.test", 2),
    ],
)
def test_rules_see_the_name_that_is_looked_up(
    dns_server, resolver_of, serve, connect, in_thread, rules, host, expected
):
    dns_server.add("secret.corp.test", "A", "127.0.0.1")
    gate = Gate(
        client_rules=ANYBODY,
        destination_rules=list(map(parse_destination_rule, rules)),
        resolver=resolver_of("search corp.test\n"),
    )
    origin, proxy = serve(echo), serve(ProxyHandler(gate))
    assert in_thread(reply, connect(proxy), socks(origin.port, host)) == expected


def test_a_rule_that_allows_a_short_name_does_not_allow_another_that_it_leads_to(dns_server, resolver_of, name_files):
    """ "allow svc.ns" is about svc.ns, not about svc.ns.corp.test."""
    dns_server.add("svc.ns.corp.test", "A", "8.8.8.8")
    addresses = resolver_of("search corp.test\n").resolve("svc.ns")
    match = RuleMatch(LOCAL, "default", None, None, 80)
    for rule, allowed in (("allow svc.ns", False), ("allow svc.ns.corp.test", True)):
        rules = [parse_destination_rule(rule)]
        decision = decide_destination(rules, match, addresses.name, addresses[0], also=addresses.also)
        assert decision.allowed is allowed


@pytest.mark.parametrize(
    ("rules", "host", "expected", "asked"),
    [
        (["deny .evil.test", "allow any"], "data.evil.test", 2, []),
        (["deny .evil.test", "allow any"], "data.evil.test.", 2, []),
        (["deny .evil.test", "allow loopback"], "evil.test", 2, []),
        (["allow .corp.test"], "data.evil.test", 4, ["data.evil.test.corp.test"]),
        (["deny .corp.test", "allow any"], "nobody", 2, ["nobody"]),
        (["deny .corp.test", "allow any"], "nobody.test", 4, ["nobody.test"]),
        (["deny .corp.test", "allow any"], "broken", 2, ["broken"]),
        (["allow .corp.test"], "data.evil.test.", 2, []),
        (["allow .evil.test:1", "deny any"], "data.evil.test", 2, []),
        # Kubernetes' search list: it costs no questions, and others are reached.
        (["deny .corp.test", "allow loopback", "allow any"], "www", 0, ["www"]),
        # An address may be allowed, so that the name has to be looked up.
        (["allow 127.0.0.1", "deny any"], "www.", 0, ["www"]),
        (["deny 192.0.2.0/24", "deny any"], "www.", 2, []),
    ],
)
def test_a_name_that_is_denied_whatever_its_addresses_is_not_looked_up(
    dns_server, resolver_of, serve, connect, in_thread, lines, rules, host, expected, asked
):
    """Otherwise a client could send data to the owner of a domain that the rules deny."""
    dns_server.add("www", "A", "127.0.0.1")
    dns_server.tricks["broken"] = dns_server.fail
    gate = Gate(
        client_rules=ANYBODY,
        destination_rules=list(map(parse_destination_rule, rules)),
        resolver=resolver_of("search corp.test\n", family="ipv4"),
    )
    origin, proxy = serve(echo), serve(ProxyHandler(gate))
    for _ in range(2):
        client = connect(proxy)
        assert in_thread(reply, client, socks(origin.port, host)) == expected
        client.close()
    assert {name for name, _ in dns_server.asked} == set(asked)
    if expected == 2:
        assert lines(2)[0]["result"] == "destination_denied"


RULES = ["any", "a.test", ".test", "a.test:80", "127.0.0.1", "loopback", ".b.test", "192.0.2.0/24:80"]


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["allow", "deny"]), st.sampled_from(RULES)), max_size=4),
    st.sampled_from(["a.test", "x.b.test", "other"]),
    st.sampled_from(["a.test", "a", "other"]),
    st.sampled_from([80, 81]),
)
def test_names_are_passed_over_that_no_address_makes_allowed_and_no_others(rules, name, requested, port):
    parsed = [parse_destination_rule(" ".join(words)) for words in rules]
    match = RuleMatch(LOCAL, "default", None, None, port)
    passed_over = names_to_look_up(parsed, match, [name], requested)[0] == ()
    addresses = map(ip_address, ["8.8.8.8", "127.0.0.1", "192.0.2.1"])
    allowed = [ip for ip in addresses if decide_destination(parsed, match, name, ip, also=(requested,)).allowed]
    assert not (passed_over and allowed)
    if not passed_over and not allowed:  # a rule about addresses may have allowed others
        assert any(action == "allow" for action, _ in rules)


@pytest.mark.parametrize(("host", "way"), [("secret", True), ("secret.corp.test", True), ("secret.", False)])
def test_upstream_rules_see_the_name_that_is_looked_up(dns_server, resolver_of, serve, connect, in_thread, host, way):
    dns_server.add("secret.corp.test", "A", "127.0.0.1")
    dns_server.add("secret", "A", "127.0.0.1")
    asked = []

    def upstream(conn):
        asked.append(conn.recv(1))

    up = parse_upstream("up", f"socks5://{serve(upstream).address}")
    gate = Gate(
        client_rules=ANYBODY,
        destination_rules=ANYWHERE,
        resolver=resolver_of("search corp.test\n"),
        upstreams={"up": up},
        upstream_rules=[parse_upstream_rule("through up .corp.test")],
    )
    origin, proxy = serve(echo), serve(ProxyHandler(gate))
    assert (in_thread(reply, connect(proxy), socks(origin.port, host)) != 0) is way
    assert bool(asked) is way


def test_the_dot_reaches_upstreams_that_look_names_up_and_origins(dns_server, resolver_of, serve, connect, in_thread):
    heads = []

    def other(conn):
        heads.append(conn.recv_until(b"\r\n\r\n"))

    up = parse_upstream("up", f"http://{serve(other).address}", resolve="there")
    gate = Gate(
        client_rules=ANYBODY,
        destination_rules=ANYWHERE,
        upstreams={"up": up},
        upstream_rules=[parse_upstream_rule("through up any")],
    )
    proxy = serve(ProxyHandler(gate))
    in_thread(http, connect(proxy), b"CONNECT Svc.NS.:80 HTTP/1.1\r\nHost: x\r\n\r\n")
    dns_server.add("svc.ns", "A", "127.0.0.1")
    direct = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, resolver=resolver_of("search\n"))
    port = serve(other).port
    in_thread(http, connect(serve(ProxyHandler(direct))), b"GET http://svc.ns.:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % port)
    assert heads[0].startswith(b"CONNECT svc.ns.:80 ")
    assert b"\r\nHost: svc.ns.:%d\r\n" % port in heads[1]


# -- what else knows names ---------------------------------------------------------------------------------------------


def test_the_hosts_file_comes_first_and_is_read_again_when_it_changes(dns_server, resolver_of, name_files, monkeypatch):
    monkeypatch.setattr(name_files_module, "CHECK_EVERY", 0.0)
    monkeypatch.setattr(questions, "LEAST_TTL", 0.0)
    dns_server.add("db.corp.test", "A", "192.0.2.1")
    hosts = "192.0.2.7 db Alias # comment\nfe80::1%lo db\n2001:db8::7 db\nnonsense db\n"
    one = resolver_of("search corp.test\n", hosts)
    assert found(one, "db") == found(one, "db.") == "2001:db8::7 192.0.2.7"
    assert found(one, "alias") == "192.0.2.7"
    name_files("search corp.test\n", "192.0.2.8 other\n")
    assert found(one, "db") == "192.0.2.1"
    # With addresses of the other family alone it does not know the name.
    dns_server.add("v6.test", "AAAA", "2001:db8::1")
    assert found(resolver_of("search\n", "192.0.2.9 v6.test\n", family="ipv6"), "v6.test") == "2001:db8::1"


def test_names_that_every_host_knows_are_not_asked_for(dns_server, resolver_of):
    one = resolver_of("search\n")
    assert found(one, "localhost.") == found(one, "x.localhost") == "::1 127.0.0.1"
    assert refused(one, "x.invalid").errno == socket.EAI_NONAME
    assert dns_server.asked == []


def test_names_that_nsswitch_alone_knows(name_files, monkeypatch):
    """A service such as mymachines takes no final dot; a rule that denies what the name may mean counts."""
    asked = []

    def getaddrinfo(name, _port, family, _kind):
        asked.append((name, family))
        if name != "machine":
            raise socket.gaierror(socket.EAI_NONAME, "")
        return [(0, 0, 0, "", ("192.0.2.1", 0))]

    monkeypatch.setattr(system_names, "_getaddrinfo", getaddrinfo)
    name_files("search corp.test\n", nsswitch="hosts: files mymachines dns\n")
    one = Resolver("ipv4")
    assert one.kind == "system"
    addresses = one.resolve("machine")
    assert (addresses.name, addresses.also) == ("machine", ("machine.corp.test",))
    assert asked == [(name, socket.AF_INET) for name in ("machine.corp.test.", "machine.", "machine")]
    refused(one, "machine.")
    assert len(asked) == 3
    one.close()
    for services, kind in (
        ("files dns", "dns"),
        ("files resolve [!UNAVAIL=return] dns myhostname", "dns"),
        ("files mdns4_minimal [NOTFOUND=return] dns", "system"),
    ):
        name_files(nsswitch=f"passwd: files\nhosts: {services} # comment\n")
        assert Resolver().kind == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, "kind must be one of dns, system, got 'x'"),
        ({"servers": ["ns.example"]}, "servers must be addresses of name servers, got 'ns.example'"),
        ({"servers": ["192.0.2.1:99999"]}, "servers must be addresses of name servers, got '192.0.2.1:99999'"),
        ({"servers": ["192.0.2.1"], "kind": "system"}, "servers are for"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Resolver(**options)
