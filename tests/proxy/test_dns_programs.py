"""A real name server: dnsmasq."""

import os
import socket
import subprocess

import gevent
import pytest

from gtcpserver.proxy.resolve import Resolver
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.resolving import found, refused


@pytest.fixture
def dnsmasq(tmp_path):
    port = free_port()
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"192.0.2.{number} many.test\n" for number in range(1, 101)))
    command = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--bind-interfaces", "--interface=lo"]
    command += [f"--port={port}", "--pid-file", "--conf-file=/dev/null", f"--addn-hosts={hosts}", "--local=/test/"]
    command += ["--host-record=both.test,192.0.2.1,2001:db8::1,7", "--cname=alias.test,both.test", "--local-ttl=9"]
    if os.geteuid() == 0:
        command.append("--user=root")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.slow
@needs("dnsmasq")
def test_dnsmasq(dnsmasq, name_files):
    name_files("search test\n")
    one = Resolver(servers=[dnsmasq])
    with gevent.Timeout(SOON):
        while refused(one, "ready.test").errno != socket.EAI_NONAME:  # it is starting
            one.close()
            one = Resolver(servers=[dnsmasq])
            gevent.sleep(0.02)
    addresses = one.resolve("both")
    assert (" ".join(map(str, addresses)), addresses.name) == ("2001:db8::1 192.0.2.1", "both.test")
    assert found(one, "alias.test") == "2001:db8::1 192.0.2.1"
    assert len(one.resolve("many.test")) == 8  # it is truncated, and comes over TCP
    assert refused(one, "nobody.test").errno == socket.EAI_NONAME
    assert refused(one, "elsewhere.example").errno == socket.EAI_AGAIN  # REFUSED: it knows nobody to ask
    one.close()
