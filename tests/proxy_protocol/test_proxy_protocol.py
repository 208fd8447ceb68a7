"""The PROXY protocol: exactly what it says, whatever the pieces; and haproxy understands us, as we do haproxy."""

import re
import shutil
import socket
import ssl
import subprocess
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.proxy_protocol.header import (
    LONGEST_V1,
    LONGEST_V2,
    TLS,
    TLV,
    ProxyHeader,
    ProxyProtocolError,
    Transport,
    Type,
    crc32c,
    parse_header,
)
from kit.patience import SOON

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
IPV4 = b"\xc0\0\x02\x01\xc6\x33\x64\x02\x10\x00\x01\xbb"  # 192.0.2.1:4096 to 198.51.100.2:443
ENDPOINTS = ((ip_address("192.0.2.1"), 4096), (ip_address("198.51.100.2"), 443))
V4 = ProxyHeader(*ENDPOINTS)


def v2(body, *, command=0x21, family=0x11, size=None):
    return SIGNATURE + bytes((command, family)) + (len(body) if size is None else size).to_bytes(2, "big") + body


def tlv(type, value):
    return bytes((type,)) + len(value).to_bytes(2, "big") + value


def outcome(data):
    try:
        return parse_header(data)
    except ProxyProtocolError as error:
        return str(error)


def error(data):
    found = outcome(data)
    assert isinstance(found, str), found
    return found


# -- version 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "source", "destination"),
    [
        (b"PROXY TCP4 192.0.2.1 198.51.100.2 4096 443", *ENDPOINTS),
        (b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535", (IPv4Address(0), 0), (IPv4Address(2**32 - 1), 65535)),
        (b"PROXY TCP6 2001:db8::1 ::1 1 2", (ip_address("2001:db8::1"), 1), (ip_address("::1"), 2)),
        (
            b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c000:202 1 2",
            (ip_address("::ffff:192.0.2.1"), 1),
            (ip_address("::ffff:192.0.2.2"), 2),
        ),
        (
            b"PROXY TCP6 " + b"ffff:" * 7 + b"ffff " + b"ffff:" * 7 + b"ffff 65535 65535",
            (IPv6Address(2**128 - 1), 65535),
            (IPv6Address(2**128 - 1), 65535),
        ),
    ],
)
def test_version_1(line, source, destination):
    header, size = parse_header(line + b"\r\nGET /")
    assert (header.source, header.destination, header.version) == (source, destination, 1)
    assert (header.transport, header.local, header.tlvs) == (Transport.STREAM, False, ())
    assert size == len(line) + 2


