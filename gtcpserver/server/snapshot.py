"""Snapshot: the counters of a server as a `ServerStats`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic
from typing import Any

from gtcpserver.diagnostics.block_detector import blocked_so_far
from gtcpserver.diagnostics.logs import FaultLimiter, also
from gtcpserver.store.store import store_figures

from .moving import Mover, Moving
from .options import Options
from .state import ServerState
from .stats import ServerStats

log = logging.getLogger("gtcpserver")

#: Larger counters of a handler are left out: Python itself does not print integers of thousands of digits.
LARGEST_COUNTER = 2**63


def snapshot(
    state: ServerState,
    options: Options,
    handler: Any,
    lingering: int,
    moving: Moving | None = None,
    mover: Mover | None = None,
) -> ServerStats:
    """Return the counters as they are now. Costs 0.1 us per open connection, to add up their bytes."""
    counters, admission = state.counters, state.admission
    connections = list(state.connections)
    limits = options.client_limits
    samples = counters.queue_wait_samples
    blocked, blocked_seconds = blocked_so_far()
    return ServerStats(
        accepted=state.accepted,
        active=len(connections),
        idle=len(state.idle_connections()),
        lingering=lingering,
        peak=state.peak,
        rejected=counters.rejected,
        clients_refused=dict(limits.refused) if limits is not None else {},
        refused=counters.refused,
        left_in_queue=counters.left_in_queue + sum(acceptor.left_in_queue for acceptor in state.acceptors),
        handler_errors=counters.handler_errors,
        proxy_headers_awaited=admission.headers if admission is not None else 0,
        proxy_header_failures=dict(counters.proxy_header_failures),
        handshaking=admission.handshakes if admission is not None else 0,
        handshake_failures=dict(counters.handshake_failures),
        resets=counters.resets,
        timeouts=counters.timeouts,
        limits_exceeded=counters.limits_exceeded,
        handler_timeouts=counters.handler_timeouts,
        slow_clients=counters.slow_clients,
        idle_closed=counters.idle_closed,
        accept_errors=counters.accept_errors + sum(acceptor.accept_errors for acceptor in state.acceptors),
        bytes_received=state.bytes_received + sum(c.bytes_received for c in connections),
        bytes_sent=state.bytes_sent + sum(c.bytes_sent for c in connections),
        queue_wait_samples=samples,
        queue_wait_mean=counters.queue_wait_total / samples if samples else 0.0,
        queue_wait_max=counters.queue_wait_max,
        handlers=options.pool.places.taken,
        pool_size=options.pool.size,
        handler_counters=_counters_of(handler),
        handler_gauges=_counters_of(handler, "gauges"),
        uptime=monotonic() - state.started_at if state.started_at else 0.0,
        blocked=blocked,
        blocked_seconds=blocked_seconds,
        tls_floods=dict(counters.tls_floods),
        moved=moving.moved if moving is not None else 0,
        taken_over=moving.taken_over if moving is not None else 0,
        tunnels=moving.tunnels if moving is not None else 0,
        staying=mover.staying() if mover is not None else {},
        **store_figures(),
    )


def _counters_of(handler: Any, attribute: str = "counters") -> dict[str, int]:
    """Return the counters, or gauges, of a handler; {} if they raise: the server's own must stay readable."""
    try:
        counters = getattr(handler, attribute, None)
        # An unrelated attribute may have that name by chance.
        if not isinstance(counters, Mapping):
            return {}
        return {
            name: value
            for name, value in counters.items()
            if isinstance(name, str) and type(value) is int and abs(value) < LARGEST_COUNTER
        }
    except Exception:
        left_out = _counter_faults.allow(attribute)
        if left_out is not None:
            log.exception("the handler's counters cannot be read%s", also(left_out))
        return {}


_counter_faults = FaultLimiter(burst=1, interval=60.0)
