"""TLS on a connection: the layer that a Stream reads from and writes to, and the handshake that leads to it."""

from __future__ import annotations

import _socket
import os
import socket
from ssl import SSLEOFError, SSLWantReadError, SSLWantWriteError, SSLZeroReturnError
from typing import TYPE_CHECKING, Any

from .errors import TruncatedStream
from .lane import Step
from .tls import Credentials, HandshakeFailure, classify_handshake_error

if TYPE_CHECKING:
    from .connection import Connection
    from .stream import Stream

#: What a client gets that speaks no TLS at all: the alert unexpected_message (RFC 8446 sections 5 and 6.2), in a record
#: of its own. OpenSSL sends nothing to such a client.
NOT_TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x0a"

#: Written at once: four records. One call for all of a large answer would tell only at its end that it moves, so that a
#: client that reads steadily would look like one that has stopped.
WRITE_SIZE = 64 * 1024

#: What a client gets that speaks plain HTTP to a TLS port (RFC 9110 section 15.5.1).
PLAIN_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 43\r\n\r\n"
    b"This port speaks TLS. Use https:// instead."
)


class TLSLayer:
    """An encrypted stream's ``io``.

    Args:
        stream: whose socket it encrypts.
        context: an ssl.SSLContext, the standard library's or gevent's.
        report_truncation: an end without close_notify raises TruncatedStream instead of looking like an end.

    Attributes:
        object: the ``_ssl._SSLSocket`` that OpenSSL's state is in.
        server_name: what the client asked for (SNI, RFC 6066 section 3), once an SNI callback has noted it.
        broken: something is missing from what was sent: no close_notify, which would say that all is well.
    """

    __slots__ = ("__weakref__", "_read", "_report_truncation", "_stream", "_write", "broken", "object", "server_name")

    def __init__(self, stream: Stream, context: Any, report_truncation: bool = False) -> None:
        self._stream = stream
        self._report_truncation = report_truncation
        self.server_name: str | None = None
        self.broken = False
        # The raw socket and not a wrapper of it: no Python code between OpenSSL and the system calls, and our own wait.
        # The owner is what an SNI callback gets.
        self.object = context._wrap_socket(stream.sock, server_side=True, owner=self)
        self._read = self.object.read
        self._write = self.object.write

    @property
    def context(self) -> Any:
        """The SSLContext; an SNI callback may assign another one."""
        return self.object.context

    @context.setter
    def context(self, context: Any) -> None:
        self.object.context = context

    def _sslsock(self) -> TLSLayer:
        # gevent's SSLContext hands an SNI callback of the user's what the owner's _sslsock() returns.
        return self

    def pending(self) -> int:
        """Bytes that were decrypted and not read: the socket will not become readable for them."""
        return int(self.object.pending())

    def recv(self, bufsize: int) -> bytes:
        try:
            return self._read(bufsize)  # type: ignore[no-any-return]
        except SSLWantReadError:
            raise BlockingIOError from None
        except OSError as error:
            return b"" if self._is_end(error) else self.recv(bufsize)

    def recv_into(self, buffer: Any, nbytes: int = 0) -> int:
        try:
            return self._read(nbytes or len(buffer), buffer)  # type: ignore[no-any-return]
        except SSLWantReadError:
            raise BlockingIOError from None
        except OSError as error:
            return 0 if self._is_end(error) else self.recv_into(buffer, nbytes)

    def _is_end(self, error: OSError) -> bool:
        """True for the peer's end, False to try again; other errors are raised."""
        if isinstance(error, SSLZeroReturnError):
            return True
        if isinstance(error, SSLEOFError):
            if self._report_truncation:
                raise TruncatedStream("the peer closed without a TLS close_notify") from error
            return True
        if isinstance(error, SSLWantWriteError):
            # A key update (RFC 8446 section 4.6.3) wants to be answered before the next read.
            self._stream.wait_writable()
            return False
        self._stream.fault = error
        raise error

    def send(self, data: Any, flags: int = 0) -> int:
        if flags:
            raise ValueError(f"flags cannot be used on an encrypted connection, got {flags}")
        if not len(data):
            return 0
        if len(data) > WRITE_SIZE:
            data = memoryview(data).cast("B")[:WRITE_SIZE]
        while True:
            try:
                return self._write(data)  # type: ignore[no-any-return]
            except SSLWantWriteError:
                raise BlockingIOError from None
            except SSLWantReadError:
                self._stream.wait_readable(True)
            except (SSLZeroReturnError, SSLEOFError) as error:
                raise BrokenPipeError("the peer has closed the connection") from error
            except OSError as error:
                self._stream.fault = error
                raise

    def handshake(self) -> None:
        """Do the handshake, in a greenlet that waits."""
        while True:
            try:
                self.object.do_handshake()
                return
            except SSLWantReadError:
                self._stream.wait_readable(True)
            except SSLWantWriteError:
                self._stream.wait_writable()

    def close_notify(self) -> None:
        """Tell the peer that nothing more comes (RFC 8446 section 6.1), if it can be told without waiting.

        Nothing can be read afterwards.
        """
        if self.broken:
            return
        try:
            self.object.shutdown()
        except (OSError, ValueError):
            pass  # WantRead: sent, and the peer has not answered yet. Anything else: nobody is left to tell.

    def close_notify_and_read_on(self) -> None:
        """As :meth:`close_notify`, for a half-close.

        The ssl module calls SSL_shutdown twice, and OpenSSL gives up reading when the second finds application data.
        So let it find a socket without input in the place of ours, and pass on what it has written there.
        """
        sock = self._stream.sock
        substitute, record = _socket.socketpair()  # not those of a monkey-patched program
        substitute.setblocking(False)
        record.setblocking(False)
        ours = os.dup(sock.fileno())
        try:
            os.dup2(substitute.fileno(), sock.fileno(), inheritable=False)
            try:
                self.close_notify()
            finally:
                os.dup2(ours, sock.fileno(), inheritable=False)
            sock.send(record.recv(64 * 1024))
        except OSError:
            pass  # as in close_notify
        finally:
            os.close(ours)
            substitute.close()
            record.close()

    def unwrap(self) -> None:
        """End TLS and go on in the clear: send close_notify and wait for the peer's."""
        while True:
            try:
                self.object.shutdown()
                return
            except SSLWantReadError:
                self._stream.wait_readable(True)
            except SSLWantWriteError:
                self._stream.wait_writable()


