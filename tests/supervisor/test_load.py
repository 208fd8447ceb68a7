"""Workers come and go under constant load, and no connection is lost but those inside a killed worker."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

import pytest

from kit.supervised import Load, Start, connections_inside, state_of, wait_until

pytestmark = pytest.mark.slow


def test_twenty_reloads_lose_nothing(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "2", "--probation", "0.1")
    clients = load(master.port)
    before = set(master.pids())
    for number in range(20):
        if number % 2:
            master.ask("reload")
        else:
            master.send_signal(signal.SIGHUP)
            master.wait_for(r"reload \d+ is done", number + 1)
    after = set(master.settled(2))
    met = clients.end()
    assert met["failures"] == []
    assert met["requests"] > 500
    assert len(met["workers"]) > 10
    assert not before & after
    assert master.ask("status")["stats"]["accepted"] >= met["requests"] // 10
    assert master.stop() == 0


def test_five_upgrades_lose_nothing_and_leave_one_master(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "2", "--pid-file", "pid")
    clients = load(master.port)
    pid_file = master.folder / "pid"
    for number in range(5):
        before = master.pid
        assert pid_file.read_text() == f"{before}\n"
        if number % 2:
            master.ask("upgrade")
        else:
            master.send_signal(signal.SIGUSR2)
        master.wait_for(r"the new master \(pid \d+\) is ready", number + 1)
        master.pid = int(pid_file.read_text())
        assert master.pid != before
        wait_until(lambda before=before: not os.path.exists(f"/proc/{before}/exe"))
    met = clients.end()
    assert met["failures"] == []
    assert len(met["workers"]) >= 10
    assert len(master.settled(2)) == 2
    assert master.process.wait(60) == 0
    master.stop()
    assert not pid_file.exists()
    assert not (master.folder / "ctl").exists()


def test_a_worker_killed_while_it_has_no_connection_costs_none(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "2")
    clients = load(master.port, kinds=("short", "short"), threads=2)
    killed = 0
    while killed < 20:
        pid = master.settled(2)[killed % 2]
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: state_of(pid) == "T")
        if connections_inside(pid, master.port):
            os.kill(pid, signal.SIGCONT)
            continue
        os.kill(pid, signal.SIGKILL)
        killed += 1
        master.wait_for(r"was killed by SIGKILL", killed)
    master.settled(2)
    met = clients.end()
    assert met["failures"] == []
    assert len(met["workers"]) >= 10
    assert master.ask("status")["restarts"] == 20


def test_a_busy_worker_that_is_killed_loses_what_was_inside_and_nothing_else(
    start: Start, load: Callable[..., Load]
) -> None:
    master = start("--workers", "2")
    clients = load(master.port)
    inside: set[int] = set()
    held_ports: set[int] = set()
    for number in range(20):
        pid = master.settled(2)[number % 2]
        held = master.hold(pid, 3)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: state_of(pid) == "T")
        there = connections_inside(pid, master.port)
        os.kill(pid, signal.SIGKILL)
        ports = {client.getsockname()[1] for client in held}
        assert ports <= there
        inside |= there
        held_ports |= ports
        for client in held:
            try:
                assert client.recv(100) == b""
            except ConnectionResetError:
                pass
            client.close()
        master.wait_for(r"was killed by SIGKILL", number + 1)
    master.settled(2)
    met = clients.end()
    assert {port for port, _ in met["failures"]} <= inside
    assert len(met["failures"]) <= len(inside) - len(held_ports)
    assert met["requests"] > 300


def test_from_one_to_four_workers_and_back_loses_nothing(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "1")
    clients = load(master.port)
    served: set[int] = set()

    def all_serve(workers: list[int]) -> bool:
        served.add(master.request()[0])
        return served.issuperset(workers)

    for _ in range(2):
        master.ask("scale", workers=4)
        workers = master.settled(4)
        wait_until(lambda workers=workers: all_serve(workers))
        master.ask("scale", workers=1)
        master.settled(1)
    master.send_signal(signal.SIGTTIN)
    master.settled(2)
    master.send_signal(signal.SIGTTOU)
    master.settled(1)
    met = clients.end()
    assert met["failures"] == []
    assert len(served) > 4
    assert "reset" not in master.log().replace(", 0 reset", "")


def test_recycling_loses_nothing(start: Start, load: Callable[..., Load]) -> None:
    master = start("--workers", "2", "--recycle-after", "40", "--recycle-jitter", "10")
    clients = load(master.port, kinds=("short", "short"))
    master.wait_for(r"has accepted \d+ connections: replacing it", 6)
    met = clients.end()
    assert met["failures"] == []
    assert len(met["workers"]) > 5


def test_a_graceful_stop_serves_what_is_queued_and_in_flight(start: Start) -> None:
    master = start("--workers", "2")
    held = master.hold(count=6)
    # Their handshakes are done, so they are the server's to answer, whether accepted or not.
    queued = [master.connect() for _ in range(40)]
    for client in queued:
        client.sendall(b"sleep 0.1\n")
    master.send_signal(signal.SIGTERM)
    for client in held + queued:
        assert client.makefile("rb").readline().split()[1] == b"last"
        client.close()
    assert master.wait() == 0


def test_ten_thousand_connections_are_spread_evenly(start: Start) -> None:
    master = start("--workers", "4")
    for number in range(10_000):
        with socket.socket() as client:
            client.bind((f"127.0.0.{2 + number % 200}", 0))
            client.connect(("127.0.0.1", master.port))
    counts = wait_until(
        lambda: counts if sum(counts := [one["accepted"] for one in master.workers()]) >= 10_000 else None
    )
    assert len(counts) == 4
    assert max(counts) <= 1.25 * min(counts), counts
