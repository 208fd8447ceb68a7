"""Line: one end of a pair of sockets between two workers, in the event loop. Carries packets with descriptors."""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from gevent import monkey
from gevent.hub import get_hub

from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.process.descriptors import close_descriptor

from .messages import MAX_BYTES, MAX_OFFERS, Packet, PacketError, decode

log = logging.getLogger("gtcpserver")

_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

#: The other end is closed: its process is dead, or needs the line no more.
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

#: Packets read in one turn of the event loop. Each has at most MAX_OFFERS connections.
MOST_AT_ONCE = 2

#: Seconds until a send is tried again that failed for want of memory, or of room for descriptors in flight, which no
#: event announces.
AGAIN_SECONDS = 0.05

_SPACE = socket.CMSG_SPACE(MAX_OFFERS * 4)

#: Hears a packet and its descriptors, which it owns.
Hear = Callable[[Packet, Sequence[int]], Any]


class Line:
    """One end of a SOCK_SEQPACKET pair.

    Args:
        fd: its descriptor, which belongs to the line.
        hear: called in the hub with each packet.
        ended: called once, in the hub, when the other end is closed.
        again: called in the hub when there may be room again after `send` returned False.
    """

    def __init__(self, fd: int, hear: Hear, ended: Callable[[], Any], again: Callable[[], Any]) -> None:
        # With explicit kind: otherwise Python asks the kernel, and if that fails, the descriptor leaks.
        self._sock = _socket_class(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        self._sock.setblocking(False)
        self._hear = hear
        self._ended = ended
        self._again = again
        self.closed = False
        self._faults = FaultLimiter()
        loop = get_hub().loop
        self._reading = loop.io(fd, 1, ref=False)
        self._writing = loop.io(fd, 2, ref=False)
        # Made now: there may be no memory for it when it is needed. It repeats for the sake of `again`: a timer that
        # has fired, and is started anew, fires at once (libev).
        self._timer: Any = loop.timer(AGAIN_SECONDS, AGAIN_SECONDS, ref=False)
        self._reading.start(self._readable)

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
        self._guarded(self._again)

    def _readable(self) -> None:
        for _ in range(MOST_AT_ONCE):
            if self.closed:
                return
            try:
                data, fds = self._receive()
            except BlockingIOError:
                return
            except (OSError, MemoryError) as error:
                if _is_gone(error):
                    self._end()
                return  # ENOMEM ...: the watcher calls again
            try:
                packet = decode(data)
            except PacketError:
                for fd in fds:
                    close_descriptor(fd)
                if not data:
                    self._end()
                continue  # the other side withdraws what is not answered
            self._guarded(self._hear, packet, fds)

    def _receive(self) -> tuple[bytes, list[int]]:
        data, ancillary, _, _ = self._sock.recvmsg(MAX_BYTES + 1024, _SPACE, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(struct.unpack(f"={len(content) // 4}i", content[: len(content) // 4 * 4]))
        return data, fds

    def _guarded(self, do: Callable[..., Any], *arguments: Any) -> None:
        # gevent stops the watcher of a callback that raises: this line would be deaf.
        try:
            do(*arguments)
        except Exception as error:
            left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("a handover failed%s", also(left_out))

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._guarded(self._ended)

    def close(self) -> None:
        """Close it: for the other end, this process is dead."""
        if self.closed:
            return
        self.closed = True
        for watcher in (self._reading, self._writing, self._timer):
            watcher.stop()
        self._sock.close()

    def left_in_child(self) -> None:
        """Close the child's copy. Called in a forked child, whose event loop is another."""
        self.closed = True
        fd = self._sock.detach()
        if fd >= 0:
            close_descriptor(fd)


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _GONE
