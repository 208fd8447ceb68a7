"""What is recorded for the status page, of the statuses of a service."""

import gzip
import json
import math
import struct
import time
from types import SimpleNamespace

import pytest

from gtcpserver.monitoring.history import SERIES, History
from gtcpserver.monitoring.recorder import Recorder
from gtcpserver.monitoring.source import SourceError
from gtcpserver.monitoring.web import Web

NOW = 500_000.0


def worker(state="ready", lag=0.001, **more):
    return {"number": 0, "state": state, "lag": lag, "lagging": False, "rss": 1000, **more}


def status(uptime=100.0, pid=1, workers=None, **stats):
    latency = {"0.001": stats.pop("requests", 0), "sum": 0.5}
    return {
        "pid": pid,
        "uptime": uptime,
        "ready": True,
        "target": 1,
        "generation": stats.pop("generation", 1),
        "restarts": stats.pop("restarts", 0),
        "workers": [worker()] if workers is None else workers,
        "stats": {"latency": latency, "handlers": 3, "pool_size": 4, "active": 9, "uptime": uptime, **stats},
    }


@pytest.fixture
def recorded():
    """`recorded(*statuses)`: the newest row that these give, one a second, by name."""

    def of(*statuses, seconds=1.0):
        history = History()
        recorder = Recorder(SimpleNamespace(), history)
        for index, one in enumerate(statuses):
            recorder.record(one, NOW + seconds * index)
        slots = history.since("second", 0, NOW + seconds * len(statuses))
        return {
            name: struct.unpack(f"{slots.count}f", values)[-1]
            for name, values in zip(SERIES, slots.values, strict=True)
            if slots.count
        }

    return of


def test_counters_are_told_as_growth_a_second(recorded):
    before = status(accepted=10, handshake_failures={"eof": 1}, requests=7)
    after = status(accepted=16, handshake_failures={"eof": 2, "reset": 3}, requests=27, generation=2)
    found = recorded(before, after, seconds=2.0)
    assert (found["accepted"], found["handshake_failures"], found["latency_0.001"]) == (3, 2, 10)
    assert (found["reloaded"], found["active"], found["pool_used"], found["ready"]) == (0.5, 9, 0.75, 1)


def test_a_process_that_began_long_ago_has_no_rates_at_the_first_look(recorded):
    found = recorded(status(accepted=10))
    assert math.isnan(found["accepted"])
    assert found["active"] == 9


def test_a_new_process_is_a_start_and_what_it_has_counted_is_told(recorded):
    found = recorded(status(accepted=500), status(pid=2, uptime=1.2, accepted=4))
    assert (found["accepted"], found["started"], found["reloaded"]) == (4, 1, 0)


def test_a_monitor_of_a_server_that_runs_for_long_does_not_tell_its_past_as_one_second(recorded):
    assert math.isnan(
        recorded(status(uptime=1.0, accepted=500) | {"stats": {"accepted": 500, "uptime": 9e5}})["accepted"]
    )


@pytest.mark.parametrize(
    "bad",
    [{"lag": 3.0}, {"lagging": True}, {"state": "starting"}, {"state": "killed"}],
    ids=lambda bad: next(iter(bad)),
)
def test_a_worker_that_does_not_serve_is_not_ready(recorded, bad):
    found = recorded(status(workers=[worker(), worker(**bad)]))
    assert found["ready"] == 1
    assert found["lag"] == pytest.approx(bad.get("lag", 0.001))


def test_a_pool_without_a_limit_is_not_full(recorded):
    assert math.isnan(recorded(status(pool_size=None))["pool_used"])


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def past():
    """`past(query)`: (status, body) of /history."""
    history = History()
    web = Web(SimpleNamespace(status=None), history, "1.0", for_this_host=False)

    def get(query="", **more):
        told = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/history", "QUERY_STRING": query, **more}
        body = b"".join(web(environ, lambda status, _headers: told.append(status)))
        return told[0], body

    get.history = history
    return get


def test_history_is_a_line_of_json_and_floats(past, monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: NOW + 1)
    for second in range(3):
        past.history.add(NOW - 1 + second, [float(second)] * len(SERIES))
    answer, body = past(f"grain=second&since={NOW - 1:.0f}")
    assert answer == "200 OK"
    line, _, floats = body.partition(b"\n")
    head = json.loads(line)
    assert (head["first"], head["count"], head["step"], head["series"]) == (NOW, 2, 1, list(SERIES))
    assert (len(line) + 1) % 4 == 0
    assert struct.unpack(f"<{2 * len(SERIES)}f", floats) == (1.0, 2.0) * len(SERIES)


@pytest.mark.parametrize(
    ("accepts", "packs"),
    [("gzip, deflate", True), ("br, GZIP ; q=0.5", True), ("", False), ("gzip;q=0", False), ("gzip; q=0.0, br", False)],
)
def test_what_is_large_is_compressed_for_clients_that_take_it(past, accepts, packs):
    past.history.add(time.monotonic(), [1.0] * len(SERIES))
    plain = past()[1]
    body = past(HTTP_ACCEPT_ENCODING=accepts)[1]
    assert (len(body) < len(plain) / 10) is packs
    assert (gzip.decompress(body) if packs else body)[-400:] == plain[-400:]


@pytest.mark.parametrize("query", ["grain=year", "since=x", "since=-1", "since=1e9", "since=" + "9" * 5000, "grain="])
def test_queries_that_cannot_be_answered(past, query):
    assert past(query)[0] == "400 Bad Request"


@pytest.mark.parametrize("query", ["", "since=999999999999999", "grain=minute", "x=%00&&&=", "since=0&since=5"])
def test_queries_that_can(past, query):
    assert past(query)[0] == "200 OK"


def test_a_source_that_fails_leaves_a_gap_and_is_told_once(monkeypatch, caplog):
    history, failures = History(), [SourceError("no answer"), MemoryError(), MemoryError(), None]

    def answer():
        failure = failures.pop(0)
        if failure is not None:
            raise failure
        return status()

    recorder = Recorder(SimpleNamespace(status=answer), history)

    def sleep(_seconds, ref):
        if not failures:
            raise KeyboardInterrupt  # the end of the test

    monkeypatch.setattr("gevent.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        recorder._run()  # noqa: SLF001  its loop
    assert [one.message for one in caplog.records] == ["cannot record what the status page shows of the past"]