class HandshakeStep(Step):
    """A TLS handshake under way, in a lane."""

    __slots__ = ("_layer",)

    def __init__(self, connection: Connection, credentials: Credentials) -> None:
        super().__init__(connection)
        self._layer = TLSLayer(connection._stream, credentials.context, credentials.report_truncation)

    def advance(self) -> Any:
        stream = self.connection._stream
        try:
            self._layer.object.do_handshake()
        except SSLWantReadError:
            return stream.reading
        except SSLWantWriteError:
            return stream.writing or stream.make_write_watcher()
        stream.io = stream.tls = self._layer
        return None

    def kind_of(self, error: BaseException) -> str:
        kind = handshake_failure(self.connection._sock, error)
        answer_plain_text(self.connection._sock, kind)
        return kind


def handshake_failure(sock: Any, error: BaseException) -> HandshakeFailure:
    """The kind of a failed handshake, told also from what the client sent behind the five bytes OpenSSL has read."""
    kind = classify_handshake_error(error)
    if kind == "not_tls":
        try:
            rest: bytes = sock.recv(1024, socket.MSG_PEEK)
        except OSError:
            return kind
        # OpenSSL knows GET, POST, HEAD, PUT and CONNECT. RFC 9112 section 3: method, target, version.
        if b" HTTP/" in rest.partition(b"\n")[0]:
            return "http_request"
    return kind


def answer_plain_text(sock: Any, kind: str) -> None:
    """Tell a client that speaks no TLS what is wrong, if it can be told without waiting."""
    answer = {"http_request": PLAIN_HTTP_ANSWER, "not_tls": NOT_TLS_ALERT}.get(kind)
    if answer is not None:
        try:
            sock.send(answer)
            # A close with input unread would reset the connection, and the answer with it.
            sock.recv(64 * 1024)
        except OSError:
            pass
