"""relay and pipe: move bytes between two sockets until they end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from greenlet import getcurrent

from .ends import HasStream, note_error
from .move import AnyFlow, Move, check_seconds
from .resumption import Resumption

if TYPE_CHECKING:
    import socket  # type checkers see gevent's sockets as sockets of this module

Direction = Literal["a_to_b", "b_to_a"]
Reason = Literal["closed", "idle", "half_closed", "lifetime", "reset_a", "reset_b"]

Pace = Callable[[Direction, int], float]


@dataclass(frozen=True, slots=True)
class RelayResult:
    """Bytes that a relay moved, and the reason it ended.

    Attributes:
        bytes_a_to_b, bytes_b_to_a: bytes handed to the kernel for b and for a.
        reason: "closed": both sides ended in order; "idle": nothing moved for ``idle_timeout``; "half_closed": nothing
            moved for ``half_closed_timeout`` after one side had ended; "lifetime": ``lifetime`` is over; "reset_a",
            "reset_b": that side was reset, or took no more although the other still had data to send.
        duration: seconds.
        error: the OSError behind "reset_a" or "reset_b".

    Example::

        result = relay(conn, backend, idle_timeout=300)
        if result.reason != "closed":
            print(f"{result.reason} after {result.duration:.0f} s, {result.bytes_b_to_a} bytes answered")
    """

    bytes_a_to_b: int
    bytes_b_to_a: int
    reason: Reason
    duration: float
    error: OSError | None = None


def relay(
    a: socket.socket,
    b: socket.socket,
    *,
    idle_timeout: float | None = None,
    half_closed_timeout: float | None = None,
    lifetime: float | None = None,
    on_bytes: Callable[[Direction, int], object] | None = None,
    pace: Pace | None = None,
    handover: bool = False,
) -> RelayResult:
    """Move bytes between two sockets, in both directions, until both sides have ended.

    The end of one side is passed on (``shutdown(SHUT_WR)``) when everything before it was written, and the other
    direction goes on. A reset is passed on as a reset: the other socket is set to reset when it is closed
    (SO_LINGER 0, socket(7)). Data sent by a side that only takes no more (EPIPE: it had ended, and is closed now) is
    still delivered. The sockets stay open and belong to the caller, however the relay ends. If bytes are lost, or the
    relay ends by an error or a kill, they are set to reset: an orderly end would claim that the data is complete.

    Large flows use splice(2), without copying through Python, small ones recv and send; over TLS always the latter.

    Args:
        a, b: Connections, or ``gevent.socket.socket`` objects. No other code may read or write them meanwhile.
        idle_timeout: seconds without a byte in either direction until the relay ends; None waits indefinitely. The
            sockets' own ``settimeout`` does not apply: one side of a relay may well be silent while the other works.
        half_closed_timeout: the idle timeout after one side has ended; None: unchanged.
        lifetime: seconds until the relay ends, regardless of traffic; None: no limit.
        on_bytes: called as ``on_bytes("a_to_b", n)`` after each piece of ``n`` bytes was written. It runs in the event
            loop, so it must not block; an exception it raises ends the relay and is raised here.
        pace: called as ``pace("a_to_b", n)`` after each piece was written; that direction then rests for the seconds it
            returns. A paced relay uses a buffer instead of splice(2), in pieces of 16 KiB.
        handover: when its worker leaves, both connections move to another worker (``Server(handover=True)``). There the
            handler begins anew with ``conn.relayed_to`` as the other connection, and its call of this function goes on
            where this one was; here it ends by :class:`HandedOver`. One side is the handler's own connection.

    Returns:
        RelayResult.

    Raises:
        DeadlineExceeded: within ``deadline()`` of one of the connections.
        OSError: EBADF: another greenlet closed one of the sockets.
        TypeError: a or b is not a gevent socket.

    Example::

        from gtcpserver import connect, relay

        def handle(conn):
            with connect("10.0.0.5:7000", timeout=5) as backend:
                result = relay(conn, backend, idle_timeout=300)
            print(result.bytes_a_to_b, result.reason)  # 5 closed
    """
    if a is b:
        raise ValueError("relay needs two sockets; to echo, use pipe(conn, conn)")
    return Relay(a, b, idle_timeout, half_closed_timeout, lifetime, on_bytes, pace).run(handover)


def pipe(
    source: socket.socket,
    sink: socket.socket,
    *,
    count: int | None = None,
    idle_timeout: float | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> int:
    """Move bytes from one socket to another until the source ends. The sink is not shut down.

    Args:
        source, sink: sockets to read from and write to, as for :func:`relay`. They may be the same socket (an echo).
        count: most bytes to move; None: all.
        idle_timeout: seconds without progress until TimeoutError; None: the shorter ``settimeout`` of the two.
        on_bytes: called as ``on_bytes(n)``, otherwise as for :func:`relay`.

    Returns:
        The number of bytes written to the sink: less than ``count`` if the source ended early.

    Raises:
        TimeoutError, DeadlineExceeded: as above, or within ``deadline()`` of one of the connections.
        OSError: from the source or the sink. Bytes read but not yet written are lost, so the sink is set to reset when
            it is closed (a kill does the same).
        TypeError: source or sink is not a gevent socket.

    Example::

        from gtcpserver import pipe

        def echo(conn):
            pipe(conn, conn, idle_timeout=60)
    """
    if count is not None and count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if idle_timeout is None:
        timeouts = [timeout for timeout in (source.gettimeout(), sink.gettimeout()) if timeout]
        idle_timeout = min(timeouts) if timeouts else None
    return _Pipe(source, sink, count, idle_timeout, on_bytes).run()


class Relay(Move):
    """One call of `relay`.

    Attributes:
        greenlet: the one that waits for its end.
    """

    def __init__(
        self,
        a: Any,
        b: Any,
        idle_timeout: float | None,
        half_closed_timeout: float | None,
        lifetime: float | None,
        on_bytes: Callable[[Direction, int], object] | None,
        pace: Pace | None,
    ) -> None:
        super().__init__((a, b), idle_timeout, watched=on_bytes is not None, lifetime=lifetime)
        if half_closed_timeout is not None:
            check_seconds("half_closed_timeout", half_closed_timeout)
            self.timed = True
        self._half_closed_timeout = half_closed_timeout
        self._lifetime = lifetime
        self._is_half_closed = False
        self._on_bytes = on_bytes
        there = self.make_flow(a, b, pace=pace and partial(pace, "a_to_b"))
        back = self.make_flow(b, a, pace=pace and partial(pace, "b_to_a"))
        self.flows = (there, back)
        self._reason: Reason = "closed"
        self._broken: OSError | None = None
        self._began = 0.0
        self.greenlet: Any = None
        self._sides = a, b
        for client, other in ((a, b), (b, a)):
            resumption = client.take_resumption(other) if isinstance(client, HasStream) else None
            if resumption is not None:
                self._continue_from(resumption, client)

    def run(self, handover: bool = False) -> RelayResult:
        self._began = self._began or monotonic()
        there, back = self.flows
        if handover:
            self.greenlet = getcurrent()
            movable = [side for side in self._sides if isinstance(side, HasStream)]
            try:
                for side in movable:
                    side.note_relay(self)
                self.sleep()
            finally:
                for side in movable:
                    side.note_relay(None)
        else:
            self.sleep()
        return RelayResult(there.moved, back.moved, self._reason, monotonic() - self._began, self._broken)

    # -- in another process (resumption.py) ----------------------------------------------------------------------------

    def other_side(self, client: Any) -> Any:
        a, b = self._sides
        return b if client is a else a

    def resumption(self, client: Any) -> Resumption:
        """Return what this relay, which is paused, goes on from in another process.

        Args:
            client: the side that is the handler's own connection.
        """
        there, back = self.flows if client is self._sides[0] else self.flows[::-1]
        broken = None
        if self._broken is not None:
            a_broke = self._reason == "reset_a"
            broken = ("client" if a_broke == (client is self._sides[0]) else "other", self._broken.errno or 0)
        moved_at = self.moved_at if self.timed else None
        return Resumption(self.other_side(client), there.state(), back.state(), self._began, moved_at, broken)

    def _continue_from(self, resumption: Resumption, client: Any) -> None:
        there, back = self.flows if client is self._sides[0] else self.flows[::-1]
        there.continue_from(resumption.there)
        back.continue_from(resumption.back)
        self._began, self.moved_at = resumption.began, resumption.moved_at or monotonic()
        if self._lifetime is not None:
            self._lives_until = self._began + self._lifetime
        if resumption.broken is not None:
            side, number = resumption.broken
            self._reason = "reset_a" if (side == "client") == (client is self._sides[0]) else "reset_b"
            self._broken = OSError(number, os.strerror(number))
        if (there.done or back.done) and self._half_closed_timeout is not None:
            self._is_half_closed = True
            self._idle_timeout = self._half_closed_timeout

    def moved(self, flow: AnyFlow, size: int) -> None:
        assert self._on_bytes is not None
        self._on_bytes("a_to_b" if flow is self.flows[0] else "b_to_a", size)

    def idle(self) -> None:
        self._reason = "half_closed" if self._is_half_closed else "idle"
        self.finish()

    def lived(self) -> None:
        self._reason = "lifetime"
        self.finish()

    def flow_ended(self, flow: AnyFlow) -> None:
        flow.pass_on_end()
        self._finish_if_done()
        if self._half_closed_timeout is not None and not self._is_half_closed and not self.finished:
            self._is_half_closed = True
            self.be_idle_after(self._half_closed_timeout)

    def read_failed(self, flow: AnyFlow, error: OSError) -> None:
        self._reset(flow is self.flows[0], error)

    def write_failed(self, flow: AnyFlow, error: OSError) -> None:
        sink_is_a = flow is self.flows[1]
        if error.errno == errno.EPIPE:
            # That side ended in order before it was closed, so its data is complete: deliver it to the other side. (A
            # server that answers in the middle of an upload and closes.)
            flow.stop()
            self._note("reset_a" if sink_is_a else "reset_b", error)
            self._finish_if_done()
        else:
            self._reset(sink_is_a, error)

    def _reset(self, a_broke: bool, error: OSError) -> None:
        if error.errno == errno.EBADF:
            self.fail(error)
            return
        self._note("reset_a" if a_broke else "reset_b", error)
        # Both: after an error of this system (ENOMEM), that side still exists and waits for the rest.
        for flow in self.flows:
            flow.pass_on_reset()
        self.finish()

    def _note(self, reason: Reason, error: OSError) -> None:
        if self._broken is None:
            # Its traceback has this object's frames: a cycle, which would keep both connections for the collector.
            self._reason, self._broken = reason, error.with_traceback(None)

    def _finish_if_done(self) -> None:
        there, back = self.flows
        if there.done and back.done:
            self.finish()


class _Pipe(Move):
    def __init__(
        self,
        source: Any,
        sink: Any,
        count: int | None,
        idle_timeout: float | None,
        on_bytes: Callable[[int], object] | None,
    ) -> None:
        super().__init__((source, sink), idle_timeout, watched=on_bytes is not None)
        self._on_bytes = on_bytes
        self.flows = (self.make_flow(source, sink, count),)

    def run(self) -> int:
        flow = self.flows[0]
        self.sleep()
        return flow.moved

    def moved(self, flow: AnyFlow, size: int) -> None:
        assert self._on_bytes is not None
        self._on_bytes(size)

    def idle(self) -> None:
        error = TimeoutError("timed out")
        note_error(self.flows[0].waits_for(), error)
        self.fail(error)

    def flow_ended(self, flow: AnyFlow) -> None:
        self.finish()

    def read_failed(self, flow: AnyFlow, error: OSError) -> None:
        self.fail(error)

    write_failed = read_failed
