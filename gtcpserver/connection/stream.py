"""Stream: how a connection waits and moves bytes. The hot path of the library.

A Connection (connection.py) is a gevent socket, and gevent's class has a ``__getattr__``: on CPython 3.11 that makes
every attribute access 20 ns slower, 0.3 us a request. So code that runs once per read or write lives here, in a plain
object, and the connection's ``recv`` and ``sendall`` are this object's bound methods.

It differs from gevent in how it waits:

* gevent's ``recv`` asks first, fails with EAGAIN (an exception: 1.3 us), then makes a Waiter, starts a watcher,
  switches, stops the watcher. Here a short read is remembered: the socket is drained, so the next ``recv`` waits before
  it asks.
* Waits for input are the Poller's (poller.py), for the life of the connection. Waits to write, which are rare, have a
  watcher of gevent's that is started for each; so have callbacks that replace a waiting greenlet (`Stream.lend`).
* A timeout is a deadline noted at each wait. One timer per connection serves them all: when it fires too early it is
  restarted for the remaining time.
"""

from __future__ import annotations

import os
import socket
from errno import EAGAIN, EIO
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ReferenceType, ref

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent._socket3 import _closedsocket
from gevent.exceptions import ConcurrentObjectUseError
from gevent.hub import get_hub
from gevent.socket import cancel_wait_ex
from greenlet import GreenletExit

from gtcpserver.errors import DeadlineExceeded, EarlyEOF
from gtcpserver.process.watcher import check_watched, stop_watcher, watch

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (stream.pxd).
    from time import monotonic

    from greenlet import getcurrent, greenlet

    from .accepted import AcceptedSocket
    from .poller import Poller, poller_of

    switch_to = greenlet.switch

    if TYPE_CHECKING:
        from gtcpserver.c import import_greenlet, receive, transmit
if cython.compiled:
    import_greenlet()

from .poller import WAIT_IN_HUB

if TYPE_CHECKING:
    from .tls_layer import TLSLayer

ErrorT = TypeVar("ErrorT", bound=BaseException)

#: Name of the attribute of an error that tells which stream raised it.
MARK = "_gtcpserver_mark"

#: Consecutive reads that filled the caller's buffer after which the stream waits once, so that one fast sender cannot
#: monopolize the event loop. gevent never does. 16 reads of 64 KiB are about 0.3 ms.
FULL_READS_IN_A_ROW = 16

#: Bytes that ``recv_exactly`` asks for at once beyond its first read.
SMALL_ROOM = 64 * 1024
LARGE_ROOM = 1024 * 1024

#: Bytes that compiled code receives or sends by a direct system call, which does not release the GIL: 5 us. (It is the
#: size of a buffer in c/system_calls.pxd.)
MOST_DIRECT = 64 * 1024

#: Seconds after which a descriptor that the kernel has refused to watch is tried again; then the read fails.
PAUSES = (0, 0.01, 0.1)

#: Values of `Stream.shared`, besides False.
SHARED, CHILD = 1, 2

#: Stands in for a closed socket.
CLOSED = _closedsocket(-1, -1, -1, None, "closed")

# As numbers: `flags & socket.MSG_PEEK` makes an enum of the result, 1 us each time.
_TCP = frozenset({int(socket.AF_INET), int(socket.AF_INET6)})
_STREAM = int(socket.SOCK_STREAM)
_PEEK, _WAITALL, _DONTWAIT = int(socket.MSG_PEEK), int(socket.MSG_WAITALL), int(socket.MSG_DONTWAIT)


