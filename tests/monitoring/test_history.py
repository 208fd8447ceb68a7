"""The history of the status page: rings of a fixed size, which outlive the process that writes them."""

import math
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.monitoring.history import BYTES, SERIES, History, Ring, make_history
from kit.paths import ROOT

NOW = 500_000.0


def row(**values):
    return [values.get(name, 0.0) for name in SERIES]


def series(history, name, grain="second", since=0, now=NOW):
    slots = history.since(grain, since, now)
    values = struct.unpack(f"{slots.count}f", slots.values[SERIES.index(name)])
    return {slots.first + index: value for index, value in enumerate(values) if not math.isnan(value)}


def test_its_size_is_what_is_written_about_it():
    text = f"{BYTES:,} bytes"
    assert text in (ROOT / "gtcpserver/monitoring/history.py").read_text()
    assert text in (ROOT / "docs/monitoring.md").read_text()


def test_a_new_one_knows_nothing():
    history = History()
    assert series(history, "active") == series(history, "active", "minute") == {}


def test_the_oldest_is_overwritten():
    history = History()
    for second in range(4000):
        history.add(NOW + second, row(active=second))
    found = series(history, "active", now=NOW + 3999)
    assert found == {NOW + second: second for second in range(400, 4000)}
    assert series(history, "active", since=int(NOW) + 3990, now=NOW + 3999) == {
        NOW + second: second for second in range(3991, 4000)
    }


def test_a_gap_is_not_known_and_a_late_look_covers_what_it_measured():
    history = History()
    history.add(NOW, row(active=1))
    history.add(NOW + 10, row(active=2))
    history.add(NOW + 13, row(active=3), covers=2.8)
    assert series(history, "active", now=NOW + 13) == {
        NOW: 1, NOW + 10: 2, NOW + 11: 3, NOW + 12: 3, NOW + 13: 3
    }  # fmt: skip


def test_what_is_too_old_is_not_told_by_a_ring_that_has_stood_still():
    history = History()
    history.add(NOW, row(active=1))
    assert series(history, "active", now=NOW + 3599) == {NOW: 1}
    assert series(history, "active", now=NOW + 3600) == {}


def test_a_minute_has_the_mean_and_the_worst_of_its_seconds():
    history = History()
    begin = 60 * 9000
    for second in range(61):
        history.add(begin + second, row(accepted=second % 2, lag=3.0 if second == 7 else 0.001, ready=second != 9))
    found = {name: series(history, name, "minute", now=begin + 61) for name in ("accepted", "lag", "ready")}
    assert found == {"accepted": {9000: 0.5}, "lag": {9000: 3.0}, "ready": {9000: 0.0}}


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1e9, width=32)), max_size=8), st.integers(0, 60))
def test_a_ring_has_what_was_written(looks, later):
    slots = 40
    words = memoryview(bytearray(16)).cast("q")
    ring = Ring(words, 1, memoryview(bytearray(4 * slots * len(SERIES))).cast("f"), 1, slots)
    now, model = 1000, {}
    for gap, value in looks:
        now += gap
        ring.put(now, row(accepted=value))
        model[now] = value
    now += later
    found = ring.since(0, now)
    values = struct.unpack(f"{found.count}f", found.values[0])
    told = {found.first + index: value for index, value in enumerate(values) if not math.isnan(value)}
    expected = {at: value for at, value in model.items() if now - at < slots}
    assert {at: value for at, value in told.items() if at in model or value} == expected


def test_the_next_process_goes_on_in_the_same_memory():
    fd = make_history()
    try:
        History(fd).add(NOW, row(active=1))
        assert make_history(fd) == fd
        again = History(fd)
        again.add(NOW + 1, row(active=2))
        assert series(again, "active", now=NOW + 1) == {NOW: 1, NOW + 1: 2}
    finally:
        os.close(fd)


def test_a_memory_of_another_version_begins_empty(monkeypatch):
    fd = make_history()
    History(fd).add(NOW, row(active=1))
    monkeypatch.setattr("gtcpserver.monitoring.history._LAYOUT", 7)
    assert series(History(fd), "active") == {}
    monkeypatch.setattr("gtcpserver.monitoring.history.BYTES", BYTES + 4096)
    other = make_history(fd)  # which closes the old one
    assert os.fstat(other).st_size == BYTES + 4096
    os.close(other)


@pytest.mark.parametrize("last", [-(2**63), -1, 2**63 - 1, 2**40])
def test_damage_neither_stops_it_nor_makes_it_large(last):
    fd = make_history()
    history = History(fd)
    history.add(NOW, row(active=1))
    os.pwrite(fd, struct.pack("=qq", last, last), 8)
    for grain in ("second", "minute"):
        slots = history.since(grain, 0, NOW + 1)
        assert slots.count <= 3600
    history.add(NOW + 1, row(active=2))
    assert series(history, "active", now=NOW + 1)[NOW + 1] == 2
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 10)  # what is mapped stays
    os.close(fd)
