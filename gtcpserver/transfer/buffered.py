"""BufferedFlow: move bytes between sockets through a buffer, where the kernel cannot (TLS)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
import gevent.ssl

from .ends import reset_on_close

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
        self._holds = False  # bytes were read and not yet written
        self.moved = 0
        self.done = False

    def start(self) -> None:
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        self.done = True
        if self._holds:
            self.pass_on_reset()
        if self._greenlet is not None and self._greenlet is not gevent.getcurrent():
            self._greenlet.kill(block=False)

    def join(self) -> None:
        """Wait until the stopped greenlet has released the sockets."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def pending(self) -> bool:
        return False

    def waits_for(self) -> Any:
        return self._sink if self._holds else self._source

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
        move, source, sink = self._move, self._source, self._sink
        size_at_once = BUFFER_SIZE if self._pace is None else PACED_SIZE
        buffer = memoryview(bytearray(size_at_once))
        while self._left is None or self._left > 0:
            room = size_at_once if self._left is None else min(self._left, size_at_once)
            try:
                size = source.recv_into(buffer, room)
            except OSError as error:
                move.read_failed(self, error)
                return
            if not size:
                break
            if self._left is not None:
                self._left -= size
            self._holds = True
            try:
                sink.sendall(buffer[:size])
            except OSError as error:
                move.write_failed(self, error)
                return
            self._holds = False
            self.moved += size
            if move.timed:
                move.moved_at = monotonic()
            if move.watched:
                move.tell(self, size)
            if self._pace is not None and (rest := self._pace(size)) > 0:
                # A paced flow is not idle while it rests.
                move.moved_at = monotonic() + rest
                gevent.sleep(rest)
        self.done = True
        move.flow_ended(self)