@pytest.mark.parametrize("rest", [b"", b" ", b" whatever \xff\0", b" " + b"x" * (LONGEST_V1 - 16)])
def test_version_1_unknown_is_taken_for_what_the_connection_is(rest):
    header, size = parse_header(b"PROXY UNKNOWN" + rest + b"\r\n")
    assert header == ProxyHeader(transport=Transport.UNSPECIFIED, version=1)
    assert header.source is None
    assert size == 15 + len(rest)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 2", "TCP4, TCP6 or UNKNOWN expected in a PROXY line, got b''"),
        (b"PROXY tcp4 1.2.3.4 1.2.3.4 1 2", "TCP4, TCP6 or UNKNOWN expected in a PROXY line, got b'tcp4'"),
        (b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2", "got b'TCP5'"),
        (b"PROXY UNKNOWNS", "got b'UNKNOWNS'"),
        (b"PROXY TCP4", "two addresses and two ports expected behind TCP4, got b''"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1", "two addresses and two ports"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 ", "two addresses and two ports"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4  1 2", "two addresses and two ports"),
        (b"PROXY TCP4 1.2.3.04 1.2.3.4 1 2", "an IPv4 address expected in a PROXY line, got b'1.2.3.04'"),
        (b"PROXY TCP4 1.2.3 1.2.3.4 1 2", "an IPv4 address"),
        (b"PROXY TCP4 1.2.3.4 ::1 1 2", "an IPv4 address expected in a PROXY line, got b'::1'"),
        (b"PROXY TCP4 0x7f.0.0.1 1.2.3.4 1 2", "an IPv4 address"),
        (b"PROXY TCP4 \xd9\xa1.2.3.4 1.2.3.4 1 2", "an IPv4 address"),
        (b"PROXY TCP6 1.2.3.4 ::1 1 2", "an IPv6 address"),
        (b"PROXY TCP6 fe80::1%eth0 ::1 1 2", "an IPv6 address"),
        (b"PROXY TCP6 1::2::3 ::1 1 2", "an IPv6 address"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 01 2", "a port from 0 to 65535 expected in a PROXY line, got b'01'"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536", "a port from 0 to 65535 expected in a PROXY line, got b'65536'"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2", "a port"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 -2", "a port"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1e3", "a port"),
    ],
)
def test_requirement_37_version_1_is_read_exactly(line, message):
    assert message in error(line + b"\r\n")


def test_requirement_37_a_line_has_107_bytes_at_most():
    longest = b"PROXY UNKNOWN".ljust(LONGEST_V1 - 2)
    assert parse_header(longest + b"\r\n")[1] == LONGEST_V1
    assert parse_header(longest) is None
    for too_long in (longest + b" ", longest + b" \r", longest + b" \r\n", longest + b" " * 100):
        parts = [outcome(too_long[:size]) for size in range(len(too_long) + 1)]
        assert parts[LONGEST_V1 - 1] is None
        if len(too_long) >= LONGEST_V1:
            assert "ends within 107 bytes" in parts[LONGEST_V1]


@pytest.mark.parametrize("end", [b"\n", b"\r\r\n", b"\rx", b"\n\r\n"])
def test_a_line_ends_with_both_cr_and_lf(end):
    assert "CR LF" in error(b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2" + end)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x05\x01\x00", b"\x16\x03\x01", b"PROXYTCP4", b"POST /", b"\r\n\r\n\r", b"\0"]
)
def test_requirement_37_what_is_no_header_is_refused_at_its_first_wrong_byte(data):
    assert "and not with a PROXY header" in error(data)


# -- version 2 ---------------------------------------------------------------------------------------------------------


def test_version_2_over_ipv4_and_ipv6():
    assert parse_header(v2(IPV4) + b"GET /") == (V4, 28)
    body = b"\x20\x01\x0d\xb8" + bytes(12) + bytes(15) + b"\x01" + b"\0\x01\0\x02"
    header, size = parse_header(v2(body, family=0x21))
    assert (header.source, header.destination, size) == ((ip_address("2001:db8::"), 1), (ip_address("::1"), 2), 52)


def test_version_2_udp_and_unix_sockets():
    assert parse_header(v2(IPV4, family=0x12))[0] == ProxyHeader(*ENDPOINTS, Transport.DATAGRAM)
    paths = b"/run/client".ljust(108, b"\0") + b"\0abstract\0name".ljust(108, b"\0")
    header, _ = parse_header(v2(paths, family=0x31))
    assert (header.source, header.destination) == (b"/run/client", b"\0abstract\0name")
    full = b"/" * 108
    assert parse_header(v2(full + bytes(108), family=0x31))[0].source == full
    assert parse_header(v2(full + bytes(108), family=0x31))[0].destination == b""


@pytest.mark.parametrize("family", [0x00, 0x01, 0x10, 0x11, 0x20, 0x31])
@pytest.mark.parametrize("body", [b"", b"anything", IPV4 + tlv(Type.CRC32C, b"wrong")])
def test_version_2_local_ignores_everything_behind_it(family, body):
    header, size = parse_header(v2(body, command=0x20, family=family))
    assert (header.local, header.source, header.tlvs, size) == (True, None, (), 16 + len(body))


