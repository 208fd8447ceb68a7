"""Heads of answers from origins (RFC 9112). No I/O.

Most answers are plain: one pattern reads them, and their fields go to the client as they came. Whatever is unusual in
any way is read by h11, more leniently, and written anew. Both ways give the same, which the tests check.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import h11

from gtcpserver.http1.head import TOKEN, Header, options_of

from .http_fields import HOP_BY_HOP, end_to_end
from .http_messages import written

#: Bytes of the head of an answer, including interim ones before it. nginx as a proxy accepts 4 or 8 KiB, haproxy 16,
#: curl 300.
LONGEST_ANSWER_HEAD = 64 * 1024

#: Fields of a head. haproxy, Envoy and Python's http.client accept 100. h11 takes 2 us for one, in which no other
#: client is served: 65,000 took 145 ms.
MOST_ANSWER_FIELDS = 256

# -- plain answers -----------------------------------------------------------------------------------------------------

_VALUE = rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?"
_PLAIN = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)\r(\n(?:" + TOKEN + rb": " + _VALUE + rb"\r\n)*)\r\n"
)

_THIS_HOP = b"|".join(re.escape(name) for name in sorted(HOP_BY_HOP))
#: From the end of the line before: a search for a character that begins it is five times as fast as one for ``^``.
_SPECIAL = re.compile(rb"\n(content-length|" + _THIS_HOP + rb"): ([^\r]*)\r", re.IGNORECASE)
_OF_THIS_HOP = re.compile(rb"\n(?:" + _THIS_HOP + rb"): [^\r]*\r(?=\n)", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,18}")

Framing = Literal["none", "length", "chunked", "close"]


@dataclass(slots=True)  # not frozen, which doubles the time to make one
class Answer:
    """The head of an answer.

    Attributes:
        version: b"1.1" or b"1.0".
        fields: for the client, as they are written, each with its line end.
        framing: how its body ends: there is none, it has a length, it comes in chunks, the connection closes.
        length: in bytes, if it has one.
        closes: the connection serves no other request.
        upgrade: what a 101 switches to: its fields Upgrade.
    """

    status: int
    reason: bytes
    version: bytes
    fields: bytes
    framing: Framing
    length: int
    closes: bool
    upgrade: tuple[Header, ...] = ()


def read_plain(head: bytes, method: bytes) -> Answer | None:
    """Return a final answer whose head is plain; None: h11 has to read it. 5 us."""
    found = _PLAIN.fullmatch(head)
    if found is None:
        return None
    digits, reason, fields = found.groups()
    status = int(digits)
    pairs = _SPECIAL.findall(fields)
    special = {name.lower(): value for name, value in pairs}
    twice = len(special) < len(pairs)
    length = special.pop(b"content-length", None)
    chunked = special.pop(b"transfer-encoding", None)
    option = special.pop(b"connection", b"keep-alive").lower()
    special.pop(b"keep-alive", None)
    if (
        special
        or twice
        or option not in (b"keep-alive", b"close")
        or (length is not None and (chunked is not None or status == 204 or _LENGTH.fullmatch(length) is None))
        or (chunked is not None and chunked.lower() != b"chunked")
    ):
        return None
    if len(pairs) > (length is not None):
        fields = _OF_THIS_HOP.sub(b"", fields)
    framing: Framing
    if method == b"HEAD" or status in (204, 304):
        framing = "none"
    else:
        framing = "chunked" if chunked is not None else "length" if length is not None else "close"
    size = int(length) if length is not None and framing == "length" else 0
    return Answer(status, reason, b"1.1", fields[1:], framing, size, framing == "close" or option == b"close")


# -- all others --------------------------------------------------------------------------------------------------------

_FOLD = re.compile(rb"\r?\n[ \t]+")
_TO_TIDY = (b"\n ", b"\n\t", b":  ", b": \t", b":\t")
_SPACES_BEFORE_COLON = re.compile(rb"^([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]+:", re.MULTILINE)
_IDENTITY = re.compile(rb"^transfer-encoding:[ \t]*identity[ \t]*\r?\n", re.MULTILINE | re.IGNORECASE)
_VERSION = re.compile(rb"http/(?:1\.[0-9]|[2-9](?:\.[0-9])?)(?= )", re.IGNORECASE)
_SPACES_BEFORE_VALUE = re.compile(rb"^([^:\n]*:)[ \t]+", re.MULTILINE)


class BadAnswer(Exception):
    """Not the head of an answer."""


class AnswerReader:
    """Reads the heads of the answers to one request, interim ones before the final one, by h11.

    Args:
        method: of the request.
        upgrade: the protocols that the request asks for; b"": none.
    """

    def __init__(self, method: bytes, upgrade: bytes = b"") -> None:
        self._method = method
        fields = [(b"Host", b"-")]
        if upgrade:
            fields += [(b"Connection", b"upgrade"), (b"Upgrade", upgrade)]
        self._request = h11.Request(method=method, target=b"/", headers=fields)
        self._reader = self._new_reader()

    def _new_reader(self) -> h11.Connection:
        # The bodies are ours, h11 never sees them.
        reader = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_ANSWER_HEAD)
        reader.send(self._request)
        return reader

    def read(self, head: bytes) -> Answer:
        """Read the next head.

        Raises:
            BadAnswer: it is none.
        """
        head = _tidied(head)
        try:
            event = self._parsed(head)
        except h11.RemoteProtocolError:
            self._reader = self._new_reader()
            try:
                event = self._parsed(_mended(head))
            except h11.RemoteProtocolError as error:
                raise BadAnswer(str(error)) from None
        return _answer_of(event, self._method)

    def _parsed(self, head: bytes) -> Any:
        self._reader.receive_data(head)
        return self._reader.next_event()


def _tidied(head: bytes) -> bytes:
    """Return a head without folded lines (RFC 9112 section 5.2), and with one space before each value.

    On a line that does not match, h11's pattern takes time quadratic in the spaces before the value: minutes, for as
    many as a head may have.
    """
    if not any(odd in head for odd in _TO_TIDY):
        return head
    line, end, fields = head.partition(b"\n")
    return line + end + _SPACES_BEFORE_VALUE.sub(rb"\1 ", _FOLD.sub(b" ", fields))


def _mended(head: bytes) -> bytes:
    """Return a tidied head that h11 has refused, without what other proxies accept.

    White space before a colon is removed (RFC 9112 section 5.1), and the transfer encoding "identity", which was none
    (RFC 2616 section 3.6). Scripts say "HTTP/2 200" of an answer whose server frames it as HTTP/1.1.
    """
    line, end, fields = head.partition(b"\n")
    version = _VERSION.match(line)
    if version is not None:
        line = (version[0].upper() if version[0][5:6] == b"1" else b"HTTP/1.1") + line[version.end() :]
    return line + end + _IDENTITY.sub(b"", _SPACES_BEFORE_COLON.sub(rb"\1:", fields))


def _answer_of(event: Any, method: bytes) -> Answer:
    status: int = event.status_code
    headers: Sequence[Header] = tuple(event.headers.raw_items())
    # h11 has validated these two: a length is one number, an encoding is "chunked".
    lengths = [value for name, value in event.headers if name == b"content-length"]
    is_chunked = any(name == b"transfer-encoding" for name, value in event.headers)
    framing: Framing
    if method == b"HEAD" or status < 200 or status in (204, 304):
        framing = "none"
    elif is_chunked:
        framing = "chunked"
    else:
        framing = "length" if lengths else "close"
    has_length = not (status < 200 or status == 204 or framing == "chunked")  # RFC 9110 section 8.6
    fields = [field for field in end_to_end(headers) if has_length or field[0].lower() != b"content-length"]
    # With a length beside chunks, somebody on the way may be splitting responses (RFC 9112 section 6.3): the chunks
    # count, and nothing that follows them.
    unclear = framing == "close" or (framing == "chunked" and bool(lengths))
    return Answer(
        status,
        event.reason,
        event.http_version,
        written(fields),
        framing,
        int(lengths[0]) if framing == "length" else 0,
        unclear or event.http_version == b"1.0" or b"close" in options_of(headers),
        tuple(field for field in headers if field[0].lower() == b"upgrade") if status == 101 else (),
    )
