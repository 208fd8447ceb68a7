"""Answers of name servers: one to our question, kept as long as it holds; and nobody is held up by one that is silent.

The name server is one of dnspython's messages, over loopback.
"""

import socket
import time
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.rdatatype
import dns.rrset
import gevent
import pytest

from gtcpserver.proxy import dns_client, questions, resolve
from gtcpserver.proxy.dns_client import MOST_WRONG
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.name_files import ResolvConf
from gtcpserver.proxy.resolve import ResolveTimeout
from kit.dns_server import SILENT, DnsServer
from kit.handlers import echo
from kit.proxying import ANYBODY, ANYWHERE, reply, socks
from kit.resolving import found, refused
from kit.waiting import wait_until

# -- which addresses ---------------------------------------------------------------------------------------------------


def test_both_families_are_asked_for_at_the_same_time_and_only_those_that_are_wanted(dns_server, resolver_of):
    dns_server.add("both.test", "A", "192.0.2.1")
    dns_server.add("both.test", "AAAA", "2001:db8::1")
    for family, addresses, asked in (
        ("any", "2001:db8::1 192.0.2.1", {"A", "AAAA"}),
        ("prefer-ipv4", "192.0.2.1 2001:db8::1", {"A", "AAAA"}),
        ("ipv4", "192.0.2.1", {"A"}),
        ("ipv6", "2001:db8::1", {"AAAA"}),
    ):
        dns_server.asked.clear()
        assert found(resolver_of(family=family), "both.test") == addresses
        assert {kind for _, kind in dns_server.asked} == asked
        assert len(dns_server.asked) == len(asked)


@pytest.mark.parametrize("trick", ["silent", "fail"])
def test_a_family_without_an_answer_does_not_keep_the_other_waiting(dns_server, resolver_of, monkeypatch, trick):
    monkeypatch.setattr(resolve, "SECOND_FAMILY", 0.05)

    def lose(query, by_tcp):
        if query.question[0].rdtype == dns.rdatatype.AAAA:
            return SILENT if trick == "silent" else dns_server.fail(query)
        return dns_server.answer(query)

    dns_server.add("broken.test", "A", "192.0.2.1")
    dns_server.tricks["broken.test"] = lose
    one = resolver_of()
    began = time.monotonic()
    for _ in range(3):  # the second family is waited for once
        assert found(one, "broken.test") == "192.0.2.1"
    assert time.monotonic() - began < 5.0  # and not the 10 of the resolver's timeout
    assert found(resolver_of(family="ipv4"), "broken.test") == "192.0.2.1"


def test_answers_are_kept_by_their_ttl_within_bounds(dns_server, resolver_of, monkeypatch):
    one = resolver_of(family="ipv4")
    now = time.monotonic()
    clock = [now]
    for module in (questions, resolve):
        monkeypatch.setattr(module, "monotonic", lambda: clock[0])
    for name, ttl, keeps in (("zero", 0, 1), ("short", 20, 20), ("long", 10**6, 3600), ("odd", 2**31 + 5, 1)):
        dns_server.add(f"{name}.test", "A", "192.0.2.1", ttl=ttl if ttl < 2**31 else 0)
        clock[0] = now
        for later, asked in ((0, 1), (keeps - 0.1, 1), (keeps + 0.1, 2)):
            dns_server.asked[:] = dns_server.asked[: asked if later else 0]
            clock[0] = now + later
            found(one, f"{name}.test")
            assert len(dns_server.asked) == asked, (name, later)
        dns_server.asked.clear()
    # "There is none" by the smaller of the SOA's numbers, at most a minute; without an SOA hardly at all.
    for name, soa, keeps in (("a", (40, 20), 20), ("b", (20, 40), 20), ("c", (9999, 9999), 60), ("d", None, 1)):
        dns_server.negative, clock[0] = soa, now
        for later, asked in ((0, 1), (keeps - 0.1, 1), (keeps + 0.1, 2)):
            clock[0] = now + later
            refused(one, f"{name}.none")
            assert len(dns_server.asked) == asked, (name, later)
        dns_server.asked.clear()


