"""`max_connections` on several machines, against a real Redis. The "machines" are members of one process."""

import logging
from types import SimpleNamespace

import gevent
import pytest

from gtcpserver.server import fleet_room
from gtcpserver.server.fleet_room import FleetRoom
from gtcpserver.store import store
from kit.programs import needs
from kit.waiting import wait_until

pytest.importorskip("redis")
pytestmark = needs("redis-server", "redis-cli")


def greet(conn):
    conn.sendall(b"+")
    conn.recv(1)


def greet_and_idle(conn):
    conn.sendall(b"+")
    with conn.idle():
        conn.recv(1)


@pytest.fixture
def machines(redis_server, serve, join):
    """`machines(number, **options)` starts servers of one Redis, each with a store of its own."""

    def start(number=2, handler=greet, **options):
        url = redis_server().url
        options = {"store_timeout": 10, **options}
        # The URLs differ, and mean the same.
        return [serve(handler, shared_limits=f"{url}?{'prefix=gtcpserver&' * at}", **options) for at in range(number)]

    return start


@pytest.fixture
def come(connect, in_thread):
    """`come(server)` connects, and returns the socket if it was served, None if it was refused."""

    def come(server):
        client = connect(server)
        try:
            return client if in_thread(client.recv, 1) == b"+" else None
        except ConnectionError:
            return None

    return come


def test_connections_of_all_machines_are_counted_exactly(machines, come):
    one, two = machines(max_connections=3, on_full="reject")
    held = [come(server) for server in (one, two, one)]
    assert None not in held
    assert come(one) is come(two) is None
    assert one.stats().rejected == two.stats().rejected == 1
    held[0].close()
    assert wait_until(lambda: come(two))
    assert come(one) is None
    assert one.active_connections + two.active_connections == 3


def test_of_connections_at_the_same_moment_none_is_served_too_many(machines, connect, in_thread):
    servers = machines(4, max_connections=10, on_full="reject")
    clients = [connect(server) for server in servers for _ in range(8)]

    def answers():
        return [client.recv(1) for client in clients]

    assert sorted(in_thread(answers)) == [b""] * 22 + [b"+"] * 10


def test_a_connection_waits_until_another_machine_has_room(machines, come, connect, in_thread, caplog):
    one, two = machines(max_connections=2)
    held = [come(one), come(one)]
    waiting = connect(two)
    wait_until(lambda: "max_connections (2) is reached, new connections wait" in caplog.text)
    assert not two.active_connections
    held[0].close()
    assert in_thread(waiting.recv, 1) == b"+"
    held[1].close()
    assert come(one)


def test_an_idle_connection_makes_room(machines, come):
    one, two = machines(handler=greet_and_idle, max_connections=2, on_full="close_idle")
    held = [come(server) for server in (one, two)]
    assert None not in held
    assert wait_until(lambda: come(one))
    assert one.active_connections == two.active_connections == 1


def test_nothing_is_said_and_nothing_is_left_in_redis_where_there_is_room(redis_server, serve, come, caplog):
    caplog.set_level(logging.INFO)
    redis = redis_server()
    server = serve(greet, shared_limits=redis.url, store_timeout=10, max_connections=100)
    for _ in range(5):
        assert come(server)
    assert "full" not in caplog.text
    assert redis.ask("EXISTS", "gtcpserver:places") == "1"
    server.halt()
    assert redis.ask("KEYS", "*") == ""


@pytest.mark.parametrize("choice", ["local", "allow", "refuse"])
def test_what_holds_while_redis_is_away(serve, come, choice):
    options = {"shared_limits": "redis://127.0.0.1:1", "on_store_failure": choice}
    server = serve(greet, max_connections=2, on_full="reject", **options)
    served = 0 if choice == "refuse" else 2  # it protects the machine: its own limit holds on
    assert [come(server) is not None for _ in range(3)] == [True] * served + [False] * (3 - served)


