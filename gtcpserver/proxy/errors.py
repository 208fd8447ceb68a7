"""What goes wrong between a proxy and its clients."""

from __future__ import annotations

import errno

from gtcpserver.errors import ConfigError, GtcpServerError

#: The `errno` of a failure to connect because packets took too many hops. The system says EHOSTUNREACH, as of a host
#: that is not there; ETIME is nothing else's.
TTL_EXPIRED = errno.ETIME


class ProtocolError(GtcpServerError):
    """A client's bytes break the protocol it speaks.

    Attributes:
        reply: what the protocol wants to be sent before the connection is closed; b"" for nothing.
    """

    def __init__(self, message: str, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


class LimitReached(OSError):
    """The client, or its user, has too many connections, or too many attempts to connect are under way."""


class BadTarget(GtcpServerError):
    """A destination that is not one: not a host name, not an address, not a port."""


class RuleError(ConfigError):
    """A rule that cannot be read; the message names the word, and what was expected."""
