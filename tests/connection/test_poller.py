"""Poller: what an edge-triggered wait must not miss, whom it switches to, and whose its epoll instance is."""

import errno
import gc
import socket
import struct
import subprocess
import sys
import textwrap
import threading

import gevent
import pytest
from gevent.exceptions import ConcurrentObjectUseError
from gevent.hub import get_hub

from gtcpserver import Connection
from gtcpserver.connection.poller import poller_of
from kit.forms import pure_only
from kit.patience import SOON
from kit.waiting import wait_until


def run_python(program):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture
def pair():
    made = []

    def make():
        ours, peer = socket.socketpair()
        connection = Connection(fileno=ours.detach())
        made.extend((connection, peer))
        return connection, peer

    yield make
    for one in made:
        one.close()


@pytest.fixture
def tcp_pair():
    listener = socket.create_server(("127.0.0.1", 0))
    made = [listener]

    def make():
        peer = socket.create_connection(listener.getsockname())
        connection = Connection(fileno=listener.accept()[0].detach())
        made.extend((connection, peer))
        return connection, peer

    yield make
    for one in made:
        one.close()


def has_waited_once(connection, peer):
    """The connection is watched, and its last read was short."""
    reader = gevent.spawn(connection.recv, 100)
    wait_until(connection.stream.reader)
    peer.sendall(b"first")
    assert reader.get(timeout=SOON) == b"first"


@pytest.mark.parametrize("read", [1, 3, 5, 100])
def test_the_end_that_comes_with_the_last_data_is_not_missed(tcp_pair, read):
    connection, peer = tcp_pair()
    has_waited_once(connection, peer)
    reader = gevent.spawn(connection.recv, read)
    wait_until(connection.stream.reader)
    peer.sendall(b"12345")
    peer.shutdown(socket.SHUT_WR)  # before the event loop looks
    got = reader.get(timeout=SOON)
    with gevent.Timeout(SOON):
        while data := connection.recv(read):
            got += data
    assert got == b"12345"
    assert connection.recv(1) == b""


def test_a_reset_that_comes_with_data_is_not_missed(tcp_pair):
    connection, peer = tcp_pair()
    has_waited_once(connection, peer)
    reader = gevent.spawn(connection.recv, 100)
    wait_until(connection.stream.reader)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.sendall(b"12345")
    peer.close()
    with gevent.Timeout(SOON), pytest.raises(ConnectionResetError):
        reader.get()
        while connection.recv(100):
            pass


