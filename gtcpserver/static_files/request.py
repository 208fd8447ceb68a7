"""Parse requests (RFC 9112), and what they ask of a file (RFC 9110). No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import unquote_to_bytes

from gtcpserver.errors import GtcpServerError
from gtcpserver.http1.head import HttpError, check_head
from gtcpserver.plural import counted

#: A longer request line is answered with 414 (RFC 9112 section 3 recommends to support 8000 octets; nginx: 8 KiB).
LONGEST_TARGET = 8 * 1024

#: A longer head is answered with 431 (node.js: 16 KiB).
LONGEST_HEAD = 16 * 1024

END_OF_HEAD = b"\r\n\r\n"

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])"
# A field's value: visible characters, spaces, tabs and non-ASCII bytes (RFC 9110 section 5.5); no NUL, CR or LF.
# No space before the colon, no folded lines (RFC 9112 sections 5.1 and 5.2).
_FIELD = _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*"
# The head in one match, and then the fields that matter to this server: a browser's twelve take 3 us, one by one 10. A
# client may send empty lines before it (RFC 9112 section 2.2).
_HEAD = re.compile(rb"(?:\r\n)*" + _REQUEST_LINE + rb"((?:\r\n" + _FIELD + rb")*)")
_USED_FIELDS = re.compile(
    rb"\r\n(host|connection|content-length|transfer-encoding|range|if-[a-z-]+):[ \t]*([^\r]*)", re.IGNORECASE
)
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*([0-9]*)-([0-9]*)[ \t]*", re.IGNORECASE)


class BadRequest(GtcpServerError):
    """A request that cannot be served.

    Attributes:
        status: of the response, such as 400. Its reason is the message.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(slots=True)
class Request:
    """The head of one request.

    Attributes:
        method: "GET"; methods are case-sensitive.
        target: as received, visible ASCII: "/a%20b?c".
        fields: values by lower-case name, of the fields that matter here; repeated fields are joined by ", ".
        keep: the client may send another request on this connection.
        old: the client speaks HTTP/1.0, which has no chunks.
    """

    method: str
    target: str
    fields: Mapping[str, str]
    keep: bool
    old: bool = False

    @property
    def path(self) -> list[bytes]:
        """The decoded segments of the target's path: [b"a b"] for "/a%20b?c"; the last is b"" after a trailing slash.

        Raises:
            BadRequest: not a path, or one that no file can have or that leaves the directory.
        """
        target = self.target
        if target.startswith(("http://", "https://")):
            # absolute-form, which every server must accept (RFC 9112 section 3.2.2)
            target = "/" + target.split("/", 3)[3] if target.count("/") > 2 else "/"
        path = target.split("?", 1)[0].split("#", 1)[0]
        if not path.startswith("/"):
            raise BadRequest(400, "the request target must be a path")
        decoded = unquote_to_bytes(path) if "%" in path else path.encode()
        if b"\0" in decoded:
            raise BadRequest(400, "the path holds a NUL")
        segments = decoded.split(b"/")[1:]
        if b".." in segments:
            raise BadRequest(400, "the path leaves the directory")
        # Empty segments and "." mean nothing to the file system, but the last one says whether a directory was meant.
        inner = [segment for segment in segments[:-1] if segment not in (b"", b".")]
        return [*inner, b"" if segments[-1] == b"." else segments[-1]]


