"""relay and pipe: what goes in comes out, ends are passed on, and nothing is left behind."""

import errno
import gc
import hashlib
import os
import random
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gevent
import pytest
import trustme
from gevent import socket as gevent_socket
from gevent import ssl as gevent_ssl

from gtcpserver import Connection, linux
from gtcpserver.errors import DeadlineExceeded
from gtcpserver.transfer import PIPES, pipe, relay
from gtcpserver.transfer import pipes as pipes_module
from gtcpserver.transfer.flow import COPY_SIZE


def tcp_pair(cls=gevent_socket.socket, **options):
    """(client, accepted), both connected; the second is a ``cls``."""
    with gevent_socket.socket() as listening:
        for name, value in options.items():
            listening.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        client = gevent_socket.socket()
        for name, value in options.items():
            client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        client.connect(listening.getsockname())
        accepted, _ = listening.accept()
    for sock in (client, accepted):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, cls(fileno=accepted.detach())


class Relayed:
    """``client`` and ``server`` talk through a relay between ``a`` and ``b``."""

    def __init__(self, cls, b_cls=None, options=None, **relay_options):
        self.client, self.a = tcp_pair(cls, **(options or {}))
        self.server, self.b = tcp_pair(b_cls or cls, **(options or {}))
        for sock in (self.client, self.server):
            sock.settimeout(60)
        self.greenlet = gevent.spawn(relay, self.a, self.b, **relay_options)
        gevent.sleep(0)  # the relay has begun

    def result(self):
        return self.greenlet.get(timeout=60)

    def close(self):
        self.greenlet.kill()
        for sock in (self.client, self.a, self.server, self.b):
            sock.close()


@pytest.fixture(params=[gevent_socket.socket, Connection], ids=["gevent socket", "Connection"])
def cls(request):
    return request.param


