"""Upgrades between versions: one that does not know what the other passes on begins anew with that, and serves."""

from __future__ import annotations

import json
import logging
import os
import socket
from types import SimpleNamespace

import pytest

from gtcpserver.errors import GtcpServerError
from gtcpserver.supervisor.channel import adopt, make_pair
from gtcpserver.supervisor.messages import HANDOVER_KINDS
from gtcpserver.supervisor.sockets import Inherited
from gtcpserver.supervisor.upgrade import VARIABLE, Handover, Upgrade, say_ready, take_handover

#: What the very first version of an upgrade knew.
OLDEST = {"pid", "channel", "slots", "sockets", "control", "listen_fds", "metrics"}


class Masters:
    """An old master, whose new one is this process, too: `begin` gives it what a new process would find."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.told = []
        self.left_to = []
        self.started = False
        system = SimpleNamespace(make_pair=make_pair, start_master=self._start, monotonic=lambda: 0.0)
        self.upgrade = Upgrade(system, self.left_to.append)

    def _start(self, environment, fds):
        folder = os.getcwd()
        found = json.loads(environment()[VARIABLE])
        os.chdir(folder)
        self.fds = set(fds) - {found["channel"]}
        self.environment = {**found, "channel": os.dup(found["channel"])}
        self.monkeypatch.setenv(VARIABLE, json.dumps(self.environment))
        self.started = True
        return 4711

    def begin(self, **more):
        handover = Handover(1, -1, [0, 1], sockets=[], control=None, listen_fds=0, metrics=[], **more)
        self.upgrade.begin(handover, "/", self.told.append)

    def hear(self):
        self.upgrade.hear()
        self.upgrade.close()


@pytest.fixture
def masters(monkeypatch):
    made = Masters(monkeypatch)
    yield made
    made.upgrade.close()


def more_of(memory, listener):
    agent = Inherited("127.0.0.1:0", listener.fileno(), None, False, "127.0.0.1:1", None)
    return {"memory": memory, "agent": [agent], "in_maintenance": True}


@pytest.fixture
def more():
    memory = os.memfd_create("counts")
    os.write(memory, b"counts")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield more_of(memory, listener)
    os.close(memory)


def test_a_version_that_knows_all_takes_all(masters, more, caplog):
    masters.begin(**more)
    handover = take_handover()
    assert handover is not None
    assert os.pread(handover.memory, 100, 0) == b"counts"
    (agent,) = handover.agent
    assert os.path.sameopenfile(agent.fd, more["agent"][0].fd)
    assert (agent.address, handover.in_maintenance, handover.slots) == ("127.0.0.1:1", True, [0, 1])
    assert {agent.fd, handover.memory} == set(handover.fds())
    assert not any(map(os.get_inheritable, handover.fds()))
    assert say_ready(handover) == (True, None)
    for fd in handover.fds():
        os.close(fd)
    masters.hear()
    assert (masters.told, masters.left_to) == ([None], [4711])
    assert "begins anew" not in caplog.text


def test_the_oldest_version_serves_and_the_log_says_once_what_is_lost(masters, more, caplog):
    masters.begin(**more)
    assert masters.environment.keys() == OLDEST
    assert masters.fds == set()  # it inherits nothing that it would never close
    channel = adopt(masters.environment["channel"], HANDOVER_KINDS - {"more"}, takes_fds=True)
    before = set(os.listdir("/proc/self/fd"))
    assert channel.receive() == []
    assert set(os.listdir("/proc/self/fd")) == before
    channel.send("ready")
    channel.close()
    with caplog.at_level(logging.WARNING, "gtcpserver"):
        masters.hear()
    assert (masters.told, masters.left_to) == ([None], [4711])
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line == (
        "the new master (pid 4711) is of another version, and begins anew: the counts of limits and the keys of TLS "
        "tickets; the sockets of the agent check; maintenance (ctl maint on)"
    )


def test_what_the_last_version_left_in_the_environment_is_taken(monkeypatch, more):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left = dict.fromkeys(OLDEST) | {"pid": 1, "slots": [0], "sockets": [], "metrics": []}
    left |= {"channel": theirs.detach(), "memory": more["memory"], "in_maintenance": True, "agent": []}
    monkeypatch.setenv(VARIABLE, json.dumps(left))
    handover = take_handover()
    assert handover is not None
    assert (handover.memory, handover.in_maintenance) == (more["memory"], True)
    os.close(handover.channel)
    ours.close()


def test_what_a_later_version_passes_on_is_dropped(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pipe = os.pipe()
    for fields in ({"name": "quotas", "value": [1]}, {"name": "memory"}, {"name": [3]}, {}):
        socket.send_fds(ours, [json.dumps({"kind": "more", **fields}).encode()], pipe[1:] if "value" in fields else [])
    os.close(pipe[1])
    left = dict.fromkeys(OLDEST) | {"pid": 1, "slots": [0], "sockets": [], "metrics": []}
    monkeypatch.setenv(VARIABLE, json.dumps(left | {"channel": theirs.detach()}))
    handover = take_handover()
    assert handover is not None
    assert (handover.memory, handover.taken) == (None, ())
    assert os.read(pipe[0], 1) == b""  # its descriptor is closed
    os.close(pipe[0])
    os.close(handover.channel)
    ours.close()


def test_a_channel_that_is_none_is_told(monkeypatch, tmp_path):
    left = dict.fromkeys(OLDEST) | {"pid": 1, "slots": [0], "sockets": [], "metrics": []}
    with (tmp_path / "file").open("w") as file:
        fd = os.dup(file.fileno())
        monkeypatch.setenv(VARIABLE, json.dumps(left | {"channel": fd}))
        with pytest.raises(GtcpServerError, match="cannot take over from the running master: "):
            take_handover()


def test_an_upgrade_that_cannot_pass_on_what_it_should_is_refused(masters, more, caplog):
    more["memory"] = 1 << 20  # no descriptor
    masters.begin(**more)
    assert not masters.started
    (error,) = masters.told
    assert "cannot pass on the counts of limits and the keys of TLS tickets" in error
    assert not masters.upgrade.under_way
