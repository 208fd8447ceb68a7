"""The raw socket of an accepted connection, which is a descriptor until more is asked of it."""

import errno
import gc
import os
import socket
import warnings

import gevent
import pytest
from gevent import socket as gsocket

import gtcpserver
from gtcpserver import Connection
from gtcpserver.connection.accepted import AcceptedSocket
from gtcpserver.testing import serving
from kit.patience import SOON
from kit.waiting import wait_until

TCP = int(socket.AF_INET), int(socket.SOCK_STREAM), 0


@pytest.fixture
def pair():
    """A raw socket of the class, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    accepted.setblocking(False)
    raw = AcceptedSocket(*TCP, accepted.detach())
    with peer:
        yield raw, peer
    raw.close()


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_it_lacks_is_that_of_a_socket_object(pair):
    raw, peer = pair
    fd = raw.fileno()
    assert (raw.family, raw.type, raw.proto) == TCP
    assert raw.getpeername() == peer.getsockname()
    assert raw.gettimeout() == 0.0
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    raw.send(b"x")
    assert peer.recv(10) == b"x"
    assert raw.fileno() == fd
    assert f"fd={fd}" in repr(raw)
    with pytest.raises(AttributeError, match="nosuch"):
        raw.nosuch  # noqa: B018


@pytest.mark.parametrize("made", [False, True])
def test_its_descriptor_is_closed_once(pair, made):
    raw, peer = pair
    fd = raw.fileno()
    if made:
        raw.getpeername()
    raw.close()
    assert raw.fileno() == -1
    taken = os.open("/dev/null", os.O_RDONLY)  # perhaps with the same number
    raw.close()
    assert taken != fd or is_open(taken)
    os.close(taken)
    assert peer.recv(10) == b""
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        raw.getpeername()
    assert raised.value.errno == errno.EBADF


@pytest.mark.parametrize("made", [False, True])
def test_its_descriptor_can_be_given_away(pair, made):
    raw, peer = pair
    if made:
        raw.getpeername()
    with socket.socket(fileno=raw.detach()) as own:
        raw.close()
        own.sendall(b"x")
        assert peer.recv(10) == b"x"
    assert raw.fileno() == -1
    assert raw.detach() == -1


@pytest.mark.parametrize("made", [False, True])
def test_one_that_is_dropped_warns_and_closes(made):
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setblocking(False)
    raw = AcceptedSocket(int(socket.AF_UNIX), int(socket.SOCK_STREAM), 0, near.detach())
    if made:
        raw.getpeername()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del raw
    with far:
        assert far.recv(10) == b""


needs_it = pytest.mark.skipif(not gtcpserver.compiled, reason="in pure Python the socket object is made at once")


@needs_it
def test_one_that_could_not_be_made_closes_nothing():
    """A descriptor 0 that it never had, above all."""
    taken = os.dup(0)
    os.close(0)
    try:
        assert os.open("/dev/null", os.O_RDONLY) == 0
        with pytest.raises(OverflowError):
            AcceptedSocket(2**80, 1, 0, 5)
        AcceptedSocket.__new__(AcceptedSocket)
        gc.collect()
        assert is_open(0)
    finally:
        os.dup2(taken, 0)
        os.close(taken)


@needs_it
def test_a_connection_has_no_socket_object_until_it_is_asked_for():
    seen = []

    def handler(conn):
        seen.append(type(conn.stream.sock))
        with conn.deadline(SOON):
            conn.sendall(conn.recv(100))
        while data := conn.recv(100):
            conn.sendall(data)
        seen.append(conn.stream.sock.fd >= 0)
        seen.append(conn.getsockname()[1] == conn.server.port)
        seen.append(conn.stream.sock.fd)

    with serving(handler) as server, gsocket.create_connection(("127.0.0.1", server.port), SOON) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(10) == b""
    assert seen == [AcceptedSocket, True, True, -1]


@pytest.mark.parametrize("call", ["recv_into", "recv", "peek", "send", "sendall"])
def test_calls_that_need_a_socket_object_have_one(call):
    def handler(conn):
        if call == "recv_into":
            buffer = bytearray(100)
            data = bytes(buffer[: conn.recv_into(buffer)])
        elif call == "peek":
            assert conn.recv(100, socket.MSG_PEEK) == b"x"
            data = conn.recv(100)
        else:
            data = conn.recv(1_000_000 if call == "recv" else 100)
        if call == "send":
            conn.send(memoryview(data))
        else:
            conn.sendall(bytearray(data) if call == "sendall" else data)
        assert conn.recv(100) == b""

    with serving(handler) as server, gsocket.create_connection(("127.0.0.1", server.port), SOON) as sock:
        gevent.sleep(0.01)  # the handler waits
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(10) == b""


def test_a_watcher_of_others_learns_of_the_close():
    """A greenlet that waits for the descriptor by its number, when the connection closes and lingers."""
    ended = []

    def wait(fd):
        gsocket.wait_read(fd)
        ended.append(fd)

    def handler(conn):
        gevent.spawn(wait, conn.fileno())
        conn.recv(10)
        conn.sendall(b"x")

    with serving(handler, linger=0.1) as server, gsocket.create_connection(("127.0.0.1", server.port), SOON) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        wait_until(lambda: ended)


def test_sockets_of_a_server_leave_no_warning():
    def handler(conn):
        conn.sendall(conn.recv(10))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with serving(handler) as server:
            for _ in range(10):
                with gsocket.create_connection(("127.0.0.1", server.port), SOON) as sock:
                    sock.sendall(b"x")
                    assert sock.recv(10) == b"x"
        gc.collect()


def test_a_connection_made_by_hand_has_a_socket_object():
    with Connection(*TCP) as conn:
        assert not isinstance(conn.stream.sock, AcceptedSocket)
