"""sendfile: send a file, or a part of it, to a connection."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Any

from gtcpserver.linux import has_ended

from .disk import PageCache
from .ends import is_plain, note_error, raw_of, reset_on_close, stream_of, wait_writable
from .files import descriptor_of, is_seekable_file, opened, wait_for
from .foreign import descriptor_for_kernel
from .pipes import REFUSALS

#: Bytes given to the kernel at once; then the other connections have their turn (about 0.3 ms).
CHUNK = 2 << 20

#: Bytes read at once where sendfile(2) cannot be used: four TLS records.
READ_SIZE = 64 * 1024


def sendfile(conn: Any, file: Any, offset: int = 0, count: int | None = None) -> int:
    """Send a file by sendfile(2), without copying its bytes through Python.

    Other connections are served meanwhile, even during waits for the disk: a thread first reads data that is not in the
    page cache. Over TLS, or if the file is not a regular file, the bytes are read in pieces of 64 KiB and sent.

    Args:
        conn: a Connection or a ``gevent.socket.socket``.
        file: a path, a file descriptor, a file opened in binary mode, or any object with ``read(size)``. Only a file
            opened here is closed here. A file object's position is set after the data sent, as ``socket.sendfile``
            does; a descriptor's is ignored and does not change.
        offset: start of the data in the file, in bytes.
        count: most bytes to send; None: to the end of the file.

    Returns:
        The number of bytes sent: less than ``count`` if the file is shorter, or was truncated meanwhile.

    Raises:
        TimeoutError: the peer took nothing for ``settimeout`` seconds.
        DeadlineExceeded: within ``deadline()``.
        ValueError: a negative offset or count, a non-blocking socket (``settimeout(0)``), a file in text mode, or an
            offset in something that cannot seek.
        OSError: from the file or the connection; some of the file may be sent.

    When it fails or is killed after some of the file was sent, the connection is set to reset when it is closed: an
    orderly end would claim that the file is complete.
    """
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
    if count is not None and count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if conn.gettimeout() == 0.0:
        raise ValueError("sendfile needs a socket that may wait; its timeout is 0")
    with opened(file, os.O_RDONLY) as source:
        fd = descriptor_of(source)
        if fd is None:
            return _send_readable(conn, source, offset, count)
        if not is_seekable_file(fd):
            return _send_stream(conn, fd, offset, count)
        sending = _Sending(conn, fd, offset, count)
        try:
            if not is_plain(conn) or not sending.by_kernel():
                sending.by_reading()
        except BaseException:
            if sending.began:
                reset_on_close(conn)
            raise
        finally:
            if source is not fd:
                source.seek(sending.position)
        return sending.position - offset


class _Sending:
    """The sending of one file.

    Attributes:
        position: offset in the file of the next byte to send.
        began: some of the file may be sent.
    """

    def __init__(self, conn: Any, fd: int, offset: int, count: int | None) -> None:
        self._conn = conn
        self._fd = fd
        self._end = None if count is None else offset + count
        self._size = os.fstat(fd).st_size
        self._cache = PageCache(fd)
        self._ready_until = offset
        self.position = offset
        self.began = False

    def _chunk(self) -> int:
        """Return the number of bytes to send next, readable without waiting for the disk; 0 at the end."""
        end = self._end
        if end is None:
            # Ask beyond the size only at the end: the file may have grown, or have no size at all (/proc).
            end = self._size if self.position < self._size else self.position + CHUNK
        left = end - self.position
        if left <= 0:
            return 0
        if self.position >= self._ready_until and self.position < self._size:
            known = min(left, self._size - self.position)
            self._ready_until = self.position + self._cache.make_ready(self.position, known)
        ready = self._ready_until - self.position
        return min(left, ready if ready > 0 else CHUNK)

    def by_kernel(self) -> bool:
        """Send by sendfile(2). False: it is refused, or cannot read this file (some of /proc, some FUSE systems)."""
        conn, fd = self._conn, self._fd
        stream = stream_of(conn)
        to_next_turn = CHUNK
        while chunk := self._chunk():
            if stream is not None and stream.deadline is not None and monotonic() >= stream.deadline:
                raise stream.timeout_error(stream.deadline)
            try:
                # Ask for the socket's descriptor each time: it is -1 once another greenlet has closed it.
                sent = os.sendfile(descriptor_for_kernel(raw_of(conn)), fd, self.position, chunk)
            except BlockingIOError:
                wait_writable(conn)
                continue
            except OSError as error:
                # An error of the connection or of the file recurs there.
                if error.errno in REFUSALS:
                    return False
                if isinstance(error, ConnectionError) or has_ended(raw_of(conn)):
                    note_error(conn, error)  # otherwise it is an error of the file
                raise
            if not sent:
                break
            self.began = True
            self.position += sent
            to_next_turn -= sent
            if stream is not None:
                stream.bytes_sent += sent
            if self.position < self._size and (sent < chunk or to_next_turn <= 0):
                # Either the socket is full (another call would only fail), or it takes all data: then this wait ends at
                # once, but the other connections' events come first.
                wait_writable(conn)
                to_next_turn = CHUNK
        return True

    def by_reading(self) -> None:
        """Read and send the file in pieces."""
        while chunk := self._chunk():
            data = os.pread(self._fd, min(chunk, READ_SIZE), self.position)
            if not data:
                break
            self.began = True
            self._conn.sendall(data)
            self.position += len(data)


def _send_stream(conn: Any, fd: int, offset: int, count: int | None) -> int:
    """Send from a FIFO, a terminal or another device, as data arrives."""
    if offset:
        raise ValueError(f"descriptor {fd} cannot seek, so offset must be 0, got {offset}")

    def read(size: int) -> bytes:
        while True:
            wait_for(fd, 1)
            try:
                return os.read(fd, size)
            except BlockingIOError:
                pass

    return _send_pieces(conn, read, count)


def _send_readable(conn: Any, file: Any, offset: int, count: int | None) -> int:
    """Send from an object with ``read``, from its current position unless ``offset`` is given."""
    if not callable(getattr(file, "read", None)):
        raise TypeError(f"file must be a path, a descriptor, or an object with read(), got {file!r}")
    if offset:
        file.seek(offset)
    return _send_pieces(conn, file.read, count)


def _send_pieces(conn: Any, read: Callable[[int], Any], count: int | None) -> int:
    sent = 0
    began = False
    try:
        while count is None or sent < count:
            data = read(READ_SIZE if count is None else min(READ_SIZE, count - sent))
            if not data:
                break
            began = True
            conn.sendall(data)
            sent += len(data)
    except BaseException:
        if began:
            reset_on_close(conn)
        raise
    return sent
