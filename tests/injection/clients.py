"""Conversations with the servers under test: plain blocking clients, each in a thread of its own, and an origin server.

A conversation ends in one of four ways. Only the first two are right; what broke must be seen to have broken.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

#: Seconds in which a client must have come to an end, once no call fails any more.
PATIENCE = 8.0

BLOCK = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(256)) * 8
SMALL = 1000
BIG = 1_500_000


class How(enum.Enum):
    SERVED = "served"
    FAILED = "failed visibly"
    CUT = "cut, and it looks complete"
    HANGS = "hangs"


@dataclass(frozen=True)
class Outcome:
    client: str
    how: How
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.client}: {self.how.value}{' (' + self.detail + ')' if self.detail else ''}"


class Cut(Exception):
    """The end came in order, and too early; or what came is not what was sent."""


class Refused(Exception):
    """An answer that says that it failed."""


def pattern(size: int) -> bytes:
    return (BLOCK * (size // len(BLOCK) + 1))[:size]


def run(name: str, conversation: Callable[[], None]) -> Outcome:
    try:
        conversation()
    except Cut as error:
        return Outcome(name, How.CUT, str(error))
    except TimeoutError:
        return Outcome(name, How.HANGS)
    except (OSError, Refused) as error:
        return Outcome(name, How.FAILED, str(error))
    return Outcome(name, How.SERVED)


def connect(port: int, patience: float = PATIENCE) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(patience)
    try:
        sock.connect(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return sock


def receive(sock: socket.socket, size: int, what: str = "answer") -> bytes:
    """Exactly ``size`` bytes. Raises Cut if the connection ends in order before."""
    parts, left = [], size
    while left:
        data = sock.recv(min(left, 1 << 18))
        if not data:
            raise Cut(f"{size - left} of {size} bytes of the {what}, then an orderly end")
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def receive_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 18):
        parts.append(data)
    return b"".join(parts)


def check(got: bytes, wanted: bytes) -> None:
    if got != wanted:
        what = "other bytes" if len(got) == len(wanted) else f"{len(got)} of {len(wanted)} bytes"
        raise Cut(f"{what}, then an orderly end")


class _Sending(threading.Thread):
    """Sends beside a client that receives; then it half-closes."""

    def __init__(self, sock: socket.socket, data: bytes) -> None:
        super().__init__(daemon=True)
        self._sock, self._data = sock, data
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._sock.sendall(self._data)
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._error = error

    def end(self) -> None:
        """Raise what it has met: the kernel tells a reset only once, and the receiver sees an orderly end then."""
        self.join(PATIENCE)
        if self._error is not None:
            raise self._error


# -- echo ------------------------------------------------------------------------------------------------------------


def ping(sock: socket.socket, number: int = 3) -> None:
    for _ in range(number):
        sock.sendall(b"ping\n")
        # An end before the first byte of an answer is visible: the client knows that none has come.
        first = sock.recv(5)
        if not first:
            raise Refused("closed without an answer")
        check(first + (receive(sock, 5 - len(first)) if len(first) < 5 else b""), b"ping\n")


def echo_small(port: int) -> None:
    with connect(port) as sock:
        ping(sock)


def echo_half_close(port: int) -> None:
    """The answer ends with the connection: what is missing would not be noticed."""
    with connect(port) as sock:
        data = pattern(BIG)
        sending = _Sending(sock, data)
        got = receive_all(sock)
        if got != data:
            sending.end()
        check(got, data)


def tls_context(certificate: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    return context


def tls_small(port: int, context: ssl.SSLContext) -> None:
    with connect(port) as plain, context.wrap_socket(plain, suppress_ragged_eofs=False) as sock:
        ping(sock)


def tls_big(port: int, context: ssl.SSLContext) -> None:
    with connect(port) as plain, context.wrap_socket(plain, suppress_ragged_eofs=False) as sock:
        # In turns: a TLS socket of Python's is not for two threads.
        for _ in range(12):
            data = pattern(50_000)
            sock.sendall(data)
            check(receive(sock, len(data)), data)


# -- HTTP, and an origin server --------------------------------------------------------------------------------------


def head_of(sock: socket.socket) -> tuple[bytes, bytes]:
    """The head of a message, and what came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(1 << 16)
        if not more:
            raise Refused("closed within the head" if data else "closed without an answer")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def get(sock: socket.socket, path: str, size: int, extra: str = "", version: str = "1.1") -> None:
    """One request. A body that ends too early is cut, unless the head had told its length."""
    sock.sendall(f"GET {path} HTTP/{version}\r\nHost: localhost\r\n{extra}\r\n".encode())
    head, body = head_of(sock)
    status = head.split(b" ", 2)[1]
    if not status.startswith(b"2"):
        raise Refused(f"status {status.decode()}")
    length = _length(head)
    if length is not None:
        if length != size:
            raise Cut(f"Content-Length {length} instead of {size}")
        while len(body) < length:
            more = sock.recv(1 << 18)
            if not more:
                raise Refused(f"{len(body)} of {length} bytes that were told")
            body += more
    elif b"chunked" in head.lower():
        body = _chunked(sock, body)
    else:
        body += receive_all(sock)
    check(body, pattern(size))


