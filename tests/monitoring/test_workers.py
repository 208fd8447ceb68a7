"""Metrics of worker processes: by a process of the master's that comes and goes, while the service goes on."""

import http.client
import json
import math
import os
import re
import signal
import socket
import struct
import threading
import time

import gevent.socket
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from gtcpserver.monitoring.source import Health, SourceError
from gtcpserver.supervisor import control, monitor_source
from gtcpserver.supervisor.monitor_source import FromMaster
from kit.patience import SOON
from kit.supervised import APP, Master, alive, children, wait_until
from kit.waiting import wait_until as wait_in_loop


@pytest.fixture
def start(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    masters = []

    def begin(*arguments, handler="app:handler", workers=2, metrics="127.0.0.1:0", log_path=None):
        more = ("--bind", "127.0.0.1:0", "--control", str(tmp_path / "ctl"), "--workers", str(workers))
        masters.append(Master(tmp_path, ("serve", handler, *more, "--metrics", metrics, *arguments)))
        masters[-1].log_path = log_path or masters[-1].log_path
        wait_until(masters[-1].log_path.exists)
        masters[-1].wait_listening()
        return masters[-1]

    yield begin
    for master in masters:
        master.kill_all()


def address_of(master):
    return master.wait_for(r"metrics and status page on http://(.*)/")


def fetch(address, path):
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SOON)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def value(address, metric, **labels):
    status, body = fetch(address, "/metrics")
    assert status == 200
    samples = [sample for family in parse(body) for sample in family.samples if sample.name == metric]
    return next((sample.value for sample in samples if sample.labels == labels), None)


