"""UDP associations: what clients are told, whose datagrams count, how many there may be."""

import errno
import socket
import struct
from ipaddress import ip_address
from unittest.mock import Mock

import gevent
import gevent.socket
import pytest

from gtcpserver.errors import ConfigError
from gtcpserver.proxy import socks_udp, udp
from gtcpserver.proxy.build import make_udp
from gtcpserver.proxy.config import parse_config
from gtcpserver.proxy.errors import LimitReached
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import CLAIMED, SharedMemory
from kit.clients import read
from kit.patience import SOON
from kit.proxying import associate, named_address, packet, udp_socket
from kit.waiting import wait_until

#: An address that no other program binds to.
OURS = ip_address("127.77.13.9")


def socket_at(host, port=0):
    sock = gevent.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    sock.settimeout(SOON)
    return sock


def associate_from(client, in_thread, host, port):
    """Ask for an association from this address; where it is."""
    client.sendall(b"\x05\x01\x00\x05\x03\x00\x01" + socket.inet_aton(host) + struct.pack("!H", port))
    return named_address(in_thread(read, client, 12)[2:])


def send(sock, where, origin, data):
    """Have a datagram relayed, if the proxy takes it from this socket."""
    sock.sendto(packet(origin.getsockname()[1], data), where)


# -- what clients are told ---------------------------------------------------------------------------------------------


def test_clients_are_told_the_address_of_a_gateway(proxy, connect, in_thread):
    server = proxy('[udp]\nadvertise = ["192.0.2.7", "2001:db8::7"]')
    host, port = associate(connect(server), in_thread)
    assert host == "192.0.2.7"
    with udp_socket() as origin, udp_socket() as sock:
        sock.sendto(packet(origin.getsockname()[1], b"x"), ("127.0.0.1", port))
        assert origin.recv(100) == b"x"


def test_clients_of_the_other_family_are_told_ours():
    told = make_udp(parse_config('udp.advertise = "2001:db8::7"').udp).told
    assert told(ip_address("127.0.0.1")) == ip_address("127.0.0.1")
    assert told(ip_address("::1")) == ip_address("2001:db8::7")


def test_ports_are_those_of_the_range(proxy, connect, in_thread):
    server = proxy('[udp]\nports = "20000-29999"')
    assert 20000 <= associate(connect(server), in_thread)[1] <= 29999


def test_a_range_that_is_used_up_is_named():
    ports, found = range(31000, 31020), []
    try:
        with pytest.raises(OSError, match=r"all of udp.ports are in use") as caught:
            while True:
                found.append(udp.udp_socket(OURS, ports))
        used = {sock.getsockname()[1] for sock in found}
    finally:
        for sock in found:
            sock.close()
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert len(used) == len(found) >= 10  # another program may have some, on all addresses
    assert used <= set(ports)