class Stream:
    """The moving parts of one connection.

    Args:
        sock: the raw socket, non-blocking; once closed, one that raises EBADF.
        hub: the gevent hub of this thread. None after a fork, in the child, until the first wait.
        timeout: seconds without progress until TimeoutError; None waits indefinitely; 0.0 never waits.

    Attributes:
        hub: as above.
        fd: its descriptor, which a closed stream must not use.
        io: object to read from and write to: the raw socket, or its substitute (``recv``, ``recv_into``, ``send``;
            BlockingIOError means "wait").
        poller: watches the socket, from the first wait for input on; None: not yet.
        reading: gevent's watcher for callbacks in place of a greenlet, made at the first use.
        writing: gevent's watcher, made at the first wait.
        timeout: as above; may be changed at any time between two calls.
        deadline: the monotonic time at which every call ends with DeadlineExceeded; None: no deadline.
        deadlines: all deadlines in effect; ``deadline`` is the earliest.
        drained: the last read has emptied the socket, and ``poller`` is there: wait before the next.
        kept: bytes read ahead by ``recv_until``; the next read returns them first.
        at_eof: the peer has closed its side and everything was read.
        ending: reads that would wait return b"" instead (an idle connection that is being ended).
        ended: such a read returned b"".
        bytes_received, bytes_sent: totals so far.
        mark: set on each error that this stream raised (see :meth:`note`); None: none so far.
        progress: a note kept by the server's time limits.
        shared: another process or object has the socket too: SHARED, or CHILD for a child forked by the handler.
        shut_for_writing: the program shut down its side.
        tls: the TLS layer that ``io`` is, or None.
    """

    __slots__ = (
        "__weakref__",
        "_full_reads",
        "_read_until",
        "_short_is_all",
        "_timer",
        "_timer_at",
        "_write_until",
        "at_eof",
        "bytes_received",
        "bytes_sent",
        "deadline",
        "deadlines",
        "drained",
        "ended",
        "ending",
        "fd",
        "hub",
        "io",
        "kept",
        "mark",
        "poller",
        "progress",
        "reading",
        "shared",
        "shut_for_writing",
        "sock",
        "timeout",
        "tls",
        "writing",
    )

    def __init__(self, sock: Any, hub: Any, timeout: float | None) -> None:
        self.set_up(sock, sock.fileno(), hub, timeout)

    def set_up(self, sock: Any, fd: int, hub: Any, timeout: float | None) -> None:
        """Do what the constructor does, for an object of ``Stream.__new__``: that costs less than ``Stream(...)``."""
        self.sock = self.io = sock
        self.fd = fd
        self.poller: Poller | None = None
        self.tls: TLSLayer | None = None
        self.hub = hub
        self.timeout = timeout
        self.reading: Any = None
        self.writing: Any = None
        self._timer: Any = None
        self._timer_at = inf
        self.deadline: float | None = None
        self.deadlines: tuple[float, ...] = ()
        self._read_until = self._write_until = inf
        # Whether a short read has emptied the socket: of TCP it has, but for urgent bytes. That of a unix socket stops
        # at a message with descriptors (unix(7)), that of datagrams at each.
        self._short_is_all = False
        self.drained = self.at_eof = self.ending = self.ended = self.shut_for_writing = False
        self.shared = 0
        self._full_reads = 0
        self.kept = b""
        self.mark: object | None = None
        self.progress: tuple[int, int] | None = None
        self.bytes_received = self.bytes_sent = 0

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait_readable(self) -> None:
        """Wait until there is something to read (or the end, or an error).

        The socket was found empty. Returns at once if input has come since.
        """
        if self.poller is not None:
            self.poller.note_empty(self.fd)
        self._wait_for_more()

    def _wait_for_more(self) -> None:
        """Wait behind a read that may have got the peer's end as well."""
        if self.timeout is not None or self.deadline is not None:
            self._bound_read()
        try:
            while self.poller is None or not self.poller.wait(self.fd):
                self._watch_input()
        except BaseException as error:
            self._note_thrown(error)
            raise

    def wait_for_input(self) -> None:
        """Wait until there is something to read, whatever the last read has left."""
        if self.poller is not None:
            self.poller.ask_again(self.fd)
        self.drained = False  # what the caller reads is not noted, and may be a part
        self._wait_for_more()

    def note_input(self) -> None:
        """Make the next wait for input return at once."""
        if self.poller is not None:
            self.poller.note_input(self.fd)

    def _watch_input(self) -> None:
        if self.reading is not None and self.reading.callback is not None:
            raise ConcurrentObjectUseError(f"another greenlet reads from this connection: {self.reading.callback!r}")
        poller = poller_of(self.get_hub())
        for seconds in PAUSES:
            try:
                poller.add(self.sock.fileno())
                break
            except OSError as error:
                if error.errno != EIO:
                    raise
            gevent.sleep(seconds)
        else:
            poller.add(self.sock.fileno())
        self._watched_by(poller)

    def _watched_by(self, poller: Poller) -> None:
        self.poller = poller
        self._short_is_all = self.sock.family in _TCP and self.sock.type == _STREAM

    def _bound_read(self) -> bool:
        """Note when the wait that starts now must end; False if it must not wait."""
        if self.timeout == 0.0:
            return False
        self._read_until = until = self._end_of_wait()
        if until < self._timer_at:
            self._start_timer(until)
        return True

    def forget_bounds(self) -> None:
        """Forget timeout and deadline: a wait without them must not be judged by those of an earlier wait."""
        self._read_until = self._write_until = inf

    def _end_of_wait(self) -> float:
        until = inf if self.timeout is None else monotonic() + self.timeout
        return until if self.deadline is None else min(until, self.deadline)

    def make_read_watcher(self) -> Any:
        self.reading = watch(self.get_hub().loop, self.sock.fileno(), 1)
        return self.reading

    def wait_writable(self) -> None:
        """Wait until the socket is writable. That is the normal state, so this watcher runs only here."""
        watcher = self.writing
        if watcher is None:
            watcher = self.make_write_watcher()
        if watcher.callback is not None:
            raise ConcurrentObjectUseError(f"another greenlet writes to this connection: {watcher.callback!r}")
        if self.timeout is not None or self.deadline is not None:
            self._write_until = until = self._end_of_wait()
            if until < self._timer_at:
                self._start_timer(until)
        hub = self.hub
        me = getcurrent()
        if me is hub:
            raise AssertionError(WAIT_IN_HUB)
        watcher.start(me.switch)
        try:
            switch_to(hub)
            check_watched(watcher)
        except BaseException as error:
            self._note_thrown(error)
            raise
        finally:
            stop_watcher(watcher)

    def make_write_watcher(self) -> Any:
        self.writing = watch(self.get_hub().loop, self.sock.fileno(), 2)
        return self.writing

    def get_hub(self) -> Any:
        if self.hub is None:  # in a forked child
            self.hub = get_hub()
        return self.hub

    def reader(self) -> Any:
        """Return the greenlet that waits to read, or the object whose callback does, or None."""
        waiter = self.poller.waiter(self.fd) if self.poller is not None else None
        if waiter is None and self.reading is not None and self.reading.callback is not None:
            waiter = self.reading.callback.__self__
        return waiter

    def writer(self) -> Any:
        """Return the greenlet that waits to write, or None."""
        callback = self.writing.callback if self.writing is not None else None
        return None if callback is None else callback.__self__

    # -- other callbacks on the watchers: a transfer's, a step of admission's ------------------------------------------

    def lend(self) -> Any:
        """Let callbacks replace a waiting greenlet; return the read watcher. The stream's timeouts do not apply."""
        self._stop_timer()
        self.forget_bounds()
        return self.reading or self.make_read_watcher()

    def leave_poller(self) -> None:
        """Prepare for a callback on the read watcher.

        Raises:
            ConcurrentObjectUseError: a greenlet waits to read.
        """
        if self.poller is not None:
            waiter = self.poller.waiter(self.fd)
            if waiter is not None:
                raise ConcurrentObjectUseError(f"another greenlet reads from this connection: {waiter!r}")
            self.poller.leave(self.fd)
            self.poller = None
            self.drained = self._short_is_all = False

    def take_back(self) -> None:
        """Stop the callbacks: greenlets may wait again."""
        for watcher in (self.reading, self.writing):
            if watcher is not None:
                watcher.stop()
        self.reading = self.writing = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None
        self._timer_at = inf

    def _start_timer(self, until: float) -> None:
        if self._timer is not None:
            self._timer.close()
        self._timer_at = until
        self._timer = self.hub.loop.timer(max(0.0, until - monotonic()))
        # update: after a long computation the loop's cached time is too early. Weak: a timer must not keep a connection
        # alive that has no other reference.
        self._timer.start(_on_timer_of, ref(self), update=True)

    def on_timer(self) -> None:
        """End, in the hub, the waits whose time is over, or restart the timer for the remaining time."""
        self._timer_at = inf
        if self.timeout is None and self.deadline is None:
            return  # armed for an earlier wait, which had a timeout
        now = monotonic()
        # After the loop was blocked, timeouts and the data that would have prevented them are due together, and libev
        # runs the timeouts first: data that arrived in time is not late.
        reader = self.reader()
        if reader is not None:
            if now < self._read_until:
                self._start_timer(self._read_until)
            elif self._has_input():
                reader.switch()
            else:
                reader.throw(self.timeout_error(now))
        writer = self.writer()
        if writer is not None:
            if now < self._write_until:
                if self._write_until < self._timer_at:
                    self._start_timer(self._write_until)
            elif not self.writing.pending:
                writer.throw(self.timeout_error(now))

    def _has_input(self) -> bool:
        try:
            self.sock.recv(1, _PEEK | _DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass  # the reader gets it
        return True

    def timeout_error(self, now: float) -> TimeoutError:
        if self.deadline is not None and now >= self.deadline:
            return self.note(DeadlineExceeded("the deadline for this block of calls has passed"))
        return self.note(TimeoutError("timed out"))

    def _io_object(self) -> Any:
        """Return :attr:`io`, where it is a descriptor alone as the socket object that it becomes (accepted.py)."""
        if cython.compiled and type(self.sock) is AcceptedSocket:
            made = self.sock.made()
            if self.io is self.sock:
                self.io = made
            self.sock = made
        return self.io

    # -- errors ------------------------------------------------------------------------------------------------------

    def note(self, error: ErrorT) -> ErrorT:
        """Mark an error as raised by this connection, not by another object that its handler uses; return it.

        Errors caused by the client are counted, errors of the handler are logged (outcome.py). The class of an error
        does not distinguish them: a database may reset its connection just as a client may. The mark is on the error
        itself, since one connection may have several at a time, and does not refer to the connection.
        """
        if self.shut_for_writing and (
            isinstance(error, BrokenPipeError) or getattr(error, "reason", None) == "PROTOCOL_IS_SHUTDOWN"
        ):
            return error  # a program that shut down its side cannot send
        # Bypasses a __setattr__ of a class defined by the program.
        error.__dict__[MARK] = self._get_mark()
        return error

    def has_raised(self, error: BaseException) -> bool:
        """Return whether this connection raised an error."""
        return self.mark is not None and error.__dict__.get(MARK) is self.mark

    def _get_mark(self) -> object:
        if self.mark is None:
            self.mark = object()
        return self.mark

    def share_mark(self, other: Stream) -> None:
        """Use one mark for both streams, which belong to one socket."""
        self.mark = other._get_mark()

    def _note_thrown(self, error: BaseException) -> None:
        """``note`` the exception that ended a wait, such as a gevent.Timeout, unless another connection raised it."""
        if MARK not in error.__dict__ and not isinstance(error, GreenletExit):
            self.note(error)

    # -- reading -----------------------------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        # Hot path: Connection documents it. wait_readable() is inlined: 0.1 us.
        if flags or self.kept or self.deadline is not None:
            return self._recv_with_care(bufsize, flags)
        if self.drained and bufsize and (self.timeout is None or self._bound_read()):
            try:
                watched = self.poller.wait(self.fd)  # type: ignore[union-attr]
            except BaseException as error:
                self._note_thrown(error)
                raise
            if not watched:
                self._wait_for_more()
            self.drained = False  # until this read has succeeded: no event follows what it leaves
        data: bytes | None = None
        while True:
            try:
                if cython.compiled and self.io is self.sock and 0 < bufsize <= MOST_DIRECT:
                    data = receive(self.fd, bufsize)
                else:
                    data = self._io_object().recv(bufsize)
            except BlockingIOError:
                pass
            except InterruptedError:
                continue  # of receive() alone
            except OSError as error:
                self.note(error)
                raise
            if data is not None:
                break
            if self.timeout == 0.0:
                raise _would_block()
            if self.ending:
                self.ended = True
                return b""
            self.wait_readable()
        size = len(data)
        if size < bufsize:
            self.drained = self._short_is_all
            if not size:
                self._note_end()
        else:
            self._read_was_full()
        self.bytes_received += size
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        room = nbytes or len(buffer)
        if flags or self.kept or self.deadline is not None:
            view = memoryview(buffer).cast("B")
            data = self._recv_with_care(nbytes or len(view), flags)
            view[: len(data)] = data
            return len(data)
        if self.drained and room and self.timeout != 0.0:
            self._wait_for_more()
            self.drained = False
        while True:
            try:
                size: int = self._io_object().recv_into(buffer, nbytes)
                break
            except BlockingIOError:
                if self.timeout == 0.0:
                    raise
                if self.ending:
                    self.ended = True
                    return 0
            except OSError as error:
                self.note(error)
                raise
            self.wait_readable()
        if size < room:
            self.drained = self._short_is_all
            if not size:
                self._note_end()
        else:
            self._read_was_full()
        self.bytes_received += size
        return size

    def _read_was_full(self) -> None:
        """There may be more: read before waiting, up to FULL_READS_IN_A_ROW times."""
        self._full_reads += 1
        self.drained = False
        if self._full_reads >= FULL_READS_IN_A_ROW:
            self._full_reads = 0
            # Data that TLS has already decrypted does not make the socket readable.
            if self.tls is None or not self.tls.pending():
                if self.poller is not None:
                    self.poller.ask_again(self.fd)
                    self.drained = True
                else:
                    self._watch_before_wait()

    def _watch_before_wait(self) -> None:
        # Must neither wait nor fail: the caller has data that nobody else has.
        if self.reading is None or self.reading.callback is None:
            try:
                poller = poller_of(self.get_hub())
                poller.add(self.sock.fileno())
            except OSError:
                return  # tried again at the next wait
            self._watched_by(poller)
            self.drained = True

    def _note_end(self) -> None:
        """Note the peer's end. A caller that does not notice it reads on for ever: let the others run meanwhile."""
        if self.at_eof and self.timeout != 0.0 and getcurrent() is not self.hub:
            gevent.sleep(0)
        self.at_eof = True

    def _recv_with_care(self, bufsize: int, flags: int) -> bytes:
        """Receive with flags, without waiting, within a deadline, or after ``recv_until`` has read ahead."""
        if self.deadline is not None and monotonic() >= self.deadline:
            raise self.timeout_error(self.deadline)
        if self.kept:
            kept = self.kept
            if flags & _PEEK:
                return kept[:bufsize]
            self.kept = kept[bufsize:]
            return self._recv_rest(kept[:bufsize], bufsize) if flags & _WAITALL else kept[:bufsize]
        if flags and self.tls is not None:
            raise ValueError(f"flags cannot be used on an encrypted connection, got {flags}")
        if self.drained and bufsize and not flags and self.timeout != 0.0:
            self._wait_for_more()
            self.drained = False
        data: bytes | None = None
        while True:
            try:
                if cython.compiled and not flags and self.io is self.sock and 0 < bufsize <= MOST_DIRECT:
                    data = receive(self.fd, bufsize)
                else:
                    io = self._io_object()
                    data = self.sock.recv(bufsize, flags) if flags else io.recv(bufsize)
            except BlockingIOError:
                pass
            except InterruptedError:
                continue  # of receive() alone
            except OSError as error:
                self.note(error)
                raise
            if data is not None:
                break
            if self.timeout == 0.0 or flags & _DONTWAIT:
                raise _would_block()
            if self.ending:
                self.ended = True
                return b""
            self.wait_readable()
        self.drained = not flags and len(data) < bufsize and self._short_is_all
        if not flags & _PEEK:
            self.bytes_received += len(data)
            if not data and bufsize > 0:
                self._note_end()
            if flags & _WAITALL and data:
                return self._recv_rest(data, bufsize)
        return data

    def _recv_rest(self, data: bytes, bufsize: int) -> bytes:
        """Return, for MSG_WAITALL, ``data`` and what follows: ``bufsize`` bytes unless the peer closes first."""
        try:
            return data + self.recv_exactly(bufsize - len(data))
        except EarlyEOF as early:
            return data + early.partial
        except BaseException:
            self.kept = data + self.kept
            raise

    def recv_exactly(self, n: int) -> bytes:
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        data = self.recv(n) if n else b""
        if len(data) == n:
            return data
        buffer = bytearray(data)
        try:
            while (data or (buffer and self.goes_on())) and len(buffer) < n:
                # A large buffer only after large reads: for 1 MiB the allocator asks the kernel, 12 us for each dripped
                # byte.
                data = self.recv(min(n - len(buffer), SMALL_ROOM if len(data) < SMALL_ROOM else LARGE_ROOM))
                buffer += data
        except BaseException:
            # A timeout or a kill loses nothing: the next read starts where this one started.
            self.kept = bytes(buffer) + self.kept
            raise
        if len(buffer) < n:
            raise self.note(EarlyEOF(f"the peer closed after {len(buffer)} of {n} bytes", bytes(buffer)))
        return bytes(buffer)

    def goes_on(self) -> bool:
        """Return whether to read on after b"" within a message: the stream was ended as idle, but is no longer idle."""
        ended, self.ended = self.ended, False
        if ended:
            self.ending = False
        return ended

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Any, flags: int = 0) -> int:
        if self.deadline is not None and monotonic() >= self.deadline:
            raise self.timeout_error(self.deadline)
        while True:
            try:
                sent: int = self._io_object().send(data, flags)
                break
            except BlockingIOError:
                if self.timeout == 0.0 or flags & _DONTWAIT:
                    raise
            except OSError as error:
                self.note(error)
                raise
            self.wait_writable()
        self.bytes_sent += sent
        return sent

    def sendall(self, data: Any, flags: int = 0) -> None:
        # Hot path: one call sends a small answer.
        sent = 0
        if not flags and (self.deadline is None or monotonic() < self.deadline):
            try:
                if cython.compiled and self.io is self.sock and type(data) is bytes and len(data) <= MOST_DIRECT:
                    sent = transmit(self.fd, data)
                else:
                    sent = self._io_object().send(data)
            except BlockingIOError:
                sent = -1
            except InterruptedError:
                sent = 0  # of transmit() alone
            except OSError as error:
                self.note(error)
                raise
            if sent < 0:
                if self.timeout == 0.0:
                    raise _would_block()
                sent = 0
            self.bytes_sent += sent
            if sent == len(data) and type(data) is bytes:
                return
        view = memoryview(data).cast("B")
        while sent < len(view):
            sent += self.send(view[sent:], flags)

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> list[Any] | None:
        """Stop all waiting and transfers. Return the watchers with waiting greenlets, to be cancelled, or None."""
        self.drained = self._short_is_all = False
        self.kept = b""
        self.io = _closed
        if self._timer is not None:
            self._timer.close()
            self._timer = None
            self._timer_at = inf
        waiting: list[Any] | None = None
        if self.poller is not None:
            if self.poller.waiter(self.fd) is not None:
                waiting = [_Reader(self.poller, self.fd)]
            elif self.shared:
                self.poller.leave(self.fd)  # the kernel forgets a descriptor when its last copy is closed
            else:
                self.poller.forget(self.fd)
            self.poller = None
        if self.reading is not None or self.writing is not None:
            for watcher in (self.reading, self.writing):
                if watcher is not None:
                    if watcher.callback is None:
                        watcher.close()
                    else:
                        waiting = [*(waiting or ()), watcher]
            self.reading = self.writing = None
        if waiting is None:  # the common case
            self.sock = CLOSED
        return waiting

    @property
    def closed(self) -> bool:
        return self.io is _closed

    def leave_event_loop(self) -> None:
        """Forget, in a forked child, all that depends on the parent's event loop, which is gone."""
        self.drained = self.ending = self._short_is_all = False
        self.reading = self.writing = self.poller = self._timer = self.hub = None
        self._timer_at = self._read_until = self._write_until = inf

    def left_by_child(self) -> None:
        """Close the socket in a forked child."""
        self.leave_event_loop()
        self.kept = b""
        self.io = _closed
        self.sock.close()
        self.sock = CLOSED

    def __del__(self) -> None:
        # Dropped without a close. A started watcher must not outlive its descriptor: libev aborts the process.
        if self.poller is None and self.reading is None and self._timer is None:
            return
        try:
            if get_hub_if_exists() is self.hub:
                _stop(self.poller, self.fd, self.reading, self._timer, self.sock)
            else:  # the garbage collector runs in another thread
                self.hub.loop.run_callback_threadsafe(_stop, self.poller, self.fd, self.reading, self._timer, self.sock)
        except Exception:
            pass  # the event loop is gone, and the watchers with it


