"""Connection, over real sockets. The peer is a plain gevent socket in the same event loop."""

import array
import gc
import http.client
import os
import random
import select
import socket
import ssl
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gevent
import gevent.event
import gevent.select
import gevent.socket
import gevent.ssl
import pytest
import trustme
from gevent.exceptions import ConcurrentObjectUseError
from gevent.hub import get_hub
from greenlet import getcurrent

from gtcpserver import Connection
from gtcpserver.errors import DeadlineExceeded, EarlyEOF, LimitExceeded
from kit.patience import SOON
from kit.waiting import wait_until

#: The buffers of each side, and more than both can hold.
BUFFER = 64 << 10
LOTS = 4 << 20


@pytest.fixture
def pair():
    """`connection, peer = pair()`: a Connection as a server has it and the client's end."""
    made = []

    def make(connection_class=Connection):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            peer = gevent.socket.socket()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            peer.connect(listener.getsockname())
            accepted, _ = listener.accept()
        connection = connection_class(accepted.family, accepted.type, accepted.proto, accepted.detach())
        peer.settimeout(SOON)
        made.extend((connection, peer))
        return connection, peer

    yield make
    for sock in made:
        sock.close()


@pytest.fixture(autouse=True)
def event_loop_errors(monkeypatch):
    """No callback of the event loop may fail; greenlets may, their tests ask them."""
    errors = []

    def note(context, *error):
        if not isinstance(context, gevent.Greenlet):
            errors.append((context, *error))

    monkeypatch.setattr(get_hub(), "handle_error", note)
    yield errors
    assert errors == []


def waits_to_read(connection):
    return wait_until(connection.stream.reader)


def waits_to_write(connection):
    return wait_until(connection.stream.writer)


def drain(sock):
    """All there is until the end."""
    parts = []
    while part := sock.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


# -- reading and writing -------------------------------------------------------------------------------------------


def test_recv_gives_what_has_come_and_then_the_end(pair):
    connection, peer = pair()
    peer.sendall(b"hello")
    assert connection.recv(3) == b"hel"
    assert connection.recv(100) == b"lo"
    peer.close()
    assert connection.recv(100) == b""
    assert connection.recv(100) == b""
    assert connection.bytes_received == 5


def test_recv_waits_without_stopping_other_greenlets(pair):
    connection, peer = pair()
    reader = gevent.spawn(connection.recv, 10)
    waits_to_read(connection)
    peer.sendall(b"late")
    assert reader.get(timeout=SOON) == b"late"


def test_recv_of_nothing_does_not_wait(pair):
    connection, peer = pair()
    assert connection.recv(0) == b""
    assert connection.recv_into(bytearray()) == 0
    peer.sendall(b"x")
    assert connection.recv(1000) == b"x"
    assert connection.recv(0) == b""
    assert connection.recv_into(bytearray()) == 0
    assert not connection.stream.at_eof


@pytest.mark.parametrize(
    "make", [lambda: bytearray(8), lambda: memoryview(bytearray(8)), lambda: array.array("I", [0, 0])]
)
def test_recv_into_fills_any_writable_buffer(pair, make):
    connection, peer = pair()
    buffer = make()
    peer.sendall(b"abcd")
    assert connection.recv_into(buffer) == 4
    assert bytes(memoryview(buffer).cast("B"))[:4] == b"abcd"
    peer.sendall(b"efgh")
    wait_until(lambda: select.select([connection], [], [], 0)[0])
    assert connection.recv_into(buffer, 2) == 2
    assert connection.recv_into(buffer, 2) == 2
    assert connection.bytes_received == 8


def test_sendall_takes_any_buffer_of_any_size(pair):
    connection, peer = pair()
    reader = gevent.spawn(drain, peer)
    big = os.urandom(1 << 20) * 8
    connection.sendall(b"")
    connection.sendall(b"small")
    connection.sendall(array.array("I", [1, 2, 3]))
    connection.sendall(bytearray(b"array"))
    connection.sendall(memoryview(big))
    assert connection.send(b"end") == 3
    connection.shutdown(socket.SHUT_WR)
    expected = b"small" + array.array("I", [1, 2, 3]).tobytes() + b"array" + big + b"end"
    assert reader.get(timeout=SOON) == expected
    assert connection.bytes_sent == len(expected)
    with pytest.raises(TypeError):
        connection.sendall("text")


def test_recv_exactly_gathers_pieces(pair):
    connection, peer = pair()
    assert connection.recv_exactly(0) == b""
    reader = gevent.spawn(connection.recv_exactly, 6)
    for piece in (b"ab", b"cd", b"efgh"):
        waits_to_read(connection)
        peer.sendall(piece)
        gevent.sleep(0)
    assert reader.get(timeout=SOON) == b"abcdef"
    assert connection.recv(10) == b"gh"
    with pytest.raises(ValueError):
        connection.recv_exactly(-1)


@pytest.mark.parametrize("sent", [b"", b"abc"])
def test_recv_exactly_tells_of_an_early_end(pair, sent):
    connection, peer = pair()
    peer.sendall(sent)
    peer.close()
    with pytest.raises(EarlyEOF) as caught:
        connection.recv_exactly(4)
    assert caught.value.partial == sent


def test_recv_exactly_that_times_out_loses_nothing(pair):
    connection, peer = pair()
    connection.settimeout(0.02)
    peer.sendall(b"ab")
    with pytest.raises(TimeoutError):
        connection.recv_exactly(4)
    peer.sendall(b"cd")
    assert connection.recv_exactly(4) == b"abcd"
    assert connection.bytes_received == 4


