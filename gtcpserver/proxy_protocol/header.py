"""The PROXY protocol, versions 1 and 2: a load balancer's header before the client's own bytes. No I/O.

The source is haproxy's doc/proxy-protocol.txt; section numbers refer to it. A listener either expects the header or
does not: guessing would let every client choose its apparent address (section 2). For the same reason nothing here is
lenient: anything but an exact header is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, NamedTuple

from gtcpserver.errors import GtcpServerError

IPAddress = IPv4Address | IPv6Address

#: (address, port), or the path of a Unix socket: b"" if it has no name, beginning with NUL if it is abstract.
Endpoint = tuple[IPAddress, int] | bytes

_V1_BEGIN = b"PROXY "
_V2_BEGIN = b"\r\n\r\n\0\r\nQUIT\n"

#: Section 2.1: the longest possible line, including CRLF.
LONGEST_V1 = 107

#: The length field goes up to 65,535, which is never needed: addresses take at most 216 bytes, a client certificate
#: among the TLVs some 2 kB, and haproxy itself accepts no header longer than its buffer of 16 kB (tune.bufsize).
LONGEST_V2 = 16 * 1024

_UNIX_PATH = 108
LONGEST_UNIQUE_ID = 128


class ProxyProtocolError(GtcpServerError):
    r"""A connection does not begin with the required header; the message says what is wrong with it.

    Example::

        from gtcpserver.proxy_protocol import ProxyProtocolError, parse_header

        try:
            parse_header(b"GET / HTTP/1.1\r\n")
        except ProxyProtocolError as error:
            print(error)
    """


class Transport(IntEnum):
    """The kind of socket that the client uses.

    Example::

        from gtcpserver.proxy_protocol import Transport

        def handle(conn):
            header = conn.proxy_header
            if header is not None and header.transport is Transport.DATAGRAM:
                return  # its source may be forged
    """

    UNSPECIFIED = 0
    STREAM = 1
    DATAGRAM = 2


class Type(IntEnum):
    """Types of TLVs (sections 2.2.1 to 2.2.7); unknown ones are kept.

    Example::

        from gtcpserver.proxy_protocol import Type

        def handle(conn):
            for tlv in conn.proxy_header.tlvs:
                if tlv.type == Type.AUTHORITY:
                    conn.sendall(tlv.value)
    """

    ALPN = 0x01
    AUTHORITY = 0x02
    CRC32C = 0x03
    NOOP = 0x04
    UNIQUE_ID = 0x05
    SSL = 0x20
    SSL_VERSION = 0x21
    SSL_CN = 0x22
    SSL_CIPHER = 0x23
    SSL_SIG_ALG = 0x24
    SSL_KEY_ALG = 0x25
    SSL_GROUP = 0x26
    SSL_SIG_SCHEME = 0x27
    SSL_CLIENT_CERT = 0x28
    NETNS = 0x30


class TLV(NamedTuple):
    """A piece of further information: its type (a Type if it is a known one), and its value.

    Example::

        from gtcpserver.proxy_protocol import TLV, ProxyHeader, Type

        header = ProxyHeader(local=True, tlvs=(TLV(Type.UNIQUE_ID, b"4711"),))
        print(header.unique_id)  # b'4711'
    """

    type: int
    value: bytes


@dataclass(frozen=True, slots=True)
class TLS:
    """The client's TLS connection, as reported by the balancer.

    Attributes:
        client: bits: 1, the client speaks TLS; 2, it sent a certificate on this connection; 4, in this session.
        verify: 0 if the certificate was valid.
        tlvs: version, cipher and so on; see Type.

    Example::

        from gtcpserver.proxy_protocol import TLS, TLV, ProxyHeader, Type

        tls = TLS(client=1, verify=0, tlvs=(TLV(Type.SSL_VERSION, b"TLSv1.3"),))
        header = ProxyHeader(local=True, tlvs=(tls.to_tlv(),))
        print(header.tls.text(Type.SSL_VERSION))  # TLSv1.3
    """

    client: int
    verify: int
    tlvs: tuple[TLV, ...] = ()

    @property
    def has_certificate(self) -> bool:
        """Whether the client has sent a valid certificate."""
        return bool(self.client & 6) and self.verify == 0

    def text(self, type: Type) -> str | None:
        """Return the text of a TLV such as Type.SSL_VERSION or Type.SSL_CN; None if it is missing."""
        value = _find(self.tlvs, type)
        return None if value is None else value.decode("utf-8", "backslashreplace")

    def to_tlv(self) -> TLV:
        return TLV(Type.SSL, bytes((self.client,)) + self.verify.to_bytes(4, "big") + _tlv_bytes(self.tlvs))


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    r"""The origin of a connection.

    Attributes:
        source, destination: of the client's connection to the balancer. None: the balancer does not say (UNKNOWN,
            UNSPEC), or it connects on its own behalf (LOCAL, as for a health check): use the addresses of the
            connection itself.
        transport: of the client's connection.
        local: the balancer connects on its own behalf.
        version: of the protocol, 1 or 2.
        tlvs: further information, only in version 2; without checksum and padding.

    Example::

        from ipaddress import ip_address
        from gtcpserver.proxy_protocol import ProxyHeader

        client, balancer = (ip_address("192.0.2.7"), 40000), (ip_address("192.0.2.1"), 443)
        header = ProxyHeader(client, balancer, version=1)
        print(header.to_bytes())  # b'PROXY TCP4 192.0.2.7 192.0.2.1 40000 443\r\n'
    """

    source: Endpoint | None = None
    destination: Endpoint | None = None
    transport: Transport = Transport.STREAM
    local: bool = False
    version: Literal[1, 2] = 2
    tlvs: tuple[TLV, ...] = ()

    @property
    def alpn(self) -> bytes | None:
        """The protocol that client and balancer have negotiated by ALPN (RFC 7301)."""
        return _find(self.tlvs, Type.ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client asked for (the server name of its TLS connection)."""
        value = _find(self.tlvs, Type.AUTHORITY)
        return None if value is None else value.decode()

    @property
    def unique_id(self) -> bytes | None:
        """The balancer's ID of this connection in its own log."""
        return _find(self.tlvs, Type.UNIQUE_ID)

    @property
    def netns(self) -> str | None:
        """The network namespace that the client connected in."""
        value = _find(self.tlvs, Type.NETNS)
        return None if value is None else value.decode()

    @property
    def tls(self) -> TLS | None:
        """The client's TLS connection; None if it has none, or nothing is known about it."""
        value = _find(self.tlvs, Type.SSL)
        return None if value is None else _parse_tls(value)

    def to_bytes(self, *, checksum: bool = False) -> bytes:
        """Return the header, to be sent at once and before anything else.

        Version 1 only supports TCP addresses, and says UNKNOWN for others. TLVs require addresses and version 2.

        Args:
            checksum: add a CRC32c, in version 2.

        Raises:
            ValueError: the two endpoints are of different kinds, a port is invalid, or something is too long.
        """
        kind, addresses = _address_block(self.source, self.destination)
        if self.version == 1:
            return self._line()
        unspecified = self.local or not kind or self.transport is Transport.UNSPECIFIED
        head = bytes((0x20 if self.local else 0x21, 0 if unspecified else kind << 4 | self.transport))
        body = b"" if unspecified else addresses + _tlv_bytes(self.tlvs)
        if checksum and not unspecified:
            body += _tlv_bytes([TLV(Type.CRC32C, bytes(4))])
        if 16 + len(body) > LONGEST_V2:
            raise ValueError(f"a PROXY header must not be longer than {LONGEST_V2} bytes, got {16 + len(body)}")
        header = _V2_BEGIN + head + len(body).to_bytes(2, "big") + body
        if checksum and not unspecified:
            return header[:-4] + crc32c(header).to_bytes(4, "big")
        return header

    def _line(self) -> bytes:
        source, destination = self.source, self.destination
        if self.local or self.transport is not Transport.STREAM:
            return b"PROXY UNKNOWN\r\n"
        if not (isinstance(source, tuple) and isinstance(destination, tuple)):
            return b"PROXY UNKNOWN\r\n"
        (source_ip, source_port), (ip, port) = _one_family(source, destination)
        # Without a zone, which has no meaning on another host.
        addresses = f"{type(source_ip)(int(source_ip))} {type(ip)(int(ip))}"
        return f"PROXY TCP{ip.version} {addresses} {source_port} {port}\r\n".encode()


