"""Random schedules of a handover: whatever is late, full, touched or dead, each byte is read once, and in order.

Both state machines run against a simulated line and simulated sockets. `make move-schedules` has more than the two
thousand schedules of each run of the suite.
"""

from __future__ import annotations

import os
import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtcpserver.handover import messages
from gtcpserver.handover.messages import Packet, PacketError
from gtcpserver.handover.receiver import Receiver
from gtcpserver.handover.sender import MOST_UNDER_WAY, OFFER_SECONDS, Sender

SCHEDULES = int(os.environ.get("GTCPSERVER_MOVE_SCHEDULES", "2000"))


class Socket:
    """A connection's socket: bytes from its client, which every process with a descriptor could read."""

    def __init__(self):
        self.sent = 0
        self.queue = deque()
        self.read = []  # by programs, in the order in which they did
        self.readers = set()  # who may read it now
        self.lost = False  # inside a process that was killed

    def arrive(self):
        self.queue.append(self.sent)
        self.sent += 1

    def check(self):
        assert len(self.readers) <= 1, f"{self.readers} read the same socket"


class Old:
    """A connection in the old worker."""

    def __init__(self, world, sock):
        self.world, self.sock = world, sock
        self.kept = []
        self.frozen = self.given = self.gone = False
        self.number = None
        sock.readers.add("old")

    # -- its handler
    def act(self):
        if self.frozen or self.given or self.gone:
            return
        for byte in self.kept:
            self.sock.read.append(byte)
        self.kept = []
        if self.sock.queue:
            self.sock.read.append(self.sock.queue.popleft())

    def read_ahead(self):
        if not (self.frozen or self.given or self.gone) and self.sock.queue:
            self.kept.append(self.sock.queue.popleft())

    def freeze(self):
        self.frozen = True
        self.sock.readers.discard("old")

    def thaw(self):
        self.frozen = False
        self.sock.readers.add("old")
        self.sock.check()

    def touch(self):
        if self.frozen and not self.given:
            self.thaw()
            self.world.sender.withdraw(self.number)
            self.act()

    # -- Leaving
    @property
    def state(self):
        return {"kept": list(self.kept)}

    def descriptors(self):
        return [self.world.socks.index(self.sock)]

    def give_away(self):
        if self.world.random.random() < 0.1:
            return False
        self.given = True
        return True

    def tell(self):
        assert self.given

    def stays(self, why):
        assert self.frozen
        assert not self.given
        self.thaw()

    def arrived(self):
        assert self.given
        self.gone = True

    def returned(self):
        assert self.given
        self.given = False
        self.thaw()


class New:
    """A connection in the new worker."""

    def __init__(self, world, sock, kept):
        self.world, self.sock, self.kept = world, sock, kept
        self.begun = False

    def act(self):
        if self.begun and self in self.world.new:
            self.sock.read += self.kept
            self.kept = []
            if self.sock.queue:
                self.sock.read.append(self.sock.queue.popleft())

    def begin(self):
        self.begun = True
        self.sock.readers.add("new")
        self.sock.check()
        self.act()

    def drop(self):
        assert not self.begun
        self.world.new.remove(self)


