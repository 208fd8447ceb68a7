"""Line: what it does when the kernel, or memory, fails."""

import errno
import os
import socket

import gevent
import pytest

from gtcpserver.handover import line as module
from gtcpserver.handover import messages
from gtcpserver.handover.line import Line


class Failing:
    """A socket whose calls fail as long as `error` is set."""

    def __init__(self, sock):
        self.sock = sock
        self.error = None

    def __getattr__(self, name):
        if name in ("sendmsg", "recvmsg") and self.error is not None:
            raise self.error
        return getattr(self.sock, name)


class End(Line):
    """A line that notes what it hears, and how often it is told to try again."""

    def __init__(self, sock, again=lambda: None):
        self.heard, self.tries = [], 0
        super().__init__(sock.detach(), lambda packet, _: self.heard.append(packet), lambda: None, self.note)
        self.retry = again
        self._sock = self.socket = Failing(self._sock)

    def note(self):
        self.tries += 1
        self.retry()


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.01)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = End(here)
    yield line, there
    line.close()
    there.close()


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS])
def test_a_send_that_keeps_failing_is_tried_at_its_interval(ends, code):
    line, there = ends
    packet = messages.encode(go=[1])

    def twice():  # as Mover does: for what waits, and for what is new
        if not line.send(packet, ()):
            line.send(packet, ())

    line.retry = twice
    line.socket.error = OSError(code, os.strerror(code))
    twice()
    gevent.sleep(0.1)
    assert 1 <= line.tries <= 11
    line.socket.error = None
    gevent.sleep(0.05)
    assert there.recv(1000) == packet


def test_a_line_hears_again_when_there_is_memory(ends):
    line, there = ends
    line.socket.error = MemoryError()
    there.send(messages.encode(ready=[1]))
    gevent.sleep(0.01)
    assert not line.heard
    line.socket.error = None
    gevent.sleep(0.01)
    assert [packet.ready for packet in line.heard] == [[1]]


def test_descriptors_without_a_packet_are_closed(ends):
    line, there = ends
    mine, theirs = socket.socketpair()
    socket.send_fds(there, [b""], [theirs.fileno()])
    theirs.close()
    gevent.sleep(0.01)
    assert line.closed
    mine.setblocking(False)
    assert mine.recv(1) == b""
    mine.close()