def parse_header(data: bytes) -> tuple[ProxyHeader, int] | None:
    r"""Parse a header of either version.

    Args:
        data: the bytes received so far, from the connection's first byte on. LONGEST_V2 bytes always suffice.

    Returns:
        The header and its size: the bytes behind it are the client's; None if more bytes are needed.

    Raises:
        ProxyProtocolError: it is not a header, nor the beginning of one.

    Example::

        from gtcpserver.proxy_protocol import parse_header

        data = b"PROXY TCP4 192.0.2.7 192.0.2.1 40000 443\r\nGET / HTTP/1.1\r\n"
        header, size = parse_header(data)
        print(header.source)  # (IPv4Address('192.0.2.7'), 40000)
        print(data[size:])  # b'GET / HTTP/1.1\r\n'
    """
    if data[:1] == b"P":
        return _parse_v1(data)
    if _V2_BEGIN.startswith(data[: len(_V2_BEGIN)]):
        return _parse_v2(data)
    raise ProxyProtocolError(f"the connection begins with {data[:12]!r}, and not with a PROXY header")


# -- version 1 ---------------------------------------------------------------------------------------------------------


def _parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    if not _V1_BEGIN.startswith(data[: len(_V1_BEGIN)]):
        raise ProxyProtocolError(f"the connection begins with {data[: len(_V1_BEGIN)]!r}, and not with a PROXY header")
    line = data[:LONGEST_V1]
    end = min((at for at in (line.find(b"\r"), line.find(b"\n")) if at >= 0), default=None)
    if end is None or end + 1 == LONGEST_V1:
        if len(line) == LONGEST_V1:
            raise ProxyProtocolError(f"a PROXY line ends within {LONGEST_V1} bytes, this one begins {line[:32]!r}")
        return None
    if line[end : end + 2] != b"\r\n":
        if line[end : end + 2] == b"\r":
            return None
        raise ProxyProtocolError("a PROXY line ends with CR LF, this one has one of them alone")
    return _parse_line(line[:end]), end + 2


