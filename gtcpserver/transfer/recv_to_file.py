"""recv_to_file: write the data that a connection sends to a file."""

from __future__ import annotations

import fcntl
import os
import stat
from time import monotonic
from typing import Any

from gtcpserver.process.descriptors import close_descriptor

from .disk import pool
from .ends import is_plain, note_error, raw_of, stream_of, wait_readable
from .files import descriptor_of, opened, wait_for
from .foreign import descriptor_for_kernel
from .pipes import LARGEST, PIPES, REFUSALS, Pipe, check_source

#: Bytes read and written at once where splice(2) cannot be used.
BUFFER_SIZE = 64 * 1024

#: A write that took longer than this (seconds) waited for the disk: a thread writes the rest of the file. Writes into
#: the page cache take 0.2 ms for a full pipe.
SLOW_WRITE = 0.005

#: Most bytes to write at once to a FIFO that is ready; a larger write could block; pipe(7).
_PIPE_BUF = 4096


def recv_to_file(conn: Any, file: Any, count: int | None = None) -> int:
    """Receive into a file by splice(2), without copying the bytes through Python.

    Other connections are served meanwhile; when the disk cannot keep up, a thread waits for it. Over TLS, or if the
    file is not a regular file, the bytes are read and written in pieces of 64 KiB.

    Args:
        conn: a Connection or a ``gevent.socket.socket``.
        file: a path (created or truncated first), a file descriptor, a file opened in binary mode, or any object with
            ``write(data)``. Writing starts at its position, which is after the received data at the end. Only a file
            opened here is closed here.
        count: number of bytes; None: until the peer closes its side.

    Returns:
        The number of bytes received and written: less than ``count`` if the peer closed early.

    Raises:
        TimeoutError: nothing arrived for ``settimeout`` seconds.
        DeadlineExceeded: within ``deadline()``.
        ValueError: a negative count, a non-blocking socket (``settimeout(0)``) or a file in text mode.
        OSError: from the connection or the file (ENOSPC). Some of the received data may not have been written.
    """
    if count is not None and count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if conn.gettimeout() == 0.0:
        raise ValueError("recv_to_file needs a socket that may wait; its timeout is 0")
    plain = is_plain(conn)
    with opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as target:
        fd = descriptor_of(target)
        if fd is None:
            return _copy(conn, target.write, count)
        if target is not fd:
            target.flush()
        mode = os.fstat(fd).st_mode
        try:
            if not stat.S_ISREG(mode):
                ready = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
                return _copy(conn, lambda data: _write_when_ready(fd, data) if ready else os.write(fd, data), count)
            # splice(2) refuses a file opened to append.
            if not plain or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                return _copy(conn, lambda data: os.write(fd, data), count)
            return _Receiving(conn, fd, count).run()
        finally:
            if target is not fd and target.seekable():
                target.seek(os.lseek(fd, 0, os.SEEK_CUR))


