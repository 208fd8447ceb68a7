"""How a connection ends: what it is called, which counter counts it, and what an exception that has left a handler is.

A `Result` is the one word for it: in the access log, in the counters, and in what a stop cuts.
"""

from __future__ import annotations

import builtins
import errno
import logging
import ssl
from typing import Any, Literal

from gevent.timeout import Timeout

from gtcpserver.connection.connection import Connection, log_fields_of
from gtcpserver.connection.stream import MARK, Stream
from gtcpserver.diagnostics.logs import RECORD_FIELDS, FaultLimiter, fault_key
from gtcpserver.errors import ClientRefused, DeadlineExceeded, EarlyEOF, LimitExceeded, StartTLSError, TruncatedStream
from gtcpserver.proxy_protocol.header import ProxyProtocolError

from .describe import peer
from .time_limits import HandlerTimedOut, TooSlow

log = logging.getLogger("gtcpserver")

#: How a connection ends.
Result = Literal[
    "ok",  # the handler has returned
    "idle_closed",  # it was idle, and was closed at a stop or to make room
    "reset",  # the peer had gone: a reset, or an end in the midst of a message
    "timeout",  # nothing moved for too long
    "deadline",  # Connection.deadline
    "handler_timeout",
    "slow",  # min_rate
    "limit",  # LimitExceeded: the client sent more than the protocol allows
    "error",  # the handler failed; detail says how
    "stopped",  # cut by a stop; StopReport.cut
    "killed",  # the same, by other code
    "refused",  # on_connect said so
    "rejected",  # the server was full
    "client_denied",
    "client_connections",
    "client_rate",
    "proxy_header",  # none came from a balancer, or a bad one; detail says why
    "handshake_failed",  # of TLS; detail says why
]

#: Result -> the counter of a server that counts it. Those without one are counted elsewhere: "ok" is the rest of
#: `accepted`, "stopped" is in the report of the stop, the limits of clients and failures of admission by their kind.
COUNTER: dict[Result, str] = {
    "idle_closed": "idle_closed",
    "reset": "resets",
    "limit": "limits_exceeded",
    "handler_timeout": "handler_timeouts",
    "slow": "slow_clients",
    "deadline": "timeouts",
    "timeout": "timeouts",
    "error": "handler_errors",
    "refused": "refused",
    "rejected": "rejected",
}


def outcome_of(error: BaseException, connection: Connection) -> tuple[Result, str]:
    """Its name, and what it says of itself in one line."""
    said = type(error).__name__
    try:
        said += f": {error}" if str(error) else ""
    except Exception:  # an exception of the handler's own whose text raises another
        pass
    return _result_of(error, connection.stream), said


def is_client_error(error: BaseException, connection: Connection) -> bool:
    """Whether what a handler has raised is its client's doing, which is counted, and not a fault of the handler.

    It is where this connection has raised it: a reset, a timeout, the end in the midst of a message, broken TLS. The
    same from another connection (a database's, one of ``connect``) or from ``print`` is the handler's. An error that
    the handler raises ``from`` one of the client's is the client's as well, and so is a LimitExceeded or EarlyEOF that
    it raises by itself.

    Args:
        error: what ``on_error`` is called with.
        connection: the client's.
    """
    return _result_of(error, connection.stream) != "error"


def was_raised_by_connection(error: BaseException) -> bool:
    """Whether a Connection has raised it, the client's or any other."""
    return MARK in error.__dict__


def _result_of(error: BaseException, stream: Stream) -> Result:
    """What the client has done, if its connection has raised the error; otherwise "error".

    Also where the error is another that was raised ``from`` it, or a group of nothing else. Not so for an exception of
    an except or finally block (``__context__``): it has not said that it means the client, and may be a mistake.
    """
    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None:
            break
        if isinstance(cause, HandlerTimedOut):
            return "handler_timeout"  # thrown by the time limits, whatever the handler waits for
        if isinstance(cause, _GROUP):
            results = [_result_of(member, stream) for member in cause.exceptions]
            return results[0] if "error" not in results else "error"
        said_by_handler = isinstance(cause, _SAID_OF_CLIENTS) and not was_raised_by_connection(cause)
        if said_by_handler or stream.has_raised(cause):
            return _of_client(cause)
        cause = cause.__cause__
    return "error"


def _of_client(error: BaseException) -> Result:
    for kind, result in _OUTCOMES:
        if isinstance(error, kind):
            return result
    return "reset" if isinstance(error, OSError) and error.errno in _GONE else "error"


#: Errors that were raised from one another are followed so far: they may form a circle.
MOST_CAUSES = 20

# Python 3.10 has none.
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", ())

# A handler that raises one of these by itself says so of its client.
_SAID_OF_CLIENTS = (LimitExceeded, EarlyEOF, TruncatedStream, ClientRefused)

# The first that fits: those above are kinds of those below.
_OUTCOMES: tuple[tuple[type[BaseException], Result], ...] = (
    (LimitExceeded, "limit"),
    (TooSlow, "slow"),
    (DeadlineExceeded, "deadline"),
    (TimeoutError, "timeout"),
    (Timeout, "timeout"),
    (ConnectionError, "reset"),
    (EarlyEOF, "reset"),
    (TruncatedStream, "reset"),
    (StartTLSError, "reset"),
    (ProxyProtocolError, "reset"),
    (ssl.SSLError, "reset"),
)

#: The routes to a host that vanished may go before its connections time out (ip(7), tcp(7)); a connection that was
#: reset has no peer any more.
_GONE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN)


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
