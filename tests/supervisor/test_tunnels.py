"""Tunnels of `gtcpserver forward` and `gtcpserver proxy` move between real workers, whoever is killed meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kit.patience import SOON
from kit.programs import needs
from kit.supervised import COMMAND, Master, alive, connections_inside, wait_until
from kit.worker_tunnels import Tunnel, read

QUICK = ("--handover", "--probation", "0", "--workers")


class Flood:
    """Sends to one end of a tunnel as fast as it can, and reads from the other.

    Args:
        rest: seconds after each piece, if it need not be that fast.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, rest: float = 0.0) -> None:
        self._rest = rest
        self._ends = threading.Event()
        self._source, self._sink = source, sink
        self._sent, self._got = hashlib.blake2b(), hashlib.blake2b()
        self.bytes = 0
        self._threads = [threading.Thread(target=one) for one in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        piece = random.randbytes(256 * 1024)
        while not self._ends.is_set():
            self._source.sendall(piece)
            self._sent.update(piece)
            time.sleep(self._rest)
        self._source.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while piece := self._sink.recv(1 << 20):
            self._got.update(piece)
            self.bytes += len(piece)

    def moved_since(self, before: int) -> bool:
        return self.bytes > before + 4_000_000

    def is_right(self) -> bool:
        self._ends.set()
        for thread in self._threads:
            thread.join()
        return self._sent.digest() == self._got.digest()


@pytest.fixture
def opened(destination: socket.socket) -> Iterator[Callable[..., list[Tunnel]]]:
    """`opened(master, n)`: tunnels, which are closed after the test."""
    made: list[Tunnel] = []

    def make(master: Master, count: int = 1, way: str = "") -> list[Tunnel]:
        made.extend(Tunnel(master, destination, way) for _ in range(count))
        for one in made[-count:]:
            assert one.talks()
        return made[-count:]

    yield make
    for one in made:
        one.close()


def test_tunnels_of_all_kinds_survive_reloads_and_old_workers_leave(forward, opened):
    master = forward(*QUICK, "2", "--access-log", "text")
    old = set(master.settled(2))
    *idle, half, flooded, backed_up = opened(master, 10)
    half.client.shutdown(socket.SHUT_WR)
    assert half.far.recv(1) == b""
    flood = Flood(flooded.client, flooded.far)
    data = random.randbytes(32 << 20)
    sending = threading.Thread(target=backed_up.far.sendall, args=(data,))
    sending.start()
    for number in (1, 2):
        before = flood.bytes
        answer = master.ask("reload")
        assert (answer["moved"], answer.get("staying") or {}) == (10, {})
        assert master.settled(2)
        assert not any(map(alive, old))
        old = set(master.pids())
        stats = master.ask("status")["stats"]
        assert (stats["active"], stats["accepted"]) == (10, 10)
        assert stats["moved"] == stats["taken_over"] == 10 * number
        wait_until(lambda before=before: flood.moved_since(before))
        assert all(one.talks() for one in idle)
        assert half.says(half.far, half.client)
    assert flood.is_right()
    assert read(backed_up.client, len(data)) == data
    sending.join()
    half.far.close()
    assert half.client.recv(1) == b""
    master.wait_for(r"gtcpserver.access.* result=ok bytes_received=8 bytes_sent=24 ")
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", master.log())


@pytest.mark.slow
def test_tunnels_survive_upgrades(forward, opened):
    master = forward(*QUICK, "1")
    tunnels = opened(master, 5)
    flood = Flood(tunnels[0].client, tunnels[0].far, rest=0.02)
    for number in (1, 2):
        old = master.pid
        assert master.ask("upgrade") == {"ok": True}
        master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready", number))
        wait_until(lambda pid=old: not alive(pid))
        before = flood.bytes
        wait_until(lambda before=before: flood.moved_since(before))
        assert all(one.talks() for one in tunnels[1:])
    assert flood.is_right()
    assert "Traceback" not in master.log()


@pytest.mark.parametrize("way", ["socks", pytest.param("http", marks=pytest.mark.slow)])
def test_tunnels_of_the_proxy_survive_reloads_and_an_upgrade(proxy, opened, way):
    master = proxy(*QUICK, "1")
    *idle, half, flooded = opened(master, 6, way)
    half.client.shutdown(socket.SHUT_WR)
    assert half.far.recv(1) == b""
    flood = Flood(flooded.client, flooded.far, rest=0.02)
    for do in ("reload", "reload", "upgrade"):
        workers, before = master.settled(1), flood.bytes
        master.ask(do)
        if do == "upgrade":
            master.pid = int(master.wait_for(r"the new master \(pid (\d+)\) is ready"))
        wait_until(lambda workers=workers: not any(map(alive, workers)))
        wait_until(lambda before=before: flood.moved_since(before))
        assert all(one.talks() for one in idle)
        assert half.says(half.far, half.client)
    assert flood.is_right()
    half.far.close()
    assert half.client.recv(1) == b""
    wait_until(lambda: master.log().count("command=CONNECT") == 1)
    master.wait_for(r"command=CONNECT .*result=ok sent=8 received=32 ")
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", master.log())


@pytest.mark.parametrize("which", ["old", "new"])
def test_a_killed_worker_loses_only_what_was_inside(forward, opened, which):
    master = forward(*QUICK, "1")
    (old,) = master.settled(1)
    tunnels = opened(master, 30)
    master.send_signal(signal.SIGHUP)
    (new,) = wait_until(lambda: [pid for pid in master.pids() if pid != old])
    killed = old if which == "old" else new
    inside = set()
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # all have moved, and the old one has left
        os.kill(killed, signal.SIGSTOP)
        inside = connections_inside(killed, master.port)
        os.kill(killed, signal.SIGKILL)
    master.settled(1)
    lost = set()
    for one in tunnels:
        port = one.client.getsockname()[1]
        try:
            assert one.talks()
        except (AssertionError, OSError):
            lost.add(port)
    assert lost <= inside
    assert "Traceback" not in master.log()


def test_a_rebalance_spreads_tunnels(forward, opened):
    master = forward(*QUICK, "1")
    tunnels = opened(master, 12)
    master.ask("scale", workers=3)
    master.settled(3)
    assert master.ask("rebalance") == {"ok": True, "moved": 8}
    assert all(one.talks() for one in tunnels)
    assert sorted(one["active"] for one in master.workers()) == [4, 4, 4]


def test_tunnels_stay_without_handover(forward, opened):
    master = forward("--probation", "0", "--workers", "1")
    (old,) = master.settled(1)
    (tunnel,) = opened(master)
    master.ask("reload")
    assert alive(old)
    assert tunnel.talks()


@needs("openssl")
def test_tunnels_with_tls_stay_and_it_is_said(forward, destination):
    master = forward(*QUICK, "1", "--tls-self-signed")
    master.settled(1)
    client = subprocess.Popen(
        ["openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{master.port}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        with destination.accept()[0] as far:
            assert master.ask("reload") == {"ok": True, "moved": 0, "staying": {"tls": 1}}
            command = [*COMMAND, "ctl", "--control", master.control, "workers"]
            said = subprocess.run(command, capture_output=True, text=True, timeout=SOON).stdout
            assert re.search(r"\nworker 0 \(pid \d+\) still has 1 connection: 1 tls\n", said)
            client.stdin.write(b"x")
            client.stdin.flush()
            assert far.recv(1) == b"x"
    finally:
        client.kill()
        client.communicate()
