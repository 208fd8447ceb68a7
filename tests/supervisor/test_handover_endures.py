"""Keep-alive clients that never stop asking, and tunnels, over reloads and upgrades: no error, and no old worker stays.

`make moves` has 2,000 clients and 500 tunnels, 20 reloads and 5 upgrades in two minutes; GTCPSERVER_MOVING_CLIENTS,
_TUNNELS, _RELOADS, _UPGRADES and _SECONDS are the figures; on a machine that is busy with other things, _REST has full
speed rest for seconds after each round. Then it says how long all took.
"""

from __future__ import annotations

import heapq
import os
import random
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from kit.paths import ROOT
from kit.patience import SOON
from kit.supervised import Master, alive, wait_until
from kit.tunnel_load import TunnelLoad, Used
from kit.worker_tunnels import Tunnel
from loadtests.handover.clients import Client, ClientError, connect


def figure(name: str, default: float) -> float:
    return float(os.environ.get(f"GTCPSERVER_MOVING_{name}", default))


CLIENTS = int(figure("CLIENTS", 30))
TUNNELS = int(figure("TUNNELS", 12))
RELOADS = int(figure("RELOADS", 1))
UPGRADES = int(figure("UPGRADES", 1))
SECONDS = figure("SECONDS", 0.5)
IS_LONG = "GTCPSERVER_MOVING_CLIENTS" in os.environ
REST = figure("REST", 0.0 if IS_LONG else 0.01)

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


QUICK = ("--handover", "--probation", "0.1")


@pytest.fixture
def opened(destination: socket.socket) -> Iterator[Callable[..., list[Tunnel]]]:
    """`opened(master, number, way)`: tunnels, which are closed after the test."""
    made: list[Tunnel] = []

    def open_some(master: Master, number: int, way: str = "") -> list[Tunnel]:
        made.extend(Tunnel(master, destination, way) for _ in range(number))
        return made[len(made) - number :]

    yield open_some
    for one in made:
        one.close()


class Service:
    """A master whose workers are replaced again and again.

    Attributes:
        longest: seconds until all old workers were gone, by the kind of replacement.
    """

    def __init__(self, master: Master, workers: int) -> None:
        self.master = master
        self._workers = workers
        self._old = master.settled(workers)
        self._upgrades = 0
        self.longest = {"reload": 0.0, "upgrade": 0.0}

    def replace(self, kind: str) -> None:
        """Replace all workers by new ones, and wait until the old ones are gone."""
        master, old = self.master, self._old
        assert master.ask(kind)["ok"]
        if kind == "upgrade":
            self._upgrades += 1
            master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready", self._upgrades))
        answered = time.monotonic()
        wait_until(lambda: not any(map(alive, old)))
        self.longest[kind] = max(self.longest[kind], time.monotonic() - answered)
        self._old = master.settled(self._workers)

    def check(self, active: int) -> None:
        """Check that it has so many connections, and that nothing has failed."""
        self.master.wait_until_active(active)
        assert "Traceback" not in self.master.log()


@pytest.mark.slow
def test_clients_that_ask_all_the_time_and_tunnels_notice_no_reload_and_no_upgrade(
    start, forward, proxy, opened, capsys
):
    more = ("--pool", "none", "--max-connections", "none")
    server = start(*QUICK, "--workers", "2", *more, handler=f"{ROOT}/loadtests/handover/app.py:handle")
    services = [Service(server, 2), *(Service(begin(*QUICK, "--workers", "1"), 1) for begin in (forward, proxy))]
    load = Load(connect(("127.0.0.1", server.port), CLIENTS))
    there, through = TUNNELS // 2, TUNNELS - TUNNELS // 2
    by_proxy = [opened(services[2].master, 1, ("socks", "http")[number % 2])[0] for number in range(through)]
    tunnels = TunnelLoad(opened(services[1].master, there), by_proxy, rest=REST)
    loads = [load, tunnels]
    kinds = ["reload"] * RELOADS + ["upgrade"] * UPGRADES
    random.Random(1).shuffle(kinds)
    for one in loads:
        one.start()
    try:
        began = time.monotonic()
        for number, kind in enumerate(kinds, 1):
            for service in services:
                service.replace(kind)
            before = [one.bytes for one in tunnels.fast]
            wait_until(lambda before=before: tunnels.failure or all(map(moves_on, tunnels.fast, before)))
            assert [one.failure for one in loads] == [None, None]
            time.sleep(max(0.0, began + number * SECONDS / len(kinds) - time.monotonic()))
        services[0].check(CLIENTS)
        services[1].check(there)
        services[2].check(through)
    finally:
        for one in loads:
            one.end()
    assert [one.failure for one in loads] == [None, None]
    assert load.requests >= CLIENTS
    if IS_LONG:
        with capsys.disabled():
            tell(time.monotonic() - began, load, tunnels, services)


def moves_on(one: Used, before: int) -> bool:
    return one.bytes > before + 1_000_000


def tell(seconds: float, load: Load, tunnels: TunnelLoad, services: list[Service]) -> None:
    kinds = Counter(one.kind for one in tunnels.tunnels)
    longest = {kind: max(one.longest[kind] for one in services) for kind in ("reload", "upgrade")}
    print(
        f"\n{CLIENTS} clients, {RELOADS} reloads, {UPGRADES} upgrades in {seconds:.0f} s: "
        f"{load.requests} requests, slowest {load.slowest:.3f} s; tunnels: "
        f"{', '.join(f'{number} {kind}' for kind, number in kinds.items())}, {tunnels.bytes / 1e9:.1f} GB; old workers "
        f"gone within {longest['reload']:.2f} s of a reload, {longest['upgrade']:.2f} s of an upgrade"
    )
