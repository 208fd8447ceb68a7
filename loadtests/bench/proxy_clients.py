"""What stands on both sides of a proxy that is measured: clients that come and go, and their destinations."""

from __future__ import annotations

import selectors
import socket
import struct
import subprocess
import threading
import time

from .measure import CLIENT_CPU, BenchError, prepare
from .proxy_peers import Running
from .starting import PYTHON

ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 1024\r\n\r\n" + b"x" * 1024
REQUEST = b"GET / HTTP/1.0\r\n\r\n"


def greeting(speaks: str, port: int, name: bytes = b"") -> list[tuple[bytes, int]]:
    """What a client says, and how many bytes it gets for that; 0: up to an empty line."""
    if speaks == "socks5":
        where = b"\x03%c%b" % (len(name), name) if name else b"\x01\x7f\0\0\x01"
        return [(b"\x05\x01\x00", 2), (b"\x05\x01\x00" + where + struct.pack("!H", port), 10)]
    if speaks == "http":
        host = name or b"127.0.0.1"
        return [(b"CONNECT %b:%d HTTP/1.1\r\nHost: %b:%d\r\n\r\n" % (host, port, host, port), 0)]
    return []


class Client:
    """One connection after another through a proxy, driven by a selector; counts those that went wrong."""

    def __init__(self, server: Running, target: int, left: list[int], name: bytes) -> None:
        self._server = server
        self._left = left
        self._script = [*greeting(server.speaks, target, name), (REQUEST, -1)]
        self.errors = 0

    def begin(self, selector: selectors.BaseSelector) -> bool:
        """Connect again, unless there were enough connections."""
        if not self._left[0]:
            return False
        self._left[0] -= 1
        self._sock = socket.socket()
        # 250 source addresses: ports that were used a minute ago are still in TIME-WAIT.
        self._sock.bind((f"127.0.0.{2 + self._left[0] % 250}", 0))
        self._sock.connect(("127.0.0.1", self._server.port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setblocking(False)
        self._step = -1
        self._data = b""
        selector.register(self._sock, selectors.EVENT_READ, self)
        self._say()
        return True

    def _say(self) -> None:
        self._step += 1
        self._data = b""
        self._sock.send(self._script[self._step][0])

    def readable(self, selector: selectors.BaseSelector) -> bool:
        """Take what has come; False when there is nothing more to do."""
        wanted = self._script[self._step][1]
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._data += data
        if not data or (wanted < 0 and len(self._data) >= len(ANSWER)):
            if self._data != ANSWER:
                self.errors += 1
            selector.unregister(self._sock)
            self._sock.close()
            return self.begin(selector)
        if (wanted > 0 and len(self._data) >= wanted) or (wanted == 0 and self._data.endswith(b"\r\n\r\n")):
            self._say()
        return True


#: Seconds that one run may take: a proxy that waits for something at each connection would take minutes.
LONGEST_RUN = 8.0


def short_connections(server: Running, target: int, count: int, at_once: int, name: bytes) -> int:
    """Make so many connections, or as many as LONGEST_RUN allows; returns how many there were.

    Raises:
        BenchError: one of them went wrong.
    """
    left = [count]
    give_up = time.monotonic() + LONGEST_RUN
    clients = [Client(server, target, left, name) for _ in range(at_once)]
    with selectors.DefaultSelector() as selector:
        busy = sum(client.begin(selector) for client in clients)
        while busy:
            found = selector.select(20)
            if not found:
                raise BenchError("no answer for 20 seconds")
            if time.monotonic() > give_up:
                count -= left[0]
                left[0] = 0
                give_up = float("inf")
            for key, _ in found:
                busy -= not key.data.readable(selector)
    errors = sum(client.errors for client in clients)
    if errors:
        raise BenchError(f"{errors} of {count} connections were not answered")
    return count


def through(server: Running, target: int) -> socket.socket:
    """A tunnel to the target."""
    sock = socket.create_connection(("127.0.0.1", server.port), 60)
    for said, wanted in greeting(server.speaks, target):
        sock.sendall(said)
        data = b""
        while (len(data) < wanted) if wanted else not data.endswith(b"\r\n\r\n"):
            more = sock.recv(wanted - len(data) if wanted else 1)
            if not more:
                raise BenchError("the proxy closed")
            data += more
    return sock


class ShortTarget:
    """Behind the proxies: answers one request, and closes. A process of its own, on the clients' CPU."""

    SOURCE = """
import socket, sys
answer = bytes.fromhex(sys.argv[1])
with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
    print(listening.getsockname()[1], flush=True)
    while True:
        sock, _ = listening.accept()
        try:
            sock.recv(4096)
            sock.send(answer)
        except OSError:
            pass
        sock.close()
"""

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            [PYTHON, "-c", self.SOURCE, ANSWER.hex()], stdout=subprocess.PIPE, preexec_fn=prepare(CLIENT_CPU)
        )
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Holder:
    """Behind the proxies: accepts, and says nothing."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = int(self._listening.getsockname()[1])
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self._held.append(self._listening.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for sock in self._held:
            sock.close()
