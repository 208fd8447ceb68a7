"""Flow: move bytes from one socket to another in event callbacks.

A relaying greenlet costs a switch for each message, and two directions need two greenlets. A flow has none: its
callbacks run in the event loop and move the bytes right there, while the greenlet that called ``relay`` sleeps until
the end. An event moves at most one pipe full (1 MiB, about 0.3 ms), then the other connections have their turn.

Small messages are copied (recv, send), since splice needs an intermediate pipe: it costs more below 8 KiB, the same up
to 32 KiB, and half from 256 KiB. So a flow copies until a read fills its buffer, then splices until a few transfers in
a row were small.

While the receiver takes no more, nothing is read: a flow holds at most one full pipe or buffer, and the rest stays in
the kernel's socket buffers, whose limits slow down the sender.
"""

from __future__ import annotations

import errno
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any

from .ends import End, closing_error, note_error, reset_on_close
from .foreign import descriptor_for_kernel
from .pipes import LARGEST, PIPES, REFUSALS, Pipe, check_source
from .resumption import FlowState

if TYPE_CHECKING:
    from .move import Move

#: Buffer of a copying flow, bytes. A read that fills it switches to splicing.
COPY_SIZE = 64 * 1024

#: Bytes of a small splice; several in a row switch back to copying.
SMALL_SPLICE = 16 * 1024
SMALL_SPLICES_IN_A_ROW = 4

#: Another process that has the socket may have cleared its O_NONBLOCK.
_DONTWAIT = int(socket.MSG_DONTWAIT)

#: Errors of shutdown(2) for a sink that is gone; the other direction notices that when it reads.
_GONE = (errno.ENOTCONN, errno.EBADF)


