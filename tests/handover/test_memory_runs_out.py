"""Memory runs out while a packet is heard: the line hears on, and no connection is lost, or served twice."""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import ClassVar

import gevent
import pytest

from gtcpserver.handover import line as module
from gtcpserver.handover import messages
from gtcpserver.handover.line import Line
from gtcpserver.handover.receiver import Receiver
from gtcpserver.handover.sender import OFFER_SECONDS, Sender
from kit.waiting import wait_until

try:
    import _testcapi
except ImportError:
    _testcapi = None

CONNECTIONS = 3


# -- a line ------------------------------------------------------------------------------------------------------------


class End:
    """A line of a socket pair whose packets are heard by a function."""

    def __init__(self, hear):
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.there = there
        self.ended = []
        self.tries = 0
        self.line = Line(here.detach(), hear, lambda: self.ended.append(1), self._again)

    def _again(self):
        self.tries += 1
        if self.tries == 1:
            raise MemoryError

    def close(self):
        self.line.close()
        self.there.close()


@pytest.fixture
def end(monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.01)
    made = []

    def make(hear):
        made.append(End(hear))
        return made[-1]

    yield make
    for one in made:
        one.close()


def failing(function, times=1):
    """The same function, without memory for the first calls."""
    left = [times]

    def call(*arguments):
        if left[0]:
            left[0] -= 1
            raise MemoryError
        return function(*arguments)

    return call


@pytest.mark.parametrize("name", ["decode", "_descriptors"])
def test_a_packet_that_could_not_be_decoded_is_heard_and_what_follows_too(end, monkeypatch, name):
    heard = []
    one = end(lambda packet, _: heard.extend(packet.go))
    monkeypatch.setattr(module, name, failing(vars(module)[name], times=2), raising=False)
    one.there.send(messages.encode(go=[1]))
    one.there.send(messages.encode(go=[2]))
    wait_until(lambda: heard == [1, 2])
    one.there.send(messages.encode(go=[3]))
    wait_until(lambda: heard == [1, 2, 3])


def test_a_packet_that_could_not_be_heard_is_heard_again_with_its_descriptors(end):
    heard = []

    def hear(packet, fds):
        heard.append((packet.go, os.readlink(f"/proc/self/fd/{fds[0]}")))

    one = end(failing(hear, times=2))
    with open("/dev/null") as file:
        socket.send_fds(one.there, [messages.encode(go=[1])], [file.fileno()])
    wait_until(lambda: heard)
    assert heard == [([1], "/dev/null")]


def test_descriptors_of_a_packet_that_is_not_heard_any_more_are_closed(end, monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 60)
    one = end(failing(lambda *_: None))
    reading, writing = os.pipe()
    socket.send_fds(one.there, [messages.encode(go=[1])], [writing])
    os.close(writing)
    gevent.sleep(0.01)
    os.set_blocking(reading, False)
    with pytest.raises(BlockingIOError):
        os.read(reading, 1)
    one.line.close()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_what_could_not_be_sent_again_is_tried_again(end):
    one = end(lambda *_: None)
    one.line._may_send()  # noqa: SLF001
    wait_until(lambda: one.tries == 2)


# -- both sides, with the n-th allocation failing ----------------------------------------------------------------------


@contextmanager
def no_memory(at):
    """The allocation with this number fails; yields a list that says whether it came to that."""
    failed = []
    _testcapi.set_nomemory(at, at + 1)
    try:
        yield failed
    except MemoryError:
        _testcapi.remove_mem_hooks()
        failed.append(True)
    finally:
        _testcapi.remove_mem_hooks()


class Here:
    """A connection in the old worker. Its methods need no memory."""

    state: ClassVar[dict] = {}

    def __init__(self):
        self.given = self.told = self.stayed = self.closed = self.back = False

    def descriptors(self):
        return [0]

    def give_away(self):
        self.given = True
        return True

    def tell(self):
        self.told = True

    def stays(self, why):
        self.stayed = True

    def arrived(self):
        self.closed = True

    def returned(self):
        self.back = True


class There:
    """The same in the new one."""

    def __init__(self):
        self.taken = self.begun = self.dropped = False

    def begin(self):
        self.begun = True

    def drop(self):
        self.dropped = True


class World:
    """Both sides, and the packets between them."""

    def __init__(self, at, which, packet):
        self.at, self.which, self.packet, self.failed = at, which, packet, False
        self.time = 0.0
        self.to_old, self.to_new = [], []
        self.sender = Sender(lambda data, fds: self._send(self.to_new, data, fds), lambda: self.time)
        self.receiver = Receiver(lambda data, fds: self._send(self.to_old, data, fds), self._take, self._close)
        self.here = [Here() for _ in range(CONNECTIONS)]
        self.there = []
        self.open = 0  # descriptors that belong to nobody
        self.fresh = []

    def _send(self, packets, data, fds):
        packets.append((data, len(fds)))
        return True

    def _take(self, state, fds):
        self.open -= len(fds)
        coming = self.fresh.pop()
        coming.taken = True
        return coming

    def _close(self, fd):
        self.open -= 1

    def hear(self, who, data, count):
        """Hear a packet as a line does: again after a MemoryError."""
        packet, fds = messages.decode(data), list(range(count))
        self.open += count
        self.fresh = [There() for _ in range(count)]
        self.there += self.fresh
        arguments = (packet, fds) if who == "receiver" else (packet,)
        hear = getattr(self, who).hear
        if who == self.which:
            self.packet -= 1
            if self.packet == -1:
                with no_memory(self.at) as failed:
                    hear(*arguments)
                self.failed = bool(failed)
                if not failed:
                    return
        hear(*arguments)

    def run(self):
        self.sender.offer(self.here)
        for _ in range(4):
            while self.to_new or self.to_old:
                for who, packets in (("receiver", self.to_new), ("sender", self.to_old)):
                    if packets:
                        self.hear(who, *packets.pop(0))
            self.time += OFFER_SECONDS + 0.1
            self.sender.look()

    def check(self):
        begun = [one for one in self.there if one.begun]
        assert len(begun) == sum(one.closed for one in self.here)
        assert not any(one.begun and one.dropped for one in self.there)
        assert all(one.begun or one.dropped for one in self.there if one.taken), "a copy of a descriptor stays"
        for one in self.here:
            assert (one.given and one.told and one.closed) != one.stayed, vars(one)
            assert not one.back
        assert (len(self.sender), len(self.receiver), self.open) == (0, 0, 0)


@pytest.mark.skipif(_testcapi is None, reason="this Python has no _testcapi")
@pytest.mark.parametrize("which", ["receiver", "sender"])
@pytest.mark.parametrize("packet", [0, 1, 2, 3])
def test_each_connection_is_served_once_whichever_allocation_fails(which, packet):
    failures = 0
    for at in range(1, 1000):
        world = World(at, which, packet)
        world.run()
        world.check()
        failures += world.failed
        if not world.failed:
            break
    assert failures or packet >= 2  # each side hears two packets at least
