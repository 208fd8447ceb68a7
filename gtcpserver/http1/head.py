"""Heads of HTTP/1.1 requests (RFC 9110, RFC 9112), parsed strictly. No I/O.

A head that two implementations may parse differently is refused: that is how requests are smuggled past a proxy. The
proxy, the static file server, the WSGI adapter and the metrics port all work behind or in front of other HTTP servers,
so they parse heads by these rules, which are stricter than those of h11 and gevent.pywsgi.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gtcpserver.errors import GtcpServerError

Header = tuple[bytes, bytes]

END_OF_HEAD = b"\r\n\r\n"

#: The head of a message. node.js: 16 KiB, nginx: 8 KiB a line and 32 KiB in total, Apache: 100 fields of 8 KiB.
LONGEST_HEAD = 64 * 1024
LONGEST_TARGET = 16 * 1024
LONGEST_METHOD = 32  # the longest in the IANA registry has 17 characters: UPDATEREDIRECTREF
MOST_FIELDS = 128

#: Bytes of a head that is kept for the client's next request, while its connection is idle.
MOST_REMEMBERED = 8 * 1024

#: Empty lines before a request, of which a server should skip one (RFC 9112 section 2.2): some old clients send one
#: after a body. nginx and node.js skip any number.
MOST_EMPTY_LINES = 16

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_BARE_LF = re.compile(rb"(?<!\r)\n")
# The value with surrounding white space: a pattern that excludes it has many ways to divide a long run of spaces, and
# tries them all (60 kB of them took 15 s).
FIELD = re.compile(rb"(" + TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")


class HttpError(GtcpServerError):
    """A request that the server itself answers with an error; the message is for the person who reads it.

    Attributes:
        status: status code, such as 502.
        headers: more fields for the response.
        keep: another request may follow on the connection.
    """

    def __init__(self, status: int, message: str, headers: Sequence[Header] = (), *, keep: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.headers = tuple(headers)
        self.keep = keep


class Fields:
    """The header fields of a request. Those of a client's next request are often the same, byte by byte.

    Attributes:
        block: as received, from the first one on.
        headers: names as received, values without surrounding white space.
        is_plain: nothing in them has to be checked: one Host, and no body.
    """

    __slots__ = ("_options", "_values", "block", "headers", "is_plain")

    def __init__(self, block: bytes, headers: tuple[Header, ...]) -> None:
        self.block = block
        self.headers = headers
        values: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            values.setdefault(name.lower(), []).append(value)
        self._values = values
        self._options: set[bytes] | None = None
        has_body = b"content-length" in values or b"transfer-encoding" in values
        self.is_plain = not has_body and len(self.values(b"host")) == 1

    def values(self, name: bytes) -> list[bytes]:
        return self._values.get(name, [])

    @property
    def options(self) -> set[bytes]:
        """The lower-case options in the Connection fields (`options_of`)."""
        if self._options is None:
            self._options = options_of(self.headers)
        return self._options


@dataclass(slots=True)
class Head:
    """The head of a valid request.

    Attributes:
        raw: as received, with the empty line.
        method, target: from the request line.
        version: b"1.1" or b"1.0". A higher minor version is treated as 1.1 (RFC 9110 section 6.2).
        fields: its header fields.
    """

    raw: bytes
    method: bytes
    target: bytes
    version: bytes
    fields: Fields = field(compare=False)

    @property
    def headers(self) -> tuple[Header, ...]:
        """The header fields: names as received, values without surrounding white space."""
        return self.fields.headers

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a field, by its lower-case name."""
        return self.fields.values(name)

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return bool(self.values(b"transfer-encoding"))

    @property
    def length(self) -> int:
        """Content-Length; 0 if there is none."""
        lengths = self.values(b"content-length")
        return int(lengths[0]) if lengths else 0

    @property
    def has_body(self) -> bool:
        """Whether a body follows the head."""
        return not self.fields.is_plain and (self.length > 0 or self.is_chunked)

    @property
    def wants_close(self) -> bool:
        """Whether no request follows. HTTP/1.0 clients get no persistent connection (RFC 9112 appendix C.2.2)."""
        return self.version == b"1.0" or b"close" in self.fields.options


