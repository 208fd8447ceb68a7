"""Tunnels through worker processes: both far ends are the test's."""

from __future__ import annotations

import random
import socket
import struct

from kit.patience import SOON
from kit.supervised import Master


def read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(size - len(data), 1 << 20))):
        data += more
    return bytes(data)


class Tunnel:
    """Both far ends of a tunnel through a forwarder, or a proxy.

    Args:
        way: how a proxy is asked for it.
    """

    def __init__(self, master: Master, destination: socket.socket, way: str = "") -> None:
        self.client = master.connect()
        port = destination.getsockname()[1]
        if way == "socks":
            self.client.sendall(b"\5\1\0\5\1\0\1\x7f\0\0\1" + struct.pack("!H", port))
            assert read(self.client, 12)[:4] == b"\5\0\5\0"
        elif way == "http":
            self.client.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert read(self.client, 39) == b"HTTP/1.1 200 Connection established\r\n\r\n"
        self.far = destination.accept()[0]
        self.far.settimeout(SOON)

    def talks(self) -> bool:
        return self.says(self.client, self.far) and self.says(self.far, self.client)

    @staticmethod
    def says(source: socket.socket, sink: socket.socket) -> bool:
        said = random.randbytes(8)
        source.sendall(said)
        return read(sink, 8) == said

    def close(self) -> None:
        self.client.close()
        self.far.close()
