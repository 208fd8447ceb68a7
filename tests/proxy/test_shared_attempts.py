"""Connection attempts are limited for all workers together."""

import pytest

from gtcpserver.proxy.errors import LimitReached
from gtcpserver.proxy.limits import LimitKeeper, Limits
from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import CLAIMED, SharedMemory

ADA, BOB = ("192.0.2.1", 1), ("192.0.2.2", 1)


@pytest.fixture
def memory():
    made = SharedMemory.make(2)
    made.words[CLAIMED] = 2
    yield made
    made.close()


def workers(memory, **limits):
    """The limits of two workers."""
    made = [LimitKeeper(Limits(**limits)) for _ in range(2)]
    for number, keeper in enumerate(made):
        keeper.share(Column(memory, number))
    return made


def test_attempts_of_one_client(memory):
    one, two = workers(memory, client_connect_attempts=2)
    first, second = one.attempts_of(ADA), two.attempts_of(ADA)
    first.begin()
    second.begin()
    for attempts in (first, second):
        with pytest.raises(LimitReached, match="client_connect_attempts"):
            attempts.begin()
    two.attempts_of(BOB).begin()
    first.end()
    second.begin()
    assert (one.attempts, two.attempts) == (0, 3)
    assert not one.attempts_by_client


def test_attempts_of_all_clients(memory):
    one, two = workers(memory, connect_attempts=2)
    first, second = one.attempts_of(ADA), two.attempts_of(BOB)
    first.begin()
    second.begin()
    with pytest.raises(LimitReached, match="connect_attempts"):
        first.begin()
    first.end()
    second.begin()
    assert (one.attempts, two.attempts) == (0, 2)


def test_attempts_of_a_worker_that_was_killed_count_no_more(memory):
    one, two = workers(memory, connect_attempts=1, client_connect_attempts=1)
    one.attempts_of(ADA).begin()
    with pytest.raises(LimitReached):
        two.attempts_of(ADA).begin()
    memory.begin_epoch(0)  # as the master does
    two.attempts_of(ADA).begin()
