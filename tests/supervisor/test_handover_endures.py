"""Keep-alive clients that never stop asking, over reloads and upgrades: no error, and no old worker stays.

`make moves` has 2,000 clients, 20 reloads and 5 upgrades in two minutes; GTCPSERVER_MOVING_CLIENTS, _RELOADS, _UPGRADES
and _SECONDS are the figures. With pytest's -s it says how long all took.
"""

from __future__ import annotations

import heapq
import os
import random
import selectors
import threading
import time

import pytest

from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import alive, wait_until
from loadtests.handover.clients import Client, ClientError, connect


def figure(name: str, default: float) -> float:
    return float(os.environ.get(f"GTCPSERVER_MOVING_{name}", default))


CLIENTS = int(figure("CLIENTS", 30))
RELOADS = int(figure("RELOADS", 2))
UPGRADES = int(figure("UPGRADES", 1))
SECONDS = figure("SECONDS", 0.5)

#: Seconds between an answer and the next request of the same client: a thousand requests a second in the long run.
PAUSE = max(0.05, CLIENTS / 1000)


class Load(threading.Thread):
    """All clients, each of which asks again a while after its answer, until the end.

    Attributes:
        failure: what went wrong; None: nothing.
        requests: number of answers.
        slowest: seconds of the slowest answer.
    """

    def __init__(self, clients: list[Client]) -> None:
        super().__init__()
        self._clients = clients
        self._end = threading.Event()
        self.failure: Exception | None = None
        self.requests = 0
        self.slowest = 0.0

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for client in self._clients:
                    selector.register(client.sock, selectors.EVENT_READ, client)
                self._ask(selector)
        except (OSError, ClientError) as error:
            self.failure = error

    def _ask(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        due = [(now + random.random() * PAUSE, number) for number in range(len(self._clients))]
        numbers = {client: number for number, client in enumerate(self._clients)}
        heapq.heapify(due)
        waiting: dict[Client, float] = {}
        while waiting or not self._end.is_set():
            now = time.monotonic()
            while due and due[0][0] <= now and not self._end.is_set():
                client = self._clients[heapq.heappop(due)[1]]
                client.ask()
                waiting[client] = now
            for key, _ in selector.select(0.01):
                client = key.data
                self.slowest = max(self.slowest, client.check())
                self.requests += 1
                if waiting.pop(client, None) is None:
                    raise ClientError("an answer to nothing")
                heapq.heappush(due, (time.monotonic() + PAUSE, numbers[client]))
            if waiting and now - min(waiting.values()) > SOON:
                raise ClientError(f"{len(waiting)} requests were not answered in {SOON:g} s")

    def end(self) -> None:
        self._end.set()
        self.join()


@pytest.mark.slow
def test_clients_that_ask_all_the_time_notice_no_reload_and_no_upgrade(start, capsys):
    options = ("--workers", "2", "--handover", "--probation", "0.1", "--pool", "none", "--max-connections", "none")
    master = start(*options, handler=f"{ROOT}/loadtests/handover/app.py:handle")
    old = master.settled(2)
    load = Load(connect(("127.0.0.1", master.port), CLIENTS))
    kinds = ["reload"] * RELOADS + ["upgrade"] * UPGRADES
    random.Random(1).shuffle(kinds)
    longest = {"reload": 0.0, "upgrade": 0.0}
    upgrades = 0
    load.start()
    try:
        began = time.monotonic()
        for number, kind in enumerate(kinds, 1):
            assert master.ask(kind)["ok"]
            if kind == "upgrade":
                upgrades += 1
                master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready", upgrades))
            answered = time.monotonic()
            wait_until(lambda pids=old: not any(map(alive, pids)))
            longest[kind] = max(longest[kind], time.monotonic() - answered)
            old = master.settled(2)
            assert load.failure is None
            time.sleep(max(0.0, began + number * SECONDS / len(kinds) - time.monotonic()))
    finally:
        load.end()
    assert load.failure is None
    stats = master.ask("status")["stats"]
    assert stats["active"] == CLIENTS
    assert load.requests >= CLIENTS
    with capsys.disabled():
        if "GTCPSERVER_MOVING_CLIENTS" in os.environ:
            print(
                f"\n{CLIENTS} clients, {RELOADS} reloads, {UPGRADES} upgrades in {time.monotonic() - began:.0f} s: "
                f"{load.requests} requests, slowest {load.slowest:.3f} s; old workers gone within "
                f"{longest['reload']:.2f} s of a reload, {longest['upgrade']:.2f} s of an upgrade"
            )
    assert "Traceback" not in master.log()
