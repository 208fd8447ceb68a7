"""A worker that keeps the descriptors of what it has given away, and makes them blocking: the other runs on.

O_NONBLOCK is a flag of the open file description (fcntl(2)), which both workers have.
"""

import contextlib
import errno
import os
import random
import socket
import struct
import threading
from contextlib import contextmanager
from functools import partial
from time import monotonic

import gevent
import pytest

from gtcpserver import connect, relay
from gtcpserver.transfer import PIPES, pipes
from gtcpserver.transfer.pipes import check_source
from kit.handing import Taker, leave
from kit.patience import SOON
from kit.tunnels import Destination, read, relaying
from kit.waiting import wait_until

pytestmark = pytest.mark.usefixtures("no_pipe_is_left", "impatient")

#: Seconds without a turn of the event loop that a busy machine does not cause.
STANDSTILL = 10.0

#: More than all socket buffers hold.
LOT = 32 << 20

#: More than those of a slow end hold.
LITTLE = 4 << 20


class Giver:
    """What a broken or hostile worker keeps."""

    def __init__(self):
        self.kept = []

    def keep(self, *fds):
        self.kept += map(os.dup, fds)

    def make_blocking(self):
        for fd in self.kept:
            os.set_blocking(fd, True)

    def shut_down(self):
        for fd in self.kept:
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        while self.kept:
            os.close(self.kept.pop())


@pytest.fixture
def giver():
    one = Giver()
    yield one
    one.close()


@contextmanager
def running(other):
    """Check that the event loop runs meanwhile. One that stands still is freed by the end of the connections.

    Args:
        other: the giver, or a client.
    """
    turned, over, stood_still = [monotonic()], threading.Event(), []

    def turn():
        while True:
            turned[0] = monotonic()
            gevent.sleep(0.01)

    def look():
        while not over.wait(0.1):
            if monotonic() - turned[0] > STANDSTILL:
                stood_still.append(True)
                other.shut_down() if isinstance(other, Giver) else os.close(other.detach())
                return

    turning, looking = gevent.spawn(turn), threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()
        turning.kill()
        assert not stood_still, "the event loop stood still"


def fail(number, *_):
    raise OSError(number, os.strerror(number))


def moves(giver, taker):
    leave(giver, taker)
    wait_until(lambda: taker.stats().taken_over == 1 and not giver.active_connections)


# -- connections -------------------------------------------------------------------------------------------------------


def receive_into(conn):
    buffer = bytearray(200_000)
    return bytes(buffer[: conn.recv_into(buffer)])


def receive_file(conn):
    fd = os.memfd_create("received")
    try:
        conn.recv_to_file(fd, count=5)
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def within_deadline(conn):
    with conn.deadline(SOON):
        return conn.recv(200_000)


READS = {
    "recv": lambda conn: conn.recv(200_000),
    "recv of little": lambda conn: conn.recv(100),
    "with flags": lambda conn: conn.recv(100, socket.MSG_PEEK),
    "recv_into": receive_into,
    "recv_exactly": lambda conn: conn.recv_exactly(5),
    "recvfrom": lambda conn: conn.recvfrom(100)[0],
    "recvmsg": lambda conn: conn.recvmsg(100)[0],
    "deadline": within_deadline,
    "file": receive_file,
}


def send_parts(conn):
    data = memoryview(bytes(LOT))
    while data:
        data = data[conn.send(data) :]


def send_file(conn):
    fd = os.memfd_create("sent")
    try:
        os.ftruncate(fd, LOT)
        assert conn.sendfile(fd) == LOT
    finally:
        os.close(fd)


