"""Connections move between real workers: at reloads, upgrades, recycling and fewer workers."""

from __future__ import annotations

import re
import signal
import socket
import ssl
import subprocess
from collections import Counter

import pytest

from gtcpserver.supervisor.control import ControlError
from kit.examples import EXAMPLES
from kit.patience import SOON
from kit.supervised import COMMAND, alive, wait_until

APP = '''
import os
import gevent

def handler(conn):
    """Each answer has the worker, the number of the request, and whether the handler came from another worker."""
    conn.session.setdefault("requests", 0)
    while True:
        with conn.idle():
            line = conn.recv_until(b"\\n")
        if line == b"sleep\\n":
            gevent.sleep(0.5)
        if line == b"long\\n":
            gevent.sleep(60)
        conn.session["requests"] += 1
        conn.sendall(f"{os.getpid()} {conn.session['requests']} {int(conn.resumed)}\\n".encode())
'''

QUICK = ("--handover", "--probation", "0")


class Client:
    def __init__(self, master, line=b"x\n"):
        self.sock = master.connect()
        self.requests = 0
        self.worker = self.ask(line)[0]

    def ask(self, line=b"x\n"):
        self.sock.sendall(line)
        return self.answer()

    def answer(self):
        data = b""
        while not data.endswith(b"\n"):
            more = self.sock.recv(100)
            assert more, "the server has closed"
            data += more
        worker, requests, resumed = map(int, data.split())
        self.requests += 1
        assert requests == self.requests
        return worker, bool(resumed)

    def close(self):
        self.sock.close()


@pytest.fixture
def clients():
    """`clients(master, n)`: clients that have asked once."""
    made = []

    def connect(master, count):
        made.extend(Client(master) for _ in range(count))
        return made[-count:]

    yield connect
    for one in made:
        one.close()


def test_connections_survive_reloads_and_old_workers_leave(start, clients):
    master = start("--workers", "2", *QUICK, "--access-log", "text", app=APP)
    old = set(master.settled(2))
    found = clients(master, 40)
    for _ in range(2):
        found[0].sock.sendall(b"sleep\n")
        answer = master.ask("reload")
        assert answer["moved"] >= 39
        assert found[0].answer()[0] in old  # finished where it began
        assert master.settled(2)
        assert not any(map(alive, old))
        old = set(master.pids())
        answers = [one.ask() for one in found]
        assert {worker for worker, _ in answers} == old
        assert all(resumed for _, resumed in answers)
    stats = master.ask("status")["stats"]
    assert (stats["accepted"], stats["active"]) == (40, 40)
    assert stats["moved"] == stats["taken_over"] == 80
    assert "gtcpserver.access" not in master.log()
    master.wait_for(r"reload 2 is done; \d+ connections moved")


def test_connections_of_a_removed_slot_spread_over_the_others(start, clients):
    master = start("--workers", "3", *QUICK, app=APP)
    master.settled(3)
    found = clients(master, 30)
    master.ask("scale", workers=2)
    pids = set(master.settled(2))
    answers = [one.ask() for one in found]
    assert {worker for worker, _ in answers} == pids


def test_a_recycled_worker_gives_its_connections_to_its_successor(start, clients):
    master = start("--workers", "1", *QUICK, "--recycle-after", "5", "--recycle-jitter", "0", app=APP)
    (old,) = master.settled(1)
    found = clients(master, 5)
    wait_until(lambda: not alive(old))
    (new,) = master.settled(1)
    assert [one.ask() for one in found] == [(new, True)] * 5


def test_connections_survive_two_reloads_in_a_row(start, clients):
    master = start("--workers", "2", *QUICK, app=APP)
    old = set(master.settled(2))
    found = clients(master, 20)
    master.send_signal(signal.SIGHUP)
    master.ask("reload")
    wait_until(lambda: not any(map(alive, old)))
    master.settled(2)
    assert all(resumed for _, resumed in [one.ask() for one in found])


def test_a_rebalance_fills_new_workers(start, clients):
    master = start("--workers", "1", *QUICK, app=APP)
    (old,) = master.settled(1)
    found = clients(master, 41)
    master.ask("scale", workers=3)
    pids = master.settled(3)
    assert {one.ask()[0] for one in found} == {old}
    assert master.ask("rebalance") == {"ok": True, "moved": 27}
    counts = Counter(one.ask()[0] for one in found)
    assert sorted(counts) == sorted(pids)
    assert sorted(counts.values()) == [13, 14, 14]
    assert master.ask("rebalance") == {"ok": True, "moved": 0}
    assert master.ask("status")["stats"]["active"] == 41


def test_a_rebalance_needs_handover(start):
    master = start("--workers", "1")
    master.settled(1)
    with pytest.raises(ControlError, match="the workers hand nothing over: --handover"):
        master.ask("rebalance")


def test_connections_survive_upgrades(start, clients):
    master = start("--workers", "2", *QUICK, app=APP)
    found = clients(master, 20)
    for number in (1, 2):
        old, workers = master.pid, master.settled(2)
        assert master.ask("upgrade") == {"ok": True}
        master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready", number))
        wait_until(lambda pid=old: not alive(pid))
        assert not any(map(alive, workers))
        pids = set(master.settled(2))
        answers = [one.ask() for one in found]
        assert {worker for worker, _ in answers} == pids
        assert all(resumed for _, resumed in answers)


def test_what_stays_is_said(start, clients, tmp_path):
    master = start("--workers", "1", *QUICK, "--tls-self-signed", app=APP)
    master.settled(1)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(master.connect()) as client:
        client.sendall(b"long\n")
        wait_until(lambda: master.ask("status")["stats"].get("handlers"))
        assert master.ask("reload") == {"ok": True, "moved": 0, "staying": {"tls": 1}}
        (left,) = wait_until(lambda: [one["staying"] for one in master.workers("retiring") if one["staying"]])
        assert left == {"tls": 1}
        command = [*COMMAND, "ctl", "--control", master.control, "workers"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=SOON).stdout
        assert re.search(r"\nworker 0 \(pid \d+\) still has 1 connection: 1 tls\n", said)


def test_a_reload_that_turns_it_off_ends_idle_connections(start, clients, tmp_path):
    (tmp_path / "app.toml").write_text("handover = true\nworkers = 1\nprobation = 0\n")
    master = start("--config", "app.toml", app=APP)
    (old,) = master.settled(1)
    (one,) = clients(master, 1)
    (tmp_path / "app.toml").write_text("handover = false\nworkers = 1\nprobation = 0\n")
    master.ask("reload")
    assert one.sock.recv(10) == b""
    wait_until(lambda: not alive(old))


def test_a_stop_closes_them_as_before(start, clients):
    master = start("--workers", "2", *QUICK, app=APP)
    master.settled(2)
    found = clients(master, 5)
    assert master.stop() == 0
    assert all(one.sock.recv(10) == b"" for one in found)


@pytest.mark.slow
def test_the_example_keeps_its_sessions(start, tmp_path):
    master = start("--workers", "2", *QUICK, handler=f"{EXAMPLES}/moving_sessions.py:handle")
    old = set(master.settled(2))
    with socket.create_connection(("127.0.0.1", master.port), SOON) as client, client.makefile("rw") as lines:
        assert lines.readline() == "HELLO\n"
        for request in ("LOGIN ada", "SELECT 7"):
            print(request, file=lines, flush=True)
            assert lines.readline() == "OK\n"
        master.ask("reload")
        wait_until(lambda: not any(map(alive, old)))
        print("WHO", file=lines, flush=True)
        assert lines.readline() == "ada 7\n"
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", master.log())
