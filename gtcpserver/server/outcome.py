"""Outcomes: how a connection ended, which counter counts that, and how exceptions that leave a handler are classified.

A `Result` is the one word for an outcome, in the access log, in the counters, and in the report of a stop.
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
from gtcpserver.errors import (
    CAPACITY_ERRNOS,
    ClientRefused,
    DeadlineExceeded,
    EarlyEOF,
    LimitExceeded,
    StartTLSError,
    TruncatedStream,
)
from gtcpserver.proxy_protocol.header import ProxyProtocolError

from .describe import peer
from .time_limits import HandlerTimedOut, TooSlow

log = logging.getLogger("gtcpserver")

#: How a connection ended.
Result = Literal[
    "ok",  # the handler returned
    "idle_closed",  # closed while idle, at a stop or to make room
    "reset",  # the peer had gone: a reset, or an end in the middle of a message
    "timeout",  # nothing moved for too long
    "deadline",  # Connection.deadline
    "handler_timeout",
    "slow",  # min_rate
    "limit",  # LimitExceeded: the client sent more than the protocol allows
    "error",  # the handler failed; detail says how
    "stopped",  # cut by a stop; StopReport.cut
    "killed",  # ended by other code
    "refused",  # by on_connect
    "rejected",  # the server was full
    "client_denied",
    "client_connections",
    "client_rate",
    "store_failure",  # Redis is away, and nobody is to be admitted without it
    "proxy_header",  # missing or malformed, from a balancer; detail says why
    "handshake_failed",  # TLS; detail says why
]

#: The counter of a server for each Result. The others are counted elsewhere: "ok" is the rest of `accepted`, "stopped"
#: is in the report of the stop, limits of clients and failures of admission are counted by kind.
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
    """Return the result that an exception stands for, and a line with its type and text."""
    said = type(error).__name__
    try:
        said += f": {error}" if str(error) else ""
    except Exception:  # the text of an exception of the handler's own may raise
        pass
    return _result_of(error, connection.stream), said


def is_client_error(error: BaseException, connection: Connection) -> bool:
    """Return whether the client caused an exception that left its handler. If not, it is a fault of the handler.

    The client is to blame for an error raised by its own connection: a reset, a timeout, an end in the middle of a
    message, broken TLS. The same error from another connection (a database's, one of ``connect``) or from ``print`` is
    the handler's. An exception raised ``from`` an error of the client counts as the client's, and so does a
    LimitExceeded or EarlyEOF raised by the handler itself.

    Args:
        error: the exception, as given to ``on_error``.
        connection: the connection of the client.

    Example::

        from gtcpserver import Server, is_client_error

        def report(conn, error):
            if not is_client_error(error, conn):
                print("bug:", repr(error))  # bug: ZeroDivisionError('division by zero')

        server = Server("127.0.0.1:5000", handle, on_error=report)
    """
    return _result_of(error, connection.stream) != "error"


def was_raised_by_connection(error: BaseException) -> bool:
    """Return whether a Connection raised the error, the client's or any other."""
    return MARK in error.__dict__


def _result_of(error: BaseException, stream: Stream) -> Result:
    """Return the result if the client's connection raised the error, otherwise "error".

    Exceptions raised ``from`` such an error, and groups of nothing else, count as well. An exception raised in an
    except or finally block (``__context__``) does not: it may be a mistake of the handler.
    """
    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None:
            break
        if isinstance(cause, HandlerTimedOut):
            return "handler_timeout"  # raised by the time limits, whatever the handler was waiting for
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


#: Most causes followed from an exception: they may form a circle.
MOST_CAUSES = 20

# Python 3.10 has no groups.
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", ())

# By raising one of these itself, a handler blames its client.
_SAID_OF_CLIENTS = (LimitExceeded, EarlyEOF, TruncatedStream, ClientRefused)

# The first match counts: classes above may be subclasses of those below.
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

# The routes to a host that vanished may go before its connections time out (ip(7), tcp(7)); ENOTCONN: a connection that
# was reset has no peer any more.
_GONE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN)


def record_fields(connection: Connection, error: BaseException) -> dict[str, Any]:
    """Return the fields of a log record, for logs in JSON."""
    fields = {**log_fields_of(connection), "client": peer(connection), "error": type(error).__name__}
    # `extra` must not contain names of a record's own attributes.
    return {name if name not in RECORD_FIELDS else f"{name}_": value for name, value in fields.items()}


def log_client_error(connection: Connection, error: BaseException) -> None:
    """Write a debug line about what a client did."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", peer(connection), error or type(error).__name__, extra=record_fields(connection, error))


def log_fault(faults: FaultLimiter, connection: Connection, error: BaseException) -> None:
    """Log a fault of a handler with its traceback, unless the same fault was logged too often."""
    left_out = faults.allow(fault_key(type(error), error.__traceback__))
    if left_out is not None:
        also = f" ({left_out} more of these were not printed)" if left_out else ""
        fields = record_fields(connection, error) | {"left_out": left_out}
        log.error("handler for %s failed%s", peer(connection), also, exc_info=error, extra=fields)


#: Errors caused by this system, and by no peer: no memory, no descriptors, a device that cannot be read, an event loop
#: that cannot watch a descriptor (watcher.py: EIO), a filter of seccomp(2) (ENOSYS, EPERM).
SYSTEM_ERRNOS = CAPACITY_ERRNOS | {errno.EIO, errno.ENOSYS, errno.EPERM}


def system_has_failed(error: BaseException) -> bool:
    """Return whether this system failed the call: the connection is intact, and the client waits for the rest."""
    if isinstance(error, ssl.SSLError):
        return False  # its errno is an error number of OpenSSL: 1 is not EPERM
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SYSTEM_ERRNOS)
