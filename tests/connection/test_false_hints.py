"""Waits for input whose events are another socket's, or do not say all; and failures in the middle of a turn."""

import gc
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings

import gevent
import pytest
from gevent.exceptions import ConcurrentObjectUseError
from gevent.hub import get_hub
from greenlet import greenlet

from gtcpserver import Connection
from kit.patience import SOON
from kit.waiting import wait_until


@pytest.fixture
def made():
    things = []
    yield things
    for one in things:
        one.close()


@pytest.fixture
def pair(made):
    def make(kind=socket.SOCK_STREAM):
        ours, peer = socket.socketpair(type=kind)
        connection = Connection(ours.family, ours.type, fileno=ours.detach())
        made.extend((connection, peer))
        return connection, peer

    return make


@pytest.fixture
def tcp_pair(made):
    def make():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peer = socket.create_connection(listener.getsockname())
            connection = Connection(fileno=listener.accept()[0].detach())
        made.extend((connection, peer))
        return connection, peer

    return make


def start_reader(connection, read):
    reader = gevent.spawn(read, connection)
    wait_until(connection.stream.reader)
    return reader


def has_waited_once(connection, peer):
    reader = start_reader(connection, lambda connection: connection.recv(100))
    peer.sendall(b"first")
    assert reader.get(timeout=SOON) == b"first"


def run_python(program):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_end_of_a_socket_that_had_the_number_before_ends_nobody_elses_wait():
    """A copy keeps the old socket open, so its events come on. In a process of its own: it would occupy the loop."""
    out = run_python("""
        import os, socket
        import gevent
        from gtcpserver import Connection

        def pair():
            with socket.create_server(("127.0.0.1", 0)) as listener:
                peer = socket.create_connection(listener.getsockname())
                return listener.accept()[0], peer

        def start_reader(connection):
            reader = gevent.spawn(connection.recv, 100)
            gevent.sleep(0.01)
            return reader

        ours, peer = pair()
        old = Connection(fileno=ours.detach())
        reader = start_reader(old)
        peer.sendall(b"x")
        reader.get()
        number, copy = old.fileno(), os.dup(old.fileno())
        ours, new_peer = pair()
        old.close()
        gevent.sleep(0.01)
        os.dup2(ours.fileno(), number)
        new = Connection(fileno=number)
        reader = start_reader(new)
        peer.close()
        gevent.sleep(0.05)
        new_peer.sendall(b"the new one's")
        print(reader.get())
    """)
    assert out.strip() == '''b"the new one's"'''


@pytest.mark.parametrize("read", ["recvfrom", "recvmsg", "recv_to_file"])
def test_what_a_method_of_gevents_leaves_is_not_waited_for(tcp_pair, read):
    connection, peer = tcp_pair()
    has_waited_once(connection, peer)
    with tempfile.TemporaryFile(buffering=0) as file:
        reads = {
            "recvfrom": lambda connection: connection.recvfrom(5),
            "recvmsg": lambda connection: connection.recvmsg(5),
            "recv_to_file": lambda connection: connection.recv_to_file(file, 5),
        }
        reader = start_reader(connection, reads[read])
        peer.sendall(b"0123456789")
        reader.get(timeout=SOON)
    with gevent.Timeout(SOON):
        assert connection.recv(100) == b"56789"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_what_follows_urgent_bytes_is_not_waited_for(pair, tcp_pair, kind):
    """A read stops short at the urgent mark, tcp(7)."""
    connection, peer = tcp_pair() if kind == "tcp" else pair()
    has_waited_once(connection, peer)
    reader = start_reader(connection, lambda connection: connection.recv(100))
    peer.send(b"abc")
    try:
        peer.send(b"X", socket.MSG_OOB)
    except OSError:
        pytest.skip("this kernel has no urgent bytes on unix sockets")
    peer.send(b"def")
    got = reader.get(timeout=SOON)
    with gevent.Timeout(SOON):
        while b"def" not in got:
            got += connection.recv(100)
    assert got.replace(b"X", b"") == b"abcdef"
    began = time.process_time()
    with gevent.Timeout(0.1, False):
        connection.recv(100)
    assert time.process_time() - began < 0.05


def test_urgent_bytes_do_not_end_a_file(tcp_pair):
    """splice(2) does not go past them: it finds nothing, or an end."""
    connection, peer = tcp_pair()
    with tempfile.TemporaryFile(buffering=0) as file:
        receiver = gevent.spawn(connection.recv_to_file, file)
        for _ in range(5):
            peer.send(b"abc")
            peer.send(b"X", socket.MSG_OOB)
            gevent.sleep(0.005)
        peer.send(b"def")
        peer.shutdown(socket.SHUT_WR)
        assert receiver.get(timeout=SOON) == 18
        file.seek(0)
        assert file.read() == b"abc" * 5 + b"def"