class Flow:
    """One direction of a relay.

    Args:
        move: the Move to notify of the end and of errors.
        source, sink: ends to read from and write to.
        count: bytes to move; None: until the source ends.

    Attributes:
        moved: bytes given to the sink so far.
        done: the flow has ended.
    """

    __slots__ = (
        "_ask",
        "_in_pipe",
        "_left",
        "_move",
        "_pending",
        "_pipe",
        "_recv",
        "_send",
        "_small_splices",
        "_splicing",
        "done",
        "moved",
        "sink",
        "source",
    )

    def __init__(self, move: Move, source: End, sink: End, count: int | None = None) -> None:
        self._move = move
        self.source = source
        self.sink = sink
        self._recv = source.raw.recv
        self._send = sink.raw.send
        self._left = count
        self._ask = COPY_SIZE if count is None else min(count, COPY_SIZE)
        self._pending: Any = b""
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._splicing = False
        self._small_splices = 0
        self.moved = 0
        self.done = False

    def start(self) -> None:
        """Start, beginning with the bytes that the source read ahead."""
        if self._left == 0:
            self._end()
            return
        if self.done or self._pipe is not None:
            self.go_on()  # of a relay that began in another process
            return
        kept = self.source.take_kept()
        if self._left is not None and len(kept) > self._left:
            self.source.keep(kept[self._left :])
            kept = kept[: self._left]
        if kept:
            self._pending = memoryview(kept)
            self._count_down(len(kept))
            self.sink.start_writing(self.writable)
        else:
            self.source.start_reading(self.readable)

    def throw(self, error: Any, *ignored: Any) -> None:
        """End the whole move with an error, raised in the greenlet that waits for it. As a greenlet's ``throw``."""
        self._move.fail(closing_error(error))

    def stop(self) -> None:
        """Release the sockets. Bytes read but not written are lost; the sink must not take its data as complete."""
        if self.done:
            return
        self.done = True
        if self._pending or self._in_pipe:
            self.pass_on_reset()
        self.source.stop_reading(self.readable)
        self.sink.stop_writing(self.writable)
        self._pending = b""
        if self._pipe is not None:
            PIPES.discard(self._pipe)
            self._pipe, self._in_pipe = None, 0

    # -- in another process (resumption.py) ----------------------------------------------------------------------------

    def pause(self) -> bool:
        """Release the sockets until `go_on`; return False, and do nothing, if bytes under way cannot go into a pipe."""
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
        self.source.stop_reading(self.readable)
        self.sink.stop_writing(self.writable)
        return True

    def go_on(self) -> None:
        """End the pause. Raise OSError: a socket is closed."""
        if self.done:
            return
        self.source.look_again()
        self.sink.look_again()
        if self._pipe is not None:
            self.sink.start_writing(self.writable)
        else:
            self.source.start_reading(self.readable)

    def state(self) -> FlowState:
        """Return the state of a paused flow, which keeps its pipe."""
        return FlowState(self.moved, self.done, self._in_pipe, 0.0, self._pipe)

    def continue_from(self, state: FlowState) -> None:
        """Take over the state of a flow that was paused."""
        self.moved, self.done = state.moved, state.done
        self._pipe, self._in_pipe, state.pipe = state.pipe, state.size, None

    def give_away(self) -> None:
        """End a paused flow: its sockets and its pipe, which stay open, belong to another process."""
        self.done = True
        pipe, self._pipe, self._in_pipe = self._pipe, None, 0
        if pipe is not None:
            PIPES.let_go(pipe)

    def join(self) -> None:
        """Do nothing: a stopped flow has released the sockets."""

    def pending(self) -> bool:
        """Return whether an event is pending that has not been handled."""
        writing = self.sink.writing
        return bool(self.source.reading.pending or (writing is not None and writing.pending))

    def waits_for(self) -> Any:
        """Return the socket that the flow waits for."""
        return (self.sink if self._pending or self._in_pipe else self.source).sock

    def pass_on_end(self) -> None:
        """Tell the sink that the source has ended."""
        try:
            self.sink.raw.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in _GONE:
                self._write_failed(error)

    def pass_on_reset(self) -> None:
        """Make the sink reset when its owner closes it: the data is incomplete."""
        reset_on_close(self.sink.sock)

    # -- in the event loop -------------------------------------------------------------------------------------------

    def readable(self) -> None:
        # Hot path: once per message or full pipe.
        try:
            if self._splicing:
                self._splice()
                return
            try:
                data = self._recv(self._ask, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self._read_failed(error)
                return
            size = len(data)
            if not size:
                self._source_ended()
                return
            try:
                sent = self._send(data, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            self.source.count.bytes_received += size
            self._sent(sent)
            if self._left is not None:
                self._count_down(size)
            if size == COPY_SIZE:
                self._splicing = True
                self._small_splices = 0
            if sent < size:
                self._pending = memoryview(data)[sent:]
                self._wait_for_sink()
            elif self._left == 0:
                self._end()
        except OSError as error:
            self._write_failed(error)
        except BaseException as error:
            # Nothing may be raised into the event loop.
            self._move.fail(error)

    def _splice(self) -> None:
        pipe = self._pipe = PIPES.take()
        if pipe is None:
            self._splicing = False
            return
        try:
            size = pipe.fill(
                descriptor_for_kernel(self.source.raw), LARGEST if self._left is None else min(self._left, LARGEST)
            )
        except BlockingIOError:
            self._put_pipe()
            return
        except OSError as error:
            self._put_pipe()
            self._fill_failed(error)
            return
        if not size:
            self._put_pipe()
            self._source_ended()
            return
        self.source.count.bytes_received += size
        if self._left is not None:
            self._count_down(size)
        if size >= SMALL_SPLICE:
            self._small_splices = 0
        else:
            self._small_splices += 1
            self._splicing = self._small_splices < SMALL_SPLICES_IN_A_ROW
        self._in_pipe = size
        if not self._empty_pipe():
            self._wait_for_sink()
        elif self._left == 0:
            self._end()

    def _fill_failed(self, error: OSError) -> None:
        if error.errno in REFUSALS:
            PIPES.refuse(error)
            self._splicing = False
            try:
                check_source(self.source.raw, error)
                return  # the event fires again, and is copied
            except OSError as broken:
                error = broken
        self._read_failed(error)

    def writable(self) -> None:
        """Write to the sink, which has become writable again."""
        try:
            if self._pipe is not None:
                if not self._empty_pipe():
                    return
            elif self._pending:
                try:
                    sent = self._send(self._pending, _DONTWAIT)
                except BlockingIOError:
                    return
                self._sent(sent)
                self._pending = self._pending[sent:]
                if self._pending:
                    return
            self.sink.stop_writing(self.writable)
            if self._left == 0:
                self._end()
            else:
                self.source.start_reading(self.readable)
        except OSError as error:
            self._write_failed(error)
        except BaseException as error:
            self._move.fail(error)

    def _empty_pipe(self) -> bool:
        """Move the pipe's content to the sink; True when the pipe is empty and back in the pool."""
        assert self._pipe is not None
        try:
            sent = self._pipe.empty(descriptor_for_kernel(self.sink.raw), self._in_pipe)
        except BlockingIOError:
            self._pipe.check(self._in_pipe)
            return False
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            return self._copy_pipe(error)
        self._in_pipe -= sent
        if not self._in_pipe:
            self._put_pipe()
        self._sent(sent)
        return not self._in_pipe

    def _copy_pipe(self, refusal: OSError) -> bool:
        """Copy the pipe's content to a sink that refuses splice; True when the pipe is empty."""
        assert self._pipe is not None
        data = self._pipe.take_out(self._in_pipe)
        self._in_pipe = 0
        self._put_pipe()
        PIPES.refuse(refusal)
        self._splicing = False
        self._pending = memoryview(data)
        try:
            sent = self._send(data, _DONTWAIT)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            # The kernel reports a connection error once, then EPIPE: the refusal was such an error.
            raise refusal from None
        self._sent(sent)
        self._pending = self._pending[sent:]
        return not self._pending

    def _put_pipe(self) -> None:
        assert self._pipe is not None
        PIPES.put(self._pipe)
        self._pipe = None

    def _sent(self, size: int) -> None:
        self.moved += size
        self.sink.count.bytes_sent += size
        move = self._move
        if move.timed:
            move.moved_at = monotonic()
        if move.watched:
            move.tell(self, size)

    def _wait_for_sink(self) -> None:
        self.source.stop_reading(self.readable)
        self.sink.start_writing(self.writable)

    def _count_down(self, size: int) -> None:
        if self._left is not None:
            self._left -= size
            self._ask = min(self._left, COPY_SIZE)

    def _read_failed(self, error: OSError) -> None:
        note_error(self.source.sock, error)
        self._move.read_failed(self, error)

    def _write_failed(self, error: OSError) -> None:
        note_error(self.sink.sock, error)
        self._move.write_failed(self, error)

    def _source_ended(self) -> None:
        self.source.ended()
        self._end()

    def _end(self) -> None:
        self.stop()
        self._move.flow_ended(self)
