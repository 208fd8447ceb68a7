"""The file of quotas: what several processes count in it, clocks that step, files that are damaged or gone."""

import fcntl
import os
import sqlite3

import pytest

from gtcpserver.proxy import quota_file
from gtcpserver.proxy.quota_file import Ledger, read_usage

NOVEMBER, DECEMBER, JANUARY = "2026-11", "2026-12", "2027-01"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "quota")


@pytest.fixture
def ledger(path):
    """`ledger()`: another process's."""
    made = []

    def make():
        made.append(Ledger(path))
        return made[-1]

    yield make
    for one in made:
        one.close()


def used(one, period, moved=0, known=None):
    """(the period that was charged, bytes of ada) after she has moved some."""
    charged, changed = one.sync(period, {"ada": moved} if moved else {}, known or {})
    return charged, changed.get("ada")


def test_processes_count_together(ledger, path):
    one, two = ledger(), ledger()
    assert used(one, NOVEMBER, 5) == (NOVEMBER, 5)
    assert used(two, NOVEMBER, 7) == (NOVEMBER, 12)
    assert used(one, NOVEMBER) == (NOVEMBER, 12)
    assert used(one, NOVEMBER) == (NOVEMBER, None)  # only what has changed
    assert two.sync(NOVEMBER, {"bob": 1}, {})[1] == {"bob": 1}
    assert read_usage(path, NOVEMBER) == {"ada": 12, "bob": 1}
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_new_period_begins_at_zero(ledger):
    one, two = ledger(), ledger()
    used(one, NOVEMBER, 5)
    assert used(one, DECEMBER) == (DECEMBER, None)
    assert used(two, DECEMBER, 1) == (DECEMBER, 1)


def test_a_clock_that_steps_back_and_forth_grants_nothing_twice(ledger):
    one = ledger()
    used(one, NOVEMBER, 5)
    used(one, DECEMBER, 3)
    for _ in range(3):
        assert used(one, NOVEMBER) == (NOVEMBER, 5)
        assert used(one, DECEMBER) == (DECEMBER, 3)
    assert used(one, JANUARY) == (JANUARY, None)


def test_a_clock_before_the_file_was_made_charges_the_newest_period(ledger):
    one = ledger()
    used(one, NOVEMBER, 5)
    assert used(one, "1970-01", 1) == (NOVEMBER, 6)
    assert used(ledger(), "1970-01") == (NOVEMBER, 6)
    assert used(one, NOVEMBER) == (NOVEMBER, None)
    assert used(one, DECEMBER) == (DECEMBER, None)


def test_a_clock_that_was_in_the_future_locks_nobody_out(ledger):
    one = ledger()
    used(one, NOVEMBER, 5)
    used(one, "2100-01", 100)
    assert used(one, NOVEMBER) == (NOVEMBER, 5)
    assert used(one, DECEMBER, 1) == (DECEMBER, 1)
    assert used(one, JANUARY) == (JANUARY, None)


def test_a_file_that_was_made_in_the_future_locks_nobody_out_for_more_than_a_period(ledger):
    one = ledger()
    used(one, "2100-01", 100)
    assert used(one, NOVEMBER, 1) == ("2100-01", 101)
    assert used(one, DECEMBER) == (DECEMBER, None)


def test_days_and_months_are_counted_apart(ledger):
    one = ledger()
    used(one, NOVEMBER, 5)
    assert used(one, "2026-10-31", 1) == ("2026-10-31", 1)
    assert used(one, NOVEMBER) == (NOVEMBER, 5)


def test_old_periods_are_forgotten(ledger, path, monkeypatch):
    monkeypatch.setattr(quota_file, "MOST_PERIODS", 2)
    one = ledger()
    for period in (NOVEMBER, DECEMBER, JANUARY):
        used(one, period, 5)
    assert [read_usage(path, period) for period in (NOVEMBER, DECEMBER, JANUARY)] == [{}, {"ada": 5}, {"ada": 5}]