def test_a_client_is_refused_when_the_range_is_used_up(proxy, connect, in_thread, lines, monkeypatch):
    def full(address, ports):
        raise OSError(errno.EADDRNOTAVAIL, "all of udp.ports are in use")

    server = proxy("[limits]\nudp_associations = 1")
    with monkeypatch.context() as patch:
        patch.setattr(socks_udp, "udp_socket", full)
        client = connect(server)
        client.sendall(b"\x05\x01\x00\x05\x03\x00\x01" + bytes(6))
        assert in_thread(read, client, 100)[2:4] == b"\x05\x01"
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("no_port", "all of udp.ports are in use")
    assert associate(connect(server), in_thread)  # it was not counted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('advertise = "proxy.example"', "udp.advertise must be an address that clients reach"),
        ('advertise = ["192.0.2.1", "192.0.2.2"]', "or one of each family, got '192.0.2.1', '192.0.2.2'"),
        ('advertise = "0.0.0.0"', "udp.advertise must be"),
        ('ports = "50000"', "udp.ports must be a range of ports such as"),
        ('ports = "50010-50000"', "got '50010-50000'"),
        ('ports = "0-10"', "got '0-10'"),
        ('ports = "1-65536"', "got '1-65536'"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(ConfigError) as caught:
        make_udp(parse_config(f"[udp]\n{text}").udp)
    assert said in str(caught.value)


# -- whose datagrams count ---------------------------------------------------------------------------------------------


@pytest.fixture
def sockets():
    """A destination, a client's socket, and another program's at the client's address."""
    with udp_socket() as origin, udp_socket() as sock, udp_socket() as other:
        yield origin, sock, other


@pytest.mark.parametrize("said", [("0.0.0.0", 0), ("0.0.0.0", 5353), ("192.168.7.7", 4444), ("127.0.0.1", 0)])
def test_the_port_of_a_client_behind_nat_is_learned(proxy, connect, in_thread, sockets, said):
    where = associate_from(connect(proxy()), in_thread, *said)
    origin, sock, other = sockets
    send(sock, where, origin, b"first")
    send(other, where, origin, b"another client of the same NAT")
    send(sock, where, origin, b"second")
    assert [origin.recv(100), origin.recv(100)] == [b"first", b"second"]


def test_requirement_13_a_port_that_the_client_knows_is_the_only_one(proxy, connect, in_thread, sockets):
    origin, sock, other = sockets
    where = associate_from(connect(proxy()), in_thread, *sock.getsockname())
    send(other, where, origin, b"before it")
    send(sock, where, origin, b"its own")
    assert origin.recv(100) == b"its own"


def test_the_port_that_a_client_has_named_counts_more_than_the_first(proxy, connect, in_thread, sockets):
    origin, sock, other = sockets
    where = associate_from(connect(proxy()), in_thread, "0.0.0.0", sock.getsockname()[1])
    send(other, where, origin, b"forged")
    send(sock, where, origin, b"its own")
    send(other, where, origin, b"forged, too late")
    send(sock, where, origin, b"again")
    assert [origin.recv(100) for _ in range(3)] == [b"forged", b"its own", b"again"]
    origin.sendto(b"x", origin.getsockname())  # nothing else has come
    assert origin.recv(100) == b"x"


@pytest.mark.parametrize("named", [False, True])
def test_an_address_that_is_not_the_clients_is_no_client(proxy, connect, in_thread, sockets, named):
    origin, sock, _ = sockets
    port = sock.getsockname()[1]
    where = associate_from(connect(proxy()), in_thread, "0.0.0.0", port if named else 0)
    with socket_at("127.0.0.2", port) as forger:
        for data in (b"", b"\0", b"\0\0\0\x01"):
            forger.sendto(data, where)
        send(forger, where, origin, b"reflected")
        send(sock, where, origin, b"from the client")
        send(forger, where, origin, b"reflected")
        send(sock, where, origin, b"again")
        assert [origin.recv(100), origin.recv(100)] == [b"from the client", b"again"]


# -- full cone ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_cone", [False, True])
def test_who_may_send_to_a_client(proxy, connect, in_thread, full_cone):
    rules = '[rules]\ndestinations = ["deny 127.0.0.3", "allow loopback"]\n'
    text = f'[udp]\nfull_cone = {str(full_cone).lower()}\nports = "20000-29999"'
    where = associate(connect(proxy(text, rules=rules)), in_thread)
    with (
        udp_socket() as origin,
        udp_socket() as sock,
        socket_at("127.0.0.2") as stranger,
        socket_at("127.0.0.3") as denied,
    ):
        sock.sendto(packet(origin.getsockname()[1], b"x"), where)
        outer = origin.recvfrom(100)[1]
        assert not full_cone or 20000 <= outer[1] <= 29999
        denied.sendto(b"denied", outer)
        stranger.sendto(b"by anybody", outer)
        origin.sendto(b"answer", outer)
        expected = [(b"by anybody", stranger), (b"answer", origin)] if full_cone else [(b"answer", origin)]
        for data, sender in expected:
            host, port = sender.getsockname()
            assert sock.recv(100) == packet(port, data, host=host)


# -- sizes, errors, floods ---------------------------------------------------------------------------------------------


def test_the_largest_and_the_smallest_datagram(proxy, connect, in_thread):
    where = associate(connect(proxy()), in_thread)
    with udp_socket() as origin, udp_socket() as sock:
        for one in (origin, sock):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 400_000)
        for size in (0, 1, 65507 - 10):
            data = bytes(size)
            sock.sendto(packet(origin.getsockname()[1], data), where)
            got, outer = origin.recvfrom(70_000)
            assert got == data
            origin.sendto(data, outer)
            assert sock.recv(70_000)[10:] == data
        # An answer that does not fit beside its header is lost, and nothing else.
        origin.sendto(bytes(65507), outer)
        origin.sendto(b"fits", outer)
        assert sock.recv(70_000)[10:] == b"fits"


