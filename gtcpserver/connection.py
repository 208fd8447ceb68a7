"""Connection: the socket that a handler gets.

A Connection is a gevent socket, so whatever takes a socket takes it. How it waits and moves bytes is in stream.py.
The order below: construct, read, write, bound, idle, close.
"""

from __future__ import annotations

import socket as _stdlib_socket
from time import monotonic, time
from typing import TYPE_CHECKING, Any

import gevent.socket
from gevent.hub import get_hub
from gevent.socket import cancel_wait_ex

from .errors import EarlyEOF, LimitExceeded
from .stream import Stream

if TYPE_CHECKING:
    from types import TracebackType

    from .server import Server

#: How much ``recv_until`` asks the kernel for at once when it has to go beyond what it kept.
READ_AHEAD = 16 * 1024

# By name, since type checkers would otherwise not know those of gevent's classes, which have no types.
_SLOTS = ("_idle", "_stream", "client_address", "context", "recv", "sendall", "server", "started_at")


class Connection(gevent.socket.socket):  # type: ignore[misc]
    """A client's connection: a blocking, cooperative socket with the answers a handler asks for.

    All of the socket API works. Time-outs count the time in which nothing moved: ``settimeout(30)`` ends a ``recv`` or
    a ``sendall`` after 30 seconds without a byte, not a ``sendall`` that moves (the standard library's bounds it in
    total; :meth:`deadline` does that here).

    Attributes:
        client_address: the peer as ``accept`` gave it: (host, port) for IPv4, (host, port, flow, scope) for IPv6,
            "" or a path for a unix socket.
        started_at: when it was accepted, seconds since the epoch.
        server: the Server it belongs to; None for a connection made by hand.
        context: whatever the server was given as ``context``; assign to it to keep data by the connection.
        tls: None: the connection is not encrypted.
        recv: ``recv(bufsize, flags=0) -> bytes``: at most ``bufsize`` bytes; b"" when the peer has closed its side.
            Raises TimeoutError when nothing came for ``settimeout`` seconds, DeadlineExceeded inside :meth:`deadline`,
            OSError as recv(2); EBADF when another greenlet closed the connection meanwhile.
        sendall: ``sendall(data, flags=0) -> None``: all of ``data`` (any contiguous buffer). Raises TimeoutError when
            the peer took nothing for ``settimeout`` seconds (some of the data may have gone), otherwise as ``recv``.
    """

    __slots__ = _SLOTS

    client_address: Any
    context: Any
    server: Server | None
    started_at: float
    tls: None = None

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        # gevent's constructor makes two io watchers (0.5 us each); ours are made when first waited for.
        if fileno is None:
            family = _stdlib_socket.AF_INET if family == -1 else family
            type = _stdlib_socket.SOCK_STREAM if type == -1 else type
            proto = 0 if proto == -1 else proto
        self._sock = sock = self._gevent_sock_class(family, type, proto, fileno)
        sock.setblocking(False)
        self.hub = hub = get_hub()
        self._io_refs = 0
        self._closed = False
        self._stream = stream = Stream(sock, hub, _stdlib_socket.getdefaulttimeout())
        # The stream's own methods, not wrappers of them: 0.1 us a call.
        self.recv = stream.recv
        self.sendall = stream.sendall
        self._idle: Idle | None = None
        self.client_address = self.server = self.context = None
        self.started_at = time()

    @property
    def server_address(self) -> Any:
        """The address the client connected to, as ``getsockname`` says it."""
        return self._sock.getsockname()

    @property
    def bytes_received(self) -> int:
        """Bytes read through this object."""
        return self._stream.bytes_received

    @property
    def bytes_sent(self) -> int:
        """Bytes written through this object."""
        return self._stream.bytes_sent

    # -- time-outs ---------------------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """Seconds without progress until TimeoutError, as ``settimeout`` set it."""
        return self._stream.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._stream.timeout = seconds

    def settimeout(self, seconds: float | None) -> None:
        """Raise TimeoutError from a read or write in which nothing moved for so many seconds; None waits for ever.

        0 makes the socket non-blocking: BlockingIOError instead of waiting.
        """
        if seconds is not None:
            seconds = float(seconds)
            if not seconds >= 0:
                raise ValueError("Timeout value out of range")
        self._stream.timeout = seconds

    def gettimeout(self) -> float | None:
        """What ``settimeout`` set."""
        return self._stream.timeout

    def deadline(self, seconds: float) -> Deadline:
        """Bound all calls on this connection within a ``with`` block together.

        ``settimeout`` starts anew with each byte; a deadline does not, so a client that drips cannot stretch it.
        Blocks nest; the earlier end holds. Only this connection's calls are bound: to interrupt any other waiting,
        use ``gevent.Timeout``.

        Args:
            seconds: from now; more than 0.

        Raises (from the calls inside):
            DeadlineExceeded: a TimeoutError.
        """
        if not seconds > 0:
            raise ValueError(f"seconds must be more than 0, got {seconds!r}")
        return Deadline(self._stream, seconds)

    # -- waiting, as gevent's methods ask for it ---------------------------------------------------------------------

    @property
    def _read_event(self) -> Any:
        stream = self._stream
        return stream.reading or (None if self._closed else stream.make_read_watcher())

    @property
    def _write_event(self) -> Any:
        stream = self._stream
        return stream.writing or (None if self._closed else stream.make_write_watcher())

    def _wait(self, watcher: Any, timeout_exc: Any = None) -> None:
        # gevent's own methods (recvfrom, recvmsg, connect, sendmsg ...) come here after an EAGAIN.
        if watcher is None:
            raise cancel_wait_ex()
        if watcher is self._stream.writing:
            self._stream.wait_writable()
        else:
            self._stream.wait_readable(certain=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a writable buffer; returns the number of bytes, 0 at the peer's end. Errors as ``recv``."""
        return self._stream.recv_into(buffer, nbytes, flags)

    def recv_exactly(self, n: int) -> bytes:
        """Receive exactly ``n`` bytes.

        Raises:
            EarlyEOF: the peer closed first; ``partial`` holds what had come.
            TimeoutError, DeadlineExceeded, OSError: as ``recv``.
        """
        return self._stream.recv_exactly(n)

    def recv_until(self, separator: bytes = b"\n", limit: int = 64 * 1024) -> bytes:
        """Receive up to and including the next ``separator``.

        What came behind it is kept and given to the next call of ``recv``, :meth:`recv_into`, :meth:`recv_exactly`,
        this one, or a file made by ``makefile`` (not to reads from the bare descriptor).

        Args:
            separator: bytes that end a message, for instance b"\\r\\n".
            limit: largest message, separator included, in bytes.

        Raises:
            LimitExceeded: no separator within ``limit`` bytes. The stream is out of step: close the connection.
            EarlyEOF: the peer closed before a separator; ``partial`` holds what had come, b"" for none.
            TimeoutError, DeadlineExceeded, OSError: as ``recv``.
        """
        if not separator:
            raise ValueError("separator must not be empty")
        stream = self._stream
        data = stream.kept
        searched = 0
        while True:
            found = data.find(separator, searched)
            if found >= 0:
                end = found + len(separator)
                if end > limit:
                    break
                stream.kept = data[end:]
                return data[:end]
            if len(data) >= limit:
                break
            searched = max(0, len(data) - len(separator) + 1)
            # While more is read, what came is not kept: recv would hand it out again.
            stream.kept = b""
            try:
                more = stream.recv(READ_AHEAD)
            except BaseException:
                stream.kept = data
                raise
            if not more:
                raise EarlyEOF(f"the peer closed after {len(data)} bytes, before {separator!r}", data)
            data += more
        stream.kept = data
        raise LimitExceeded(f"no {separator!r} within {limit} bytes")

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        """Send some of ``data``; returns how many bytes the kernel took (at least one, waiting where necessary)."""
        return self._stream.send(data, flags)

    # -- idle --------------------------------------------------------------------------------------------------------

    def idle(self) -> Idle:
        """Mark the wait between two requests: ``with conn.idle(): data = conn.recv(4096)``.

        An idle connection holds no place in the server's pool. When the server stops, its ``recv`` gives b"" at once,
        as if the peer had closed, unless a request has already come. Without a server it does nothing.
        """
        idle = self._idle
        if idle is None:
            idle = self._idle = Idle(self)
        return idle

    def _end_idle(self) -> None:
        """Let the read that idles give b"", as if the peer had closed, unless data has come. Only from the hub."""
        stream = self._stream
        stream.ending = True
        stream.drained = False
        reader = stream.reader()
        if reader is not None:
            reader.switch()

    # -- the end -----------------------------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """Shut down one or both sides, as ``shutdown(2)``.

        A greenlet that waits on that side is woken by the kernel: a reader gets b"", a writer EPIPE.
        """
        self._sock.shutdown(how)

    def _drop_events_and_close(self, closefd: bool = True, error: Any = cancel_wait_ex) -> None:
        # Called by gevent's close() and detach().
        self.hub.cancel_waits_close_and_then(
            self._stream.close(), error, self._drop_ref_on_close if closefd else id, self._sock
        )

    def _drop_ref_on_close(self, sock: Any) -> None:
        # Called by gevent when no greenlet waits on the socket any more.
        if self.server is None or not self.server._linger(sock, self._stream.at_eof):
            super()._drop_ref_on_close(sock)


class Deadline:
    """The ``with`` block of :meth:`Connection.deadline`."""

    __slots__ = ("_outer", "_seconds", "_stream")

    def __init__(self, stream: Stream, seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def __enter__(self) -> None:
        stream = self._stream
        self._outer = stream.deadline
        until = monotonic() + self._seconds
        stream.deadline = until if self._outer is None else min(until, self._outer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stream.deadline = self._outer


class Idle:
    """The ``with`` block of :meth:`Connection.idle`; one object a connection, used again and again."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        connection = self._connection
        if connection.server is not None:
            connection.server._enter_idle(connection)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        connection = self._connection
        if connection.server is not None:
            connection.server._leave_idle(connection)
