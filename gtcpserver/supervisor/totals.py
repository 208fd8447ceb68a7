"""Totals: one set of counters for all workers, running or gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .messages import CERTIFICATES, MAX_NAMES

Stats = dict[str, Any]

#: Values of the moment, which end with their worker. Everything else counts from the start and stays.
GAUGES = frozenset(
    {
        *("active", "idle", "lingering", "handshaking", "proxy_headers_awaited", "handlers", "pool_size", "uptime"),
        *("tunnels", "staying", "store_away", "handler_gauges"),
    }
)


class Totals:
    """Adds up the counters of workers.

    Numbers are summed, `queue_wait_mean` is weighted with its samples, `queue_wait_max` is the largest. `peak` is the
    sum of the workers' peaks: an upper bound of the connections open at one moment. Certificates are left out: all
    workers have the same.
    """

    def __init__(self, gone: Mapping[str, Any] | None = None) -> None:
        self._gone: Stats = dict(gone or {})

    @property
    def gone(self) -> Stats:
        """Counters of the workers that are gone."""
        return self._gone

    def forget_worker(self, stats: Mapping[str, Any]) -> None:
        """Keep the counters of a worker that is gone; drop its gauges."""
        self._gone = add_up([self._gone, {name: value for name, value in stats.items() if name not in GAUGES}])

    def of(self, running: Iterable[Mapping[str, Any]]) -> Stats:
        return add_up([self._gone, *running])


def add_up(all_stats: Iterable[Mapping[str, Any]]) -> Stats:
    """Return the sum of snapshots of `ServerStats`, given as dictionaries."""
    total: Stats = {}
    waited = 0.0
    for stats in all_stats:
        waited += stats.get("queue_wait_mean", 0.0) * stats.get("queue_wait_samples", 0)
        for name, value in stats.items():
            if name in CERTIFICATES:
                continue
            if name not in total:
                total[name] = dict(value) if isinstance(value, dict) else value
            elif name in ("queue_wait_max", "uptime"):
                total[name] = max(total[name], value)
            elif isinstance(value, dict):
                table = total[name]
                for key, number in value.items():
                    # Workers that come and go might bring new names without end.
                    if key in table or len(table) < MAX_NAMES:
                        table[key] = table.get(key, 0) + number
            elif value is None or total[name] is None:
                total[name] = None  # pool_size: no limit
            else:
                total[name] += value
    if total.get("queue_wait_samples"):
        total["queue_wait_mean"] = waited / total["queue_wait_samples"]
    return total
