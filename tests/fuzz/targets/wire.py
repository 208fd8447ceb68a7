"""Binary messages: PROXY headers and SOCKS."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from fuzz.engine import Target
from fuzz.targets.helpers import REFUSED, Choices, check_prefixes
from gtcpserver.errors import EarlyEOF, LimitExceeded
from gtcpserver.proxy import socks4, socks5
from gtcpserver.proxy.errors import ProtocolError, UpstreamError
from gtcpserver.proxy.sniff import sniff
from gtcpserver.proxy.target import make_target
from gtcpserver.proxy.upstream_url import parse_upstream
from gtcpserver.proxy_protocol.header import LONGEST_V2, ProxyHeader, ProxyProtocolError, Type, parse_header


def proxy_header(data: bytes) -> None:
    found = check_prefixes(parse_header, data, ProxyProtocolError)
    if found is None:
        assert len(data) < LONGEST_V2, "waits for more than a header can have"
        return
    if found is REFUSED:
        return
    header, size = found
    _ = header.alpn, header.authority, header.unique_id, header.netns
    if header.tls is not None:
        _ = header.tls.has_certificate, [header.tls.text(type) for type in Type]
        assert header.tls.to_tlv().value == next(tlv.value for tlv in header.tlvs if tlv.type == Type.SSL)
    if header.version == 1 and header.source is not None:
        _check_line(header, data[:size])
    for checksum in (False, True):
        try:
            written = header.to_bytes(checksum=checksum)
        except ValueError:
            assert size > LONGEST_V2 - 8, "what was read cannot be written"
            continue
        assert parse_header(written + data[size:]) == (header, len(written)), "written and read again it is another"


def _check_line(header: ProxyHeader, line: bytes) -> None:
    """inet_pton(3) reads the same addresses, and no space or digit is elsewhere."""
    _, kind, *words = line.removesuffix(b"\r\n").decode("ascii").split(" ")
    family = {"TCP4": socket.AF_INET, "TCP6": socket.AF_INET6}[kind]
    for (ip, port), text, number in zip((header.source, header.destination), words[:2], words[2:], strict=True):
        assert socket.inet_pton(family, text) == ip.packed
        assert number == str(port)


def socks(data: bytes) -> None:
    make_target.cache_clear()
    choices = Choices(data)
    kind = choices.number(4)
    message = choices.rest()
    with suppress(ProtocolError):
        named = sniff(message)
        assert named is not None or not message.strip(b"\r\n")
    if kind == 4:
        _check_datagram(message)
        return
    parse = [socks5.parse_greeting, socks5.parse_password, socks5.parse_request, socks4.parse_request][kind]
    found = check_prefixes(parse, message, ProtocolError)
    if found is None:
        assert len(message) < [257, 513, 262, 520][kind], "waits for more than a message can have"
    if found is None or found is REFUSED:
        return
    request, size = found
    if kind == 0:
        assert request == frozenset(message[2:size])
        assert size == 2 + message[1]
    elif kind == 1:
        assert socks5.password(request.user, request.password) == message[:size]
    elif kind == 2:
        if request.command is socks5.Command.CONNECT:
            written = socks5.connect_request(request.target)
            assert socks5.parse_request(written) == (request, len(written))
    else:
        port = struct.pack("!H", request.target.port)
        assert message[:4] == bytes((4, request.command)) + port
        ip = request.target.ip
        if request.is_4a:
            written = message[:4] + b"\0\0\0\1" + request.user + b"\0" + request.target.host.encode() + b"\0"
            assert isinstance(ip, IPv6Address) or socks4.parse_request(written) == (request, len(written))
        else:
            assert isinstance(ip, IPv4Address)
            assert message[:size] == message[:4] + ip.packed + request.user + b"\0"


def _check_datagram(packet: bytes) -> None:
    try:
        found = socks5.parse_datagram(packet)
    except ProtocolError:
        return
    if found is None:
        assert packet[2]
        return
    assert packet.endswith(found.data)
    if found.target.ip is not None:
        written = socks5.datagram(found.target.ip, found.target.port, found.data)
        assert socks5.parse_datagram(written) == found


class _Upstream:
    """What another proxy answers; reads never go beyond what it has sent."""

    def __init__(self, answers: bytes) -> None:
        self.answers = answers
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def recv_exactly(self, size: int) -> bytes:
        if len(self.answers) < size:
            raise EarlyEOF("", self.answers)
        taken, self.answers = self.answers[:size], self.answers[size:]
        return taken

    def recv_until(self, separator: bytes, limit: int) -> bytes:
        end = self.answers.find(separator) + len(separator)
        if end < len(separator):
            raise EarlyEOF("", self.answers) if len(self.answers) < limit else LimitExceeded("")
        return self.recv_exactly(end)


TUNNEL = b"TUNNEL"


def upstream_answers(data: bytes) -> None:
    choices = Choices(data)
    urls = ["socks5://u:p@h:1", "socks5://h:1", "http://h:1", "http://u:p@h:1", "socks4a://h:1"]
    url = urls[choices.number(4)]
    # What the destination sends comes right behind the proxy's answer: none of it may be taken for the answer.
    answers = choices.rest() + TUNNEL
    connection: Any = _Upstream(answers)
    try:
        parse_upstream("other", url)._ask(connection, make_target("example.com", 80))
    except (UpstreamError, EarlyEOF, LimitExceeded):
        return
    answer = answers[: len(answers) - len(connection.answers)]
    if url.startswith("http"):
        heads = answer.split(b"\r\n\r\n")
        assert heads[-1] == b""
        assert len(heads) <= 5
        assert heads[-2][9:10] == b"2"
        assert all(head[9:10] == b"1" for head in heads[:-2])
    elif url.startswith("socks4a"):
        assert (answer[:2], len(answer)) == (b"\0\x5a", 8)
    else:
        reply = answer[4:] if answer[:2] == b"\x05\x02" else answer[2:]
        size = {1: 4, 4: 16}.get(reply[3])
        assert reply[:2] == b"\x05\0"
        assert len(reply) == (7 + reply[4] if size is None else 6 + size)


TARGETS = [
    Target(
        "proxy_header",
        proxy_header,
        tokens=(
            *(
                b"PROXY ",
                b"TCP4 ",
                b"TCP6 ",
                b"UNKNOWN",
                b"\r\n",
                b" ",
                b"192.0.2.1",
                b"::1",
                b"::ffff:1.2.3.4",
                b"65535",
            ),
            *(
                b"\r\n\r\n\0\r\nQUIT\n",
                b"\x21\x11",
                b"\x21\x21",
                b"\x21\x31",
                b"\x20\x00",
                b"\0\x0c",
                b"\0\x24",
                b"\0\xd8",
            ),
            *(b"\x01\0\x02h2", b"\x02\0\x01a", b"\x03\0\x04\0\0\0\0", b"\x04\0\x01\0", b"\x05\0\x01u", b"\x30\0\x01n"),
            *(b"\x20\0\x05\x01\0\0\0\0", b"\x20\0\x0c\x07\0\0\0\0\x21\0\x04TLSv"),
        ),
        # A checksum is made byte by byte.
        lines=(20_000, 150),
    ),
    Target(
        "socks",
        socks,
        tokens=(
            *(b"\x05\x01\x00", b"\x05\x02\x00\x02", b"\x01\x03Ada\x02pw", b"\x05\x01\x00\x01", b"\x05\x01\x00\x03"),
            *(
                b"\x05\x01\x00\x04",
                b"\x05\x02\x00\x01",
                b"\x05\x03\x00\x01",
                b"\x7f\0\0\1\0\x50",
                b"\x09localhost\0\x50",
            ),
            *(
                b"\x04\x01\0\x50",
                b"\x04\x02\0\0",
                b"\0\0\0\1",
                b"me\0",
                b"localhost\0",
                b"\0\0\0",
                b"\0",
                b"127.1",
                b"::1",
            ),
            *(b"xn--", b"\xc3\xa4", b"0x7f.1", b"[::1]", b"a.b."),
        ),
    ),
    Target(
        "upstream_answers",
        upstream_answers,
        tokens=(
            *(
                b"\x05\x00",
                b"\x05\x02",
                b"\x01\x00",
                b"\x01\x01",
                b"\x05\x00\x00\x01\0\0\0\0\0\0",
                b"\x05\x00\x00\x03\x04",
            ),
            *(b"\x05\x00\x00\x04", b"\x05\x05\x00\x01", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 407 No\r\n", b"HTTP/1."),
            *(b"HTTP/1.1 100 Continue\r\n\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n", b" 200 ", b"\r\n"),
        ),
    ),
]
