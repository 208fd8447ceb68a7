"""A worker whose event loop stays late gives idle connections to the others (--relieve-lagging)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gtcpserver import ConfigError
from gtcpserver.supervisor.api import run_workers
from gtcpserver.supervisor.relief import RELIEF_SECONDS, Relief
from kit.supervised import wait_until


class Worker(SimpleNamespace):
    __hash__ = object.__hash__


class Fleet:
    """Workers with so many connections each, of which one is busy; `told` has what they were told to give."""

    def __init__(self, *counts):
        self.workers = [
            Worker(slot=slot, pid=100 + slot, lagging=False, stats={"active": count, "handlers": 1, "tunnels": 0})
            for slot, count in enumerate(counts)
        ]
        self.slots = [SimpleNamespace(number=one.slot, current=one) for one in self.workers]
        self.rebalance = None
        self.busy = False
        self.told = []
        self.pairing = SimpleNamespace(staying=lambda: list(self.workers), share=self._share)
        self.relief = Relief(self)
        self.now = 1000.0

    def active(self):
        return self.slots

    def reloading(self):
        return self.busy

    def changing(self):
        return False

    def _share(self, giver, taker, count):
        self.told.append((giver.slot, taker.slot, count))
        return True

    def look(self, *late, seconds=0.0):
        self.now += seconds
        for one in self.workers:
            one.lagging = one.slot in late
        self.told.clear()
        self.relief.look(self.now, set(late))
        return self.told


def test_a_worker_that_stays_late_gives_half_of_its_idle_connections_to_those_that_are_not():
    fleet = Fleet(41, 10, 5, 7)
    assert fleet.look(0, 3) == []
    assert fleet.look(0, 3, seconds=RELIEF_SECONDS - 0.1) == []
    assert fleet.look(0, 3, seconds=0.2) == [(0, 2, 10), (0, 1, 10), (3, 2, 2), (3, 1, 1)]


def test_it_gives_tunnels_whose_handlers_wait_for_nothing_else():
    fleet = Fleet(41, 0)
    fleet.workers[0].stats.update(handlers=31, tunnels=20)
    fleet.look(0)
    assert fleet.look(0, seconds=RELIEF_SECONDS) == [(0, 1, 15)]


def test_it_gives_more_when_it_has_given_and_is_still_late():
    fleet = Fleet(41, 0)
    fleet.look(0)
    assert fleet.look(0, seconds=RELIEF_SECONDS) == [(0, 1, 20)]
    assert fleet.look(0, seconds=RELIEF_SECONDS) == []  # it has not said that it is done
    fleet.relief.hear(fleet.workers[0])
    fleet.workers[0].stats["active"] = 21
    assert fleet.look(0, seconds=0.1) == [(0, 1, 10)]
    fleet.relief.hear(fleet.workers[0])
    assert fleet.look(0, seconds=0.1) == []


def test_one_that_has_caught_up_begins_anew():
    fleet = Fleet(41, 0)
    fleet.look(0)
    fleet.look(seconds=RELIEF_SECONDS - 0.1)
    fleet.look(0, seconds=0.1)
    assert fleet.look(0, seconds=RELIEF_SECONDS - 0.1) == []
    assert fleet.look(0, seconds=0.1) == [(0, 1, 20)]


@pytest.mark.parametrize("what", ["reload", "rebalance", "no idle ones", "no takers", "no handover", "absurd counts"])
def test_nothing_moves(what):
    fleet = Fleet(41, 0)
    fleet.look(0)
    if what == "reload":
        fleet.busy = True
    elif what == "rebalance":
        fleet.rebalance = object()
    elif what == "no idle ones":
        fleet.workers[0].stats["active"] = 1
    elif what == "no takers":
        assert fleet.look(0, 1, seconds=RELIEF_SECONDS) == []
        return
    elif what == "no handover":
        fleet.pairing.staying = list
    else:
        fleet.workers[0].stats = {"active": -5, "handlers": 1e18}
    assert fleet.look(0, seconds=RELIEF_SECONDS) == []


def test_it_needs_handover():
    with pytest.raises(ConfigError, match="relieve_lagging needs handover"):
        run_workers(print, "127.0.0.1:0", workers=1, relieve_lagging=True)


APP = """
import os, time
import gevent
from gevent.monkey import get_original

def handler(conn):
    while True:
        with conn.idle():
            line = conn.recv_until(b"\\n")
        if line == b"block\\n":
            until = time.monotonic() + 30
            while time.monotonic() < until and not os.path.exists("enough"):
                get_original("time", "sleep")(0.7)  # blocks all others
                gevent.sleep(0.001)
        conn.sendall(f"{os.getpid()}\\n".encode())
"""


@pytest.mark.slow
def test_idle_connections_leave_a_worker_that_one_client_keeps_busy(start, tmp_path):
    master = start("--workers", "2", "--handover", "--probation", "0", "--relieve-lagging", app=APP)
    master.settled(2)

    def ask(client, line=b"x\n"):
        client.sendall(line)
        data = b""
        while not data.endswith(b"\n"):
            data += client.recv(1000)
        return int(data)

    clients = [master.connect() for _ in range(20)]
    first = [ask(one) for one in clients]
    late = first[0]
    there = first.count(late)
    clients[0].sendall(b"block\n")
    wait_until(lambda: master.ask("status")["stats"]["moved"] >= (there - 1) / 2)
    (tmp_path / "enough").touch()
    assert [ask(one) for one in clients[1:]].count(late) < there - 1
    master.wait_for(r"worker \d lags: it gives \d+ connections? to the others")
    for one in clients:
        one.close()
    assert "Traceback" not in master.log()