WRITES = {
    "sendall": lambda conn: conn.sendall(bytes(LOT)),
    "little": lambda conn: (
        [conn.sendall(bytes(60_000)) for _ in range(LOT // 60_000)] + [conn.sendall(bytes(LOT % 60_000))]
    ),
    "memoryview": lambda conn: conn.sendall(memoryview(bytes(LOT))),
    "send": send_parts,
    "file": send_file,
}


@pytest.fixture
def moved(serve, connect, giver):
    """`moved(act)`: the client of a connection that has moved, and what a list gets of `act(conn)` there."""

    def move(act):
        begun, results = [], []

        def handle(conn):
            with conn.idle():
                conn.recv_exactly(1)
            begun.append(conn)
            results.append(act(conn))

        a, b = (serve(handle, handover=True) for _ in "ab")
        client = connect(a)
        wait_until(lambda: a.active_connections)
        giver.keep(*(conn.fileno() for conn in a.connections()))
        moves(a, b)
        giver.make_blocking()
        client.send(b"x")
        return client, begun, results

    return move


@pytest.mark.parametrize("act", READS.values(), ids=READS)
def test_a_read_that_finds_nothing(moved, giver, act):
    client, begun, results = moved(act)
    with running(giver):
        wait_until(lambda: begun)
        gevent.sleep(0.01)  # one turn at the least: the read has found nothing
        client.send(b"hello")
        assert wait_until(lambda: results) == [b"hello"]


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
def test_a_write_that_finds_no_room(moved, giver, act, in_thread):
    client, begun, results = moved(act)
    with running(giver):
        wait_until(lambda: begun)
        gevent.sleep(0.01)
        got = 0
        while got < LOT:
            got += len(in_thread(client.recv, 1 << 20))
        wait_until(lambda: results)


def test_the_wait_for_a_client_to_close(moved, giver):
    client, _, results = moved(lambda conn: conn.sendall(b"the end"))
    with running(giver):
        wait_until(lambda: results)
        assert read(client, 100) == b"the end"  # and the end, 20 ms before what it has sent meanwhile is looked for
        gevent.sleep(0.1)
        client.send(b"more")
        client.close()


def test_a_close_does_not_wait_for_a_client_as_the_giver_has_asked_it_to(serve, connect, giver):
    ended = []

    def handle(conn):
        with conn.idle():
            conn.recv_exactly(1)
        conn.settimeout(0.01)
        with contextlib.suppress(TimeoutError):
            while True:
                conn.sendall(bytes(1 << 20))  # until nothing goes any more
        conn.close()
        ended.append(True)

    a, b = (serve(handle, handover=True, linger=0) for _ in "ab")
    client = connect(a)
    wait_until(lambda: a.active_connections)
    for conn in a.connections():
        giver.keep(conn.fileno())
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
    moves(a, b)
    giver.close()  # only the last close of a socket waits
    with running(client):
        client.send(b"x")
        wait_until(lambda: ended and not b.active_connections)


# -- tunnels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tunnel(serve, giver):
    """`tunnel(**options)`: one that has moved while nobody reads, and its sending greenlet."""
    destination = Destination()
    made = []

    def move(data, small=False, **options):
        pairs = []

        def handle(conn):
            with conn.relayed_to or connect(destination.address) as upstream:
                pairs.append((conn, upstream))
                if small:  # otherwise one that is writable has room for a whole pipe
                    upstream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
                relay(conn, upstream, handover=True, **options)

        a, b = (serve(handle, handover=True) for _ in "ab")
        made.append(destination.tunnel(a))
        sending = gevent.spawn(made[-1].client.sendall, data)
        gevent.sleep(0.05)  # until nothing moves any more
        giver.keep(*(side.fileno() for side in pairs[0]))
        moves(a, b)
        giver.make_blocking()
        return made[-1], sending

    yield move
    for one in made:
        one.close()
    destination.sock.close()


@pytest.mark.parametrize("pace", [None, lambda direction, size: 0.0], ids=["plain", "paced"])
def test_a_tunnel_whose_receiver_is_slow(tunnel, giver, pace):
    data = random.randbytes(LITTLE)
    one, sending = tunnel(data, small=True, pace=pace)
    with running(giver):
        got = bytearray()
        while len(got) < LITTLE:
            got += one.far.recv(200_000)
            gevent.sleep(0)
        sending.get()
        assert got == data
        assert one.talks()


@pytest.mark.parametrize("pace", [None, lambda direction, size: 0.0], ids=["plain", "paced"])
def test_a_tunnel_that_another_worker_refuses_and_keeps(serve, giver, pace):
    destination = Destination()
    handler = relaying(destination.address, small=True, pace=pace)
    server = serve(handler, handover=True)
    one = destination.tunnel(server, small=True)
    data = random.randbytes(LITTLE)
    sending = gevent.spawn(one.client.sendall, data)
    gevent.sleep(0.05)  # until nothing moves any more
    taker = Taker(server)
    server.mover.leave()
    (number,) = taker.offered()
    sockets, pipe = taker.fds[:2], taker.fds[2:]
    giver.keep(*sockets)
    giver.make_blocking()
    for fd in pipe:
        os.set_blocking(fd, True)
    taker.say(refused=[(number, "state")])
    with running(giver):
        assert read(one.far, LITTLE) == data
        sending.get()
        assert one.talks()
    output, input_ = pipe
    os.close(output)
    with pytest.raises(BrokenPipeError):
        os.write(input_, b"into another transfer")
    os.close(input_)
    taker.fds = sockets
    taker.die()
    one.close()
    destination.sock.close()


def test_a_tunnel_that_has_moved_is_spliced(tunnel, giver, monkeypatch):
    spliced = []

    def splice(source, sink, size):
        spliced.append(real(source, sink, size))
        return spliced[-1]

    real = pipes.splice
    monkeypatch.setattr(pipes, "splice", splice)
    data = random.randbytes(LOT)
    one, sending = tunnel(data)
    spliced.clear()
    with running(giver):
        assert read(one.far, LOT) == data
        sending.get()
    assert sum(spliced) > LOT


@pytest.mark.parametrize("refusal", [None, errno.ENOENT, errno.EACCES], ids=["anew", "no /proc", "another user's"])
def test_the_pipe_of_a_tunnel_that_was_emptied_behind_its_back(in_thread, monkeypatch, refusal):
    if refusal is not None:
        monkeypatch.setattr(pipes, "reopen_pipe", partial(fail, refusal))
    output, input_ = os.pipe2(os.O_NONBLOCK)
    kept = os.dup(output), os.dup(input_)
    os.write(input_, bytes(10))
    pipe = PIPES.adopt(output, input_, 10)
    try:
        os.read(kept[0], 10)
        for fd in kept:
            os.set_blocking(fd, True)
        with pytest.raises(OSError, match="gave 0 of 10 bytes"):
            in_thread(pipe.take_out, 10)
    finally:
        os.write(kept[1], bytes(10))  # frees the thread
        PIPES.discard(pipe)
        for fd in kept:
            os.close(fd)


@pytest.mark.parametrize("which", [0, 1])
def test_a_pipe_that_cannot_be_opened_anew_for_lack_of_descriptors_is_not_taken(monkeypatch, which):
    real, asked = pipes.reopen_pipe, []

    def reopen(fd, access):
        asked.append(fd)
        return fail(errno.EMFILE) if len(asked) > which else real(fd, access)

    monkeypatch.setattr(pipes, "reopen_pipe", reopen)
    output, input_ = os.pipe2(os.O_NONBLOCK)
    before = len(os.listdir("/proc/self/fd"))
    os.write(input_, bytes(10))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        PIPES.adopt(output, input_, 10)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in (output, input_):
        os.close(fd)


def test_a_question_whether_a_splice_was_refused_by_the_peer(in_thread):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            in_thread(check_source, ours, OSError("refused"))
        finally:
            theirs.send(b"x")
