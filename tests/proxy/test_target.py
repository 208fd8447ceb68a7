"""Destinations: one form for every spelling."""

from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.proxy import target as target_module
from gtcpserver.proxy.errors import BadTarget
from gtcpserver.proxy.target import Target, addresses_meant, canonical_name, kind_of, make_target, parse_authority
from kit.proxying import LOOPBACK_SPELLINGS, METADATA_SPELLINGS


@pytest.mark.parametrize("text", LOOPBACK_SPELLINGS)
def test_requirement_14_every_spelling_of_loopback_is_loopback(text):
    assert make_target(text, 80) == Target("127.0.0.1", 80, ip_address("127.0.0.1"))


@pytest.mark.parametrize("text", METADATA_SPELLINGS)
def test_requirement_14_every_spelling_of_the_metadata_address(text):
    assert kind_of(make_target(text, 80).ip) == "metadata"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("2002:7f00:1::", ["loopback"]),  # 6to4
        ("64:ff9b::10.0.0.1", ["private"]),  # NAT64
        ("64:ff9b:1::192.168.0.1", ["reserved", "private"]),
        ("::10.0.0.1", ["private"]),  # IPv4-compatible
        ("fe80::5efe:10.0.0.1", ["link-local", "private"]),  # ISATAP
        (
            "2001:0:7f00:1::80ff:fffe",
            ["reserved", "loopback", "loopback"],
        ),  # Teredo: server 127.0.0.1, client 127.0.0.1
    ],
)
def test_requirement_14_addresses_within_addresses(text, kinds):
    meant = [kind_of(one) for one in addresses_meant(ip_address(text))]
    assert [kind for kind in meant if kind] == kinds


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("8.8.8.8", None),
        ("2606:4700::1", None),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("fe80::1", "link-local"),
        ("10.1.1.1", "private"),
        ("172.31.0.1", "private"),
        ("172.32.0.1", None),
        ("192.168.255.255", "private"),
        ("fd12::1", "private"),
        ("100.64.0.1", "shared"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("250.0.0.1", "reserved"),
        ("192.0.2.1", "reserved"),
    ],
)
def test_requirement_16_kinds_of_addresses(text, kind):
    assert kind_of(ip_address(text)) == kind


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("straße.example", "xn--strae-oqa.example"),  # IDNA 2003: strasse
        ("Bücher。Example", "xn--bcher-kva.example"),  # UTS 46
        ("r1---sn-a.example", "r1---sn-a.example"),
        ("-a-.b-", "-a-.b-"),
        ("a_b.example", "a_b.example"),
        ("_service.example", "_service.example"),
        ("a-b.c", "a-b.c"),
        ("localhost", "localhost"),
        ("1e100.net", "1e100.net"),
        ("e" * 63 + ".x", "e" * 63 + ".x"),
    ],
)
def test_requirement_17_names_have_one_form(text, name):
    assert canonical_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        "a b",
        "a\nb",
        "a\r\nHost: b",
        "a\x00b",
        "\u2603.example",  # IDNA 2008 has no snowmen
        "b\u00fcche\uff0fr.example",  # a full-width slash
        "a/b",
        "a@b",
        "a:b",
        "e" * 64,
        "a." * 127 + "bc",
        "x.1",
        "1.2.3.4.5",
        "a.0x7f",
        "a.09",
        "\u2028",
        "a%00",
        "[a]",
        "*.b",
        "a,b",
        "a'b",
    ],
)
def test_requirement_17_what_is_no_name(text):
    with pytest.raises(BadTarget) as raised:
        make_target(text, 80)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["256.1.1.1", "1.2.3.256", "09.1.1.1", "0x1ffffffff", "1.2.70000", "fe80::1%eth0", "1::2::3"]
)
def test_what_is_no_address(text):
    with pytest.raises(BadTarget):
        make_target(text, 80)


@pytest.mark.parametrize(
    ("text", "default", "shown"),
    [
        ("example.com:443", None, "example.com:443"),
        ("[::1]:443", None, "[::1]:443"),
        ("[::1]", 80, "[::1]:80"),
        ("[::ffff:10.0.0.1]:1", None, "10.0.0.1:1"),
        ("127.1:8080", None, "127.0.0.1:8080"),
        ("example.com", 80, "example.com:80"),
        ("example.com:", 80, "example.com:80"),
        ("example.com:00080", None, "example.com:80"),
    ],
)
def test_requirements_18_and_28_authorities(text, default, shown):
    assert str(parse_authority(text, default)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "example.com",
        "example.com:",
        "example.com:0",
        "example.com:65536",
        "example.com:+80",
        "example.com:8 0",
        "user@example.com:80",
        "::1:80",
        "[::1",
        "[::1]80",
        "[example.com]:80",
        "[127.0.0.1]:80",
        ":80",
        "a:b:80",
        "a/b:80",
        "example.com:" + chr(0x661),
        "example.com:000080",
        "[fe80::1%25eth0]:80",
        "",
    ],
)
def test_requirement_18_what_is_no_authority(text):
    with pytest.raises(BadTarget):
        parse_authority(text)


def test_without_the_package_idna_no_name_becomes_another(monkeypatch):
    monkeypatch.setattr(target_module, "idna", None)
    assert canonical_name("bücher.example") == "xn--bcher-kva.example"
    for name in ("straße.example", "ς.example", "a\u200db.example"):
        with pytest.raises(BadTarget, match="needs the package idna"):
            canonical_name(name)


@given(st.text(max_size=300), st.integers(-1, 70000))
def test_any_text_is_a_target_or_a_bad_one(text, port):
    with suppress(BadTarget):
        target = make_target(text, port)
        assert target.host.isascii()
        assert target.host.isprintable()
        assert make_target(target.host, port) == target  # the canonical form is its own
    with suppress(BadTarget):
        parse_authority(text, 80)


@pytest.mark.slow
@given(st.ip_addresses())
def test_every_address_has_its_own_form(ip):
    target = make_target(str(ip), 1)
    assert addresses_meant(ip)[0] == target.ip


@pytest.mark.parametrize("text", ["127.0.0.1", "127.1", "::1", "example.com", "example.com."])
def test_equal_targets_have_the_same_hash(text):
    target, same = make_target(text, 80), replace(make_target(text, 80))
    assert target is not same
    assert (target, hash(target)) == (same, hash(same))
    assert len({target, same, make_target(text, 81)}) == 2
