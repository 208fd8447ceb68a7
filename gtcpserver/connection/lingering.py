"""Lingering close: a closed connection delivers what was written.

When a socket is closed with input unread, or input arrives after the close, the kernel answers with a reset and the
peer may lose what was sent before (RFC 9112 section 9.6 describes it for HTTP; measured on gevent: 20 of 20 large
answers cut short). So the write side is shut down, and further input is read and thrown away until the peer closes too,
for a bounded time and amount. No greenlet waits meanwhile: an event callback does the work.
"""

from __future__ import annotations

import os
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any

from gevent.event import Event
from gevent.hub import get_hub
from gevent.socket import socket as _Socket

from gtcpserver.linux import SO_PROTOCOL, TCP_INFO
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.watcher import watch

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled and TYPE_CHECKING:
    from gtcpserver.c import close_now, discard, shut_write

    from .accepted import AcceptedSocket

#: Input thrown away for one connection before it is reset: enough for an upload that was refused early and is still
#: under way, too little to make a bandwidth sink of (nginx bounds the time only).
MOST_DISCARDED = 1 << 20

#: Connections that linger at once, after the first look. Beyond this the one that lingered longest is closed: clients
#: that never close must not hold descriptors without limit.
MOST_LINGERING = 4096

#: Silence, in seconds since the close, after which a stop no longer waits for a peer that has received everything. That
#: it has received everything is not enough: input that arrives after the socket is gone is answered with a reset. Linux
#: lets the peer's process read what had arrived (measured: 50,000 of 50,000 bytes), other systems may discard it; and a
#: process that still sends fails at its next send and may never read. An upload under way has packets closer together
#: than this.
SILENT_SECONDS = 0.25

#: Seconds between two checks by a stop of the peers it still waits for.
LOOK_SECONDS = 0.05

#: Seconds until the first look, which checks all lingering connections together. Most peers close at once when they see
#: the end, and only connections still open then get a watcher: 5 us less for each connection.
FIRST_LOOK = 0.02

# A plain number: the socket module's enum costs 0.1 us a call.
SHUT_WR = int(socket.SHUT_WR)

#: include/net/tcp_states.h. The peer's system has acknowledged all that was sent, and our FIN behind it (RFC 9293
#: section 3.3.2); what the peer had sent before it knew of the FIN has arrived.
TCP_FIN_WAIT2 = 5

_RawSocket = _Socket._gevent_sock_class  # noqa: SLF001 - gevent's

#: Of a descriptor: a stop waits for it, as of `Linger.take`; others may have watchers on it.
_AWAITED, _SHOWN = 1, 2

# Input of lingering connections is read into this buffer and ignored.
_rubbish = bytearray(64 * 1024)