@pytest.fixture
def relayed(cls):
    made = []

    def make(*args, **kwargs):
        made.append(Relayed(cls, *args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def no_pipe_is_left():
    PIPES.close_unused()
    before = descriptors()
    yield
    assert PIPES.taken == 0
    PIPES.close_unused()
    gevent.sleep(0.001)  # sockets that gevent closes at the next turn of the loop
    assert len(descriptors() - before) <= 2  # the loop's own, made with the first test


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def receive_all(sock):
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_both_directions_are_byte_exact_with_random_chunks(relayed, seed):
    one = relayed()
    randomness = random.Random(seed)

    def talk(sock, total):
        digest, left = hashlib.sha256(), total
        while left:
            # From single bytes to several pipes full, so that both ways of moving them and the changes are used.
            chunk = randomness.randbytes(min(left, int(2 ** randomness.uniform(0, 21.5))))
            sock.sendall(chunk)
            digest.update(chunk)
            left -= len(chunk)
            if randomness.random() < 0.3:
                gevent.sleep(0)
        sock.shutdown(socket.SHUT_WR)
        return digest.digest()

    def listen(sock):
        digest, total = hashlib.sha256(), 0
        while data := sock.recv(randomness.randint(1, 300_000)):
            digest.update(data)
            total += len(data)
            if randomness.random() < 0.05:
                gevent.sleep(0.001)
        return digest.digest(), total

    there, back = randomness.randint(1, 12_000_000), randomness.randint(1, 3_000_000)
    tasks = [gevent.spawn(talk, one.client, there), gevent.spawn(talk, one.server, back)]
    ears = [gevent.spawn(listen, one.server), gevent.spawn(listen, one.client)]
    gevent.joinall(tasks + ears, timeout=60, raise_error=True)
    assert ears[0].value == (tasks[0].value, there)
    assert ears[1].value == (tasks[1].value, back)
    result = one.result()
    assert (result.bytes_a_to_b, result.bytes_b_to_a, result.reason) == (there, back, "closed")
    assert result.error is None
    assert 0 < result.duration < 30
    if isinstance(one.a, Connection):
        assert (one.a.bytes_received, one.a.bytes_sent) == (there, back)
        assert (one.b.bytes_received, one.b.bytes_sent) == (back, there)


def test_a_unix_socket_is_relayed_too():
    (client, a), (b, server) = gevent_socket.socketpair(), gevent_socket.socketpair()
    greenlet = gevent.spawn(relay, a, b)
    sender = gevent.spawn(lambda: (client.sendall(bytes(3_000_000)), client.shutdown(socket.SHUT_WR)))
    assert len(receive_all(server)) == 3_000_000
    server.close()
    assert greenlet.get(timeout=60).bytes_a_to_b == 3_000_000
    sender.get()
    for sock in (client, a, b):
        sock.close()


def test_what_recv_until_read_ahead_is_sent_first():
    client, a = tcp_pair(Connection)
    server, b = tcp_pair()
    client.sendall(b"CONNECT\nearly ")
    assert a.recv_until(b"\n") == b"CONNECT\n"
    greenlet = gevent.spawn(relay, a, b)
    assert server.recv(100) == b"early "
    client.sendall(b"late")
    assert server.recv(100) == b"late"
    client.close()
    server.close()
    assert greenlet.get(timeout=60).bytes_a_to_b == 10
    assert a.bytes_received == 18
    a.close()
    b.close()


def test_a_connection_can_be_used_after_a_pipe_of_some_bytes():
    client, a = tcp_pair(Connection)
    server, b = tcp_pair(Connection)
    client.sendall(b"x\nheadbody")
    a.recv_until(b"\n")
    assert pipe(a, b, count=4) == 4
    assert server.recv(100) == b"head"
    assert a.recv_exactly(4) == b"body"
    client.sendall(bytes(200_000) + b"rest")
    received = gevent.spawn(lambda: sum(len(server.recv(65536)) for _ in iter(lambda: b.bytes_sent < 200_004, False)))
    assert pipe(a, b, count=200_000) == 200_000
    assert a.recv_exactly(4) == b"rest"
    received.kill()
    client.close()
    assert pipe(a, b, count=5) == 0
    assert pipe(a, b, count=0) == 0
    for sock in (a, b, server):
        sock.close()


def test_pipe_from_a_connection_to_itself_is_an_echo(cls):
    client, a = tcp_pair(cls)
    greenlet = gevent.spawn(pipe, a, a)
    sender = gevent.spawn(lambda: (client.sendall(bytes(2_000_000)), client.shutdown(socket.SHUT_WR)))
    received = 0
    while received < 2_000_000:
        received += len(client.recv(100_000))
    assert greenlet.get(timeout=60) == 2_000_000
    sender.get()
    client.close()
    a.close()


def test_on_bytes_sees_every_byte(relayed):
    seen = {"a_to_b": 0, "b_to_a": 0}

    def on_bytes(direction, n):
        seen[direction] += n

    one = relayed(on_bytes=on_bytes)
    sender = gevent.spawn(lambda: (one.client.sendall(bytes(1_000_000)), one.client.shutdown(socket.SHUT_WR)))
    assert len(receive_all(one.server)) == 1_000_000
    one.server.sendall(b"thanks")
    one.server.close()
    one.result()
    sender.get()
    assert seen == {"a_to_b": 1_000_000, "b_to_a": 6}


@pytest.mark.parametrize("error", [KeyError("quota"), OSError(errno.ECONNRESET, "looks like a reset")])
def test_an_error_in_on_bytes_ends_the_relay_and_is_raised(relayed, error):
    def on_bytes(direction, n):
        raise error

    one = relayed(on_bytes=on_bytes)
    one.client.sendall(b"x")
    with pytest.raises(type(error)) as caught:
        one.result()
    assert caught.value is error


def test_arguments_are_checked(cls):
    client, a = tcp_pair(cls)
    with pytest.raises(ValueError, match="two sockets"):
        relay(a, a)
    with pytest.raises(TypeError, match="gevent socket"):
        relay(a, socket)
    with pytest.raises(ValueError, match="idle_timeout"):
        relay(a, client, idle_timeout=0)
    with pytest.raises(ValueError, match="count"):
        pipe(a, client, count=-1)
    client.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        relay(a, client)
    a.close()


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_half_close_is_passed_on_and_the_other_direction_goes_on(relayed, first, size):
    one = relayed()
    early, late = (one.client, one.server) if first == "client" else (one.server, one.client)
    sender = gevent.spawn(lambda: (early.sendall(bytes(size)), early.shutdown(socket.SHUT_WR)))
    assert len(receive_all(late)) == size
    assert not one.greenlet.ready()
    sender.get()
    sender = gevent.spawn(lambda: (late.sendall(bytes(size)), late.shutdown(socket.SHUT_WR)))
    assert len(receive_all(early)) == size
    sender.get()
    assert one.result().reason == "closed"


@pytest.mark.parametrize("who", ["a", "b"])
def test_a_reset_is_passed_on_as_a_reset(relayed, who):
    one = relayed()
    one.client.sendall(b"ping")
    one.server.recv(10)
    broken, other, ours = (one.client, one.server, one.b) if who == "a" else (one.server, one.client, one.a)
    reset(broken)
    result = one.result()
    assert result.reason == f"reset_{who}"
    assert result.error.errno == errno.ECONNRESET
    assert ours.fileno() >= 0  # the caller's to close
    ours.close()
    with pytest.raises(ConnectionResetError):
        other.recv(10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_reset_at_any_time_ends_the_relay(relayed, seed):
    one = relayed()
    randomness = random.Random(seed)
    until = randomness.randint(0, 4_000_000)

    def pour(sock):
        with pytest.raises(OSError):
            while True:
                sock.sendall(bytes(randomness.choice([10, 1000, 500_000])))

    def drink(sock, broken_after=None):
        received = 0
        with pytest.raises(OSError):
            while broken_after is None or received < broken_after:
                data = sock.recv(100_000)
                if not data:
                    raise OSError
                received += len(data)
            reset(sock)
            raise OSError

    tasks = [gevent.spawn(pour, one.client), gevent.spawn(pour, one.server)]
    tasks += [gevent.spawn(drink, one.client, until), gevent.spawn(drink, one.server)]
    assert one.result().reason == "reset_a"
    one.a.close()
    one.b.close()
    gevent.joinall(tasks, timeout=60, raise_error=True)
    assert all(task.ready() for task in tasks)


def test_an_answer_given_before_the_upload_ended_arrives_although_its_server_closed(relayed):
    one = relayed()
    one.server.sendall(b"too large")
    one.server.shutdown(socket.SHUT_WR)
    assert receive_all(one.client) == b"too large"
    one.server.close()
    uploading = gevent.spawn(one.client.sendall, bytes(50_000_000))
    result = one.result()
    uploading.kill()
    assert (result.reason, result.bytes_b_to_a) == ("reset_b", 9)
    assert one.a.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER) == 0


@pytest.mark.slow
def test_idle_timeout_counts_both_directions_together(relayed):
    one = relayed(idle_timeout=0.6)
    for _ in range(8):
        gevent.sleep(0.1)
        one.server.sendall(b"x")  # only one direction is alive
        assert one.client.recv(10) == b"x"
    assert not one.greenlet.ready()
    result = one.result()
    assert result.reason == "idle"
    assert result.duration > 1.3
    assert one.a.fileno() >= 0


@pytest.mark.slow
def test_a_relay_is_not_idle_when_data_has_come_while_the_loop_was_held_up(relayed):
    one = relayed(idle_timeout=0.4)
    gevent.sleep(0.05)
    one.client.sendall(b"in time")
    time.sleep(0.4)  # the timeout and the data are seen together
    assert one.server.recv(10) == b"in time"
    assert not one.greenlet.ready()


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 10])
def test_half_closed_timeout_counts_from_the_end_of_one_side(relayed, size):
    pair = relayed(half_closed_timeout=0.1)
    gevent.sleep(0.2)  # nothing moves, and nothing is half closed
    assert not pair.greenlet.ready()
    pair.server.sendall(b"x" * size)
    pair.client.shutdown(socket.SHUT_WR)
    result = pair.result()
    assert result.reason == "half_closed"
    assert result.bytes_b_to_a == size
    assert result.duration >= 0.25