def _parse_line(line: bytes) -> ProxyHeader:
    _, _, rest = line.partition(b" ")
    kind, _, rest = rest.partition(b" ")
    if kind == b"UNKNOWN":
        return ProxyHeader(transport=Transport.UNSPECIFIED, version=1)  # what follows must be ignored
    if kind not in (b"TCP4", b"TCP6"):
        raise ProxyProtocolError(f"TCP4, TCP6 or UNKNOWN expected in a PROXY line, got {kind!r}")
    words = rest.split(b" ")
    if len(words) != 4:
        raise ProxyProtocolError(f"two addresses and two ports expected behind {kind.decode()}, got {rest!r}")
    make = IPv4Address if kind == b"TCP4" else IPv6Address
    source, destination = (_parse_address(make, word) for word in words[:2])
    ports = [_parse_port(word) for word in words[2:]]
    return ProxyHeader((source, ports[0]), (destination, ports[1]), version=1)


def _parse_address(make: type[IPv4Address] | type[IPv6Address], word: bytes) -> IPAddress:
    try:
        if b"%" in word:  # a zone, which has no meaning on another host
            raise ValueError
        return make(word.decode("ascii"))
    except ValueError:
        raise ProxyProtocolError(f"an {make.__name__[:4]} address expected in a PROXY line, got {word!r}") from None


def _parse_port(word: bytes) -> int:
    if not (word.isdigit() and len(word) <= 5 and int(word) <= 65535) or (word[:1] == b"0" and word != b"0"):
        raise ProxyProtocolError(f"a port from 0 to 65535 expected in a PROXY line, got {word!r}")
    return int(word)


