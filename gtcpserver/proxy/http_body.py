"""The bodies of requests and responses, on their way through the proxy.

A large body of known length goes through the kernel (splice), every other one through a buffer: read a piece, write it,
read the next. So at most one piece, or one pipe, is held here, and a slow reader slows down the writer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gevent

from gtcpserver.connection.connection import Connection
from gtcpserver.http1.chunks import ChunkError, ChunkReader, chunk, last_chunk
from gtcpserver.http1.head import Head, Header, HttpError
from gtcpserver.transfer import pipe

from .departures import ZERO, Presence
from .http_fields import forwarded_trailers
from .http_messages import own_answer
from .limits import rest

if TYPE_CHECKING:
    from .http_answer import Answer
    from .http_origin import Origin

PIECE = 64 * 1024

#: Piece size of a rate-limited transfer, and of very small chunks: 64 KiB of chunks with one byte each take 17 ms.
PACED_PIECE = 16 * 1024

#: From this size on a pipe between the sockets is cheaper than a buffer (see transfer/flow.py).
SPLICE_FROM = 256 * 1024

#: The body of a refused request is read and discarded up to this size, so that the connection can stay.
MOST_DISCARDED = 64 * 1024
DISCARD_SECONDS = 5.0


class OriginFailed(Exception):
    """The origin closed, or sent something that is not a response.

    Attributes:
        mute: it had not sent a byte.
    """

    def __init__(self, message: str, mute: bool = False) -> None:
        super().__init__(message)
        self.mute = mute


class RequestBody:
    """Send the body of a request to the origin, while the response may already come back.

    Args:
        conn: the client.
        head: its request.
        patience: seconds without any progress.
        pace: called with the size of each piece; returns how many seconds to rest.

    Attributes:
        done: the origin has all of it, or there is no body.
        at_hand: all of it had already been read: the request can be repeated.
        consumed: all of it was read from the client: the next request follows.
        sent: bytes of content that went to the origin.
        error: why the rest will not come, as the response to the client. The origin was then reset: it must not take a
            part for the whole.
    """

    def __init__(
        self, conn: Connection, head: Head, patience: float, pace: Callable[[int], float] | None = None
    ) -> None:
        self._conn = conn
        self._patience = patience
        self.pace = pace
        has_body = head.has_body  # most have none
        self._chunks = ChunkReader() if has_body and head.is_chunked else None
        self._left = head.length if has_body else 0
        self._waits_for_100 = bool(head.values(b"expect"))
        self._ready = b""  # in the form in which it will be written
        self._ready_size = 0  # how much content that is
        self._greenlet: Any = None
        self.done = self.at_hand = self.consumed = not has_body
        self.sent = 0
        self.error: HttpError | None = None

    def prepare(self) -> None:
        """Check what came together with the head.

        Raises:
            HttpError: it is malformed. Nothing has been forwarded yet.
        """
        size = len(self._conn.peeked)
        if self._chunks is not None and size:
            self._ready = self._decode(self._chunks, self._conn.recv(size))
            self.at_hand = self.consumed = self._chunks.done
        elif 0 < self._left <= size:
            self._ready = self._conn.recv(self._left)
            self._ready_size, self._left = len(self._ready), 0
            self.at_hand = self.consumed = True

    def begin(self, origin: Connection, request: bytes) -> None:
        """Send the head of the request, and the body; a greenlet sends what has not arrived yet.

        Raises:
            OSError: error of the origin's connection.
        """
        origin.sendall(request + self._ready)
        self.sent = self._ready_size
        if self.at_hand:
            self.done = True
        else:
            self._greenlet = gevent.spawn(self._pump, origin)

    def stop(self) -> None:
        """Release both connections."""
        if self._greenlet is not None:
            self._greenlet.kill()

    @property
    def is_pumping(self) -> bool:
        """Return whether more of it is on its way, or expected."""
        return self._greenlet is not None and not self._greenlet.dead

    @property
    def can_be_discarded(self) -> bool:
        """Return whether a refused request leaves the connection usable after `discard`."""
        if self.consumed:
            return True
        # A client that waits for "100 Continue" will not send it.
        return (
            self._greenlet is None and self._chunks is None and not self._waits_for_100 and self._left <= MOST_DISCARDED
        )

    def discard(self) -> bool:
        """Read the rest and discard it; return whether that worked."""
        if self.consumed:
            return True
        try:
            with self._conn.deadline(DISCARD_SECONDS):
                while self._left:
                    self._left -= len(self._read(self._left))
        except HttpError:
            return False
        self.consumed = True
        return True

    # -- from the client to the origin -------------------------------------------------------------------------------

    def _pump(self, origin: Connection) -> None:
        try:
            if self._chunks is not None:
                self._send_chunks(self._chunks, origin)
            elif self._left >= SPLICE_FROM and self._conn.tls is None and self.pace is None:
                self._splice(origin)
            else:
                while self._left:
                    data = self._read(self._left)
                    self._write(origin, data)
                    self._left -= len(data)
                    self.sent += len(data)
                    rest(self.pace, len(data))
            self.done = self.consumed = True
        except HttpError as error:
            self.error = error
            origin.abort()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the origin takes no more; its explanation is read with its response
        except (OSError, MemoryError):
            # Out of memory, say: the origin waits for the rest, which will not come.
            self.error = HttpError(502, "The request could not be forwarded.")
            origin.abort()

    def _send_chunks(self, chunks: ChunkReader, origin: Connection) -> None:
        while not chunks.done:
            self._ready_size = 0
            data = self._decode(chunks, self._read(_piece_of(chunks)))
            if data:
                self._write(origin, data)
                self.sent += self._ready_size
                rest(self.pace, self._ready_size)
            _give_way(chunks)

    def _decode(self, chunks: ChunkReader, data: bytes) -> bytes:
        """Return the same content in chunks of our own."""
        try:
            content = chunks.feed(data)
        except ChunkError as error:
            raise HttpError(400, f"The body of the request is broken: {error}.") from None
        self._ready_size += len(content)
        written = chunk(content) if content else b""
        if chunks.done:
            written += last_chunk(forwarded_trailers(chunks.trailers))
            self._conn.unread(chunks.rest)
        return written

    def _read(self, most: int) -> bytes:
        try:
            data: bytes = self._conn.recv(min(most, PIECE if self.pace is None else PACED_PIECE))
        except TimeoutError:
            raise HttpError(408, "The body of the request took too long.") from None
        except OSError:
            data = b""
        if not data:
            raise HttpError(400, "The request ended before its body did.")
        return data

    def _write(self, origin: Connection, data: bytes) -> None:
        try:
            origin.sendall(data)
        except TimeoutError:
            raise HttpError(504, "The destination does not take the request.") from None

    def _splice(self, origin: Connection) -> None:
        try:
            self._left -= pipe(
                self._conn, origin, count=self._left, idle_timeout=self._patience, on_bytes=self._note_moved
            )
        except TimeoutError as error:
            if origin.stream.has_raised(error):
                raise HttpError(504, "The destination does not take the request.") from None
            raise HttpError(408, "The body of the request took too long.") from None
        except OSError as error:
            if not self._conn.stream.has_raised(error):
                raise
            self._left = -1
        if self._left:
            raise HttpError(400, "The request ended before its body did.")

    def _note_moved(self, size: int) -> None:
        self.sent += size


def send_own_answer(
    conn: Connection,
    head: Head | None,
    body: RequestBody | None,
    status: int,
    text: bytes,
    headers: Sequence[Header] = (),
    *,
    keep: bool = True,
) -> bool:
    """Send a response of the proxy's own; return whether another request may follow on the connection.

    All of them go through here, because the rest of a request must never be read as the next one: the body is read and
    discarded, or the connection ends.

    Args:
        head, body: of the request; None: it could not be read.
        keep: the response allows another request.

    Raises:
        OSError: error of the client's connection.
    """
    keep = (
        keep
        and head is not None
        and body is not None
        and not head.wants_close
        # Some clients send the first bytes of their tunnel without waiting. If the tunnel is refused, these bytes are
        # not requests: the connection ends, even after a 407 (RFC 9931).
        and head.method != b"CONNECT"
        and body.can_be_discarded
        and not conn.should_leave
    )
    of_head = head is not None and head.method == b"HEAD"
    conn.sendall(own_answer(status, text, headers, close=not keep, of_head=of_head))
    return keep and body is not None and body.discard()


def send_answer(
    client: Presence,
    head: bytes,
    answer: Answer,
    origin: Origin,
    *,
    in_chunks: bool,
    note: Callable[[int], object],
    splice: bool = True,
) -> None:
    """Send a response to the client: its head, already rewritten, and its body as it arrives.

    Args:
        client: its connection, in a block.
        in_chunks: send a chunked body, unless the length is known or there is no body.
        note: called with the bytes of content that were sent; it may wait, unless they are spliced.
        splice: large bodies may go through the kernel.

    Raises:
        OriginFailed: it is incomplete, and will stay so.
        OSError: error of the client's connection.
    """
    if answer.framing == "none":
        client.conn.sendall(head)
    elif answer.framing == "length":
        _send_counted(client.conn, head, answer.length, origin, note, splice)
    elif answer.framing == "chunked":
        _send_chunked(client, head, origin, in_chunks, note)
    else:
        _send_until_close(client, head, origin, in_chunks, note, splice)


def _send_counted(
    conn: Connection, head: bytes, left: int, origin: Origin, note: Callable[[int], object], splice: bool
) -> None:
    data = origin.at_hand(left)
    conn.sendall(head + data)
    left -= len(data)
    note(len(data))
    if left >= SPLICE_FROM and conn.tls is None and splice:
        left -= pipe(origin.connection, conn, count=left, idle_timeout=_patience(conn, origin), on_bytes=note)
    while left > 0 and (data := origin.recv(min(left, PIECE))):
        conn.sendall(data)
        left -= len(data)
        note(len(data))
    if left:
        raise OriginFailed("the destination closed in the midst of its answer")


def _send_chunked(
    client: Presence, head: bytes, origin: Origin, in_chunks: bool, note: Callable[[int], object]
) -> None:
    chunks = ChunkReader(of_answer=True)
    data = origin.at_hand(PIECE)
    while True:
        try:
            content = chunks.feed(data)
        except ChunkError as error:
            raise OriginFailed(f"the answer of the destination is broken: {error}") from None
        # Send the head with the first piece, even if none of the body has arrived: that may take long.
        written = head
        head = b""
        if content:
            written += chunk(content) if in_chunks else content
        if chunks.done and in_chunks:
            written += last_chunk(forwarded_trailers(chunks.trailers))
        if written:
            client.conn.sendall(written)
            note(len(content))
        if chunks.done:
            origin.connection.unread(chunks.rest)
            return
        _give_way(chunks)
        data = _next_piece(client, origin, _piece_of(chunks), in_chunks)
        if not data:
            raise OriginFailed("the destination closed in the midst of its answer")


def _next_piece(client: Presence, origin: Origin, most: int, in_chunks: bool) -> bytes:
    """Return more of a body of unknown length; b"" at the end. Between chunks the client may be probed."""
    client.probe = ZERO if in_chunks else b""
    data = origin.recv(most)
    client.probe = b""
    return data


def _piece_of(chunks: ChunkReader) -> int:
    """Return how much to read next."""
    return PACED_PIECE if chunks.crowded else PIECE


def _give_way(chunks: ChunkReader) -> None:
    """Let others run between pieces that take long; data that has arrived would be read without waiting."""
    if chunks.crowded:
        gevent.sleep(0)


def _send_until_close(
    client: Presence, head: bytes, origin: Origin, in_chunks: bool, note: Callable[[int], object], splice: bool
) -> None:
    conn = client.conn
    if not in_chunks and conn.tls is None and splice:
        conn.sendall(head)
        pipe(origin.connection, conn, idle_timeout=_patience(conn, origin), on_bytes=note)
        return
    data = origin.at_hand(PIECE)
    conn.sendall(head + (chunk(data) if data and in_chunks else data))
    note(len(data))
    while data := _next_piece(client, origin, PIECE, in_chunks):
        conn.sendall(chunk(data) if in_chunks else data)
        note(len(data))
    if in_chunks:
        conn.sendall(last_chunk())


def _patience(conn: Connection, origin: Origin) -> float:
    """Return seconds without progress in one direction, since a pipe does not say which of the two it waits for."""
    return max(origin.patience, conn.gettimeout() or 0.0)
