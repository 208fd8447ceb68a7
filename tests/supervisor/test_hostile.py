"""A worker that was taken over says what it likes to the master, which serves on and tells the truth of all others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.server.stats import ServerStats
from gtcpserver.supervisor.messages import MAX_NAMES, MAX_NUMBER, checked_stats, checked_table
from gtcpserver.supervisor.monitor import MAX_ANSWERS
from gtcpserver.supervisor.totals import Totals
from kit.simulated import MonitorFate, SimulatedMaster, SimulatedSystem
from kit.supervised import COMMAND, Master, alive, wait_until

HOSTILE = r"""
import array, errno, json, os, socket, stat, time
from gtcpserver.supervisor import current_worker

def channel():
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        if sock.type == socket.SOCK_SEQPACKET:
            sock.setblocking(True)
            return sock
    raise SystemExit("no channel")

def send(line, data, rights):
    # Under way may be as many as an ordinary user may have open (ETOOMANYREFS, unix(7)).
    while True:
        try:
            return line.sendmsg([data], rights)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            time.sleep(0.001)

def handler(conn):
    while line := conn.recv_until(b"\n", 200_000):
        if line == b"who\n":
            conn.sendall(f"{current_worker().number} {os.getpid()}\n".encode())
        elif line.startswith(b"raw "):
            channel().send(line[4:-1])
            conn.sendall(b"sent\n")
        elif line == b"descriptors\n":
            line = channel()
            with open("/dev/null") as file:
                fds = array.array("i", [file.fileno()] * 250)
                for kind in ("beat", "ready", "nonsense"):
                    for _ in range(20):
                        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
                        send(line, json.dumps({"kind": kind, "lag": 0}).encode(), rights)
            conn.sendall(b"sent\n")
        elif line == b"flood\n":
            line = channel()
            packet = json.dumps({"kind": "stats", "stats": {"handler_counters": {str(i): i for i in range(5000)}}})
            for _ in range(300):
                line.send(packet.encode())
            conn.sendall(b"sent\n")
