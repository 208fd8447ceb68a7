"""What a master hears: from workers, which may have been taken over by a client, and on its control socket."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
from array import array
from math import isfinite
from types import SimpleNamespace
from typing import Any

from fuzz.engine import Target
from fuzz.targets.helpers import Choices, pieces_of
from gtcpserver.monitoring.connection_table import MOST_PLACES
from gtcpserver.monitoring.recorder import counts_of, gauges_of
from gtcpserver.strict_json import to_json
from gtcpserver.supervisor.channel import make_pair
from gtcpserver.supervisor.commands import Commands
from gtcpserver.supervisor.config import MAX_WORKERS, SupervisorConfig
from gtcpserver.supervisor.control import MAX_REQUEST, ControlClient
from gtcpserver.supervisor.fleet import Fleet
from gtcpserver.supervisor.messages import MASTER_KINDS, MAX_BYTES, WORKER_KINDS
from gtcpserver.supervisor.monitor import table_of
from gtcpserver.supervisor.slots import WorkerProcess, WorkerState
from gtcpserver.supervisor.system import REAL_SYSTEM

NOBODY = 1 << 23
"""A process id that no process has: pid_max is 2**22 at most (proc(5))."""


def _not_in_json(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


class _Formatting(logging.Handler):
    """Formats what is logged, and says nothing; a format that does not fit is raised."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


_HANDLER = _Formatting()


def _master() -> Any:
    nothing: Any = None
    fleet = Fleet(SupervisorConfig(workers=2), nothing, nothing, "/", lambda: None, [0, 1], REAL_SYSTEM)
    state = SimpleNamespace(value="serving")
    return SimpleNamespace(
        fleet=fleet,
        state=state,
        ready=True,
        started_at=0.0,
        addresses=["127.0.0.1:1"],
        stopping=False,
        in_maintenance=False,
        system=REAL_SYSTEM,
        program=SimpleNamespace(name="app:handle"),
    )


def worker_messages(data: bytes) -> None:
    """Packets of a worker; afterwards the master still answers for all, and in JSON."""
    choices = Choices(data)
    master = _master()
    fleet = master.fleet
    workers, lines = [], []
    for number in (0, 1):
        ours, theirs = make_pair(WORKER_KINDS, MASTER_KINDS)
        worker = WorkerProcess(number, NOBODY + number, ours, 1, REAL_SYSTEM, state=WorkerState.READY)
        fleet.workers[worker.pid] = fleet.slots[number].current = worker
        workers.append(worker)
        lines.append(theirs)
    good, bad = workers
    log = logging.getLogger("gtcpserver")
    propagate, log.propagate = log.propagate, False
    log.addHandler(_HANDLER)
    if choices.number(1):
        bad.state = WorkerState.STARTING
    try:
        counters = {"accepted": 3, "active": 1, "queue_wait_mean": 0.5, "queue_wait_samples": 2}
        lines[0].send("stats", stats=counters)
        fleet.receive(good)
        for packet in choices.rest().split(b"\n")[:10]:
            if packet and len(packet) <= MAX_BYTES:
                lines[1]._sock.send(packet)
                fleet.receive(bad)
        commands = Commands(master)
        _check_status(commands.status(), good)
        _check_status(commands.status(in_full=True), good)
        full = commands.status(in_full=True)
        array("f", (counts_of(full) | gauges_of(full)).values())  # as the status page's history has it
        _check_table(master, workers)
        assert isinstance(bad.lag, (int, float))
        assert isinstance(bad.rss, int)
        fleet.next_due()
        bad.note_silence(0.0)
        fleet.reap(bad.pid, 0)
        _check_status(commands.status(), good)
    finally:
        log.removeHandler(_HANDLER)
        log.propagate = propagate
        for channel in (*lines, good.channel, bad.channel):
            channel.close()