# -- version 2 ---------------------------------------------------------------------------------------------------------

_INET, _INET6, _UNIX = 1, 2, 3
_ADDRESS_BYTES = {_INET: 12, _INET6: 36, _UNIX: 2 * _UNIX_PATH}


def _parse_v2(data: bytes) -> tuple[ProxyHeader, int] | None:
    # Each field is checked as soon as it has arrived, so that an error is reported at the first wrong byte.
    if len(data) > 12:
        version, command = data[12] >> 4, data[12] & 15
        if version != 2:
            raise ProxyProtocolError(f"version 2 expected in a binary PROXY header, got {version}")
        if command > 1:
            raise ProxyProtocolError(f"the command LOCAL (0) or PROXY (1) expected in a PROXY header, got {command}")
    if len(data) > 13:
        family, transport = data[13] >> 4, data[13] & 15
        if family > _UNIX:
            raise ProxyProtocolError(f"an address family from 0 to 3 expected in a PROXY header, got {family}")
        if transport > Transport.DATAGRAM:
            raise ProxyProtocolError(f"a transport from 0 to 2 expected in a PROXY header, got {transport}")
    if len(data) < 16:
        return None
    end = 16 + int.from_bytes(data[14:16], "big")
    if end > LONGEST_V2:
        raise ProxyProtocolError(f"a PROXY header must not be longer than {LONGEST_V2} bytes, got one of {end}")
    local = not command
    # LOCAL: the rest must be ignored. UNSPEC: the receiver may ignore it, and does not know its meaning.
    unspecified = local or not family or not transport
    if not unspecified and end - 16 < _ADDRESS_BYTES[family]:
        raise ProxyProtocolError(
            f"{_ADDRESS_BYTES[family]} bytes of addresses expected in a PROXY header of family {family}, got {end - 16}"
        )
    if len(data) < end:
        return None
    if unspecified:
        return ProxyHeader(transport=Transport.UNSPECIFIED, local=local), end
    begin = 16 + _ADDRESS_BYTES[family]
    source, destination = _parse_addresses(family, data[16:begin])
    tlvs = _parse_tlvs(data[begin:end], "PROXY header")
    _check_tlvs(tlvs, data[:end], begin)
    tlvs = tuple(tlv for tlv in tlvs if tlv.type not in (Type.CRC32C, Type.NOOP))
    return ProxyHeader(source, destination, Transport(transport), tlvs=tlvs), end


def _parse_addresses(family: int, block: bytes) -> tuple[Endpoint, Endpoint]:
    if family == _UNIX:
        return _unix_name(block[:_UNIX_PATH]), _unix_name(block[_UNIX_PATH:])
    make = IPv4Address if family == _INET else IPv6Address
    size = 4 if family == _INET else 16
    ports = int.from_bytes(block[-4:-2], "big"), int.from_bytes(block[-2:], "big")
    return (make(block[:size]), ports[0]), (make(block[size : 2 * size]), ports[1])


def _unix_name(block: bytes) -> bytes:
    # An abstract name may contain NULs, a path ends at the first one (unix(7)).
    return block.rstrip(b"\0") if block[:1] == b"\0" else block.partition(b"\0")[0]


def _parse_tlvs(data: bytes, where: str) -> tuple[TLV, ...]:
    tlvs, at = [], 0
    while at < len(data):
        begin = at + 3
        end = begin + int.from_bytes(data[at + 1 : begin], "big")
        if begin > len(data) or end > len(data):
            raise ProxyProtocolError(f"a TLV of type {data[at]:#04x} goes beyond the end of the {where}")
        tlvs.append(TLV(data[at], data[begin:end]))
        at = end
    return tuple(tlvs)