def recorded_seconds(address):
    """What /history knows: number of connections by the number of the second."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SOON)
    connection.request("GET", "/history")
    line, _, floats = connection.getresponse().read().partition(b"\n")
    connection.close()
    head = json.loads(line)
    begin = 4 * head["series"].index("active") * head["count"]
    values = struct.unpack(f"<{head['count']}f", floats[begin : begin + 4 * head["count"]])
    return {head["first"] + index: value for index, value in enumerate(values) if not math.isnan(value)}


def monitor_of(master):
    """The child that is no worker."""
    return next(iter(children(master.pid).keys() - {one["pid"] for one in master.ask("status")["workers"]}), None)


class Polling:
    """Asks for a path all the time; `answers` has what came, exceptions too."""

    def __init__(self, address, path):
        self.answers = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address, path), daemon=True)
        self._thread.start()

    def _run(self, address, path):
        while not self._done.is_set():
            try:
                self.answers.append(fetch(address, path))
            except (OSError, http.client.HTTPException) as error:
                self.answers.append((0, repr(error)))
            time.sleep(0.01)

    def end(self):
        self._done.set()
        self._thread.join()
        return self.answers


@pytest.mark.slow
def test_metrics_of_all_workers_and_of_each(start):
    master = start()
    address = address_of(master)
    for _ in range(12):
        assert master.request()[1] == "more"
    wait_until(lambda: value(address, "gtcpserver_connections_accepted_total") == 12)
    each = [value(address, "gtcpserver_worker_connections_accepted_total", worker=worker) for worker in "01"]
    assert sum(each) == 12
    assert value(address, "gtcpserver_handler_latency_seconds_count") == 12
    assert value(address, "gtcpserver_workers", state="ready") == 2
    assert value(address, "gtcpserver_worker_resident_bytes", worker="1") > 1e7
    status = json.loads(fetch(address, "/stats")[1])
    assert [worker["stats"]["accepted"] for worker in status["workers"]] == each
    assert status["stats"]["accepted"] == 12


@pytest.mark.slow
def test_run_with_workers_and_metrics(tmp_path, python):
    (tmp_path / "app.py").write_text(APP)
    source = "from gtcpserver import run\nrun('app:handler', '127.0.0.1:0', workers=1, metrics=0)"
    process = python(source, cwd=tmp_path)
    log = ""
    while "listening on" not in log:
        log += process.stderr.readline().decode()
    address = re.search(r"metrics and status page on http://(127.0.0.1:\d+)/", log)[1]
    wait_until(lambda: fetch(address, "/readyz") == (200, "ready\n"))
    process.terminate()
    assert process.wait(SOON) == 0


@pytest.mark.slow
def test_a_monitor_that_stands_still_is_replaced(tmp_path, python):
    (tmp_path / "app.py").write_text(APP)
    source = """
        from gtcpserver import run
        from gtcpserver.supervisor import monitor

        monitor.SILENCE_SECONDS = 2.5
        run("app:handler", "127.0.0.1:0", workers=1, metrics=0, control="ctl")
    """
    process = python(source, cwd=tmp_path)
    log = ""
    while "listening on" not in log:
        log += process.stderr.readline().decode()
    address = re.search(r"metrics and status page on http://(127.0.0.1:\d+)/", log)[1]
    assert fetch(address, "/healthz")[0] == 200
    workers = {one["pid"] for one in control.ask(str(tmp_path / "ctl"), {"command": "status"})["workers"]}
    (monitor,) = children(process.pid).keys() - workers
    os.kill(monitor, signal.SIGSTOP)
    assert fetch(address, "/metrics")[0] == 200  # by the next one, when its time has come
    assert not alive(monitor)
    process.terminate()
    assert process.wait(SOON) == 0


@pytest.mark.slow
def test_counters_survive_workers_that_are_killed_and_those_that_are_replaced(start):
    master = start()
    address = address_of(master)
    for _ in range(8):
        master.request()
    wait_until(lambda: value(address, "gtcpserver_connections_accepted_total") == 8)
    used = value(address, "gtcpserver_cpu_seconds_total")
    os.kill(master.pids()[0], signal.SIGKILL)
    wait_until(lambda: value(address, "gtcpserver_worker_restarts_total") == 1)
    master.ask("reload")
    wait_until(lambda: value(address, "gtcpserver_generation") == 2)
    master.settled(2)
    assert value(address, "gtcpserver_connections_accepted_total") == 8
    assert value(address, "gtcpserver_handler_latency_seconds_count") == 8
    assert value(address, "gtcpserver_cpu_seconds_total") >= used


@pytest.mark.slow
def test_ready_through_a_reload_and_not_from_the_begin_of_a_stop(start):
    master = start("--drain-delay", "1")
    address = address_of(master)
    wait_until(lambda: fetch(address, "/readyz") == (200, "ready\n"))
    polling = Polling(address, "/readyz")
    master.ask("reload")
    master.settled(2)
    assert set(polling.end()) == {(200, "ready\n")}
    held = master.hold()[0]
    master.send_signal(signal.SIGTERM)
    wait_until(lambda: fetch(address, "/readyz") == (503, "draining\n"), 0.7)
    assert master.request()[1] == "more"  # it accepts still
    master.wait_for("SIGTERM: stopping")
    assert fetch(address, "/healthz")[0] == 200
    assert held.recv(100).endswith(b"last\n")
    assert master.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        fetch(address, "/readyz")


@pytest.mark.slow
def test_starting_and_no_worker_is_ready(start, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
        "if os.path.exists('fail'): raise RuntimeError('no')\nfrom app import handler\n"
    )
    arguments = (
        "--bind",
        "127.0.0.1:0",
        "--workers",
        "1",
        "--metrics",
        "127.0.0.1:0",
        "--control",
        str(tmp_path / "ctl"),
    )
    master = Master(tmp_path, ("serve", "slow:handler", *arguments))
    try:
        address = address_of(master)
        assert fetch(address, "/readyz") == (503, "starting\n")
        assert fetch(address, "/healthz") == (200, "ok\n")
        (tmp_path / "go").touch()
        wait_until(lambda: fetch(address, "/readyz") == (200, "ready\n"))
        (tmp_path / "fail").touch()
        os.kill(master.pids()[0], signal.SIGKILL)
        wait_until(lambda: fetch(address, "/readyz") == (503, "no worker is ready\n"))
        assert fetch(address, "/healthz")[0] == 200
    finally:
        master.kill_all()


@pytest.mark.slow
def test_a_monitor_that_dies_is_started_again_and_nobody_who_asks_is_turned_away(start):
    master = start()
    address = address_of(master)
    assert fetch(address, "/healthz")[0] == 200
    first = monitor_of(master)
    os.kill(first, signal.SIGKILL)
    assert fetch(address, "/metrics")[0] == 200
    master.wait_for(r"the monitor \(pid \d+\) was killed by SIGKILL.*The service goes on")
    assert monitor_of(master) not in (first, None)
    assert master.request()[1] == "more"
    assert len(master.settled(2)) == 2


@pytest.mark.slow
def test_an_upgrade_takes_the_address_along_without_a_lost_scrape(start):
    master = start()
    address = address_of(master)
    wait_until(lambda: fetch(address, "/readyz")[0] == 200)
    recorded = wait_until(lambda: recorded_seconds(address))
    ready, scrapes = Polling(address, "/readyz"), Polling(address, "/metrics")
    master.send_signal(signal.SIGUSR2)
    new = int(master.wait_for(r"the new master \(pid (\d+)\) is ready"))
    old, master.pid = master.pid, new
    wait_until(lambda: not alive(old))
    count = len(scrapes.answers)
    wait_until(lambda: len(scrapes.answers) > count + 3)
    assert set(ready.end()) == {(200, "ready\n")}
    assert {status for status, _ in scrapes.end()} == {200}
    assert json.loads(fetch(address, "/stats")[1])["pid"] == new
    assert recorded_seconds(address).items() >= recorded.items()


@pytest.mark.slow
def test_a_new_log_file_and_other_numbers_of_workers(start, tmp_path):
    master = start("--log-file", str(tmp_path / "new"), log_path=tmp_path / "new")
    address = address_of(master)
    first = wait_until(lambda: monitor_of(master))
    recorded = wait_until(lambda: recorded_seconds(address))
    polling = Polling(address, "/healthz")
    master.send_signal(signal.SIGUSR1)
    wait_until(lambda: monitor_of(master) not in (first, None))
    for count in (3, 1):
        master.ask("scale", workers=count)
        wait_until(lambda count=count: value(address, "gtcpserver_workers", state="ready") == count)
    assert {status for status, _ in polling.end()} == {200}
    assert recorded_seconds(address).items() >= recorded.items()


@pytest.mark.slow
def test_connections_of_all_workers_and_a_blocked_one_is_named(start):
    master = start()
    address = address_of(master)
    first, second = master.pids()
    held = [*master.hold(first), *master.hold(second)]

    def counted():  # handlers of clients that came to the other worker go on, and "total" is of each one's last report
        found = json.loads(fetch(address, "/connections")[1])
        return found if found["total"] == sum(found["places"].values()) >= len(held) else None

    found = wait_until(counted)
    assert {one["worker"] for one in found["connections"]} == {0, 1}
    assert all("in handler" in " ".join(one["where"]) for one in found["connections"])
    assert [one["age"] for one in found["connections"]] == sorted(
        (one["age"] for one in found["connections"]), reverse=True
    )
    assert found["missing"] == []
    assert any(" in handler" in place for place in found["places"])
    blocked = master.connect()
    blocked.sendall(b"block 1000\n")
    lag = "gtcpserver_worker_loop_lag_seconds"
    number = wait_until(lambda: next((worker for worker in "01" if value(address, lag, worker=worker) > 0.25), None))
    found = json.loads(fetch(address, "/connections")[1])
    assert found["missing"] == [int(number)]
    assert {one["worker"] for one in found["connections"]} == {1 - int(number)}
    for one in (*held, blocked):
        one.close()


@pytest.mark.slow
def test_the_monitor_ends_with_its_master(start):
    master = start()
    address = address_of(master)
    monitor = wait_until(lambda: monitor_of(master))
    os.kill(master.pid, signal.SIGKILL)
    wait_until(lambda: not alive(monitor))
    with pytest.raises(ConnectionRefusedError):
        fetch(address, "/healthz")


@pytest.fixture
def line():
    """A source that asks the master, and the master's end of its line."""
    ours, theirs = gevent.socket.socketpair()
    yield FromMaster(theirs), ours
    ours.close()
    theirs.close()