def test_connections_that_wait_are_served_when_redis_is_back(redis_server, serve, connect, in_thread, monkeypatch):
    monkeypatch.setattr(store, "LONGEST_PAUSE", 0.05)
    redis = redis_server()
    redis.kill()
    options = {"on_store_failure": "refuse", "store_timeout": 10}
    server = serve(greet, max_connections=2, shared_limits=redis.url, **options)
    waiting = connect(server)
    wait_until(lambda: server.stats().store_away)
    gevent.sleep(0.05)
    assert not server.stats().accepted
    redis.start()
    assert in_thread(waiting.recv, 1) == b"+"


# -- the stock ---------------------------------------------------------------------------------------------------------


class Machine:
    """A process whose connections are numbers."""

    def __init__(self, store, most):
        self.store = store
        self.state = SimpleNamespace(connections={})
        self.room = FleetRoom(store, most, self.state, lambda: None)

    def take(self):
        """Take a place, if there is one."""
        for _ in range(3):  # a question may be under way, of when there were fewer connections
            if self.room.has_room():
                self.state.connections[object()] = None
                return True
            self.settle()
        return False

    def end_one(self):
        self.state.connections.popitem()
        self.room.freed()

    def settle(self):
        """Wait until all that was asked is answered."""
        while self.store.wrong("nobody") is not None and self.room.is_asking:
            pass


@pytest.fixture
def members(redis_server, join, monkeypatch):
    """`members(number, most)`: machines that renew only when they are told."""
    monkeypatch.setattr(store, "RENEW_SECONDS", 1000)
    monkeypatch.setattr(fleet_room, "AGAIN_SECONDS", 0.001)
    server = redis_server()

    def make(number, most):
        made = [Machine(join(server.url), most) for _ in range(number)]
        for one in made * 4:  # some seconds go by: the first was alone
            one.store.renew()
            one.settle()
        made[0].redis = server
        return made

    return make


def test_most_connections_are_no_question(members):
    one, _ = members(2, 1000)
    asked = []
    ask, one.store.ask_share = one.store.ask_share, lambda *words: asked.append(words) or ask(*words)
    for _ in range(200):
        assert one.take()
        one.settle()
    assert len(asked) < 20


def fill(machine, *others):
    """Take all places; the others give theirs back within some seconds."""
    for _ in range(6):
        while machine.take():
            pass
        for one in others:
            one.store.renew()
            one.settle()
        gevent.sleep(0.005)  # it asks again


def test_a_stock_that_is_not_needed_goes_to_those_who_need_it(members):
    one, two = members(2, 100)
    assert one.take()
    one.settle()
    fill(two, one)
    assert len(two.state.connections) == 99
    assert not one.take()
    two.end_one()
    two.settle()
    gevent.sleep(0.005)
    assert one.take()


def test_places_of_a_machine_that_died_are_free(members):
    one, two = members(2, 4)
    fill(two, one)
    assert len(two.state.connections) == 4
    assert not one.take()
    one.redis.ask("ZREM", "gtcpserver:members", two.store.member)
    gevent.sleep(0.005)
    assert [one.take() for _ in range(5)] == [True] * 4 + [False]


def test_a_machine_that_comes_back_has_what_is_open_and_no_more(members, monkeypatch):
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.01)
    one, two = members(2, 10)
    for _ in range(6):
        assert one.take()
    one.redis.ask("ZREM", "gtcpserver:members", one.store.member)  # as if it was paused for long
    one.settle()
    fill(two)
    assert len(two.state.connections) == 10
    one.store.renew()
    wait_until(lambda: one.store.failures and not one.store.away)
    one.settle()
    assert not one.take()
    for _ in range(7):
        two.end_one()
        two.settle()
    gevent.sleep(0.005)
    assert one.take()
    gevent.sleep(0.005)
    assert not one.take()


def test_an_answer_that_is_none_of_ours_is_a_failure(members, monkeypatch):
    monkeypatch.setattr(fleet_room, "PLACES", "return 'x'")
    monkeypatch.setattr(store, "PLACES", "return 'x'")
    (one,) = members(1, 10)
    assert one.store.failures
