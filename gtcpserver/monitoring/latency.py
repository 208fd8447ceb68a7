"""Request durations, as a histogram. `gtcpserver.server.observers` defines what a request is."""

from __future__ import annotations

from bisect import bisect_left

#: Upper bounds in seconds. Prometheus's defaults begin at 5 ms, when most requests of a TCP server have long ended; the
#: last bounds are for handlers whose whole connection counts as a request.
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)

#: Names of the buckets in a snapshot, in order; the last one has no bound.
BUCKETS = (*map(str, BOUNDS), "inf")

#: Above BUSY requests a second, measure one in EVERY and count it EVERY times: the estimate is good at that rate, and
#: costs 0.1 us a request instead of 0.4.
BUSY = 1000
EVERY = 16


class Latency:
    """A histogram of request durations: an observer of a server.

    Attributes:
        counts: number of requests, by bucket.
        total: sum of their durations, in seconds.
        every: sampling interval: one request in `every` is measured.
    """

    __slots__ = ("_counted", "counts", "every", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(BUCKETS)
        self.total = 0.0
        self.every = 1
        self._counted = 0

    def request_ended(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += times
        self.total += seconds * times

    def adapt(self, seconds: float) -> None:
        """Adapt the sampling to the request rate. Call periodically, with the seconds since the last call."""
        counted = sum(self.counts)
        self.every = EVERY if counted - self._counted > BUSY * seconds else 1
        self._counted = counted

    def snapshot(self) -> dict[str, float]:
        """Return requests by bucket (not cumulative) and "sum", in seconds; snapshots can be added up."""
        return {**dict(zip(BUCKETS, self.counts, strict=True)), "sum": self.total}