@pytest.mark.parametrize("family", [0x00, 0x01, 0x02, 0x10, 0x20, 0x30])
def test_version_2_unspecified_is_taken_for_what_the_connection_is(family):
    header, size = parse_header(v2(b"anything", family=family))
    assert (header.local, header.source, header.transport, size) == (False, None, Transport.UNSPECIFIED, 24)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (v2(IPV4, command=0x11), "version 2 expected in a binary PROXY header, got 1"),
        (v2(IPV4, command=0x31), "got 3"),
        (v2(IPV4, command=0x22), "LOCAL (0) or PROXY (1) expected in a PROXY header, got 2"),
        (v2(IPV4, family=0x41), "an address family from 0 to 3 expected in a PROXY header, got 4"),
        (v2(IPV4, family=0x13), "a transport from 0 to 2 expected in a PROXY header, got 3"),
        (v2(b"", size=11), "12 bytes of addresses expected in a PROXY header of family 1, got 11"),
        (v2(b"", family=0x21, size=35), "36 bytes of addresses"),
        (v2(b"", family=0x31, size=215), "216 bytes of addresses"),
        (v2(b"", size=LONGEST_V2 - 15), "must not be longer than 16384 bytes, got one of 16385"),
        (v2(b"", command=0x20, size=65535), "must not be longer than 16384 bytes, got one of 65551"),
        (v2(IPV4 + b"\x01"), "a TLV of type 0x01 goes beyond the end of the PROXY header"),
        (v2(IPV4 + b"\x01\0"), "goes beyond"),
        (v2(IPV4 + b"\x01\0\x02h"), "goes beyond"),
        (v2(IPV4 + tlv(Type.CRC32C, b"\0\0\0")), "one checksum of 4 bytes expected"),
        (v2(IPV4 + tlv(Type.UNIQUE_ID, b"x" * 129)), "a unique id has 128 bytes at most, got 129"),
        (v2(IPV4 + tlv(Type.SSL, b"\x01\0\0\0")), "5 bytes or more expected in the TLV SSL of a PROXY header, got 4"),
        (v2(IPV4 + tlv(Type.SSL, b"\x01\0\0\0\0\x21\0\x09TLS")), "type 0x21 goes beyond the end of the TLV SSL"),
        (v2(IPV4 + tlv(Type.AUTHORITY, b"\xff")), "the AUTHORITY of a PROXY header is no text"),
        (v2(IPV4 + tlv(Type.NETNS, "é".encode())), "the NETNS of a PROXY header is no text"),
    ],
)
def test_requirement_37_version_2_is_read_exactly(data, message):
    assert message in error(data)


def test_version_2_says_what_is_wrong_with_the_first_byte_that_is():
    assert "version 2 expected" in error(SIGNATURE + b"\x10")
    assert "an address family" in error(SIGNATURE + b"\x21\x41")
    assert "16384 bytes" in error(SIGNATURE + b"\x21\x11\xff\xff")


def test_tlvs():
    inner = TLS(0x05, 0, (TLV(Type.SSL_VERSION, b"TLSv1.3"), TLV(Type.SSL_CN, b"Ada")))
    body = IPV4 + tlv(Type.ALPN, b"h2") + tlv(Type.NOOP, bytes(7)) + tlv(Type.AUTHORITY, "müller.example".encode())
    body += tlv(Type.UNIQUE_ID, b"\0\xff" * 64) + tlv(*inner.to_tlv()) + tlv(Type.NETNS, b"blue") + tlv(0xE0, b"ours")
    header, _ = parse_header(v2(body))
    assert (header.alpn, header.authority, header.netns) == (b"h2", "müller.example", "blue")
    assert header.unique_id == b"\0\xff" * 64
    assert header.tls == inner
    assert header.tls.has_certificate
    assert (header.tls.text(Type.SSL_VERSION), header.tls.text(Type.SSL_CN)) == ("TLSv1.3", "Ada")
    assert header.tls.text(Type.SSL_CIPHER) is None
    assert TLV(0xE0, b"ours") in header.tlvs
    assert Type.NOOP not in [one.type for one in header.tlvs]
    assert (V4.alpn, V4.authority, V4.unique_id, V4.netns, V4.tls) == (None,) * 5


