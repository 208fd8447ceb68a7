"""The errors of this library. Errors of the operating system stay OSErrors."""

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    GreenletExit = BaseException  # greenlet is not typed
else:
    from greenlet import GreenletExit


#: Descriptors or memory ran out on this host, and the same call would fail again at once. No peer is to blame, and no
#: other peer would be reached.
CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class GtcpServerError(Exception):
    r"""Base class of all errors of this library.

    Example::

        from gtcpserver import GtcpServerError

        def handle(conn):
            try:
                conn.sendall(conn.recv_until(b"\n", 100))
            except GtcpServerError as error:  # EarlyEOF or LimitExceeded
                print(error)
    """


class ConfigError(GtcpServerError, ValueError):
    """An invalid option. The message names the field, the value and what was expected.

    Example::

        from gtcpserver import ConfigError, parse_address

        try:
            parse_address("127.0.0.1:70000")
        except ConfigError as error:
            print(error)  # port must be 0 to 65535, got '127.0.0.1:70000'
    """


class LimitExceeded(GtcpServerError, ValueError):
    r"""The peer sent more than the caller allows; the connection is out of sync and should be closed.

    Example::

        from gtcpserver import LimitExceeded

        def handle(conn):
            try:
                line = conn.recv_until(b"\n", 512)
            except LimitExceeded:
                conn.sendall(b"longer than 512 bytes\n")
    """


class FramingError(LimitExceeded):
    """The peer sent what is no frame of the expected format; the connection is out of sync and should be closed.

    Example::

        from gtcpserver import FramingError, Netstrings

        def handle(conn):
            try:
                message = conn.frames(Netstrings()).recv()
            except FramingError:
                conn.sendall(b"15:not a netstring,")
    """


class EarlyEOF(GtcpServerError, EOFError):
    """The peer closed before the whole message had arrived.

    Attributes:
        partial: bytes received until then (b"" if the peer closed between two messages).

    Example::

        from gtcpserver import EarlyEOF

        def handle(conn):
            try:
                conn.recv_exactly(10)
            except EarlyEOF as end:
                print(end.partial)  # b'12345'
    """

    def __init__(self, message: str, partial: bytes = b"") -> None:
        super().__init__(message)
        self.partial = partial


class DeadlineExceeded(GtcpServerError, TimeoutError):
    r"""The time limit of a block of calls, or of a handler, was exceeded.

    Example::

        from gtcpserver import DeadlineExceeded

        def handle(conn):
            try:
                with conn.deadline(0.05):  # seconds
                    conn.recv_exactly(1000)
            except DeadlineExceeded:
                conn.sendall(b"too slow\n")
    """


class TruncatedStream(GtcpServerError, EOFError):
    """A TLS peer closed its connection without a close_notify: the data may be truncated.

    Example::

        from gtcpserver import TruncatedStream

        def handle(conn):
            try:
                while data := conn.recv(65536):
                    file.write(data)
            except TruncatedStream:
                print("perhaps not all of it")
    """


class ClientRefused(GtcpServerError, ConnectionAbortedError):
    """A client named by a balancer's PROXY header exceeds a limit of the server; its connection was reset.

    Attributes:
        reason: as counted in ``ClientLimits.refused``: "client_denied", "client_connections", "client_rate",
            "store_failure".

    Example::

        from gtcpserver import ClientRefused
        from gtcpserver.proxy_protocol import parse_header

        def handle(conn):
            header, size = parse_header(conn.recv(536))
            try:
                conn.note_proxy_header(header)
            except ClientRefused as refusal:
                print(refusal.reason)  # client_denied
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TLSFlood(GtcpServerError, ConnectionAbortedError):
    """A TLS client sends record after record without data, such as key updates. The connection was reset.

    Attributes:
        kind: kind of the last record: "key_update", "alert", "handshake", "change_cipher_spec", "empty", "other".

    Example::

        from gtcpserver import TLSFlood

        def handle(conn):
            try:
                data = conn.recv(65536)
            except TLSFlood as flood:
                print(conn.client_address, flood.kind)
                raise
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class StartTLSError(GtcpServerError):
    """TLS cannot be started on a connection in its present state.

    Example::

        from gtcpserver import StartTLSError

        def handle(conn):
            command = conn.recv(100)
            try:
                conn.start_tls()
            except StartTLSError as error:
                print(error)  # no TLS configuration: give start_tls() one, or the server
    """


class HandedOver(GreenletExit):
    """Raised in a handler whose connection has moved to another worker, where the handler begins anew (``handover``).

    Like GreenletExit a BaseException: ``finally`` blocks run, ``except Exception`` does not see it. The connection is
    closed here; nothing that the handler still does reaches the client.

    Example::

        from gtcpserver import HandedOver

        def handle(conn):
            try:
                with conn.idle():
                    request = conn.recv(1000)
            except HandedOver:
                print("goes on in another worker")
                raise
    """
