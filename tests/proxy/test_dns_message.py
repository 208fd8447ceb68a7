"""DNS messages: ours says what dnspython says, and no bytes make it fail, or slow."""

import struct
import time
from contextlib import suppress

import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcpserver.proxy.dns_message import (
    LARGEST_ANSWER,
    NXDOMAIN,
    BadMessage,
    OtherMessage,
    question,
    read_reply,
)

NAMES = ["a.test.", "b.test.", "c.a.test.", "d.example."]


@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_the_question_is_one(kind):
    asked = dns.message.from_wire(question("www.a_b.-x.test", kind, 0xBEEF))
    expected = dns.message.make_query("www.a_b.-x.test.", kind, id=0xBEEF)
    assert asked == expected
    assert (asked.id, asked.flags) == (expected.id, expected.flags)


VALUES = {
    "A": st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"]), min_size=1, unique=True),
    "AAAA": st.just(["2001:db8::1"]),
    "TXT": st.just(['"text"']),
    "MX": st.just(["1 a.test."]),
    "CNAME": st.sampled_from(NAMES).map(lambda name: [name]),
}
records = st.sampled_from(list(VALUES)).flatmap(
    lambda type_: st.tuples(st.sampled_from(NAMES), st.just(type_), st.integers(0, 2**31 - 1), VALUES[type_])
)
zones = st.sampled_from(["test.", "a.test.", "example.", "."])


@settings(max_examples=50)
@given(
    st.sampled_from(["A", "AAAA"]),
    st.lists(records, max_size=6, unique_by=lambda made: made[:2]),
    st.none() | st.tuples(zones, st.integers(0, 999), st.integers(0, 999)),
    st.sampled_from([dns.rcode.NOERROR, dns.rcode.NXDOMAIN]),
)
def test_an_answer_says_what_dnspython_says(kind, answer, authority, code):
    query = dns.message.make_query("A.test.", kind)
    message = dns.message.make_response(query)
    message.set_rcode(code)
    for name, type_, ttl, values in answer:
        message.answer.append(dns.rrset.from_text(name, ttl, "IN", type_, *values))
    if authority is not None:
        zone, ttl, minimum = authority
        message.authority.append(dns.rrset.from_text(zone, ttl, "IN", "SOA", f"a.test. b.test. 1 2 3 4 {minimum}"))
    wire = message.to_wire()
    asked = question("a.test", kind, query.id)
    try:
        chain = dns.message.from_wire(wire).resolve_chaining()
    except dns.message.ChainTooLong:
        with pytest.raises(BadMessage):
            read_reply(asked, wire)
        return
    except dns.message.AnswerForNXDOMAIN:
        assert not read_reply(asked, wire).found
        return
    reply = read_reply(asked, wire)
    assert list(map(str, reply.found)) == list(map(str, chain.answer or ()))
    if reply.found or (authority and chain.canonical_name.is_subdomain(dns.name.from_text(authority[0]))):
        assert reply.ttl == chain.minimum_ttl
    else:
        assert reply.ttl is None


@given(st.binary(max_size=600), st.integers(0, 600), st.binary(max_size=20))
def test_no_bytes_make_it_fail(data, at, more):
    asked = question("a.test", "A", 7)
    for wire in (data, asked[:2] + b"\x81\x80" + data, asked[:2] + b"\x81\x80" + asked[4:6] + data, _broken(at, more)):
        with suppress(BadMessage):
            reply = read_reply(asked, wire)
            assert reply.ttl is None or 0 <= reply.ttl < 2**31


def _broken(at, more):
    """A valid answer with other bytes at some place."""
    message = dns.message.make_response(dns.message.make_query("a.test.", "A", id=7))
    message.answer.append(dns.rrset.from_text("a.test.", 60, "IN", "CNAME", "b.a.test."))
    message.answer.append(dns.rrset.from_text("b.a.test.", 60, "IN", "A", "192.0.2.1"))
    message.authority.append(dns.rrset.from_text("test.", 60, "IN", "SOA", "a.test. b.test. 1 2 3 4 5"))
    wire = message.to_wire()
    return wire[:at] + more + wire[at + len(more) :]


def record(owner, type_, data, class_=1, ttl=60):
    return owner + struct.pack("!HHIH", type_, class_, ttl, len(data)) + data


def answer_to(asked, *records, code=0, authority=()):
    counts = struct.pack("!HHHH", 1, len(records), len(authority), 0)
    return asked[:2] + struct.pack("!H", 0x8180 | code) + counts + asked[12:] + b"".join([*records, *authority])


ADDRESS = b"\xc0\0\2\1"