"""

ROW = {"peer": "a", "age": 1, "bytes_received": 1, "bytes_sent": 1, "idle": False, "tls": None, "server_name": None}

# Each as it is written to the channel.
LIES = (
    '{"kind": "stats", "stats": {"accepted": "many", "active": [], "latency": 5, "cpu_seconds": {}, "uptime": null}}',
    '{"kind": "stats", "stats": {"accepted": Infinity, "active": NaN, "bytes_sent": 1e999, "peak": -1e999}}',
    '{"kind": "stats", "stats": {"accepted": 1' + "0" * 4000 + "}}",
    '{"kind": "stats", "stats": {"accepted": {"a": 1}, "handshake_failures": 7, "clients_refused": {"a": "b"}}}',
    '{"kind": "stats", "stats": {"handler_counters": {"a": {"b": 1}, "c": [1], "\\ud800": 1, "NaN": NaN}}}',
    '{"kind": "stats", "stats": {"handler_counters": {"' + "x" * 100_000 + '": 1}, "of my own": {"a": 1}}}',
    '{"kind": "stats", "stats": {"pool_size": "none", "queue_wait_mean": "x", "queue_wait_samples": "y"}}',
    '{"kind": "stats", "stats": 7, "rss": "much"}',
    '{"kind": "stats", "stats": {}, "rss": Infinity}',
    '{"kind": "beat", "lag": Infinity}',
    '{"kind": "beat", "lag": -1e300}',
    '{"kind": "beat", "lag": "late"}',
    '{"kind": "connections", "table": [1, "x", null, {"age": "old"}, {"age": [], "peer": 5}]}',
    '{"kind": "connections", "table": {"age": 1}}',
    '{"kind": "failed", "error": 5, "details": [], "status": Infinity}',
    '{"kind": "failed", "error": "x", "status": 1e999}',
    '{"kind": "retire", "why": {"a": 1}}'.replace("retire", "nonsense"),
    '{"kind": ["beat"]}',
    '{"kind": {"beat": 1}}',
    "[" * 100_000,
    "\x00\xff",
    "x" * 150_000,
    '{"kind": "enough"}',  # without max_accepts
    '{"kind": "ready", "ends": true}',  # it is ready already
    '{"kind": "enough"}',
)


@pytest.fixture
def master(tmp_path: Path) -> Iterator[Master]:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    options = ("--workers", "2", "--control", str(tmp_path / "ctl"), "--metrics", "0")
    one = Master(tmp_path, ("serve", "hostile:handler", "--bind", "127.0.0.1:0", *options))
    try:
        one.wait_listening()
        one.settled(2)
        yield one
    finally:
        one.kill_all()


class Client:
    """A connection to one worker."""

    def __init__(self, master: Master) -> None:
        self.sock = master.connect()
        self.lines = self.sock.makefile("rb")
        self.number, self.pid = map(int, self.ask(b"who").split())

    def ask(self, line: bytes) -> bytes:
        self.sock.sendall(line + b"\n")
        return self.lines.readline()


def strict(text: bytes | str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON (RFC 8259)")

    return json.loads(text, parse_constant=refuse)


def check_that_all_is_told(master: Master, url: str) -> None:
    for arguments in (("status",), ("status", "--json"), ("workers",)):
        command = [*COMMAND, "ctl", "--control", master.control, *arguments]
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
        if "--json" in arguments:
            status = strict(done.stdout)
            assert len(status["workers"]) == 2
            assert type(status["stats"]["accepted"]) is int
            assert 0 < status["stats"]["accepted"] < 1000
    for path in ("metrics", "stats", "connections", "readyz"):
        with urlopen(url + path, timeout=60) as answer:
            body = answer.read()
        if path in ("stats", "connections"):
            strict(body)
    with urlopen(url + "metrics", timeout=60) as answer:
        assert b'\ngtcpserver_workers{state="ready"} 2.0\n' in answer.read()


@pytest.mark.slow
def test_no_lie_of_a_worker_breaks_what_the_master_tells(master: Master) -> None:
    url = master.wait_for(r"status page on (http://\S+)")
    client = Client(master)
    for lie in LIES:
        assert client.ask(b"raw " + lie.encode("latin-1")) == b"sent\n"
    assert client.ask(b"flood") == b"sent\n"
    # Its own words are among them, and are heard all the same.
    check_that_all_is_told(master, url)
    assert "the master failed" not in master.log()
    monitors = master.log().count("the monitor")
    # And when it is gone, its last counters stay in the sums.
    client.ask(b"raw " + LIES[1].encode())
    os.kill(client.pid, signal.SIGKILL)
    master.settled(2)
    wait_until(lambda: not alive(client.pid))
    check_that_all_is_told(master, url)
    assert len(master.ask("status")["stats"]["handler_counters"]) <= MAX_NAMES
    assert master.log().count("the monitor") == monitors == 0
    assert "the master failed" not in master.log()
    assert len(master.log().splitlines()) < 30
    assert master.stop() == 0


@pytest.mark.slow
def test_descriptors_that_a_worker_sends_are_not_taken(master: Master) -> None:
    client = Client(master)
    before = len(os.listdir(f"/proc/{master.pid}/fd"))
    for _ in range(3):
        assert client.ask(b"descriptors") == b"sent\n"
    for _ in range(2):
        master.ask("status")  # whose answer of the worker comes behind them
    assert len(os.listdir(f"/proc/{master.pid}/fd")) <= before + 1  # a ctl client that is just leaving
    assert client.pid in master.pids()


@pytest.mark.slow
def test_a_flood_of_one_worker_keeps_the_master_from_nothing(master: Master) -> None:
    client = Client(master)
    client.sock.sendall(b"flood\n" * 5)
    for _ in range(5):
        master.ask("status")
    assert client.lines.readline() == b"sent\n"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*ServerStats.__slots__, "latency", "cpu_seconds", "x"])


@pytest.mark.slow
@given(st.lists(st.dictionaries(names, values) | values, max_size=4))
def test_whatever_is_counted_can_be_added_up_and_written(all_stats: list[Any]) -> None:
    totals = Totals()
    for stats in all_stats:
        totals.forget_worker(checked_stats(stats))
        found = totals.of([checked_stats(stats)])
        json.dumps(found, allow_nan=False)
        assert all(abs(value) < MAX_NUMBER * 20 for value in found.values() if isinstance(value, (int, float)))


@pytest.mark.slow
@given(st.lists(st.dictionaries(st.sampled_from([*ROW, "where"]), values) | values, max_size=4) | values)
def test_any_table_is_rows_of_a_known_shape(table: Any) -> None:
    for row in checked_table(table):
        assert set(row) == {*ROW, "where"}
        json.dumps(row, allow_nan=False)
        assert row["age"] < MAX_NUMBER
    assert checked_table([{**ROW, "where": ["a", 1]}, {**ROW, "where": None}]) == [{**ROW, "where": ["a"]}]


def test_counters_of_ever_new_names_do_not_pile_up() -> None:
    totals = Totals()
    for worker in range(5):
        stats = {"handler_counters": {f"{worker} {number}": 1 for number in range(2 * MAX_NAMES)}}
        totals.forget_worker(checked_stats(stats))
    assert len(totals.gone["handler_counters"]) == MAX_NAMES


def test_a_monitor_that_asks_and_does_not_read_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    system = SimulatedSystem()
    system.monitor_fates.append(MonitorFate(starts_after=None))
    master = SimulatedMaster(system, workers=1, metrics="127.0.0.1:0")
    monkeypatch.setattr(master.master, "status_for_monitor", lambda: {"padding": 100_000 * "x"})
    master.run(1.0)
    (monitor,) = system.monitors.values()
    for _ in range(200):
        for _ in range(20):
            monitor.say("status")
        master.run(0.05)
    monitor.start_reading()
    master.run(5.0)
    assert monitor.running
    assert MAX_ANSWERS < 100_000 * monitor.answers["status"] < MAX_ANSWERS + 200_000
    system.end()
