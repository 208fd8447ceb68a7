"""Lines between workers that a worker asks for without end, or that cannot be made: nothing piles up, nothing leaks."""

from __future__ import annotations

import os
import select
import socket
from types import SimpleNamespace

import pytest

from gtcpserver.handover.mover import MOST_FROM_ONE, Mover
from gtcpserver.supervisor.channel import adopt
from gtcpserver.supervisor.master import Master
from gtcpserver.supervisor.messages import HANDOVER_KINDS, WORKER_KINDS, Message, decode, encode
from gtcpserver.supervisor.pairing import ALONE_SECONDS
from gtcpserver.supervisor.slots import WorkerState
from kit.simulated import SimulatedSystem, add_worker, make_fleet


def pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def is_at_its_end(sock):
    return bool(select.select([sock], [], [], 0)[0])


# -- the master --------------------------------------------------------------------------------------------------------


@pytest.fixture
def system():
    system = SimulatedSystem()
    yield system
    system.end()


def two_workers(system):
    """A fleet of a worker that stays, and one that leaves."""
    fleet = make_fleet(system)
    slot = fleet.slots[0]
    slot.current = add_worker(fleet)
    old = add_worker(fleet, state=WorkerState.RETIRING)
    slot.gone_on.append(old)
    slot.current.handover = old.handover = True
    return fleet, old


def test_a_worker_that_says_again_and_again_that_it_is_alone_gets_a_line_now_and_then(system):
    fleet, old = two_workers(system)
    made = []
    fleet.pairing._make_line = lambda *_, **__: made.append(1) or True  # noqa: SLF001
    alone = [(decode(encode("alone"), WORKER_KINDS), None)]
    for _ in range(100):
        old.channel.receive = lambda: alone * 16
        fleet.receive(old)
        fleet.pairing.look()
    assert len(made) == 1
    system.now += ALONE_SECONDS
    fleet.receive(old)
    fleet.pairing.look()
    assert len(made) == 2


def test_a_worker_that_stays_gets_no_lines_by_saying_that_it_is_alone(system):
    fleet, _ = two_workers(system)
    current = fleet.slots[0].current
    current.paired.add(7)
    current.channel.receive = lambda: [(Message("alone", {}), None)]
    fleet.receive(current)
    assert current.paired == {7}


def test_messages_behind_one_that_fails_are_heard(system):
    fleet, old = two_workers(system)
    old.channel.receive = lambda: [(Message("reopen", {}), None), (Message("drained", {}), None)]

    def fail(*_, **__):
        raise MemoryError

    old.channel.send = fail
    with pytest.raises(MemoryError):
        fleet.receive(old)
    assert old.drained


def test_a_worker_whose_last_words_fail_is_buried(system):
    fleet, _ = two_workers(system)
    slot = fleet.slots[0]
    current = slot.current
    current.channel.receive_rest = lambda: [(Message("reopen", {}), None)]

    def fail(*_, **__):
        raise MemoryError

    current.channel.send = fail
    with pytest.raises(MemoryError):
        fleet.reap(current.pid, 9)
    assert slot.current is None
    assert current.channel.ended


def test_lines_from_the_last_master_do_not_leak_where_one_cannot_be_given(system):
    ours, theirs = pair()
    kept = []
    for slot in range(3):
        here, there = pair()
        socket.send_fds(ours, [encode("pair", slot=slot, giver=1)], [there.fileno()])
        there.close()
        kept.append(here)
    given = []

    def give(fd, slot, giver=0):
        given.append(slot)
        os.close(fd)
        raise MemoryError

    master = SimpleNamespace(
        _predecessor=adopt(theirs.detach(), HANDOVER_KINDS, takes_fds=True),
        fleet=SimpleNamespace(pairing=SimpleNamespace(give=give)),
    )

    def guarded(do, *arguments):
        with pytest.raises(MemoryError):
            do(*arguments)

    master._guarded = guarded  # noqa: SLF001
    Master._hear_predecessor(master)  # noqa: SLF001
    assert given == [0, 1, 2]
    assert all(map(is_at_its_end, kept))
    for sock in (ours, *kept):
        sock.close()
    master._predecessor.close()  # noqa: SLF001


# -- a worker ----------------------------------------------------------------------------------------------------------


def test_a_worker_takes_few_lines_from_one_other(serve):
    mover = Mover(serve(lambda conn: None, handover=True))
    ends = []
    for giver in (11, 12):
        for _ in range(MOST_FROM_ONE + 20):
            here, there = pair()
            mover.receive_on(there.detach(), giver)
            ends.append(here)
    assert sum(not is_at_its_end(end) for end in ends) == 2 * MOST_FROM_ONE
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("gtcpserver.handover.mover.Sender", "send_on"),
        ("gtcpserver.handover.mover.Mover._start_looking", "send_on"),
        ("gtcpserver.handover.mover.Receiver", "receive_on"),
        ("gtcpserver.handover.line.get_hub", "receive_on"),
        ("gtcpserver.handover.line._socket_class", "receive_on"),
    ],
)
def test_a_line_that_cannot_be_used_is_closed(serve, monkeypatch, name, use):
    mover = Mover(serve(lambda conn: None, handover=True))

    def fail(*_, **__):
        raise MemoryError

    here, there = pair()
    with monkeypatch.context() as patched:
        patched.setattr(name, fail)
        with pytest.raises(MemoryError) as raised:
            getattr(mover, use)(there.detach())
        assert raised.tb  # keeps alive what a collection might close
        assert is_at_its_end(here)
    assert not mover.serves()
    here.close()