@pytest.mark.slow
def test_half_closed_timeout_gives_way_while_the_other_side_sends(relayed):
    pair = relayed(half_closed_timeout=0.6)
    pair.client.shutdown(socket.SHUT_WR)
    for _ in range(5):
        gevent.sleep(0.15)
        pair.server.sendall(b"x")
    pair.server.close()
    assert pair.result().reason == "closed"


@pytest.mark.slow
def test_lifetime_ends_a_busy_relay(relayed):
    pair = relayed(lifetime=0.15, idle_timeout=5)

    def send_on():
        while True:
            pair.client.sendall(b"x")
            gevent.sleep(0.01)

    sending = gevent.spawn(send_on)
    result = pair.result()
    sending.kill()
    assert result.reason == "lifetime"
    assert 0 < result.bytes_a_to_b < 100
    assert 0.15 <= result.duration < 5


@pytest.mark.slow
def test_pace_lets_a_direction_rest_and_the_relay_is_not_idle_meanwhile(relayed):
    seen = []

    def pace(direction, size):
        seen.append((direction, size))
        return 0.3 if len(seen) <= 2 else 0.0

    pair = relayed(pace=pace, idle_timeout=0.25)
    pair.client.sendall(b"x" * 40_000)
    pair.client.shutdown(socket.SHUT_WR)
    received = b""
    while more := pair.server.recv(65536):
        received += more
    pair.server.close()
    result = pair.result()
    assert received == b"x" * 40_000
    assert result.reason == "closed"
    assert result.duration >= 0.6
    assert {direction for direction, _ in seen} == {"a_to_b"}
    assert sum(size for _, size in seen) == 40_000
    assert max(size for _, size in seen) <= 16 * 1024


