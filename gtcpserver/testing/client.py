"""connect: clients that let the server run while they wait, and in_thread for clients that cannot."""

from __future__ import annotations

import socket as _stdlib_socket
import ssl
import struct
from collections.abc import Callable
from ipaddress import ip_address
from types import TracebackType
from typing import Any, TypeVar

import gevent
import gevent.socket
from gevent.threadpool import ThreadPool

from gtcpserver.address import parse_address
from gtcpserver.connection.connect import connect as connect_to
from gtcpserver.errors import ConfigError
from gtcpserver.proxy_protocol.header import ProxyHeader
from gtcpserver.server.server import Server
from gtcpserver.tls.info import is_unannounced_end

Result = TypeVar("Result")

#: Seconds for anything that should happen at once; long enough for a busy machine.
SOON = 15.0

_PIECE = 64 * 1024


class Client:
    """The client side of a connection, plain or TLS. A ``with`` block closes it.

    Its calls wait on the event loop, so a server in the same thread runs meanwhile; the timeout applies to each call.

    Args:
        socket: a connected gevent socket.
        tls: context of the client side, or None. The constructor does the handshake.
        server_hostname: the name that the certificate must have, also sent as SNI.

    Attributes:
        socket: for anything without a method here. Data sent through it is not encrypted.

    Raises (the calls):
        TimeoutError: nothing arrived, or nothing could be sent, for the timeout.
        ConnectionError: a reset, as the system reports it.

    Example::

        from gtcpserver.testing import connect, serving

        with serving(echo) as server, connect(server) as client:
            client.sendall(b"hello")
            client.half_close()
            print(client.recv_all())  # b'hello'
    """

    def __init__(
        self, socket: Any, *, tls: ssl.SSLContext | None = None, server_hostname: str | None = "localhost"
    ) -> None:
        self.socket = socket
        self._kept = b""
        self._tls: ssl.SSLObject | None = None
        if tls is not None:
            # Over memory instead of the socket: works with contexts of both ssl and gevent.ssl.
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
            self._tls_call(self._tls.do_handshake)

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS object (``version()``, ``getpeercert()`` ...); None on a plain connection."""
        return self._tls

    @property
    def address(self) -> Any:
        """Address of this side, which the handler sees as ``client_address``."""
        return self.socket.getsockname()

    def settimeout(self, seconds: float | None) -> None:
        """Set the timeout of each call, in seconds; None waits indefinitely."""
        self.socket.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Send all of ``data``."""
        if self._tls is None:
            self.socket.sendall(data)
        elif data:
            self._tls_call(self._tls.write, data)

    def recv(self, size: int = _PIECE) -> bytes:
        """Receive at most ``size`` bytes; b"" when the server has closed its side."""
        if self._kept:
            data, self._kept = self._kept[:size], self._kept[size:]
            return data
        if self._tls is None:
            received: bytes = self.socket.recv(size)
            return received
        try:
            return bytes(self._tls_call(self._tls.read, size))
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLZeroReturnError) or is_unannounced_end(error):
                return b""
            raise

    def recv_exactly(self, size: int) -> bytes:
        """Receive exactly ``size`` bytes. Raises EOFError if the server closed first."""
        parts: list[bytes] = []
        missing = size
        while missing:
            part = self.recv(missing)
            if not part:
                raise EOFError(f"the server closed after {size - missing} of {size} bytes: {b''.join(parts)[:200]!r}")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def recv_until(self, separator: bytes = b"\n") -> bytes:
        """Receive up to and including ``separator``. Raises EOFError if the server closed first."""
        data, searched = bytearray(), 0
        while (found := data.find(separator, searched)) < 0:
            searched = max(0, len(data) - len(separator) + 1)
            part = self.recv()
            if not part:
                raise EOFError(f"the server closed before {separator!r}, after {bytes(data[:200])!r}")
            data += part
        end = found + len(separator)
        self.unread(bytes(data[end:]))
        return bytes(data[:end])

    def recv_all(self) -> bytes:
        """Receive everything until the server closes its side."""
        parts = []
        while part := self.recv():
            parts.append(part)
        return b"".join(parts)

    def unread(self, data: bytes) -> None:
        """Give back bytes already read: the next call gets them first."""
        self._kept = data + self._kept

    def half_close(self) -> None:
        """End the sending side (FIN); answers can still be read."""
        self.socket.shutdown(_stdlib_socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a reset (RST): the server's next read or write is a ConnectionError."""
        self.socket.setsockopt(_stdlib_socket.SOL_SOCKET, _stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close. Idempotent."""
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _tls_call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                result = call(*arguments)
                self._send_encrypted()
                return result
            except ssl.SSLWantReadError:
                self._send_encrypted()
                data = self.socket.recv(_PIECE)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLError:
                self._send_encrypted()  # the alert with the reason
                raise

    def _send_encrypted(self) -> None:
        data = self._outgoing.read()
        if data:
            self.socket.sendall(data)


def connect(
    server: Server | str,
    *,
    tls: ssl.SSLContext | None = None,
    server_hostname: str | None = "localhost",
    proxy: ProxyHeader | str | None = None,
    timeout: float | None = SOON,
    receive_buffer: int | None = None,
) -> Client:
    r"""Connect to a server, in this thread or elsewhere.

    Args:
        server: a started Server, or an address ("127.0.0.1:5000", "[::1]:5000", "unix:/run/x.sock").
        tls: context for an encrypted connection that trusts the server, such as ``certificates().client``.
        server_hostname: the name in the server's certificate.
        proxy: PROXY header to send first, as a balancer does: a ProxyHeader, or the address of the client to name
            ("192.0.2.7:40000", "[2001:db8::7]:40000").
        timeout: seconds for each call; None waits indefinitely.
        receive_buffer: bytes (SO_RCVBUF, set before connecting); small for a client that does not read.

    Raises:
        ConfigError: an invalid address.
        OSError: no connection, or no TLS (ssl.SSLError).

    Example::

        from gtcpserver.testing import connect

        with connect("10.0.0.5:7000", timeout=5) as client:
            client.sendall(b"hello\n")
            print(client.recv_until(b"\n"))  # b'hello\n'
    """
    target = server if isinstance(server, str) else server.address
    parsed = parse_address(target)
    if parsed.kind == "tcp" and parsed.host == "*":
        target = f"127.0.0.1:{parsed.port}"
    header = None if proxy is None else _header(proxy).to_bytes()
    # Our connection is a gevent socket even if the program is not patched.
    sock = _connect_small(target, timeout, receive_buffer) if receive_buffer else connect_to(target, timeout)
    sock.settimeout(timeout)
    try:
        if header is not None:
            sock.sendall(header)
        return Client(sock, tls=tls, server_hostname=server_hostname)
    except BaseException:
        sock.close()
        raise


def in_thread(function: Callable[..., Result], *arguments: Any, timeout: float | None = SOON) -> Result:
    r"""Run a function in a native thread while the event loop of this one runs on; return its result.

    For clients that block: in a program that is not monkey-patched, the standard library's sockets and everything built
    on them. Several at once: ``gevent.spawn(in_thread, function)``.

    Args:
        function: called in the thread.
        *arguments: arguments of the function.
        timeout: seconds; None waits indefinitely.

    Raises:
        TimeoutError: the function did not return in time. (The thread goes on: threads cannot be ended.)
        Exception: any exception from the function.

    Example::

        import urllib.request
        from gtcpserver import from_wsgi
        from gtcpserver.testing import in_thread, serving

        def test_application():
            with serving(from_wsgi(application)) as server:
                response = in_thread(urllib.request.urlopen, f"http://127.0.0.1:{server.port}/")
                assert response.read() == b"Hello\n"
    """
    threads = ThreadPool(1)
    job = threads.spawn(function, *arguments)
    with gevent.Timeout(timeout, TimeoutError(f"{function!r} has not returned within {timeout} seconds")):
        job.wait()
    threads.kill()
    result: Result = job.get()
    return result


def _header(proxy: ProxyHeader | str) -> ProxyHeader:
    if isinstance(proxy, ProxyHeader):
        return proxy
    parsed = parse_address(proxy)
    try:
        ip = ip_address(parsed.host)
    except ValueError:
        raise ConfigError(f'proxy must be a ProxyHeader, or "ip:port", got {proxy!r}') from None
    return ProxyHeader((ip, parsed.port), (ip_address("::1" if ip.version == 6 else "127.0.0.1"), 1))


def _connect_small(target: str, timeout: float | None, size: int) -> Any:
    parsed = parse_address(target)
    if parsed.kind != "tcp":
        raise ConfigError(f"receive_buffer is for TCP, the server listens at {target!r}")
    family = _stdlib_socket.AF_INET6 if ":" in parsed.host else _stdlib_socket.AF_INET
    sock = gevent.socket.socket(family, _stdlib_socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        # Before connecting, which negotiates the window (tcp(7)).
        sock.setsockopt(_stdlib_socket.SOL_SOCKET, _stdlib_socket.SO_RCVBUF, size)
        sock.connect((parsed.host, parsed.port))
    except BaseException:
        sock.close()
        raise
    return sock
