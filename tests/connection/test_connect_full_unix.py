"""connect() to a Unix socket whose queue is full waits for its turn, and does not spin."""

import errno
import socket
import time

import gevent
import pytest

from gtcpserver import connect


@pytest.fixture
def full(tmp_path):
    """A listening socket whose queue is full, and its address."""
    waiting = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        while True:
            one = socket.socket(socket.AF_UNIX)
            waiting.append(one)
            one.setblocking(False)
            if one.connect_ex(str(tmp_path / "s")) == errno.EAGAIN:
                break
        yield listening, f"unix:{tmp_path}/s"
        for one in waiting:
            one.close()


def test_it_waits_without_cpu(full):
    began = time.process_time()
    with pytest.raises(TimeoutError, match="not connected to unix:"):
        connect(full[1], timeout=0.3)
    assert time.process_time() - began < 0.1


def test_it_connects_when_there_is_room(full):
    listening, address = full
    connecting = gevent.spawn(connect, address, timeout=10)
    gevent.sleep(0.05)
    assert not connecting.ready()
    listening.accept()[0].close()
    connecting.get().close()


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        connect(f"unix:{tmp_path}/missing")
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(tmp_path / "closed"))
    with pytest.raises(ConnectionRefusedError):
        connect(f"unix:{tmp_path}/closed")
