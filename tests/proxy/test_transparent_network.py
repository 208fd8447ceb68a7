"""Transparent mode behind real firewall rules, those of docs/proxy.md: a client, the proxy on a router, and an origin,
each in a network namespace of its own."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from kit.doc_blocks import find_blocks
from kit.patience import SOON
from kit.waiting import wait_until

PROGRAMS = ("curl", "ip", "ip6tables", "iptables", "nft", "nsenter", "sysctl", "unshare")

CLONE_NEWNET = 0x40000000  # linux/sched.h

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)), reason=f"needs root and {', '.join(PROGRAMS)}"
    ),
]

#: Not all kernels have all of this.
PROBE = """
    id proxy
    nft 'table inet probe { chain c { type nat hook output priority -100; tcp dport 1 redirect to :1; }; }'
    for tables in iptables ip6tables; do
        $tables -t nat -A OUTPUT -p tcp -m owner --uid-owner proxy -m multiport --dports 1,2 -j REDIRECT --to-ports 1
        $tables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1 --tproxy-mark 1
    done
"""

LINKS = """
    in_() { local in=$1; shift; nsenter -t $in -n "$@"; }
    for pid in $CLIENT $PROXY $ORIGIN; do
        # Addresses that are not asked about first: that takes two seconds.
        for of in all default; do in_ $pid sysctl -qw net.ipv6.conf.$of.accept_dad=0; done
        in_ $pid ip link set lo up
    done
    in_ $PROXY ip link add lan0 type veth peer name eth0 netns $CLIENT
    in_ $PROXY ip link add wan0 type veth peer name eth0 netns $ORIGIN
    in_ $PROXY sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    set_up() { for one in $3 $4; do in_ $1 ip addr add $one dev $2; done; in_ $1 ip link set $2 up; }
    set_up $CLIENT eth0 192.168.1.2/24 fd00:1::2/64
    set_up $PROXY lan0 192.168.1.1/24 fd00:1::1/64
    set_up $PROXY wan0 192.168.2.1/24 fd00:2::1/64
    set_up $ORIGIN eth0 192.168.2.2/24 fd00:2::2/64
    for pid in $CLIENT:1 $ORIGIN:2; do
        in_ ${pid%:*} ip route add default via 192.168.${pid#*:}.1
        in_ ${pid%:*} ip -6 route add default via fd00:${pid#*:}::1
    done
"""

ORIGIN = """
    import asyncio, ssl, sys

    async def answer(reader, writer):
        "With its caller's address."
        try:
            await reader.readuntil(b"\\r\\n\\r\\n")
            body = writer.get_extra_info("peername")[0].removeprefix("::ffff:").encode()
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
            await writer.drain()
        except (EOFError, OSError):
            pass
        writer.close()

    async def greet(reader, writer):
        "As servers that speak first; then an echo."
        writer.write(b"220 hello\\r\\n")
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def main():
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(sys.argv[1])
        await asyncio.start_server(answer, None, 80)
        await asyncio.start_server(answer, None, 443, ssl=context)
        for port in (25, 26):
            await asyncio.start_server(greet, None, port)
        print(flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())
"""

CONFIG = """
    [[listener]]
    name = "lan"
    listen = "*:1081"
    speaks = "transparent"
    name_timeout = {name_timeout}
    {more}

    [[listener]]
    name = "socks"
    listen = "*:1080"

    [rules]
    clients = ["allow from 192.168.0.0/16 to any", "allow from fd00::/16 to any", "allow from 127.0.0.1 to any"]
    destinations = ["deny .ads.example", "allow private"]

    [log]
    file = "{log}"
    style = "json"
"""


class Network:
    """The namespaces, of which each lasts as long as its process."""

    def __init__(self, folder, stack):
        self.folder = folder
        self._stack = stack
        probed = subprocess.run(["unshare", "--net", "bash", "-ec", PROBE], capture_output=True, text=True)
        if probed.returncode:
            pytest.skip(f"no firewall in network namespaces: {probed.stderr}")
        unshared = [self.popen("unshare", "--net", "sleep", "infinity") for _ in range(3)]
        self.client, self.proxy, self.origin = (process.pid for process in unshared)
        ours = os.readlink("/proc/self/ns/net")
        wait_until(lambda: ours not in [os.readlink(f"/proc/{process.pid}/ns/net") for process in unshared])
        pids = {"CLIENT": str(self.client), "PROXY": str(self.proxy), "ORIGIN": str(self.origin)}
        made = subprocess.run(["bash", "-ec", LINKS], env=os.environ | pids, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespaces with veth: {made.stderr}")
        ca = trustme.CA()
        self.ca, certificate = folder / "ca.pem", folder / "origin.pem"
        ca.cert_pem.write_to_path(self.ca)
        ca.issue_cert("www.example").private_key_and_cert_chain_pem.write_to_path(certificate)
        program = [sys.executable, "-c", textwrap.dedent(ORIGIN), str(certificate)]
        self.popen(*self.inside(self.origin), *program, stdout=subprocess.PIPE).stdout.readline()

    def popen(self, *command, **options):
        process = self._stack.enter_context(subprocess.Popen(command, **options))
        self._stack.callback(process.kill)
        return process

    @staticmethod
    def inside(pid):
        return "nsenter", "-t", str(pid), "-n"

    def run(self, pid, *command, **options):
        command = [*self.inside(pid), *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def connect(self, pid, host, port):
        """A connection from a namespace (setns(2))."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/self/ns/net") as here, open(f"/proc/{pid}/ns/net") as there:
            assert setns(there.fileno(), CLONE_NEWNET) == 0
            try:
                sock = socket.socket()
            finally:
                assert setns(here.fileno(), CLONE_NEWNET) == 0
        self._stack.enter_context(sock)
        sock.settimeout(SOON)
        sock.connect((host, port))
        return sock

    def curl(self, url, address, *options, pid=None):
        """(exit status, what the origin said) of curl, to which the name in the URL has this address."""
        name, port = re.match(r"https?://([^:/]+)(:\d+)?", url).groups()
        port = port[1:] if port else 443 if url.startswith("https") else 80
        command = ["curl", "-sS", "--max-time", str(SOON), "--cacert", str(self.ca), *options]
        command += ["--resolve", f"{name}:{port}:{address}", url]
        done = subprocess.run([*self.inside(pid or self.client), *command], capture_output=True, text=True)
        return done.returncode, done.stdout

    def apply(self, *blocks):
        """Load rules as they are in the documentation, in place of those before."""
        forget = "while ip $v rule del fwmark 1; do :; done; ip $v route flush table 100 || true"
        self.run(self.proxy, "sh", "-ec", f"nft flush ruleset; for v in -4 -6; do {forget}; done")
        self.add(*blocks)

    def add(self, *blocks):
        for block in blocks:
            program = ("nft", "-f", "-") if block.language == "nft" else ("bash", "-e")
            self.run(self.proxy, *program, input=block.code)


class Proxy:
    """`gtcpserver proxy` in its namespace."""

    def __init__(self, network, more="", *options, name_timeout=SOON):
        self.log = network.folder / "access.log"
        self.log.write_text("")
        self.log.chmod(0o666)  # --worker-user proxy
        config = network.folder / "proxy.toml"
        config.write_text(textwrap.dedent(CONFIG).format(more=more, log=self.log, name_timeout=name_timeout))
        command = [
            sys.executable,
            "-m",
            "gtcpserver",
            "proxy",
            "--config",
            str(config),
            "--stop-timeout",
            "0",
            *options,
        ]
        self.process = network.popen(*network.inside(network.proxy), *command, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if "listening on" in line:
                return
        raise AssertionError("".join(lines))

    def lines(self, count):
        """The lines of the log, once there are so many."""
        wait_until(lambda: self.log.read_text().count("\n") >= count)
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.process.stderr.read()
        self.process.wait(SOON)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    folder.chmod(0o755)
    with ExitStack() as stack:
        yield Network(folder, stack)


@pytest.fixture
def proxy(network):
    """`proxy(more, *options)`: with more keys for the transparent listener."""
    started = []

    def start(more="", *options, **more_options):
        started.append(Proxy(network, more, *options, **more_options))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def documented():
    page = Path(__file__).parents[2] / "docs" / "proxy.md"
    return [block for block in find_blocks(page) if "test_transparent_network" in block.marks.get("not run", "")]


(REDIRECT_NFT, REDIRECT_IPTABLES, ROUTES, TPROXY_NFT, TPROXY_IPTABLES, OUTPUT_NFT, OUTPUT_IPTABLES) = documented()

ADDRESSES = ("192.168.2.2", "[fd00:2::2]")
OURS = ("192.168.2.1", "fd00:2::1")


def test_redirect_and_tproxy_by_nft_and_iptables_of_both_versions_for_http_and_https(network, proxy):
    one = proxy("tproxy = true", "--workers", "2")
    ways = [[REDIRECT_NFT], [REDIRECT_IPTABLES], [ROUTES, TPROXY_NFT], [ROUTES, TPROXY_IPTABLES]]
    expected = []
    for way in ways:
        network.apply(*way)
        for address, ours in zip(ADDRESSES, OURS, strict=True):
            for scheme, port in (("http", 80), ("https", 443)):
                assert network.curl(f"{scheme}://www.example/", address) == (0, ours)
                expected.append(("lan", "transparent", f"www.example:{port}", f"{address}:{port}"))
    lines = one.lines(len(expected))
    names = ("listener", "protocol", "asked", "original")
    assert sorted(tuple(line[name] for name in names) for line in lines) == sorted(expected)
    assert all(line["connected"] == line["original"] and line["received"] > 40 for line in lines)
    assert {line["client"] for line in lines} == {"192.168.1.2", "fd00:1::2"}


def for_port(block, port):
    """A rule for another port."""
    code, count = re.subn(
        r"\{ 80, 443 \}|-m multiport --dports 80,443",
        {"nft": str(port)}.get(block.language, f"--dport {port}"),
        block.code,
    )
    assert count == 1
    return dataclasses.replace(block, code=code)


def test_a_server_that_speaks_first_and_a_tunnel_that_moves_at_a_reload(network, proxy):
    one = proxy("tproxy = true", "--workers", "1", "--handover", "--probation", "0", name_timeout=0.1)
    tunnels = []
    network.apply()
    for port, rules in ((25, [for_port(REDIRECT_NFT, 25)]), (26, [ROUTES, for_port(TPROXY_IPTABLES, 26)])):
        network.add(*rules)
        tunnels.append(network.connect(network.client, "192.168.2.2", port))
        assert tunnels[-1].recv(100) == b"220 hello\r\n"
    one.process.send_signal(signal.SIGHUP)
    for line in one.process.stderr:
        if "is done" in line:
            break
    for tunnel in tunnels:
        tunnel.sendall(b"still here")
        assert tunnel.recv(100) == b"still here"
        tunnel.close()
    assert {line["original"] for line in one.lines(2)} == {"192.168.2.2:25", "192.168.2.2:26"}
    for line in one.lines(2):
        assert (line["asked"], line["result"]) == (line["original"], "ok")
        assert (line["sent"], line["received"]) == (10, 21)


def test_this_hosts_own_programs_but_not_the_proxy(network, proxy):
    one = proxy("", "--workers", "1", "--worker-user", "proxy")
    for rules in (OUTPUT_NFT, OUTPUT_IPTABLES):
        network.apply(rules)
        for address, ours in zip(ADDRESSES, OURS, strict=True):
            assert network.curl("http://www.example/", address, pid=network.proxy) == (0, ours)
    assert [line["asked"] for line in one.lines(4)] == ["www.example:80"] * 4


def test_clients_of_the_listener_itself_and_loops_are_refused(network, proxy):
    one = proxy("tproxy = true")
    network.apply()
    for address in ("192.168.1.1", "[fd00:1::1]"):
        assert network.curl("http://www.example:1081/", address) != (0, "")
    assert [line["result"] for line in one.lines(2)] == ["not_redirected"] * 2
    everybody = dataclasses.replace(OUTPUT_NFT, code=OUTPUT_NFT.code.replace("meta skuid != proxy ", ""))
    network.apply(everybody)
    assert network.curl("http://www.example/", "192.168.2.2", pid=network.proxy)[0] != 0
    assert "loop" in [line["result"] for line in one.lines(4)]
    assert len(one.lines(4)) < 7
