"""SOCKS messages: fields and not packets, the replies that the RFCs want, and nothing but our errors."""

import errno
import os
import socket
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.proxy import socks4, socks5
from gtcpserver.proxy.errors import TTL_EXPIRED, ProtocolError
from gtcpserver.proxy.sniff import sniff
from gtcpserver.proxy.socks5 import Command, Method, Reply

PARSERS = [socks5.parse_greeting, socks5.parse_password, socks5.parse_request, socks4.parse_request]
LONGEST = {socks5.parse_greeting: 257, socks5.parse_password: 513, socks5.parse_request: 262, socks4.parse_request: 520}


def error(parse, data):
    with pytest.raises(ProtocolError) as raised:
        parse(data)
    return raised.value


def test_requirement_01_messages_are_read_by_field_whatever_the_pieces():
    whole = b"\x05\x02\x00\x02" + b"\x01\x03Ada\x02pw" + b"\x05\x01\x00\x03\x0bexample.com\x01\xbbearly bytes"
    parts, rest = [], whole
    for parse in PARSERS[:3]:
        for end in range(len(rest) + 1):
            found = parse(rest[:end])
            if found is not None:
                break
        message, size = found
        assert size == end
        assert parse(rest) == found  # what comes behind changes nothing
        parts.append(message)
        rest = rest[size:]
    assert parts[0] == {Method.NONE, Method.PASSWORD}
    assert (parts[1].user, parts[1].password) == (b"Ada", b"pw")
    assert (parts[2].command, str(parts[2].target)) == (Command.CONNECT, "example.com:443")
    assert rest == b"early bytes"


def test_requirement_02_lengths_of_0_and_255():
    assert error(socks5.parse_greeting, b"\x05\x00").reply == b"\x05\xff"
    assert error(socks5.parse_password, b"\x01\x00\x01p").reply == b"\x01\x01"
    assert error(socks5.parse_password, b"\x01\x01u\x00").reply == b"\x01\x01"
    longest = b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255
    assert socks5.parse_password(longest) == (socks5.Credentials(b"u" * 255, b"p" * 255), 513)
    assert error(socks5.parse_request, b"\x05\x01\x00\x03\x00\x00\x50").reply[1] == Reply.GENERAL_FAILURE
    assert error(socks5.parse_request, b"\x05\x01\x00\x03\xff" + b"n" * 255 + b"\0P").reply[1] == Reply.GENERAL_FAILURE
    name = b".".join([b"n" * 49] * 5)
    assert (
        socks5.parse_request(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + b"\0P")[0].target.host == name.decode()
    )


def test_requirements_03_and_04_answers_during_authentication():
    assert socks5.choose(Method.NOT_ACCEPTABLE) == b"\x05\xff"
    assert socks5.choose(Method.PASSWORD) == b"\x05\x02"
    assert socks5.authentication_answer(True) == b"\x01\x00"
    assert socks5.authentication_answer(False)[0] == 1
    assert error(socks5.parse_password, b"\x05\x01u\x01p").reply == b"\x01\x01"


def test_requirement_06_unknown_commands_and_address_types_get_a_whole_reply():
    unknown_command = error(socks5.parse_request, b"\x05\x09\x00\x01\x08\x08\x08\x08\x00\x50")
    assert unknown_command.reply == b"\x05\x07\x00\x01" + bytes(6)
    assert error(socks5.parse_request, b"\x05\x01\x00\x09").reply == b"\x05\x08\x00\x01" + bytes(6)
    assert error(socks5.parse_request, b"\x05\x01\x01\x01").reply[1] == Reply.GENERAL_FAILURE


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), Reply.CONNECTION_REFUSED),
        (OSError(errno.EHOSTUNREACH, ""), Reply.HOST_UNREACHABLE),
        (OSError(errno.ENETUNREACH, ""), Reply.NETWORK_UNREACHABLE),
        (socket.gaierror(socket.EAI_NONAME, ""), Reply.HOST_UNREACHABLE),
        (OSError(TTL_EXPIRED, ""), Reply.TTL_EXPIRED),
        (TimeoutError("not connected"), Reply.HOST_UNREACHABLE),
        (TimeoutError(errno.ETIMEDOUT, ""), Reply.HOST_UNREACHABLE),
        (PermissionError(errno.EPERM, ""), Reply.NOT_ALLOWED),
        (OSError(errno.EMFILE, ""), Reply.GENERAL_FAILURE),
        (OSError("no number"), Reply.GENERAL_FAILURE),
    ],
)
def test_requirement_07_errors_have_their_own_replies(failure, code):
    assert socks5.reply_of(failure) is code


def test_requirement_08_the_bound_address_is_told_or_not():
    assert socks5.reply(Reply.SUCCEEDED, (ip_address("192.0.2.1"), 8080)) == b"\x05\0\0\x01\xc0\0\x02\x01\x1f\x90"
    assert socks5.reply(Reply.SUCCEEDED, (ip_address("::1"), 80))[3:] == b"\x04" + bytes(15) + b"\x01\0P"
    assert socks5.reply(Reply.SUCCEEDED) == b"\x05\0\0\x01" + bytes(6)


