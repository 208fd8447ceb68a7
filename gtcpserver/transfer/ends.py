"""End: a socket that a transfer borrows from its owner.

A transfer's callbacks replace a waiting greenlet's ``switch`` on the socket's own watchers. Code that ends a wait
(another greenlet that closes the socket, a server that ends a slow client) calls ``throw`` on ``callback.__self__``, so
the object behind a callback here has a ``throw`` like a greenlet.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import gevent.socket
from gevent.exceptions import ConcurrentObjectUseError

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Stopped(Exception):
    """Raised to leave a flow's callback after the whole move was stopped from within it. Never escapes the package."""


class HasStream:
    """A socket that waits and moves bytes through a Stream (connection/stream.py): a Connection.

    A base class for isinstance(): a program's subclass of a gevent socket may have an unrelated ``stream``.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def stream(self) -> Any: ...
        def note_relay(self, relay: Any) -> None:
            """Note the relay that moves with this connection (``handover``); None: none any more."""

        def take_resumption(self, other: Any) -> Any:
            """Return what a relay with another connection has to go on from; None: it begins anew."""


class _Count:
    """Stands in for the counters of a socket without any."""

    __slots__ = ("bytes_received", "bytes_sent")

    def __init__(self) -> None:
        self.bytes_received = self.bytes_sent = 0


class End:
    """One borrowed socket.

    Args:
        sock: a Connection, or a ``gevent.socket.socket``; not encrypted.

    Attributes:
        raw: the non-blocking socket beneath it. Each use asks for the descriptor: after a close it is -1 and the call
            fails, instead of hitting the next connection with the same number.
        count: object with ``bytes_received`` and ``bytes_sent``.
        reading, writing: the socket's io watchers; None if not made yet.
    """

    __slots__ = ("count", "raw", "reading", "sock", "stream", "writing")

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.check_open()
        self.raw = raw_of(sock)
        self.stream = stream = stream_of(sock)
        if stream is None:
            self.count = _Count()
            self.reading = sock._read_event  # noqa: SLF001 - gevent's
            self.writing = sock._write_event  # noqa: SLF001
        else:
            self.count = stream
            self.reading = stream.lend()
            # Made on first use: a socket that always takes all data needs none.
            self.writing = stream.writing

    def take_kept(self) -> bytes:
        """Take the bytes that ``recv_until`` read ahead."""
        if self.stream is None:
            return b""
        kept: bytes = self.stream.kept
        self.stream.kept = b""
        return kept

    def keep(self, data: bytes) -> None:
        """Give back some of those bytes."""
        self.stream.kept = data

    def check_open(self) -> None:
        """Raise OSError: the socket was closed."""
        if self.sock.fileno() < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def look_again(self) -> None:
        """Prepare to go on after a pause. Raise OSError: the socket was closed."""
        self.check_open()
        self.raw = raw_of(self.sock)  # which is another object once it was offered to another process

    def start_reading(self, callback: Any) -> None:
        current = self.reading.callback
        if current is not None:
            raise ConcurrentObjectUseError(f"another greenlet reads from this connection: {current!r}")
        if self.stream is not None:
            self.stream.leave_poller()
        self.reading.start(callback)

    def start_writing(self, callback: Any) -> None:
        if self.writing is None:
            if self.stream.closed:  # meanwhile
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self.writing = self.stream.writing or self.stream.make_write_watcher()
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
        """Note that the peer has closed its side and everything was read."""
        if self.stream is not None:
            self.stream.at_eof = True


def stream_of(sock: Any) -> Any:
    """Return a Connection's Stream; None for any other socket."""
    return sock.stream if isinstance(sock, HasStream) else None


def raw_of(sock: Any) -> Any:
    """Return the non-blocking socket beneath a gevent socket, such as a Connection."""
    return sock._sock  # noqa: SLF001 - gevent's name for it


def wait_readable(sock: Any) -> None:
    """Wait until the socket is readable, as gevent's own methods do. Errors as ``recv``."""
    sock._wait(sock._read_event)  # noqa: SLF001 - gevent's names


def wait_writable(sock: Any) -> None:
    """Wait until the socket is writable, as gevent's own methods do. Errors as ``send``."""
    sock._wait(sock._write_event)  # noqa: SLF001 - gevent's names


def note_error(sock: Any, error: BaseException) -> None:
    """Mark an error as raised by this socket, if it is a Connection (``Stream.note``)."""
    if isinstance(sock, HasStream):
        sock.stream.note(error)


def reset_on_close(sock: Any) -> None:
    """Make the owner's ``close`` reset the connection instead of ending it in order."""
    try:
        raw_of(sock).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        return  # it is gone already
    stream = stream_of(sock)
    if stream is not None:
        stream.at_eof = True  # so a server does not linger over it
        if stream.tls is not None:
            stream.tls.broken = True


def is_plain(sock: Any) -> bool:
    """Return whether the bytes on the wire are those the user sees: then the kernel may move them.

    False for an encrypted socket and, to be safe, for any class other than gevent's own and Connection.

    Raises:
        TypeError: not a gevent socket.
    """
    if not isinstance(sock, gevent.socket.socket):
        raise TypeError(f"expected a Connection or a gevent socket, got {sock!r}")
    if isinstance(sock, HasStream):
        return sock.stream.tls is None
    return type(sock) is gevent.socket.socket


def closing_error(error: Any) -> BaseException:
    """Return the exception from the argument of a ``throw``, which may be a class."""
    made: BaseException = error() if isinstance(error, type) else error
    return made
