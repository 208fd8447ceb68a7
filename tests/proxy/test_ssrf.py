"""Nobody is led inside: whatever a client calls a place, and whatever a name server says of it."""

import re
import socket
import struct
from http.client import parse_headers
from ipaddress import ip_address

import gevent.socket
import pytest

from gtcpserver import Server
from gtcpserver.proxy.config import make_proxy, parse_config
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule
from kit.clients import read
from kit.handlers import echo
from kit.patience import SOON
from kit.proxying import LOOPBACK_SPELLINGS, METADATA_SPELLINGS, http, reply, socks

ANYBODY = [parse_client_rule("allow any")]


def rules(*texts):
    return [parse_destination_rule(text) for text in texts]


OUT_OF_THE_BOX = rules("allow any")


@pytest.fixture(autouse=True)
def no_faults(caplog):
    """Whatever the others do, no handler of ours fails."""
    yield
    assert not [record for record in caplog.get_records("call") if record.levelname in ("ERROR", "CRITICAL")]


@pytest.fixture
def proxy(serve):
    def start(**options):
        options = {"client_rules": ANYBODY, "destination_rules": OUT_OF_THE_BOX, **options}
        return serve(ProxyHandler(Gate(**options)))

    return start


class Names:
    """A name server under somebody else's control: it says one thing after the other."""

    def __init__(self, **answers):
        self.answers = {name.replace("_", "."): list(told) for name, told in answers.items()}
        self.asked = []

    def resolve(self, name):
        self.asked.append(name)
        told = self.answers.get(name)
        if not told:
            raise socket.gaierror(socket.EAI_NONAME, "not here")
        addresses = told.pop(0) if len(told) > 1 else told[0]
        return tuple(ip_address(text) for text in addresses.split())

    def close(self):
        pass


@pytest.fixture
def forbidden(serve):
    """A server on loopback that nobody may reach; at the end of the test nobody has."""
    server = serve(echo)
    yield server
    assert server.accepted_connections == 0


def socks4a(port, host):
    return b"\x04\x01" + struct.pack("!H", port) + b"\0\0\0\x01me\0" + host.encode() + b"\0"


def by_all_protocols(server, connect, in_thread, host, port):
    """The answers to SOCKS5, SOCKS4a, CONNECT and GET for a host: reply codes and statuses."""
    fifth = in_thread(reply, connect(server), socks(port, host))
    client = connect(server)
    client.sendall(socks4a(port, host))
    fourth = in_thread(read, client, 8)[:2]
    asked = host.encode()
    tunnel = in_thread(http, connect(server), b"CONNECT %b:%d HTTP/1.1\r\nHost: x\r\n\r\n" % (asked, port))
    get = in_thread(http, connect(server), b"GET http://%b:%d/ HTTP/1.1\r\nHost: example.com\r\n\r\n" % (asked, port))
    return fifth, fourth, int(tunnel.split()[1]), int(get.split()[1])


# -- spellings ---------------------------------------------------------------------------------------------------------


def in_brackets(spelling):
    return f"[{spelling}]" if ":" in spelling and not spelling.startswith("[") else spelling


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [*LOOPBACK_SPELLINGS, *METADATA_SPELLINGS])
def test_requirements_11_14_16_every_spelling_is_recognized_by_every_protocol(
    proxy, connect, in_thread, lines, forbidden, spelling
):
    answers = by_all_protocols(proxy(), connect, in_thread, in_brackets(spelling), forbidden.port)
    assert answers == (2, b"\0\x5b", 403, 403)
    assert {line["result"] for line in lines(4)} == {"destination_denied"}


#: Hosts that are none: they come from the tricks with which filters of URLs are passed.
TRICKS = [
    "127.0.0.1#.example.com",
    "127.0.0.1?.example.com",
    "127.0.0.1/.example.com",
    "127.0.0.1\\.example.com",
    "example.com@127.0.0.1",
    "127.0.0.1@example.com",
    "127.0.0.1:80@example.com",
    "127.0.0.1%00.example.com",
    "127.0.0.1%2eexample.com",
    "%31%32%37.0.0.1",
    "127.0.0.1;example.com",
    "127.0.0.1,example.com",
    "127.0.0.1&example.com",
    "$127.0.0.1",
    "127..0.1",
    "127.0.0.1..",
    "127.0.0.256",
    "127.0.0.1.1",
    "0x7g.1",
    "0177.0.0.09",
    "[::1",
    "::1]",
    "[::1%lo]",
    "[::1%25lo]",
    "[127.0.0.1]",
    "[localhost]",
    "[v1.127.0.0.1]",
    "[::1]x",
    "localhost..",
    ".localhost",
    "*",
    "",
]
TRICKS_OF_SOCKS = [
    *TRICKS,
    "localhost\0",
    "localhost\0.example.com",
    "example.com\0.localhost",
    "localhost\r\n",
    "local host",
    "127.0.0.1 ",
    " 127.0.0.1",
    "127.0.0.1\t",
    "127.0.0.1\n",
    "\u0661\u0662\u0667.0.0.1",  # Arabic digits
    "\uff11\uff12\uff17\uff0e\uff10\uff0e\uff10\uff0e\uff11",  # full-width ones, with their dot
    "\u2460\u2461\u2466.0.0.1",  # in circles
    "127\u30020\u30020\u30021",  # ideographic full stops
    "127.0.0\u0000.1",
]


