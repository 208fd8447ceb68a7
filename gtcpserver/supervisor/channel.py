"""Channel: one end of the line between the master and a worker; packets that keep their borders, and descriptors."""

from __future__ import annotations

import _socket
import os
import socket
import struct
from collections import deque
from typing import Any

from gevent import monkey

from gtcpserver.supervisor.messages import MAX_BYTES, Message, MessageError, decode, encode

# The real one, also in a monkey-patched program: the master has no event loop to wait in.
_socket_class: type[socket.socket] = monkey.get_original("socket", "socket")

MAX_QUEUED = 64
"""Messages that wait for a reader. A worker whose loop is blocked reads nothing, and is sent a handful at most."""


class Channel:
    """One end of a SOCK_SEQPACKET pair (unix(7)); never waits.

    Attributes:
        ended: the other end is closed: its process is gone.
    """

    def __init__(self, sock: socket.socket, kinds: frozenset[str]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._kinds = kinds
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self.ended = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, kind: str, fd: int | None = None, **fields: Any) -> None:
        """Sends, or keeps it for the next `flush`. The descriptor, if any, is the channel's to close."""
        if len(self._outbox) < MAX_QUEUED:
            self._outbox.append((encode(kind, **fields), fd))
        elif fd is not None:
            os.close(fd)
        self.flush()

    def flush(self) -> bool:
        """Sends what is left; False if some of it still has to wait."""
        while self._outbox:
            data, fd = self._outbox[0]
            try:
                rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", fd))]
                self._sock.sendmsg([data], rights)
            except BlockingIOError:
                return False
            except OSError:
                pass  # its reader is gone, which `receive` tells
            self._outbox.popleft()
            if fd is not None:
                os.close(fd)
        return True

    def send_if_clear(self, kind: str, **fields: Any) -> bool:
        """Sends now or not at all; False if not. Also in a signal handler."""
        if self._outbox:
            return False
        try:
            self._sock.send(encode(kind, **fields))
        except OSError:
            return False
        return True

    def receive(self) -> list[tuple[Message, int | None]]:
        """What has come, each with the descriptor that came with it. Packets that are no messages are left out."""
        found: list[tuple[Message, int | None]] = []
        while not self.ended:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(MAX_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                self.ended = True
                break
            fds = [
                struct.unpack("=i", content[:4])[0]
                for level, kind, content in ancillary
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(content) >= 4
            ]
            if not data:
                self.ended = True
                break
            try:
                found.append((decode(data, self._kinds), fds[0] if fds else None))
            except MessageError:
                for fd in fds:
                    os.close(fd)
        return found

    def close(self) -> None:
        self.ended = True
        for _, fd in self._outbox:
            if fd is not None:
                os.close(fd)
        self._outbox.clear()
        self._sock.close()


def make_pair(kinds_here: frozenset[str], kinds_there: frozenset[str]) -> tuple[Channel, Channel]:
    """Two ends; the first reads messages of `kinds_here`. Close-on-exec, as every descriptor that Python makes."""
    here, there = _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return (
        Channel(_socket_class(fileno=here.detach()), kinds_here),
        Channel(_socket_class(fileno=there.detach()), kinds_there),
    )


def adopt(fd: int, kinds: frozenset[str]) -> Channel:
    """The channel of an inherited descriptor."""
    os.set_inheritable(fd, False)
    return Channel(_socket_class(fileno=fd), kinds)
