"""Which worker says that Redis is away: one of those that have not said it too often."""

import logging

import pytest

from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import SharedMemory
from gtcpserver.store.settings import StoreSettings
from gtcpserver.store.store import Store

pytest.importorskip("redis")


class Turns:
    """A turn as workers have it: one at a time. (The locks of the memory are those of processes.)"""

    def __init__(self):
        self.holder = None

    def give_to(self, store):
        store.take_turn = lambda: self._take(store)
        store.end_turn = lambda: self._end(store)

    def _take(self, store):
        self.holder = self.holder or store
        return self.holder is store

    def _end(self, store):
        if self.holder is store:
            self.holder = None


@pytest.fixture
def workers():
    turns, made = Turns(), [Store(StoreSettings(url="redis://127.0.0.1:1")) for _ in range(2)]
    for store in made:
        turns.give_to(store)
    return made


def go_and_come_back(*stores):
    for store in stores:
        store._went_away(OSError("gone"))  # noqa: SLF001
    for store in stores:
        store._came_back()  # noqa: SLF001


def test_a_worker_that_has_said_enough_leaves_the_turn_to_another(workers, caplog):
    caplog.set_level(logging.INFO)
    one, two = workers
    for _ in range(3):
        go_and_come_back(one)
    said = len(caplog.records)
    assert said == 6
    go_and_come_back(one, two)  # one is silent for a minute
    assert [record.message.split()[6] for record in caplog.records[said:]] == ["away", "back"]
    go_and_come_back(one)
    go_and_come_back(two)
    assert len(caplog.records) == said + 4


def test_one_worker_speaks_for_all(workers, caplog):
    caplog.set_level(logging.INFO)
    go_and_come_back(*workers)
    assert len(caplog.records) == 2


def test_a_turn_that_was_not_taken_is_ended_without_an_error():
    memory = SharedMemory.make(1)
    column = Column(memory, 0)
    column.end_turn()
    assert column.take_turn()
    column.end_turn()
    memory.close()
