"""Recorder: looks at a source once a second, and keeps what it saw in a `History`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import gevent

from .history import ERRORS, EVENTS, LATENCY, SERIES, TRAFFIC, History
from .latency import BUCKETS
from .source import LAG_SECONDS, Source, SourceError, Status

log = logging.getLogger("gtcpserver")

#: Series that are counters, so that a slot has their growth.
COUNTERS = frozenset((*TRAFFIC, *ERRORS, *EVENTS, *LATENCY, "cpu"))

#: Longest span in seconds that one measurement is the average of. What is longer is not known.
LONGEST = 30.0

#: Seconds since its start in which all that a process has counted is this second's.
YOUNG = 5.0


class Recorder:
    """Records while it runs; a source that does not answer leaves a gap."""

    def __init__(self, source: Source, history: History) -> None:
        self._source = source
        self._history = history
        self._before: Status | None = None
        self._at = 0.0
        self._failed = False
        self._task: gevent.Greenlet | None = None

    def start(self) -> None:
        self._task = gevent.spawn(self._run)

    def stop(self) -> None:
        if self._task is not None:
            self._task.kill(block=False)
            self._task = None

    def _run(self) -> None:
        while True:
            # In the middle of a second: a timer that is a little early or late finds the same one.
            now = time.monotonic()
            gevent.sleep(1.0 - (now - 0.5) % 1.0, ref=False)
            try:
                self.record(self._source.status(), time.monotonic())
            except SourceError:
                pass
            except Exception:  # no memory, say: a gap, and on
                if not self._failed:
                    log.exception("cannot record what the status page shows of the past")
                self._failed = True

    def record(self, status: Status, now: float) -> None:
        """Add a status to the history, with what was counted since the last one."""
        before, took = self._before, now - self._at
        self._before, self._at = status, now
        counted, row = counts_of(status), dict.fromkeys(COUNTERS, math.nan)
        if before is not None and before["pid"] == status["pid"] and 0 < took <= LONGEST:
            then = counts_of(before)
            row = {name: max(0.0, counted[name] - then[name]) / took for name in COUNTERS}
        else:
            took = 1.0
            # A process that has begun to count, its reloads from 1.
            if max(status["uptime"], status["stats"].get("uptime", 0.0)) <= YOUNG:
                row = counted | {"reloaded": 0.0, "started": 1.0}
        row |= gauges_of(status)
        self._history.add(now, [row[name] for name in SERIES], took)


def counts_of(status: Status) -> dict[str, float]:
    """Return the counters of a status by the names of their series."""
    stats = status["stats"]
    latency = stats.get("latency", {})
    return {
        **{name: total(stats.get(name, 0)) for name in (*TRAFFIC, *ERRORS)},
        **{name: latency.get(key, 0) for name, key in zip(LATENCY, (*BUCKETS, "sum"), strict=True)},
        "cpu": stats.get("cpu_seconds", 0.0),
        "died": status["restarts"],
        "reloaded": status["generation"],
        "started": 0.0,
    }


def gauges_of(status: Status) -> dict[str, float]:
    """Return the values of this moment by the names of their series."""
    stats, workers = status["stats"], status["workers"]
    handlers, size = stats.get("handlers", 0), stats.get("pool_size", 0)
    return {
        "active": stats.get("active", 0),
        "idle": stats.get("idle", 0),
        "handlers": handlers,
        "memory": sum(worker["rss"] for worker in workers),
        "lag": max((worker["lag"] for worker in workers), default=0.0),
        "pool_used": handlers / size if size else math.nan,  # a pool without a limit is never full
        "wanted": status["target"],
        "ready": sum(serves(worker) for worker in workers) if status["ready"] else 0,
    }


def serves(worker: Mapping[str, Any]) -> bool:
    """Return whether a worker takes connections: it is ready, and its event loop runs."""
    return worker["state"] == "ready" and not worker.get("lagging") and worker["lag"] <= LAG_SECONDS


def total(count: Any) -> float:
    """Return a counter's value; of a table of them, their sum."""
    return float(sum(count.values()) if isinstance(count, Mapping) else count)