def _length(head: bytes) -> int | None:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return None


def _chunked(sock: socket.socket, data: bytes) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in data:
            more = sock.recv(1 << 18)
            if not more:
                raise Refused("closed within a chunked body")
            data += more
        size, _, data = data.partition(b"\r\n")
        wanted = int(size, 16) + 2
        while len(data) < wanted:
            more = sock.recv(1 << 18)
            if not more:
                raise Refused("closed within a chunk")
            data += more
        body, data = body + data[: wanted - 2], data[wanted:]
        if wanted == 2:
            return body


def download(port: int, size: int = BIG) -> None:
    """A body that ends with the connection."""
    with connect(port) as sock:
        get(sock, f"/{size}", size, version="1.0")


def upload(port: int) -> None:
    """A body that ends with a half-close; the origin server answers with its length and digest."""
    with connect(port) as sock:
        _upload(sock)


def _upload(sock: socket.socket) -> None:
    data = pattern(BIG)
    sending = _Sending(sock, f"PUT /{len(data)} HTTP/1.0\r\n\r\n".encode() + data)
    head, body = head_of(sock)
    body += receive_all(sock)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise Refused(head.split(b"\r\n")[0].decode())
    digest = hashlib.sha256(data).hexdigest().encode()
    if body != digest:
        sending.end()
    check(body, digest)


def files_big(port: int) -> None:
    with connect(port) as sock:
        get(sock, "/big", BIG, "Connection: close\r\n")


def files_old(port: int) -> None:
    with connect(port) as sock:
        get(sock, "/big", BIG, version="1.0")


def files_keep_alive(port: int) -> None:
    with connect(port) as sock:
        for _ in range(3):
            get(sock, "/small", SMALL)


def proxy_forward(port: int, origin: int) -> None:
    with connect(port) as sock:
        get(sock, f"http://127.0.0.1:{origin}/{BIG}", BIG, "Connection: close\r\n")


def proxy_connect(port: int, origin: int) -> None:
    with connect(port) as sock:
        sock.sendall(f"CONNECT 127.0.0.1:{origin} HTTP/1.1\r\nHost: 127.0.0.1:{origin}\r\n\r\n".encode())
        head, rest = head_of(sock)
        if b" 200 " not in head.split(b"\r\n")[0] or rest:
            raise Refused(head.split(b"\r\n")[0].decode())
        get(sock, f"/{BIG}", BIG, version="1.0")


def proxy_socks(port: int, origin: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\x05\x01\x00")
        _exactly(sock, 2)
        sock.sendall(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + origin.to_bytes(2, "big"))
        answer = _exactly(sock, 10)
        if answer[1]:
            raise Refused(f"SOCKS reply {answer[1]}")
        _upload(sock)


def _exactly(sock: socket.socket, size: int) -> bytes:
    try:
        return receive(sock, size)
    except Cut:
        raise Refused("closed before the reply") from None


@dataclass
class Origin:
    """The server behind a forwarder or proxy: GET /N answers N bytes, PUT /N takes N bytes up to the end.

    Attributes:
        cut: uploads that ended in order before all of them had come.
    """

    port: int = 0
    cut: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, Refused):
            client.settimeout(2 * PATIENCE)
            head, body = head_of(client)
            method, path, _ = head.split(b"\r\n")[0].split(b" ")
            size = int(path[1:])
            answer = pattern(size)
            if method == b"PUT":
                body += receive_all(client)
                if len(body) != size:
                    self.cut.append(f"{len(body)} of {size} bytes of an upload, then an orderly end")
                answer = hashlib.sha256(body).hexdigest().encode()
            client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + answer)
            client.shutdown(socket.SHUT_WR)
            client.recv(1)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
