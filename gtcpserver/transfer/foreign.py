"""Sockets that another process has had, and may have still: no call of theirs waits.

O_NONBLOCK is a flag of the open file description (fcntl(2)), which all have who have the socket. Any of them may clear
it at any time, and would block the event loop of the others. A socket cannot be opened anew, as a pipe can.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any

import gevent.socket

_RawSocket: Any = gevent.socket.socket._gevent_sock_class  # noqa: SLF001 - gevent's

_LINGER = struct.Struct("ii")

_DONTWAIT = int(socket.MSG_DONTWAIT)


class ForeignSocket(_RawSocket):  # type: ignore[misc]
    """A raw socket whose calls fail with BlockingIOError where they would wait, whatever O_NONBLOCK says."""

    __slots__ = ()

    def recv(self, bufsize: int, flags: int = 0) -> Any:
        return super().recv(bufsize, flags | _DONTWAIT)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> Any:
        return super().recv_into(buffer, nbytes, flags | _DONTWAIT)

    def recvfrom(self, bufsize: int, flags: int = 0) -> Any:
        return super().recvfrom(bufsize, flags | _DONTWAIT)

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> Any:
        return super().recvfrom_into(buffer, nbytes, flags | _DONTWAIT)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Any:
        return super().recvmsg(bufsize, ancbufsize, flags | _DONTWAIT)

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0) -> Any:
        return super().recvmsg_into(buffers, ancbufsize, flags | _DONTWAIT)

    def send(self, data: Any, flags: int = 0) -> Any:
        return super().send(data, flags | _DONTWAIT)

    def sendto(self, data: Any, *rest: Any) -> Any:
        flags, address = rest if len(rest) > 1 else (0, *rest)
        return super().sendto(data, flags | _DONTWAIT, address)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> Any:
        return super().sendmsg(buffers, ancdata, flags | _DONTWAIT, address)


def note_foreign(sock: Any) -> None:
    """Note that another process has a raw socket: before it is sent there, or when it has come from there."""
    if type(sock) is _RawSocket:
        sock.__class__ = ForeignSocket


def forbid_linger(sock: Any) -> None:
    """Undo what another process may have asked for: that close(2) waits until the peer has everything (SO_LINGER).

    It would wait even where O_NONBLOCK is set. A reset on close, which does not wait, stays asked for.
    """
    with contextlib.suppress(OSError):
        on, seconds = _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.size))
        if on and seconds:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))


def descriptor_for_kernel(sock: Any) -> int:
    """Return a raw socket's descriptor, for splice(2) or sendfile(2).

    These go by O_NONBLOCK alone, so it is set each time, where somebody may have cleared it: 0.3 us, for up to 1 MiB.
    """
    fd: int = sock.fileno()
    if type(sock) is ForeignSocket:
        os.set_blocking(fd, False)
    return fd
