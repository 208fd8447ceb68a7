"""Rules: the first that matches decides, and special addresses are reached only by their names."""

from contextlib import suppress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.proxy.errors import RuleError
from gtcpserver.proxy.rules import (
    RuleMatch,
    decide_client,
    decide_destination,
    parse_client_rule,
    parse_destination_rule,
)


def client(rules, address="192.0.2.7", listener="office"):
    return decide_client([parse_client_rule(rule) for rule in rules], ip_address(address), listener)


def reach(rules, ip, port=443, name=None, address="192.0.2.7", listener="office", auth=None, user=None):
    decision = decide_destination(
        [parse_destination_rule(rule) for rule in rules],
        RuleMatch(ip_address(address), listener, auth, user, port),
        name,
        ip_address(ip) if ip is not None else None,
    )
    return decision.allowed


def test_who_may_use_which_listener():
    rules = ["deny from 192.0.2.9 to any", "allow from 192.0.2.0/24 to office with auth staff", "allow 2001:db8::/32"]
    assert client(rules).allowed
    assert client(rules).auth == "staff"
    assert client(rules, "::ffff:192.0.2.7").allowed
    assert not client(rules, "192.0.2.9").allowed
    assert not client(rules, listener="home").allowed
    assert client(rules, "2001:db8::1", "home").allowed
    assert client(rules, "8.8.8.8").rule == "no client rule matches"


def test_requirement_16_special_addresses_need_a_rule_that_names_them():
    everything = ["allow any"]
    assert reach(everything, "8.8.8.8")
    for ip in [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "::1",
        "fe80::1",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "192.168.1.1",
        "fd00::1",
    ]:
        assert not reach(everything, ip), ip
        assert not reach(["allow from any to any:443", "allow 0.0.0.0/0", "allow ::/0"], ip), ip
    for ip in ["::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:a00:1::", "::10.0.0.1"]:
        assert not reach(everything, ip), ip
    assert reach(["allow private"], "10.0.0.1")
    assert not reach(["allow private"], "127.0.0.1")
    assert reach(["allow 10.0.0.0/8"], "10.0.0.1")
    assert reach(["allow 10.0.0.0/8"], "64:ff9b::10.0.0.1")
    assert not reach(["allow 8.0.0.0/5"], "10.0.0.1")  # not what this network is for
    assert not reach(["allow link-local"], "169.254.169.254")
    assert not reach(["allow 169.254.0.0/16"], "169.254.169.254")
    assert reach(["allow 169.254.169.254"], "169.254.169.254")
    assert reach(["allow metadata:80"], "169.254.169.254", 80)


def test_requirement_15_a_name_does_not_open_the_address_it_resolves_to():
    assert reach(["allow .example.com"], "8.8.8.8", name="a.example.com")
    assert not reach(["allow .example.com"], "127.0.0.1", name="a.example.com")
    assert not reach(["allow .example.com"], "10.0.0.1", name="a.example.com")
    assert reach(["allow .example.com", "allow private"], "10.0.0.1", name="a.example.com")


def test_denials_hold_for_every_form_of_an_address():
    rules = ["deny 8.8.8.0/24", "allow any"]
    for ip in ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::", "::8.8.8.8"]:
        assert not reach(rules, ip), ip
    assert reach(rules, "8.8.4.4")


def test_names_and_suffixes():
    rules = ["deny bad.example.com", "allow .example.com:80,443", "allow *.example.org", "allow example.net:8000-8010"]
    for name, port, allowed in [
        ("example.com", 443, True),
        ("www.example.com", 80, True),
        ("www.example.com", 22, False),
        ("bad.example.com", 443, False),
        ("notexample.com", 443, False),
        ("a.b.example.org", 1, True),
        ("example.net", 8005, True),
        ("example.net", 8011, False),
        ("www.example.net", 8005, False),
    ]:
        assert reach(rules, "8.8.8.8", port, name) is allowed, (name, port)
    assert not reach(rules, "8.8.8.8", 443)  # a name's rule is not for its address


