"""Addresses to listen on, destinations of clients, and rules about them."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from fuzz.engine import Target
from fuzz.targets.helpers import Choices
from gtcpserver.address import MAX_UNIX_PATH, format_sockaddr, parse_address
from gtcpserver.errors import ConfigError
from gtcpserver.proxy.errors import BadTarget, RuleError
from gtcpserver.proxy.rules import (
    ClientRule,
    DestinationRule,
    RuleMatch,
    decide_client,
    decide_destination,
    parse_client_rule,
    parse_destination_rule,
    parse_way,
)
from gtcpserver.proxy.target import (
    IPAddress,
    addresses_meant,
    canonical_name,
    kind_of,
    make_target,
    parse_authority,
    unmapped,
)
from gtcpserver.proxy.target import Target as Destination


def _text(data: bytes) -> str:
    """As arguments of a command line come."""
    return data.decode("utf-8", "surrogateescape")


# -- addresses to listen on --------------------------------------------------------------------------------------------


def listen_address(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.number(3)
    if kind == 0:
        _check_text(_text(choices.rest()))
    elif kind == 1:
        _check_printed((socket.inet_ntoa(choices.bytes(4).ljust(4, b"\0")), choices.number(65535)), socket.AF_INET)
    elif kind == 2:
        host = socket.inet_ntop(socket.AF_INET6, choices.bytes(16).ljust(16, b"\0"))
        port, scope = choices.number(65535), choices.number(300)
        _check_printed((host, port, 0, scope), socket.AF_INET6)
    else:
        name = choices.rest()[:MAX_UNIX_PATH]
        _check_printed(name if name[:1] == b"\0" else os.fsdecode(name.split(b"\0")[0]), socket.AF_UNIX)


def _check_text(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert parse_address(str(address)) == address, "printed and read again it is another"
    if address.kind == "unix":
        assert 0 < len(os.fsencode(address.path)) <= MAX_UNIX_PATH
        assert "\0" not in address.path
    elif address.kind == "fd":
        assert 0 <= address.fd < 1 << 31
    else:
        assert 0 <= address.port <= 65535
        assert parse_address((address.host, address.port)) == address
        assert address.host.isprintable()
        assert " " not in address.host
        if ":" in address.host:
            socket.inet_pton(socket.AF_INET6, address.host.partition("%")[0])
        elif not address.host.strip("0123456789."):
            socket.inet_pton(socket.AF_INET, address.host)


def _check_printed(sockaddr: Any, family: int) -> None:
    """What the kernel says is printed so that it can be read again."""
    text = format_sockaddr(sockaddr, family)
    if text in ("unix:", "unix:@") or "\0" in text or len(os.fsencode(text)) > MAX_UNIX_PATH + 5:
        return  # a socket without a name, or with one that cannot be given as text
    again = parse_address(text)
    assert parse_address(str(again)) == again
    if family == socket.AF_UNIX:
        if again.path[:1] != "@" or isinstance(sockaddr, bytes):
            raw = os.fsencode(sockaddr)
            assert os.fsencode(again.path) == (b"@" + raw[1:] if raw[:1] == b"\0" else raw)
        return
    assert again.port == sockaddr[1]
    assert unmapped(ip_address(again.host.partition("%")[0])) == unmapped(ip_address(sockaddr[0]))


# -- destinations ------------------------------------------------------------------------------------------------------


def destination(data: bytes) -> None:
    make_target.cache_clear()
    kind_of.cache_clear()
    text = _text(data)
    for parse in (lambda: parse_authority(text), lambda: parse_authority(text, 80), lambda: make_target(text, 80)):
        try:
            target = parse()
        except BadTarget as error:
            assert str(error).isprintable()
            continue
        _check_target(target)
    _check_against_libc(text)


def _check_target(target: Destination) -> None:
    assert 1 <= target.port <= 65535
    assert parse_authority(str(target)) == target, "printed and read again it is another"
    assert make_target(target.host, target.port) == target
    assert target.host.isascii()
    assert target.host.isprintable()
    assert target.host == target.host.lower()
    if target.ip is None:
        assert canonical_name(target.host) == target.name
        assert _by_libc(target.host) is None, "a name that the C library takes for an address"
    else:
        assert str(target.ip) == target.host
        assert unmapped(target.ip) == target.ip
        _check_embedded(target.ip)


def _by_libc(host: str) -> str | None:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):  # ValueError: a NUL, or a character that cannot be encoded
        return None
    return str(found[0][4][0])


def _check_against_libc(text: str) -> None:
    """What getaddrinfo(3) would connect to without asking anybody, rules must see as that address."""
    meant = _by_libc(text)
    if meant is None:
        return
    try:
        target = make_target(text, 80)
    except BadTarget:
        return
    assert target.ip == unmapped(ip_address(meant)), f"{target} here, {meant} for the C library"


def _check_embedded(ip: IPAddress) -> None:
    """Addresses in which gateways look for others are as special as those."""
    meant = addresses_meant(ip)
    assert meant[0] == ip
    if isinstance(ip, IPv4Address):
        number = int(ip)
        for gateway in (f"64:ff9b::{ip}", f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1", f"fe80::5efe:{ip}"):
            assert ip in addresses_meant(IPv6Address(gateway)), f"{gateway} leads to {ip}"


# -- rules -------------------------------------------------------------------------------------------------------------


def _spellings(ip: IPAddress) -> list[str]:
    if isinstance(ip, IPv6Address):
        return [str(ip), ip.exploded, str(ip).upper(), f"[{ip}]"]
    number = int(ip)
    a, b, c, d = ip.packed
    return [
        *(
            str(ip),
            f"{ip}.",
            f"{number}",
            f"0x{number:x}",
            f"0{number:o}",
            f"{a}.{b}.{number & 0xFFFF}",
            f"0x{a:X}.{b}.{c}.{d}",
        ),
        *(f"{a}.{number & 0xFFFFFF}", f"::ffff:{ip}", f"[::FFFF:{number >> 16:x}:{number & 0xFFFF:x}]"),
        f"0:0:0:0:0:ffff:{number >> 16:04X}:{number & 0xFFFF:04X}",
    ]


ANYWHERE = parse_destination_rule("allow any")


def rules(data: bytes) -> None:
    """Lines of rules, and an address that they decide about."""
    make_target.cache_clear()
    kind_of.cache_clear()
    choices = Choices(data)
    size = (4, 16)[choices.number(1)]
    ip = unmapped(ip_address(choices.bytes(size).ljust(size, b"\0")))
    asked = RuleMatch(
        unmapped(ip_address(choices.bytes(4).ljust(4, b"\0"))), "office", "staff", "ada", choices.number(65535)
    )
    asked.port = asked.port or 1
    client_rules: list[ClientRule] = []
    destination_rules: list[DestinationRule] = []
    for text in _text(choices.rest()).split("\n")[:20]:
        for parse, found in ((parse_client_rule, client_rules), (parse_destination_rule, destination_rules)):
            rule = _parse(parse, text)
            if rule is not None:
                found.append(rule)  # type: ignore[attr-defined]
        _parse(parse_way, text)
    _check_verdicts(destination_rules, asked, ip)
    client = asked.client
    verdict = decide_client(client_rules, client, "office")
    if isinstance(client, IPv4Address):
        assert decide_client(client_rules, IPv6Address(f"::ffff:{client}"), "office") == verdict


def _parse(parse: Any, text: str) -> Any:
    try:
        rule = parse(text)
    except RuleError as error:
        assert "\n" not in str(error)
        return None
    if '"' not in text and parse is not parse_way:
        again = parse("  ".join(text.split()))
        assert replace(again, text="") == replace(rule, text=""), "white space makes another rule"
    return rule


def _check_verdicts(destination_rules: list[DestinationRule], asked: RuleMatch, ip: IPAddress) -> None:
    verdicts = set()
    for text in _spellings(ip):
        target = make_target(text, asked.port)
        assert target.ip == ip
        verdicts.add(decide_destination(destination_rules, asked, None, target.ip))
    assert len(verdicts) == 1, "the verdict depends on the spelling"
    (verdict,) = verdicts
    special = [one for one in addresses_meant(ip) if kind_of(one) is not None]
    if verdict.allowed and special:
        rule = next(rule for rule in destination_rules if rule.text == verdict.rule and asked.fits(rule))
        assert not rule.destinations.is_any, "special addresses by a general rule"
        assert rule.destinations.name is None, "special addresses by a name"
    if not isinstance(ip, IPv4Address):
        return
    number = int(ip)
    gateways = [IPv6Address(f"64:ff9b::{ip}"), IPv6Address(f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1")]
    for rule in destination_rules:
        if rule.action == "deny" and not decide_destination([rule, ANYWHERE], asked, None, ip).allowed:
            for gateway in gateways:
                assert not decide_destination([rule, ANYWHERE], asked, None, gateway).allowed, (
                    f"{gateway} is not denied"
                )


_SPELLINGS = (
    *(
        b"127.0.0.1",
        b"127.1",
        b"0x7f.1",
        b"0177.1",
        b"2130706433",
        b"0x",
        b"08",
        b"256",
        b"::1",
        b"::ffff:",
        b"[",
        b"]",
        b":",
    ),
    *(
        b"%eth0",
        b"%",
        b".",
        b"..",
        b"localhost",
        b"example.com",
        b"xn--",
        b"\xc3\xa4",
        b"\xe3\x80\x82",
        b"\xef\xbc\x91",
    ),
    *(
        b":80",
        b":0",
        b":65536",
        b"@",
        b"/",
        b"*",
        b"_",
        b"-",
        b" ",
        b"\0",
        b"\n",
        b"\xff",
        b"64:ff9b::",
        b"2002:",
        b"fe80::1",
    ),
)

TARGETS = [
    Target(
        "listen_address",
        listen_address,
        tokens=(*_SPELLINGS, b"unix:", b"unix:@", b"unix:/run/x", b"fd:", b"fd:3", b"\0\0", b"\3\0"),
        longest=16_000,
    ),
    Target("destination", destination, tokens=_SPELLINGS, longest=16_000),
    Target(
        "rules",
        rules,
        tokens=(
            *_SPELLINGS,
            *(
                b"\nallow ",
                b"\ndeny ",
                b"\nthrough ",
                b" from ",
                b" to ",
                b" with auth staff",
                b" user ada",
                b" via office",
            ),
            *(
                b"any",
                b"loopback",
                b"private",
                b"metadata",
                b"link-local",
                b"10.0.0.0/8",
                b"[2001:db8::/32]",
                b"::/0",
                b"/33",
            ),
            *(
                b"0.0.0.0/0",
                b":80,443",
                b":8000-8999",
                b":9-8",
                b'"',
                b'"a b"',
                b".example.com",
                b"*.example.com",
                b"\x7f\0\0\1",
            ),
        ),
        longest=16_000,
        lines=(60_000, 100),
        seconds=(0.3, 20e-6),
    ),
]
