"""The errors that are ours. What the operating system says stays an OSError."""


class GtcpServerError(Exception):
    """Root of every error this library raises by itself."""


class ConfigError(GtcpServerError, ValueError):
    """An option that cannot work. The message names the field, the value and what was expected."""


class LimitExceeded(GtcpServerError, ValueError):
    """The peer sent more than the caller allows; the connection is out of step and should be closed."""


class EarlyEOF(GtcpServerError, EOFError):
    """The peer closed before the whole message had come.

    Attributes:
        partial: bytes that had come until then (b"" when the peer closed between two messages).
    """

    def __init__(self, message: str, partial: bytes = b"") -> None:
        super().__init__(message)
        self.partial = partial


class DeadlineExceeded(GtcpServerError, TimeoutError):
    """The time for a block of calls, or for a handler, is used up."""


class TruncatedStream(GtcpServerError, EOFError):
    """A TLS peer closed its connection without saying so (no close_notify): what came may be cut short."""


class ClientRefused(GtcpServerError, ConnectionAbortedError):
    """A client that a balancer has named is beyond a limit of the server; its connection has been reset.

    Attributes:
        reason: as ``ClientLimits.refused`` counts it: "client_denied", "client_connections", "client_rate".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TLSFlood(GtcpServerError, ConnectionAbortedError):
    """A TLS client sends record after record without data, such as key updates. The connection is reset.

    Attributes:
        kind: of the last one: "key_update", "alert", "handshake", "change_cipher_spec", "empty", "other".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class StartTLSError(GtcpServerError):
    """TLS cannot be started on a connection in its present state."""
