"""DNS messages (RFC 1035): the question for a name's addresses, and what an answer says about them. No I/O.

The owner of a domain writes most of the answers about it, so the reader is strict and cheap: it reads the records that
matter (addresses, aliases, the SOA of a negative answer), skips others unread, and follows few pointers. An answer of
4 KiB, as hostile as can be, takes 5 ms of CPU, in which no other client is served; dnspython's reader takes 1 s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from gtcpserver.errors import GtcpServerError

from .target import IPAddress

RecordType = Literal["A", "AAAA"]

_TYPES: dict[RecordType, int] = {"A": 1, "AAAA": 28}
_CNAME = 5
_SOA = 6
_IN = 1

#: Bytes of an answer: 250 addresses, of which eight are used. Without EDNS, those of UDP have up to 512 (RFC 1035
#: section 2.3.4).
LARGEST_ANSWER = 4096

#: Aliases from a name to its addresses, as in dnspython; unbound follows 11, BIND 16.
MOST_ALIASES = 16

#: Pointers in one name, as in Go's golang.org/x/net/dns/dnsmessage.
MOST_POINTERS = 10

LONGEST_NAME = 255  # bytes, RFC 1035 section 2.3.4

NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)

#: Response codes with which servers may leave the question out.
_WITHOUT_QUESTION = frozenset((FORMERR, SERVFAIL, NOTIMP, REFUSED))

_HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")  # type, class, TTL, length of the data
_QR, _OPCODE, _TC, _RD = 0x8000, 0x7800, 0x0200, 0x0100


class BadMessage(GtcpServerError):
    """Bytes that are no valid answer to the question."""


class OtherMessage(BadMessage):
    """A message that is not about our question: a late answer to another one, or a guess."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a name server says about the addresses of a name.

    Attributes:
        code: the response code (RCODE).
        found: the addresses.
        ttl: seconds for which the answer holds: the shortest of its records. Of a negative one: by its SOA (RFC 2308
            section 5); None: it has none, and must not be kept.
        truncated: it did not fit; ask again over TCP.
    """

    code: int
    found: tuple[IPAddress, ...] = ()
    ttl: int | None = None
    truncated: bool = False


def question(name: str, kind: RecordType, number: int) -> bytes:
    """Return the message that asks for addresses of a name.

    Args:
        name: in lower case ASCII, without its final dot.
        number: the ID: 16 bits that an attacker cannot guess.
    """
    labels = b"".join(b"%c%b" % (len(label), label) for label in name.encode().split(b"."))
    return _HEADER.pack(number, _RD, 1, 0, 0, 0) + labels + struct.pack("!xHH", _TYPES[kind], _IN)


def read_reply(asked: bytes, data: bytes) -> Reply:
    """Read the answer to a question.

    Args:
        asked: the question, as from `question`.
        data: a message from the server's address.

    Raises:
        OtherMessage: it is about another question.
        BadMessage: it is malformed, or too long.
    """
    if len(data) > LARGEST_ANSWER:
        raise BadMessage(f"answer of more than {LARGEST_ANSWER} bytes")
    try:
        return _read(asked, data)
    except (IndexError, struct.error):
        raise (OtherMessage if data[:2] != asked[:2] else BadMessage)("answer cut short") from None


def _read(asked: bytes, data: bytes) -> Reply:
    number, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if data[:2] != asked[:2] or not flags & _QR or flags & _OPCODE:
        raise OtherMessage(f"not the answer to our question: ID {number}, flags {flags:#06x}")
    code = flags & 0xF
    if not questions and code in _WITHOUT_QUESTION:
        return Reply(code)
    end = len(asked)
    # Names are compared without case (RFC 4343); the type and the class have no letters.
    if questions != 1 or data[_HEADER.size : end].lower() != asked[_HEADER.size :]:
        raise OtherMessage("the answer is about another question")
    if flags & _TC:
        return Reply(code, truncated=True)
    if code not in (NOERROR, NXDOMAIN):
        return Reply(code)
    kind = int.from_bytes(asked[-4:-2], "big")
    reader = _Reader(data)
    name, found, ttl, end = _follow(reader, asked[_HEADER.size : -4], kind, answers, end)
    if found and code == NOERROR:
        return Reply(code, found, ttl)
    # That an alias has no address holds no longer than the alias.
    negative = _negative_ttl(reader, name, authorities, end)
    return Reply(code, (), negative if negative is None or ttl is None else min(negative, ttl))


def _follow(
    reader: _Reader, name: bytes, kind: int, records: int, at: int
) -> tuple[bytes, tuple[IPAddress, ...], int | None, int]:
    """Return the last alias of a name, its addresses, the shortest TTL on the way, and where the section ends."""
    aliases: dict[bytes, tuple[bytes, int]] = {}
    addresses: dict[bytes, list[tuple[IPAddress, int]]] = {}
    for _ in range(records):
        owner = at
        at, type_, ttl, start = reader.record(at)
        if type_ == kind:
            ip = _address(kind, reader.data[start:at])
            addresses.setdefault(reader.name(owner), []).append((ip, ttl))
        elif type_ == _CNAME:
            if len(aliases) >= MOST_ALIASES:
                raise BadMessage(f"more than {MOST_ALIASES} aliases")
            aliases.setdefault(reader.name(owner), (reader.name(start), ttl))
    shortest = None
    for _ in range(MOST_ALIASES + 1):
        if name in addresses:
            found = addresses[name]
            ttl = min(ttl for _, ttl in found)
            return name, tuple(ip for ip, _ in found), ttl if shortest is None else min(ttl, shortest), at
        if name not in aliases:
            return name, (), shortest, at
        name, ttl = aliases[name]
        shortest = ttl if shortest is None else min(shortest, ttl)
    raise BadMessage("aliases in a circle")


def _negative_ttl(reader: _Reader, name: bytes, records: int, at: int) -> int | None:
    """Return the seconds for which a negative answer holds (RFC 2308 section 5); None: it has no SOA of the zone."""
    for _ in range(records):
        owner = at
        at, type_, ttl, start = reader.record(at)
        if type_ == _SOA:
            zone, length = reader.name(owner), at - start
            if length < 22 or not (name == zone or name.endswith(zone)):  # two names, and five numbers of 32 bits
                return None
            return min(ttl, int.from_bytes(reader.data[at - 4 : at], "big"))
    return None


def _address(kind: int, data: bytes) -> IPAddress:
    if len(data) != (4 if kind == _TYPES["A"] else 16):
        raise BadMessage(f"address of {len(data)} bytes")
    return IPv4Address(data) if len(data) == 4 else IPv6Address(data)


class _Reader:
    """Reads records and names of a message. Names are what they are on the wire, without pointers, in lower case."""

    __slots__ = ("_known", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._known: dict[int, bytes] = {}  # names by where they begin

    def record(self, at: int) -> tuple[int, int, int, int]:
        """Return where a record ends, its type (0: of another class than IN), its TTL, and where its data begins."""
        data = self.data
        while 0 < (length := data[at]) < 0xC0:
            if length > 63:
                raise BadMessage("label of an unknown type")
            at += 1 + length
        at += 1 if length == 0 else 2
        type_, class_, ttl, size = _RECORD.unpack_from(data, at)
        start = at + _RECORD.size
        if start + size > len(data):
            raise BadMessage("record cut short")
        # RFC 2181 section 8: a TTL with its first bit set is 0.
        return start + size, type_ if class_ == _IN else 0, 0 if ttl >> 31 else ttl, start

    def name(self, at: int) -> bytes:
        """Return the name at a place."""
        data, size, pointers = self.data, 0, 0
        parts: list[bytes] = []
        whole = lowest = at
        while True:
            length = data[at]
            if length >= 0xC0:
                at = (length & 0x3F) << 8 | data[at + 1]
                pointers += 1
                # To an earlier name (RFC 1035 section 4.1.4), so that no circle is possible.
                if at >= lowest or pointers > MOST_POINTERS:
                    raise BadMessage("pointer that leads forward, or too many of them")
                lowest = at
                if not parts:  # the usual case: the name is that of an earlier record
                    whole = at
                    if at in self._known:
                        return self._known[at]
                continue
            if length > 63:
                raise BadMessage("label of an unknown type")
            size += 1 + length
            if size > LONGEST_NAME:
                raise BadMessage("name too long")
            parts.append(data[at : at + 1 + length])
            at += 1 + length
            if length == 0:
                break
        name = self._known[whole] = b"".join(parts).lower()
        return name
