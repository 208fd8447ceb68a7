"""The body of a request, as a WSGI application reads it."""

from __future__ import annotations

import io
from typing import Any

from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.http1.chunks import ChunkError, ChunkReader
from gtcpserver.http1.head import Head

#: Seconds for reading and discarding the rest of a body that the application did not read, so that the client sees the
#: answer, and the next request can follow. nginx: lingering_time, 30 s.
DISCARD_SECONDS = 30.0


class BodyError(ConnectionError):
    """The client cut its body short, or the body is malformed. An OSError, as applications expect from their input.

    Attributes:
        malformed: the end of the body is unknown; otherwise the client left.
    """

    def __init__(self, message: str, *, malformed: bool) -> None:
        super().__init__(message)
        self.malformed = malformed


class RequestBody(io.RawIOBase):
    """Reads a body from its connection up to its end, and no byte beyond. Chunked bodies are read strictly.

    Attributes:
        awaits_100: the client waits for "100 Continue", which is sent before the first read.
        fault: error that ended the body early: a BodyError, or the connection's own OSError. Each read raises it again.
    """

    def __init__(self, conn: Connection, head: Head) -> None:
        self._conn = conn
        self._left = head.length
        self._chunks = ChunkReader() if head.is_chunked else None
        self._content = b""  # of chunks, not read yet
        # RFC 9110 section 10.1.1: an expectation in HTTP/1.0 is ignored.
        self.awaits_100 = head.version != b"1.0" and any(
            value.lower() == b"100-continue" for value in head.values(b"expect")
        )
        self.fault: OSError | None = None

    @property
    def ended(self) -> bool:
        """Whether the whole body was read from the connection."""
        return not self._left if self._chunks is None else self._chunks.done

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._read(READ_AHEAD), b""))

    def discard(self) -> bool:
        """Read and discard the rest; return whether the next request can be found after it.

        Raises:
            OSError: as :attr:`fault`.
        """
        if self.ended:
            return True
        if self.awaits_100 or self.fault is not None:
            return False  # the client may send it, or not (RFC 9110 section 10.1.1)
        with self._conn.deadline(DISCARD_SECONDS):
            while self._read(READ_AHEAD):
                pass
        return True

    def _read(self, most: int) -> bytes:
        """Return up to ``most`` bytes of the content; b"" at its end."""
        if self.fault is not None:
            raise self.fault
        try:
            if self.awaits_100:
                self._send_100()
            return self._read_counted(most) if self._chunks is None else self._read_chunked(self._chunks, most)
        except OSError as error:
            self.fault = error
            raise

    def _send_100(self) -> None:
        self.awaits_100 = False
        # Part of the body has arrived: the client does not wait (RFC 9110 section 10.1.1).
        if not self._conn.peeked:
            self._conn.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_counted(self, most: int) -> bytes:
        if not self._left:
            return b""
        data = self._receive(min(most, self._left))
        self._left -= len(data)
        return data

    def _read_chunked(self, chunks: ChunkReader, most: int) -> bytes:
        while not self._content and not chunks.done:
            data = self._receive(READ_AHEAD)
            try:
                self._content = chunks.feed(data)
            except ChunkError as error:
                raise self._broken(f"the body of the request is broken: {error}", malformed=True) from None
            if chunks.done and chunks.rest:
                self._conn.unread(chunks.rest)
        data, self._content = self._content[:most], self._content[most:]
        return data

    def _receive(self, most: int) -> bytes:
        data = self._conn.recv(most)
        if not data:
            raise self._broken("the client closed before the end of the request's body", malformed=False)
        return data

    def _broken(self, message: str, *, malformed: bool) -> BodyError:
        return self._conn.stream.note(BodyError(message, malformed=malformed))
