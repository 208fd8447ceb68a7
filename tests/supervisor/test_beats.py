"""A worker that serves is not taken for a blocked one, whatever its counters are and whatever has run out in it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.supervised import Master, wait_until

pytestmark = pytest.mark.slow

APP = r"""
import os, resource, sys
import gevent.event
from gtcpserver.supervisor import current_worker

class Handler:
    def __call__(self, conn):
        while data := conn.recv(100):
            conn.sendall(str(current_worker().number).encode() + b"\n")

    @property
    def counters(self):
        number = current_worker().number
        if number == 2:
            return {f"client {client} of many": client for client in range(20_000)}
        if number == 3:
            raise RuntimeError("no counters today")
        if number == 4:
            return {"huge": 10**5000, "\ud800": 7, 1: 2, "none": None, "real": float("nan"), "good": 4}
        if number == 5:
            gevent.event.Event().wait()
        if number == 6:
            sys.exit(7)
        return {"good": 1}

handler = Handler()

def start(worker):
    if worker.number == 1:
        # Not one descriptor is left: /proc/self/statm cannot be opened.
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))
"""

COUNT = 7


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Master]:
    (tmp_path / "app.py").write_text(APP)
    options = ("--workers", str(COUNT), "--worker-timeout", "2", "--worker-start", "app:start")
    bind = ("--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"))
    one = Master(tmp_path, ("serve", "app:handler", *options, *bind))
    try:
        yield one.wait_listening()
    finally:
        one.kill_all()


def test_a_worker_whose_counters_cannot_be_had_is_not_killed(master: Master) -> None:
    workers = master.settled(COUNT)
    # Twice the timeout and a beat, after the first report that fails.
    time.sleep(5.25)
    status = master.ask("status")
    assert [one["pid"] for one in status["workers"]] == workers
    assert status["restarts"] == 0
    log = master.log()
    assert "blocked" not in log
    assert [one["number"] for one in status["workers"] if one["rss"] < 1e6] == [1]
    # What can be had is told: of the first, the one without descriptors, and the one with a good one among bad ones.
    assert status["stats"]["handler_counters"] == {"good": 1 + 1 + 4, "\ud800": 7}
    assert log.count("the handler has too many counters") == 1
    assert log.count("RuntimeError: no counters today") == 1
    assert master.stop() == 0
    assert "failed" not in master.log().replace("a report of counters failed", "")


def test_a_worker_without_descriptors_is_told_of_a_new_log_file_when_it_has_some(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        """
import os, resource, gevent
def handler(conn):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    conn.sendall(b"full\\n")
    conn.recv(100)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    conn.sendall(b"room\\n")
"""
    )
    log = tmp_path / "file.log"
    options = ("--workers", "1", "--log-file", str(log), "--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"))
    master = Master(tmp_path, ("serve", "app:handler", *options))
    try:
        wait_until(lambda: log.exists() and "listening on" in log.read_text())
        master.port = int(log.read_text().partition("listening on 127.0.0.1:")[2].split()[0])
        (worker,) = master.pids()
        with master.connect() as client:
            assert client.recv(100) == b"full\n"
            log.rename(tmp_path / "old.log")
            master.send_signal(signal.SIGUSR1)
            wait_until(lambda: log.exists() and "reopened" in log.read_text())
            assert os.readlink(f"/proc/{worker}/fd/2") == str(tmp_path / "old.log")
            client.sendall(b"x")
            assert client.recv(100) == b"room\n"
            wait_until(lambda: os.readlink(f"/proc/{worker}/fd/2") == str(log))
        assert master.stop() == 0
    finally:
        master.kill_all()