def parse_head(head: bytes) -> Request:
    """Parse a request's head, without the empty line that ends it.

    Raises:
        BadRequest: it is malformed; the start of the next request is then unknown.
    """
    match = _HEAD.fullmatch(head)
    if match is None:
        raise _what_is_wrong(head)
    method, target, major, minor, field_lines = match.groups()
    if major != b"1":
        raise BadRequest(505, "this server speaks HTTP/1.1 and HTTP/1.0")
    if len(target) > LONGEST_TARGET:
        raise BadRequest(414, f"the request target is longer than {LONGEST_TARGET} bytes")
    fields: dict[str, str] = {}
    hosts = 0
    for found, text in _USED_FIELDS.findall(field_lines):
        name = found.decode().lower()
        value = text.rstrip(b" \t").decode("latin-1")
        hosts += name == "host"
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    if hosts != 1 and (hosts or minor != b"0"):
        raise BadRequest(400, "there must be one Host header")  # RFC 9112 section 3.2
    if "transfer-encoding" in fields or "content-length" in fields:
        _check_framing(head[match.start(1) :])
    connection = fields.get("connection", "").lower()
    keep = "close" not in connection and (minor != b"0" or "keep-alive" in connection)
    # A body is not read, and neither are the first bytes of a CONNECT tunnel (RFC 9931). The next request could not be
    # found behind them, so this is the last one.
    if "transfer-encoding" in fields or fields.get("content-length", "0") != "0" or method == b"CONNECT":
        keep = False
    return Request(method.decode(), target.decode(), fields, keep, minor == b"0")


def _check_framing(head: bytes) -> None:
    # Few requests for files have a body, so these can be parsed again, by the rules of all servers here.
    try:
        check_head(head)
    except HttpError as error:
        raise BadRequest(error.status, str(error)) from None


def _what_is_wrong(head: bytes) -> BadRequest:
    line, *fields = re.sub(rb"^(?:\r\n)*", b"", head).split(b"\r\n")
    if re.fullmatch(_REQUEST_LINE, line) is not None:
        for number, field in enumerate(fields, 1):
            if re.fullmatch(_FIELD, field) is None:
                return BadRequest(400, f"header line {number} must be NAME: VALUE")
    return BadRequest(400, "the request line must be METHOD TARGET HTTP/1.1")


def wanted_range(fields: Mapping[str, str], size: int, etag: str, modified: int) -> tuple[int, int] | None:
    """Return the requested part of a file: (offset, count); None for all of it.

    One range is supported. Several, and anything not understood, are answered with the whole file, as is allowed (RFC
    9110 section 14.2).

    Raises:
        BadRequest: 416, it contains no byte of the file.
    """
    match = _RANGE.fullmatch(fields.get("range", ""))
    if match is None or match[1] == match[2] == "" or len(match[1]) > 20 or len(match[2]) > 20:
        return None
    condition = fields.get("if-range")
    # An entity tag, or a date that must be exactly the file's (RFC 9110 section 13.1.5).
    if condition is not None and condition != etag and _seconds(condition) != modified:
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        first, last = size - count, size - 1
    else:
        first = int(match[1])
        last = min(int(match[2]), size - 1) if match[2] else size - 1
        if match[2] and int(match[2]) < first:
            return None  # not a range
    if first > last:
        raise BadRequest(416, f"the file has {counted(size, 'byte')}")
    return first, last - first + 1


def is_unchanged(fields: Mapping[str, str], etag: str, modified: int) -> bool:
    """Return whether the client already has this version: 304 (RFC 9110 section 13.2.2).

    Raises:
        BadRequest: 412, the client only wants another version.
    """
    wanted = fields.get("if-match")
    if wanted is not None:
        if not _lists(wanted, etag, weak=False):
            raise BadRequest(412, "the file has changed")
    else:
        before = _seconds(fields.get("if-unmodified-since"))
        if before is not None and modified > before:
            raise BadRequest(412, "the file has changed")
    known = fields.get("if-none-match")
    if known is not None:
        return _lists(known, etag, weak=True)
    since = _seconds(fields.get("if-modified-since"))
    return since is not None and modified <= since


def _lists(condition: str, etag: str, weak: bool) -> bool:
    listed = (item.strip() for item in condition.split(","))
    return condition.strip() == "*" or any(item == etag or (weak and item == f"W/{etag}") for item in listed)


def _seconds(date: str | None) -> int | None:
    """Return an HTTP date as seconds since the epoch; None for an invalid one (which is then ignored)."""
    if not date or len(date) > 40:
        return None
    try:
        return int(parsedate_to_datetime(date).timestamp())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
