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
    """Base class of all errors of this library."""


class ConfigError(GtcpServerError, ValueError):
    """An invalid option. The message names the field, the value and what was expected."""


class LimitExceeded(GtcpServerError, ValueError):
    """The peer sent more than the caller allows; the connection is out of sync and should be closed."""


class FramingError(LimitExceeded):
    """The peer sent what is no frame of the expected format; the connection is out of sync and should be closed."""


class EarlyEOF(GtcpServerError, EOFError):
    """The peer closed before the whole message had arrived.

    Attributes:
        partial: bytes received until then (b"" if the peer closed between two messages).
    """

    def __init__(self, message: str, partial: bytes = b"") -> None:
        super().__init__(message)
        self.partial = partial


class DeadlineExceeded(GtcpServerError, TimeoutError):
    """The time limit of a block of calls, or of a handler, was exceeded."""


class TruncatedStream(GtcpServerError, EOFError):
    """A TLS peer closed its connection without a close_notify: the data may be truncated."""


class ClientRefused(GtcpServerError, ConnectionAbortedError):
    """A client named by a balancer's PROXY header exceeds a limit of the server; its connection was reset.

    Attributes:
        reason: as counted in ``ClientLimits.refused``: "client_denied", "client_connections", "client_rate",
            "store_failure".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TLSFlood(GtcpServerError, ConnectionAbortedError):
    """A TLS client sends record after record without data, such as key updates. The connection was reset.

    Attributes:
        kind: kind of the last record: "key_update", "alert", "handshake", "change_cipher_spec", "empty", "other".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class StartTLSError(GtcpServerError):
    """TLS cannot be started on a connection in its present state."""


class HandedOver(GreenletExit):
    """Raised in a handler whose connection has moved to another worker, where the handler begins anew (``handover``).

    Like GreenletExit a BaseException: ``finally`` blocks run, ``except Exception`` does not see it. The connection is
    closed here; nothing that the handler still does reaches the client.
    """
