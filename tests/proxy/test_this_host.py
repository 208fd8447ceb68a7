"""The host's own addresses are denied like loopback: a firewall may keep clients from what listens there."""

import errno
import os
import platform
import shutil
import socket
import struct
import textwrap
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.errors import ConfigError
from gtcpserver.proxy import this_host
from gtcpserver.proxy.config import parse_config
from gtcpserver.proxy.rules import RuleMatch, decide_destination, parse_destination_rule
from gtcpserver.proxy.target import addresses_meant, parse_nat64
from gtcpserver.proxy.this_host import ThisHost, answer, question
from kit.programs import run_in_network

# -- the kernel's answers ----------------------------------------------------------------------------------------------


def header(kind, number, body):
    return struct.pack("=IHHII", 16 + len(body), kind, 0, number, 0) + body


def route(kind, number=7):
    return header(24, number, bytes([socket.AF_INET, 32, 0, 0, 255, 0, 0, kind, 0, 0, 0, 0]) + bytes(8))


def error(code, number=7):
    return header(2, number, struct.pack("=i", -code) + bytes(16))


@pytest.mark.parametrize(
    ("data", "own"),
    [
        (route(2), True),  # RTN_LOCAL
        (route(4), True),  # RTN_ANYCAST
        (route(1), False),  # RTN_UNICAST
        (route(3), False),  # RTN_BROADCAST
        (error(errno.ENETUNREACH), False),
        (error(errno.EHOSTUNREACH), False),
        (error(errno.EACCES), False),  # a route that prohibits
        (error(errno.EINVAL), False),  # a black hole
        (route(2, 8), None),  # about something else
        (error(errno.EPERM, 8), None),
    ],
)
def test_what_the_kernel_says(data, own):
    assert answer(data, 7) is own


@pytest.mark.parametrize(
    "data", [b"", route(2)[:19], header(3, 7, bytes(12)), error(errno.EPERM), error(errno.ENOBUFS)]
)
def test_what_says_nothing(data):
    with pytest.raises(OSError):
        answer(data, 7)


def test_the_end_of_an_answer_does_not_matter():
    assert answer(route(2)[:24], 7) is True
    with pytest.raises(OSError):
        answer(route(2)[:23], 7)


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_any_bytes_are_an_answer_or_an_error(data, number):
    with suppress(OSError):
        assert answer(data, number) in (True, False, None)


@given(st.ip_addresses(), st.integers(0, 2**32 - 1))
def test_a_question_is_one_netlink_message(ip, number):
    data = question(ip, number)
    length, kind, flags, about, _ = struct.unpack_from("=IHHII", data)
    assert (length, kind, flags, about) == (len(data), 26, 1, number)
    assert data[17] == 8 * len(ip.packed)
    assert data[28:32] == struct.pack("=HH", 4 + len(ip.packed), 1)
    assert data[32:] == ip.packed


# -- the kernel in a bad mood ------------------------------------------------------------------------------------------


class Kernel:
    """A netlink socket whose answers a test makes up; each is a function of the number of the question."""

    opened = closed = 0

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, *_):
        self.opened += 1
        return self

    def setblocking(self, _):
        pass

    def sendto(self, data, _):
        self.number = struct.unpack_from("=I", data, 8)[0]

    def recv(self, _):
        if not self.answers:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        given = self.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given(self.number)

    def close(self):
        self.closed += 1


def local(number):
    return route(2, number)


def test_for_lack_of_memory_the_question_fails_and_the_next_one_is_asked_anew(monkeypatch, caplog):
    kernel = Kernel(local, OSError(errno.ENOBUFS, "no room"), local, lambda number: route(1, number))
    monkeypatch.setattr(this_host, "_socket_class", kernel)
    host = ThisHost()
    with pytest.raises(OSError, match="no room"):
        host.has(ip_address("192.0.2.1"))
    assert kernel.closed == 1
    assert host.has(ip_address("192.0.2.1")) is False
    assert (kernel.opened, kernel.closed) == (2, 1)
    assert not caplog.records


