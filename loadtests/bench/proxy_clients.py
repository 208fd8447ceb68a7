"""What stands on both sides of a proxy that is measured: clients that come and go, and their destinations."""

from __future__ import annotations

import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

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
    return _drive([Client(server, target, left, name) for _ in range(at_once)], left, count)


def _drive(clients: Sequence[Client | KeptClient], left: list[int], count: int) -> int:
    give_up = time.monotonic() + LONGEST_RUN
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
        raise BenchError(f"{errors} of {count} were not answered")
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

    ANSWER = ANSWER

    def __enter__(self) -> int:
        self._process = subprocess.Popen(
            [PYTHON, "-c", self.SOURCE, self.ANSWER.hex()], stdout=subprocess.PIPE, preexec_fn=prepare(CLIENT_CPU)
        )
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


#: What a browser sends, in absolute form, and what its origin answers.
PAGE_FIELDS = (
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n"
    b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n"
    b"Accept-Language: en-US,en;q=0.5\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
)
PAGE = b"y" * 1024
PAGE_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Tue, 01 Dec 2026 01:00:00 GMT\r\n"
    b"Content-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\nCache-Control: no-store\r\n"
    b'ETag: "6565-400"\r\n\r\n' % len(PAGE)
)


class KeptClient:
    """One request after another through a proxy, on one connection; as `Client` for the rest."""

    def __init__(self, server: Running, target: int, left: list[int]) -> None:
        self._left = left
        where = b"127.0.0.1:%d" % target
        self._request = b"GET http://%b/index.html HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (where, where, PAGE_FIELDS)
        self._sock = socket.create_connection(("127.0.0.1", server.port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""
        self.errors = 0

    def begin(self, selector: selectors.BaseSelector) -> bool:
        selector.register(self._sock, selectors.EVENT_READ, self)
        return self._ask()

    def _ask(self) -> bool:
        """Ask again, unless there were enough requests."""
        if not self._left[0]:
            return False
        self._left[0] -= 1
        self._data = b""
        self._sock.sendall(self._request)
        return True

    def readable(self, selector: selectors.BaseSelector) -> bool:
        data = self._sock.recv(65536)
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if data and not (end and len(body) >= len(PAGE)):
            return True
        if not (head.startswith(b"HTTP/1.1 200 ") and body == PAGE):
            self.errors += 1
            selector.unregister(self._sock)
            return False
        return self._ask()

    def close(self) -> None:
        self._sock.close()


def kept_requests(server: Running, target: int, count: int, at_once: int) -> int:
    """Make so many requests on kept connections, or as many as LONGEST_RUN allows; returns how many there were.

    Raises:
        BenchError: one of them went wrong.
    """
    left = [count]
    with ExitStack() as stack:
        clients = [KeptClient(server, target, left) for _ in range(at_once)]
        for client in clients:
            stack.callback(client.close)
        return _drive(clients, left, count)


class PageOrigin(ShortTarget):
    """Behind the proxies: answers each request with a page of 1 kB, and keeps its connections."""

    SOURCE = """
import selectors, socket, sys
answer = bytes.fromhex(sys.argv[1])
listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
selector = selectors.DefaultSelector()
selector.register(listening, selectors.EVENT_READ)
print(listening.getsockname()[1], flush=True)
heads = {}
while True:
    for key, _ in selector.select():
        sock = key.fileobj
        if sock is listening:
            sock = listening.accept()[0]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sock, selectors.EVENT_READ)
            heads[sock] = b""
            continue
        try:
            data = sock.recv(65536)
            heads[sock] += data
            if heads[sock].endswith(b"\\r\\n\\r\\n"):
                heads[sock] = b""
                sock.sendall(answer)
        except OSError:
            data = b""
        if not data:
            selector.unregister(sock)
            del heads[sock]
            sock.close()
"""

    ANSWER = PAGE_HEAD + PAGE


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