def test_requirement_09_socks4_is_bounded_and_its_replies_begin_with_0():
    assert socks4.reply(socks4.Reply.GRANTED, (ip_address("192.0.2.1"), 80)) == b"\0\x5a\0P\xc0\0\x02\x01"
    assert socks4.reply(socks4.Reply.REJECTED) == b"\0\x5b" + bytes(6)
    head = b"\x04\x01\0P\x08\x08\x08\x08"
    assert socks4.parse_request(head + b"u" * 255 + b"\0")[1] == 264
    assert socks4.parse_request(head + b"u" * 255) is None
    assert error(socks4.parse_request, head + b"u" * 256).reply[1] == socks4.Reply.REJECTED
    assert error(socks4.parse_request, b"\x04\x01\0P\0\0\0\x01\0" + b"n" * 256).reply[1] == socks4.Reply.REJECTED


def test_requirement_10_the_mark_of_socks4a():
    request, size = socks4.parse_request(b"\x04\x01\x00\x50\0\0\0\x07Ada\0example.com\0rest")
    assert (str(request.target), request.user, request.is_4a, size) == ("example.com:80", b"Ada", True, 24)
    request, _ = socks4.parse_request(b"\x04\x01\x00\x50\0\0\0\x01\x00127.0.0.1\0")
    assert request.target.ip == ip_address("127.0.0.1")
    request, size = socks4.parse_request(b"\x04\x02\x00\x50\0\0\0\0\0name\0")
    assert (request.is_4a, request.target.host, size) == (False, "0.0.0.0", 9)


@pytest.mark.parametrize("text", [b"127.0.0.1", b"::1", b"[::1]", b"0x7f.1", b"2130706433", b"::ffff:127.0.0.1"])
def test_requirement_11_names_that_are_addresses_are_addresses(text):
    request, _ = socks5.parse_request(b"\x05\x01\x00\x03" + bytes([len(text)]) + text + b"\0P")
    assert request.target.ip.is_loopback


def test_requirement_13_datagrams():
    packet = b"\0\0\0\x01\x08\x08\x08\x08\0\x35question"
    found = socks5.parse_datagram(packet)
    assert (str(found.target), found.data) == ("8.8.8.8:53", b"question")
    assert socks5.parse_datagram(b"\0\0\x01" + packet[3:]) is None  # a fragment
    assert socks5.datagram(ip_address("8.8.8.8"), 53, b"question") == packet
    for bad in (b"", b"\0\0\0", b"\x01" + packet[1:], packet[:9], b"\0\0\0\x09" + packet[4:], b"\0\0\0\x03\0\0\x35x"):
        with pytest.raises(ProtocolError):
            socks5.parse_datagram(bad)


def test_bind_and_udp_associate_may_name_no_port():
    assert socks5.parse_request(b"\x05\x03\x00\x01\0\0\0\0\0\0")[0].target.port == 0
    assert error(socks5.parse_request, b"\x05\x01\x00\x01\x08\x08\x08\x08\0\0").reply[1] == Reply.GENERAL_FAILURE
    assert error(socks4.parse_request, b"\x04\x01\0\0\x08\x08\x08\x08\0").reply[1] == socks4.Reply.REJECTED


@pytest.mark.parametrize(
    ("data", "protocol"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"\x05", "socks5"),
        (b"\x04", "socks4"),
        (b"C", "http"),
        (b"\r\nGET / HTTP/1.1", "http"),
        (b"\x16\x03\x01", ProtocolError),
        (b"\x00", ProtocolError),
        (b"\xff", ProtocolError),
        (b" GET", ProtocolError),
        (b"\r\n" * 40, ProtocolError),
    ],
)
def test_the_first_byte_tells_the_protocol(data, protocol):
    if protocol is ProtocolError:
        with pytest.raises(ProtocolError):
            sniff(data)
    else:
        assert sniff(data) == protocol


@given(st.sampled_from(PARSERS), st.binary(max_size=600), st.integers(0, 2))
def test_any_bytes_cut_anywhere_give_the_same_and_only_our_errors(parse, junk, version):
    """Byte by byte: more, more, and then the message or the error that the whole has; never more than it can have."""
    data = bytes([(5, 1, 4)[version]]) + junk
    outcome = None
    for end in range(len(data) + 1):
        try:
            outcome = parse(data[:end])
        except ProtocolError as raised:
            outcome = raised
        if outcome is not None:
            break
        assert end < LONGEST[parse]
    try:
        whole = parse(data)
    except ProtocolError as raised:
        whole = raised
    if isinstance(outcome, ProtocolError):
        assert isinstance(whole, ProtocolError)
    else:
        assert whole == outcome


@given(st.binary(max_size=100))
def test_any_datagram_and_any_first_bytes(data):
    for parse in (socks5.parse_datagram, lambda packet: socks5.parse_datagram(b"\0\0\0" + packet), sniff):
        try:
            parse(data)
        except ProtocolError:
            continue


@pytest.mark.slow
@given(st.ip_addresses(), st.integers(1, 65535), st.binary(max_size=50))
def test_a_datagram_survives_the_way_there_and_back(ip, port, data):
    found = socks5.parse_datagram(socks5.datagram(ip, port, data))
    assert (found.target.port, found.data) == (port, data)


def test_any_first_byte_is_handled():
    for first in range(256):
        try:
            sniff(bytes([first]) + os.urandom(3))
        except ProtocolError:
            continue