def size_of_empty_lines(data: bytes) -> int:
    """Return how many bytes of empty lines `data` begins with."""
    found = _EMPTY_LINES.match(data)
    return 0 if found is None else found.end()


def find_end_of_head(data: bytes | bytearray, searched: int = 0) -> int | None:
    """Return where a head ends, after its empty line; None if that has not arrived.

    Args:
        data: the head from its first byte on.
        searched: number of bytes that were searched before.

    Raises:
        HttpError: it is too long, or can never end.
    """
    end = data.find(END_OF_HEAD, max(0, searched - len(END_OF_HEAD)))
    if 0 <= end <= LONGEST_HEAD:
        return end + len(END_OF_HEAD)
    if len(data) > LONGEST_TARGET and data.find(b"\n", 0, LONGEST_TARGET + 64) < 0:
        raise HttpError(414, f"The request line is longer than {LONGEST_TARGET} bytes.")
    if len(data) > LONGEST_HEAD:
        raise HttpError(431, f"The head of the request is longer than {LONGEST_HEAD} bytes.")
    if _BARE_LF.search(data, max(0, searched - 1)):
        raise HttpError(400, "Lines must end with CR LF.")
    return None


def check_head(raw: bytes, before: Head | None = None) -> Head:
    """Parse the head of a request.

    Args:
        before: `remembered`, of the same client: if its fields are the same, they are not parsed again.

    Raises:
        HttpError: it violates a rule, or could be parsed in more than one way.
    """
    text, found, block = raw.removesuffix(END_OF_HEAD).partition(b"\r\n")
    line = _REQUEST_LINE.fullmatch(text)
    if line is None:
        raise HttpError(400, "The request line must be: METHOD TARGET HTTP/1.1")
    method, target, major, minor = line.groups()
    if major != b"1":
        raise HttpError(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if len(method) > LONGEST_METHOD:  # RFC 9112 section 3
        raise HttpError(501, f"A method longer than {LONGEST_METHOD} characters is not known.")
    if len(target) > LONGEST_TARGET:
        raise HttpError(414, f"The request target is longer than {LONGEST_TARGET} bytes.")
    if before is not None and found and before.fields.block == block != b"":
        fields = before.fields
    else:
        fields = Fields(block, _parse_fields(block) if found else ())
    head = Head(raw, method, target, b"1.0" if minor == b"0" else b"1.1", fields)
    if not fields.is_plain:
        _check_framing(head)
    return head


def remembered(head: Head) -> Head | None:
    """Return a head if it is small enough to be kept for the next request."""
    return head if len(head.raw) <= MOST_REMEMBERED else None


def _parse_fields(block: bytes) -> tuple[Header, ...]:
    lines = block.split(b"\r\n")
    if len(lines) > MOST_FIELDS:
        raise HttpError(431, f"The request has more than {MOST_FIELDS} header fields.")
    headers = []
    for number, text in enumerate(lines, 1):
        # No folded lines, no space before the colon, no bare CR or LF, no NUL (RFC 9112 sections 2.2, 5.1, 5.2).
        found = FIELD.fullmatch(text)
        if found is None:
            raise HttpError(400, f"Header line {number} must be: Name: value")
        headers.append((found[1], found[2].strip(b" \t")))
    return tuple(headers)


def _check_framing(head: Head) -> None:
    lengths, encodings = head.values(b"content-length"), head.values(b"transfer-encoding")
    if encodings:
        # RFC 9112 section 6.3: with both, the sender may be smuggling. HTTP/1.0 does not have it at all.
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
    if head.version == b"1.1" and not head.values(b"host"):  # RFC 9112 section 3.2
        raise HttpError(400, "A request needs a Host field.")
    if head.method in (b"CONNECT", b"TRACE") and head.has_body:
        # RFC 9110 sections 9.3.6 and 9.3.8. One reader would take the bytes for the body, another for the tunnel's.
        raise HttpError(400, f"{head.method.decode()} cannot have a body.")


def options_of(headers: Sequence[Header]) -> set[bytes]:
    """Return the lower-case options in the Connection fields. Old clients use Proxy-Connection."""
    return {
        option.strip(b" \t").lower()
        for name, value in headers
        if name.lower() in (b"connection", b"proxy-connection")
        for option in value.split(b",")
    }