@pytest.mark.parametrize("option", ["idle_timeout", "half_closed_timeout", "lifetime"])
def test_times_that_cannot_be(option):
    a, b = tcp_pair(Connection)
    with a, b, pytest.raises(ValueError, match=f"{option} must be more than 0 seconds, or None, got 0"):
        relay(b, Connection(), **{option: 0})


def test_pipe_raises_on_the_sockets_own_timeout(cls):
    client, a = tcp_pair(cls)
    server, b = tcp_pair(cls)
    a.settimeout(0.05)
    with pytest.raises(TimeoutError):
        pipe(a, b)
    with pytest.raises(TimeoutError):
        pipe(b, a, idle_timeout=0.01)
    for sock in (client, a, server, b):
        sock.close()


def test_a_deadline_of_either_connection_ends_the_relay():
    client, a = tcp_pair(Connection)
    server, b = tcp_pair(Connection)
    with b.deadline(0.05), pytest.raises(DeadlineExceeded):
        relay(a, b)
    for sock in (client, a, server, b):
        sock.close()


@pytest.mark.slow
def test_a_time_out_of_an_earlier_read_does_not_hit_the_relay():
    client, a = tcp_pair(Connection)
    server, b = tcp_pair(Connection)
    a.settimeout(0.5)
    client.sendall(b"x")
    a.recv(1)
    later = gevent.spawn_later(0.02, client.sendall, b"x")
    a.recv(1)  # waits, so a timer runs on
    greenlet = gevent.spawn(relay, a, b)
    gevent.sleep(0.6)
    client.sendall(b"still there")
    assert server.recv(100) == b"still there"
    greenlet.kill()
    later.get()
    with pytest.raises(TimeoutError):  # and counts again
        a.recv(1)
    for sock in (client, a, server, b):
        sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("stalled", [False, True])
def test_kill_stops_everything_and_leaves_the_sockets(relayed, stalled):
    one = relayed()
    if stalled:
        fill(one.client)
        assert PIPES.taken == 1
    one.greenlet.kill()
    assert PIPES.taken == 0
    assert one.a.fileno() >= 0
    one.server.sendall(b"to us now")
    assert one.b.recv(100) == b"to us now"
    if not stalled:  # otherwise there may be no room for a byte more
        one.b.sendall(b"and back")
        assert one.server.recv(100) == b"and back"


def fill(sock):
    """Send until nothing is taken any more; the bytes that were."""
    sock.settimeout(0.2)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            sent += sock.send(bytes(262_144))
    return sent


