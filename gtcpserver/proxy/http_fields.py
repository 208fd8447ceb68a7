"""Header fields as a proxy has to change them (RFC 9110 section 7.6). No I/O."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gtcpserver.errors import ConfigError
from gtcpserver.http1.head import Head, Header, HttpError, options_of

from .http_messages import without_userinfo
from .target import IPAddress

#: Fields for the next hop only (RFC 9110 section 7.6.1), and their obsolete relatives.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade http2-settings "
    b"proxy-authorization proxy-authenticate proxy-authentication-info".split()
)

#: A Connection field may name other fields, but not these, which somebody behind us relies on: an origin that trusts
#: X-Forwarded-For from this proxy, or a cache that must see Cache-Control (requirement 23).
PROTECTED = frozenset(
    b"host content-length content-type content-encoding content-range cache-control vary expires age date pragma "
    b"etag if-match if-none-match if-modified-since if-unmodified-since if-range range expect max-forwards "
    b"authorization www-authenticate cookie set-cookie origin referer location via".split()
)

#: Forbidden in trailers: they would change where a message ends, who asks, or where to (RFC 9110 section 6.5.1).
NOT_IN_TRAILERS = frozenset(
    b"content-length content-type content-encoding content-range host expect range cache-control max-forwards "
    b"authorization set-cookie cookie via age date location retry-after vary www-authenticate".split()
)

#: How to treat fields in which a client says for whom it asks (`names_client`). "remove": drop them, since an origin
#: that trusts this proxy may believe them; "replace": with ours; "append": add ours after those of earlier proxies,
#: which are trusted; "pass": forward them unchanged. "replace" and "append" reveal the client's address, which a proxy
#: should not do unless asked to.
ForwardedMode = Literal["remove", "pass", "replace", "append"]

#: The field to use.
ForwardedField = Literal["x-forwarded-for", "forwarded"]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """How origins are told for whom a request is made."""

    mode: ForwardedMode = "remove"
    field: ForwardedField = "x-forwarded-for"


REMOVED = Forwarded()

# Besides X-Forwarded-*: fields read by nginx (X-Real-IP), Rails (Client-IP), CDNs (Akamai, Cloudflare, Fastly) and
# libraries for PHP and node.js.
_NAMES_CLIENT = frozenset(
    b"forwarded forwarded-for x-forwarded x-real-ip x-client-ip x-cluster-client-ip client-ip true-client-ip "
    b"cf-connecting-ip fastly-client-ip x-originating-ip x-remote-ip x-remote-addr proxy-client-ip "
    b"wl-proxy-client-ip x-original-forwarded-for".split()
)

# X_Forwarded_For and X-Forwarded-For become one variable in CGI and WSGI. lighttpd turns every character except letters
# and digits into an underscore: X.Forwarded.For is the same.
_FOLDED = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&'*+.^_`|~", b"abcdefghijklmnopqrstuvwxyz" + 14 * b"-")
# An unterminated string matches up to the end: a pattern that requires the closing quote would search for it again from
# each quote, and 60 kB of them took 12 s.
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*("?)')

#: The same as in SOCKS, where a length octet is the limit. Each attempt is a line in the log.
LONGEST_USER = 255

CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="proxy", charset="UTF-8"')


def end_to_end(headers: Sequence[Header]) -> list[Header]:
    """Return the fields to forward (RFC 9110 section 7.6.1)."""
    gone = HOP_BY_HOP | {name for name in options_of(headers) - PROTECTED if not names_client(name)}
    return [(name, value) for name, value in headers if name.lower() not in gone]


def forwarded_trailers(trailers: Sequence[Header]) -> list[Header]:
    """Return the trailers to forward."""
    return [
        (name, value)
        for name, value in end_to_end(trailers)
        if name.lower() not in NOT_IN_TRAILERS and not names_client(name)
    ]


def wanted_upgrade(head: Head) -> bytes | None:
    """Return the protocols that a client would like to switch to (RFC 9110 section 7.8); None: none.

    An upgrade with a body is not forwarded, which is always allowed: the new protocol would begin in the middle of it.
    """
    wanted = head.values(b"upgrade")
    if not wanted or head.version != b"1.1" or head.has_body or b"upgrade" not in options_of(head.headers):
        return None
    return b", ".join(wanted)


# -- changes on the way ------------------------------------------------------------------------------------------------


def via(version: bytes, pseudonym: bytes) -> bytes:
    """Return the Via field of this proxy as it is written (RFC 9110 section 7.6.3); b"" if its pseudonym is b""."""
    return b"Via: %b %b\r\n" % (version, pseudonym) if pseudonym else b""


def check_loop(head: Head, pseudonym: bytes) -> None:
    """Raise HttpError for a request that this proxy has already forwarded."""
    for value in head.values(b"via"):
        if any(hop.split()[1:2] == [pseudonym] for hop in value.split(b",")):
            raise HttpError(508, "The request has come back to this proxy.")


_HOPS = re.compile(rb"gtcpserver \(hop ([0-9]{1,3})\)")


def via_of_hops(hops: int) -> Header:
    """Return the field with which a CONNECT says through how many proxies it has come."""
    return b"Via", b"1.1 gtcpserver (hop %d)" % hops


def hops_in(head: Head) -> int:
    """Return what such a field says; 0 without one."""
    return max((int(found) for value in head.values(b"via") for found in _HOPS.findall(value)), default=0)


def check_pseudonym(name: str | None) -> None:
    """Raise ConfigError for a name that would not be parsed as a pseudonym (RFC 9110 section 7.6.3)."""
    if name is not None and not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(:[0-9]+)?", name):
        raise ConfigError(f"pseudonym must be a word, as a host has for a name, got {name!r}")


def unique_pseudonym() -> str:
    """Return a unique name for Via, so that two of our proxies in a chain are not taken for a loop."""
    return f"gtcpserver-{secrets.token_hex(4)}"


def names_client(name: bytes) -> bool:
    """Return whether origins may read the client's identity from a field of this name."""
    folded = name.translate(_FOLDED)
    return folded in _NAMES_CLIENT or folded.startswith(b"x-forwarded-")