@pytest.mark.parametrize(
    "made",
    [
        record(b"\xc0\x0c", 1, b"\1\2\3"),  # no address
        record(b"\xc0\x0c", 1, ADDRESS)[:-1],
        record(b"\xc0\xff", 1, ADDRESS),  # leads forward
        record(b"\x01a\xc0\x18", 5, b"\xc0\x18"),  # to itself
        record(b"\x80\x0c", 1, ADDRESS),  # a label of another type (RFC 2673)
        record(b"\x40\x0c", 1, ADDRESS),
        record(b"\xc0\x0c", 5, b"\x3f" + b"x" * 10),
        record(b"\xc0\x0c", 5, (b"\x3f" + b"x" * 63) * 4 + b"\0"),  # of 257 bytes
        b"\xc0",
    ],
)
def test_malformed_records(made):
    asked = question("a.test", "A", 7)
    with pytest.raises(BadMessage):
        read_reply(asked, answer_to(asked, made))


def test_pointers_to_pointers_are_followed_a_few_times():
    asked = question("a.test", "A", 7)
    for pointers, fine in ((5, True), (30, False)):
        # A record of a type that nobody reads, with pointers that each lead to the one before.
        start = len(asked) + 2 + 10
        chain = b"\xc0\x0c" + b"".join(struct.pack("!H", 0xC000 + start + 2 * number) for number in range(pointers))
        owner = struct.pack("!H", 0xC000 + start + 2 * pointers)
        wire = answer_to(asked, record(b"\xc0\x0c", 16, chain), record(owner, 1, ADDRESS))
        if fine:
            assert read_reply(asked, wire).found
        else:
            with pytest.raises(BadMessage):
                read_reply(asked, wire)


def test_records_of_other_classes_and_negative_ttls():
    asked = question("a.test", "A", 7)
    assert read_reply(asked, answer_to(asked, record(b"\xc0\x0c", 1, ADDRESS, class_=3))).found == ()
    assert read_reply(asked, answer_to(asked, record(b"\xc0\x0c", 1, ADDRESS, ttl=2**31 + 1))).ttl == 0
    soa = record(b"\0", 6, bytes(18) + struct.pack("!I", 77) + b"", ttl=99)
    reply = read_reply(asked, answer_to(asked, code=NXDOMAIN, authority=(soa,)))
    assert (reply.code, reply.found, reply.ttl) == (NXDOMAIN, (), 77)
    foreign = record(b"\3com\0", 6, bytes(22))  # about another zone
    assert read_reply(asked, answer_to(asked, code=NXDOMAIN, authority=(foreign,))).ttl is None


def test_messages_about_other_questions():
    asked = question("a.test", "A", 7)
    fine = answer_to(asked, record(b"\xc0\x0c", 1, ADDRESS))
    assert read_reply(asked, fine).found
    assert read_reply(asked, fine.replace(b"\1a\4test", b"\1A\4tEST", 1)).found
    for wire in (
        b"",
        fine[:11].replace(b"\0\7", b"\0\x08"),
        b"\0\x08" + fine[2:],
        fine[:2] + b"\1\x80" + fine[4:],  # a question
        fine[:2] + b"\x89\x80" + fine[4:],  # another opcode
        fine.replace(b"\1a\4test", b"\1b\4test"),
        fine[:4] + b"\0\0" + fine[6:],
    ):
        with pytest.raises(OtherMessage):
            read_reply(asked, wire)
    with pytest.raises(BadMessage, match=r"more than 4096 bytes"):
        read_reply(asked, fine + bytes(LARGEST_ANSWER))


@pytest.mark.parametrize("owner", [b"\xc0\x0c", b"\1%c\xc0\x0e"])
@pytest.mark.parametrize("type_", [1, 5, 6, 16])
def test_the_costliest_answer_takes_a_few_milliseconds(owner, type_):
    """dnspython takes 240 ms of CPU for 1,232 bytes of it, and 1 s for 4 KiB."""
    asked = question(".".join("a" * 126), "A", 7)
    wire, number = asked[:4] + asked[4:], 0
    made = []
    while True:
        name = owner % (number % 200 + 1) if b"%" in owner else owner
        one = record(name, type_, {1: ADDRESS, 5: b"\xc0\x0c", 6: bytes(22), 16: b"\0"}[type_])
        if len(wire) + sum(map(len, made)) + len(one) > LARGEST_ANSWER:
            break
        made.append(one)
        number += 1
    wire = answer_to(asked, *made)
    took = []
    for _ in range(3):
        began = time.process_time()
        with suppress(BadMessage):
            read_reply(asked, wire)
        took.append(time.process_time() - began)
    assert min(took) < 0.05
