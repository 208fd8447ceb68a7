"""Datagrams to names: those that must wait for a name server hold up no others."""

import struct

from gevent.event import Event

from gtcpserver.proxy import socks_udp
from gtcpserver.proxy.gate import Gate
from gtcpserver.proxy.handler import ProxyHandler
from kit.dns_server import SILENT
from kit.proxying import ANYBODY, ANYWHERE, associate, packet, udp_socket
from kit.waiting import wait_until


def named(host, port, data):
    return b"\0\0\0\x03" + bytes([len(host)]) + host.encode() + struct.pack("!H", port) + data


def test_a_udp_association_is_not_held_up_by_one_name(dns_server, resolver_of, serve, connect, in_thread, monkeypatch):
    monkeypatch.setattr(socks_udp, "MOST_NAMES", 3)
    monkeypatch.setattr(socks_udp, "MOST_WAITING", 4)
    late, came = Event(), []
    for number in range(3):
        dns_server.tricks[f"silent{number}.test"] = lambda *_: SILENT
    dns_server.add("late.test", "A", "127.0.0.1")
    dns_server.add("good.test", "A", "127.0.0.1")

    def answer_late(query, by_tcp):
        late.wait()
        return dns_server.answer(query)

    gate = Gate(client_rules=ANYBODY, destination_rules=ANYWHERE, resolver=resolver_of(family="ipv4"))
    client = connect(serve(ProxyHandler(gate)))
    where = associate(client, in_thread)
    with udp_socket() as origin, udp_socket() as sock:
        port = origin.getsockname()[1]
        for host in ("silent0.test", "silent1.test"):
            sock.sendto(named(host, port, b"lost"), where)
        wait_until(lambda: len(dns_server.asked) == 2)
        sock.sendto(named("good.test", port, b"named"), where)
        assert origin.recv(100) == b"named"
        sock.sendto(packet(port, b"by address"), where)
        assert origin.recv(100) == b"by address"
        # Datagrams to one name keep their order, and are bounded; names, too.
        dns_server.tricks["late.test"] = answer_late
        for number in range(6):
            sock.sendto(named("late.test", port, b"%d" % number), where)
        sock.sendto(named("silent2.test", port, b"lost"), where)
        sock.sendto(named("good.test", port, b"last"), where)
        assert origin.recv(100) == b"last"
        assert dns_server.asked[-1] == ("late.test", "A")
        late.set()
        for _ in range(4 + 1):
            came.append(origin.recv(100))
            if len(came) == 4:
                sock.sendto(named("late.test", port, b"after"), where)
        assert came == [b"0", b"1", b"2", b"3", b"after"]
