"""The metrics: convert a status (see `source`) to families of prometheus_client, and to text.

Names follow https://prometheus.io/docs/practices/naming/. Metrics of all workers together have no label. Metrics of one
worker have names of their own, gtcpserver_worker_..., so that a sum over labels counts nothing twice.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gevent
from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from .latency import BUCKETS

PREFIX = "gtcpserver_"

# Name without "_total", field of the status, help text.
COUNTERS = (
    ("connections_accepted", "accepted", "Connections accepted."),
    ("connections_rejected", "rejected", "Connections closed at once because the server was full."),
    ("connections_refused", "refused", "Connections closed because on_connect said so."),
    ("connections_left_in_queue", "left_in_queue", "Connections that the client had reset before they were accepted."),
    ("idle_connections_closed", "idle_closed", "Idle connections closed to make room, or at a stop."),
    ("connections_moved", "moved", "Connections that have moved to other workers (handover)."),
    ("connections_taken_over", "taken_over", "Connections that have come from other workers (handover)."),
    ("accept_errors", "accept_errors", "Failed accepts."),
    ("handler_errors", "handler_errors", "Handlers that ended with an exception of their own: faults in the program."),
    ("bytes_received", "bytes_received", "Bytes read from clients."),
    ("bytes_sent", "bytes_sent", "Bytes written to clients."),
    ("loop_blocked", "blocked", "How often something has blocked an event loop; counted by a BlockDetector."),
    ("loop_blocked_seconds", "blocked_seconds", "For how long, all together."),
    ("store_failures", "store_failures", "How often the Redis of shared_limits went away from a process."),
    ("store_questions", "store_questions", "Questions to the Redis of shared_limits: connections and passwords."),
    ("store_decided_alone", "store_decided_alone", "Connections decided without the Redis of shared_limits."),
    ("cpu_seconds", "cpu_seconds", "CPU time of the processes that serve, user and system."),
)

GAUGES = (
    ("connections_active", "active", "Connections open now, idle ones included."),
    ("connections_idle", "idle", "Of these, waiting between two requests."),
    ("tunnels", "tunnels", "Of these, in a relay that may move to another worker (handover)."),
    ("connections_lingering", "lingering", "Connections whose handler has returned and whose peer has not closed yet."),
    ("connections_peak", "peak", "Most connections open at once; of workers, the sum of what each had at most."),
    ("handshakes_active", "handshaking", "TLS handshakes under way."),
    ("proxy_headers_awaited", "proxy_headers_awaited", "Connections whose PROXY header has not come yet."),
    ("handlers_running", "handlers", "Places in the pool that are taken."),
    ("store_away", "store_away", "Processes that the Redis of shared_limits does not answer now."),
    ("queue_wait_max_seconds", "queue_wait_max", "Longest time a connection waited to be accepted, of those measured."),
)

#: Kinds of gtcpserver_connections_failed_total, by counter.
FAILURES = {
    "resets": "reset",
    "timeouts": "timeout",
    "limits_exceeded": "limit_exceeded",
    "handler_timeouts": "handler_timeout",
    "slow_clients": "slow_client",
}


class Collected:
    """A status as a registry of prometheus_client, as `choose_encoder`'s encoders expect."""

    def __init__(self, status: Mapping[str, Any], version: str) -> None:
        self._status = status
        self._version = version

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield from _of_the_process(status, self._version)
        yield from _of_all(status["stats"])
        yield from _of_workers(status["workers"])


def encode(status: Mapping[str, Any], version: str, accept: str) -> tuple[bytes, str]:
    """Return the metrics as text, and its content type: OpenMetrics if the Accept header asks for it."""
    try:
        return _encode(status, version, accept)
    except (ValueError, TypeError):  # the Accept header names an invalid version
        return _encode(status, version, "")


def _encode(status: Mapping[str, Any], version: str, accept: str) -> tuple[bytes, str]:
    encoder, content_type = choose_encoder(accept)
    return encoder(Collected(status, version)), content_type


def _of_the_process(status: Mapping[str, Any], version: str) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        PREFIX + "build_info", "Versions; the value is 1.", labels=["version", "python", "gevent"]
    )
    build.add_metric([version, platform.python_version(), gevent.__version__], 1)
    yield build
    yield GaugeMetricFamily(PREFIX + "ready", "1 while connections are wanted, as /readyz says.", int(status["ready"]))
    yield GaugeMetricFamily(
        PREFIX + "start_time_seconds", "When it was started, since the epoch.", round(time.time() - status["uptime"], 1)
    )
    yield GaugeMetricFamily(PREFIX + "workers_wanted", "Workers there are to be.", status["target"])
    yield GaugeMetricFamily(
        PREFIX + "workers_retired",
        "Replaced workers that finish their connections, also where there are to be fewer.",
        status["retired"],
    )
    yield GaugeMetricFamily(PREFIX + "generation", "Counts the reloads, from 1.", status["generation"])
    yield CounterMetricFamily(
        PREFIX + "worker_restarts", "Workers started in place of ones that died.", status["restarts"]
    )
    states = GaugeMetricFamily(PREFIX + "workers", "Worker processes by state.", labels=["state"])
    for state in sorted({"ready", *(worker["state"] for worker in status["workers"])}):
        states.add_metric([state], sum(worker["state"] == state for worker in status["workers"]))
    yield states
    number, expires_at = certificates_of(status)
    yield GaugeMetricFamily(PREFIX + "certificates", "Certificates of the server.", number)
    expires = GaugeMetricFamily(
        PREFIX + "certificate_expiration_timestamp_seconds",
        "When the first of the certificates expires, since the epoch.",
        labels=(),
    )
    if expires_at is not None:
        expires.add_metric((), expires_at)
    yield expires