@pytest.mark.slow
def test_a_stalled_reader_holds_a_bounded_amount(cls):
    buffers = {"SO_RCVBUF": 200_000, "SO_SNDBUF": 200_000}
    one = Relayed(cls, options=buffers)
    # Four socket buffers, each doubled by the kernel, and a pipe full.
    assert fill(one.client) < 8 * 200_000 + pipes_module.LARGEST + 500_000
    one.close()


@pytest.mark.slow
def test_bytes_in_a_stalled_pipe_never_reach_another_relay(relayed):
    stuck = relayed()
    fill(stuck.client)
    stuck.greenlet.kill()
    other = relayed()
    sender = gevent.spawn(lambda: (other.client.sendall(b"\1" * 500_000), other.client.shutdown(socket.SHUT_WR)))
    assert receive_all(other.server) == b"\1" * 500_000
    sender.get()


def test_a_socket_closed_by_another_greenlet_ends_the_relay(relayed):
    for name in ("a", "b"):
        one = relayed()
        one.client.sendall(b"x")
        one.server.recv(1)
        getattr(one, name).close()
        with pytest.raises(OSError, match=r"cancel|closed|Bad file") as caught:
            one.result()
        assert caught.value.errno == errno.EBADF


def test_a_closed_sinks_number_given_to_another_socket_gets_none_of_the_bytes(relayed):
    one = relayed()
    one.client.shutdown(socket.SHUT_WR)  # nothing is waited for on a or written to b any more
    assert one.server.recv(1) == b""
    number = one.a.fileno()
    one.a.close()
    gevent.sleep(0.01)
    pair = socket.socketpair()
    if number not in (pair[0].fileno(), pair[1].fileno()):
        os.dup2(pair[0].fileno(), number)
    peer = pair[0] if pair[1].fileno() == number else pair[1]
    one.server.sendall(bytes(COPY_SIZE))
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.result()
    peer.setblocking(False)
    with pytest.raises(BlockingIOError):
        peer.recv(1)
    if number not in (pair[0].fileno(), pair[1].fileno()):
        os.close(number)
    for sock in pair:
        sock.close()


def test_who_ends_a_slow_connection_by_throwing_at_its_reader_ends_the_relay():
    client, a = tcp_pair(Connection)
    server, b = tcp_pair(Connection)
    greenlet = gevent.spawn(relay, a, b)
    gevent.sleep(0)
    gevent.get_hub().loop.run_callback(a.stream.reader().throw, TimeoutError("too slow"))
    with pytest.raises(TimeoutError, match="too slow"):
        greenlet.get(timeout=60)
    for sock in (client, a, server, b):
        sock.close()


# -- pipes and descriptors -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_relays_hold_no_pipe_while_idle_and_leave_no_descriptor(cls):
    # Unix sockets: as many TCP ones would use up the system's ports for a minute.
    # 400 at a time: a process may have 1,024 descriptors, and other tests' garbage has some.
    gc.collect()
    before = len(descriptors())
    for _ in range(100):
        quads = [(*gevent_socket.socketpair(), *gevent_socket.socketpair()) for _ in range(100)]
        quads = [(client, cls(fileno=a.detach()), cls(fileno=b.detach()), server) for client, a, b, server in quads]
        relays = [gevent.spawn(relay, a, b) for _, a, b, _ in quads]
        for client, _, _, _ in quads:
            client.sendall(bytes(200))
        for _, _, _, server in quads:
            assert len(server.recv(200)) == 200
        assert PIPES.taken == 0
        for client, _, _, server in quads:
            client.close()
            server.close()
        for greenlet in relays:
            assert greenlet.get(timeout=60).bytes_a_to_b == 200
        for _, a, b, _ in quads:
            a.close()
            b.close()
    gevent.sleep(0.01)
    assert len(descriptors()) <= before + 2


@pytest.mark.slow
def test_busy_relays_share_pipes(cls):
    several = [Relayed(cls) for _ in range(8)]
    senders = [
        gevent.spawn(lambda one=one: (one.client.sendall(bytes(3_000_000)), one.client.shutdown(socket.SHUT_WR)))
        for one in several
    ]
    readers = [gevent.spawn(receive_all, one.server) for one in several]
    gevent.joinall(readers + senders, timeout=60, raise_error=True)
    assert [len(reader.value) for reader in readers] == [3_000_000] * 8
    assert PIPES.unused <= 8
    for one in several:
        one.close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
