"""Who gives how many connections to whom, so that all workers have the same number."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.supervisor.messages import Message
from gtcpserver.supervisor.rebalance import REBALANCE_SECONDS, TELL_SECONDS, Rebalance, shares
from gtcpserver.supervisor.slots import WorkerState


@given(st.lists(st.integers(0, 1000), max_size=12))
def test_all_have_the_same_number_or_one_more(counts):
    after = list(counts)
    for giver, taker, count in shares(counts):
        assert count > 0
        assert after[giver] - count >= min(counts)
        after[giver] -= count
        after[taker] += count
    assert sum(after) == sum(counts)
    assert max(after, default=0) - min(after, default=0) <= 1


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_no_more_move_than_must(counts):
    least = sum(counts) // len(counts)
    assert sum(count for _, _, count in shares(counts)) <= sum(max(0, count - least) for count in counts)
    assert len(shares(counts)) < len(counts)


class Worker(SimpleNamespace):
    __hash__ = object.__hash__


class Fleet:
    """Workers that stay, with so many connections each; `told` has what they were told to give.

    Attributes:
        refuses: workers that cannot be told now, such as for want of descriptors.
    """

    def __init__(self, *counts):
        self.now = 0.0
        self.told = []
        self.refuses = set()
        self.system = SimpleNamespace(monotonic=lambda: self.now)
        self.workers = {
            slot: Worker(slot=slot, pid=slot, state=WorkerState.READY, stats={"active": count, "moved": 10})
            for slot, count in enumerate(counts)
        }
        self.pairing = SimpleNamespace(staying=lambda: list(self.workers.values()), share=self._share)
        self.answers = []
        self.rebalance = Rebalance(self, self.answers.append)

    def _share(self, giver, taker, count):
        if giver.slot in self.refuses:
            return False
        self.told.append((giver.slot, taker.slot, count))
        return True

    def report(self, slot, moved):
        self.rebalance.hear(self.workers[slot], Message("shared", {"moved": moved}))

    def look(self, seconds=0.0):
        self.now += seconds
        if self.rebalance.is_over(self.now):
            self.rebalance.tell()
        return self.answers


@pytest.mark.parametrize("counts", [[0.5, 0], [-3, 0.1]])
def test_an_operator_gets_an_answer_whatever_workers_count(counts):
    assert Fleet(*counts).look() == [{"ok": True, "moved": 0}]


def test_the_answer_counts_what_has_moved():
    fleet = Fleet(30, 0, 0)
    assert fleet.told == [(0, 1, 10), (0, 2, 10)]
    assert fleet.look() == []
    fleet.report(0, 29)
    assert fleet.look() == [{"ok": True, "moved": 19}]


def test_a_worker_that_cannot_be_told_is_told_a_little_later():
    fleet = Fleet(0, 0)
    fleet.workers[0].stats["active"] = 10
    fleet.refuses = {0}
    fleet.rebalance = Rebalance(fleet, fleet.answers.append)
    assert fleet.look(0.3) == []
    fleet.refuses.clear()
    assert fleet.look(0.3) == []
    assert fleet.told == [(0, 1, 5)]
    fleet.report(0, 15)
    assert fleet.look() == [{"ok": True, "moved": 5}]


def test_a_worker_that_can_never_be_told_is_an_error(caplog):
    fleet = Fleet(0, 0, 0)
    fleet.workers[0].stats["active"] = 30
    fleet.refuses = {0}
    fleet.rebalance = Rebalance(fleet, fleet.answers.append)
    fleet.look(TELL_SECONDS / 2)
    fleet.look(TELL_SECONDS)
    said = "rebalanced in part: 0 connections moved; worker 0 cannot be told to give 10 to worker 1, and 1 more such"
    assert fleet.answers == [{"error": said}]
    assert "rebalanced in part" in caplog.text


def test_a_worker_that_does_not_finish_is_an_error():
    fleet = Fleet(10, 0)
    assert fleet.look(REBALANCE_SECONDS + 1) == [
        {"error": "rebalanced in part: 0 connections moved; worker 0 has not finished in 30 s"}
    ]


def test_workers_that_end_meanwhile_are_not_waited_for():
    fleet = Fleet(10, 0)
    del fleet.workers[0]
    assert fleet.look() == [{"ok": True, "moved": 0}]
