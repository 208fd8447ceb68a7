"""What a server tells of itself: a snapshot of its counters, and the report of its stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from gtcpserver.plural import counted


@dataclass(frozen=True, slots=True)
class ServerStats:
    """A snapshot of a server's counters. All count from the start of the server; times are seconds.

    Attributes:
        accepted: connections accepted.
        active: connections open now (handler running or idle; not those that linger after their handler).
        idle: of these, waiting between two requests (``Connection.idle``).
        lingering: handler has returned, peer has not closed yet.
        peak: most connections open at once.
        rejected: accepted and closed because the server was full.
        clients_refused: reset because of ``client_limits``, by reason: "client_denied", "client_connections" (it has
            too many), "client_rate" (it opens them too fast).
        refused: closed because ``on_connect`` said so.
        left_in_queue: the client had already reset the connection when it was accepted; no handler saw it.
        handler_errors: handlers that ended with an exception that their client is not to blame for; see
            :func:`is_client_error`. The others are these:
        handshaking: TLS handshakes under way.
        handshake_failures: TLS handshakes that failed, by kind: "http_request" (plain HTTP on a TLS port), "not_tls",
            "version", "no_shared_cipher", "client_certificate", "server_certificate" (the client does not trust ours),
            "unknown_name", "too_many_records", "timeout", "reset", "eof", "other", "crowded_out" (the oldest when there
            were too many), "stopped" (by the end of the server), "not_begun" (there was no memory for it). Those of
            ``start_tls`` are among them.
        proxy_headers_awaited: connections of balancers whose PROXY header has not come yet.
        proxy_header_failures: connections of balancers closed without a good header, by kind: "invalid" (none, or a bad
            one), "timeout", "reset", "crowded_out", "stopped", "not_begun" (as for handshakes).
        tls_floods: TLS connections reset because the client sent record after record without data, by the kind of the
            last one: "key_update", "alert", "handshake" (which in TLS 1.2 asks for a renegotiation),
            "change_cipher_spec", "empty", "other". They are among ``resets`` too.
        resets: handlers that ended because the client had gone: it reset the connection (any ConnectionError), closed
            it in the midst of a message (EarlyEOF, TruncatedStream), or broke the rules of TLS (ssl.SSLError).
        timeouts: handlers that ended because they waited for the client too long: TimeoutError, DeadlineExceeded,
            gevent.Timeout.
        limits_exceeded: handlers that ended with LimitExceeded: the client sent more than the protocol allows.
        handler_timeouts: handlers ended because of ``handler_timeout``.
        slow_clients: handlers ended because of ``min_rate``.
        idle_closed: idle connections closed to make room, or at a stop.
        accept_errors: failed accepts.
        blocked: how often something has blocked the event loop, of all servers in this process; counted while a
            :class:`BlockDetector` runs.
        blocked_seconds: for how long, all together.
        bytes_received: bytes read from clients.
        bytes_sent: bytes written to clients.
        queue_wait_samples: accepted connections whose waiting time was measured (one in 64).
        queue_wait_mean: mean time they had waited since the handshake (or their last sending; TCP_INFO, tcp(7)).
        queue_wait_max: the longest of them.
        handler_counters: what the handler itself counts, if it is an object with ``counters``; of the proxy: how
            connections have ended; of WSGI and static files: "bad_request", "file_error".
        handlers: handlers running now, over all servers that share the pool.
        pool_size: places in the pool; None for no limit.
        uptime: since the start.
    """

    accepted: int
    active: int
    idle: int
    lingering: int
    peak: int
    rejected: int
    clients_refused: dict[str, int]
    refused: int
    left_in_queue: int
    handler_errors: int
    handshaking: int
    handshake_failures: dict[str, int]
    resets: int
    timeouts: int
    limits_exceeded: int
    handler_timeouts: int
    slow_clients: int
    idle_closed: int
    accept_errors: int
    bytes_received: int
    bytes_sent: int
    queue_wait_samples: int
    queue_wait_mean: float
    queue_wait_max: float
    handlers: int
    pool_size: int | None
    uptime: float
    handler_counters: dict[str, int] = field(default_factory=dict)
    blocked: int = 0
    blocked_seconds: float = 0.0
    tls_floods: dict[str, int] = field(default_factory=dict)
    proxy_headers_awaited: int = 0
    proxy_header_failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CutConnection:
    """A connection whose handler was ended by a stop.

    Attributes:
        peer: the client's address, printed.
        age: seconds since it was accepted.
        bytes_received: bytes read from it.
        bytes_sent: bytes written to it.
        where: where its handler stood, innermost last: ("app.py:12 in handler", ...).
        ended: False if the handler did not end even when told again; its socket is shut, its greenlet runs on.
    """

    peer: str
    age: float
    bytes_received: int
    bytes_sent: int
    where: tuple[str, ...]
    ended: bool = True

    def __str__(self) -> str:
        where = " < ".join(reversed(self.where)) or "not started"
        return (
            f"{self.peer}, {self.age:.1f} s old, "
            f"{counted(self.bytes_received, 'byte')} in, {self.bytes_sent} out, at {where}"
            + ("" if self.ended else ", would not end")
        )


@dataclass(frozen=True, slots=True)
class StopReport:
    """What a stop did.

    Attributes:
        finished: handlers that ended by themselves during the stop.
        ended: handlers that were ended by it.
        cut: one entry for each of those.
        failures: steps of the stop that failed, with the error of each; the others were done all the same. The command
            line ends with status 1 then.
        background: of ``serve_forever``: the name of each job beside the handlers that was cut: threads, jobs of
            executors, greenlets that handlers had spawned, processes.
    """

    finished: int
    ended: int
    cut: tuple[CutConnection, ...] = ()
    failures: tuple[str, ...] = ()
    background: tuple[str, ...] = ()