def test_without_pipes_the_bytes_are_copied(relayed, monkeypatch, error):
    def pipe2(flags):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pipe2", pipe2)
    refused = PIPES.refused
    one = relayed()
    sender = gevent.spawn(lambda: (one.client.sendall(bytes(5_000_000)), one.client.shutdown(socket.SHUT_WR)))
    assert receive_all(one.server) == bytes(5_000_000)
    sender.get()
    assert PIPES.refused == refused + 1


def test_a_pipe_that_the_system_makes_tiny_is_not_used(monkeypatch):
    real = linux.fcntl.fcntl

    def over_the_limit(fd, command, argument=0):
        if command == linux.fcntl.F_SETPIPE_SZ:
            if argument > 8192:
                raise PermissionError(errno.EPERM, "fs.pipe-user-pages-soft")
            return argument
        if command == linux.fcntl.F_GETPIPE_SZ:
            return 8192
        return real(fd, command, argument)

    monkeypatch.setattr(linux.fcntl, "fcntl", over_the_limit)
    pool = pipes_module.PipePool()
    before = descriptors()
    assert pool.take() is None
    assert pool.refused == 1
    assert descriptors() == before


def test_pipes_shrink_with_their_number_and_the_large_ones_are_used_first():
    pool = pipes_module.PipePool()
    taken = [pool.take() for _ in range(70)]
    largest = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    assert taken[0].size == min(largest, pipes_module.LARGEST)
    assert taken[20].size <= 256 * 1024
    assert taken[-1].size == pipes_module.SMALLEST
    pool.put(taken[-1])
    pool.put(taken[0])
    assert pool.take() is taken[0]
    for pipe_ in taken[:-1]:
        pool.discard(pipe_)
    assert pool.unused == 1
    pool.close_unused()


def test_a_burst_leaves_few_pipes():
    pool = pipes_module.PipePool()
    before = descriptors()
    for taken in [pool.take() for _ in range(60)]:
        pool.put(taken)
    assert (pool.taken, pool.unused) == (0, pipes_module.MOST_UNUSED)
    assert len(descriptors() - before) == 2 * pipes_module.MOST_UNUSED
    pool.close_unused()
    assert descriptors() == before


