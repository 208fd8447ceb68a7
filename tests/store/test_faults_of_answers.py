"""What a hostile Redis, a late answer or no memory leaves of the places of several machines, and of a line."""

import socket
from types import SimpleNamespace

import gevent
import pytest
from gevent.hub import get_hub

pytest.importorskip("redis")

from gtcpserver.server.fleet_room import FleetRoom
from gtcpserver.store import connect
from gtcpserver.store.connect import LONGEST_ANSWER, StoreError
from gtcpserver.store.line import Line
from gtcpserver.store.scripts import PLACES
from gtcpserver.store.settings import StoreSettings
from kit.programs import needs


class Stored:
    """A store that notes what it is asked; the test answers."""

    member, away, refuses_all = "m", False, False

    def __init__(self):
        self.asked, self.failures = [], []

    def add_part(self, _part):
        return 1

    def ask_share(self, _script, _number, _names, numbers, answered):
        self.asked.append((numbers, answered))
        return True

    def fail(self, error):
        self.failures.append(str(error))


@pytest.fixture
def stored():
    return Stored()


@pytest.fixture
def room(stored):
    return FleetRoom(stored, 10, SimpleNamespace(connections={1: None, 2: None}), lambda: None)


def test_a_lease_that_is_over_is_a_failure_and_not_asked_for_again_at_once(stored, room):
    assert not room.has_room()  # somebody waits
    ((_, answered),) = stored.asked
    answered(-1)
    assert stored.failures == ["the lease was over, or somebody has deleted it"]
    assert len(stored.asked) == 1


def test_an_answer_that_comes_after_the_end_takes_no_place(stored, room):
    ((_, answered),) = stored.asked
    room.leave()
    assert stored.asked[-1][0] == ["0", "0", "0", "0"]
    room.freed()
    answered(3)
    room.renew()
    assert len(stored.asked) == 2


def test_who_waits_is_told_later_when_memory_has_run_out(stored):
    told = []

    def answered():
        told.append(len(told))
        if len(told) == 1:
            raise MemoryError

    room = FleetRoom(stored, 10, SimpleNamespace(connections={}), answered)
    assert not room.has_room()
    stored.asked[0][1](5)
    while len(told) < 2:
        gevent.sleep(0.01)


def test_hiredis_reads_no_answer_without_an_end_either():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        bounded = connect._Bounded(ours)  # noqa: SLF001
        buffer, read = bytearray(65536), 0
        with pytest.raises(StoreError, match="no end"):
            while read <= LONGEST_ANSWER:
                theirs.sendall(bytes(65536))
                read += bounded.recv_into(buffer)


@needs("redis-server", "redis-cli")
def test_one_that_cannot_take_the_end_of_a_line_keeps_it_from_nobody(redis_server, monkeypatch):
    line = Line(StoreSettings(url=redis_server().url), lambda error: None, lambda: None)
    line.open([PLACES])
    heard, reported = [], []
    monkeypatch.setattr(get_hub(), "handle_error", lambda *error: reported.append(error[1]))

    def no_memory(_answer):
        raise MemoryError

    line.send(PLACES, [], [], no_memory)
    line.send(PLACES, [], [], heard.append)
    line.fail(StoreError("x"))
    assert heard == [None]
    assert reported == [MemoryError]
