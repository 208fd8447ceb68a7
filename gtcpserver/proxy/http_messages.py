"""HTTP/1.1 messages as a proxy has to read and change them (RFC 9110, RFC 9112). No I/O.

h11 parses and writes the messages; what a proxy forwards is always written anew and never the bytes that came. Before
h11 sees a head it has passed `check_head`, which refuses what two implementations may read in two ways: that is how
requests are smuggled past a proxy.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from ..errors import GtcpServerError
from .errors import BadTarget
from .target import Target, parse_authority

END_OF_HEAD = b"\r\n\r\n"

#: A head of a message. node.js: 16 KiB, nginx: 8 KiB a line and 32 KiB in all, Apache: 100 fields of 8 KiB.
LONGEST_HEAD = 64 * 1024
LONGEST_TARGET = 16 * 1024
MOST_FIELDS = 128

#: Fields that are for the next hop only (RFC 9110 section 7.6.1), and their old relatives.
HOP_BY_HOP = frozenset(
    b"connection proxy-connection keep-alive te trailer transfer-encoding upgrade "
    b"proxy-authorization proxy-authenticate proxy-authentication-info".split()
)

#: A Connection field may name others, but not those on which somebody behind us relies (requirement 23).
PROTECTED = frozenset(b"host content-length cache-control via forwarded x-forwarded-for cookie authorization".split())

Header = tuple[bytes, bytes]

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t\x20-\x7e\x80-\xff]*)")


class HttpError(GtcpServerError):
    """A request that is answered by the proxy itself; the message is for the person who reads it.

    Attributes:
        status: such as 502.
        headers: more fields for the answer.
        keep: another request may follow on the connection.
    """

    def __init__(self, status: int, message: str, headers: Sequence[Header] = (), *, keep: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.headers = tuple(headers)
        self.keep = keep


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request that has passed the check.

    Attributes:
        raw: as it came, with the empty line.
        method, target: of the request line.
        version: b"1.1" or b"1.0".
        headers: names as they came, values without white space around them.
    """

    raw: bytes
    method: bytes
    target: bytes
    version: bytes
    headers: tuple[Header, ...]

    def values(self, name: bytes) -> list[bytes]:
        """The values of a field, by its name in lower case."""
        return [value for found, value in self.headers if found.lower() == name]


def find_end_of_head(data: bytes) -> int | None:
    """Where a head ends, behind its empty line; None as long as it has not come.

    Raises:
        HttpError: it is longer than we take, or can never end.
    """
    end = data.find(END_OF_HEAD)
    if 0 <= end <= LONGEST_HEAD:
        return end + len(END_OF_HEAD)
    first_line = data.find(b"\n")
    if first_line < 0 and len(data) > LONGEST_TARGET:
        raise HttpError(414, f"The request line is longer than {LONGEST_TARGET} bytes.")
    if first_line >= 0 and data[first_line - 1 : first_line] != b"\r":
        raise HttpError(400, "Lines must end with CR LF.")
    if len(data) > LONGEST_HEAD:
        raise HttpError(431, f"The head of the request is longer than {LONGEST_HEAD} bytes.")
    return None


def check_head(raw: bytes) -> Head:
    """Read the head of a request.

    Raises:
        HttpError: it breaks a rule, or could be read in more than one way.
    """
    lines = raw.removesuffix(END_OF_HEAD).split(b"\r\n")
    line = _REQUEST_LINE.fullmatch(lines[0])
    if line is None:
        raise HttpError(400, "The request line must be: METHOD TARGET HTTP/1.1")
    method, target, major, minor = line.groups()
    if major != b"1":
        raise HttpError(505, "This proxy speaks HTTP/1.1 and HTTP/1.0.")
    if len(target) > LONGEST_TARGET:
        raise HttpError(414, f"The request target is longer than {LONGEST_TARGET} bytes.")
    if len(lines) - 1 > MOST_FIELDS:
        raise HttpError(431, f"The request has more than {MOST_FIELDS} header fields.")
    headers = []
    for number, text in enumerate(lines[1:], 1):
        # No folded lines, no space before the colon, no bare CR or LF, no NUL (RFC 9112 sections 2.2, 5.1, 5.2).
        field = _FIELD.fullmatch(text)
        if field is None:
            raise HttpError(400, f"Header line {number} must be: Name: value")
        headers.append((field[1], field[2].strip(b" \t")))
    head = Head(raw, method, target, b"1." + minor, tuple(headers))
    _check_framing(head)
    return head