def test_an_address_that_failed_is_looked_up_again(dns_server, resolver_of, serve, connect, in_thread, monkeypatch):
    monkeypatch.setattr(questions, "LEAST_TTL", 0.0)
    dns_server.add("moved.test", "A", "127.0.0.9", ttl=3600)
    origin = serve(echo)  # on 127.0.0.1
    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, resolver=resolver_of(family="ipv4"))
    proxy = serve(ProxyHandler(gate))
    assert in_thread(reply, connect(proxy), socks(origin.port, "moved.test")) == 5
    dns_server.add("moved.test", "A", "127.0.0.1", ttl=3600)
    assert in_thread(reply, connect(proxy), socks(origin.port, "moved.test")) == 0
    assert len(dns_server.asked) == 2
    # What works is kept, and what failed is not asked for more often than once in LEAST_TTL.
    monkeypatch.setattr(questions, "LEAST_TTL", 60.0)
    assert in_thread(reply, connect(proxy), socks(origin.port, "moved.test")) == 0
    for _ in range(3):
        gate.resolver.forget(gate.resolver.resolve("moved.test"))
        assert found(gate.resolver, "moved.test") == "127.0.0.1"
    assert len(dns_server.asked) == 2


# -- aliases and sizes -------------------------------------------------------------------------------------------------


def test_aliases_are_followed_and_their_ttl_counts(dns_server, resolver_of):
    dns_server.add("www.test", "CNAME", "cdn.test.", ttl=5)
    dns_server.add("cdn.test", "CNAME", "edge.test.", ttl=500)
    dns_server.add("edge.test", "A", "192.0.2.1", ttl=500)
    one = resolver_of(family="ipv4")
    addresses = one.resolve("www.test")
    assert (str(addresses[0]), addresses.name) == ("192.0.2.1", "www.test")
    assert one._results.get("www.test").until - time.monotonic() <= 5
    for number in range(30):
        dns_server.add(f"{number}.long", "CNAME", f"{number + 1}.long.")
    dns_server.add("30.long", "A", "192.0.2.1")
    assert refused(one, "0.long").errno == socket.EAI_AGAIN
    assert found(one, "14.long") == "192.0.2.1"

    def circle(query, by_tcp):
        reply = dns_server.answer(query)
        reply.answer.append(dns.rrset.from_text("circle.test.", 60, "IN", "CNAME", "b.test."))
        reply.answer.append(dns.rrset.from_text("b.test.", 60, "IN", "CNAME", "circle.test."))
        return reply

    dns_server.tricks["circle.test"] = circle
    assert refused(one, "circle.test").errno == socket.EAI_AGAIN


@pytest.mark.slow
def test_a_long_answer_comes_over_tcp_and_too_long_a_one_is_not_read(dns_server, resolver_of):
    dns_server.add("long.test", "A", *[f"192.0.2.{number}" for number in range(1, 201)])
    dns_server.tricks["long.test"] = dns_server.truncate
    one = resolver_of(family="ipv4")
    assert len(one.resolve("long.test")) == 8
    assert dns_server.by_tcp == [False, True]
    dns_server.add("huge.test", "A", *[f"192.0.{number // 200}.{number % 200}" for number in range(1, 400)])
    dns_server.tricks["huge.test"] = dns_server.truncate
    assert refused(one, "huge.test").errno == socket.EAI_AGAIN
    dns_server.tricks["long.test"] = lambda query, by_tcp: (
        b"\0\5short" if by_tcp else dns_server.truncate(query, by_tcp)
    )
    one = resolver_of("options use-vc\n")
    assert refused(one, "long.test").errno == socket.EAI_AGAIN
    assert dns_server.by_tcp[-1] is True


# -- forged answers ----------------------------------------------------------------------------------------------------


def forged(query, **changes):
    """An answer with another address; or with another ID, question and so on."""
    reply = dns.message.make_response(query)
    question = query.question[0]
    if "name" in changes:
        reply.question = [dns.rrset.from_text(changes["name"], 0, "IN", question.rdtype)]
    name = (reply.question or query.question)[0].name
    reply.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.66"))
    reply.id = (query.id + changes.get("id", 0)) & 0xFFFF
    if "flags" in changes:
        reply.flags ^= changes["flags"]
    if changes.get("empty"):
        reply.question = []
    return reply