@pytest.mark.parametrize(("client", "verify", "good"), [(1, 0, False), (3, 0, True), (5, 0, True), (7, 20, False)])
def test_a_certificate_counts_if_it_was_shown_and_found_good(client, verify, good):
    assert TLS(client, verify).has_certificate is good


def test_the_checksum_is_the_one_of_rfc_3720():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("at", [*range(16, 35), *range(38, 42)])
def test_a_checksum_finds_every_changed_bit(at):
    """In the addresses, in the TLVs, and in itself; a TLV that is no checksum any more is none that could be wrong."""
    data = ProxyHeader(*ENDPOINTS, tlvs=(TLV(Type.NETNS, b"blue"),)).to_bytes(checksum=True)
    assert parse_header(data)[0].netns == "blue"
    for bit in range(8):
        error(data[:at] + bytes((data[at] ^ 1 << bit,)) + data[at + 1 :])


def test_a_second_checksum_is_refused():
    first = tlv(Type.CRC32C, bytes(4))
    whole = v2(IPV4 + first + first)
    right = crc32c(whole).to_bytes(4, "big")
    assert "one checksum of 4 bytes" in error(whole[:31] + right + whole[35:])


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_is_written():
    assert V4.to_bytes() == v2(IPV4)
    assert ProxyHeader(local=True).to_bytes() == v2(b"", command=0x20, family=0)
    assert ProxyHeader().to_bytes() == v2(b"", family=0)
    assert ProxyHeader(*ENDPOINTS, version=1).to_bytes() == b"PROXY TCP4 192.0.2.1 198.51.100.2 4096 443\r\n"
    for unknown in (
        ProxyHeader(version=1),
        ProxyHeader(*ENDPOINTS, local=True, version=1),
        ProxyHeader(*ENDPOINTS, Transport.DATAGRAM, version=1),
        ProxyHeader(b"/run/a", b"/run/b", version=1),
    ):
        assert unknown.to_bytes() == b"PROXY UNKNOWN\r\n"


def test_addresses_of_two_families_are_both_written_as_ipv6():
    both = ProxyHeader((ip_address("192.0.2.1"), 1), (ip_address("2001:db8::1"), 2))
    assert parse_header(both.to_bytes())[0].source == (ip_address("::ffff:192.0.2.1"), 1)