def _check_framing(head: Head) -> None:
    lengths, encodings = head.values(b"content-length"), head.values(b"transfer-encoding")
    if encodings:
        # RFC 9112 section 6.3: with both, the sender may be smuggling. Neither does HTTP/1.0 have it.
        if lengths:
            raise HttpError(400, "A request cannot have both Content-Length and Transfer-Encoding.")
        if head.version == b"1.0":
            raise HttpError(400, "HTTP/1.0 has no Transfer-Encoding.")
        if [value.lower() for value in encodings] != [b"chunked"]:
            raise HttpError(501, "The only transfer encoding that is understood is: chunked")
    if len(lengths) > 1:
        raise HttpError(400, "A request cannot have several Content-Length fields.")
    if lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        raise HttpError(400, "Content-Length must be a number.")
    if len(head.values(b"host")) > 1:
        raise HttpError(400, "A request cannot have several Host fields.")


# -- targets -----------------------------------------------------------------------------------------------------------


def connect_target(head: Head) -> Target:
    """Where a CONNECT goes: host:port, with the port (RFC 9110 section 9.3.6). Raises HttpError."""
    try:
        return parse_authority(head.target.decode())
    except BadTarget as error:
        raise HttpError(400, f"CONNECT needs a host and a port: {error}.") from None


def absolute_target(head: Head) -> tuple[Target, bytes, bytes]:
    """Where another request goes (RFC 9112 section 3.2.2).

    Returns:
        The destination; the value for Host, which is the authority of the target and not what the client put there; and
        the target for the origin.

    Raises:
        HttpError: not an absolute http URI.
    """
    scheme, found, rest = head.target.partition(b"://")
    if not found or head.target.startswith(b"/"):
        raise HttpError(400, "This is a proxy: it needs the whole address, such as http://example.com/.")
    if scheme.lower() != b"http":
        raise HttpError(400, "Only http addresses can be asked for in this way; https goes through CONNECT.")
    end = next((place for place, byte in enumerate(rest) if byte in b"/?#"), len(rest))
    authority, path = rest[:end], rest[end:].split(b"#", 1)[0]
    try:
        target = parse_authority(authority.decode(), 80)
    except BadTarget as error:
        raise HttpError(400, f"The address cannot be used: {error}.") from None
    if not path.startswith(b"/"):
        path = b"*" if head.method == b"OPTIONS" and not path else b"/" + path
    name = str(target).encode()
    return target, name.removesuffix(b":80"), path


# -- fields ------------------------------------------------------------------------------------------------------------


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """The fields that are forwarded (RFC 9110 section 7.6.1)."""
    headers = list(headers)
    named = {
        option.strip().lower()
        for name, value in headers
        if name.lower() in (b"connection", b"proxy-connection")
        for option in value.split(b",")
    }
    gone = HOP_BY_HOP | (named - PROTECTED)
    return [(name, value) for name, value in headers if name.lower() not in gone]


def wants_upgrade(head: Head) -> bytes | None:
    """The protocols that a client would like to switch to (RFC 9110 section 7.8); None: it would not."""
    options = {option.strip().lower() for value in head.values(b"connection") for option in value.split(b",")}
    wanted = head.values(b"upgrade")
    return b", ".join(wanted) if wanted and b"upgrade" in options and head.version == b"1.1" else None


def with_via(headers: list[Header], version: bytes, pseudonym: bytes) -> list[Header]:
    """Add the Via field of this proxy (RFC 9110 section 7.6.3)."""
    return [*headers, (b"Via", version + b" " + pseudonym)]


def check_loop(head: Head, pseudonym: bytes) -> None:
    """Raise HttpError for a request that this proxy has forwarded before."""
    for value in head.values(b"via"):
        if any(hop.split()[1:2] == [pseudonym] for hop in value.split(b",")):
            raise HttpError(508, "The request has come back to this proxy.")


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
    return (user, password) if colon else None


CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="proxy", charset="UTF-8"')


def error_body(status: int, message: str) -> bytes:
    """The text of an answer of the proxy's own; it names nothing of the inside."""
    return f"{status} {HTTPStatus(status).phrase}\n\n{message}\n".encode()