class _Receiving:
    """The reception of one file."""

    def __init__(self, conn: Any, fd: int, count: int | None) -> None:
        self._conn = conn
        self._stream = stream_of(conn)
        self._fd = fd
        self._left = count
        self._slow_disk = False
        self._written = 0

    def run(self) -> int:
        conn = self._conn
        self._write_kept()
        while self._left is None or self._left > 0:
            # Wait before each read: one fast client must not monopolize the event loop.
            wait_readable(conn)
            deadline = None if self._stream is None else self._stream.deadline
            if deadline is not None and monotonic() >= deadline:
                raise self._stream.timeout_error(deadline)
            pipe = PIPES.take()
            if pipe is None:
                return self._written + _copy(conn, lambda data: os.write(self._fd, data), self._left)
            try:
                size = pipe.fill(
                    descriptor_for_kernel(raw_of(conn)), LARGEST if self._left is None else min(self._left, LARGEST)
                )
            except BlockingIOError:
                PIPES.put(pipe)
                self._pass_urgent_bytes()
                continue
            except OSError as error:
                PIPES.put(pipe)
                if error.errno not in REFUSALS:
                    note_error(conn, error)
                    raise
                PIPES.refuse(error)
                try:
                    check_source(raw_of(conn), error)
                except OSError as broken:
                    note_error(conn, broken)
                    raise
                continue
            except BaseException:
                PIPES.discard(pipe)
                raise
            if not size:
                PIPES.put(pipe)
                if self._pass_urgent_bytes():
                    continue
                if self._stream is not None:
                    self._stream.at_eof = True
                break
            if self._stream is not None:
                self._stream.bytes_received += size
            self._write(pipe, size)
            self._wrote(size)
        return self._written

    def _pass_urgent_bytes(self) -> int:
        """Receive where splice(2) has found nothing, or an end: it never goes past urgent bytes, as recv(2) does."""
        try:
            data = raw_of(self._conn).recv(BUFFER_SIZE if self._left is None else min(self._left, BUFFER_SIZE))
        except BlockingIOError:
            return 0
        except OSError as error:
            note_error(self._conn, error)
            raise
        if self._stream is not None:
            self._stream.bytes_received += len(data)
        _write_all(lambda part: os.write(self._fd, part), data)
        self._wrote(len(data))
        return len(data)

    def _write_kept(self) -> None:
        if self._stream is not None and self._stream.kept:
            kept = self._conn.recv(len(self._stream.kept) if self._left is None else self._left)
            _write_all(lambda data: os.write(self._fd, data), kept)
            self._wrote(len(kept))

    def _wrote(self, size: int) -> None:
        self._written += size
        if self._left is not None:
            self._left -= size

    def _write(self, pipe: Pipe, size: int) -> None:
        """Write the content of the pipe, and put the pipe back."""
        if self._slow_disk:
            _write_in_thread(pipe, self._fd, size)
            return
        began = monotonic()
        try:
            _empty(pipe, self._fd, size)
        except BaseException:
            PIPES.discard(pipe)
            raise
        PIPES.put(pipe)
        self._slow_disk = monotonic() - began > SLOW_WRITE


def _empty(pipe: Pipe, fd: int, size: int) -> None:
    try:
        while size:
            size -= pipe.empty(fd, size)
    except OSError:
        # Refused, or unsupported by the file system. An error of the file itself recurs.
        _write_all(lambda data: os.write(fd, data), pipe.take_out(size))


def _write_in_thread(pipe: Pipe, fd: int, size: int) -> None:
    # If this greenlet is killed, the thread keeps writing while our caller closes the file: a separate descriptor keeps
    # the thread from hitting another file with the same number.
    own = os.dup(fd)

    def finish(job: Any) -> None:
        close_descriptor(own)
        if job is not None and job.successful():
            PIPES.put(pipe)
        else:
            PIPES.discard(pipe)

    try:
        job = pool().spawn(_empty, pipe, own, size)
    except BaseException:
        finish(None)
        raise
    job.rawlink(finish)
    job.get()


def _copy(conn: Any, write: Any, count: int | None) -> int:
    """Receive into a buffer and write its content."""
    buffer = memoryview(bytearray(BUFFER_SIZE))
    copied = 0
    while count is None or copied < count:
        size = conn.recv_into(buffer, BUFFER_SIZE if count is None else min(BUFFER_SIZE, count - copied))
        if not size:
            break
        _write_all(write, buffer[:size])
        copied += size
    return copied


def _write_all(write: Any, data: Any) -> None:
    data = memoryview(data)
    while data:
        written = write(data)
        if not isinstance(written, int):  # an object whose write() takes everything and returns None
            return
        data = data[written:]


def _write_when_ready(fd: int, data: Any) -> int:
    wait_for(fd, 2)
    try:
        return os.write(fd, data[:_PIPE_BUF])
    except BlockingIOError:
        return 0
