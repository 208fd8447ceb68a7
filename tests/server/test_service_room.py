"""ServiceRoom: what a server does while all workers together are full."""

from types import SimpleNamespace

import gevent
import pytest

from gtcpserver.server.service_room import LOOK_SECONDS, ServiceRoom
from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import SharedMemory


@pytest.fixture
def memory():
    made = SharedMemory.make(2)
    yield made
    made.close()


def test_a_full_service_looks_for_room_at_its_interval(memory):
    other = Column(memory, 1)
    other.set_number("connections", 5)
    looks = []

    def let_in():  # as Capacity's, with a connection that waits
        looks.append(room.has_room())

    state = SimpleNamespace(connections={})
    room = ServiceRoom(Column(memory, 0), 5, None, state, let_in, lambda: None)
    assert not room.has_room()
    gevent.sleep(10 * LOOK_SECONDS)
    assert 1 <= len(looks) <= 11
    other.set_number("connections", 4)
    gevent.sleep(2 * LOOK_SECONDS)
    assert looks[-1]
    number = len(looks)
    gevent.sleep(3 * LOOK_SECONDS)
    assert len(looks) == number
