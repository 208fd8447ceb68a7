"""Frames: whole messages, read from and written to a connection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from gtcpserver.errors import EarlyEOF, LimitExceeded
from gtcpserver.framing import Found, Framing

#: Bytes asked of the kernel at once.
READ_SIZE = 16 * 1024

#: The same for the rest of a longer message.
MOST_READ = 256 * 1024


class Frames:
    """The messages of a connection: :meth:`Connection.frames` makes it.

    Iterating over it receives message after message until the peer closes between two of them. The wait for the first
    byte of each is idle (:meth:`Connection.idle`): it holds no place in the pool, and a stop ends it.

    Args:
        sock: a Connection, or any socket, such as the ``gevent.ssl.SSLSocket`` of a client. What is read of the next
            message is given back to a Connection; with another socket, read with this object alone.
        framing: a :class:`LengthPrefix`, :class:`Netstrings`, :class:`Lines`, or a format of your own
            (:class:`gtcpserver.framing.Framing`).

    Example::

        from gtcpserver import Frames, Netstrings, connect

        with connect("10.0.0.5:7000", timeout=5) as conn:
            frames = Frames(conn, Netstrings())
            frames.send(b"ping")
            print(frames.recv())  # b'ping'
    """

    def __init__(self, sock: Any, framing: Framing) -> None:
        self.framing = framing
        self._sock = sock
        self._stream = getattr(sock, "stream", None)  # of a Connection
        self._kept = b""

    def send(self, message: bytes) -> None:
        """Send a message.

        Raises:
            LimitExceeded, FramingError: the format cannot have this message; nothing was sent.
            OSError: as ``sendall``.
        """
        self._sock.sendall(self.framing.encode(message))

    def send_all(self, messages: Iterable[bytes]) -> None:
        """Send several messages with one call of the system. Raise as :meth:`send`; then nothing was sent."""
        self._sock.sendall(b"".join(map(self.framing.encode, messages)))

    def recv(self) -> bytes:
        """Receive a message.

        Raises:
            EarlyEOF: the peer has closed; ``partial`` is b"" if it did so between two messages.
            LimitExceeded: the message is longer than the limit. The stream is out of sync: close the connection.
            FramingError: what was received is no frame. The same.
            TimeoutError, DeadlineExceeded, OSError: as ``recv``. What has arrived of the message is kept.
        """
        message = self._next(b"")
        if message is None:
            raise self._note(EarlyEOF("the peer closed the connection"))
        return message

    def __iter__(self) -> Iterator[bytes]:
        idle = getattr(self._sock, "idle", nullcontext)
        while True:
            with idle():
                data = self._read(READ_SIZE)
            message = self._next(data) if data else None
            if message is None:
                return
            yield message

    def _next(self, data: bytes | bytearray) -> bytes | None:
        """Return the next message, of which ``data`` has been read; None: the peer closed before it."""
        searched, missing = 0, READ_SIZE
        found: Found | int = 0
        try:
            while True:
                if data:
                    found = self.framing.find(data, searched)
                    if isinstance(found, Found):
                        message = bytes(memoryview(data)[found.start : found.end])
                        searched = found.after
                        return message
                    searched, missing = len(data), found - len(data)
                more = self._read(min(max(READ_SIZE, missing), MOST_READ))
                if not more and not (data and self._stream is not None and self._stream.goes_on()):
                    if not data:
                        return None
                    raise self._note(EarlyEOF(f"the peer closed after {len(data)} bytes of a message", bytes(data)))
                if not data:
                    data = more
                elif isinstance(data, bytearray):
                    data += more
                else:
                    data = bytearray(data) + more
        except LimitExceeded as error:
            raise self._note(error) from None
        except EarlyEOF:
            data = b""
            raise
        finally:
            rest = bytes(memoryview(data)[found.after :]) if isinstance(found, Found) else bytes(data)
            if rest:
                self._give_back(rest)

    def _read(self, size: int) -> bytes:
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        data: bytes = self._sock.recv(size)
        return data

    def _give_back(self, data: bytes) -> None:
        if self._stream is not None:
            self._sock.unread(data)
        else:
            self._kept = data + self._kept

    def _note(self, error: Any) -> Any:
        return error if self._stream is None else self._stream.note(error)
