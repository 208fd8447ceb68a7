"""Line: one end of a pair of sockets between two workers, in the event loop. Carries packets with descriptors."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gevent import monkey
from gevent.hub import get_hub

from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.linux import MSG_CMSG_CLOEXEC, PACKETS
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.packets import packets

from .messages import MAX_BYTES, MAX_DESCRIPTORS, MAX_OFFERS, Packet, PacketError, decode

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

#: The other end is closed: its process is dead, or needs the line no more.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

#: Packets read in one turn of the event loop. Each has at most MAX_OFFERS connections.
MOST_AT_ONCE = 2

#: Seconds until what failed is tried again where no event announces that it can succeed: memory ran out, or room for
#: descriptors in flight.
AGAIN_SECONDS = 0.05

_SPACE = socket.CMSG_SPACE(MAX_OFFERS * MAX_DESCRIPTORS * 4)

#: Hears a packet and its descriptors: it takes those that it owns out of the list. After a MemoryError it is called
#: again with the same arguments.
Hear = Callable[[Packet, list[int]], Any]


class Line:
    """One end of a SOCK_SEQPACKET pair.

    Args:
        fd: its descriptor, which belongs to the line; closed if an exception is raised.
        hear: called in the hub with each packet.
        ended: called once, in the hub, when the other end is closed.
        again: called in the hub when there may be room again after `send` returned False.
    """

    def __init__(self, fd: int, hear: Hear, ended: Callable[[], Any], again: Callable[[], Any]) -> None:
        self._hear = hear
        self._ended = ended
        self._again = again
        self.closed = False
        self._faults = FaultLimiter()
        self._read: tuple[bytes, list[Any]] | None = None  # a packet as it was read, which is not heard yet
        self._unheard: tuple[Packet | None, list[int]] | None = None  # the same once it is decoded
        try:
            # With explicit kind: otherwise Python asks the kernel, and if that fails, the descriptor leaks.
            self._sock = _socket_class(socket.AF_UNIX, PACKETS, 0, fileno=fd)
        except BaseException:
            close_descriptor(fd)
            raise
        try:
            self._sock.setblocking(False)
            self._sock = packets(self._sock)
            loop = get_hub().loop
            self._reading = loop.io(fd, 1, ref=False)
            self._writing = loop.io(fd, 2, ref=False)
            # Made now: there may be no memory for them when they are needed. They repeat since a timer that has fired,
            # and is started anew, fires at once (libev).
            self._timer: Any = loop.timer(AGAIN_SECONDS, AGAIN_SECONDS, ref=False)
            self._rereading: Any = loop.timer(AGAIN_SECONDS, AGAIN_SECONDS, ref=False)
            self._reading.start(self._readable)
        except BaseException:
            self._sock.close()
            raise

    def send(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send a packet; return False, and call `again` later, if there is no room now."""
        if self.closed:
            return True  # `ended` was called, or will be
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        try:
            self._sock.sendmsg([data], rights)
        except BlockingIOError:
            self._writing.start(self._may_send)
            return False
        except (OSError, MemoryError) as error:
            if _is_gone(error):
                get_hub().loop.run_callback(self._end)
                return True  # nobody will read it
            # One timer, however often this is called: `again` calls it more than once.
            if not self._timer.active:
                self._timer.again(self._may_send)
            return False
        return True

    def _may_send(self) -> None:
        self._writing.stop()
        self._timer.stop()
        try:
            self._guarded(self._again)
        except MemoryError:
            self._timer.again(self._may_send)

    def _readable(self) -> None:
        """Read and hear some packets. Raises nothing: gevent stops the watcher of a callback that does."""
        try:
            # First, while nothing is read: no event tells again of a packet that was read and could not be heard.
            self._rereading.again(self._readable)
            for _ in range(MOST_AT_ONCE):
                if self.closed or not self._hear_next():
                    break
        except MemoryError:
            return  # the watcher or the timer calls again
        self._rereading.stop()

    def _hear_next(self) -> bool:
        """Hear one packet; return False if there is none. After a MemoryError, the next call goes on with the same."""
        if self._unheard is None:
            if self._read is None and not self._read_one():
                return False
            assert self._read is not None
            data, ancillary = self._read
            fds = _descriptors(ancillary)
            try:
                self._unheard = (decode(data), fds)
            except PacketError:
                self._unheard = (None, fds)  # the other side withdraws what is not answered
            if not data:
                self._end()
            self._read = None
        packet, fds = self._unheard
        if packet is not None and not self.closed:
            self._guarded(self._hear, packet, fds)
        _close_all(fds)
        self._unheard = None
        return True

    def _read_one(self) -> bool:
        try:
            self._read = self._sock.recvmsg(MAX_BYTES + 1024, _SPACE, MSG_CMSG_CLOEXEC)[:2]
        except BlockingIOError:
            return False
        except OSError as error:
            if _is_gone(error):
                self._end()
            return False  # ENOMEM ...: the watcher calls again
        return True

    def _guarded(self, do: Callable[..., Any], *arguments: Any) -> None:
        # gevent stops the watcher of a callback that raises: this line would be deaf.
        try:
            do(*arguments)
        except MemoryError:
            raise  # tried again
        except Exception as error:
            left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("a handover failed%s", also(left_out))

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._tell_ended()

    def _tell_ended(self) -> None:
        self._timer.stop()
        try:
            self._guarded(self._ended)
        except MemoryError:
            self._timer.again(self._tell_ended)

    def close(self) -> None:
        """Close it: for the other end, this process is dead."""
        if self.closed:
            return
        self.closed = True
        for watcher in (self._reading, self._writing, self._timer, self._rereading):
            watcher.stop()
        self._sock.close()
        if self._unheard is not None:
            _close_all(self._unheard[1])
        elif self._read is not None:
            with contextlib.suppress(MemoryError):
                _close_all(_descriptors(self._read[1]))

    def left_in_child(self) -> None:
        """Close the child's copy. Called in a forked child, whose event loop is another."""
        self.closed = True
        fd = self._sock.detach()
        if fd >= 0:
            close_descriptor(fd)


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(struct.unpack(f"={len(content) // 4}i", content[: len(content) // 4 * 4]))
    return fds


def _close_all(fds: list[int]) -> None:
    while fds:
        close_descriptor(fds.pop())


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _GONE
