"""Who gives how many connections to whom, so that all workers have the same number."""

from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.supervisor.rebalance import shares


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
