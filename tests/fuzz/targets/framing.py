"""Reads of a Connection, mixed in any order, on bytes that come in any pieces."""

from __future__ import annotations

import socket
from typing import Any

import gevent

from fuzz.engine import Target
from fuzz.targets.helpers import Choices, pieces_of
from gtcpserver.connection import Connection
from gtcpserver.errors import EarlyEOF, LimitExceeded

SEPARATORS = (b"\n", b"\r\n", b"\r\n\r\n", b"abab", b"\0")

MOST_CALLS = 24


class _Model:
    """The same calls on bytes that are all there."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, size: int) -> bytes:
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def recv_exactly(self, size: int) -> bytes:
        if len(self.left) < size:
            raise EarlyEOF("", self.take(size))
        return self.take(size)

    def recv_until(self, separator: bytes, limit: int) -> bytes:
        end = self.left.find(separator) + len(separator)
        if len(separator) <= end <= limit:
            return self.take(end)
        if end >= len(separator) or len(self.left) >= limit:
            raise LimitExceeded("")
        raise EarlyEOF("", self.take(limit))


def _result(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except EarlyEOF as early:
        return "early", early.partial
    except LimitExceeded:
        return "limit"


def framing(data: bytes) -> None:
    choices = Choices(data)
    calls = [
        (choices.number(9), choices.number(400), choices.number(len(SEPARATORS) - 1))
        for _ in range(choices.number(MOST_CALLS))
    ]
    stream = choices.rest()
    here, there = socket.socketpair()
    with Connection(socket.AF_UNIX, socket.SOCK_STREAM, 0, here.detach()) as conn, there:
        conn.settimeout(10.0)
        there.setblocking(False)
        sender = gevent.spawn(_send, there, pieces_of(stream, 6))
        try:
            _check_calls(conn, calls, _Model(stream))
        finally:
            sender.kill()


def _send(sock: socket.socket, pieces: list[bytes]) -> None:
    for piece in pieces:
        sock.sendall(piece)  # less than the kernel's buffer
        gevent.sleep(0)
    sock.shutdown(socket.SHUT_WR)


def _check_calls(conn: Connection, calls: list[tuple[int, int, int]], model: _Model) -> None:
    size_of_all = len(model.left)
    for kind, size, which in calls:
        separator = SEPARATORS[which]
        if kind <= 1:
            limit = max(1, size)
            assert _result(conn.recv_until, separator, limit) == _result(model.recv_until, separator, limit)
        elif kind == 2:
            assert _result(conn.recv_exactly, size) == _result(model.recv_exactly, size)
        elif kind == 3:
            got = conn.recv(size)
            assert bool(got) == bool(size and model.left)
            assert got == model.take(len(got))
            assert len(got) <= size
        elif kind == 4:
            buffer = bytearray(b"?" * (size + 1))
            count = conn.recv_into(buffer, size)
            # As with socket.recv_into, 0 is the whole buffer.
            assert buffer[:count] == model.take(count)
            assert count <= (size or len(buffer))
            assert not buffer[count:].strip(b"?")
        elif kind == 5:
            peeked = conn.recv(size, socket.MSG_PEEK)
            assert model.left.startswith(peeked)
            assert len(peeked) <= size
        elif kind == 6:
            assert conn.recv(size, socket.MSG_WAITALL) == model.take(size)
        elif kind == 7:
            try:
                got = conn.recv(size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            assert got == model.take(len(got))
        elif kind == 8:
            back = separator[:size]
            conn.unread(back)
            model.left = back + model.left
            size_of_all += len(back)
        else:
            _check_file(conn, size, separator, model)
            return
    rest = b""
    while more := conn.recv(100):
        rest += more
    assert rest == model.left
    assert conn.bytes_received <= size_of_all


def _check_file(conn: Connection, size: int, separator: bytes, model: _Model) -> None:
    """A file reads ahead: from here on the rest is its own."""
    with conn.makefile("rb", buffering=max(1, size)) as file:
        while model.left:
            line = file.readline(size + 1)
            end = model.left.find(b"\n") + 1
            assert line == model.take(min(size + 1, end or len(model.left)))
            some = file.read(len(separator))
            assert some == model.take(len(separator))
        assert file.read() == b""


TARGETS = [
    Target(
        "framing",
        framing,
        tokens=(
            *SEPARATORS,
            b"\n" * 20,
            b"abaabab",
            b"\r\r\n",
            b"x" * 40,
            b"\0\0\x05\0",
            b"\x02\0\x05\0",
            b"\x06\x01\0\0",
        ),
        longest=32_000,
        lines=(60_000, 50),
        # 400 calls of the kernel's.
        seconds=(0.5, 20e-6),
    ),
]
