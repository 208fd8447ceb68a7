"""What it costs to read a message that drips: as much for each byte, however long the message is."""

import socket
import time

import pytest
from gevent.hub import get_hub

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.connection.stream import LARGE_ROOM, SMALL_ROOM, Stream
from gtcpserver.errors import EarlyEOF, LimitExceeded
from gtcpserver.http1.head import find_end_of_head
from gtcpserver.testing import Client


class Dripping(Stream):
    """Instead of a socket, these pieces."""

    __slots__ = ("asked", "pieces")

    def recv(self, bufsize, flags=0):
        self.asked.append(bufsize)
        piece = next(self.pieces, b"")
        if isinstance(piece, BaseException):
            raise piece
        return piece


@pytest.fixture
def dripping():
    """`dripping(pieces)`: a connection on which they come, one in each read."""
    kept = []

    def make(pieces):
        ours, theirs = socket.socketpair()
        connection = Connection(fileno=ours.detach())
        stream = connection._stream = Dripping(connection._sock, get_hub(), None)  # noqa: SLF001  counts reads
        stream.pieces, stream.asked = iter(pieces), []
        kept.extend((connection, theirs))
        return connection

    yield make
    for one in kept:
        one.close()


def cpu(function):
    began = time.process_time()
    function()
    return time.process_time() - began


SIZES = 20_000, 160_000


@pytest.mark.slow
@pytest.mark.parametrize("separator", [b"\n", b"--end--"])
def test_recv_until_costs_the_same_for_each_byte(dripping, separator):
    """400,000 took 26 times as long as 100,000, and a megabyte half a minute."""

    def read(size):
        connection = dripping([*[b"x"] * size, *(separator[at : at + 1] for at in range(len(separator)))])
        took = cpu(lambda: connection.recv_until(separator, 1 << 20))
        assert connection.stream.kept == b""
        return took

    few, many = (min(read(size) for _ in range(2)) for size in SIZES)
    assert many < 20 * few


def test_recv_exactly_costs_the_same_for_each_byte(dripping):
    few, many = (min(cpu(lambda: dripping([b"x"] * size).recv_exactly(size)) for _ in range(2)) for size in SIZES)  # noqa: B023
    assert many < 20 * few


def test_recv_exactly_has_room_for_much_where_much_comes(dripping):
    """Room for a megabyte is asked of the kernel, and given back, for each piece."""
    connection = dripping([b"x", b"y", b"z" * SMALL_ROOM, b"z"])
    with pytest.raises(EarlyEOF):
        connection.recv_exactly(5_000_000)
    assert connection.stream.asked == [5_000_000, SMALL_ROOM, SMALL_ROOM, LARGE_ROOM, SMALL_ROOM]


@pytest.mark.parametrize("pieces", [[b"ab;cd"], [b"a", b"b;cd"], [b"a", b"b", b";cd"], [b"a", b"b;", b"cd"]])
def test_recv_until_keeps_what_comes_behind(dripping, pieces):
    connection = dripping(pieces)
    assert connection.recv_until(b";") == b"ab;"
    assert connection.stream.kept == (b"" if pieces[-1] == b"cd" else b"cd")
    assert set(connection.stream.asked) == {READ_AHEAD}


@pytest.mark.parametrize("before", [[], [b"a"], [b"a", b"b"]])
def test_an_interrupted_recv_until_loses_nothing(dripping, before):
    connection = dripping([*before, TimeoutError(), b"c", OSError(), b"d;e"])
    for error in (TimeoutError, OSError):
        with pytest.raises(error):
            connection.recv_until(b";")
    assert connection.recv_until(b";") == b"".join(before) + b"cd;"
    assert connection.stream.kept == b"e"


@pytest.mark.parametrize("pieces", [[b"abcd"], [b"ab", b"cd"], [b"a", b"b", b"cd"], [b"a", b"b", b"cd;"]])
def test_a_limit_is_a_limit_however_it_comes(dripping, pieces):
    connection = dripping(pieces)
    with pytest.raises(LimitExceeded):
        connection.recv_until(b";", 4)
    assert connection.stream.kept == b"".join(pieces)


@pytest.mark.parametrize("pieces", [[], [b"ab"], [b"a", b"b"]])
def test_an_early_end_is_told_with_what_came(dripping, pieces):
    connection = dripping(pieces)
    with pytest.raises(EarlyEOF) as told:
        connection.recv_until(b";")
    assert told.value.partial == b"".join(pieces)
    assert connection.stream.kept == b""


def test_a_head_that_drips_is_searched_once():
    """find_end_of_head looks at what is new, also in a buffer that grows."""
    head = bytearray(b"GET http://x/ HTTP/1.1\r\nA: ")

    class Counts(bytearray):
        looked = 0

        def find(self, what, start=0, *end):
            Counts.looked += (end[0] if end else len(self)) - start
            return super().find(what, start, *end)

    data = Counts(head)
    for _ in range(5000):
        searched = len(data)
        data += b"x"
        assert find_end_of_head(data, searched) is None
    assert Counts.looked < 5000 * 20


def test_the_test_kits_client_reads_in_the_same_way(in_thread):
    def read(size):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            client = Client(ours)
            pieces = iter([*[b"x"] * size, b"\n"])
            client.recv = lambda: next(pieces)
            return cpu(client.recv_until)

    few, many = (min(read(size) for _ in range(2)) for size in SIZES)
    assert many < 20 * few
