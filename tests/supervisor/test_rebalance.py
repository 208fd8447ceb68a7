"""Who gives how many connections to whom, so that all workers have the same number."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.supervisor.rebalance import Rebalance, shares


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


@pytest.mark.parametrize("counts", [[0.5, 0], [-3, 0.1], [1e18, 0.3, -1e18]])
def test_an_operator_gets_an_answer_whatever_workers_count(counts):
    workers = [SimpleNamespace(pid=pid, stats={"active": count}) for pid, count in enumerate(counts)]
    pairing = SimpleNamespace(staying=lambda: workers, share=lambda *_: False)
    fleet = SimpleNamespace(system=SimpleNamespace(monotonic=lambda: 0.0), pairing=pairing, workers={})
    answers = []
    assert Rebalance(fleet, answers.append).is_done(0.0)
    assert answers == [{"ok": True, "moved": 0}]