def certificates_of(status: Mapping[str, Any]) -> tuple[int, float | None]:
    """Return the number of certificates, and when the first of them expires: in workers that take connections."""
    stats = [one["stats"] for one in serving_workers(status["workers"])]
    ends = [one["certificate_expires_at"] for one in stats if "certificate_expires_at" in one]
    return max((int(one.get("certificates", 0)) for one in stats), default=0), min(ends, default=None)


def _of_all(stats: Mapping[str, Any]) -> Iterator[Metric]:
    for name, field, text in COUNTERS:
        yield CounterMetricFamily(PREFIX + name, text, stats.get(field, 0))
    for name, field, text in GAUGES:
        yield GaugeMetricFamily(PREFIX + name, text, stats.get(field, 0))
    size = stats.get("pool_size", 0)
    yield GaugeMetricFamily(
        PREFIX + "pool_size", "Places in the pool; +Inf for no limit.", math.inf if size is None else size
    )
    failed = CounterMetricFamily(
        PREFIX + "connections_failed", "Connections that ended early by the client's doing.", labels=["kind"]
    )
    for field, kind in FAILURES.items():
        failed.add_metric([kind], stats.get(field, 0))
    yield failed
    for name, field, label, text in (
        ("clients_refused", "clients_refused", "reason", "Connections reset because of client_limits."),
        ("handshake_failures", "handshake_failures", "kind", "TLS handshakes that failed."),
        ("proxy_header_failures", "proxy_header_failures", "kind", "Connections without a good PROXY header."),
        ("tls_floods", "tls_floods", "kind", "TLS connections reset for records without data."),
        ("handler_counters", "handler_counters", "name", "What the handler counts itself."),
    ):
        family = CounterMetricFamily(PREFIX + name, text, labels=[label])
        for value, count in sorted(stats.get(field, {}).items()):
            family.add_metric([_printable(value)], count)
        yield family
    gauges = GaugeMetricFamily(
        PREFIX + "handler_gauges", "What the handler says about itself at the moment.", labels=["name"]
    )
    for name, value in sorted(stats.get("handler_gauges", {}).items()):
        gauges.add_metric([_printable(name)], value)
    yield gauges
    staying = GaugeMetricFamily(
        PREFIX + "connections_staying",
        "Connections of workers that leave, by the reason why they have not moved (handover).",
        labels=["reason"],
    )
    for reason, count in sorted(stats.get("staying", {}).items()):
        staying.add_metric([_printable(reason)], count)
    yield staying
    samples = stats.get("queue_wait_samples", 0)
    yield SummaryMetricFamily(
        PREFIX + "queue_wait_seconds",
        "Time that connections waited to be accepted; one in 64 is measured.",
        samples,
        round(samples * stats.get("queue_wait_mean", 0.0), 6),
    )
    yield _histogram(stats.get("latency", {}))


def _histogram(latency: Mapping[str, float]) -> Metric:
    buckets = []
    count = 0.0
    for name in BUCKETS:
        count += latency.get(name, 0)
        buckets.append(("+Inf" if name == "inf" else name, count))
    return HistogramMetricFamily(
        PREFIX + "handler_latency_seconds",
        "Time of a request where the handler uses conn.idle(), otherwise of the connection.",
        buckets,
        latency.get("sum", 0.0),
    )


def _of_workers(workers: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    serving = list(serving_workers(workers))
    for kind, name, text, value in (
        (CounterMetricFamily, "worker_cpu_seconds", "CPU time of the worker.", _stat("cpu_seconds")),
        (CounterMetricFamily, "worker_connections_accepted", "Connections it has accepted.", _stat("accepted")),
        (GaugeMetricFamily, "worker_connections_active", "Its open connections.", _stat("active")),
        (GaugeMetricFamily, "worker_handlers_running", "Places in its pool that are taken.", _stat("handlers")),
        (GaugeMetricFamily, "worker_resident_bytes", "Its memory that is in RAM.", lambda one: one["rss"]),
        (GaugeMetricFamily, "worker_loop_lag_seconds", "How late its event loop is.", lambda one: one["lag"]),
    ):
        family = kind(PREFIX + name, text, labels=["worker"])
        for one in serving:
            family.add_metric([str(one["number"])], value(one))
        yield family


def _stat(name: str) -> Any:
    return lambda worker: worker["stats"].get(name, 0)


def serving_workers(workers: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield one process per worker number: the first in the slot; the others are its successors or predecessors."""
    seen = set()
    for worker in workers:
        if worker["number"] not in seen:
            seen.add(worker["number"])
            yield worker


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
