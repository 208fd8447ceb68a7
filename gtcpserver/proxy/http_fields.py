"""Header fields as a proxy has to change them on the way (RFC 9110 section 7.6). No I/O."""

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

from .target import IPAddress

#: Fields that are for the next hop only (RFC 9110 section 7.6.1), and their old relatives.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade http2-settings "
    b"proxy-authorization proxy-authenticate proxy-authentication-info".split()
)

#: A Connection field may name others, but not those on which somebody behind us relies: an origin that trusts
#: X-Forwarded-For from this proxy, or a cache that must see Cache-Control (requirement 23).
PROTECTED = frozenset(
    b"host content-length content-type content-encoding content-range cache-control vary expires age date pragma "
    b"etag if-match if-none-match if-modified-since if-unmodified-since if-range range expect max-forwards "
    b"authorization www-authenticate cookie set-cookie origin referer location via".split()
)

#: What trailers must not have: it would change where a message ends, who asks, or where to (RFC 9110 section 6.5.1).
NOT_IN_TRAILERS = frozenset(
    b"content-length content-type content-encoding content-range host expect range cache-control max-forwards "
    b"authorization set-cookie cookie via age date location retry-after vary www-authenticate".split()
)

#: What becomes of fields in which a client says for whom it asks (`names_client`). "remove": they are taken away, as an
#: origin that trusts this proxy may believe them; "replace": by ours; "append": ours is added behind those of earlier
#: proxies, which are believed to be true; "pass": they are forwarded as they are. "replace" and "append" tell the
#: client's address: a proxy should not, unless asked to.
ForwardedMode = Literal["remove", "pass", "replace", "append"]

#: In which field it is told.
ForwardedField = Literal["x-forwarded-for", "forwarded"]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """How origins are told for whom a request is made."""

    mode: ForwardedMode = "remove"
    field: ForwardedField = "x-forwarded-for"


REMOVED = Forwarded()

# Beside X-Forwarded-*: what nginx (X-Real-IP), Rails (Client-IP), CDNs (Akamai, Cloudflare, Fastly) and libraries for
# PHP and node.js read.
_NAMES_CLIENT = frozenset(
    b"forwarded forwarded-for x-forwarded x-real-ip x-client-ip x-cluster-client-ip client-ip true-client-ip "
    b"cf-connecting-ip fastly-client-ip x-originating-ip x-remote-ip x-remote-addr proxy-client-ip "
    b"wl-proxy-client-ip x-original-forwarded-for".split()
)

