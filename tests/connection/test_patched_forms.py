"""Both forms serve in a program that gevent has patched, as `gtcpserver serve` is: patching takes parts of modules."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
from gevent import monkey
if {early}:
    monkey.patch_all()
import gtcpserver
if not {early}:
    monkey.patch_all()
from gtcpserver import Connection, Server

def handler(conn):
    while data := conn.recv(100):
        conn.sendall(data)

with Server("127.0.0.1:0", handler) as server:
    with gtcpserver.connect(server.address) as client:
        for _ in range(3):
            client.sendall(b"hello")
            assert client.recv_exactly(5) == b"hello"
    pid = os.fork()  # a child has a poller of its own
    if not pid:
        with Server("127.0.0.1:0", handler) as server, gtcpserver.connect(server.address) as client:
            client.sendall(b"child")
            os._exit(client.recv_exactly(5) != b"child")
    assert os.waitpid(pid, 0)[1] == 0
    print(gtcpserver.compiled)
"""


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False], ids=["patched first", "patched later"])
@pytest.mark.parametrize("pure", ["1", ""], ids=["pure", "as it is"])
def test_a_patched_program_serves(pure: str, early: bool) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(early=early)]
    environment = {**os.environ, "GTCPSERVER_PURE": pure}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert pure != "1" or done.stdout == "False\n"