def test_input_that_comes_while_nobody_waits_is_not_missed(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    for _ in range(3):
        peer.sendall(b"later")
        gevent.sleep(0)
        gevent.sleep(0.001)  # the event has been fetched
        with gevent.Timeout(SOON):
            assert connection.recv(100) == b"later"


def test_what_a_peek_or_a_small_read_leaves_is_not_waited_for(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    peer.sendall(b"abc")
    with gevent.Timeout(SOON):
        assert connection.recv(100, socket.MSG_PEEK) == b"abc"
        assert connection.recv(100, socket.MSG_PEEK) == b"abc"
        assert [connection.recv(1) for _ in range(3)] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("method", ["recvmsg", "recvfrom"])
def test_gevents_own_reads_between_ours_wait_no_longer_than_they_must(pair, method):
    connection, peer = pair()
    has_waited_once(connection, peer)
    for size in (2, 100, 1, 100):
        peer.sendall(b"abcd")
        with gevent.Timeout(SOON):
            assert getattr(connection, method)(size)[0] == b"abcd"[:size]
            if size < 4:
                assert connection.recv(100) == b"abcd"[size:]


@pytest.mark.parametrize(
    "read",
    [
        lambda connection: connection.recv(10),
        lambda connection: connection.recv(10, socket.MSG_PEEK),
        lambda connection: connection.recv_into(bytearray(10)),
        lambda connection: connection.recv_exactly(10),
        lambda connection: connection.recv_until(b"\n"),
        lambda connection: connection.recvfrom(10),
    ],
    ids=["recv", "peek", "recv_into", "recv_exactly", "recv_until", "recvfrom"],
)
def test_no_read_waits_on_a_socket_without_blocking(pair, read):
    connection, peer = pair()
    has_waited_once(connection, peer)
    connection.setblocking(False)
    with gevent.Timeout(SOON), pytest.raises(BlockingIOError):
        read(connection)


@pytest.mark.parametrize("read", ["recv", "recv_into", "within a deadline"])
def test_a_read_that_fails_leaves_its_input_to_the_next(tcp_pair, read):
    connection, peer = tcp_pair()
    has_waited_once(connection, peer)
    stream = connection.stream

    class FailsOnce:  # as the TLS layer does, which has read nothing of it
        def recv(self, *_arguments):
            stream.io = stream.sock
            raise OSError("a flood")

        recv_into = recv

    def receive():
        if read == "recv_into":
            return connection.recv_into(bytearray(10))
        if read == "recv":
            return len(connection.recv(10))
        with connection.deadline(60):
            return len(connection.recv(10))

    stream.io = FailsOnce()
    peer.sendall(b"12345")
    with gevent.Timeout(SOON):
        with pytest.raises(OSError, match="a flood"):
            receive()
        assert receive() == 5


def test_greenlets_take_turns_in_the_order_of_their_events(pair):
    pairs = [pair() for _ in range(20)]
    for connection, peer in pairs:
        has_waited_once(connection, peer)
    order = []

    def read(number, connection):
        connection.recv(100)
        order.append(number)
        connection.recv(100)  # to wait again gives the turn to the next

    readers = [gevent.spawn(read, number, connection) for number, (connection, _peer) in enumerate(pairs)]
    wait_until(lambda: all(connection.stream.reader() for connection, _peer in pairs))
    for _connection, peer in reversed(pairs):
        peer.sendall(b"x")
    wait_until(lambda: len(order) == len(pairs))
    assert order == list(reversed(range(20)))
    gevent.killall(readers)


def test_an_exception_that_ends_a_greenlet_costs_no_other_its_event(pair):
    """Not a gevent.Greenlet, which would catch it: it reaches the hub, in the middle of a turn."""
    from greenlet import greenlet

    pairs = [pair() for _ in range(3)]
    for connection, peer in pairs:
        has_waited_once(connection, peer)
    got = []

    def fail(connection):
        connection.recv(100)
        raise ZeroDivisionError("in a greenlet of its own")

    def read(connection):
        got.append(connection.recv(100))

    hub = get_hub()
    printed, hub.print_exception = [], lambda *what: printed.append(what[1])
    try:
        for work, (connection, _peer) in zip((read, fail, read), pairs, strict=True):
            one = greenlet(work, hub)
            hub.loop.run_callback(one.switch, connection)
        wait_until(lambda: all(connection.stream.reader() for connection, _peer in pairs))
        for _connection, peer in pairs:
            peer.sendall(b"x")
        wait_until(lambda: len(got) == 2)
    finally:
        del hub.print_exception
    assert printed == [ZeroDivisionError]


@pure_only
def test_an_epoll_instance_that_fails_is_asked_again_later_not_at_once(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    poller = connection.stream.poller
    asked, real = [], poller._poll  # noqa: SLF001

    def fail(*arguments):
        asked.append(arguments)
        if len(asked) <= 2:
            raise OSError(errno.ENOMEM, "for a while")
        return real(*arguments)

    reader = gevent.spawn(connection.recv, 100)
    wait_until(connection.stream.reader)
    hub = get_hub()
    printed, hub.print_exception = [], lambda *what: printed.append(what[1])
    poller._poll = fail  # noqa: SLF001
    try:
        peer.sendall(b"there all the time")
        assert reader.get(timeout=SOON) == b"there all the time"
    finally:
        poller._poll = real  # noqa: SLF001
        del hub.print_exception
    assert len(asked) == 3
    assert printed == [OSError, OSError]


def test_a_second_reader_is_refused_and_the_first_keeps_its_wait(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    reader = gevent.spawn(connection.recv, 100)
    wait_until(connection.stream.reader)
    with pytest.raises(ConcurrentObjectUseError):
        connection.recv(100)
    peer.sendall(b"for the first")
    assert reader.get(timeout=SOON) == b"for the first"


def test_another_thread_is_refused_and_takes_nobodys_event(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    raised = []

    def use():
        try:
            connection.recv(100)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "different thread" in str(raised[0])
    peer.sendall(b"still ours")
    with gevent.Timeout(SOON):
        assert connection.recv(100) == b"still ours"


def test_a_socket_that_lives_on_in_another_object_is_watched_again(pair):
    connection, peer = pair()
    has_waited_once(connection, peer)
    again = Connection(fileno=connection.detach())
    try:
        has_waited_once(again, peer)
        peer.sendall(b"second")
        with gevent.Timeout(SOON):
            assert again.recv(100) == b"second"
    finally:
        again.close()


def test_a_connection_dropped_without_a_close_leaves_no_state(pair):
    poller = poller_of(get_hub())
    ours, peer = socket.socketpair()
    number = ours.fileno()
    box = [Connection(fileno=ours.detach())]
    has_waited_once(box[0], peer)
    gc.collect()
    with pytest.warns(ResourceWarning):
        box.clear()
    assert not poller.wait(number)
    peer.close()


def test_the_loop_ends_when_nothing_is_watched_and_not_before():
    """gevent's LoopExit tells a program that waits for what cannot come."""
    out = run_python("""
        import gevent, socket
        from gevent.event import Event
        from gevent.exceptions import LoopExit
        from gtcpserver import Connection

        ours, peer = socket.socketpair()
        connection = Connection(fileno=ours.detach())
        reader = gevent.spawn(connection.recv, 10)
        gevent.get_hub().threadpool.apply(lambda: (__import__("time").sleep(0.05), peer.sendall(b"there")))
        print(reader.get())
        connection.close()
        try:
            Event().wait()
        except LoopExit:
            print("LoopExit")
    """)
    assert out.split() == ["b'there'", "LoopExit"]


def test_a_fork_of_a_program_that_does_not_serve_shares_no_epoll_instance():
    """The child goes on with its copy of the connections, as plain gevent's would."""
    out = run_python("""
        import os, socket
        import gevent
        from gtcpserver import Connection

        def pair():
            ours, peer = socket.socketpair()
            return Connection(fileno=ours.detach()), peer

        for_parent, parents_peer = pair()
        for_child, childs_peer = pair()
        for connection, peer in ((for_parent, parents_peer), (for_child, childs_peer)):
            reader = gevent.spawn(connection.recv, 100)
            gevent.sleep(0.01)
            peer.sendall(b"before")
            assert reader.get() == b"before"
        child = os.fork()
        if not child:
            gevent.reinit()
            childs_peer.sendall(b"in the child")
            with gevent.Timeout(20):
                print(for_child.recv(100), flush=True)
                later, peer = pair()
                reader = gevent.spawn(later.recv, 100)
                gevent.sleep(0.01)
                peer.sendall(b"new there")
                print(reader.get(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        parents_peer.sendall(b"in the parent")
        with gevent.Timeout(20):
            print(for_parent.recv(100))
    """)
    assert out.splitlines() == ["b'in the child'", "b'new there'", "b'in the parent'"]


def test_waiting_for_a_descriptor_that_is_not_watched_is_said(pair):
    assert not poller_of(get_hub()).wait(pair()[0].fileno())


class Told(BaseException):
    pass


def test_an_error_is_raised_in_the_greenlet_that_waited(pair):
    conn, peer = pair()
    poller, told, seen = poller_of(get_hub()), Told(), []

    def read():
        try:
            conn.recv(10)
        except Told as error:
            seen.append(error)
        gevent.sleep(0)
        seen.append(poller.waiter(conn.fileno()))

    reader = gevent.spawn(read)
    wait_until(lambda: conn.stream.reader() is reader)
    poller.leave(conn.fileno())
    in_hub(poller.throw_into, reader, conn.fileno(), told)
    reader.join(SOON)
    assert seen == [told, None]
    peer.sendall(b"more")
    with gevent.Timeout(SOON):
        assert conn.recv(10) == b"more"


def test_an_error_reaches_a_greenlet_that_waits_for_something_else_and_no_later_wait(pair):
    conn, peer = pair()
    conn.settimeout(SOON)
    poller, told, seen = poller_of(get_hub()), Told(), []

    def sleep():
        try:
            while True:
                get_hub().switch()
        except Told as error:
            seen.append(error)

    sleeper = gevent.spawn(sleep)
    gevent.sleep(0)
    in_hub(poller.throw_into, sleeper, conn.fileno(), told)
    sleeper.join(SOON)
    assert seen == [told]
    gevent.spawn_later(0.01, peer.sendall, b"data")
    assert conn.recv(10) == b"data"


def in_hub(function, *arguments):
    get_hub().loop.run_callback(function, *arguments)
    gevent.sleep(0.01)
