"""The proxy on a host with several addresses, and behind a router: in network namespaces, where both can be had."""

import os
import shutil
import textwrap

import pytest

from kit.programs import run_in_network

#: Ours has v0 with several addresses, and w0 as of a VPN, whose addresses nobody on the other side of v0 knows. Behind
#: v0 are an origin, which says who has come, and a router to 10.9.2.0/24 and fd00:2::/64.
NETWORK = """
    import struct, subprocess, sys, textwrap
    from ipaddress import ip_address

    import gevent.socket
    from gtcpserver import Server
    from gtcpserver.proxy.gate import Gate
    from gtcpserver.proxy.handler import ProxyHandler
    from gtcpserver.proxy.rules import parse_client_rule, parse_destination_rule

    ORIGIN = '''
        import socket
        server = socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True)
        print(flush=True)
        while True:
            client, peer = server.accept()
            client.sendall(peer[0].removeprefix("::ffff:").encode())
            client.close()
    '''
    LINKS = '''
        there="nsenter -t $0 -n"
        # Addresses that are not asked about first: that takes two seconds.
        for of in all default; do for in in "" "$there"; do $in sysctl -qw net.ipv6.conf.$of.accept_dad=0; done; done
        ip link set lo up
        ip link add v0 type veth peer name v1 && ip link set v1 netns $0
        ip link add w0 type veth peer name w1 && ip link set w1 netns $0
        for address in 10.9.1.1/24 10.9.1.3/24 fd00:1::1/64 fd00:1::3/64; do ip addr add $address dev v0; done
        for address in 10.8.0.1/24 10.8.0.2/24; do ip addr add $address dev w0; done
        $there ip link add x0 type veth peer name x1
        for address in 10.9.1.2/24 fd00:1::2/64; do $there ip addr add $address dev v1; done
        for address in 10.9.2.1/24 fd00:2::1/64; do $there ip addr add $address dev x0; done
        $there sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
        $there ip route add unreachable 10.9.3.0/24
        for link in v1 w1 x0 x1; do $there ip link set $link up; done
        ip link set v0 up && ip link set w0 up
        ip route add default via 10.9.1.2 && ip -6 route add default via fd00:1::2
    '''

    origin = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", textwrap.dedent(ORIGIN)], stdout=subprocess.PIPE
    )
    origin.stdout.readline()
    subprocess.run(["sh", "-ec", LINKS, str(origin.pid)], check=True)
    gate = dict(
        client_rules=[parse_client_rule("allow any")],
        destination_rules=[parse_destination_rule("allow private"), parse_destination_rule("allow any")],
    )

    def ask(by, destination, port=7000, command=1):
        "The reply of the proxy, whose address is `by`, and what comes behind it."
        client = gevent.socket.create_connection((by, proxy.port), 60)
        ip = ip_address(destination)
        kind = 1 if ip.version == 4 else 4
        client.sendall(bytes([5, 1, 0, 5, command, 0, kind]) + ip.packed + struct.pack("!H", port))
        data = b""
        while more := client.recv(1000):
            data += more
            if command == 2:  # BIND: where it listens
                break
        client.close()
        reply = data[2:]
        size = 10 if reply[3:4] == b"\\x01" else 22
        return reply[:size], reply[size:].decode()

    try:
        with Server("[::]:0", ProxyHandler(Gate(**gate))) as proxy:
            {what}
    finally:
        origin.kill()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "sysctl", "unshare"))),
        reason="needs root, ip(8), nsenter(1), sysctl(8) and unshare(1)",
    ),
]


def in_network(what):
    """What the program writes, of which `what` are the last lines."""
    source = textwrap.dedent(NETWORK).replace("{what}", textwrap.indent(textwrap.dedent(what), " " * 8).strip())
    return run_in_network(source).stdout.split()


def test_requirement_38_destinations_are_connected_from_the_address_the_client_has_chosen(in_thread):
    told = in_thread(
        in_network,
        """
        print(ask("10.9.1.1", "10.9.1.2")[1])
        print(ask("10.9.1.3", "10.9.1.2")[1])
        print(ask("fd00:1::1", "fd00:1::2")[1])
        print(ask("fd00:1::3", "fd00:1::2")[1])
        # BIND, too: FTP expects data from the host that it has connected to.
        print(ip_address(ask("10.9.1.3", "10.9.1.2", command=2)[0][4:8]))
        """,
    )
    assert told == ["10.9.1.1", "10.9.1.3", "fd00:1::1", "fd00:1::3", "10.9.1.3"]


def test_requirement_38_but_not_from_an_address_to_which_no_answer_finds_back(in_thread):
    told = in_thread(
        in_network,
        """
        print(ask("10.8.0.2", "10.9.1.2")[1])  # of another interface
        print(ask("127.0.0.1", "10.9.1.2")[1])
        subprocess.run(["ip", "addr", "del", "10.9.1.3/24", "dev", "v0"], check=True)
        print(ask("10.9.1.1", "10.9.1.2")[1])
        """,
    )
    assert told == ["10.9.1.1"] * 3


def test_requirement_07_a_router_that_says_ttl_expired_has_its_reply(in_thread):
    told = in_thread(
        in_network,
        """
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_default_ttl=1", "net.ipv6.conf.v0.hop_limit=1"], check=True)
        for by, destination in [("10.9.1.1", "10.9.2.2"), ("fd00:1::1", "fd00:2::2")]:
            print(ask(by, destination)[0][1])
        print(dict(proxy.handler.counters)["unreachable"])
        # Of a host that is not there a router says something else.
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_default_ttl=64"], check=True)
        print(ask("10.9.1.1", "10.9.3.1")[0][1])
        """,
    )
    assert told == ["6", "6", "2", "4"]