def test_no_answer_is_no_permission(monkeypatch):
    monkeypatch.setattr(this_host, "_socket_class", Kernel(local))
    with pytest.raises(BlockingIOError):
        ThisHost().has(ip_address("192.0.2.1"))


def test_what_is_left_of_an_earlier_question_is_passed_over(monkeypatch):
    kernel = Kernel(local, lambda number: route(1, number - 1), local)
    monkeypatch.setattr(this_host, "_socket_class", kernel)
    assert ThisHost().has(ip_address("192.0.2.1")) is True
    assert not kernel.answers


@pytest.mark.parametrize(
    "answers",
    [
        [lambda number: error(errno.EPERM, number)],
        [lambda number: error(errno.EOPNOTSUPP, number)],
        [lambda number: route(1, number)],  # gVisor: 127.0.0.1 is anywhere
        [lambda number: b""],
    ],
)
def test_a_kernel_that_does_not_say_is_not_asked_again(monkeypatch, caplog, answers):
    kernel = Kernel(*answers)
    monkeypatch.setattr(this_host, "_socket_class", kernel)
    host = ThisHost()
    for _ in range(3):
        assert host.has(ip_address("127.0.0.1"))
        assert not host.has(ip_address("203.0.113.77"))
    assert (kernel.opened, kernel.closed) == (1, 1)
    assert len(caplog.records) == 1
    assert "netlink refused" in caplog.text


def test_a_kernel_without_ipv6_is_asked_about_ipv4_addresses_all_the_same(monkeypatch, caplog):
    """Any client may ask for an IPv6 address. The interfaces know less: not what is local by route alone."""
    unsupported = partial(error, errno.EOPNOTSUPP)
    kernel = Kernel(local, unsupported, *[local, local] * 3)
    monkeypatch.setattr(this_host, "_socket_class", kernel)
    host = ThisHost()
    assert not host.has(ip_address("2001:db8::1"))
    for _ in range(3):
        assert host.has(ip_address("192.0.2.1"))
        assert not host.has(ip_address("2001:db8::1"))
    assert len(caplog.records) == 1
    assert "netlink refused to say which IPv6 addresses" in caplog.text


def test_the_real_kernel():
    host = ThisHost()
    assert host.has(ip_address("127.0.0.1"))
    assert host.has(ip_address("127.200.0.1"))
    assert not host.has(ip_address("203.0.113.77"))
    child = os.fork()
    if not child:  # which has a socket of its own
        inherited = host._socket
        os._exit(0 if host.has(ip_address("127.0.0.1")) and host._socket is not inherited else 1)
    assert os.waitpid(child, 0)[1] == 0
    host.close()
    assert host.has(ip_address("127.0.0.1"))
    host.close()


# -- rules -------------------------------------------------------------------------------------------------------------


def reach(rules, ip, own, nat64=()):
    ip = ip_address(ip)
    nat64 = tuple(map(parse_nat64, nat64))
    own = [one for one in addresses_meant(ip, nat64) if str(one) in own.split()]
    return decide_destination(
        [parse_destination_rule(rule) for rule in rules],
        RuleMatch(ip_address("192.0.2.7"), "office", None, None, 443),
        None,
        ip,
        nat64=nat64,
        own=own,
    ).allowed


def test_own_addresses_need_a_rule_that_names_them():
    assert reach(["allow any"], "8.8.4.4", "")
    for rule in ("any", "0.0.0.0/0", "8.8.4.0/24", "8.8.4.4/31", "private", "loopback", "8.8.4.5"):
        assert not reach([f"allow {rule}"], "8.8.4.4", "8.8.4.4"), rule
    for rule in ("this-host", "this-host:443", "8.8.4.4"):
        assert reach([f"allow {rule}"], "8.8.4.4", "8.8.4.4"), rule
    assert not reach(["allow this-host"], "8.8.4.5", "8.8.4.4")
    assert not reach(["deny this-host", "allow 8.8.4.4"], "8.8.4.4", "8.8.4.4")


