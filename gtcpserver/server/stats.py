"""Reports of a server: a snapshot of its counters, and the report of its stop."""

from __future__ import annotations

from dataclasses import dataclass, field

from gtcpserver.plural import counted


@dataclass(frozen=True, slots=True)
class ServerStats:
    """A snapshot of a server's counters. All count from the start of the server; times are seconds.

    Attributes:
        accepted: connections accepted.
        active: connections open now (handler running or idle; without those that linger after their handler).
        idle: active connections that wait between two requests (``Connection.idle``).
        lingering: connections whose handler has returned and whose peer has not closed yet.
        peak: most connections open at once.
        rejected: connections closed because the server was full.
        clients_refused: connections reset because of ``client_limits``, by reason: "client_denied",
            "client_connections" (the client has too many), "client_rate" (it opens them too fast), "store_failure"
            (Redis is away, and ``on_store_failure`` is "refuse").
        refused: connections closed because ``on_connect`` returned False.
        left_in_queue: connections that the client had reset before they were accepted; no handler saw them.
        handler_errors: handlers that ended with an exception that their client is not to blame for; see
            :func:`is_client_error`. The others are counted by ``resets``, ``timeouts``, ``limits_exceeded``,
            ``handler_timeouts`` and ``slow_clients``.
        handshaking: TLS handshakes under way.
        handshake_failures: TLS handshakes that failed, by kind: "http_request" (plain HTTP on a TLS port), "not_tls",
            "version", "no_shared_cipher", "client_certificate", "server_certificate" (the client does not trust ours),
            "unknown_name", "too_many_records", "timeout", "reset", "eof", "other", "crowded_out" (it was the oldest of
            too many), "stopped" (the server stopped), "not_begun" (memory ran out). Includes handshakes of
            ``start_tls``. "acme_challenge" is no failure: an authority has asked for a proof of the name, and got it.
        proxy_headers_awaited: connections from balancers whose PROXY header has not arrived yet.
        proxy_header_failures: connections from balancers closed without a valid header, by kind: "invalid" (missing or
            malformed), "timeout", "reset", "crowded_out", "stopped", "not_begun" (as for handshakes).
        tls_floods: TLS connections reset because the client sent record after record without data, by the kind of the
            last one: "key_update", "alert", "handshake" (which in TLS 1.2 asks for a renegotiation),
            "change_cipher_spec", "empty", "other". ``resets`` counts them too.
        resets: handlers that ended because the client had gone: it reset the connection (any ConnectionError), closed
            it in the middle of a message (EarlyEOF, TruncatedStream), or broke the rules of TLS (ssl.SSLError).
        timeouts: handlers that ended because they waited for the client too long: TimeoutError, DeadlineExceeded,
            gevent.Timeout.
        limits_exceeded: handlers that ended with LimitExceeded: the client sent more than the protocol allows.
        handler_timeouts: handlers ended by ``handler_timeout``.
        slow_clients: handlers ended by ``min_rate``.
        idle_closed: idle connections closed to make room, or at a stop.
        moved: connections that have moved to other workers (``handover``).
        taken_over: connections that have come from other workers; ``accepted`` leaves them out.
        tunnels: connections in a relay that may move to another worker (``handover``).
        staying: open connections of a worker that leaves, by the reason why they have not moved.
        accept_errors: failed accepts.
        blocked: how often the event loop of this process was blocked; counted while a :class:`BlockDetector` runs.
        blocked_seconds: how long it was blocked in total.
        bytes_received: bytes read from clients.
        bytes_sent: bytes written to clients.
        queue_wait_samples: accepted connections whose time in the queue was measured (one in 64).
        queue_wait_mean: mean time between the handshake and accept (TCP_INFO, tcp(7)).
        queue_wait_max: longest such time.
        handler_counters: counters of the handler, if it is an object with ``counters``; for the proxy: how connections
            ended; for WSGI and static files: "bad_request", "file_error".
        store_away: 1 while the Redis of ``shared_limits`` does not answer this process.
        store_failures: how often it went away.
        store_questions: questions to it: connections and passwords.
        store_decided_alone: connections decided while it was away.
        handler_gauges: values of the moment, if the handler is an object with ``gauges``; for the proxy: the state of
            the members of upstream groups.
        handlers: handlers running now, in all servers that share the pool.
        pool_size: places in the pool; None for no limit.
        uptime: time since the start.

    Example::

        stats = server.stats()
        print(stats.accepted, "accepted,", stats.active, "open")
        if stats.handler_errors:
            print(stats.handler_errors, "handlers failed")
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
    moved: int = 0
    taken_over: int = 0
    tunnels: int = 0
    staying: dict[str, int] = field(default_factory=dict)
    store_away: int = 0
    store_failures: int = 0
    store_questions: int = 0
    store_decided_alone: int = 0
    handler_gauges: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CutConnection:
    """A connection whose handler was ended by a stop.

    Attributes:
        peer: the client's address as text.
        age: seconds since it was accepted.
        bytes_received: bytes read from the client.
        bytes_sent: bytes written to the client.
        where: where the handler stood, innermost frame last: ("app.py:12 in handler", ...).
        ended: False if the handler did not end even when told repeatedly; its socket is shut, its greenlet runs on.

    Example::

        for connection in server.stop(timeout=0).cut:
            print(connection.peer, connection.where[-1])  # 127.0.0.1:... app.py:... in handle
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
    """The report of a stop.

    Attributes:
        finished: number of handlers that ended by themselves during the stop.
        ended: number of handlers and waiting connections that the stop ended.
        cut: a description of each of those.
        failures: steps of the stop that failed, with the error of each; the other steps were done all the same. The
            command then exits with status 1.
        background: names of background jobs that ``serve_forever`` cut: threads, jobs of executors, greenlets spawned
            by handlers, processes.

    Example::

        report = server.stop(timeout=10)
        print(report.finished, "finished,", report.ended, "ended")
        for connection in report.cut:
            print(connection)
    """

    finished: int
    ended: int
    cut: tuple[CutConnection, ...] = ()
    failures: tuple[str, ...] = ()
    background: tuple[str, ...] = ()
