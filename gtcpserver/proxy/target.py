"""Destinations: one canonical form for every spelling, and the kind of an address. No I/O.

Clients that must not reach a place try all of its names: 127.0.0.1 is also 127.1, 0x7f000001, 2130706433 and 0177.0.0.1
(inet_aton(3)), and as IPv6 ::ffff:127.0.0.1, 2002:7f00:1:: and 64:ff9b::7f00:1. Rules only see one form of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from gtcpserver.networks import IPAddress as IPAddress
from gtcpserver.networks import IPNetwork as IPNetwork
from gtcpserver.networks import unmapped as unmapped

from .errors import BadTarget

try:
    import idna
except ImportError:  # pragma: no cover - it is part of the extra [proxy]
    idna = None  # type: ignore[assignment]

#: RFC 1035 section 2.3.4: 255 octets on the wire, which are 253 characters.
LONGEST_NAME = 253
LONGEST_LABEL = 63

#: A label as found in practice: RFC 952 and 1123, the underscore of service names, and hyphens anywhere: names such as
#: "r1---sn-x.example" and "-x.example" have addresses, and RFC 2181 section 11 lets them.
_LABEL = re.compile(r"[a-z0-9_-]+")

#: Characters for which IDNA 2003, which Python has, means another name than IDNA 2008 (UTS 46 section 7).
_DEVIATIONS = frozenset("\u00df\u03c2\u200c\u200d")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")


@dataclass(frozen=True, slots=True)
class Target:
    """A destination.

    Attributes:
        host: a name in lower case, with a final dot if it was given with one (it is then absolute: no search list
            applies); or the canonical text of an address.
        port: 1 to 65535; 0 only where a protocol gives it a meaning (BIND, UDP ASSOCIATE).
        ip: the address, if the host is one; IPv4-mapped IPv6 addresses become IPv4.
    """

    host: str
    port: int
    ip: IPAddress | None = None

    def __hash__(self) -> int:
        # The host says which address it is, whose own hash is made in Python: 1 us, several times a request.
        return hash((self.host, self.port))

    @property
    def name(self) -> str | None:
        """Return the name for rules, without its final dot; None for an address."""
        return None if self.ip is not None else self.host.removesuffix(".")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if isinstance(self.ip, IPv6Address) else f"{self.host}:{self.port}"


@lru_cache(maxsize=4096)
def make_target(host: str, port: int, *, least_port: int = 1) -> Target:
    """Make a target from a client's host and port.

    Args:
        host: a name, or an address in any spelling; an IPv6 address with or without brackets.
        port: of the destination.
        least_port: 0 where 0 has a meaning.

    Raises:
        BadTarget: neither a name nor an address, or an invalid port.
    """
    if not least_port <= port <= 65535:
        raise BadTarget(f"port must be {least_port} to 65535, got {port}")
    ip = parse_address(host)
    if ip is not None:
        return Target(str(ip), port, ip)
    return Target(canonical_name(host) + "." * host.endswith("."), port)


def parse_authority(text: str, default_port: int | None = None) -> Target:
    """Parse "host:port" (RFC 3986 section 3.2, without user information).

    Args:
        default_port: for a text without a port; None: a port is required, as for CONNECT (RFC 9110 section 9.3.6).

    Raises:
        BadTarget: with an explanation.
    """
    if "@" in text:
        raise BadTarget("user information is not allowed in a destination")
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise BadTarget(f"expected [IPv6]:port, got {_shown(text)}")
        if ":" not in host or "%" in host or _plain_address(host) is None:
            raise BadTarget(f"expected an IPv6 address in brackets, got {_shown(host)}")
        port_text = rest[1:] if rest else None
    else:
        host, colon, port_text_ = text.partition(":")
        port_text = port_text_ if colon else None
        if port_text is not None and ":" in port_text:
            raise BadTarget("an IPv6 address needs brackets, as in [::1]:80")
    if not port_text:
        if default_port is None:
            raise BadTarget(f"expected host:port, got {_shown(text)}")
        return make_target(host, default_port)
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
        raise BadTarget(f"port must be 1 to 65535, got {_shown(port_text)}")
    return make_target(host, int(port_text))


def parse_address(text: str) -> IPAddress | None:
    """Return the address that a text is a spelling of; None for a name.

    Raises:
        BadTarget: an address with a zone ("fe80::1%eth0"), or brackets around something other than an IPv6 address.
    """
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
        if ":" not in text:
            raise BadTarget(f"expected an IPv6 address in brackets, got {_shown(text)}")
    if "%" in text:
        raise BadTarget("an address with a zone means nothing to the proxy")
    if ":" in text:
        found = _plain_address(text)
        if found is None:
            raise BadTarget(f"not an IPv6 address: {_shown(text)}")
        return found
    return _ipv4_of_any_spelling(text)


def _plain_address(text: str) -> IPAddress | None:
    try:
        return unmapped(ip_address(text))
    except ValueError:
        return None


def _ipv4_of_any_spelling(text: str) -> IPv4Address | None:
    """Parse as inet_aton(3) does: one to four numbers, each decimal, octal (0...) or hexadecimal (0x...)."""
    parts = text.removesuffix(".").split(".")
    if len(parts) > 4 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    if any(len(part) > 40 for part in parts):
        raise BadTarget("not an IPv4 address: a number in it is too long")
    values = []
    for part in parts:
        try:
            if part[:2].lower() == "0x":
                values.append(int(part[2:] or "0", 16))
            else:
                values.append(int(part, 8 if len(part) > 1 and part[0] == "0" else 10))
        except ValueError:
            raise BadTarget(f"not an IPv4 address: {_shown(text)}") from None  # 08, 09
    *front, last = values
    if any(value > 255 for value in front) or last >= 256 ** (5 - len(values)):
        raise BadTarget(f"not an IPv4 address: {_shown(text)}")
    number = last
    for place, value in enumerate(front):
        number |= value << (24 - 8 * place)
    return IPv4Address(number)


def canonical_name(text: str) -> str:
    """Return a host name in lower case ASCII, without its final dot.

    Raises:
        BadTarget: too long, empty, or with characters that host names do not have (they may be aimed at the next
            protocol, or at the log).
    """
    name = text[:-1] if text.endswith(".") else text
    if not name:
        raise BadTarget("the host name is empty")
    if len(name) > LONGEST_NAME:
        raise BadTarget(f"the host name is longer than {LONGEST_NAME} characters")
    if not name.isascii():
        name = _ascii_name(name)
        if len(name) > LONGEST_NAME:
            raise BadTarget(f"the host name is longer than {LONGEST_NAME} characters")
    name = name.lower()
    labels = name.split(".")
    if not all(len(label) <= LONGEST_LABEL and _LABEL.fullmatch(label) for label in labels):
        raise BadTarget(f"not a host name: {_shown(text)}")
    if _NUMBER.fullmatch(labels[-1]):
        # Resolvers disagree on its meaning (WHATWG URL: "ends in a number": an address, or an error).
        raise BadTarget(f"not a host name: {_shown(text)}")
    return name


def _ascii_name(name: str) -> str:
    """Encode a name by IDNA 2008 with the mappings of UTS 46, non-transitional, as browsers do. Raise BadTarget."""
    try:
        if idna is not None:
            labels = idna.uts46_remap(name, std3_rules=False, transitional=False).split(".")
            return ".".join(label if label.isascii() else idna.alabel(label).decode() for label in labels)
        if not _DEVIATIONS.isdisjoint(name):
            raise BadTarget(f"this host name needs the package idna: {_shown(name)}")
        return name.encode("idna").decode()  # RFC 3490
    except UnicodeError:
        raise BadTarget(f"not a host name: {_shown(name)}") from None


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 64 else text[:61] + "...")


# -- kinds of addresses ------------------------------------------------------------------------------------------------

#: A kind determined by the kernel, not by a network: see `this_host`.
THIS_HOST = "this-host"

#: Networks by kind, special before general: the first one that contains an address gives its kind. They are from RFC
#: 6890 and its successors (the IANA special-purpose registries), and the addresses on which clouds serve instances.
KINDS: dict[str, tuple[IPNetwork, ...]] = {
    kind: tuple(map(ip_network, networks.split()))
    for kind, networks in {
        "metadata": "169.254.169.254/32 169.254.170.2/32 169.254.169.123/32 100.100.100.200/32 168.63.129.16/32 "
        "192.0.0.192/32 fd00:ec2::254/128 fd20:ce::254/128",
        "unspecified": "0.0.0.0/8 ::/128",
        "loopback": "127.0.0.0/8 ::1/128",
        THIS_HOST: "",
        "link-local": "169.254.0.0/16 fe80::/10",
        "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10",
        "shared": "100.64.0.0/10",
        "multicast": "224.0.0.0/4 ff00::/8",
        "broadcast": "255.255.255.255/32",
        "reserved": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 "
        "240.0.0.0/4 64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 3fff::/20 5f00::/16",
    }.items()
}

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052 section 2.1
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")  # RFC 8215: prefixes of any length below it
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291 section 2.5.5.1
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")  # SIIT, RFC 2765 section 2.1
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214 section 6.1

#: RFC 6052 section 2.2: lengths of prefixes that an IPv4 address may follow.
LENGTHS_OF_NAT64 = (32, 40, 48, 56, 64, 96)

_THIS_NETWORK = IPv4Network("0.0.0.0/8")


@lru_cache(maxsize=4096)  # 10 us otherwise, several times a connection
def kind_of(ip: IPAddress, own: bool = False) -> str | None:
    """Return the kind of a special address, a key of KINDS; None for an ordinary internet address.

    Args:
        own: it is one of this host's addresses.
    """
    for kind, networks in KINDS.items():
        if own and kind == THIS_HOST:
            return kind
        if any(ip.version == network.version and ip in network for network in networks):
            return kind
    return None


def parse_nat64(text: str) -> IPv6Network:
    """Parse a NAT64 prefix. Raise ValueError with an explanation."""
    try:
        prefix = IPv6Network(text)
    except ValueError as error:
        raise ValueError(f"nat64 must have IPv6 networks, got {text!r} ({error})") from None
    if prefix.prefixlen not in LENGTHS_OF_NAT64:
        lengths = ", ".join(map(str, LENGTHS_OF_NAT64))
        raise ValueError(f"nat64 must have networks with one of the lengths {lengths} (RFC 6052), got {text!r}")
    return prefix


def addresses_meant(ip: IPAddress, nat64: tuple[IPv6Network, ...] = ()) -> tuple[IPAddress, ...]:
    """Return an address, and the IPv4 addresses in it to which a gateway may forward packets.

    Args:
        nat64: prefixes of NAT64 gateways, besides the well-known ones.
    """
    ip = unmapped(ip)
    return (ip, *_embedded(ip, nat64)) if isinstance(ip, IPv6Address) else (ip,)


@lru_cache(maxsize=4096)  # 10 us otherwise, once a connection
def _embedded(ip: IPv6Address, nat64: tuple[IPv6Network, ...]) -> tuple[IPv4Address, ...]:
    return tuple(_find_embedded(ip, nat64))


def _find_embedded(ip: IPv6Address, nat64: tuple[IPv6Network, ...]) -> Iterator[IPv4Address]:
    number = int(ip)
    prefixes = [prefix for prefix in nat64 if ip in prefix]
    for prefix in prefixes:
        yield _behind(number, prefix.prefixlen)
    if ip in _NAT64_LOCAL and not prefixes:
        # Only its owner knows the length of the prefix: try each length that yields an address.
        yield _behind(number, 96)
        others = (_behind(number, length) for length in LENGTHS_OF_NAT64 if 48 <= length < 96)
        yield from (one for one in others if one not in _THIS_NETWORK)
    if ip in _NAT64 or ip in _TRANSLATED or (ip in _COMPATIBLE and number > 0xFFFF):
        yield IPv4Address(number & 0xFFFFFFFF)
    if ip.sixtofour is not None:
        yield ip.sixtofour
    if ip.teredo is not None:
        yield from ip.teredo
    if (number >> 32) & 0xFFFFFFFF in _ISATAP:
        yield IPv4Address(number & 0xFFFFFFFF)


def _behind(number: int, length: int) -> IPv4Address:
    """Return the IPv4 address behind a NAT64 prefix (RFC 6052 section 2.2)."""
    if length == 96:
        return IPv4Address(number & 0xFFFFFFFF)
    # Bits 64 to 71 are not part of it.
    without = (number >> 64 << 56) | (number & 0xFFFFFFFFFFFFFF)
    return IPv4Address(without >> (120 - length - 32) & 0xFFFFFFFF)
