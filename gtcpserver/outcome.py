"""Outcome: what an exception that has left a handler is called, in the counters and in the access log."""

from __future__ import annotations

import errno
import logging
import ssl
from typing import Any

from .access_log import Result
from .connection import Connection, log_fields_of
from .errors import DeadlineExceeded, EarlyEOF, LimitExceeded, TruncatedStream
from .logs import RECORD_FIELDS, FaultLimiter, fault_key
from .overseer import HandlerTimedOut, TooSlow
from .stopping import peer

log = logging.getLogger("gtcpserver")

#: Outcome -> the counter of a server that counts it.
COUNTER: dict[Result, str] = {
    "reset": "resets",
    "limit": "limits_exceeded",
    "handler_timeout": "handler_timeouts",
    "slow": "slow_clients",
    "deadline": "timeouts",
    "timeout": "timeouts",
    "error": "handler_errors",
}


def outcome_of(error: BaseException, connection: Connection) -> tuple[Result, str]:
    """Its name, and what it says of itself in one line."""
    said = type(error).__name__
    try:
        said += f": {error}" if str(error) else ""
    except Exception:  # an exception of the handler's own whose text raises another
        pass
    if peer_has_gone(error) or error is connection._stream.fault:
        return "reset", said
    for kind, result in _OUTCOMES:
        if isinstance(error, kind):
            return result, said
    return "error", said


# The first that fits: those above are kinds of those below.
_OUTCOMES: tuple[tuple[type[BaseException], Result], ...] = (
    (LimitExceeded, "limit"),
    (HandlerTimedOut, "handler_timeout"),
    (TooSlow, "slow"),
    (DeadlineExceeded, "deadline"),
    (TimeoutError, "timeout"),
)


def record_fields(connection: Connection, error: BaseException) -> dict[str, Any]:
    """What a log record carries beside its text, for logs in JSON."""
    fields = {**log_fields_of(connection), "client": peer(connection), "error": type(error).__name__}
    # `extra` must not have the names of a record's own attributes.
    return {name if name not in RECORD_FIELDS else f"{name}_": value for name, value in fields.items()}


def log_client_error(connection: Connection, error: BaseException) -> None:
    """Write a debug line about what a client did."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", peer(connection), error or type(error).__name__, extra=record_fields(connection, error))


def log_fault(faults: FaultLimiter, connection: Connection, error: BaseException) -> None:
    """Write a fault of a handler with its traceback, unless too many of the same were written."""
    left_out = faults.allow(fault_key(type(error), error.__traceback__))
    if left_out is not None:
        also = f" ({left_out} more of these were not printed)" if left_out else ""
        fields = record_fields(connection, error) | {"left_out": left_out}
        log.error("handler for %s failed%s", peer(connection), also, exc_info=error, extra=fields)


#: Errors by which this system, and no peer, fails a call: no memory, no descriptors, a device that cannot be read, an
#: event loop that cannot watch a descriptor (watcher.py: EIO), a filter of seccomp(2) (ENOSYS, EPERM).
SYSTEM_ERRNOS = frozenset(
    {errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOSYS, errno.EPERM}
)


def system_has_failed(error: BaseException) -> bool:
    """Whether the connection is as good as before, but for what the handler could not receive or send."""
    if isinstance(error, ssl.SSLError):
        return False  # its errno is a number of OpenSSL's: 1 is no EPERM
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SYSTEM_ERRNOS)


def peer_has_gone(error: BaseException) -> bool:
    """Whether the client is to blame: it has reset the connection, or left in the midst of a message."""
    # The routes to a host that vanished may go before its connections time out (ip(7), tcp(7)).
    return isinstance(error, (ConnectionError, EarlyEOF, TruncatedStream)) or (
        isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
    )