class Linger:
    """Closes sockets politely.

    Args:
        seconds: time that a peer may take to close its side; 0 closes at once.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._nobody: Event | None = None
        # Descriptors before the first look -> _AWAITED, _SHOWN. Not sockets: a thousand objects that live for 20 ms
        # have the garbage collector run for each of them (5 % of a server that closes every connection).
        self._fresh: dict[int, int] = {}
        self._first_look: Any = None
        self._lingering: dict[_Lingering, None] = {}  # after the first look, oldest first
        self._awaited = 0  # among them
        self._timer: Any = None

    def __len__(self) -> int:
        return len(self._fresh) + len(self._lingering)

    @property
    def nobody_lingers(self) -> Event:
        """Return an event that is set when no awaited connection lingers; for a stop, which asks once."""
        self._nobody = self._nobody or Event()
        self._tell_if_nobody()
        return self._nobody

    def _tell_if_nobody(self) -> None:
        if self._nobody is not None:
            if self._awaited or any(flags & _AWAITED for flags in self._fresh.values()):
                self._nobody.clear()
            else:
                self._nobody.set()

    def take(self, sock: Any, awaited: bool = True) -> bool:
        """Shut down the write side and close later. False if the caller must close at once.

        Args:
            sock: the raw non-blocking socket. No greenlet waits on it any more. It gives its descriptor away.
            awaited: False: ``nobody_lingers`` does not wait for this one.
        """
        # Runs once per connection: no per-connection object and no clock before the first look.
        if not self.seconds:
            return False
        flags = _AWAITED if awaited else 0
        accepted: AcceptedSocket | None = sock if cython.compiled and type(sock) is AcceptedSocket else None
        if accepted is not None and accepted.fd >= 0:
            if not shut_write(accepted.fd):
                return False
            self._fresh[accepted.fd] = flags | _SHOWN if accepted.shown else flags
            accepted.detach()
        elif _shut_write(sock):
            self._fresh[sock.fileno()] = flags | _SHOWN
            sock.detach()
        else:
            return False  # reset meanwhile: nobody is left to be polite to
        if self._first_look is None:
            timer = get_hub().loop.timer(min(FIRST_LOOK, self.seconds), ref=False)
            timer.start(self._look_at_fresh, update=True)
            self._first_look = timer
        return True

    def _look_at_fresh(self) -> None:
        self._first_look.close()
        self._first_look = None
        fresh, self._fresh = self._fresh, {}
        until = monotonic() + self.seconds
        closing_fd = get_hub().loop.closing_fd
        try:
            if self._timer is None:
                self._start_timer(self.seconds)
            for fd, flags in tuple(fresh.items()):
                discarded = _discard(fd)
                if discarded and self._keep(fd, until, flags & _AWAITED != 0, max(0, discarded)):
                    del fresh[fd]
                    continue
                if flags & _SHOWN:
                    closing_fd(fd)  # notifies watchers that others still have on it
                del fresh[fd]
                _close(fd)
        finally:
            for fd in fresh:  # memory ran out
                _close(fd)
            self._tell_if_nobody()

    def _keep(self, fd: int, until: float, awaited: bool, discarded: int) -> bool:
        """Let it keep lingering; False if it cannot."""
        if len(self._lingering) >= MOST_LINGERING:
            next(iter(self._lingering)).close()
        try:
            self._lingering[_Lingering(self, fd, until, awaited, discarded)] = None
        except (OSError, MemoryError):
            return False
        self._awaited += awaited
        return True

    def let_silent_peers_be(self) -> None:
        """Stop awaiting silent peers that have received everything; for a stop, which calls this repeatedly."""
        silent_since = monotonic() - SILENT_SECONDS
        for entry in list(self._lingering):
            if entry.awaited and entry.heard_at <= silent_since:
                entry.readable()  # input may have arrived in this loop iteration
                if entry.heard_at <= silent_since and entry.peer_has_everything():
                    entry.await_no_more()

    def close_all(self) -> None:
        """Close every lingering connection now."""
        for fd in tuple(self._fresh):
            get_hub().loop.closing_fd(fd)
            del self._fresh[fd]
            _close(fd)
        for entry in list(self._lingering):
            entry.close()
        self._tell_if_nobody()

    def forget(self, entry: _Lingering) -> bool:
        """Forget a connection about to be closed; False if it was already."""
        # The values are None.
        return self._lingering.pop(entry, entry) is None

    def note_not_awaited(self) -> None:
        """Note that one awaited connection fewer lingers."""
        self._awaited -= 1
        if not self._awaited:
            self._tell_if_nobody()

    def left_in_child(self) -> None:
        """Close the lingering sockets in a forked child."""
        for fd in (*self._fresh, *(entry.fd for entry in self._lingering)):
            _close(fd)
        self._fresh = {}
        self._lingering = {}
        self._awaited = 0
        self._first_look = self._timer = self._nobody = None

    def _start_timer(self, seconds: float) -> None:
        # ref=False: a program that has nothing else to do may end; the kernel finishes what it can.
        timer = get_hub().loop.timer(seconds, ref=False)
        timer.start(self._close_overdue, update=True)
        self._timer = timer

    def _close_overdue(self) -> None:
        self._timer.close()
        self._timer = None
        now = monotonic()
        # All have the same time limit, so they expire in order of arrival.
        for entry in list(self._lingering):
            if entry.until > now:
                self._start_timer(entry.until - now)
                return
            entry.close()


class _Lingering:
    """A connection that was still open at the first look."""

    __slots__ = ("_linger", "_to_discard", "_watcher", "awaited", "fd", "heard_at", "until")

    def __init__(self, linger: Linger, fd: int, until: float, awaited: bool, discarded: int) -> None:
        self._linger = linger
        self.awaited = awaited
        self.fd = fd
        self._to_discard = MOST_DISCARDED - discarded
        self.until = until
        self.heard_at = until - linger.seconds  # the first look
        self._watcher = watch(get_hub().loop, fd, 1)
        self._watcher.start(self.readable)

    def readable(self) -> None:
        discarded = _discard(self.fd)
        if discarded < 0:
            return
        self._to_discard -= discarded
        self.heard_at = monotonic()
        if not discarded or self._to_discard <= 0:
            self.close()

    def peer_has_everything(self) -> bool:
        """Return whether the peer's system has received all data and the FIN; False if that cannot be determined."""
        try:
            sock = _RawSocket(fileno=self.fd)
        except OSError:
            return False
        try:
            if sock.family == socket.AF_UNIX:
                return True  # a send puts it into the peer's own queue
            # TCP_INFO reports the state of one subflow, not that of the multipath connection.
            if sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL) != socket.IPPROTO_TCP:
                return False
            # tcpi_state comes first (linux/tcp.h).
            return bool(sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 1)[0] == TCP_FIN_WAIT2)
        except OSError:  # not on this system
            return False
        finally:
            sock.detach()

    def await_no_more(self) -> None:
        if self.awaited:
            self.awaited = False
            self._linger.note_not_awaited()

    def close(self) -> None:
        if not self._linger.forget(self):
            return  # closed already
        self._watcher.close()
        get_hub().loop.closing_fd(self.fd)
        _close(self.fd)
        self.await_no_more()


def _shut_write(sock: Any) -> bool:
    """Shut down the write side; return False on an error."""
    if cython.compiled:
        return shut_write(sock.fileno())
    try:
        sock.shutdown(SHUT_WR)
    except OSError:
        return False
    return True


def _discard(fd: int) -> int:
    """Read and throw away input; return its bytes, 0 at the peer's end or after a reset, -1 if there is none."""
    if cython.compiled:
        return discard(fd)
    try:
        os.set_blocking(fd, False)  # another process that has the socket may have made it blocking
        return os.readv(fd, [_rubbish])
    except BlockingIOError:
        return -1
    except OSError:
        return 0


def _close(fd: int) -> None:
    if cython.compiled:
        close_now(fd)
        return
    try:
        close_descriptor(fd)
    except OSError:
        pass  # it is closed all the same, close(2)
