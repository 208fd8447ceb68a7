"""Which of IPv4 and IPv6 `*` and a name listen on, in networks that have not got all of IPv6."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from kit.patience import SOON

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "sysctl", "unshare"))),
    reason="needs root, ip(8), sysctl(8) and unshare(1)",
)

PROGRAM = """
import socket, sys
from gtcpserver.listening.listener import ListenConfig, open_listeners

def reached(address, *hosts, config=None, name="*:0"):
    listeners = open_listeners(name, config)
    print(listeners[0].address.rpartition(":")[0], len(listeners))
    port = listeners[0].sockaddr[1]
    for host in hosts:
        try:
            socket.create_connection((host, port), 5).close()
            print("yes")
        except OSError:
            print("no")
"""


def in_network(*lines: str) -> list[str]:
    """What a program prints in a network of its own; lines that begin with $ are the shell's, and come first."""
    shell = ["set -e", *(line[1:] for line in lines if line.startswith("$"))]
    python = PROGRAM + "\n".join(line for line in lines if not line.startswith("$"))
    script = "; ".join([*shell, f'exec "{sys.executable}" -c "$PROGRAM"'])
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=SOON,
        env={**os.environ, "PROGRAM": python},
    )
    if "unshare:" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no network namespaces: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


WITHOUT_LOOPBACK = (
    "$ip link set lo up",
    "$ip -6 addr del ::1/128 dev lo",
    "$ip addr add fd00:7::1/128 dev lo nodad",
)


@pytest.mark.slow
def test_the_wildcard_takes_both_where_only_the_loopback_interface_has_no_ipv6() -> None:
    assert in_network(*WITHOUT_LOOPBACK, 'reached("*", "fd00:7::1", "127.0.0.1")') == ["* 1", "yes", "yes"]


def test_a_name_loses_only_the_loopback_address_that_is_missing() -> None:
    told = in_network(
        *WITHOUT_LOOPBACK,
        "from gtcpserver.listening import listener",
        "def named(*addresses):",
        "    listener._getaddrinfo = lambda *a, **k: [",
        "        (socket.AF_INET6, 1, 6, '', (one, 0, 0, 0)) if ':' in one else (socket.AF_INET, 1, 6, '', (one, 0))",
        "        for one in addresses]",
        'named("::1", "127.0.0.1")',
        'reached("localhost", "127.0.0.1", name="localhost:0")',
        'named("127.0.0.1", "fd00:7::1")',
        'reached("host", "fd00:7::1", name="host:0")',
    )
    assert told == ["127.0.0.1 1", "yes", "127.0.0.1 2", "yes"]


@pytest.mark.slow
def test_the_wildcard_takes_ipv6_addresses_that_come_later() -> None:
    told = in_network(
        "$ip link set lo up",
        "$sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
        "import subprocess",
        "one, = open_listeners('*:0')",
        "socket.create_connection(('127.0.0.1', one.sockaddr[1]), 5)",
        "subprocess.run(['sysctl', '-qw', 'net.ipv6.conf.all.disable_ipv6=0'], check=True)",
        "subprocess.run(['ip', 'addr', 'replace', '::1/128', 'dev', 'lo'], check=True)",
        "socket.create_connection(('::1', one.sockaddr[1]), 5)",
        "print(one.address.partition(':')[0])",
    )
    assert told == ["*"]


@pytest.mark.slow
def test_the_wildcard_says_so_when_it_is_one_family() -> None:
    told = in_network(
        "$ip link set lo up",
        'reached("*", "::1", "127.0.0.1", config=ListenConfig(ipv6_only=True))',
        "real = socket.socket.bind",
        "class NoIPv6(socket.socket):",
        "    def __init__(self, family=-1, *arguments, **options):",
        "        if family == socket.AF_INET6: raise OSError(97, 'Address family not supported by protocol')",
        "        super().__init__(family, *arguments, **options)",
        "from gtcpserver.listening import listener",
        "listener._socket_class = NoIPv6",
        'reached("*", "127.0.0.1")',
    )
    assert told == ["[::] 1", "yes", "no", "0.0.0.0 1", "yes"]