@pytest.mark.parametrize(
    "changes",
    [{"id": 1}, {"name": "other.test."}, {"flags": dns.flags.QR}, {"empty": True}],
    ids=lambda made: next(iter(made)),
)
def test_what_is_no_answer_to_the_question_is_ignored(dns_server, resolver_of, changes):
    dns_server.add("real.test", "A", "192.0.2.1")
    dns_server.tricks["real.test"] = lambda query, by_tcp: [
        forged(query, **changes),
        b"",
        b"junk",
        dns_server.answer(query),
    ]
    assert found(resolver_of(family="ipv4"), "real.test") == "192.0.2.1"
    assert dns_server.by_tcp == [False]


def test_somebody_who_guesses_ids_makes_us_ask_over_tcp(dns_server, resolver_of):
    dns_server.add("real.test", "A", "192.0.2.1")

    def flood(query, by_tcp):
        if by_tcp:
            return dns_server.answer(query)
        return [forged(query, id=number) for number in range(1, MOST_WRONG + 2)]

    dns_server.tricks["real.test"] = flood
    assert found(resolver_of(family="ipv4"), "real.test") == "192.0.2.1"
    assert dns_server.by_tcp == [False, True]


def test_records_of_other_names_in_an_answer_do_not_count(dns_server, resolver_of):
    def poison(query, by_tcp):
        reply = dns_server.answer(query)
        reply.answer.append(dns.rrset.from_text("bank.test.", 9999, "IN", "A", "192.0.2.66"))
        reply.additional.append(dns.rrset.from_text("bank.test.", 9999, "IN", "A", "192.0.2.66"))
        return reply

    dns_server.add("x.test", "A", "192.0.2.1")
    dns_server.tricks["x.test"] = poison
    dns_server.add("bank.test", "A", "192.0.2.2")
    one = resolver_of(family="ipv4")
    assert (found(one, "x.test"), found(one, "bank.test")) == ("192.0.2.1", "192.0.2.2")


def test_ports_and_ids_differ(dns_server, resolver_of):
    one = resolver_of()
    names = [gevent.spawn(refused, one, f"{number}.test") for number in range(50)]
    gevent.joinall(names)
    ports, ids = zip(*dns_server.sources, strict=True)
    assert len(ports) == 100
    assert len(set(ports)) > 90
    assert len(set(ids)) > 90


# -- servers -----------------------------------------------------------------------------------------------------------


def test_the_next_server_is_asked_when_one_refuses_or_fails_or_is_silent(dns_server, resolver_of, name_files):
    other = DnsServer()
    try:
        other.add("x.test", "A", "192.0.2.1")
        with socket.socket(type=socket.SOCK_DGRAM) as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        dns_server.tricks["x.test"] = dns_server.fail
        servers = [nobody, dns_server.address, other.address]
        assert found(resolver_of(servers=servers, family="ipv4"), "x.test") == "192.0.2.1"
        dns_server.tricks["x.test"] = lambda query, by_tcp: other.answer(query).to_wire()[:-3]
        assert found(resolver_of(servers=servers, family="ipv4"), "x.test") == "192.0.2.1"
        # One that never answers is asked last after a few times.
        for number in range(dns_client.MOST_MISSED + 2):
            dns_server.tricks[f"{number}.test"] = lambda *_: SILENT
            other.add(f"{number}.test", "A", "192.0.2.1")
        one = resolver_of(servers=[dns_server.address, other.address], family="ipv4")
        one._servers._conf = lambda: ResolvConf(timeout=0.1)
        dns_server.asked.clear()
        for number in range(dns_client.MOST_MISSED + 2):
            assert found(one, f"{number}.test") == "192.0.2.1"
        assert len(dns_server.asked) == dns_client.MOST_MISSED
    finally:
        other.stop()