def test_fragments_are_dropped_and_errors_end_nothing(proxy, connect, in_thread):
    where = associate(connect(proxy()), in_thread)
    with udp_socket() as origin, udp_socket() as sock:
        port = origin.getsockname()[1]
        with udp_socket() as gone:
            nobody = gone.getsockname()[1]
        for data in (
            packet(port, b"fragment", fragment=1),
            packet(port, b"last fragment", fragment=0x81),
            packet(nobody, b"an ICMP message answers"),
            packet(0, b"no port"),
            packet(port, b"no route", host="0.0.0.0"),
            b"\0\0\0\x03\x00\0\1",
            b"\0\0\0\x09" + bytes(20),
        ):
            sock.sendto(data, where)
        sock.sendto(packet(port, b"whole"), where)
        assert origin.recv(100) == b"whole"


def test_a_socket_that_cannot_be_read_for_a_while_goes_on(monkeypatch):
    sock = Mock()
    sock.recvfrom.side_effect = [OSError(errno.ENOMEM, ""), ConnectionRefusedError(), (b"x", "source")]
    monkeypatch.setattr(socks_udp, "PAUSE", 0.0)
    assert next(socks_udp._arrivals(sock)) == (b"x", "source")


def test_a_flood_of_datagrams_holds_up_nobody_else(proxy, connect, in_thread, monkeypatch):
    where = associate(connect(proxy()), in_thread)
    turns, seen = [], set()
    send_now = socks_udp._send_now

    def note(*arguments):
        seen.add(len(turns))
        send_now(*arguments)

    def take_turns():
        while True:
            turns.append(None)
            gevent.sleep(0)

    monkeypatch.setattr(socks_udp, "_send_now", note)
    with udp_socket() as origin, udp_socket() as sock:
        for _ in range(100):  # they wait in the kernel: sendto lets nobody else run
            send(sock, where, origin, b"x")
        others = gevent.spawn(take_turns)
        try:
            for _ in range(100):
                assert origin.recv(100) == b"x"
        finally:
            others.kill()
    assert len(seen) >= 6


def test_a_full_buffer_holds_up_nothing(tmp_path):
    # Of Unix sockets: over loopback, UDP's are never full.
    ours = gevent.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs = gevent.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.bind(str(tmp_path / "full"))
        with pytest.raises(BlockingIOError):
            while True:
                socks_udp._send_now(ours, bytes(1000), str(tmp_path / "full"))


# -- how many ----------------------------------------------------------------------------------------------------------


def test_associations_of_a_client_are_limited(proxy, connect, in_thread, lines):
    server = proxy("[limits]\nclient_udp_associations = 2")
    first = connect(server)
    associate(first, in_thread)
    associate(connect(server), in_thread)
    assert server.stats().handler_gauges["udp_associations"] == 2
    refused = connect(server)
    refused.sendall(b"\x05\x01\x00\x05\x03\x00\x01" + bytes(6))
    assert in_thread(read, refused, 100)[2:4] == b"\x05\x01"
    assert (lines()[0]["result"], lines()[0]["detail"]) == ("limit", "client_udp_associations")
    first.close()
    wait_until(lambda: server.stats().handler_gauges["udp_associations"] == 1)
    assert associate(connect(server), in_thread)


ADA, BOB = ("192.0.2.1", 1), ("192.0.2.2", 1)


@pytest.fixture(params=["one process", "two workers"])
def keepers(request):
    """`keepers(**limits)`: the associations of two workers, or twice those of one process."""
    memory = SharedMemory.make(2)
    memory.words[CLAIMED] = 2

    def make(**limits):
        if request.param == "one process":
            return [LimitKeeper(Limits(**limits)).associations] * 2
        made = [LimitKeeper(Limits(**limits)) for _ in range(2)]
        for number, keeper in enumerate(made):
            keeper.share(Column(memory, number))
        return [keeper.associations for keeper in made]

    yield make
    memory.close()


def test_associations_are_counted_together(keepers):
    one, two = keepers(udp_associations=3, client_udp_associations=2)
    one.enter(ADA)
    two.enter(ADA)
    for keeper in (one, two, one):
        with pytest.raises(LimitReached, match="client_udp_associations"):
            keeper.enter(ADA)
    two.enter(BOB)
    with pytest.raises(LimitReached, match=r"\] udp_associations"):
        one.enter(BOB)
    one.leave(ADA)
    one.enter(BOB)
    for keeper, address in ((one, BOB), (two, BOB), (two, ADA)):
        keeper.leave(address)
    assert (one.open, two.open) == (0, 0)
    one.enter(ADA)