@pytest.mark.parametrize("name", ["", "a" * 5000, "straße", "x'; DROP TABLE usage; --", "\udcff", "\0"])
def test_any_name(ledger, path, name):
    ledger().sync(NOVEMBER, {name: 3}, {})
    assert list(read_usage(path, NOVEMBER).values()) == [3]


# -- files that fail ---------------------------------------------------------------------------------------------------


def damaged_files(path):
    folder = os.path.dirname(path)
    return [name for name in os.listdir(folder) if ".damaged-" in name and not name.endswith("-journal")]


@pytest.mark.parametrize("data", [b"not a database" * 1000, bytes(4096), b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_set_aside_when_it_is_opened(ledger, path, data):
    with open(path, "wb") as file:
        file.write(data)
    one = ledger()
    assert used(one, NOVEMBER, 5) == (NOVEMBER, 5)
    assert len(damaged_files(path)) == len(one.set_aside) == 1
    assert "is damaged (file is not a database): it is now " in one.set_aside[0]
    with open(os.path.join(os.path.dirname(path), damaged_files(path)[0]), "rb") as file:
        assert file.read() == data


def test_a_file_that_is_damaged_while_it_is_used_loses_little(ledger, path):
    one, two = ledger(), ledger()
    used(one, NOVEMBER, 5)
    used(two, NOVEMBER, 7)
    with open(path, "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
    assert used(one, NOVEMBER, 1, {"ada": 5}) == (NOVEMBER, 6)
    # Another process finds the new file, and adds what only it has known.
    assert used(two, NOVEMBER, 2, {"ada": 12}) == (NOVEMBER, 14)
    assert len(damaged_files(path)) == 1
    assert (len(one.set_aside), two.set_aside) == (1, [])


def test_two_processes_that_find_the_same_damage_set_one_file_aside(ledger, path):
    one, two = ledger(), ledger()
    with open(path, "wb") as file:
        file.write(b"not a database" * 1000)
    two._file = quota_file._identity(path)
    used(one, NOVEMBER, 5)
    two._set_aside(sqlite3.DatabaseError("the same"))
    assert (len(damaged_files(path)), two.set_aside) == (1, [])
    assert used(two, NOVEMBER) == (NOVEMBER, 5)


def test_a_folder_that_another_process_keeps_locked_is_an_error(ledger, path, tmp_path, monkeypatch):
    monkeypatch.setattr(quota_file, "BUSY_SECONDS", 0.1)
    one = ledger()
    locked = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="keeps the folder locked"):
            used(one, NOVEMBER, 5)
    finally:
        os.close(locked)
    assert used(one, NOVEMBER, 5) == (NOVEMBER, 5)


def test_a_file_that_was_removed_is_made_again(ledger, path):
    one = ledger()
    used(one, NOVEMBER, 5)
    os.unlink(path)
    assert used(one, NOVEMBER, 1, {"ada": 5}) == (NOVEMBER, 6)


def test_what_was_known_of_another_period_is_not_added(ledger, path):
    one = ledger()
    used(one, NOVEMBER, 5)
    os.unlink(path)
    assert used(one, DECEMBER, 1, {"ada": 5}) == (DECEMBER, 1)


def test_nothing_is_added_by_a_write_that_fails(ledger, path, monkeypatch):
    one = ledger()
    used(one, NOVEMBER, 5)
    with closing_lock(path), monkeypatch.context() as patch:
        patch.setattr(quota_file, "BUSY_SECONDS", 0.01)
        one.close()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            used(one, NOVEMBER, 1)
    assert used(one, NOVEMBER, 1) == (NOVEMBER, 6)


class closing_lock:
    """Another program that has the file locked."""

    def __init__(self, path):
        self._db = sqlite3.connect(path, isolation_level=None)

    def __enter__(self):
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, *_):
        self._db.close()