class _Reader:
    """A greenlet that waits on a connection that is closed, in the form of a watcher: gevent ends its wait."""

    __slots__ = ("_fd", "_poller")

    active = True

    def __init__(self, poller: Poller, fd: int) -> None:
        self._poller = poller
        self._fd = fd

    @property
    def callback(self) -> Any:
        waiter = self._poller.waiter(self._fd)
        return None if waiter is None else waiter.switch

    def close(self) -> None:
        self._poller.leave(self._fd)


class _Closed:
    """The ``io`` of a closed stream."""

    def recv(self, *args: Any) -> Any:
        raise cancel_wait_ex()

    recv_into = send = recv


_closed = _Closed()


def _would_block() -> BlockingIOError:
    return BlockingIOError(EAGAIN, os.strerror(EAGAIN))


def _stop(poller: Any, fd: int, reading: Any, timer: Any, sock: Any) -> None:
    # sock: kept open until here, unless the garbage collector has closed it: then the number may be another's.
    if poller is not None:
        if sock.fileno() == fd:
            poller.leave(fd)
        else:
            poller.forget_dropped(fd)
    for watcher in (reading, timer):
        if watcher is not None:
            watcher.close()


def _on_timer_of(stream: ReferenceType[Stream]) -> None:
    alive = stream()
    if alive is not None:
        alive.on_timer()