def test_what_follows_a_message_with_descriptors_is_not_waited_for(pair):
    """A read of a unix socket stops short there."""
    connection, peer = pair()
    has_waited_once(connection, peer)
    reader = start_reader(connection, lambda connection: connection.recv(100))
    socket.send_fds(peer, [b"abc"], [peer.fileno()])
    peer.send(b"def")
    assert reader.get(timeout=SOON) == b"abc"
    with gevent.Timeout(SOON):
        assert connection.recv(100) == b"def"


def test_a_second_datagram_is_not_waited_for(pair):
    connection, peer = pair(socket.SOCK_DGRAM)
    has_waited_once(connection, peer)
    peer.send(b"1")
    peer.send(b"2")
    with gevent.Timeout(SOON):
        assert [connection.recv(100), connection.recv(100)] == [b"1", b"2"]


def test_a_poller_that_cannot_be_made_closes_no_other_descriptor_and_costs_no_data():
    out = run_python("""
        import gc, os, resource, socket
        from gevent.hub import get_hub
        from gtcpserver import Connection

        ours, peer = socket.socketpair()
        connection = Connection(fileno=ours.detach())
        get_hub()
        full = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        try:
            while True:
                full.append(os.dup(0))
        except OSError:
            pass
        peer.sendall(b"0123456789" * 4)
        print(b"".join(connection.recv(1) for _ in range(40)))  # the 16th full read would have made it
        try:
            connection.recv(5)
        except OSError as error:
            print(error.errno)
        gc.collect()
        os.fstat(0)
        os.close(full.pop())
        peer.sendall(b"later")
        print(connection.recv(5))
    """)
    assert out.split() == [str(b"0123456789" * 4), "24", "b'later'"]


def test_a_second_object_for_a_socket_does_not_take_the_wait_of_the_first(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    second = Connection(fileno=connection.fileno())
    try:
        reader = start_reader(connection, lambda connection: connection.recv(100))
        with pytest.raises(ConcurrentObjectUseError):
            second.recv(100)
        peer.sendall(b"x")
        assert reader.get(timeout=SOON) == b"x"
    finally:
        second.detach()


def test_a_connection_collected_in_another_thread_leaves_the_next_with_its_number_alone(tcp_pair, made):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        old = Connection(fileno=listener.accept()[0].detach())
    made.append(peer)
    has_waited_once(old, peer)
    number = old.fileno()
    old.context = old  # only the garbage collector finds it
    spare, new_peer = socket.socketpair()
    made.extend((spare, new_peer))
    del old
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    # Closed already, while its callback in this thread is still to come.
    assert not os.path.exists(f"/proc/self/fd/{number}")
    os.dup2(spare.fileno(), number)
    new = Connection(fileno=number)
    made.append(new)
    with gevent.Timeout(SOON):
        reader = start_reader(new, lambda connection: connection.recv(100))
        gevent.sleep(0.01)
        new_peer.sendall(b"x")
        assert reader.get() == b"x"


def test_an_error_of_the_hubs_error_handler_makes_nobody_deaf(pair):
    pairs = [pair() for _ in range(3)]
    for connection, peer in pairs:
        has_waited_once(connection, peer)
    got = []

    def fail(connection):
        connection.recv(100)
        raise ZeroDivisionError("in a greenlet of its own")

    def read(connection):
        got.append(connection.recv(100))
        got.append(connection.recv(100))

    hub = get_hub()
    errors = []

    def refuse(_context, kind, *_):
        errors.append(kind)
        if kind is ZeroDivisionError:
            raise RuntimeError("of the handler")

    hub.handle_error = refuse
    try:
        for work, (connection, _peer) in zip((read, fail, read), pairs, strict=True):
            hub.loop.run_callback(greenlet(work, hub).switch, connection)
        wait_until(lambda: all(connection.stream.reader() for connection, _peer in pairs))
        for _connection, peer in pairs:
            peer.sendall(b"x")
        wait_until(lambda: len(got) == 2)
        for _connection, peer in pairs:
            peer.sendall(b"y")
        wait_until(lambda: len(got) == 4)
    finally:
        del hub.handle_error
    assert errors == [ZeroDivisionError, RuntimeError]


def test_a_handler_that_does_not_notice_the_end_leaves_the_others_their_turns(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    turns = []

    def read_on(connection):
        for _ in range(100_000):
            connection.recv(100)
            if turns:
                return "others ran"
        return "alone"

    reader = start_reader(connection, read_on)
    gevent.spawn_later(0, turns.append, True)
    peer.close()
    assert reader.get(timeout=SOON) == "others ran"


@pytest.mark.parametrize("name", ["accepted_at", "idle_block", "_stream"])
def test_a_mixin_that_covers_a_slot_is_written_as_python_writes_it(name, made):
    kept = {}

    class Mixin:
        pass

    setattr(Mixin, name, property(lambda self: kept[id(self)], lambda self, value: kept.__setitem__(id(self), value)))

    class Own(Mixin, Connection):
        pass

    ours, peer = socket.socketpair()
    made.append(peer)
    connection = Own(fileno=ours.detach())
    made.append(connection)
    assert kept[id(connection)] is getattr(connection, name)
