"""docs/how-to/many-machines.md: its configurations, its command line, its table, and what it says of tickets."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gtcpserver import TLSConfig
from gtcpserver.shared.memory import SharedMemory
from gtcpserver.tls import ticket_keys
from kit.doc_blocks import find_blocks
from kit.paths import ROOT
from kit.patience import SOON
from kit.ports import free_port
from kit.programs import needs
from kit.tls import Files, client_context
from loadtests.bench import sizing

PAGE = ROOT / "docs" / "how-to" / "many-machines.md"
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

APP = """
from gtcpserver import EarlyEOF

def handle(conn):
    try:
        while conn.recv_until(b"\\n"):
            conn.sendall(f"{conn.client_address[1]} {conn.peer_address[0]}\\n".encode())
    except EarlyEOF:
        pass
"""


def block(begins):
    (found,) = (one for one in find_blocks(PAGE) if one.code.startswith(begins))
    assert "not run" in found.marks
    return found.code


@pytest.fixture
def balancer():
    """`balancer(command...)` starts a program that ends with the test."""
    processes = []

    def start(*command):
        processes.append(subprocess.Popen(command))

    yield start
    for process in processes:
        process.kill()
        process.wait()


class Machine:
    """The page's command line on this host: one worker, other addresses."""

    def __init__(self, folder):
        (folder / "app.py").write_text(APP)
        self.port, self.metrics, self.agent = (free_port() for _ in range(3))
        line = next(one for one in find_blocks(PAGE) if "gtcpserver serve" in one.code).code.replace("\\\n", " ")
        here = {"*:5000": self.port, "*:9100": self.metrics, "*:5001": self.agent}
        here = {there: f"127.0.0.1:{port}" for there, port in here.items()}
        here |= {"auto": "1", "10.0.1.0/24": "127.0.0.1", "/run/app/control": str(folder / "ctl"), "5": "0.5"}
        program, *words = shlex.split(line)
        assert program == "gtcpserver"
        assert here.keys() <= set(words)
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gtcpserver", *(here.get(word, word) for word in words)],
            cwd=folder,
            stderr=self.log.open("w"),
        )
        wait_until(lambda: "listening on" in self.log.read_text())

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(SOON) == 0, self.log.read_text()


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def wait_until(condition):
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def ask(port):
    """Whether a new connection is answered as the machine answers this client behind a balancer."""
    try:
        with socket.create_connection(("127.0.0.1", port), SOON) as client:
            client.sendall(b"x\n")
            return client.makefile("rb").readline() == f"{client.getsockname()[1]} 127.0.0.1\n".encode()
    except OSError:
        return False


def test_the_table_is_computed_from_what_was_measured():
    page = PAGE.read_text()
    between = re.search(r"<!-- sizing -->\n(.*?)<!-- end of sizing -->", page, re.DOTALL)
    table = sizing.table(sizing.read_costs(sizing.PERFORMANCE.read_text()))
    assert between[1] == table + "\n", "python -m loadtests.bench.sizing --publish"


def test_figures_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizing, "PERFORMANCE", tmp_path / "page.md")
    sizing.PERFORMANCE.write_text("### Memory of 10,000 idle keep-alive connections\n\n| server | KiB each |\n")
    assert sizing.main([]) == 1
    assert "has no KiB each of gtcpserver in 'Memory of 10,000 idle" in capsys.readouterr().err


def test_sizes_are_those_of_the_kernels_objects():
    # Linux 6.18: 13 objects in 8 pages, 19 in 4, and others' that do not count.
    text = (
        "slabinfo - version: 2.1\n# name\nTCP 1 13 2368 13 8 : x\nsock_inode_cache 1 1 832 19 4\nTCPv6 1 1 2496 13 8\n"
    )
    assert {name: round(size) for name, size in sizing.object_sizes(text)} == {"TCP": 2521, "sock_inode_cache": 862}


@pytest.mark.slow
@needs("haproxy")
def test_haproxy_as_on_the_page(tmp_path, machine, balancer):
    config, port = tmp_path / "haproxy.cfg", free_port()
    text = block("global")
    for there, here in {
        "maxconn 100000": "maxconn 100",
        "bind :5000": f"bind 127.0.0.1:{port}",
        "10.0.0.1:5000": f"127.0.0.1:{machine.port}",
        "10.0.0.2:5000": f"127.0.0.1:{free_port()}",  # this one is gone
        "check port 9100": f"check port {machine.metrics}",
        "agent-port 5001": f"agent-port {machine.agent}",
        "inter 1s": "inter 100ms",
    }.items():
        assert there in text
        text = text.replace(there, here)
    config.write_text(text)
    done = subprocess.run(["haproxy", "-c", "-f", str(config)], capture_output=True, text=True)
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
    balancer("haproxy", "-db", "-q", "-f", str(config))
    wait_until(lambda: ask(port))
    assert all(ask(port) for _ in range(20))
    machine.stop()
    assert not ask(port)


@pytest.mark.slow
@needs("nginx")
@pytest.mark.skipif(not STREAM_MODULE.exists(), reason="nginx has no stream module (libnginx-mod-stream)")
def test_nginx_as_on_the_page(tmp_path, machine, balancer):
    config, port = tmp_path / "nginx.conf", free_port()
    text = block("stream")
    for there, here in {
        "listen 5000": f"listen 127.0.0.1:{port}",
        "10.0.0.1:5000": f"127.0.0.1:{free_port()}",  # refused: the other one is tried
        "10.0.0.2:5000": f"127.0.0.1:{machine.port}",
    }.items():
        assert text.count(there) == 1
        text = text.replace(there, here)
    head = f"load_module {STREAM_MODULE}; daemon off; master_process off; pid {tmp_path}/pid; events {{ }}\n"
    config.write_text(head + text)
    command = ["nginx", "-e", str(tmp_path / "nginx.log"), "-c", str(config)]
    done = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    balancer(*command)
    wait_until(lambda: ask(port))
    assert all(ask(port) for _ in range(20))


@needs("keepalived")
def test_keepalived_understands_the_page(tmp_path):
    config = tmp_path / "keepalived.conf"
    text = block("virtual_server")
    for wrong in (False, True):
        config.write_text(text.replace("inhibit_on_failure", "inhibit_failure") if wrong else text)
        done = subprocess.run(["keepalived", "-t", "-f", str(config)], capture_output=True, text=True)
        assert (done.returncode != 0) is wrong, done.stderr


def test_another_machines_ticket_means_a_full_handshake_and_no_failure(serve, connect, in_thread, tmp_path):
    files = Files(tmp_path)
    certificate = files.issue("server", "localhost")
    context = client_context()

    def talk(sock, session):
        with context.wrap_socket(sock, server_hostname="localhost", session=session) as client:
            return client.recv(100), client.session

    machines, memories = [], []
    for _ in range(2):
        memories.append(SharedMemory.make(1))
        ticket_keys.share(memories[-1])
        machines.append(serve(lambda conn: conn.sendall(b"%d" % conn.tls.session_reused), tls=TLSConfig(*certificate)))
    ticket_keys.share(None)
    said, session = in_thread(talk, connect(machines[0]), None)
    assert said == b"0"
    assert in_thread(talk, connect(machines[0]), session)[0] == b"1"
    assert in_thread(talk, connect(machines[1]), session)[0] == b"0"
    assert not machines[1].stats().handshake_failures
    for memory in memories:
        memory.close()
