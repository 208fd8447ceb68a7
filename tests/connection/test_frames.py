"""Whole messages over real connections."""

from __future__ import annotations

import socket

import gevent
import gevent.socket
import gevent.ssl
import pytest

from gtcpserver import (
    ConfigError,
    EarlyEOF,
    Frames,
    FramingError,
    LengthPrefix,
    LimitExceeded,
    Lines,
    Netstrings,
    connect,
)
from gtcpserver.framing import Found
from kit.patience import SOON
from kit.waiting import wait_until


def upper(conn):
    frames = conn.frames(prefix=2)
    for message in frames:
        frames.send(message.upper())


def dial(server):
    conn = connect(f"127.0.0.1:{server.port}", SOON)
    conn.settimeout(SOON)
    return conn


def test_messages_of_one_packet_and_of_many(serve):
    with dial(serve(upper)) as conn:
        frames = conn.frames(prefix=2)
        frames.send_all([b"one", b"", b"three"])
        assert [frames.recv() for _ in range(3)] == [b"ONE", b"", b"THREE"]
        for byte in LengthPrefix(2).encode(b"slow"):
            conn.sendall(bytes([byte]))
            gevent.sleep(0)
        assert frames.recv() == b"SLOW"
        conn.shutdown(socket.SHUT_WR)
        assert list(frames) == []
        with pytest.raises(EarlyEOF) as caught:
            frames.recv()
        assert caught.value.partial == b""


@pytest.mark.parametrize("framing", [LengthPrefix(4, 4 << 20), Netstrings(4 << 20), Lines(limit=4 << 20)])
def test_long_messages(serve, framing):
    def echo(conn):
        frames = conn.frames(framing)
        for message in frames:
            frames.send(message)

    message = b"0123456789abcde!" * (3 << 16)
    with dial(serve(echo)) as conn:
        frames = conn.frames(framing)
        gevent.spawn(frames.send_all, [message, b"last"])
        assert frames.recv() == message
        assert frames.recv() == b"last"


def test_what_follows_a_message_is_for_the_next_read(serve):
    seen = []

    def handler(conn):
        seen.append(conn.frames(Lines()).recv())
        seen.append(conn.recv_exactly(3))
        seen.append(conn.frames(prefix=1).recv())
        seen.append(conn.recv(10))

    with dial(serve(handler)) as conn:
        conn.sendall(b"line\nabc\2xyrest")
        wait_until(lambda: len(seen) == 4)
    assert seen == [b"line", b"abc", b"xy", b"rest"]


def test_a_message_that_is_late_is_not_lost(serve):
    seen = []

    def handler(conn):
        frames = conn.frames(prefix=1)
        for _ in range(2):
            try:
                with conn.deadline(0.01 if not seen else SOON):
                    seen.append(frames.recv())
            except TimeoutError:
                seen.append("late")
                conn.sendall(b"!")

    with dial(serve(handler)) as conn:
        conn.sendall(b"\5he")
        assert conn.recv(1) == b"!"
        conn.sendall(b"llo")
        wait_until(lambda: len(seen) == 2)
    assert seen == ["late", b"hello"]


@pytest.mark.parametrize(
    ("sent", "error", "counter"),
    [
        (b"11:", LimitExceeded, "limits_exceeded"),
        (b"oops", FramingError, "limits_exceeded"),
        (b"5:he", EarlyEOF, "resets"),
    ],
)
def test_what_a_client_does_wrong_is_counted_as_its_own_fault(serve, sent, error, counter):
    seen = []

    def handler(conn):
        try:
            for _ in conn.frames(Netstrings(10)):
                pass
        except BaseException as caught:
            seen.append(caught)
            raise

    server = serve(handler)
    with dial(server) as conn:
        conn.sendall(sent)
        conn.shutdown(socket.SHUT_WR)
        assert conn.recv(1) == b""
    assert [type(one) for one in seen] == [error]
    assert getattr(seen[0], "partial", b"5:he") == b"5:he"
    wait_until(lambda: getattr(server.stats(), counter) == 1)
    assert server.stats().handler_errors == 0


def test_the_wait_for_the_next_message_is_idle_and_the_message_is_not(serve):
    began = []

    def handler(conn):
        for message in conn.frames(prefix=1):
            began.append(message)

    server = serve(handler)
    with dial(server) as waiting, dial(server) as within:
        waiting.sendall(b"\1a")
        within.sendall(b"\1b\5he")
        wait_until(lambda: len(began) == 2 and server.stats().idle == 1)
        stop = gevent.spawn(server.stop, SOON)
        assert waiting.recv(1) == b""
        within.sendall(b"llo")
        report = stop.get(timeout=SOON)
    assert sorted(began) == [b"a", b"b", b"hello"]
    assert report.ended == 0


def test_a_stop_loses_no_message_that_the_caller_made_idle(serve):
    seen = []

    def handler(conn):
        frames = conn.frames(prefix=1)
        while True:
            with conn.idle():
                try:
                    seen.append(frames.recv())
                except EarlyEOF as end:
                    seen.append(end.partial)
                    return

    server = serve(handler)
    with dial(server) as conn:
        conn.sendall(b"\1a")
        wait_until(lambda: seen)
        server.stop(SOON)
    assert seen == [b"a", b""]


def test_any_socket_has_frames_of_a_client_over_tls(serve, gtcp_tls):
    server = serve(upper, tls=gtcp_tls.server)
    context = gevent.ssl.SSLContext(gevent.ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = gevent.ssl.CERT_NONE
    with context.wrap_socket(dial(server)) as sock:
        frames = Frames(sock, LengthPrefix(2))
        frames.send_all([b"one", b"two"])
        wait_until(lambda: server.stats().bytes_sent >= 10)
        assert [frames.recv(), frames.recv()] == [b"ONE", b"TWO"]
        sock.sendall(b"\0")
        sock.settimeout(0.01)
        with pytest.raises(TimeoutError):
            frames.recv()


def test_a_format_of_one_s_own(serve):
    class Records:
        def encode(self, message):
            return message.ljust(8, b"\0")

        def find(self, data, searched):
            return Found(0, len(data[:8].rstrip(b"\0")), 8) if len(data) >= 8 else 8

    def handler(conn):
        frames = conn.frames(Records())
        for message in frames:
            frames.send(message[::-1])

    with dial(serve(handler)) as conn:
        conn.sendall(b"abc\0\0\0\0\0defghijk")
        assert conn.recv_exactly(16) == b"cba\0\0\0\0\0kjihgfed"


def test_a_message_that_cannot_be_framed_is_not_sent(serve):
    with dial(serve(upper)) as conn:
        frames = conn.frames(prefix=1)
        with pytest.raises(LimitExceeded):
            frames.send_all([b"good", bytes(300)])
        assert conn.bytes_sent == 0


@pytest.mark.parametrize("arguments", [{}, {"framing": Lines(), "prefix": 4}])
def test_a_format_or_a_prefix(serve, arguments):
    with dial(serve(upper)) as conn, pytest.raises(ConfigError, match="frames needs a framing or a prefix"):
        conn.frames(**arguments)
