"""Errors between a proxy and its clients."""

from __future__ import annotations

import errno
from datetime import datetime
from typing import TYPE_CHECKING

from gtcpserver.errors import ConfigError, GtcpServerError

if TYPE_CHECKING:
    from .record import Result

#: The `errno` of a connection attempt that failed because packets took too many hops. The system says EHOSTUNREACH, as
#: for a missing host; ETIME is not used by anything else.
TTL_EXPIRED = errno.ETIME


class ProtocolError(GtcpServerError):
    """A client's bytes violate the protocol it speaks.

    Attributes:
        reply: bytes to send before the connection is closed, as the protocol requires; b"" for none.
    """

    def __init__(self, message: str, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


class Cut(BaseException):
    """The connection ends for a reason outside of its protocol.

    Raised in the greenlet that waits for somebody else; no ``except Exception`` on the way may stop it.

    Attributes:
        result: how the access log calls the reason; the message is its detail.
    """

    def __init__(self, result: Result, why: str) -> None:
        super().__init__(why)
        self.result = result


class LimitReached(OSError):
    """The client, or its user, has too many connections or too many connection attempts in progress."""


class QuotaUsedUp(LimitReached):
    """The user has moved as many bytes as it may in this day or month.

    Attributes:
        why: the quota, for the log.
        until: when that ends.
    """

    def __init__(self, why: str, until: datetime) -> None:
        super().__init__(errno.EDQUOT, why)
        self.why = why
        self.until = until


class BadTarget(GtcpServerError):
    """An invalid destination: not a host name, not an address, not a port."""


class Denied(GtcpServerError):
    """A rule denies it; the message names the rule, for the log and not for the client."""


class RuleError(ConfigError):
    """A rule that cannot be parsed; the message has the word, and what was expected."""


class UpstreamError(OSError):
    """The other proxy did not connect; `errno` says why, as if it were our own connection."""


class UpstreamUnreachable(UpstreamError):
    """The other proxy itself cannot be reached: trying another address of the destination is of no use."""
