"""Channel: one end of the line between the master and a worker; carries packets with descriptors."""

from __future__ import annotations

import _socket
import errno
import logging
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import Any

from gevent import monkey

from gtcpserver.linux import MSG_CMSG_CLOEXEC, PACKETS
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.packets import packets

from .messages import MAX_BYTES, Message, MessageError, decode, encode

log = logging.getLogger("gtcpserver")

# The original ones, also in a monkey-patched program: the master has no event loop to wait in.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")
_sleep = monkey.get_original("time", "sleep")

#: Errors that mean the other end is closed, besides an end of file. Any other error is temporary, or a fault of this
#: end: it says nothing about the other.
GONE = frozenset({errno.EPIPE, errno.ECONNRESET})

#: Packets read at once, so that a worker that floods the master does not hold up the others. A worker sends ten a
#: second.
MAX_AT_ONCE = 16

#: Multiple of MAX_AT_ONCE that is read from a worker that has ended; its socket's buffer holds fewer.
LAST_WORDS = 16

#: Descriptors taken from a packet, all closed at once except the expected one: only one is ever sent.
MAX_FDS = 8

#: Seconds between two attempts of `finish`.
RETRY_SECONDS = 0.01


@dataclass(frozen=True)
class _Packet:
    kind: str
    data: bytes
    fd: int | None


class Channel:
    """One end of a SOCK_SEQPACKET pair (unix(7)); only `finish` waits.

    Args:
        takes_fds: whether to receive descriptors that come with packets. Otherwise the kernel closes them, since a
            worker could fill the master's table with them.

    Attributes:
        ended: the other end is closed: its process is gone.
        unread: the other end no longer reads (EPIPE): the last messages sent are lost. Its own messages may still come.
    """

    def __init__(self, sock: socket.socket, kinds: frozenset[str], takes_fds: bool = False) -> None:
        sock.setblocking(False)
        self._sock = packets(sock)
        self._kinds = kinds
        self._takes_fds = takes_fds
        self._outbox: deque[_Packet] = deque()
        self.ended = False
        self.unread = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, kind: str, fd: int | None = None, **fields: Any) -> None:
        """Send a message, or keep it for the next `flush`.

        A waiting message of the same kind is replaced: only the newest counts, and a peer that reads nothing costs one
        message of each kind.

        Args:
            fd: a descriptor to pass on; it stays open, and the caller still owns it.

        Raises:
            MessageError: the message is too big, or not JSON.
        """
        packet = _Packet(kind, encode(kind, **fields), fd)
        self._outbox = deque(waiting for waiting in self._outbox if waiting.kind != kind)
        self._outbox.append(packet)
        self.flush()

    def flush(self) -> bool:
        """Send the waiting messages; return False if any still has to wait."""
        while self._outbox:
            packet = self._outbox[0]
            try:
                self._sock.sendmsg([packet.data], _rights(packet.fd))
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    # Above net.core.wmem_default, if an administrator set it below any message's size: it can never be
                    # sent.
                    log.error("a %s message of %d bytes is too big for a socket", packet.kind, len(packet.data))
                elif error.errno not in GONE:
                    return False  # EAGAIN, ENOBUFS, ENOMEM ...: later
                else:
                    self.unread = True
            self._outbox.popleft()  # it was sent, or no process is left to read it
        return True

    def finish(self, seconds: float) -> bool:
        """Send the waiting messages, waiting up to `seconds` for room; return False if some were not sent in time."""
        give_up = monotonic() + seconds
        while not self.flush():
            if monotonic() >= give_up:
                return False
            _sleep(RETRY_SECONDS)
        return True

    def send_if_clear(self, kind: str, fd: int | None = None, **fields: Any) -> bool:
        """Send now or not at all; return False if not sent. Safe in a signal handler.

        Args:
            fd: a descriptor to pass on; the caller still owns it and may close it.
        """
        if self._outbox:
            return False
        try:
            self._sock.sendmsg([encode(kind, **fields)], _rights(fd))
        except OSError:
            return False
        return True

    def receive(self) -> list[tuple[Message, int | None]]:
        """Read some of the waiting messages, each with the descriptor that came with it.

        Packets that are not valid messages are dropped.

        Raises:
            OSError: nothing can be read now (ENOMEM, for example); this says nothing about the other end.
        """
        found: list[tuple[Message, int | None]] = []
        for _ in range(MAX_AT_ONCE):
            if self.ended:
                break
            fds: list[int] = []
            try:
                data = self._receive_with(fds) if self._takes_fds else self._sock.recv(MAX_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in GONE:
                    self.ended = True
                elif not found:
                    raise
                break
            if not data:
                self.ended = True
            else:
                try:
                    found.append((decode(data, self._kinds), fds.pop(0) if fds else None))
                except MessageError:
                    pass
            for fd in fds:
                close_descriptor(fd)
        return found

    def receive_rest(self) -> list[tuple[Message, int | None]]:
        """Read the remaining messages of a process that has ended."""
        found: list[tuple[Message, int | None]] = []
        for _ in range(LAST_WORDS):
            try:
                more = self.receive()
            except OSError:
                break  # they are lost; the process cannot send them again
            if not more:
                break
            found += more
        return found

    def _receive_with(self, fds: list[int]) -> bytes:
        space = socket.CMSG_SPACE(MAX_FDS * 4)
        data, ancillary, _, _ = self._sock.recvmsg(MAX_BYTES, space, MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.extend(struct.unpack(f"={len(content) // 4}i", content[: len(content) // 4 * 4]))
        return data

    def detach(self) -> int:
        """Return the descriptor, which the caller owns from now on."""
        self.ended = True
        return self._sock.detach()

    def close(self) -> None:
        self.ended = True
        self._outbox.clear()
        self._sock.close()


def make_pair(kinds_here: frozenset[str], kinds_there: frozenset[str]) -> tuple[Channel, Channel]:
    """Return two ends; the first, the master's, reads messages of `kinds_here`, and takes no descriptors.

    Both are close-on-exec, like every descriptor that Python makes. Raises OSError; then nothing stays open.
    """
    # Not socket.socketpair: in a monkey-patched program it returns gevent's sockets, which create an event loop.
    here, there = _socket.socketpair(socket.AF_UNIX, PACKETS)
    return (
        Channel(_own(here.detach()), kinds_here),
        Channel(_own(there.detach()), kinds_there, takes_fds=True),
    )


def make_line() -> tuple[socket.socket, socket.socket]:
    """Return two connected stream sockets, as `make_pair` makes its. Raises OSError; then nothing stays open."""
    here, there = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return _own(here.detach(), socket.SOCK_STREAM), _own(there.detach(), socket.SOCK_STREAM)


def adopt(fd: int, kinds: frozenset[str], takes_fds: bool = False) -> Channel:
    """Return the channel of an inherited descriptor."""
    os.set_inheritable(fd, False)
    return Channel(_own(fd), kinds, takes_fds)


def _rights(fd: int | None) -> list[tuple[int, int, bytes]]:
    return [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))]


def _own(fd: int, kind: int = PACKETS) -> socket.socket:
    # With explicit kind: otherwise Python asks the kernel, and if that fails, the descriptor leaks.
    return _socket_class(socket.AF_UNIX, kind, 0, fileno=fd)
