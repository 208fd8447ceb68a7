"""A master and its workers driven at random by a model: what was asked is answered, whatever the operator does.

Clients connect, ask, send half a request, half-close, reset and close; the operator reloads, scales, and kills workers
by -9. Every byte of every answer is compared. Only connections that were inside a killed worker may be lost, and only
connections that wait between two requests are closed by a worker that leaves. At the end no process and no descriptor
is left over.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kit.supervised import Master, alive, wait_until

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset

MOST_CLIENTS = 8
MOST_WORKERS = 3

#: For more: GTCPSERVER_MACHINE_EXAMPLES=100.
EXAMPLES = int(os.environ.get("GTCPSERVER_MACHINE_EXAMPLES", "3"))

CLIENT = st.integers(0, MOST_CLIENTS - 1)

APP = """
import os

def handler(conn):
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\\n", 64)
        except EOFError:
            return
        body = conn.recv_exactly(int(line))
        conn.sendall(b"%d\\n%b%b" % (os.getpid(), line, body))
"""


@dataclass(eq=False)
class Client:
    """One connection, as the model knows it.

    Attributes:
        worker: the process it is in; None: it has not said yet, since nothing was asked.
        unsent: the rest of a request that was begun.
        owed: what the answer must be, behind the worker's number.
        may_be_lost: it may have been inside a worker that was killed.
    """

    sock: socket.socket
    file: Any
    worker: int | None = None
    unsent: bytes = b""
    owed: bytes = b""
    may_be_lost: bool = False


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        (folder / "app.py").write_text(APP)
        arguments = ("--bind", "127.0.0.1:0", "--control", str(folder / "ctl"), "--workers", "2", "--probation", "0.1")
        # Cheap to try both: what holds of one reload holds of the other.
        arguments += random.choice([(), ("--reload-one-by-one",)])
        self.master = Master(folder, ("serve", "app:handler", *arguments)).wait_listening()
        self.workers = 2
        self.serving = True
        self.master.settled(2)
        self.clients: list[Client] = []
        self.descriptors = self.count_descriptors()

    # -- clients -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < MOST_CLIENTS)
    @rule()
    def connect(self) -> None:
        sock = self.master.connect()
        self.clients.append(Client(sock, sock.makefile("rb")))

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, size=st.integers(0, 100_000))
    def ask(self, number: int, size: int) -> None:
        client = self.pick(number)
        if self.finish(client):
            self.begin(client, size, 1.0)
            self.finish(client)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, size=st.integers(1, 5000), share=st.floats(0, 0.99))
    def begin_a_request(self, number: int, size: int, share: float) -> None:
        client = self.pick(number)
        if self.finish(client):
            self.begin(client, size, share)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT)
    def finish_what_was_begun(self, number: int) -> None:
        self.finish(self.pick(number))

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, size=st.integers(0, 5000))
    def half_close(self, number: int, size: int) -> None:
        client = self.pick(number)
        if self.finish(client):
            self.begin(client, size, 1.0)
            client.sock.shutdown(socket.SHUT_WR)
            if self.finish(client):
                assert client.file.read() == b""
                self.leave(client)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, reset=st.booleans())
    def close(self, number: int, reset: bool) -> None:
        client = self.pick(number)
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.leave(client)

    # -- the operator ------------------------------------------------------------------------------------------------

    @rule()
    def reload(self) -> None:
        assert "error" not in self.master.ask("reload")
        self.idle_ones_of_gone_workers_end()

    @rule(workers=st.integers(1, MOST_WORKERS))
    def scale(self, workers: int) -> None:
        self.workers = workers
        assert "error" not in self.master.ask("scale", workers=workers)
        self.idle_ones_of_gone_workers_end()

    @rule(number=st.integers(0, MOST_WORKERS - 1))
    def kill_a_worker(self, number: int) -> None:
        pids = self.master.pids()
        pid = pids[number % len(pids)]
        for client in list(self.clients):
            client.may_be_lost = client.may_be_lost or client.worker is None
            if client.worker == pid:
                client.sock.close()
                client.file.close()
                self.clients.remove(client)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in self.master.pids() and len(self.master.pids()) == self.workers)

    def idle_ones_of_gone_workers_end(self) -> None:
        serving = self.master.pids()
        for client in list(self.clients):
            if client.worker is not None and client.worker not in serving and not client.owed:
                assert client.file.read() == b""
                self.leave(client)

    # -- the books ---------------------------------------------------------------------------------------------------

    @invariant()
    def as_many_workers_as_wanted_serve(self) -> None:
        wait_until(lambda: len(self.master.pids()) == self.workers)

    @invariant()
    def every_connection_is_counted(self) -> None:
        # A connection may have been inside a worker that was killed, and the model does not know yet.
        lost = sum(client.may_be_lost for client in self.clients)
        wait_until(lambda: len(self.clients) - lost <= self.active() <= len(self.clients))

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.master.kill_all()
            self.folder.cleanup()

    def end(self) -> None:
        for client in list(self.clients):
            if not client.owed:
                self.leave(client)
        assert "error" not in self.master.ask("scale", workers=2)
        # With those that are busy an old worker may still be there: they are served by the stop.
        if not self.clients:
            self.master.settled(2)
            wait_until(lambda: self.count_descriptors() == self.descriptors)
        pids = [one["pid"] for one in self.master.ask("status")["workers"]]
        self.serving = False  # the master ends with its last worker, and cannot be asked then
        self.master.send_signal(signal.SIGTERM)
        for client in list(self.clients):
            self.finish(client)
        assert not self.clients
        assert self.master.wait() == 0
        assert not any(map(alive, pids))

    def active(self) -> int:
        return int(self.master.ask("status")["stats"].get("active", -1))

    def count_descriptors(self) -> list[int]:
        pids = [self.master.pid, *sorted(self.master.pids())]
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]

    # -- helpers of the rules ----------------------------------------------------------------------------------------

    def pick(self, number: int) -> Client:
        return self.clients[number % len(self.clients)]

    def begin(self, client: Client, size: int, share: float) -> None:
        line, body = b"%d\n" % size, random.randbytes(size)
        asked = line + body
        # The line at least: before it has come the connection is idle.
        cut = max(len(line), int(len(asked) * share))
        client.owed, client.unsent = asked, asked[cut:]
        self.send(client, asked[:cut])

    def send(self, client: Client, data: bytes) -> None:
        try:
            client.sock.sendall(data)
        except ConnectionError:
            if not client.may_be_lost:
                raise

    def finish(self, client: Client) -> bool:
        """Complete what was begun; False: the connection is gone, and may be."""
        if client.owed:
            if client.unsent:
                self.send(client, client.unsent)
            try:
                worker, answer = client.file.readline(), client.file.read(len(client.owed))
            except ConnectionError:
                worker = answer = b""
            if client.may_be_lost and not worker:
                self.leave(client)
                return False
            assert answer == client.owed, f"{len(answer)} of {len(client.owed)} bytes, from {worker!r}"
            assert client.worker in (None, int(worker))
            client.worker, client.may_be_lost = int(worker), False
            client.owed = client.unsent = b""
            if not self.serving or client.worker not in self.master.pids():
                assert client.file.read() == b""  # its worker has left, and the connection is idle now
                self.leave(client)
                return False
        return True

    def leave(self, client: Client) -> None:
        client.file.close()
        client.sock.close()
        self.clients.remove(client)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_clients_and_operators_do_workers_answer_what_was_asked() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=15))
