"""Packets where Unix sockets have none: on systems without SOCK_SEQPACKET, such as macOS.

Each packet follows its length on a stream. As a socket of packets, it sends a packet whole or not at all, and reads no
more than one: an event of the socket tells of the next.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gtcpserver.linux import IS_LINUX

_LENGTH = struct.Struct("=I")

#: Bytes of the largest packet; a longer one is none of ours.
MOST = 1 << 20

#: Bytes asked for: macOS has 8 KiB by default.
_BUFFER = 256 * 1024

Ancillary = list[tuple[int, int, bytes]]


def packets(sock: socket.socket) -> socket.socket:
    """Return what sends and receives packets on this socket, of the kind `linux.PACKETS`."""
    return sock if IS_LINUX else PacketStream(sock)  # type: ignore[return-value]


class PacketStream:
    """Packets on a stream, with those methods of a socket that a channel uses.

    Args:
        sock: not blocking; the object owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._got = bytearray()
        self._ancillary: Ancillary = []
        self._rest = b""
        self._under_way: bytes | None = None
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
            except OSError:
                pass  # with small ones, large packets take several attempts

    def fileno(self) -> int:
        return self._sock.fileno()

    def detach(self) -> int:
        return self._sock.detach()

    def close(self) -> None:
        self._sock.close()

    def sendmsg(self, buffers: Iterable[bytes], ancillary: Iterable[tuple[int, int, bytes]] = ()) -> int:
        """Send a packet.

        Raises:
            BlockingIOError: there is no room; the same packet is to be sent again. A part of it may be on its way.
            OSError: as sendmsg(2).
        """
        data = b"".join(buffers)
        while self._rest:
            self._rest = self._rest[self._sock.send(self._rest) :]
        under_way, self._under_way = self._under_way, None
        if data == under_way:
            return len(data)
        packet = _LENGTH.pack(len(data)) + data
        self._rest = packet[self._sock.sendmsg([packet], list(ancillary)) :]
        if self._rest:
            self._under_way = data
            raise BlockingIOError
        return len(data)

    def recv(self, size: int) -> bytes:
        """Receive a packet; b"": the end. Raises OSError: as recv(2)."""
        return self._receive(size, self._sock.recv)

    def recvmsg(self, size: int, space: int = 0, flags: int = 0) -> tuple[bytes, Ancillary, int, Any]:
        """Receive a packet and its ancillary data. Raises OSError: as recvmsg(2)."""

        def read(count: int) -> bytes:
            data, ancillary, _, _ = self._sock.recvmsg(count, space, flags)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    _close_on_exec(content)
            self._ancillary += ancillary
            return data

        packet = self._receive(size, read)
        ancillary, self._ancillary = self._ancillary, []
        return packet, ancillary, 0, None

    def _receive(self, size: int, read: Callable[[int], bytes]) -> bytes:
        while True:
            whole = _LENGTH.size
            if len(self._got) >= whole:
                whole += _LENGTH.unpack_from(self._got)[0]
            if whole > MOST:
                return b""
            if len(self._got) == whole > _LENGTH.size:
                packet = bytes(self._got[_LENGTH.size :])
                self._got.clear()
                return packet[:size]
            piece = read(whole - len(self._got))
            if not piece:
                return b""
            self._got += piece


def _close_on_exec(content: bytes) -> None:
    fds: Sequence[int] = struct.unpack(f"={len(content) // 4}i", content[: len(content) // 4 * 4])
    for fd in fds:
        os.set_inheritable(fd, False)
