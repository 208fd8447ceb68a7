"""Bad clients fill no log: whatever they send to whatever server, it is a counter."""

import json
import os
import socket
import subprocess
import sys

import pytest
import trustme

from gtcpserver.supervisor import control
from kit import bad_clients
from kit.floods import attack
from kit.patience import SOON
from kit.ports import free_port
from kit.supervised import Master

#: Bad connections in all.
CONNECTIONS = 10_000

#: For the servers of one process, and for a master with its worker: some limited kinds of fault say so at first.
A_HANDFUL = 8


@pytest.fixture
def certificate(tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(tmp_path / "certificate.pem")
    return tmp_path / "certificate.pem"


@pytest.mark.slow
def test_ten_thousand_bad_connections_to_every_server_are_a_handful_of_log_lines(certificate, tmp_path):
    with open(tmp_path / "stderr", "wb") as stderr:
        command = [sys.executable, bad_clients.__file__, certificate, tmp_path, str(free_port())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        try:
            addresses = json.loads(process.stdout.readline())
            attack(list(addresses.values()), CONNECTIONS)
            said = json.loads(process.communicate(timeout=SOON)[0])
        finally:
            process.kill()
            process.wait()
    assert len(said) <= A_HANDFUL, said
    written = (tmp_path / "stderr").read_text()
    assert written.count("\n") <= 2 * A_HANDFUL, written
    assert process.returncode == 0


@pytest.mark.slow
def test_bad_connections_to_a_worker_and_to_the_control_socket_are_a_handful_of_log_lines(tmp_path):
    path = str(tmp_path / "ctl")
    master = Master(tmp_path, ("echo", "--bind", "127.0.0.1:0", "--workers", "1", "--control", path)).wait_listening()
    try:
        before = master.log().count("\n")
        attack([f"127.0.0.1:{master.port}", path], 1000, at_once=8)  # a queue of 16 is all that the control socket has
        assert master.workers()
        assert master.log().count("\n") <= before + A_HANDFUL, master.log()
    finally:
        master.kill_all()


def test_users_who_may_not_control_a_master_fill_no_log(monkeypatch, caplog):
    """An abstract socket has no mode that keeps them out."""
    monkeypatch.setattr(control, "peer_of", lambda sock: (1, 65534))
    name = f"gtcpserver-test-{os.getpid()}"
    listening = control.ControlSocket(f"@{name}", lambda request, reply: reply({}))
    try:
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"\0{name}")
                listening.accept()
    finally:
        listening.close(remove=False)
    assert listening.clients == []
    assert 1 <= len(caplog.records) <= A_HANDFUL
    assert "a process of user 65534 was refused" in caplog.text