def test_own_private_addresses_are_this_host_too():
    assert not reach(["allow private"], "10.0.0.1", "10.0.0.1")
    assert not reach(["allow 10.0.0.0/8"], "10.0.0.1", "10.0.0.1")
    assert reach(["allow private"], "10.0.0.2", "10.0.0.1")
    assert reach(["allow this-host"], "10.0.0.1", "10.0.0.1")
    assert reach(["allow fd00::1"], "fd00::1", "fd00::1")
    # A rule that denies them by the other name goes on to do so.
    assert not reach(["deny private", "allow this-host"], "10.0.0.1", "10.0.0.1")


def test_loopback_stays_loopback():
    assert not reach(["allow this-host"], "127.0.0.1", "127.0.0.1")
    assert reach(["allow loopback"], "127.0.0.1", "127.0.0.1")
    assert reach(["allow metadata"], "169.254.169.254", "169.254.169.254")


@pytest.mark.parametrize(
    "ip", ["2002:808:404::1", "64:ff9b::8.8.4.4", "::ffff:0:8.8.4.4", "64:ff9b:1::8.8.4.4", "fe80::5efe:8.8.4.4"]
)
def test_own_addresses_within_addresses(ip):
    rules = ["allow any", "allow link-local", "allow reserved"]
    assert reach(rules, ip, "")
    assert not reach(rules, ip, "8.8.4.4")
    assert reach([*rules, "allow this-host"], ip, "") == reach(rules, ip, "")


# -- NAT64 -------------------------------------------------------------------------------------------------------------

#: RFC 6052 section 2.4: 192.0.2.33 behind prefixes of each length.
OF_RFC_6052 = [
    ("2001:db8::/32", "2001:db8:c000:221::"),
    ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
    ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
    ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100:0"),
    ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
]


@pytest.mark.parametrize(("prefix", "ip"), OF_RFC_6052)
def test_addresses_behind_prefixes_of_every_length(prefix, ip):
    ip = ip_address(ip)
    assert addresses_meant(ip, (parse_nat64(prefix),)) == (ip, ip_address("192.0.2.33"))
    assert addresses_meant(ip) == (ip,)


@pytest.mark.slow
@given(st.sampled_from(OF_RFC_6052), st.ip_addresses(v=4), st.integers(0, 2**64 - 1))
def test_the_rest_of_an_address_behind_a_prefix_hides_nothing(prefix_and_ip, inner, noise):
    """Bits that must be zero, and what a gateway may pass over."""
    prefix = parse_nat64(prefix_and_ip[0])
    length = prefix.prefixlen
    text = f"{int(prefix.network_address):0128b}"[:length] + f"{int(inner):032b}"
    if length < 96:
        text = text[:64] + f"{noise & 0xFF:08b}" + text[64:]
    text = (text + f"{noise:064b}")[:128]
    ip = ip_address(int(text.ljust(128, "0"), 2).to_bytes(16, "big"))
    assert inner in addresses_meant(ip, (prefix,))


@pytest.mark.parametrize(
    ("ip", "inner"),
    [
        ("64:ff9b:1::169.254.169.254", "169.254.169.254"),
        ("64:ff9b:1:a9fe:a9:fe00::", "169.254.169.254"),  # a prefix of 48 bits
        ("64:ff9b:1:a9fe:a9:fe00:808:808", "169.254.169.254"),
        ("64:ff9b:1:a9:fe:a9fe::", "169.254.169.254"),  # of 56
        ("64:ff9b:1:5:a9:fea9:fe00:0", "169.254.169.254"),  # of 64
        ("::ffff:0:127.0.0.1", "127.0.0.1"),
    ],
)
def test_prefixes_that_are_the_same_everywhere(ip, inner):
    assert ip_address(inner) in addresses_meant(ip_address(ip))


def test_a_configured_length_is_the_only_one():
    ip = ip_address("64:ff9b:1:808:8:800::")
    assert ip_address("0.0.0.0") in addresses_meant(ip)
    assert addresses_meant(ip, (parse_nat64("64:ff9b:1::/48"),)) == (ip, ip_address("8.8.8.8"))