def test_pipes_take_a_share_of_the_descriptors_only(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    pool = pipes_module.PipePool()
    taken = [pool.take() for _ in range(9)]
    assert [one is None for one in taken] == [False] * 8 + [True]
    for one in taken[:8]:
        pool.discard(one)


def test_a_forked_child_does_not_share_the_parents_pipes():
    PIPES.put(PIPES.take())
    child = os.fork()
    if not child:
        os._exit(PIPES.unused + PIPES.taken)
    assert os.waitpid(child, 0)[1] == 0
    assert PIPES.unused == 1


SPLICING = """
    import sys, gevent, socket
    from gevent import socket as gs
    from gtcpserver import Connection, linux
    from gtcpserver.transfer import relay
    a, b = (Connection(fileno=int(fd)) for fd in sys.argv[1:])
    print(relay(a, b))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_bulk_is_spliced_and_small_messages_are_not(tmp_path):
    client, a = socket_pair_for_child()
    server, b = socket_pair_for_child()
    counts = tmp_path / "counts"
    program = [sys.executable, "-c", textwrap.dedent(SPLICING)]
    child = subprocess.Popen(
        ["strace", "-f", "-c", "-o", counts, "-e", "trace=network,splice", *program, str(a.fileno()), str(b.fileno())],
        pass_fds=[a.fileno(), b.fileno()],
        stdout=subprocess.PIPE,
    )
    a.close()
    b.close()
    try:
        for _ in range(20):
            client.sendall(bytes(100))
            received = 0
            while received < 100:
                received += len(server.recv(100))
        sender = gevent.spawn(lambda: (client.sendall(bytes(100_000_000)), client.shutdown(socket.SHUT_WR)))
        received = 0
        while data := server.recv(1 << 20):
            received += len(data)
        server.close()
        sender.get()
        out, _ = child.communicate(timeout=60)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert received == 100_000_000
    assert b"bytes_a_to_b=100002000" in out
    calls = {}
    for line in counts.read_text().splitlines():
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit():
            calls[fields[-1]] = int(fields[3])
    if "splice" not in calls and not calls.get("recvfrom"):
        pytest.skip("strace cannot trace here")
    assert calls["splice"] >= 2 * 100_000_000 // pipes_module.LARGEST
    # 20 small messages, the first large reads, the ends; a copy of the bulk would take 1,500.
    assert calls.get("recvfrom", 0) < 100
    assert calls.get("sendto", 0) < 100


def test_small_messages_are_copied_again_after_a_large_one(relayed, monkeypatch):
    splices = []
    splice = os.splice
    monkeypatch.setattr(os, "splice", lambda *arguments: splices.append(arguments) or splice(*arguments))
    one = relayed()
    sending = gevent.spawn(one.client.sendall, bytes(3_000_000))
    received = 0
    while received < 3_000_000:
        received += len(one.server.recv(65536))
    sending.get(timeout=60)
    assert splices
    for _ in range(10):
        one.client.sendall(b"small")
        assert one.server.recv(10) == b"small"
    before = len(splices)
    for _ in range(10):
        one.client.sendall(b"small")
        assert one.server.recv(10) == b"small"
    assert len(splices) == before


def socket_pair_for_child():
    client, accepted = tcp_pair()
    raw = socket.socket(fileno=accepted.detach())
    return client, raw


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls():
    authority = trustme.CA()
    server = gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, client


def tls_pair(tls):
    client, accepted = tcp_pair()
    accepting = gevent.spawn(tls[0].wrap_socket, accepted, server_side=True)
    connected = tls[1].wrap_socket(client, server_hostname="localhost")
    return connected, accepting.get(timeout=60)


def test_tls_on_one_side_is_copied_and_half_close_is_passed_on(tls):
    client, a = tls_pair(tls)
    server, b = tcp_pair(Connection)
    greenlet = gevent.spawn(relay, a, b, idle_timeout=10)
    sender = gevent.spawn(lambda: client.sendall(bytes(700_000)))
    received = 0
    while received < 700_000:
        received += len(server.recv(65536))
    sender.get()
    server.sendall(b"answer")
    server.shutdown(socket.SHUT_WR)
    assert client.recv(100) == b"answer"
    assert client.recv(100) == b""
    client.close()
    result = greenlet.get(timeout=60)
    assert (result.bytes_a_to_b, result.bytes_b_to_a, result.reason) == (700_000, 6, "closed")
    for sock in (a, b, server):
        sock.close()


@pytest.mark.slow
def test_the_sockets_own_timeouts_do_not_count_in_a_tls_relay(tls):
    client, a = tls_pair(tls)
    server, b = tcp_pair(Connection)
    a.settimeout(0.05)
    b.settimeout(0.05)
    result = relay(a, b, idle_timeout=0.2)
    assert (result.reason, result.error) == ("idle", None)
    assert (a.gettimeout(), b.gettimeout()) == (0.05, 0.05)
    for sock in (client, a, server, b):
        sock.close()


def test_a_killed_tls_relay_leaves_the_sockets(tls):
    client, a = tls_pair(tls)
    server, b = tcp_pair(Connection)
    greenlet = gevent.spawn(relay, a, b)
    gevent.sleep(0.01)
    greenlet.kill()
    server.sendall(b"to us")
    assert b.recv(10) == b"to us"
    client.sendall(b"to us too")
    assert a.recv(10) == b"to us too"
    for sock in (client, a, server, b):
        sock.close()


# -- fairness --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fast_pair_does_not_starve_others(relayed):
    fast, small = relayed(), relayed()

    def pour():
        with pytest.raises(OSError):
            while True:
                fast.client.send(bytes(1 << 20))

    def drink():
        with pytest.raises(OSError):
            while fast.server.recv(1 << 20):
                pass

    tasks = [gevent.spawn(pour), gevent.spawn(drink)]
    for _ in range(200):
        small.client.sendall(b"ping")
        assert small.server.recv(10) == b"ping"
    assert not fast.greenlet.ready()
    gevent.killall(tasks)