class World:
    """Two workers, a line between them, and a clock."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.time = 0.0
        self.socks = [Socket() for _ in range(self.random.randint(1, 6))]
        self.to_new, self.to_old = deque(), deque()
        self.alive = {"old", "new"}
        self.sender = Sender(self.sender_of(self.to_new, "new"), lambda: self.time)
        self.receiver = Receiver(self.sender_of(self.to_old, "old"), self.take, lambda _fd: None)
        self.old = [Old(self, sock) for sock in self.socks]
        self.new = []

    def sender_of(self, queue, other):
        def send(data, fds):
            if other not in self.alive:
                return True  # nobody reads it
            if len(queue) >= 3 or self.random.random() < 0.1:
                return False
            queue.append((data, fds))
            return True

        return send

    def take(self, state, fds):
        (fd,) = fds
        if self.random.random() < 0.2:
            return "full"
        coming = New(self, self.socks[fd], state["kept"])
        self.new.append(coming)
        return coming

    # -- what may happen
    def arrive(self):
        self.random.choice(self.socks).arrive()

    def act(self):
        everybody = (self.old if "old" in self.alive else []) + (self.new if "new" in self.alive else [])
        if everybody:
            self.random.choice(everybody).act()

    def read_ahead(self):
        if "old" in self.alive:
            self.random.choice(self.old).read_ahead()

    def offer(self):
        if "old" in self.alive and self.sender.room():
            idle = [one for one in self.old if not (one.frozen or one.given or one.gone)]
            batch = self.random.sample(idle, self.random.randint(0, len(idle)))
            for one in batch:
                one.freeze()
            for one, number in zip(batch, self.sender.offer(batch), strict=True):
                one.number = number

    def touch(self):
        if "old" in self.alive:
            self.random.choice(self.old).touch()

    def hear_in_new(self):
        if "new" in self.alive:
            if self.to_new:
                data, fds = self.to_new.popleft()
                self.receiver.hear(messages.decode(data), fds)
            elif "old" not in self.alive:
                self.receiver.end()
            else:
                self.receiver.flush()

    def hear_in_old(self):
        if "old" in self.alive:
            if self.to_old:
                self.sender.hear(messages.decode(self.to_old.popleft()[0]))
            elif "new" not in self.alive:
                self.sender.end()
            else:
                self.sender.flush()

    def wait(self):
        self.time += self.random.choice((0.1, OFFER_SECONDS))
        if "old" in self.alive:
            self.sender.look()

    def kill(self):
        if len(self.alive) == 2 and self.random.random() < 0.2:
            name = self.random.choice(("old", "new"))
            self.alive.discard(name)
            for sock in self.socks:
                if name in sock.readers:
                    sock.lost = True
                sock.readers.discard(name)
            if name == "old":
                for one in self.old:
                    # What it had not given away, or said so, is lost with it.
                    one.sock.lost = one.sock.lost or not one.gone
                self.old = []
            else:
                for one in self.new:
                    one.sock.lost = one.sock.lost or one.begun
                self.new = []

    def run(self):
        steps = [self.arrive, self.act, self.act, self.read_ahead, self.offer, self.touch, self.wait, self.kill]
        steps += [self.hear_in_new, self.hear_in_old] * 3
        for _ in range(120):
            self.random.choice(steps)()
            for sock in self.socks:
                sock.check()
        self.settle()

    def settle(self):
        """Everything that is under way ends, and every byte is read."""
        for _ in range(60):
            self.hear_in_new()
            self.hear_in_old()
            if self.random.random() < 0.3:
                self.wait()
        for _ in range(40):
            for one in (self.old if "old" in self.alive else []) + (self.new if "new" in self.alive else []):
                one.act()
        for sock in self.socks:
            read = list(sock.read)
            assert read == sorted(set(read)), f"read twice, or out of order: {read}"
            if not sock.lost:
                assert read == list(range(sock.sent)), f"read {read} of {sock.sent}"
                assert len(sock.readers) == 1, sock.readers
        assert not len(self.sender) or "old" not in self.alive
        assert not len(self.receiver) or "new" not in self.alive


def test_every_byte_is_read_once_and_in_order():
    for seed in range(SCHEDULES):
        try:
            World(seed).run()
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


# -- packets -----------------------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(0, 2**40), max_size=5)
STATES = st.dictionaries(st.text(max_size=5), st.none() | st.text() | st.integers() | st.lists(st.text()), max_size=3)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.lists(st.tuples(st.integers(0, 99), st.text(max_size=9)), max_size=3))
def test_a_packet_is_read_as_it_was_written(go, withdrawn, ready, serving, refused):
    data = messages.encode(go=go, withdrawn=withdrawn, ready=ready, serving=serving, refused=refused)
    assert messages.decode(data) == Packet(1, [], go, withdrawn, ready, refused, serving)


@given(st.lists(st.tuples(st.integers(0, 2**40), STATES), max_size=4))
def test_offers_are_read_as_they_were_written(offers):
    assert messages.decode(messages.encode_offers(offers)).offer == offers


@given(st.binary(max_size=60) | st.builds(lambda text: b'{"version":1,"offer":' + text.encode() + b"}", st.text()))
def test_anything_else_is_no_packet(data):
    try:
        packet = messages.decode(data)
    except PacketError:
        return
    assert isinstance(packet, Packet)


def test_the_numbers_of_an_offer_of_another_version_are_read():
    assert messages.decode(b'{"version":7,"offer":[[3,"?",1],[4]],"go":"?"}') == Packet(7, [(3, {}), (4, {})])


# -- bounds ------------------------------------------------------------------------------------------------------------


class Still:
    """A connection that leaves, in whose life nothing happens."""

    def __init__(self, state):
        self.state = state
        self.why = None

    def descriptors(self):
        return [0]

    def stays(self, why):
        self.why = why


@pytest.fixture
def sent():
    return []


@pytest.fixture
def sender(sent):
    return Sender(lambda data, fds: sent.append((data, fds)) or True, lambda: 0.0)


def test_only_so_many_are_under_way(sender, sent):
    while room := sender.room():
        sender.offer([Still({}) for _ in range(room)])
    assert len(sender) == MOST_UNDER_WAY
    assert max(len(fds) for _, fds in sent) == messages.MAX_OFFERS


def test_packets_have_a_largest_size(sender, sent):
    large = [Still({"kept": "x" * (messages.MAX_STATE - 100)}) for _ in range(5)]
    sender.offer(large)
    assert len(sent) > 1
    assert all(len(data) <= messages.MAX_BYTES + 100 for data, _ in sent)
    assert sum(len(fds) for _, fds in sent) == 5


def test_what_cannot_be_written_stays_and_the_others_go(sender, sent):
    good, bad, large = Still({"a": 1}), Still({"a": object()}), Still({"a": "x" * messages.MAX_STATE})
    numbers = sender.offer([bad, good, large])
    ((data, fds),) = sent
    assert messages.decode(data).offer == [(numbers[1], {"a": 1})]
    assert fds == [0]
    assert bad.why.startswith("session: ")
    assert (good.why, large.why) == (None, "session too large")


def test_a_worker_that_does_not_answer_gets_no_more_offers_for_a_while(sent):
    time = [0.0]
    sender = Sender(lambda data, fds: sent.append(data) or True, lambda: time[0])
    one = Still({})
    sender.offer([one])
    time[0] = OFFER_SECONDS
    sender.look()
    assert (one.why, sender.room()) == ("time", 0)
    assert messages.decode(sent[-1]).withdrawn == [0]
    time[0] = 2 * OFFER_SECONDS
    assert sender.room()
