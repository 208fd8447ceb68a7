"""The name of the destination in a client's first bytes: in TLS the server name, in HTTP the Host field. No I/O.

The client is not the one who asks the proxy, and anything may arrive: what does not name exactly one host, by the
letter of the RFCs, names none. That is no error: the connection then has its address alone, as those of most protocols.
"""

from __future__ import annotations

import re

from gtcpserver.http1.head import HttpError, check_head, find_end_of_head

from .errors import BadTarget
from .target import canonical_name, parse_address, parse_authority

#: Bytes that may name the destination: a whole TLS record. A ClientHello of browsers has 2 KiB, with post-quantum keys;
#: nginx reads 16 KiB (preread_buffer_size, and as much of an HTTP head in its default of large_client_header_buffers).
LONGEST = 16 * 1024

#: Records that one ClientHello may come in (RFC 8446 section 5.1): programs against censors use up to ten. Each piece
#: that arrives costs a look at all of them.
MOST_RECORDS = 16

HANDSHAKE = 22  # RFC 8446 section 5.1
CLIENT_HELLO = 1  # section 4
SERVER_NAME = 0  # RFC 6066 section 3: the extension, and in it the type of a host name
HOST_NAME = 0

_RECORD_HEADER = 5
_LONGEST_RECORD = 1 << 14

# A request in origin form (RFC 9112 section 3.2.1) or with "*". A proxy's own forms name two hosts. The beginning of
# other protocols ("SSH-2.0-", "*3\r\n$3\r\nSET") is told from it early: their clients wait for an answer.
_REQUEST_LINE = re.compile(rb"[A-Z][A-Z-]{0,19} [/*][\x21-\x7e]* HTTP/1\.[01]\r\n")
_METHOD = re.compile(rb"[A-Z][A-Z-]{0,19} [/*]")
_BEGINS_A_METHOD = re.compile(rb"[A-Z][A-Z-]{0,19} ?")
_IN_A_LINE = re.compile(rb"[\x20-\x7e]*\r?")


class NameReader:
    """Finds the name in what a client sends, in whatever pieces it arrives.

    Attributes:
        data: all bytes so far.
    """

    def __init__(self) -> None:
        self.data = b""
        self._has_method = self._is_http = False

    def add(self, more: bytes) -> str | None:
        """Look at the next bytes.

        Returns:
            The name, in lower case ASCII and without a final dot; "": there is none. None: more bytes may name it.
        """
        searched = len(self.data)
        self.data = data = self.data + more
        if data[:1] == b"\x16":
            found = _name_in_records(data)
        else:
            found = self._name_in_request(searched, more)
        return "" if found is None and len(data) >= LONGEST else found

    def _name_in_request(self, searched: int, more: bytes) -> str | None:
        # Hostile clients send single bytes: each piece costs its own size.
        data = self.data
        if not self._is_http:
            if data.find(b"\r\n", max(0, searched - 1)) < 0:
                if not self._has_method:
                    self._has_method, more = _METHOD.match(data) is not None, data
                is_plausible = (_IN_A_LINE if self._has_method else _BEGINS_A_METHOD).fullmatch(more)
                return None if is_plausible else ""
            if _REQUEST_LINE.match(data) is None:
                return ""
            self._is_http, searched = True, 0
        try:
            end = find_end_of_head(data, searched)
            if end is None:
                return None
            hosts = check_head(data[:end]).values(b"host")
        except HttpError:
            return ""
        if not hosts or not hosts[0].isascii():
            return ""
        try:
            return parse_authority(hosts[0].decode(), 80).name or ""
        except BadTarget:
            return ""


def _name_in_records(data: bytes) -> str | None:
    """As `NameReader.add`, of TLS records (RFC 8446 section 5.1; those of TLS 1.0 to 1.2 have the same form)."""
    message = b""
    place = 0
    for _ in range(MOST_RECORDS):
        header = data[place : place + _RECORD_HEADER]
        if len(header) < _RECORD_HEADER:
            return None if header[:2] in (b"", b"\x16", b"\x16\x03") else ""
        length = int.from_bytes(header[3:], "big")
        if header[0] != HANDSHAKE or header[1] != 3 or not 0 < length <= _LONGEST_RECORD:
            return ""
        place += _RECORD_HEADER
        message += data[place : place + length]
        if message[:1] not in (b"", b"\x01"):
            return ""
        if len(message) >= 4:
            size = int.from_bytes(message[1:4], "big")
            if size > LONGEST:
                return ""
            if len(message) >= 4 + size:
                return name_in_hello(message[4 : 4 + size])
        place += length
        if place > len(data):
            return None
    return ""


def name_in_hello(body: bytes) -> str:
    """Return the server name in a ClientHello without its handshake header (RFC 8446 section 4.1.2); "" for none."""
    try:
        return _name_in_hello(_Fields(body))
    except _Malformed:
        return ""


class _Malformed(Exception):
    """A length that does not fit, or what the RFCs forbid."""


class _Fields:
    """Fixed and variable-length vectors (RFC 8446 section 3.4), from the left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def __bool__(self) -> bool:
        return self._place < len(self._data)

    def take(self, size: int) -> bytes:
        found = self._data[self._place : self._place + size]
        if len(found) < size:
            raise _Malformed
        self._place += size
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size_of_length: int, least: int = 0, most: int = 1 << 16) -> bytes:
        size = self.number(size_of_length)
        if not least <= size <= most:
            raise _Malformed
        return self.take(size)


def _name_in_hello(hello: _Fields) -> str:
    hello.take(2 + 32)  # version, random
    hello.vector(1, most=32)  # session id
    if len(hello.vector(2, least=2)) % 2:  # cipher suites
        raise _Malformed
    hello.vector(1, least=1)  # compression methods
    if not hello:  # TLS 1.2 may have no extensions (RFC 5246 section 7.4.1.2)
        return ""
    extensions = _Fields(hello.vector(2))
    if hello:
        raise _Malformed
    found: dict[int, bytes] = {}
    while extensions:
        kind, data = extensions.number(2), extensions.vector(2)
        if kind in found:  # RFC 8446 section 4.2
            raise _Malformed
        found[kind] = data
    return _host_name(_Fields(found[SERVER_NAME])) if SERVER_NAME in found else ""


def _host_name(extension: _Fields) -> str:
    entries = _Fields(extension.vector(2, least=1))
    # One host name; no other type was ever defined (RFC 6066 section 3, RFC 8446 section 4.2).
    if extension or entries.number(1) != HOST_NAME:
        raise _Malformed
    name = entries.vector(2, least=1)
    if entries or not name.isascii():
        raise _Malformed
    try:
        return "" if parse_address(name.decode()) is not None else canonical_name(name.decode())
    except BadTarget:
        return ""
