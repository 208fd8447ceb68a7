"""`kill -9` of the master, of the old or of the new worker in the middle of a move of many connections.

At most the connections inside the killed process are lost. GTCPSERVER_MOVES=1000 for that many, or `make moves`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time

import pytest

from kit.supervised import alive, children, connections_inside, wait_until

#: More than are under way at once (sender.MOST_UNDER_WAY).
CONNECTIONS = int(os.environ.get("GTCPSERVER_MOVES", "200"))

#: Of them ask for something that takes a while, when the move has begun.
BUSY = CONNECTIONS // 10

#: A connection that has moved holds up its new worker, so that the move of all takes its time.
APP = f"""
import os
import gevent
from gevent.monkey import get_original

def handler(conn):
    conn.session.setdefault("requests", 0)
    if conn.resumed:
        get_original("time", "sleep")({0.5 / CONNECTIONS})
    while True:
        with conn.idle():
            line = conn.recv_until(b"\\n")
        if line == b"sleep\\n":
            gevent.sleep(0.3)
        conn.session["requests"] += 1
        conn.sendall(f"{{os.getpid()}} {{conn.session['requests']}}\\n".encode())
"""


class Client:
    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 20)
        self.port = self.sock.getsockname()[1]
        self.requests = 0

    def send(self, line: bytes = b"x\n") -> None:
        self.sock.sendall(line)

    def answer(self) -> int:
        """The worker that has answered; 0: the connection has ended. No answer is wrong, or comes twice."""
        data = b""
        try:
            while not data.endswith(b"\n"):
                more = self.sock.recv(100)
                if not more:
                    break
                data += more
        except ConnectionResetError:
            pass
        if not data.endswith(b"\n"):
            return 0
        worker, requests = map(int, data.split())
        self.requests += 1
        assert requests == self.requests
        return worker

    def ask(self) -> int:
        try:
            self.send()
        except OSError:
            return 0
        return self.answer()


@pytest.fixture
def clients():
    """`clients(port)`: CONNECTIONS clients that have asked once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 100:
        pytest.skip(f"{CONNECTIONS} connections need more descriptors than {hard}: ulimit -Hn")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < CONNECTIONS + 100:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made: list[Client] = []

    def connect(port: int) -> list[Client]:
        made.extend(Client(port) for _ in range(CONNECTIONS))
        assert all(one.ask() for one in made)
        return made

    yield connect
    for one in made:
        one.sock.close()


class Move:
    """A reload whose connections are moving: some have left the old worker, others have not. Both workers stand still.

    Attributes:
        busy: clients whose requests are being served by the old worker.
    """

    def __init__(self, start, clients) -> None:
        options = ("--workers", "1", "--handover", "--probation", "0", "--pool", "none", "--max-connections", "none")
        self.master = start(*options, app=APP)
        self.master.settled(1)
        self.clients = clients(self.master.port)
        self.busy = self.clients[:BUSY]
        while not self._begin():  # a machine that is busy may look too late
            self.go_on()
            wait_until(lambda: not alive(self.old))
            assert all(one.answer() for one in self.busy)

    def _begin(self) -> bool:
        (self.old,) = self.master.settled(1)
        for one in self.busy:
            one.send(b"sleep\n")
        self.master.send_signal(signal.SIGHUP)
        (self.new,) = wait_until(lambda: [pid for pid in children(self.master.pid) if pid != self.old])
        # A worker has some 20 descriptors besides; that is quicker than to look which they are.
        wait_until(lambda: self._descriptors() < CONNECTIONS * 3 // 4 + 20)
        for pid in (self.old, self.new):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return BUSY < len(self.inside(self.old)) < CONNECTIONS

    def _descriptors(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.old}/fd"))
        except OSError:
            return 0

    def inside(self, pid: int) -> set[int]:
        """The clients' ports of the connections inside a process."""
        try:
            return connections_inside(pid, self.master.port)
        except OSError:
            return set()

    def go_on(self) -> None:
        for pid in (self.old, self.new):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self, pid: int) -> set[int]:
        """Kill a process; the clients' ports of the connections that were inside."""
        inside = self.inside(pid)
        os.kill(pid, signal.SIGKILL)
        self.go_on()
        return inside

    def lost(self, clients: list[Client]) -> set[int]:
        """Ask on each connection; the ports of those that have ended."""
        return {one.port for one in clients if not one.ask()}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["old", "new"])
def test_a_killed_worker_loses_only_what_was_inside(start, clients, which):
    move = Move(start, clients)
    inside = move.kill(move.old if which == "old" else move.new)
    busy_lost = {one.port for one in move.busy if not one.answer()}
    (now,) = move.master.settled(1)
    lost = busy_lost | move.lost([one for one in move.clients if one.port not in busy_lost])
    assert lost <= inside
    left = [one for one in move.clients if one.port not in lost]
    assert left
    if which == "new":
        wait_until(lambda: not alive(move.old))
        assert {one.ask() for one in left} == {now}  # those that stayed have moved to the next one
    assert move.master.ask("status")["stats"]["active"] == len(left)
    assert "Traceback" not in move.master.log()


@pytest.mark.slow
def test_workers_without_their_master_finish_what_has_begun_and_hold_on_to_nothing(start, clients):
    move = Move(start, clients)
    move.kill(move.master.pid)
    began = time.monotonic()
    answered: list[int] = []
    threads = [threading.Thread(target=lambda one=one: answered.append(one.answer())) for one in move.clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The workers end within a second, so that the next master has the port, and with them all that was idle.
    assert sorted(answered) == [0] * (CONNECTIONS - BUSY) + [move.old] * BUSY
    wait_until(lambda: not alive(move.old) and not alive(move.new))
    assert time.monotonic() - began < 20
    assert "Traceback" not in move.master.log()
