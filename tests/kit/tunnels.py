"""Tunnels through servers of one process: both far ends are the test's."""

from __future__ import annotations

import random
import socket
import struct
from typing import Any

import gevent
from gevent import socket as gevent_socket

from gtcpserver import connect, relay
from kit.patience import SOON


class Tunnel:
    """The client's socket and the destination's."""

    def __init__(self, client: Any, far: Any) -> None:
        self.client = client
        self.far = far

    def close(self) -> None:
        self.client.close()
        self.far.close()

    def talks(self) -> bool:
        """Return whether bytes go both ways."""
        for source, sink in ((self.client, self.far), (self.far, self.client)):
            said = random.randbytes(8)
            source.sendall(said)
            if read(sink, 8) != said:
                return False
        return True


class Destination:
    """A listening socket that accepts nobody by itself."""

    def __init__(self) -> None:
        self.sock = gevent_socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.sock.listen(100)
        self.address = f"127.0.0.1:{self.sock.getsockname()[1]}"

    def tunnel(self, server: Any, small: bool = False) -> Tunnel:
        """Open one through a server; with `small` its ends hold few bytes that they have not read."""
        client = gevent_socket.socket()
        if small:
            for sock in (client, self.sock):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.settimeout(SOON)
        client.connect(("127.0.0.1", server.port))
        self.sock.settimeout(SOON)
        far = self.sock.accept()[0]
        far.settimeout(SOON)
        return Tunnel(client, far)


def relaying(address: str, results: Any = None, small: bool = False, swapped: bool = False, **options: Any) -> Any:
    """Return a handler that relays to an address, and can go on with what has come from another worker.

    Args:
        small: have bytes wait in the relay as soon as an end does not read.
        swapped: name the destination first.
    """

    def handle(conn: Any) -> None:
        with conn.relayed_to or connect(address) as upstream:
            if small:
                for sock in (conn, upstream):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sides = (upstream, conn) if swapped else (conn, upstream)
            result = relay(*sides, handover=True, **options)
        if results is not None:
            results.append(result)

    return handle


class Reader:
    """Reads what a socket has without waiting."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.got = bytearray()
        self.heard_end = False

    def read(self, size: int = 1 << 20) -> bool:
        """Read some; return whether there may be more."""
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return False
        self.got += data
        self.heard_end = self.heard_end or not data
        return bool(data)

    def read_all(self) -> bool:
        """Read what is there; return whether the end was heard."""
        while self.read():
            pass
        return self.heard_end


def read(sock: Any, size: int) -> bytes:
    data = bytearray()
    with gevent.Timeout(SOON):
        while len(data) < size and (more := sock.recv(min(size - len(data), 1 << 20))):
            data += more
    return bytes(data)


def reset(sock: Any) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: Any) -> bytes:
    return read(sock, 1 << 40)