def test_a_prefix_in_the_file_counts():
    assert reach(["allow any"], "2a00:64::10.0.0.1", "")
    assert not reach(["allow any"], "2a00:64::10.0.0.1", "", ["2a00:64::/96"])
    assert not reach(["allow any"], "2a00:64::8.8.4.4", "8.8.4.4", ["2a00:64::/96"])
    assert reach(["allow any"], "2a00:64::8.8.4.4", "", ["2a00:64::/96"])
    assert reach(["allow private"], "2a00:64::10.0.0.1", "", ["2a00:64::/96"])


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("2001:db8::/33", "one of the lengths 32, 40, 48, 56, 64, 96"),
        ("2001:db8::/128", "one of the lengths"),
        ("10.0.0.0/8", "must have IPv6 networks"),
        ("2001:db8::1/96", "host bits set"),
        ("x", "must have IPv6 networks, got 'x'"),
    ],
)
def test_prefixes_that_are_none(prefix, told):
    with pytest.raises(ConfigError, match=told) as raised:
        parse_config(f'[rules]\n\nnat64 = ["2001:db8::/96", "{prefix}"]', "proxy.toml")
    assert str(raised.value).startswith("proxy.toml line 3: ")


# -- on a host of several addresses ------------------------------------------------------------------------------------

#: What a client is told about each address. A service of this host listens on all of them.
NETWORK = """
    import ctypes, struct, subprocess, sys, time
    from ipaddress import ip_address

    import gevent.socket
    from gtcpserver import Server
    from gtcpserver.proxy.config import make_proxy, parse_config

    def told_by(*command):
        return subprocess.run(["ip", "-6", *command], check=True, capture_output=True, text=True).stdout

    def run(commands):
        subprocess.run(["sh", "-ec", commands], check=True)
        # The kernel gives a new IPv6 address its route a moment later, even without duplicate address detection.
        for line in told_by("-o", "addr", "show", "scope", "global").splitlines():
            while f"local {line.split()[3].partition('/')[0]} " not in told_by("route", "show", "table", "local"):
                time.sleep(0.01)

    run('''
        for of in all default; do sysctl -qw net.ipv6.conf.$of.accept_dad=0; done
        ip link set lo up
        ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up
        for address in 8.8.4.4/24 8.8.4.5/24 10.9.1.1/24 2a00:1::1/64; do ip addr add $address dev v0; done
        ip route add local 9.9.9.0/24 dev lo && ip -6 route add local 2a00:2::/64 dev lo
        sysctl -qw net.ipv6.conf.all.forwarding=1  # 2a00:1:: is all routers' address, and so this one's
    ''')

    def hello(conn):
        conn.sendall(b"hello")

    def ask(destination, port=None, proxy_port=None):
        "The reply's code, and what the service says."
        client = gevent.socket.create_connection(("127.0.0.1", proxy_port or proxy.port), 60)
        ip = ip_address(destination)
        kind = 1 if ip.version == 4 else 4
        client.sendall(bytes([5, 1, 0, 5, 1, 0, kind]) + ip.packed + struct.pack("!H", port or service.port))
        data = b""
        while more := client.recv(1000):
            data += more
        client.close()
        return data[3], data.endswith(b"hello")

    def proxy_with(*rules):
        text = f'[[listener]]\\nlisten = "127.0.0.1:0"\\n[rules]\\ndestinations = {list(rules)!r}'
        made = make_proxy(parse_config(text))
        return Server("127.0.0.1:0", made.handler)

    DENIED, REACHED = (2, False), (0, True)
    {before}
    with Server("[::]:0", hello) as service, proxy_with(*{rules!r}) as proxy:
        {what}
"""

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "sysctl", "unshare"))),
    reason="needs root, ip(8), sysctl(8) and unshare(1)",
)


def in_network(what, *rules, before=""):
    """Run a program on a host of its own; what it has logged."""
    source = textwrap.dedent(NETWORK).replace("{what}", textwrap.indent(textwrap.dedent(what), " " * 4).strip())
    source = source.replace("{rules!r}", repr(rules or ("allow any",))).replace("{before}", textwrap.dedent(before))
    return run_in_network(source).stderr


