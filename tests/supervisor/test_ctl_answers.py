"""Each client of the control socket gets an answer, and a true one, whatever fails in the master."""

from __future__ import annotations

import errno
import json
import os
import socket
from types import SimpleNamespace

import pytest

from gtcpserver.supervisor.commands import Commands
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.supervisor.control import ControlClient
from gtcpserver.supervisor.master import Master
from gtcpserver.supervisor.slots import Selected
from kit.simulated import PROGRAM, SimulatedMaster, SimulatedSystem

FAILED = {"error": "the master failed at this; its log says why"}


@pytest.fixture
def system():
    system = SimulatedSystem()
    yield system
    system.end()


@pytest.fixture
def commands(system):
    master = SimulatedMaster(system, workers=1)
    master.run(2.0)
    return Commands(master.master)


def asked(commands, command, **more):
    answers = []
    commands.answer({"command": command, **more}, answers.append)
    return answers


def test_one_answer_that_fails_does_not_keep_the_others_back(commands, monkeypatch):
    real, calls = commands.status, []

    def status():
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real()

    monkeypatch.setattr(commands, "status", status)
    answers = [asked(commands, "status") for _ in range(3)]
    with pytest.raises(MemoryError):
        commands.look_after(float("inf"))
    assert [len(one) for one in answers] == [1, 1, 1]
    assert answers[1] == [FAILED]
    assert answers[0][0]["state"] == answers[2][0]["state"] == "serving"
    commands.look_after(float("inf"))  # nothing waits any more
    assert len(calls) == 3


def test_one_list_of_connections_that_fails_does_not_keep_the_others_back(commands):
    fleet = commands._master.fleet  # noqa: SLF001
    answers = [asked(commands, "connections") for _ in range(2)]
    (worker,) = fleet.workers.values()
    rows = [{"age": 1.0}, {"age": "old"}]  # cannot be sorted
    for number, found in zip(list(worker.selected), (rows, rows[:1]), strict=True):
        worker.selected[number] = Selected(found, len(found), 0)
    with pytest.raises(TypeError):
        commands.look_after(0.0)
    assert answers[0] == [FAILED]
    assert [row["age"] for row in answers[1][0]["connections"]] == [1.0]


def test_a_request_at_which_the_master_fails_is_answered():
    def fail(_request, _reply):
        raise MemoryError

    here, there = socket.socketpair()
    client = ControlClient(there, fail)
    here.sendall(b'{"command": "status"}\n')
    with pytest.raises(MemoryError):
        client.handle(1)
    assert json.loads(here.recv(1000)) == FAILED
    here.close()


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (None, "the workers have no keys of tickets in common"),
        (SimpleNamespace(rotate_tickets=lambda: False), "no new keys for tickets: another master makes some just now"),
        (SimpleNamespace(rotate_tickets=lambda: os.close(-1)), "no new keys for tickets: Bad file descriptor"),
        (SimpleNamespace(rotate_tickets=lambda: True), None),
    ],
)
def test_new_keys_for_tickets_are_told_of_when_there_are_some(system, caplog, memory, said):
    caplog.set_level("INFO", "gtcpserver")
    master = Master(PROGRAM, SupervisorConfig(workers=1), system)
    master._memory = memory  # noqa: SLF001
    assert master.rotate_tickets() == said
    assert ("new keys for TLS session tickets" in caplog.text) == (said is None)


def test_a_log_file_that_cannot_be_reopened_is_told(system, tmp_path, monkeypatch):
    master = Master(PROGRAM, SupervisorConfig(workers=1, log_file=str(tmp_path / "no" / "log")), system)
    answers = []
    master.fleet = SimpleNamespace(workers={})
    Commands(master).answer({"command": "reopen"}, answers.append)
    assert answers[0]["error"].startswith("cannot reopen the log file: ")
    assert os.strerror(errno.ENOENT) in answers[0]["error"]
