"""What a worker that was taken over can do to another one by their line: nothing that lasts."""

import copy
import os
import random

import gevent
import pytest

from gtcpserver.handover import messages
from gtcpserver.handover.messages import Packet, PacketError
from gtcpserver.handover.receiver import MOST_HELD, Receiver
from gtcpserver.handover.sender import Sender
from gtcpserver.server.moving import Refused
from gtcpserver.transfer import PIPES, resumption
from kit.handing import Taker
from kit.tunnels import Destination, relaying


class Leaving:
    def __init__(self):
        self.state = {}
        self.ends = []

    def descriptors(self):
        return [0]

    def give_away(self):
        self.ends.append("given")
        return True

    def tell(self):
        self.ends.append("told")

    def stays(self, why):
        self.ends.append(why)


class Coming:
    def __init__(self, ends):
        self.ends = ends

    def begin(self):
        self.ends.append("begun")

    def drop(self):
        self.ends.append("dropped")


def test_an_answer_to_what_was_not_sent_yet_is_ignored():
    sent = []
    has_room = False

    def send(data, fds):
        if has_room:
            sent.append(messages.decode(data))
        return has_room

    sender = Sender(send, lambda: 0.0)
    ready, refused, other = Leaving(), Leaving(), Leaving()
    assert sender.offer([ready, refused, other]) == [0, 1, 2]
    sender.hear(Packet(1, ready=[0], refused=[(1, "full")]))
    assert [ready.ends, refused.ends] == [[], []]
    has_room = True
    assert sender.flush()
    assert [number for number, _ in sent[0].offer] == [0, 1, 2]
    sender.hear(Packet(1, ready=[0], refused=[(1, "busy")]))
    assert (ready.ends, refused.ends, other.ends) == (["given", "told"], ["busy"], [])


def test_a_number_offered_twice_is_refused_the_second_time():
    sent, closed, ends = [], [], []

    def send(data, fds):
        sent.append(messages.decode(data))
        return True

    receiver = Receiver(send, lambda *_: Coming(ends), closed.append)
    receiver.hear(Packet(1, offer=[(7, {})]), [10])
    receiver.hear(Packet(1, offer=[(7, {})]), [11])
    assert closed == [11]
    assert sent[-1].refused == [(7, "state")]
    receiver.end()
    assert ends == ["dropped"]


def test_a_tunnel_that_comes_without_all_its_descriptors_is_refused():
    sent, closed = [], []

    def send(data, fds):
        sent.append(messages.decode(data))
        return True

    receiver = Receiver(send, lambda *_: Coming([]), closed.append)
    receiver.hear(Packet(1, offer=[(7, {}), (8, {"descriptors": 4}), (9, {})]), [10, 11, 12])
    assert sorted(closed) == [11, 12]
    assert (sent[-1].ready, sent[-1].refused) == ([7], [(8, "descriptors"), (9, "descriptors")])


@pytest.mark.parametrize("count", [0, -1, 7, "2", None, True])
def test_an_offer_with_a_strange_number_of_descriptors_is_no_packet(count):
    with pytest.raises(PacketError):
        messages.decode(messages.encode_offers([(1, {"descriptors": count})]))


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def places_in(value, path=()):
    """Yield the path to each value within a state."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in items:
        yield from places_in(one, (*path, name))


def test_a_tunnel_with_a_strange_state_is_refused_or_ends_and_leaves_no_descriptor(serve):
    destination = Destination()
    handler = relaying(destination.address, small=True)
    server, other = serve(handler, handover=True), serve(handler, handover=True)
    tunnel = destination.tunnel(server, small=True)
    gevent.spawn(tunnel.client.sendall, bytes(8 << 20))
    gevent.sleep(0.1)
    taker = Taker(server)
    server.mover.leave()
    ((_, state),) = taker.hear().offer
    assert state["descriptors"] == 4
    before = open_descriptors()
    refused = 0
    for path in list(places_in(state))[1:]:
        for strange in (None, "x", -1, [], {}, [[]], 1e300, random.random()):
            wrong = copy.deepcopy(state)
            place = wrong
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = strange
            try:
                other.moving.drop(other.moving.take(wrong, [os.dup(fd) for fd in taker.fds]))
            except Refused:
                refused += 1
            assert open_descriptors() == before, (path, strange)
    for count in range(4):
        with pytest.raises(Refused):
            other.moving.take(state, [os.dup(fd) for fd in taker.fds[:count]])
        assert open_descriptors() == before
    assert refused > 100
    assert other.moving.expected == 0
    taker.die()
    tunnel.close()
    destination.sock.close()


def test_offers_without_descriptors_fill_no_memory():
    receiver = Receiver(lambda data, fds: False, lambda *_: Coming([]), lambda fd: None)
    for first in range(0, 50_000, 10_000):
        receiver.hear(Packet(1, offer=[(number, {}) for number in range(first, first + 10_000)]), [])
    assert len(receiver._refused) == MOST_HELD  # noqa: SLF001


@pytest.mark.parametrize(
    "lie",
    [
        {"began": 1e999},
        {"moved_at": float("nan")},
        {"broken": ["client", 2**40]},
        {"flows": [[0, True, 0, 0.0], [0, True, 0, 0.0]]},
        {"flows": [[0, True, 5, 0.0], [0, False, 0, 0.0]]},
        {"flows": [[0, False, 0, 1e999], [0, False, 0, 0.0]]},
    ],
)
def test_a_relay_that_cannot_be_is_not_gone_on_with(lie):
    flows = [[0, False, 0, 0.0], [0, False, 0, 0.0]]
    state = {"began": 1.0, "moved_at": None, "broken": None, "flows": flows}
    resumption.read(state, None, [])
    taken = PIPES.taken
    with pytest.raises((ValueError, OverflowError)):
        resumption.read({**state, **lie}, None, [])
    assert PIPES.taken == taken


def test_a_pipe_of_another_worker_serves_no_other_transfer():
    output, input_ = os.pipe2(os.O_NONBLOCK)
    unused = PIPES.unused
    os.write(input_, b"x")
    pipe = PIPES.adopt(output, input_, 1)
    with pytest.raises(OSError, match="1 of 2 bytes"):
        pipe.check(2)
    PIPES.put(pipe)
    assert PIPES.unused == unused
    assert (pipe.output, pipe.input) == (-1, -1)
    ours, theirs = os.pipe(), os.pipe()
    with pytest.raises(ValueError, match="one pipe"):
        PIPES.adopt(ours[0], theirs[1], 0)
    for fd in (*ours, *theirs):
        os.close(fd)
