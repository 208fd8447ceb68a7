"""Who is let in when there is room: one queue, one rule."""

from types import SimpleNamespace

import gevent
import pytest

from gtcpserver import HandlerPool
from gtcpserver.server.capacity import Capacity
from gtcpserver.server.state import ServerState, State


class Rooms:
    """A Capacity whose connections are names; those let in take a place each, and `resumed` counts the accept loop's
    turns.
    """

    def __init__(self, pool=1, max_connections=None, on_full="wait"):
        self.state = ServerState()
        self.state.become(State.SERVING)
        self.pool = HandlerPool(pool)
        options = SimpleNamespace(pool=self.pool, max_connections=max_connections, on_full=on_full)
        self.capacity = Capacity(options, self.state)
        self.state.acceptors.append(SimpleNamespace(resume=self.resume))
        self.let_in = []
        self.resumed = 0

    def resume(self):
        self.resumed += 1

    def take(self, name):
        self.let_in.append(name)
        self.pool.places.taken += 1
        self.state.connections[name] = None

    def leave(self, name):
        was_full = not self.capacity.has_room()
        del self.state.connections[name]
        self.pool.places.release()
        if was_full:
            self.capacity.made_room()
        gevent.sleep(0)
        gevent.sleep(0)


@pytest.mark.parametrize("limit", ["pool", "max_connections"])
def test_those_in_our_queue_come_first_in_their_order_then_the_accept_loops_go_on(limit):
    rooms = Rooms(pool=1) if limit == "pool" else Rooms(pool=10, max_connections=1)
    rooms.take("first")
    rooms.capacity.want_room()  # an accept loop
    for name in ("second", "third"):
        rooms.capacity.wait(name, rooms.take)
    gevent.sleep(0)
    assert (rooms.let_in, rooms.resumed) == (["first"], 0)
    rooms.leave("first")
    assert (rooms.let_in, rooms.resumed) == (["first", "second"], 0)
    rooms.leave("second")
    assert rooms.let_in == ["first", "second", "third"]
    assert rooms.resumed  # its next accept asks whether there is room
    resumed = rooms.resumed
    rooms.capacity.want_room()
    rooms.leave("third")
    assert rooms.resumed > resumed


def test_many_that_wait_are_registered_with_the_pool_once():
    rooms = Rooms(pool=1)
    rooms.take("first")
    for number in range(100):
        rooms.capacity.wait(number, rooms.take)
        rooms.capacity.want_room()
    assert len(rooms.pool.places.links) == 1


def test_one_that_cannot_be_let_in_keeps_no_other_waiting():
    rooms = Rooms(pool=1)
    rooms.take("first")

    def fail(connection):
        connection.closed = True
        raise MemoryError

    rooms.capacity.wait(SimpleNamespace(closed=False), fail)
    rooms.capacity.wait("third", rooms.take)
    del rooms.state.connections["first"]
    rooms.pool.places.taken = 0
    with pytest.raises(MemoryError):
        rooms.capacity.let_in()
    gevent.sleep(0)
    assert rooms.let_in == ["first", "third"]


def test_one_whom_no_memory_is_left_to_call_stays_the_first_and_is_tried_again_later():
    rooms = Rooms(pool=10)
    rooms.pool.places.taken = 10
    first = SimpleNamespace(closed=False)
    calls = []

    def fail_once(connection):
        calls.append(connection)
        if len(calls) == 1:
            raise MemoryError
        rooms.let_in.append(connection)

    rooms.capacity.wait(first, fail_once)
    rooms.capacity.wait("second", rooms.take)
    rooms.pool.places.taken = 0
    with pytest.raises(MemoryError):
        rooms.capacity.let_in()
    gevent.sleep(0)
    gevent.sleep(0)
    assert calls == [first]  # not again at once, without end
    assert rooms.let_in == []
    assert len(rooms.state.waiting) == 2
    rooms.capacity.look()
    assert rooms.let_in == [first, "second"]


def test_one_that_comes_when_there_is_room_is_let_in_soon_and_not_at_once():
    rooms = Rooms(pool=1)
    rooms.capacity.wait("first", rooms.take)
    assert rooms.let_in == []  # a stop that drains is no event's callback
    gevent.sleep(0)
    assert rooms.let_in == ["first"]


def test_accept_loops_stay_as_they_are_when_a_stop_has_begun():
    rooms = Rooms(pool=1)
    rooms.take("first")
    rooms.capacity.want_room()
    rooms.state.become(State.STOPPING)
    rooms.leave("first")
    assert rooms.resumed == 0