def test_a_master_that_stands_still_is_not_alive(line, monkeypatch):
    source, master = line
    monkeypatch.setattr(monitor_source, "SILENCE", SOON)
    master.sendall(b'{"health": {"ready": true, "word": "ready"}}\n')
    wait_in_loop(lambda: source.health() == Health(True, True, "ready"))
    monkeypatch.setattr(monitor_source, "SILENCE", 0.05)
    monkeypatch.setattr(monitor_source, "ANSWER", 0.05)
    with pytest.raises(SourceError, match="has not answered"):
        source.status()
    assert (source.health().alive, source.health().ready) == (False, False)


def test_whoever_asks_at_the_same_time_gets_the_same_answer(line):
    source, master = line
    asking = [gevent.spawn(source.status) for _ in range(50)]
    assert master.recv(1000) == b"status\n"
    master.sendall(b'{"status": {"pid": 1}}\n')
    gevent.joinall(asking, timeout=SOON, raise_error=True)
    assert {one.value["pid"] for one in asking} == {1}
    asking = gevent.spawn(source.status)
    assert master.recv(1000) == b"status\n"  # and the next one asks anew
    master.close()
    assert source.ended.wait(SOON)
    asking.kill()


@pytest.mark.slow
def test_silent_and_slow_scrapers_do_not_reach_the_master(start):
    master = start()
    address = address_of(master)
    host, _, port = address.rpartition(":")
    silent = [socket.create_connection((host, int(port)), SOON) for _ in range(300)]
    for number, one in enumerate(silent):
        if number % 2:
            one.sendall(b"GET /stats HTTP/1.1\r\nHost: x")
    for _ in range(10):
        assert master.request()[1] == "more"
        assert master.ask("status")["ready"] is True
    for one in silent:
        one.close()
    wait_until(lambda: fetch(address, "/metrics")[0] == 200)


@pytest.mark.slow
def test_sigterm_for_every_process_as_service_managers_send_it(start):
    master = start("--drain-delay", "0.5")
    address = address_of(master)
    wait_until(lambda: fetch(address, "/readyz")[0] == 200)
    os.kill(monitor_of(master), signal.SIGTERM)
    master.send_signal(signal.SIGTERM)
    wait_until(lambda: fetch(address, "/readyz") == (503, "draining\n"), 0.4)
    assert master.wait() == 0


@pytest.mark.slow
def test_neither_workers_nor_monitor_have_what_is_the_others(start):
    master = start(workers=1)
    address = address_of(master)
    assert fetch(address, "/healthz")[0] == 200
    ports = {"service": master.port, "metrics": int(address.rpartition(":")[2])}
    (worker,) = master.pids()
    held = {"service": {master.pid, worker}, "metrics": {master.pid, monitor_of(master)}}
    with open("/proc/net/tcp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    for name, port in ports.items():
        inodes = {row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"}
        for pid in (master.pid, worker, monitor_of(master)):
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd") if os.path.islink(entry.path)]
            has = any(re.fullmatch(r"socket:\[(\d+)\]", link) and link[8:-1] in inodes for link in links)
            assert has is (pid in held[name]), (name, pid)