def _check_tlvs(tlvs: tuple[TLV, ...], header: bytes, at: int) -> None:
    """Raise ProxyProtocolError for invalid TLVs; ``at``: where they begin in the header."""
    has_checksum = False
    for type, value in tlvs:
        if type == Type.CRC32C:
            if len(value) != 4 or has_checksum:
                raise ProxyProtocolError("one checksum of 4 bytes expected in a PROXY header")
            has_checksum = True
            # It was computed with zeros in its own place.
            computed = crc32c(header[: at + 3] + bytes(4) + header[at + 7 :])
            if computed != int.from_bytes(value, "big"):
                raise ProxyProtocolError(f"the checksum of a PROXY header is {value.hex()}, not {computed:08x}")
        elif type == Type.UNIQUE_ID and len(value) > LONGEST_UNIQUE_ID:
            raise ProxyProtocolError(f"a unique id has {LONGEST_UNIQUE_ID} bytes at most, got {len(value)}")
        elif type == Type.SSL:
            _parse_tls(value)
        elif type in (Type.AUTHORITY, Type.NETNS):
            try:
                value.decode("utf-8" if type == Type.AUTHORITY else "ascii")
            except UnicodeDecodeError:
                raise ProxyProtocolError(f"the {Type(type).name} of a PROXY header is no text: {value!r}") from None
        at += 3 + len(value)


def _parse_tls(value: bytes) -> TLS:
    if len(value) < 5:
        raise ProxyProtocolError(f"5 bytes or more expected in the TLV SSL of a PROXY header, got {len(value)}")
    return TLS(value[0], int.from_bytes(value[1:5], "big"), _parse_tlvs(value[5:], "TLV SSL"))


def _find(tlvs: tuple[TLV, ...], type: Type) -> bytes | None:
    return next((tlv.value for tlv in tlvs if tlv.type == type), None)


# -- writing -----------------------------------------------------------------------------------------------------------


def _tlv_bytes(tlvs: Iterable[TLV]) -> bytes:
    for type, value in tlvs:
        if len(value) > 0xFFFF:
            raise ValueError(f"a TLV has 65535 bytes at most, got {len(value)} for type {type:#04x}")
    return b"".join(bytes((type,)) + len(value).to_bytes(2, "big") + value for type, value in tlvs)


def _address_block(source: Endpoint | None, destination: Endpoint | None) -> tuple[int, bytes]:
    if source is None and destination is None:
        return 0, b""
    if isinstance(source, bytes) and isinstance(destination, bytes):
        for path in (source, destination):
            if len(path) > _UNIX_PATH:
                raise ValueError(f"a unix socket's name has {_UNIX_PATH} bytes at most, got {path!r}")
        return _UNIX, source.ljust(_UNIX_PATH, b"\0") + destination.ljust(_UNIX_PATH, b"\0")
    if isinstance(source, tuple) and isinstance(destination, tuple):
        (source_ip, source_port), (ip, port) = _one_family(source, destination)
        if not (0 <= source_port <= 65535 and 0 <= port <= 65535):
            raise ValueError(f"ports must be 0 to 65535, got {source_port} and {port}")
        ports = source_port.to_bytes(2, "big") + port.to_bytes(2, "big")
        return _INET if ip.version == 4 else _INET6, source_ip.packed + ip.packed + ports
    raise ValueError(f"source and destination must be of one kind, got {source!r} and {destination!r}")


def _one_family(
    source: tuple[IPAddress, int], destination: tuple[IPAddress, int]
) -> tuple[tuple[IPAddress, int], tuple[IPAddress, int]]:
    """Return both unchanged, or, if they differ, both as IPv6: a header has one address family."""
    if source[0].version == destination[0].version:
        return source, destination
    return (_mapped(source[0]), source[1]), (_mapped(destination[0]), destination[1])


def _mapped(ip: IPAddress) -> IPv6Address:
    return ip if isinstance(ip, IPv6Address) else IPv6Address(f"::ffff:{ip}")


# -- CRC32c (RFC 3309, RFC 3720 appendix B.4) --------------------------------------------------------------------------


def _crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # the Castagnoli polynomial, its bits reversed
    return value


_CRC_OF_BYTE = tuple(map(_crc_of_byte, range(256)))


def crc32c(data: bytes) -> int:
    """Return the checksum of version 2. (zlib.crc32 has another polynomial.)"""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_OF_BYTE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