def test_a_lookup_asks_a_bounded_number_of_questions(dns_server, resolver_of):
    """Whatever a client asks for: each server a few times, and no other name because of an answer."""
    dns_server.tricks["silent.test"] = lambda *_: SILENT
    one = resolver_of()
    one._servers._conf = lambda: ResolvConf(timeout=0.01)
    for _ in range(5):
        refused(one, "silent.test", ResolveTimeout)
    assert sorted(dns_server.asked) == [("silent.test", "A")] * 3 + [("silent.test", "AAAA")] * 3
    dns_server.asked.clear()
    dns_server.add("www.test", "CNAME", "elsewhere.example.")
    dns_server.negative = None
    refused(one, "www.test")
    assert {name for name, _ in dns_server.asked} == {"www.test"}
    assert len(dns_server.asked) == 2


def test_no_descriptor_is_no_answer_and_is_not_remembered(dns_server, resolver_of, monkeypatch):
    dns_server.add("x.test", "A", "192.0.2.1")
    one = resolver_of(family="ipv4")

    def refuse(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(dns_client, "_socket", refuse)
        assert refused(one, "x.test").errno == socket.EAI_AGAIN
    assert found(one, "x.test") == "192.0.2.1"


# -- nobody is held up -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_300_silent_domains_hold_up_nobody(dns_server, resolver_of):
    dns_server.add("www.good.test", "A", "192.0.2.1")
    for number in range(300):
        dns_server.tricks[f"www.silent{number}.test"] = lambda *_: SILENT
    one = resolver_of()
    waiting = [gevent.spawn(one.resolve, f"www.silent{number}.test") for number in range(300)]
    wait_until(lambda: len(dns_server.asked) == 600)
    assert found(one, "www.good.test") == "192.0.2.1"
    assert not any(greenlet.ready() for greenlet in waiting)
    gevent.killall(waiting)


def test_names_of_one_domain_and_of_one_client_have_a_share(dns_server, resolver_of, monkeypatch):
    monkeypatch.setattr(resolve, "MOST_OF_A_DOMAIN", 4)
    monkeypatch.setattr(resolve, "MOST_OF_A_CLIENT", 3)
    for name in [f"{number}.silent.test" for number in range(9)] + [f"www.silent{number}.test" for number in range(9)]:
        dns_server.tricks[name] = lambda *_: SILENT
    dns_server.add("www.good.test", "A", "192.0.2.1")
    one = resolver_of(family="ipv4")
    waiting = [gevent.spawn(one.resolve, f"{number}.silent.test") for number in range(9)]
    wait_until(lambda: len(dns_server.asked) == 4)
    assert found(one, "www.good.test") == "192.0.2.1"
    # The client is its /64.
    for number in range(9):
        client = ip_address(f"2001:db8::{number + 1}")
        waiting.append(gevent.spawn(one.resolve, f"www.silent{number}.test", client))
    wait_until(lambda: len(dns_server.asked) == 8)
    dns_server.add("www.other.test", "A", "192.0.2.2")
    assert str(one.resolve("www.other.test", ip_address("2001:db8:0:1::1"))[0]) == "192.0.2.2"
    assert str(one.resolve("www.good.test", ip_address("2001:db8::9"))[0]) == "192.0.2.1"  # known: nothing to wait for
    assert len(dns_server.asked) == 9
    gevent.killall(waiting)
    assert not one._clients._keys


def test_domains_below_public_suffixes_are_told_apart():
    for name, domain in {
        "www.example.com": "example.com",
        "a.b.example.com.": "example.com",
        "www.shop.co.uk": "shop.co.uk",
        "www.x.com.au": "x.com.au",
        "test": "test",
        "a.bc": "a.bc",
    }.items():
        assert questions.domain_of(name) == domain


def test_the_memory_is_bounded(dns_server, resolver_of, monkeypatch):
    monkeypatch.setattr(questions, "MOST_REMEMBERED", 10)
    one = resolver_of()
    for number in range(30):
        refused(one, f"{number}.test")
    assert len(one._results) == len(one._questions._known) == 10
    assert not one._questions.under_way
    assert not one._questions._domains._keys