def with_client(headers: list[Header], client: IPAddress, how: Forwarded) -> list[Header]:
    """Name the client, or remove fields that do (RFC 7239; X-Forwarded-For)."""
    if how.mode == "pass":
        return headers
    others = [header for header in headers if not names_client(header[0])]
    if how.mode == "remove":
        return others
    nodes = {
        b"x-forwarded-for": str(client).encode(),
        b"forwarded": b'for="[%b]"' % str(client).encode() if client.version == 6 else b"for=" + str(client).encode(),
    }
    told = {how.field.encode(): [nodes[how.field.encode()]]}
    if how.mode == "append":
        # Also to the other list, if there is one: an origin that reads it would take its last entry for the client.
        found = [(name.lower(), value) for name, value in headers if names_client(name)]
        earlier = [(name, value) for name, value in found if name == name.translate(_FOLDED)]
        others += [(name, value) for name, value in earlier if name not in nodes]
        for field, node in nodes.items():
            values = [value for name, value in earlier if name == field and _is_closed(value)]
            if values or field in told:
                told[field] = [*filter(None, values), node]
    return [*others, *((field.title(), b", ".join(values)) for field, values in told.items())]


def _is_closed(value: bytes) -> bool:
    """Return whether each quoted string is terminated: otherwise an appended value would become a part of it."""
    return all(quoted[1] for quoted in _QUOTED.finditer(value))


def forwards_left(head: Head) -> int | None:
    """Return Max-Forwards of a TRACE or OPTIONS (RFC 9110 section 7.6.2); None: it is missing, or has no meaning here.

    Raises:
        HttpError: it is not a number.
    """
    if head.method not in (b"TRACE", b"OPTIONS"):
        return None
    values = head.values(b"max-forwards")
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(rb"[0-9]{1,9}", values[0]):
        raise HttpError(400, "Max-Forwards must be a number.")
    return int(values[0])


def traced(head: Head) -> bytes:
    """Return the response body for a TRACE: the request without sensitive fields (RFC 9110 section 9.3.8)."""
    secret = (b"proxy-authorization", b"authorization", b"cookie")
    fields = b"".join(b"%b: %b\r\n" % field for field in head.headers if field[0].lower() not in secret)
    return b"%b %b HTTP/%b\r\n%b\r\n" % (head.method, without_userinfo(head.target), head.version, fields)


# -- who the client is -------------------------------------------------------------------------------------------------


def basic_credentials(head: Head) -> tuple[bytes, bytes] | None:
    """Return user and password (RFC 7617) of the field Proxy-Authorization; None if it is missing or unreadable."""
    values = head.values(b"proxy-authorization")
    scheme, _, encoded = (values[0] if len(values) == 1 else b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return (user, password) if colon and len(user) <= LONGEST_USER else None
