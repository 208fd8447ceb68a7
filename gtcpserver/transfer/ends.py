"""End: a socket that a transfer has borrowed from its owner.

A transfer's callbacks hang on the socket's own watchers, in place of a waiting greenlet's ``switch``. Whatever ends a
wait (another greenlet that closes the socket, a server that ends a slow client) finds by ``callback.__self__`` whom to
``throw`` its error at, so the object behind a callback here has a ``throw`` just as a greenlet does.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from math import inf
from typing import Any

import gevent.socket
from gevent.exceptions import ConcurrentObjectUseError

_TCP_CLOSE = 7  # include/net/tcp_states.h
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Stopped(Exception):
    """Leaves a flow's callback after the whole move was stopped from within it. Never seen outside."""


class _Count:
    """Stands in for the counters of a socket that has none."""

    __slots__ = ("bytes_received", "bytes_sent")

    def __init__(self) -> None:
        self.bytes_received = self.bytes_sent = 0


class End:
    """One borrowed socket.

    Args:
        sock: a Connection, or a ``gevent.socket.socket``; not encrypted.

    Attributes:
        raw: the non-blocking socket beneath it. Its descriptor is asked for at each use: when somebody has closed it,
            that is -1 and the call fails, instead of hitting the next connection that got the same number.
        count: where ``bytes_received`` and ``bytes_sent`` are kept.
        reading, writing: the socket's io watchers; None: not made yet.
    """

    __slots__ = ("count", "raw", "reading", "sock", "stream", "writing")

    def __init__(self, sock: Any) -> None:
        if sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.sock = sock
        self.raw = sock._sock
        stream: Any = getattr(sock, "_stream", None)
        self.stream = stream
        self.count = _Count() if stream is None else stream
        self.reading = sock._read_event
        # Made when it is first wanted: a socket that always takes what it is given needs none. gevent's own have it.
        self.writing = sock._write_event if stream is None else stream.writing
        if stream is not None:
            # Its time-outs are not counted while it is lent.
            if stream._timer is not None:
                stream._timer.close()
                stream._timer = None
            stream._timer_at = stream._read_until = stream._write_until = inf

    def take_kept(self) -> bytes:
        """What ``recv_until`` had read ahead."""
        if self.stream is None:
            return b""
        kept: bytes = self.stream.kept
        self.stream.kept = b""
        return kept

    def keep(self, data: bytes) -> None:
        """Give back some of it."""
        self.stream.kept = data

    def start_reading(self, callback: Any) -> None:
        current = self.reading.callback
        if current is None:
            self.reading.start(callback)
        elif self.stream is not None and current is self.stream._parked:
            self.reading.callback = callback
        else:
            raise ConcurrentObjectUseError(f"another greenlet reads from this connection: {current!r}")

    def start_writing(self, callback: Any) -> None:
        if self.writing is None:
            self.writing = self.sock._write_event
            if self.writing is None:  # closed meanwhile
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        current = self.writing.callback
        if current is not None:
            raise ConcurrentObjectUseError(f"another greenlet writes to this connection: {current!r}")
        self.writing.start(callback)

    def stop_reading(self, callback: Any) -> None:
        if self.reading.callback == callback:
            self.reading.stop()

    def stop_writing(self, callback: Any) -> None:
        if self.writing is not None and self.writing.callback == callback:
            self.writing.stop()

    def ended(self) -> None:
        """The peer has closed its side and everything was read."""
        if self.stream is not None:
            self.stream.at_eof = True


def has_ended(sock: Any) -> bool:
    """Whether a TCP connection is over for the kernel, by an error or by the ends of both sides."""
    try:
        (state,) = struct.unpack("B", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1))
    except OSError:
        return False  # a unix socket: its errors are others
    return bool(state == _TCP_CLOSE)


def note_error(sock: Any, error: BaseException) -> None:
    """Mark an error as raised by this socket, if it is a Connection (``Stream.note``)."""
    # Of the class: a gevent socket that is closed raises for whatever it has not.
    if hasattr(type(sock), "_stream"):
        sock._stream.note(error)


def reset_on_close(sock: Any) -> None:
    """Let the owner's ``close`` reset the connection instead of ending it in order."""
    try:
        sock._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        return  # it is gone already
    stream = getattr(sock, "_stream", None)
    if stream is not None:
        stream.at_eof = True  # so a server does not linger over it
        if stream.tls is not None:
            stream.tls.broken = True


def is_plain(sock: Any) -> bool:
    """Whether the bytes on the wire are those the user sees: then the kernel may move them.

    Not so for an encrypted socket, nor, as far as we can know, for any class but gevent's own and Connection.

    Raises:
        TypeError: not a gevent socket.
    """
    if not isinstance(sock, gevent.socket.socket):
        raise TypeError(f"expected a Connection or a gevent socket, got {sock!r}")
    if hasattr(sock, "_stream"):
        return sock.tls is None
    return type(sock) is gevent.socket.socket


def closing_error(error: Any) -> BaseException:
    """The exception from what was given to a ``throw``, which may be a class."""
    made: BaseException = error() if isinstance(error, type) else error
    return made