def test_recv_until_gives_one_message_at_a_time(pair):
    connection, peer = pair()
    peer.sendall(b"one\r\ntwo\r\nthree\r")
    assert connection.recv_until(b"\r\n") == b"one\r\n"
    assert connection.recv_until(b"\r\n") == b"two\r\n"
    reader = gevent.spawn(connection.recv_until, b"\r\n")
    waits_to_read(connection)
    peer.sendall(b"\nrest")
    assert reader.get(timeout=SOON) == b"three\r\n"
    assert connection.recv(100) == b"rest"
    with pytest.raises(ValueError):
        connection.recv_until(b"")


def test_recv_until_finds_a_separator_of_several_bytes_that_comes_byte_by_byte(pair):
    connection, peer = pair()
    reader = gevent.spawn(connection.recv_until, b"--end--")
    message = b"a--en--en-" + b"--end--"
    for byte in message:
        waits_to_read(connection)
        peer.sendall(bytes([byte]))
        gevent.sleep(0)
    assert reader.get(timeout=SOON) == message


def test_recv_until_limit_counts_the_separator(pair):
    connection, peer = pair()
    peer.sendall(b"1234\n12345\n")
    assert connection.recv_until(b"\n", 5) == b"1234\n"
    with pytest.raises(LimitExceeded):
        connection.recv_until(b"\n", 5)
    assert connection.recv(100) == b"12345\n"


def test_recv_until_gives_up_at_the_limit_without_a_separator(pair):
    connection, peer = pair()
    peer.sendall(b"x" * 100)
    with pytest.raises(LimitExceeded):
        connection.recv_until(b"\n", 100)
    assert connection.bytes_received == 100


def test_recv_until_tells_of_an_early_end(pair):
    connection, peer = pair()
    peer.sendall(b"line\nhalf")
    peer.close()
    assert connection.recv_until() == b"line\n"
    with pytest.raises(EarlyEOF) as caught:
        connection.recv_until()
    assert caught.value.partial == b"half"
    with pytest.raises(EarlyEOF) as caught:
        connection.recv_until()
    assert caught.value.partial == b""


def test_recv_until_that_times_out_loses_nothing(pair):
    connection, peer = pair()
    connection.settimeout(0.02)
    peer.sendall(b"half")
    with pytest.raises(TimeoutError):
        connection.recv_until()
    peer.sendall(b" whole\n")
    assert connection.recv_until() == b"half whole\n"
    assert connection.bytes_received == 11


def test_what_recv_until_kept_reaches_every_reader(pair):
    connection, peer = pair()
    peer.sendall(b"line\n0123456789")
    connection.recv_until()
    buffer = bytearray(3)
    assert connection.recv(2, socket.MSG_PEEK) == b"01"
    assert connection.recv(2) == b"01"
    assert connection.recv_into(buffer) == 3
    assert buffer == b"234"
    assert connection.recv_exactly(2) == b"56"
    with connection.makefile("rb") as file:
        assert file.read(1) == b"7"
        peer.shutdown(socket.SHUT_WR)
        assert file.read() == b"89"
    assert connection.bytes_received == 15


def test_what_was_kept_is_gone_after_close(pair):
    connection, peer = pair()
    peer.sendall(b"line\nrest")
    connection.recv_until()
    connection.close()
    with pytest.raises(OSError, match=r"Bad file descriptor|another greenlet"):
        connection.recv(10)


def test_every_method_that_moves_bytes_counts_them(pair):
    connection, peer = pair()
    assert connection.sendto(b"12", peer.getsockname()) == 2
    assert connection.sendmsg([b"34", b"5"]) == 3
    assert peer.recv(100) == b"12345"
    assert connection.bytes_sent == 5
    peer.sendall(b"abcdefgh")
    buffer = bytearray(2)
    assert connection.recvmsg(2, 0, socket.MSG_PEEK)[0] == b"ab"
    assert connection.bytes_received == 0
    assert connection.recvfrom(2)[0] == b"ab"
    assert connection.recvfrom_into(buffer)[0] == 2
    assert connection.recvmsg(2)[0] == b"ef"
    assert connection.recvmsg_into([buffer])[0] == 2
    assert connection.bytes_received == 8


def test_recvmsg_and_sendmsg_wait_and_time_out(pair):
    connection, peer = pair()
    reader = gevent.spawn(connection.recvmsg, 10)
    waits_to_read(connection)
    peer.sendall(b"x")
    assert reader.get(timeout=SOON)[0] == b"x"
    connection.settimeout(0.02)
    with pytest.raises(TimeoutError):
        connection.recvmsg(10)
    with pytest.raises(TimeoutError):
        while True:
            connection.sendmsg([b"x" * 1_000_000])


