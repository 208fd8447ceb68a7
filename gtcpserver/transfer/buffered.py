"""BufferedFlow: move bytes between sockets through a buffer, where the kernel cannot (TLS)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
import gevent.ssl
from greenlet import GreenletExit

from .ends import reset_on_close
from .pipes import PIPES, Pipe
from .resumption import FlowState

if TYPE_CHECKING:
    from .move import Move

#: Four TLS records: each recv gives one record, each sendall makes up to four.
BUFFER_SIZE = 64 * 1024

#: Bytes that a paced flow moves at once.
PACED_SIZE = 16 * 1024


class BufferedFlow:
    """One direction, in a separate greenlet. Same interface as :class:`~.flow.Flow`.

    Args:
        pace: called with the size of each piece after it was written; returns the seconds to rest.
    """

    def __init__(
        self,
        move: Move,
        source: Any,
        sink: Any,
        count: int | None = None,
        pace: Callable[[int], float] | None = None,
    ) -> None:
        self._move = move
        self._source = source
        self._sink = sink
        self._left = count
        self._pace = pace
        self._greenlet: Any = None
        self._pending: Any = b""  # read and not yet written
        self._pipe: Pipe | None = None  # the same, of a paused flow
        self._in_pipe = 0
        self._rest_until = 0.0
        self.moved = 0
        self.done = False

    def start(self) -> None:
        self.go_on()

    def stop(self) -> None:
        if self._pipe is not None:
            PIPES.discard(self._pipe)
            self._pipe = None
        self.done = True
        if self._pending or self._in_pipe:
            self.pass_on_reset()
        if self._greenlet is not None and self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)

    # -- in another process (resumption.py) ----------------------------------------------------------------------------

    def pause(self) -> bool:
        """End the greenlet until `go_on`; return False, and do nothing, if bytes under way cannot go into a pipe.

        Call in the hub.
        """
        if self.done:
            return True
        if self._pending:
            pipe = PIPES.take()
            if pipe is None:
                return False
            size = len(self._pending)
            if pipe.put_in(self._pending) < size:
                PIPES.discard(pipe)
                return False
            self._pipe, self._in_pipe, self._pending = pipe, size, b""
        greenlet, self._greenlet = self._greenlet, None
        if greenlet is not None:
            greenlet.throw(GreenletExit)  # it waits, and holds no other bytes
        return True

    def go_on(self) -> None:
        """End the pause."""
        if not self.done:
            self._greenlet = gevent.spawn(self._run)

    def state(self) -> FlowState:
        """Return the state of a paused flow, which keeps its pipe."""
        return FlowState(self.moved, self.done, self._in_pipe, self._rest_until, self._pipe)

    def continue_from(self, state: FlowState) -> None:
        """Take over the state of a flow that was paused."""
        self.moved, self.done, self._rest_until = state.moved, state.done, state.rest_until
        self._pipe, self._in_pipe, state.pipe = state.pipe, state.size, None

    def give_away(self) -> None:
        """End a paused flow: its sockets and its pipe, which stay open, belong to another process."""
        self.done = True
        pipe, self._pipe, self._in_pipe = self._pipe, None, 0
        if pipe is not None:
            PIPES.let_go(pipe)

    def join(self) -> None:
        """Wait until the stopped greenlet has released the sockets."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def pending(self) -> bool:
        return False

    def waits_for(self) -> Any:
        return self._sink if self._pending else self._source

    def pass_on_end(self) -> None:
        try:
            if isinstance(self._sink, gevent.ssl.SSLSocket):
                # The socket's shutdown() would drop the encryption of the other direction too, and unwrap() would wait.
                self._sink._sslobj.shutdown()  # noqa: SLF001 - gevent's name for it
            else:
                self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # close_notify is sent, the peer's has not arrived; or the sink is gone

    def pass_on_reset(self) -> None:
        reset_on_close(self._sink)

    def _run(self) -> None:
        try:
            self._copy()
        except Exception as error:
            self._move.fail(error)

    def _copy(self) -> None:
        move, source = self._move, self._source
        size_at_once = BUFFER_SIZE if self._pace is None else PACED_SIZE
        buffer = memoryview(bytearray(size_at_once))
        if self._pipe is not None:
            self._take_out(self._pipe)
        self._rest()
        while self._write():
            room = size_at_once if self._left is None else min(self._left, size_at_once)
            try:
                size = source.recv_into(buffer, room) if room else 0
            except OSError as error:
                move.read_failed(self, error)
                return
            if not size:
                self.done = True
                move.flow_ended(self)
                return
            if self._left is not None:
                self._left -= size
            self._pending = buffer[:size]

    def _take_out(self, pipe: Pipe) -> None:
        self._pending = memoryview(pipe.take_out(self._in_pipe))
        self._pipe, self._in_pipe = None, 0
        PIPES.put(pipe)

    def _write(self) -> bool:
        """Write what was read; return False if that failed."""
        move = self._move
        while self._pending:
            piece = self._pending if self._pace is None else self._pending[:PACED_SIZE]
            try:
                size = self._sink.send(piece)
            except OSError as error:
                move.write_failed(self, error)
                return False
            self._pending = self._pending[size:]
            self.moved += size
            if move.timed:
                move.moved_at = monotonic()
            if move.watched:
                move.tell(self, size)
            if self._pace is not None and (rest := self._pace(size)) > 0:
                self._rest_until = monotonic() + rest
                self._rest()
        return True

    def _rest(self) -> None:
        rest = self._rest_until - monotonic()
        if rest > 0:
            # A paced flow is not idle while it rests.
            self._move.moved_at = self._rest_until
            gevent.sleep(rest)