def test_by_client_user_listener_and_authenticator():
    rules = ["allow from 192.0.2.0/24 user ada via office to any", "allow from any via staff to any:25"]
    assert reach(rules, "8.8.8.8", user="ada")
    assert not reach(rules, "8.8.8.8", user="bob")
    assert not reach(rules, "8.8.8.8")
    assert not reach(rules, "8.8.8.8", user="ada", listener="home")
    assert not reach(rules, "8.8.8.8", user="ada", address="198.51.100.1")
    assert reach(rules, "8.8.8.8", 25, auth="staff", listener="home")


def test_ipv6_networks_with_ports():
    rules = ["allow [2606:4700::/32]:443", "allow 2a00::/16"]
    assert reach(rules, "2606:4700::1")
    assert not reach(rules, "2606:4700::1", 80)
    assert reach(rules, "2a00::1", 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"allow" or "deny" expected at the end of \'\''),
        ("permit any", '"allow" or "deny" expected, got \'permit\''),
        ("allow", "a destination expected at the end"),
        ("allow any any", "nothing more expected, got 'any' in 'allow any any'"),
        ("allow from any", '"to" expected at the end'),
        ("allow from nowhere to any", "a network, an address or \"any\" expected, got 'nowhere'"),
        ("allow from 10.0.0.1/8 to any", "has host bits set"),
        ("allow from any to any:0", "ports from 1 to 65535 expected, got '0'"),
        ("allow from any to any:2-1", "the lower port first expected, got '2-1'"),
        ("allow from any to any:http", "ports from 1 to 65535 expected"),
        ("allow 10.0.0.0/33", "a network expected, got '10.0.0.0/33'"),
        ("allow 127.1", "an address in four decimal numbers expected, got '127.1'"),
        ("allow exa mple.com", "nothing more expected, got 'mple.com'"),
        ("allow exa$mple.com", "a destination expected, got 'exa$mple.com'"),
        ("allow from any via office", '"to" expected at the end'),
        ("allow from any user ada bob to any", "\"to\" expected, got 'bob'"),
    ],
)
def test_what_is_no_destination_rule(text, message):
    with pytest.raises(RuleError) as raised:
        parse_destination_rule(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("allow from any to office with staff", "\"auth\" expected, got 'staff'"),
        ("allow from any to office with auth", "the name of an authenticator expected at the end"),
        ("allow from any to office with auth staff now", "nothing more expected, got 'now'"),
        ("deny from any to office with auth staff", '"with auth" is for rules that allow'),
        ("allow any to office", "nothing more expected, got 'to'"),
        ("allow from any to of/fice", "the name of a listener"),
    ],
)
def test_what_is_no_client_rule(text, message):
    with pytest.raises(RuleError) as raised:
        parse_client_rule(text)
    assert message in str(raised.value)


WORDS = st.sampled_from(
    [
        "allow",
        "deny",
        "from",
        "to",
        "via",
        "with",
        "auth",
        "user",
        "any",
        "10.0.0.0/8",
        ".a.b",
        "[::1]:80",
        "private",
        ":80",
        "x:1-2",
        "\x00",
        "é",
    ]
)


@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=10).map(" ".join)))
def test_any_text_is_a_rule_or_an_error_of_ours(text):
    for parse in (parse_client_rule, parse_destination_rule):
        with suppress(RuleError):
            parse(text)


def test_requirement_14_rules_may_be_written_in_ipv4_mapped_form():
    assert not reach(["deny [::ffff:8.8.8.0/120]", "allow any"], "8.8.8.8")
    assert not reach(["deny ::ffff:8.8.8.8", "allow any"], "8.8.8.8")
    assert reach(["allow from ::ffff:192.0.2.0/120 to any"], "8.8.8.8")
    assert not client(["deny ::ffff:192.0.2.7", "allow any"]).allowed


def test_names_with_spaces_are_quoted():
    rule = parse_destination_rule('allow from any user "Ada Lovelace" to any')
    assert rule.user == "Ada Lovelace"
    for text in ("allow from any user Ada Lovelace to any", 'allow from any user "Ada to any', 'allow "any" "more"'):
        with pytest.raises(RuleError):
            parse_destination_rule(text)
