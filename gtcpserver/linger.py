"""Lingering close: a closed connection delivers what was written.

When a socket is closed with input unread, or input arrives after the close, the kernel answers with a reset and the
peer may lose what was sent before (RFC 9112 section 9.6 describes it for HTTP; measured on gevent: 20 of 20 large
answers cut short). So the write side is shut down, and what still comes is read and thrown away until the peer closes
too, for a bounded time and amount. No greenlet waits meanwhile: an event callback does it.
"""

from __future__ import annotations

import socket
from time import monotonic
from typing import Any

from gevent.event import Event
from gevent.hub import get_hub

#: Input thrown away for one connection before it is reset: enough for an upload that was refused early and is still
#: under way, too little to make a bandwidth sink of (nginx bounds the time only).
MOST_DISCARDED = 1 << 20

#: Connections that linger at once. Beyond it the one that lingered longest is closed: clients that never close must
#: not hold descriptors without limit.
MOST_LINGERING = 4096

#: Most peers close at once when they see the end. So the first look comes after so many seconds, at all who linger
#: together, and only those still open then get a watcher of their own: 5 us less for each connection.
FIRST_LOOK = 0.02

# What lingering connections send is read into here, and never looked at.
_rubbish = bytearray(64 * 1024)


class Linger:
    """Closes sockets politely.

    Args:
        seconds: how long a peer may take to close its side; 0 closes at once.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.nobody_lingers = Event()
        self.nobody_lingers.set()
        self.awaited = 0
        self._lingering: dict[_Lingering, None] = {}
        self._timer: Any = None
        self._fresh: list[_Lingering] = []
        self._first_look: Any = None

    def __len__(self) -> int:
        return len(self._lingering)

    def take(self, sock: Any, *, awaited: bool = True) -> bool:
        """Shut down the write side and close later. False if the caller shall close at once.

        Args:
            sock: the raw non-blocking socket. No greenlet waits on it any more.
            awaited: False: ``nobody_lingers`` does not wait for this one.
        """
        if not self.seconds:
            return False
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            return False  # reset meanwhile: nobody is left to be polite to
        entry = _Lingering(self, sock, monotonic() + self.seconds, awaited)
        if len(self._lingering) >= MOST_LINGERING:
            next(iter(self._lingering)).close()
        self._lingering[entry] = None
        if awaited:
            self.awaited += 1
            self.nobody_lingers.clear()
        self._fresh.append(entry)
        if self._first_look is None:
            self._first_look = get_hub().loop.timer(FIRST_LOOK, ref=False)
            self._first_look.start(self._look_at_fresh)
        if self._timer is None:
            self._start_timer(self.seconds)
        return True

    def _look_at_fresh(self) -> None:
        self._first_look.close()
        self._first_look = None
        fresh, self._fresh = self._fresh, []
        for entry in fresh:
            if entry in self._lingering:
                entry.readable()
                entry.watch()

    def close_all(self) -> None:
        """Close every lingering connection now."""
        for entry in list(self._lingering):
            entry.close()

    def _start_timer(self, seconds: float) -> None:
        # ref=False: a program that has nothing else to do may end; the kernel finishes what it can.
        self._timer = get_hub().loop.timer(seconds, ref=False)
        self._timer.start(self._close_overdue, update=True)

    def _close_overdue(self) -> None:
        self._timer.close()
        self._timer = None
        now = monotonic()
        # All have the same time, so they are overdue in the order they came.
        for entry in list(self._lingering):
            if entry.until > now:
                self._start_timer(entry.until - now)
                return
            entry.close()


class _Lingering:
    __slots__ = ("_awaited", "_linger", "_sock", "_to_discard", "_watcher", "until")

    def __init__(self, linger: Linger, sock: Any, until: float, awaited: bool) -> None:
        self._linger = linger
        self._awaited = awaited
        self._sock = sock
        self._watcher: Any = None
        self._to_discard = MOST_DISCARDED
        self.until = until

    def watch(self) -> None:
        """Go on looking whenever there is something to read, unless it is closed already."""
        if self in self._linger._lingering:
            self._watcher = get_hub().loop.io(self._sock.fileno(), 1)
            self._watcher.start(self.readable)

    def readable(self) -> None:
        try:
            discarded = self._sock.recv_into(_rubbish)
        except BlockingIOError:
            return
        except OSError:
            discarded = 0
        self._to_discard -= discarded
        if not discarded or self._to_discard <= 0:
            self.close()

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        linger = self._linger
        if linger._lingering.pop(self, self) is not None:
            return  # closed already
        get_hub().loop.closing_fd(self._sock.fileno())
        self._sock.close()
        linger.awaited -= self._awaited
        if not linger.awaited:
            linger.nobody_lingers.set()