def test_flags(pair):
    connection, peer = pair()
    with pytest.raises(BlockingIOError):
        connection.recv(10, socket.MSG_DONTWAIT)
    peer.sendall(b"abc")
    assert connection.recv(2, socket.MSG_PEEK) == b"ab"
    assert connection.recv(10) == b"abc"
    assert connection.bytes_received == 3
    with pytest.raises(BlockingIOError):
        connection.recv_into(bytearray(10), 0, socket.MSG_DONTWAIT)
    with pytest.raises(BlockingIOError):
        while True:
            connection.send(b"x" * 1_000_000, socket.MSG_DONTWAIT)
    with pytest.raises(BlockingIOError):
        connection.sendall(b"x" * 1_000_000, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("keep", [False, True])
def test_msg_waitall_waits_for_all(pair, keep):
    connection, peer = pair()
    if keep:
        peer.sendall(b"\nab")
        connection.recv_until()
    else:
        peer.sendall(b"ab")
    reader = gevent.spawn(connection.recv, 6, socket.MSG_WAITALL)
    waits_to_read(connection)
    peer.sendall(b"cd")
    gevent.sleep(0.01)
    assert not reader.ready()
    peer.sendall(b"efgh")
    assert reader.get(timeout=SOON) == b"abcdef"
    peer.close()
    assert connection.recv(6, socket.MSG_WAITALL) == b"gh"


@pytest.mark.parametrize("switch_off", [lambda c: c.setblocking(False), lambda c: c.settimeout(0)])
def test_a_nonblocking_connection_never_waits(pair, switch_off):
    connection, peer = pair()
    peer.sendall(b"x")
    assert connection.recv(10) == b"x"  # from here on a blocking recv would wait before it asks
    switch_off(connection)
    for read in (connection.recv, connection.recvmsg, connection.recvfrom):
        with pytest.raises(BlockingIOError):
            read(10)
    with pytest.raises(BlockingIOError):
        connection.recv_into(bytearray(10))
    with pytest.raises(BlockingIOError):
        connection.recv_until()
    with pytest.raises(BlockingIOError):
        while True:
            connection.send(b"x" * 1_000_000)
    with pytest.raises(BlockingIOError):
        connection.sendall(b"x" * 1_000_000)
    assert not connection.getblocking()
    connection.setblocking(True)
    assert connection.gettimeout() is None


# -- timeouts -----------------------------------------------------------------------------------------------------


def test_recv_times_out_and_works_afterwards(pair):
    connection, peer = pair()
    connection.settimeout(0.05)
    began = time.monotonic()
    for read in (
        lambda: connection.recv(1),
        lambda: connection.recv_into(bytearray(1)),
        lambda: connection.recvfrom(1),
    ):
        with pytest.raises(TimeoutError):
            read()
    assert time.monotonic() - began >= 0.15
    peer.sendall(b"x")
    assert connection.recv(1) == b"x"


@pytest.mark.slow
def test_a_timeout_begins_anew_with_each_wait(pair):
    connection, peer = pair()
    connection.settimeout(0.6)
    for _ in range(8):  # the timer of the first wait fires in one of these
        gevent.spawn_later(0.1, peer.sendall, b"x")
        assert connection.recv(10) == b"x"
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.recv(10)
    assert time.monotonic() - began >= 0.59


def test_one_timer_serves_many_waits(pair):
    connection, peer = pair()
    connection.settimeout(SOON)
    echo = gevent.spawn(lambda: [peer.sendall(peer.recv(10)) for _ in range(50)])
    timers = set()
    for _ in range(50):
        connection.sendall(b"x")
        connection.recv(10)
        timers.add(connection.stream._timer)  # noqa: SLF001  how it waits
    echo.get(timeout=SOON)
    assert len(timers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("change", ["settimeout", "deadline"])
def test_a_timeout_taken_back_does_not_end_a_later_wait(pair, change):
    connection, peer = pair()
    gevent.spawn(peer.sendall, b"x")
    if change == "settimeout":
        connection.settimeout(0.06)
        assert connection.recv(10) == b"x"
        connection.settimeout(None)
    else:
        with connection.deadline(0.06):
            assert connection.recv(10) == b"x"
    gevent.spawn_later(0.15, peer.sendall, b"late")
    assert connection.recv(10) == b"late"


@pytest.mark.slow
def test_a_write_timeout_taken_back_does_not_end_a_later_wait(pair):
    connection, _peer = pair()
    connection.settimeout(0.05)
    with pytest.raises(TimeoutError):
        connection.sendall(bytes(LOTS))
    connection.stream._start_timer(time.monotonic() + 0.05)  # noqa: SLF001  as left over from a wait that ended in time
    connection.settimeout(None)
    writer = gevent.spawn(connection.sendall, bytes(LOTS))
    gevent.sleep(0.15)
    assert not writer.ready()
    writer.kill()


def test_a_shorter_timeout_holds_from_the_next_wait_on(pair):
    connection, peer = pair()
    connection.settimeout(1000)
    gevent.spawn_later(0.01, peer.sendall, b"x")
    connection.recv(10)
    connection.settimeout(0.02)
    with pytest.raises(TimeoutError):
        connection.recv(10)


@pytest.mark.slow
def test_data_that_came_in_time_is_not_late_because_the_loop_was_held_up(pair):
    connection, peer = pair()
    connection.settimeout(0.3)
    reader = gevent.spawn(connection.recv, 10)
    waits_to_read(connection)
    peer.sendall(b"in time")
    time.sleep(0.35)
    assert reader.get(timeout=SOON) == b"in time"


@pytest.mark.slow
def test_reader_and_writer_time_out_each_by_its_own_clock(pair):
    connection, peer = pair()
    connection.settimeout(0.6)

    def write():
        with pytest.raises(TimeoutError):
            connection.sendall(bytes(LOTS))

    writer = gevent.spawn(write)
    waits_to_write(connection)
    while not writer.ready():
        gevent.spawn_later(0.02, peer.sendall, b"x")
        assert connection.recv(10) == b"x"  # the reader is never 0.6 s without a byte
    writer.get(timeout=0)


def test_a_timeout_of_the_writer_does_not_end_a_reader_that_has_none(pair):
    connection, peer = pair()
    reader = gevent.spawn(connection.recv, 10)
    waits_to_read(connection)
    with pytest.raises(DeadlineExceeded), connection.deadline(0.03):
        connection.sendall(bytes(LOTS))
    gevent.sleep(0.02)
    assert not reader.ready()
    peer.sendall(b"x")
    assert reader.get(timeout=SOON) == b"x"


def test_sendall_to_a_client_that_never_reads_times_out(pair):
    connection, _peer = pair()
    connection.settimeout(0.05)
    with pytest.raises(TimeoutError):
        connection.sendall(bytes(LOTS))
    assert 0 < connection.bytes_sent < LOTS
    with pytest.raises(TimeoutError):
        while True:
            connection.send(b"x" * 1_000_000)


@pytest.mark.slow
def test_sendall_that_moves_does_not_time_out(pair):
    connection, peer = pair()
    connection.settimeout(0.6)

    def read_slowly():
        for _ in range(8):
            gevent.sleep(0.1)
            for _ in range(8):
                peer.recv(BUFFER)
        return len(drain(peer))

    reader = gevent.spawn(read_slowly)
    began = time.monotonic()
    connection.sendall(bytes(LOTS))
    connection.close()
    assert reader.get(timeout=SOON)
    assert time.monotonic() - began > 0.6


@pytest.mark.parametrize("value", [-1, float("nan"), "x"])
def test_settimeout_refuses_nonsense(pair, value):
    connection, _ = pair()
    with pytest.raises((ValueError, TypeError)):
        connection.settimeout(value)
    assert connection.gettimeout() is None


# -- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_deadline_bounds_a_client_that_drips(pair):
    connection, peer = pair()
    connection.settimeout(SOON)

    def drip():
        while True:
            peer.sendall(b"x")
            gevent.sleep(0.005)

    dripping = gevent.spawn(drip)
    try:
        for read in (lambda: connection.recv_exactly(10_000), lambda: connection.recv_until(b"\n")):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded) as caught, connection.deadline(0.1):
                read()
            assert isinstance(caught.value, TimeoutError)
            assert time.monotonic() - began >= 0.09
    finally:
        dripping.kill()
    peer.sendall(b"\n")
    assert connection.recv_until(b"\n").strip(b"x") == b"\n"  # nothing that had dripped was lost


def test_a_deadline_that_has_passed_ends_every_call(pair):
    connection, peer = pair()
    peer.sendall(b"waiting")
    with connection.deadline(0.01):
        gevent.sleep(0.02)
        for call in (
            lambda: connection.recv(1),
            lambda: connection.recv_into(bytearray(1)),
            lambda: connection.send(b"x"),
            lambda: connection.sendall(b"x"),
        ):
            with pytest.raises(DeadlineExceeded):
                call()
    assert connection.recv(100) == b"waiting"


def test_a_deadline_bounds_writes(pair):
    connection, _peer = pair()
    with pytest.raises(DeadlineExceeded), connection.deadline(0.05):
        connection.sendall(bytes(LOTS))


def test_the_idle_timeout_holds_within_a_deadline(pair):
    connection, _peer = pair()
    connection.settimeout(0.02)
    with connection.deadline(100), pytest.raises(TimeoutError) as caught:
        connection.recv(1)
    assert not isinstance(caught.value, DeadlineExceeded)


@pytest.mark.parametrize(("outer", "inner"), [(0.05, 100), (100, 0.05)])
def test_deadlines_nest_and_the_earlier_one_holds(pair, outer, inner):
    connection, peer = pair()
    with connection.deadline(outer):
        with connection.deadline(inner), pytest.raises(DeadlineExceeded):
            connection.recv(1)
        peer.sendall(b"x")
        if outer < inner:
            with pytest.raises(DeadlineExceeded):
                connection.recv(1)
        else:
            assert connection.recv(1) == b"x"
    connection.settimeout(0.02)
    with pytest.raises(TimeoutError) as caught:
        connection.recv_exactly(2)
    assert not isinstance(caught.value, DeadlineExceeded)


def test_overlapping_deadlines_of_two_greenlets_leave_none_behind(pair):
    connection, peer = pair()
    read, write = connection.deadline(0.01), connection.deadline(100)
    read.__enter__()
    write.__enter__()
    read.__exit__(None, None, None)
    gevent.sleep(0.02)
    peer.sendall(b"x")
    assert connection.recv(1) == b"x"
    write.__exit__(None, None, None)
    assert connection.stream.deadline is None


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_deadline_refuses_nonsense(pair, seconds):
    connection, _ = pair()
    with pytest.raises(ValueError):
        connection.deadline(seconds)


# -- like any socket -------------------------------------------------------------------------------------------------


def test_http_client_takes_it(pair):
    connection, peer = pair()

    def answer():
        request = b""
        while b"\r\n\r\n" not in request:
            request += peer.recv(100)
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        return request

    answering = gevent.spawn(answer)
    client = http.client.HTTPConnection("example.test")
    client.sock = connection
    client.request("GET", "/path")
    response = client.getresponse()
    assert (response.status, response.read()) == (200, b"hello")
    assert answering.get(timeout=SOON).startswith(b"GET /path HTTP/1.1\r\n")


def test_makefile_text(pair):
    connection, peer = pair()
    peer.sendall("grüße\nzweite\n".encode())
    peer.shutdown(socket.SHUT_WR)
    with connection.makefile("r", encoding="utf-8") as file:
        assert list(file) == ["grüße\n", "zweite\n"]
    with connection.makefile("w", encoding="utf-8") as file:
        file.write("ö")
    assert peer.recv(10) == "ö".encode()


def test_makefile_binary_both_ways_outlives_close(pair):
    connection, peer = pair()
    file = connection.makefile("rwb")
    peer.sendall(b"line\nmore")
    assert file.readline() == b"line\n"
    connection.close()
    file.write(b"answer")
    file.flush()
    assert peer.recv(10) == b"answer"
    assert file.read(4) == b"more"
    file.close()
    assert peer.recv(10) == b""


def test_makefile_times_out(pair):
    connection, _peer = pair()
    connection.settimeout(0.02)
    with connection.makefile("rb") as file, pytest.raises(TimeoutError):
        file.read(1)


@pytest.mark.parametrize("waited_before", [False, True])
def test_select_and_poll_wait_for_it(pair, waited_before):
    connection, peer = pair()
    if waited_before:
        gevent.spawn_later(0.01, peer.sendall, b"x")
        connection.recv(10)
    assert gevent.select.select([connection], [connection], [], 0)[:2] == ([], [connection])
    waiting = gevent.spawn(gevent.select.select, [connection], [], [], SOON)
    gevent.sleep(0.01)
    peer.sendall(b"a")
    assert waiting.get(timeout=SOON)[0] == [connection]
    assert connection.recv(10) == b"a"
    poll = gevent.select.poll()
    poll.register(connection, gevent.select.POLLIN)
    assert poll.poll(0) == []
    gevent.spawn_later(0.01, peer.sendall, b"b")
    assert poll.poll(SOON * 1000) == [(connection.fileno(), gevent.select.POLLIN)]
    assert select.select([connection], [], [], 0)[0] == [connection]
    assert connection.recv(10) == b"b"
    with pytest.raises(TimeoutError):
        connection.settimeout(0.01)
        connection.recv(10)


def test_the_bare_descriptor_can_be_read_between_reads(pair):
    connection, peer = pair()
    gevent.spawn_later(0.01, peer.sendall, b"a")
    assert connection.recv(10) == b"a"
    peer.sendall(b"b")
    gevent.select.select([connection], [], [], SOON)
    assert os.read(connection.fileno(), 10) == b"b"
    gevent.spawn_later(0.01, peer.sendall, b"c")
    assert connection.recv(10) == b"c"
    os.write(connection.fileno(), b"d")
    assert peer.recv(10) == b"d"


def test_dup_and_detach(pair):
    connection, peer = pair()
    gevent.spawn_later(0.01, peer.sendall, b"a")
    connection.recv(10)
    copy = connection.dup()
    assert type(copy) is Connection
    connection.close()
    peer.sendall(b"b")
    assert copy.recv(10) == b"b"
    descriptor = copy.detach()
    assert copy.fileno() == -1
    with pytest.raises(OSError):
        copy.recv(10)
    with socket.socket(fileno=descriptor) as plain:
        plain.setblocking(True)
        plain.sendall(b"still open")
    assert peer.recv(20) == b"still open"


def test_options_addresses_and_names(pair):
    connection, peer = pair()
    assert connection.getpeername() == peer.getsockname()
    assert connection.server_address == connection.getsockname() == peer.getpeername()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert (connection.family, connection.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert "Connection" in repr(connection)
    assert abs(connection.started_at - time.time()) < 10
    with connection:
        pass
    assert connection.closed
    assert "closed" in repr(connection)
    connection.close()


def test_a_new_connection_can_connect():
    with socket.create_server(("127.0.0.1", 0)) as listener, Connection() as connection:
        connection.connect(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.sendall(b"hello")
        assert connection.recv(10) == b"hello"
        accepted.close()


@pytest.fixture(scope="module")
def certificate():
    authority = trustme.CA()
    server = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    plain_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (server, plain_server):
        authority.issue_cert("localhost").configure_cert(context)
    client = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    return server, plain_server, client


def test_gevent_ssl_wraps_it_after_it_was_used(pair, certificate):
    server, _, client = certificate
    connection, peer = pair()
    gevent.spawn_later(0.01, peer.sendall, b"STARTTLS\n")
    assert connection.recv_until() == b"STARTTLS\n"
    handshake = gevent.spawn(client.wrap_socket, peer, server_hostname="localhost")
    with server.wrap_socket(connection, server_side=True) as encrypted, handshake.get(timeout=SOON) as remote:
        echo = gevent.spawn(lambda: remote.sendall(remote.recv(100) * 100_000))
        encrypted.sendall(b"hello")
        with encrypted.makefile("rb") as file:
            assert file.read(500_000) == b"hello" * 100_000
        echo.get(timeout=SOON)


def test_stdlib_ssl_wraps_it(pair, certificate, spawn_thread):
    _, server, client = certificate
    connection, peer = pair()
    gevent.spawn_later(0.01, peer.sendall, b"STARTTLS\n")
    assert connection.recv_until() == b"STARTTLS\n"
    encrypted = server.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def echo():
        encrypted.settimeout(SOON)
        encrypted.do_handshake()
        encrypted.sendall(encrypted.recv(100))
        encrypted.close()

    echoing = spawn_thread(echo)
    with client.wrap_socket(peer, server_hostname="localhost") as remote:
        remote.sendall(b"hello")
        assert remote.recv(100) == b"hello"
    echoing.get(timeout=SOON)


class Plain(Connection):
    """Without slots and constructor."""


class Slotted(Connection):
    __slots__ = ("requests",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requests = 0


class Overriding(Connection):
    """Overrides what the hot path sets aside as instance attributes."""

    def __init__(self, *args, **kwargs):
        self.log = []
        super().__init__(*args, **kwargs)

    def recv(self, bufsize, flags=0):
        self.log.append("recv")
        return super().recv(bufsize, flags)

    def sendall(self, data, flags=0):
        self.log.append("sendall")
        super().sendall(data, flags)


class SlottedOverriding(Connection):
    __slots__ = ()

    def recv(self, bufsize, flags=0):
        return super().recv(bufsize, flags).upper()


@pytest.mark.parametrize("connection_class", [Plain, Slotted, Overriding, SlottedOverriding])
def test_subclasses_work(pair, connection_class):
    connection, peer = pair(connection_class)
    peer.sendall(b"ABC")
    assert connection.recv(10) == b"ABC"
    connection.sendall(b"def")
    assert peer.recv(10) == b"def"
    if connection_class is not Slotted and connection_class is not SlottedOverriding:
        connection.anything = 1


def test_a_subclass_may_override_recv_and_sendall(pair):
    connection, peer = pair(Overriding)
    peer.sendall(b"x")
    connection.recv(1)
    connection.sendall(b"y")
    assert connection.log == ["recv", "sendall"]
    connection, peer = pair(SlottedOverriding)
    peer.sendall(b"x")
    assert connection.recv(1) == b"X"


# -- two greenlets, ends and closes --------------------------------------------------------------------------------


def test_one_greenlet_reads_while_another_writes(pair):
    connection, peer = pair()
    connection.settimeout(SOON)
    data = os.urandom(1 << 20) * 4
    there = gevent.spawn(lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
    back = gevent.spawn(drain, connection)
    echo = gevent.spawn(lambda: [peer.sendall(part) for part in iter(lambda: peer.recv(65536), b"")] and peer.close())
    assert back.get(timeout=SOON) == data
    gevent.joinall([there, echo], timeout=SOON, raise_error=True)


def test_a_second_reader_is_refused(pair):
    connection, peer = pair()
    reader = gevent.spawn(connection.recv, 10)
    waits_to_read(connection)
    for read in (connection.recv, connection.recvfrom, connection.recv_exactly):
        with pytest.raises(ConcurrentObjectUseError):
            read(1)
    peer.sendall(b"x")
    assert reader.get(timeout=SOON) == b"x"
    peer.sendall(b"y")
    assert connection.recv(1) == b"y"


def test_a_second_writer_is_refused(pair):
    connection, _peer = pair()
    writer = gevent.spawn(connection.sendall, bytes(LOTS))
    waits_to_write(connection)
    with pytest.raises(ConcurrentObjectUseError):
        connection.sendall(b"x" * 1_000_000)
    writer.kill()


def test_half_close_by_the_peer(pair):
    connection, peer = pair()
    peer.sendall(b"request")
    peer.shutdown(socket.SHUT_WR)
    assert connection.recv(100) == b"request"
    assert connection.recv(100) == b""
    connection.sendall(b"answer")
    connection.close()
    assert drain(peer) == b"answer"


def test_half_close_by_us(pair):
    connection, peer = pair()
    reader = gevent.spawn(drain, connection)
    waits_to_read(connection)
    connection.shutdown(socket.SHUT_WR)
    assert peer.recv(10) == b""
    with pytest.raises(BrokenPipeError):
        connection.sendall(b"x")
    peer.sendall(b"answer")
    peer.close()
    assert reader.get(timeout=SOON) == b"answer"


def test_shutdown_wakes_a_reader_and_a_writer(pair):
    connection, _peer = pair()
    reader = gevent.spawn(connection.recv, 10)
    writer = gevent.spawn(connection.sendall, bytes(LOTS))
    waits_to_read(connection)
    waits_to_write(connection)
    connection.shutdown(socket.SHUT_RDWR)
    assert reader.get(timeout=SOON) == b""
    with pytest.raises(BrokenPipeError):
        writer.get(timeout=SOON)


def test_close_wakes_a_reader_and_a_writer(pair):
    connection, _peer = pair()
    connection.settimeout(100)
    reader = gevent.spawn(connection.recv, 10)
    writer = gevent.spawn(connection.sendall, bytes(LOTS))
    waits_to_read(connection)
    waits_to_write(connection)
    connection.close()
    for waiting in (reader, writer):
        with pytest.raises(OSError, match="closed in another greenlet") as caught:
            waiting.get(timeout=SOON)
        assert caught.value.errno == 9
    for call in (
        lambda: connection.recv(1),
        lambda: connection.recv_into(bytearray(1)),
        lambda: connection.recvmsg(1),
        lambda: connection.send(b"x"),
        lambda: connection.sendall(b"x"),
        lambda: connection.recv_until(),
        lambda: connection.recv(1, socket.MSG_PEEK),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == 9


def test_a_reader_that_leaves_just_after_a_close_leaves_no_wait(pair):
    connection, _peer = pair()
    reader = gevent.spawn(connection.recv, 5)
    poller = waits_to_read(connection) and connection.stream.poller
    number = connection.fileno()
    done = []

    def close_and_leave():
        connection.close()
        reader.throw(gevent.GreenletExit)  # before gevent has come to end the wait
        done.append(True)

    get_hub().loop.run_callback(close_and_leave)
    wait_until(lambda: done)
    wait_until(lambda: not Path(f"/proc/self/fd/{number}").exists())
    assert poller.waiter(number) is None
    assert not poller.wait(number)


def test_reset_by_the_peer_is_a_connection_error(pair):
    connection, peer = pair()
    connection.sendall(b"unread")
    gevent.select.select([peer], [], [], SOON)
    peer.close()
    with pytest.raises(ConnectionResetError):
        connection.recv(10)
        connection.recv(10)


def test_waiting_in_the_event_loop_is_refused_not_spun(pair):
    connection, _peer = pair()
    raised = []

    def in_hub():
        for call in (lambda: connection.recv(1), lambda: connection.sendall(bytes(LOTS))):
            try:
                call()
            except BaseException as error:
                raised.append(error)

    get_hub().loop.run_callback(in_hub)
    wait_until(lambda: len(raised) == 2)
    assert [type(error) for error in raised] == [AssertionError, AssertionError]


@pytest.mark.parametrize("watcher_was_stopped", [False, True])
def test_a_fast_sender_does_not_keep_the_event_loop_to_itself(pair, watcher_was_stopped):
    connection, peer = pair()
    if watcher_was_stopped:
        gevent.spawn_later(0.01, peer.sendall, b"0")
        connection.recv(10)
    peer.sendall(b"x" * 20_000)
    gevent.sleep(0.01)  # what has come fires the watcher while nobody reads
    turns = []
    other = gevent.spawn(lambda: turns.append(1))
    for _ in range(200):
        connection.recv(100)
        if turns:
            break
    assert turns, "another greenlet never had a turn"
    other.get()


@pytest.mark.slow
def test_a_dropped_connection_leaves_nothing_behind(pair):
    loop = get_hub().loop
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for timeout in (None, 1000):
            peer = gevent.socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
            before = loop.activecnt
            connection = Connection(accepted.family, accepted.type, accepted.proto, accepted.detach())
            connection.settimeout(timeout)
            gevent.spawn_later(0.01, peer.sendall, b"x")
            assert connection.recv(10) == b"x"
            assert loop.activecnt > before
            descriptor = connection.fileno()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del connection
                gc.collect()
            with pytest.raises(OSError):
                os.fstat(descriptor)
            assert loop.activecnt <= before
            assert peer.recv(10) == b""
            peer.close()


@pytest.mark.slow
def test_dropped_connections_do_not_abort_the_process():
    # libev aborts when a started watcher outlives its descriptor; so this runs apart.
    source = """
import gc, socket, threading, gevent, gevent.socket
from gtcpserver import Connection
listener = socket.create_server(("127.0.0.1", 0))
for n in range(60):
    peer = gevent.socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    connection = Connection(accepted.family, accepted.type, accepted.proto, accepted.detach())
    if n % 2:
        connection.settimeout(60)
    gevent.spawn_later(0, peer.sendall, b"x")
    connection.recv(10)
    if n % 3 == 0:
        connection.context = connection  # a cycle, collected in another thread
    del connection
    if n % 3 == 0:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    gevent.sleep(0)
gevent.sleep(0.01)
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=SOON)
    assert (result.stdout, result.returncode) == ("alive\n", 0), result.stderr


# -- kills and timeouts at any moment -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


class Worker:
    """Moves the bytes of one direction of one connection, and is interrupted all the time.

    Between two interruptions it waits in the hub for a token of its own: whatever else switches into it then is the
    fault of a watcher that was left behind.
    """

    def __init__(self, stress, connection, step):
        self.stress = stress
        self.connection = connection
        self.step = step
        self.inside = False
        self.interruptions = 0
        self.spawn()

    def spawn(self):
        self.greenlet = gevent.spawn(self.run)
        self.stress.greenlets.append(self.greenlet)

    def run(self):
        choose = self.stress.random
        while not self.stress.over:
            self.connection.settimeout(choose.choice([None, 0.0005, 0.003, 1]))
            timer = gevent.Timeout(choose.choice([None, 0, 0.0003, 0.002]))
            try:
                try:
                    timer.start()
                    self.inside = True
                    self.step()
                finally:
                    self.inside = False
                    timer.cancel()
            except (Killed, TimeoutError):
                self.interruptions += 1
            except gevent.Timeout as caught:
                self.interruptions += caught is timer
            else:
                if choose.random() < 0.3:
                    self.stress.interrupt(choose.choice(self.stress.workers))
                continue
            self.wait_for_token()
            if choose.random() < 0.2:
                self.spawn()
                return

    def wait_for_token(self):
        loop, hub, token = get_hub().loop, get_hub(), object()
        switch = getcurrent().switch
        if self.stress.random.random() < 0.5:
            loop.run_callback(switch, token)
            got = hub.switch()
        else:
            with loop.timer(self.stress.random.random() * 0.002) as timer:
                timer.start(switch, token)
                got = hub.switch()
        if got is not token:
            self.stress.strays.append(got)


class Stress:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.over = False
        self.strays = []
        self.workers = []
        self.greenlets = []

    def interrupt(self, worker):
        """Sometimes at once in the next callbacks, sometimes when libev has its events already pending."""
        get_hub().loop.run_callback(self.throw, worker)

    def throw(self, worker):
        if worker.inside and not self.over:
            worker.greenlet.throw(Killed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_interruptions_at_any_moment_leave_no_stale_watcher(pair, seed):
    stress = Stress(seed)
    pattern = bytes(range(251)) * 600
    loop = get_hub().loop
    flows = []
    watchers = []
    pairs = [pair() for _ in range(6)]
    for connection, peer in pairs:
        # The peer is a Connection too, so that each side is read and written under fire.
        other = Connection(peer.family, peer.type, peer.proto, peer.detach())
        for source, target in ((connection, other), (other, connection)):
            flow = {"sent": 0, "received": 0, "wrong": 0}
            flows.append(flow)

            def send(source=source, flow=flow):
                at = flow["sent"] % 251
                flow["sent"] += source.send(pattern[at : at + stress.random.choice([1, 100, 100_000])])

            def receive(target=target, flow=flow):
                data = target.recv(stress.random.choice([1, 100, 100_000]))
                at = flow["received"] % 251
                flow["wrong"] += data != pattern[at : at + len(data)]
                flow["received"] += len(data)

            writer, reader = Worker(stress, source, send), Worker(stress, target, receive)
            stress.workers += [writer, reader]
            # Fires for the same event as the connection's own watcher, before it or after it.
            watcher = loop.io(target.fileno(), 1)
            watcher.start(lambda reader=reader: stress.random.random() < 0.2 and stress.throw(reader))
            watchers.append(watcher)
        pairs[pairs.index((connection, peer))] = (connection, other)
    give_up = time.monotonic() + SOON

    def enough():
        return sum(worker.interruptions for worker in stress.workers) > 500 and all(flow["received"] for flow in flows)

    while not enough() and time.monotonic() < give_up:
        gevent.sleep(0.0005)
        for _ in range(4):
            stress.interrupt(stress.random.choice(stress.workers))
    for watcher in watchers:
        watcher.close()
    stress.over = True
    for connection, other in pairs:
        connection.settimeout(0.01)
        other.settimeout(0.01)
    gevent.joinall(stress.greenlets, timeout=0.3)
    for worker in stress.workers:
        if worker.inside:  # waits forever, with no timeout of its own
            worker.greenlet.kill(Killed, block=False)
    gevent.joinall(stress.greenlets, timeout=SOON)
    assert [greenlet.exception for greenlet in stress.greenlets if not greenlet.successful()] == []
    assert stress.strays == []
    assert enough()
    assert all(flow["wrong"] == 0 for flow in flows)
    for connection, other in pairs:
        assert connection.stream.reader() is connection.stream.writer() is None
        for source, target, flow in ((connection, other, flows.pop(0)), (other, connection, flows.pop(0))):
            target.settimeout(SOON)
            target.recv_exactly(flow["sent"] - flow["received"])
            source.sendall(b"works")
            assert target.recv_exactly(5) == b"works"
        connection.close()
        other.close()


def test_greenlets_that_stopped_waiting_wake_only_by_their_own_event(pair):
    connection, peer = pair()
    woken = []

    def read_then_wait(event):
        with gevent.Timeout(0.005, False):
            connection.recv(10)
        event.wait()
        woken.append(event)

    events = [gevent.event.Event() for _ in range(3)]
    for event in events:
        waiting = gevent.spawn(read_then_wait, event)
        gevent.sleep(0.02)
        peer.sendall(b"x")  # nobody reads it: the greenlet waits for its event
        gevent.sleep(0.02)
        assert event not in woken
        assert connection.recv(10) == b"x"
        event.set()
        waiting.get(timeout=SOON)
    assert woken == events


def test_a_killed_reader_leaves_the_connection_usable(pair):
    connection, peer = pair()
    for _ in range(3):
        reader = gevent.spawn(connection.recv, 10)
        waits_to_read(connection)
        peer.sendall(b"x")
        reader.kill()
        if reader.value is None or isinstance(reader.value, gevent.GreenletExit):
            assert connection.recv(10) == b"x"


def test_a_killed_writer_leaves_the_connection_usable(pair):
    connection, peer = pair()
    writer = gevent.spawn(connection.sendall, bytes(LOTS))
    waits_to_write(connection)
    writer.kill()
    assert connection.stream.writer() is None
    sent = connection.bytes_sent
    reader = gevent.spawn(drain, peer)
    connection.sendall(b"end")
    connection.close()
    received = reader.get(timeout=SOON)
    assert len(received) == sent + 3
    assert received.endswith(b"end")


# -- in a server -------------------------------------------------------------------------------------------------------


def test_a_client_that_never_reads_does_not_keep_its_handler(serve, connect):
    ended = []

    def handler(connection):
        connection.sendall(bytes(256 << 20))

    server = serve(handler, timeout=0.1, linger=0, on_error=lambda connection, error: ended.append(error))
    connect(server, receive_buffer=BUFFER)
    wait_until(lambda: ended)
    assert isinstance(ended[0], TimeoutError)
    wait_until(lambda: server.active_connections == 0)
    assert server.pool.free_count() == server.pool.size


def test_a_duplicate_outlives_the_handler(serve, connect, in_thread):
    copies = []
    server = serve(lambda connection: copies.append(connection.dup()))
    client = connect(server)
    wait_until(lambda: copies and server.active_connections == 0)
    with copies[0] as copy:
        copy.sendall(b"still here")
        assert in_thread(client.recv, 100) == b"still here"
        client.sendall(b"and here")
        assert copy.recv(100) == b"and here"


def test_a_detached_descriptor_outlives_the_handler(serve, connect, in_thread):
    descriptors = []
    server = serve(lambda connection: descriptors.append(connection.detach()))
    client = connect(server)
    wait_until(lambda: descriptors and server.active_connections == 0)
    with gevent.socket.socket(fileno=descriptors[0]) as mine:
        mine.sendall(b"still here")
        assert in_thread(client.recv, 100) == b"still here"