def test_a_zone_is_not_written():
    local = (ip_address("fe80::1%eth0"), 1)
    assert ProxyHeader(local, local, version=1).to_bytes() == b"PROXY TCP6 fe80::1 fe80::1 1 1\r\n"
    assert parse_header(ProxyHeader(local, local).to_bytes())[0].source == (ip_address("fe80::1"), 1)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (ProxyHeader(ENDPOINTS[0], None), "must be of one kind"),
        (ProxyHeader(ENDPOINTS[0], b"/run/b"), "must be of one kind"),
        (ProxyHeader(b"/" * 109, b""), "108 bytes at most"),
        (ProxyHeader((ip_address("192.0.2.1"), 65536), ENDPOINTS[1]), "ports must be 0 to 65535, got 65536 and 443"),
        (ProxyHeader(b"", None, version=1), "must be of one kind"),
        (ProxyHeader(*ENDPOINTS, tlvs=(TLV(0xE0, bytes(LONGEST_V2)),)), "must not be longer than 16384"),
        (ProxyHeader(*ENDPOINTS, tlvs=(TLV(0xE0, bytes(65536)),)), "65535 bytes at most, got 65536"),
    ],
)
def test_what_cannot_be_written_is_said(header, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        header.to_bytes()


# -- any bytes ---------------------------------------------------------------------------------------------------------

ports = st.integers(0, 65535)
tlvs = st.lists(st.builds(TLV, st.sampled_from([0x01, 0x40, 0xE0, 0xFF]), st.binary(max_size=20)), max_size=4).map(
    tuple
)
endpoints = st.one_of(
    st.tuples(st.tuples(st.ip_addresses(v=4), ports), st.tuples(st.ip_addresses(v=4), ports)),
    st.tuples(st.tuples(st.ip_addresses(v=6), ports), st.tuples(st.ip_addresses(v=6), ports)),
)
paths = st.binary(max_size=108).map(lambda path: b"/" + path.replace(b"\0", b"x")[:107])
headers = st.one_of(
    st.builds(lambda ends, tlvs: ProxyHeader(*ends, tlvs=tlvs), endpoints, tlvs),
    st.builds(lambda ends: ProxyHeader(*ends, version=1), endpoints),
    st.builds(lambda ends: ProxyHeader(*ends, Transport.DATAGRAM), endpoints),
    st.builds(ProxyHeader, paths, paths),
    st.just(ProxyHeader(transport=Transport.UNSPECIFIED, local=True)),
)


@pytest.mark.slow
@given(headers, st.booleans(), st.binary(max_size=30))
def test_a_header_survives_the_way_there_and_back(header, checksum, behind):
    data = header.to_bytes(checksum=checksum)
    assert parse_header(data + behind) == (header, len(data))
    assert all(parse_header(data[:size]) is None for size in range(len(data)))


begins = st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ::1 ", SIGNATURE, SIGNATURE + b"\x21\x11\0\x20"])


@st.composite
def flipped(draw):
    """A header with one byte changed."""
    data = draw(headers).to_bytes()
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + draw(st.binary(min_size=1, max_size=1)) + data[at + 1 :]


@pytest.mark.slow
@given(st.one_of(st.builds(bytes.__add__, begins, st.binary(max_size=200)), flipped()), st.binary(max_size=20))
def test_any_bytes_cut_anywhere_give_the_same_and_only_our_errors(data, behind):
    """Byte by byte: more, more, and then the very outcome that the whole has."""
    data += behind
    whole = outcome(data)
    first = next((found for size in range(len(data) + 1) if (found := outcome(data[:size])) is not None), None)
    if isinstance(whole, str) and "begins with" in whole:  # it shows what has come
        assert isinstance(first, str)
    else:
        assert first == whole


# -- haproxy -----------------------------------------------------------------------------------------------------------

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is missing")


@contextmanager
def haproxy(tmp_path, lines):
    """haproxy with a configuration; LISTEN in it is a listening socket, whose address is given."""
    config = tmp_path / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        text = "defaults\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n" + lines
        config.write_text(text.replace("LISTEN", f"fd@{listening.fileno()}"))
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(config)], pass_fds=[listening.fileno()], stderr=subprocess.PIPE
        )
        try:
            yield listening.getsockname()
        finally:
            process.kill()
            process.communicate()


def receive_header(listening):
    """What haproxy sends, read byte by byte; and the first bytes of the client's."""
    listening.settimeout(SOON)
    with listening.accept()[0] as sock:
        sock.settimeout(SOON)
        data = b""
        while (found := parse_header(data)) is None:
            more = sock.recv(1)
            assert more, f"haproxy closed after {data!r}"
            data += more
        assert found[1] == len(data)
        return found[0], sock.recv(5, socket.MSG_WAITALL)


@pytest.mark.slow
@needs_haproxy
@pytest.mark.parametrize(
    ("options", "version"),
    [("send-proxy", 1), ("send-proxy-v2", 2), ("send-proxy-v2 proxy-v2-options crc32c,unique-id", 2)],
)
def test_what_haproxy_sends_is_understood(tmp_path, options, version):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        lines = f"listen l\n bind LISTEN\n unique-id-format id-%ci\n server s 127.0.0.1:{port} {options}\n"
        with haproxy(tmp_path, lines) as address, socket.create_connection(address, SOON) as client:
            client.sendall(b"hello")
            header, data = receive_header(listening)
            assert data == b"hello"
            assert header.version == version
            assert header.source == (ip_address("127.0.0.1"), client.getsockname()[1])
            assert header.destination == (ip_address("127.0.0.1"), address[1])
            assert header.unique_id == (b"id-127.0.0.1" if "unique-id" in options else None)