# X_Forwarded_For and X-Forwarded-For are one variable of CGI and WSGI. lighttpd makes an underscore of every character
# but letters and digits: X.Forwarded.For is the same.
_FOLDED = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&'*+.^_`|~", b"abcdefghijklmnopqrstuvwxyz" + 14 * b"-")
# Of a string without an end it takes all that is left: a pattern that must find the end looks for it anew from each
# quote, and 60 kB of them took 12 s.
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*("?)')

#: As in SOCKS, where a length octet is the limit. Each attempt is a line in the log.
LONGEST_USER = 255

CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="proxy", charset="UTF-8"')


def end_to_end(headers: Sequence[Header]) -> list[Header]:
    """The fields that are forwarded (RFC 9110 section 7.6.1)."""
    gone = HOP_BY_HOP | {name for name in options_of(headers) - PROTECTED if not names_client(name)}
    return [(name, value) for name, value in headers if name.lower() not in gone]


def forwarded_trailers(trailers: Sequence[Header]) -> list[Header]:
    """The trailers that are forwarded."""
    return [
        (name, value)
        for name, value in end_to_end(trailers)
        if name.lower() not in NOT_IN_TRAILERS and not names_client(name)
    ]


def wanted_upgrade(head: Head) -> bytes | None:
    """The protocols that a client would like to switch to (RFC 9110 section 7.8); None: it would not.

    With a body none is forwarded, which a recipient may always do: the new protocol would begin in the midst of it.
    """
    wanted = head.values(b"upgrade")
    if not wanted or head.version != b"1.1" or head.has_body or b"upgrade" not in options_of(head.headers):
        return None
    return b", ".join(wanted)


# -- on the way --------------------------------------------------------------------------------------------------------


def with_via(headers: list[Header], version: bytes, pseudonym: bytes) -> list[Header]:
    """Add the Via field of this proxy (RFC 9110 section 7.6.3)."""
    return [*headers, (b"Via", version + b" " + pseudonym)]


def check_loop(head: Head, pseudonym: bytes) -> None:
    """Raise HttpError for a request that this proxy has forwarded before."""
    for value in head.values(b"via"):
        if any(hop.split()[1:2] == [pseudonym] for hop in value.split(b",")):
            raise HttpError(508, "The request has come back to this proxy.")


def check_pseudonym(name: str | None) -> None:
    """Raises ConfigError for one that would not be read as one (RFC 9110 section 7.6.3)."""
    if name is not None and not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(:[0-9]+)?", name):
        raise ConfigError(f"pseudonym must be a word, as a host has for a name, got {name!r}")


def unique_pseudonym() -> str:
    """A name for Via that no other proxy has, so that two of ours in a chain are not taken for a loop."""
    return f"gtcpserver-{secrets.token_hex(4)}"


def names_client(name: bytes) -> bool:
    """Whether origins may read in a field, by its name, for whom a request is made."""
    folded = name.translate(_FOLDED)
    return folded in _NAMES_CLIENT or folded.startswith(b"x-forwarded-")


def with_client(headers: list[Header], client: IPAddress, how: Forwarded) -> list[Header]:
    """Name the client, or see that nothing does (RFC 7239; X-Forwarded-For)."""
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
        # To the other list as well, if there is one: an origin that reads it would take its last entry for the client.
        found = [(name.lower(), value) for name, value in headers if names_client(name)]
        earlier = [(name, value) for name, value in found if name == name.translate(_FOLDED)]
        others += [(name, value) for name, value in earlier if name not in nodes]
        for field, node in nodes.items():
            values = [value for name, value in earlier if name == field and _is_closed(value)]
            if values or field in told:
                told[field] = [*filter(None, values), node]
    return [*others, *((field.title(), b", ".join(values)) for field, values in told.items())]


def _is_closed(value: bytes) -> bool:
    """Whether each quoted string has its end: what is appended to another one would be a part of it."""
    return all(quoted[1] for quoted in _QUOTED.finditer(value))


def forwards_left(head: Head) -> int | None:
    """Max-Forwards of a TRACE or OPTIONS (RFC 9110 section 7.6.2); None: there is none, or it means nothing here.

    Raises:
        HttpError: it is not a number.
    """
    values = head.values(b"max-forwards")
    if head.method not in (b"TRACE", b"OPTIONS") or not values:
        return None
    if len(values) > 1 or not re.fullmatch(rb"[0-9]{1,9}", values[0]):
        raise HttpError(400, "Max-Forwards must be a number.")
    return int(values[0])


def traced(head: Head) -> bytes:
    """What a TRACE is answered with: the request, without what is nobody's business (RFC 9110 section 9.3.8)."""
    secret = (b"proxy-authorization", b"authorization", b"cookie")
    fields = b"".join(b"%b: %b\r\n" % field for field in head.headers if field[0].lower() not in secret)
    return b"%b %b HTTP/%b\r\n%b\r\n" % (head.method, head.target, head.version, fields)


# -- who the client is -------------------------------------------------------------------------------------------------


def basic_credentials(head: Head) -> tuple[bytes, bytes] | None:
    """User and password (RFC 7617) of the field Proxy-Authorization; None if there is none that can be read."""
    values = head.values(b"proxy-authorization")
    scheme, _, encoded = (values[0] if len(values) == 1 else b"").partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return (user, password) if colon and len(user) <= LONGEST_USER else None