def _check_status(status: dict[str, Any], good: WorkerProcess) -> None:
    read = json.loads(json.dumps(status), parse_constant=_not_in_json)
    (one,) = (worker for worker in read["workers"] if worker["pid"] == good.pid)
    assert (one["accepted"], one["active"]) == (3, 1)
    for worker in read["workers"]:
        for name in ("lag", "rss", "accepted", "active"):
            assert isinstance(worker[name], (int, float)), f"{name}: {worker[name]!r}"
            assert isfinite(worker[name])
    # Whatever the other worker says, and wherever it counts.
    assert isinstance(read["stats"]["accepted"], (int, float))


def _check_table(master: Any, workers: list[WorkerProcess]) -> None:
    """The table of connections for the status page."""
    table = table_of(workers, master.fleet.workers.values())
    assert json.loads(to_json(table), parse_constant=_not_in_json)["total"] >= 0
    assert len(table["places"]) <= MOST_PLACES + 1


def control(data: bytes) -> None:
    """A line, in any pieces: one answer, which is a line of JSON, and the end."""
    choices = Choices(data)
    master = _master()
    master.stopping = bool(choices.number(1))
    called: list[tuple[Any, ...]] = []

    def note(name: str) -> Any:
        def done(*arguments: Any) -> None:
            called.append((name, *arguments))
            if callable(arguments[-1]):
                arguments[-1](None)

        return done

    for name in ("halt", "begin_stop", "begin_reload", "begin_upgrade", "scale"):
        setattr(master, name, note(name))
    master.reopen_log = lambda: called.append(("reopen",))
    commands = Commands(master)
    here, there = socket.socketpair()
    client = ControlClient(here, commands.answer)
    sent = choices.rest()
    try:
        for piece in pieces_of(sent):
            if client.closed or client.asked:
                break
            there.send(piece)
            client.handle(select.POLLIN)
        commands.look_after(1e12)
        there.setblocking(False)
        answer = b""
        while not client.closed and client._outbox:
            client.handle(select.POLLOUT)
        try:
            while more := there.recv(65536):
                answer += more
        except BlockingIOError:
            assert not client.closed
        except ConnectionResetError:
            assert client.closed
    finally:
        client.close()
        there.close()
    assert len(called) <= 1
    assert len(client._inbox) <= 2 * MAX_REQUEST
    if not answer:
        assert b"\n" not in sent or not client.asked
        return
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    read = json.loads(answer, parse_constant=_not_in_json)
    assert isinstance(read, dict)
    if called and called[0][0] == "scale":
        assert 1 <= called[0][1] <= MAX_WORKERS
    assert not ("error" in read and called)


_JSON = (
    b'"',
    b":",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b'""',
    b"{}",
    b"[]",
    b"\n",
)

TARGETS = [
    Target(
        "worker_messages",
        worker_messages,
        tokens=(
            *_JSON,
            *(
                b'{"kind":"beat","lag":0.1,"stats":{},"rss":1}',
                b'{"kind":"ready"}',
                b'{"kind":"failed","error":"","status":1}',
            ),
            *(b'{"kind":"connections","table":[{"age":1}]}', b'{"kind":"stopped","finished":1,"ended":1,"stats":{}}'),
            *(
                b'"stats":{"accepted":1,"active":1,"queue_wait_mean":0.1,"queue_wait_samples":1,"pool_size":null}',
                b'"why":"x"',
            ),
            *(
                b'"tls_failures":{"timeout":1}',
                b'"peak":1',
                b'"uptime":1.0',
                b'"queue_wait_max":1.0',
                b'"client":"1.2.3.4:5"',
            ),
        ),
        longest=MAX_BYTES,
        memory=(8_000_000, 800),
        seconds=(0.3, 20e-6),
    ),
    Target(
        "control",
        control,
        tokens=(
            *_JSON,
            *(
                b'{"command":"status"}\n',
                b'{"command":"scale","workers":4}\n',
                b'{"command":"stop","now":true}\n',
                b'"reload"',
            ),
            *(b'"upgrade"', b'"reopen"', b'"workers":', b'"command":'),
        ),
        longest=16_000,
        memory=(8_000_000, 800),
    ),
]

assert os.getpid() < NOBODY