@pytest.mark.slow
@needs_haproxy
def test_what_haproxy_sends_of_tls_is_understood(tmp_path):
    authority = trustme.CA()
    server = authority.issue_cert("proxy.example")
    client_cert = authority.issue_cert("ada@example.com", common_name="Ada")
    (tmp_path / "server.pem").write_bytes(server.private_key_and_cert_chain_pem.bytes())
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client_cert.configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        lines = (
            f"listen l\n bind LISTEN ssl crt {tmp_path}/server.pem ca-file {tmp_path}/ca.pem verify optional"
            f" alpn http/1.1\n server s 127.0.0.1:{port} send-proxy-v2-ssl-cn"
            " proxy-v2-options crc32c,authority,ssl-cipher,cert-sig,cert-key\n"
        )
        with (
            haproxy(tmp_path, lines) as address,
            socket.create_connection(address, SOON) as plain,
            context.wrap_socket(plain, server_hostname="proxy.example") as client,
        ):
            client.sendall(b"hello")
            header, data = receive_header(listening)
            assert data == b"hello"
            assert (header.authority, header.alpn) == ("proxy.example", b"http/1.1")
            assert header.tls.has_certificate
            assert header.tls.text(Type.SSL_CN) == "Ada"
            assert header.tls.text(Type.SSL_VERSION) == client.version()
            assert header.tls.text(Type.SSL_CIPHER) == client.cipher()[0]


@pytest.mark.slow
@needs_haproxy
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ip", ["192.0.2.1", "2001:db8::1"])
def test_haproxy_understands_what_is_written(tmp_path, version, ip):
    lines = (
        "frontend f\n mode http\n bind LISTEN accept-proxy\n"
        ' http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port]'
        ' %[fc_pp_authority] %[fc_pp_unique_id]"\n'
    )
    more = () if version == 1 else (TLV(Type.AUTHORITY, b"example.com"), TLV(Type.UNIQUE_ID, b"id-1"))
    header = ProxyHeader((ip_address(ip), 4096), (ip_address(ip), 443), version=version, tlvs=more)
    with haproxy(tmp_path, lines) as address, socket.create_connection(address, SOON) as client:
        client.settimeout(SOON)
        client.sendall(header.to_bytes(checksum=True) + b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while part := client.recv(4096):
            answer += part
    said = answer.decode().partition("\r\n\r\n")[2].split()
    assert said == [ip, "4096", ip, "443", *(["example.com", "id-1"] if version == 2 else [])]


@pytest.mark.slow
@needs_haproxy
def test_haproxy_refuses_a_wrong_checksum_as_we_do(tmp_path):
    data = V4.to_bytes(checksum=True)
    wrong = data[:-1] + bytes((data[-1] ^ 1,))
    assert "the checksum of a PROXY header is" in error(wrong)
    lines = "frontend f\n mode http\n bind LISTEN accept-proxy\n http-request return status 200\n"
    with haproxy(tmp_path, lines) as address, socket.create_connection(address, SOON) as client:
        client.settimeout(SOON)
        client.sendall(wrong + b"GET / HTTP/1.0\r\n\r\n")
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass


def test_the_readers_of_either_version_never_need_more_than_their_limit():
    assert outcome(b"PROXY ".ljust(LONGEST_V1 - 1, b"x")) is None
    assert outcome(b"PROXY ".ljust(LONGEST_V1, b"x")) is not None
    assert outcome(v2(bytes(LONGEST_V2 - 16), command=0x20))[1] == LONGEST_V2