@pytest.mark.slow
@pytest.mark.parametrize("host", TRICKS_OF_SOCKS)
def test_requirement_17_what_is_no_host_is_not_asked_for(proxy, connect, in_thread, lines, forbidden, host):
    names = Names()
    server = proxy(resolver=names)
    client = connect(server)
    client.sendall(socks(forbidden.port, "x").replace(b"\x01x", bytes([len(host.encode())]) + host.encode()))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x01"
    if "\0" not in host:
        client = connect(server)
        client.sendall(socks4a(forbidden.port, host))
        assert in_thread(read, client, 100)[:2] == b"\0\x5b"
    assert names.asked == []
    for line in lines():
        assert "\n" not in str(line["detail"])
        assert "\r" not in str(line["detail"])


@pytest.mark.slow
@pytest.mark.parametrize("host", [trick for trick in TRICKS if trick])
def test_requirement_18_what_is_no_authority_is_not_asked_for(proxy, connect, in_thread, forbidden, host):
    names = Names()
    server = proxy(resolver=names)
    tunnel = in_thread(
        http, connect(server), b"CONNECT %b:%d HTTP/1.1\r\nHost: x\r\n\r\n" % (host.encode(), forbidden.port)
    )
    assert tunnel.startswith(b"HTTP/1.1 400 ")
    head = b"GET http://%b:%d/ HTTP/1.1\r\nHost: example.com\r\n\r\n" % (host.encode(), forbidden.port)
    # What stands before "#", "?" or "/" is the authority, and what stands behind "@" in it the host. That is judged.
    host = host.rpartition("@")[2]
    if host == "example.com":
        assert in_thread(http, connect(server), head)[9:12] == b"502"
        assert set(names.asked) == {"example.com"}
    else:
        expected = b"403" if re.match(r"127\.0\.0\.1($|[#?/])", host) else b"400"
        assert in_thread(http, connect(server), head)[9:12] == expected
        assert names.asked == []


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        *((1, socket.inet_aton(text)) for text in ("127.0.0.1", "0.0.0.0", "169.254.169.254", "10.0.0.1", "224.0.0.1")),
        *((1, socket.inet_aton(text)) for text in ("255.255.255.255", "100.100.100.200", "192.168.0.1", "172.31.0.1")),
        *((4, ip_address(text).packed) for text in ("::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "fe80::1")),
        *((4, ip_address(text).packed) for text in ("64:ff9b::7f00:1", "2002:7f00:1::", "fd00:ec2::254", "fc00::1")),
        *((4, ip_address(text).packed) for text in ("64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "ff02::1", "fec0::1")),
        *(
            (4, ip_address(text).packed)
            for text in ("2001:0:7f00:1::80ff:fffe", "fe80::5efe:7f00:1", "64:ff9b:1::a00:1")
        ),
    ],
)
def test_requirements_14_16_addresses_in_binary(proxy, connect, in_thread, forbidden, kind, raw):
    server = proxy()
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x01\x00" + bytes([kind]) + raw + struct.pack("!H", forbidden.port))
    assert in_thread(read, client, 100)[2:4] == b"\x05\x02"
    if kind == 1 and raw[:3] != b"\0\0\0":
        client = connect(server)
        client.sendall(b"\x04\x01" + struct.pack("!H", forbidden.port) + raw + b"me\0")
        assert in_thread(read, client, 100)[:2] == b"\0\x5b"


def test_requirement_10_zero_is_no_socks4a(proxy, connect, in_thread, forbidden):
    """0.0.0.0 is the address that it is, and a name behind it is the destination's first bytes."""
    client = connect(proxy())
    client.sendall(b"\x04\x01" + struct.pack("!H", forbidden.port) + b"\0\0\0\0me\0localhost\0")
    assert in_thread(read, client, 100) == b"\0\x5b" + bytes(6)


def test_requirement_10_a_name_of_socks4a_may_be_an_address_or_lead_to_ipv6(proxy, connect, in_thread, serve):
    target, sixth = serve(echo), serve(echo, "[::1]:0")
    server = proxy(destination_rules=rules("allow loopback"), resolver=Names(six_example=["::1"]))
    for host, port in (("127.0.0.1", target.port), ("::1", sixth.port), ("six.example", sixth.port)):
        client = connect(server)
        client.sendall(socks4a(port, host) + b"hello")
        answer = in_thread(read, client, 8)
        assert answer[:2] == b"\0\x5a"
        assert (answer[2:] == bytes(6)) is (port == sixth.port)  # there is no room for an IPv6 address
        assert in_thread(read, client, 5) == b"hello"


# -- names -------------------------------------------------------------------------------------------------------------

INSIDE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
    *("::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
    *("64:ff9b::127.0.0.1", "2002:7f00:1::", "2002:a00:1::", "::10.0.0.1", "2001:db8::1", "2001:0:7f00:1::80ff:fffe"),
]


@pytest.mark.slow
@pytest.mark.parametrize("address", INSIDE)
def test_requirement_15_a_name_that_leads_inside(proxy, connect, in_thread, lines, forbidden, address):
    server = proxy(resolver=Names(good_example=[address]), destination_rules=rules("allow .example", "allow any"))
    answers = by_all_protocols(server, connect, in_thread, "good.example", forbidden.port)
    assert answers == (2, b"\0\x5b", 403, 403)
    assert {line["connected"] for line in lines(4)} == {None}


def test_requirement_15_the_address_that_was_checked_is_the_one_connected_to(
    proxy, connect, in_thread, serve, lines, forbidden
):
    """DNS rebinding: the second answer leads inside. There is no second question, and the next client is told no."""
    target = serve(echo, f"127.0.0.5:{forbidden.port}")
    asked = {
        "socks5": socks(target.port, "good.example"),
        "connect": b"CONNECT good.example:%d HTTP/1.1\r\nHost: x\r\n\r\n" % target.port,
    }
    for number, (protocol, request) in enumerate(asked.items()):
        names = Names(good_example=["127.0.0.5", "127.0.0.1"])
        server = proxy(resolver=names, destination_rules=rules("allow 127.0.0.5"))
        answers = []
        for count in (1, 2):
            with connect(server) as client:
                answers.append(in_thread(reply if protocol == "socks5" else http, client, request))
            assert len(names.asked) == count
            assert lines(2 * number + count)[-1]["connected"] == (f"127.0.0.5:{target.port}" if count == 1 else None)
        assert answers == [0, 2] if protocol == "socks5" else [one[9:12] for one in answers] == [b"200", b"403"]
    assert target.accepted_connections == 2


def test_requirement_15_of_several_addresses_only_those_that_are_allowed_are_tried(
    proxy, connect, in_thread, serve, lines, forbidden
):
    """Neither first nor as a way out when the allowed one refuses."""
    target = serve(echo, f"127.0.0.5:{forbidden.port}")
    names = Names(
        both_example=["127.0.0.1 127.0.0.5"],
        other_example=["127.0.0.5 127.0.0.1 ::1"],
        gone_example=["127.0.0.6 127.0.0.1"],
    )
    server = proxy(resolver=names, destination_rules=rules("allow 127.0.0.5", "allow 127.0.0.6"))
    for name in ("both.example", "other.example"):
        assert in_thread(reply, connect(server), socks(target.port, name)) == 0
    assert in_thread(reply, connect(server), socks(target.port, "gone.example")) == 5
    assert in_thread(
        http, connect(server), b"GET http://gone.example:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % target.port
    ).startswith(b"HTTP/1.1 502")
    assert target.accepted_connections == 2


def test_requirement_15_a_connection_that_is_kept_opens_nothing_else(proxy, connect, in_thread, serve, forbidden):
    """Each request of a client meets the rules: by what is in its request line, and not by its Host."""

    def answer(conn):
        while True:
            heads.append(conn.recv_until(b"\r\n\r\n"))
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    heads = []
    target = serve(answer)
    server = proxy(destination_rules=rules(f"allow 127.0.0.1:{target.port}"))
    good = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (target.port, forbidden.port)
    bad = b"GET http://127.0.0.1:%d/ HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % (forbidden.port, target.port)
    client = connect(server)
    for request, status in ((good, 200), (bad, 403), (good, 200), (bad.replace(b"127.0.0.1", b"127.1"), 403)):
        client.sendall(request)

        def one():
            with client.makefile("rb", buffering=0) as file:
                status = int(file.readline().split()[1])
                file.read(int(parse_headers(file)["content-length"]) or 0)
                return status

        assert in_thread(one) == status
    assert [head.split(b"\r\n")[1] for head in heads] == [b"Host: 127.0.0.1:%d" % target.port] * 2


def test_redirects_are_the_clients_to_follow(proxy, connect, in_thread, serve, forbidden):
    location = f"http://127.0.0.1:{forbidden.port}/"

    def answer(conn):
        conn.recv_until(b"\r\n\r\n")
        conn.sendall(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())

    target = serve(answer, "127.0.0.5:0")
    server = proxy(destination_rules=rules("allow 127.0.0.5"))
    head = in_thread(http, connect(server), b"GET http://127.0.0.5:%d/ HTTP/1.1\r\nHost: x\r\n\r\n" % target.port)
    assert head.startswith(b"HTTP/1.1 302")
    assert f"Location: {location}".encode() in head


# -- datagrams, BIND, and the proxy itself -----------------------------------------------------------------------------


def datagram(port, host):
    return b"\0\0\0\x03" + bytes([len(host)]) + host.encode() + struct.pack("!H", port)


def test_requirement_13_datagrams_are_not_led_inside(proxy, connect, in_thread):
    """Every spelling and every name is dropped; the one that is allowed, sent last, is the only one that arrives."""
    outside, sink = gevent.socket.socket(type=socket.SOCK_DGRAM), gevent.socket.socket(type=socket.SOCK_DGRAM)
    outside.bind(("127.0.0.5", 0))
    port = outside.getsockname()[1]
    sink.bind(("127.0.0.1", port))
    names = Names(good_example=["127.0.0.1"], six_example=["::ffff:127.0.0.1"], meta_example=["169.254.169.254"])
    server = proxy(resolver=names, destination_rules=rules("allow 127.0.0.5", "allow any"))
    client = connect(server)
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01\0\0\0\0\0\0")
    relay = ("127.0.0.1", struct.unpack("!H", in_thread(read, client, 12)[10:])[0])
    hosts = [
        *(one.strip("[]") for one in LOOPBACK_SPELLINGS),
        "localhost",
        "good.example",
        "six.example",
        "meta.example",
    ]
    with outside, sink, gevent.socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        for host in hosts:
            sock.sendto(datagram(port, host) + b"inside", relay)
        sock.sendto(b"\0\0\0\x01\x7f\0\0\x01" + struct.pack("!H", port) + b"inside", relay)
        sock.sendto(b"\0\0\0\x04" + ip_address("::ffff:127.0.0.1").packed + struct.pack("!H", port) + b"inside", relay)
        sock.sendto(datagram(port, "127.0.0.5") + b"outside", relay)
        outside.settimeout(SOON)
        assert outside.recv(100) == b"outside"
        sink.settimeout(0)
        with pytest.raises(BlockingIOError):
            sink.recv(100)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "good.example", "0x7f.1", "0.0.0.0", "10.0.0.1"])