@pytest.mark.slow
@needs_namespaces
def test_no_address_of_this_host_is_reached(in_thread):
    in_thread(
        in_network,
        """
        # Each is the service's, as a client of this host sees: also those that no interface has.
        for one in ("8.8.4.4", "8.8.4.5", "10.9.1.1", "9.9.9.9", "2a00:1::1", "2a00:2::7"):
            gevent.socket.create_connection((one, service.port), 60).close()
            assert ask(one) == DENIED, one
        assert ask("2a00:1::") == DENIED  # anycast, for datagrams alone
        for one in ("2002:808:404::1", "64:ff9b::8.8.4.5", "::ffff:0:8.8.4.4", "::ffff:8.8.4.4"):
            assert ask(one) == DENIED, one
        """,
    )


@pytest.mark.slow
@needs_namespaces
def test_addresses_come_and_go_while_the_proxy_runs(in_thread):
    in_thread(
        in_network,
        """
        # Not ours yet: there is no way to it.
        assert ask("8.8.8.8")[0] in (3, 4)
        run("ip addr add 8.8.8.8/32 dev v0; ip addr add 2a00:8::8/128 dev v0")
        assert ask("8.8.8.8") == ask("2a00:8::8") == DENIED
        run("ip addr del 8.8.8.8/32 dev v0; ip addr del 2a00:8::8/128 dev v0")
        assert ask("8.8.8.8")[0] in (3, 4)
        """,
    )


@pytest.mark.slow
@needs_namespaces
def test_rules_that_name_this_host_lead_there(in_thread):
    in_thread(
        in_network,
        """
        for one in ("8.8.4.4", "8.8.4.5", "10.9.1.1", "9.9.9.9", "2a00:1::1"):
            assert ask(one) == REACHED, one
        with proxy_with("allow 8.8.4.5", "allow 8.8.4.0/24", "allow any") as other:
            assert ask("8.8.4.5", proxy_port=other.port) == REACHED
            assert ask("8.8.4.4", proxy_port=other.port) == DENIED
        """,
        "allow this-host",
    )


@pytest.mark.slow
@needs_namespaces
def test_the_proxy_is_not_reached_by_a_secondary_address(in_thread):
    in_thread(
        in_network,
        """
        with Server("0.0.0.0:0", proxy.handler) as everywhere:
            for one in ("8.8.4.4", "8.8.4.5", "9.9.9.9", "127.0.0.1"):
                assert ask(one, everywhere.port, everywhere.port) == DENIED, one
        assert proxy.handler.counters["destination_denied"] == 4, proxy.handler.counters
        """,
        "allow this-host",
        "allow loopback",
    )


#: seccomp(2): socket(AF_NETLINK, ...) fails with EAFNOSUPPORT, as under systemd's RestrictAddressFamilies.
WITHOUT_NETLINK = """
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

program = b"".join(struct.pack("=HBBI", *one) for one in [
    (0x20, 0, 0, 0),           # load the number of the system call
    (0x15, 0, 3, {socket}),
    (0x20, 0, 0, 16),          # load its first argument
    (0x15, 0, 1, 16),          # AF_NETLINK
    (0x06, 0, 0, 0x00050061),  # SECCOMP_RET_ERRNO, EAFNOSUPPORT
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
])
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0) == 0  # PR_SET_SECCOMP
"""


@pytest.mark.slow
@needs_namespaces
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the system call's number is not known")
def test_without_netlink_the_interfaces_are_looked_at(in_thread):
    number = 41 if platform.machine() == "x86_64" else 198
    logged = in_thread(
        lambda: in_network(
            """
            for _ in range(2):
                for one in ("8.8.4.4", "8.8.4.5", "10.9.1.1", "9.9.9.9", "2a00:1::1", "2002:808:404::1"):
                    assert ask(one) == DENIED, one
            """,
            before=WITHOUT_NETLINK.replace("{socket}", str(number)),
        )
    )
    told = [line for line in logged.splitlines() if "netlink" in line]
    assert len(told) == 1
    assert "netlink refused (Address family not supported by protocol)" in told[0]