def test_requirement_12_nobody_inside_is_waited_for(proxy, connect, in_thread, lines, host):
    """BIND opens a port for whom the client could have connected to, and for nobody else."""
    server = proxy(resolver=Names(good_example=["127.0.0.1"], localhost=["127.0.0.1"]))
    client = connect(server)
    name = host.encode()
    client.sendall(b"\x05\x01\x00\x05\x02\x00\x03" + bytes([len(name)]) + name + b"\0\0")
    assert in_thread(read, client, 100)[2:4] == b"\x05\x02"
    assert lines()[0]["result"] == "destination_denied"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1", "[::ffff:127.0.0.1]", "0x7f.1", "0"])
def test_requirement_16_no_listener_of_the_proxy_is_reached_through_another(in_thread, host):
    """It would come back as a client from this host, which may be allowed more."""
    text = """
    [[listener]]
    name = "a"
    listen = "127.0.0.1:FIRST"
    [[listener]]
    name = "b"
    listen = "127.0.0.1:PORT"
    [rules]
    clients = ["allow any"]
    destinations = ["allow loopback", "allow unspecified", "allow any"]
    """
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        first, port = one.getsockname()[1], other.getsockname()[1]
    made = make_proxy(parse_config(text.replace("PORT", str(port)).replace("FIRST", str(first))))
    with Server([str(address) for address in made.addresses], made.handler) as server:

        def ask():
            with socket.create_connection(("127.0.0.1", first), SOON) as sock:
                return reply(sock, socks(port, host))

        assert in_thread(ask) == 2
        assert server.accepted_connections == 1
