"""How long requests take, as a histogram. What a request is: see `gtcpserver.server.observers`."""

from __future__ import annotations

from bisect import bisect_left

#: Upper bounds in seconds. Prometheus's own begin at 5 ms, where most requests of a TCP server have long ended; the
#: last ones are for handlers whose whole connection counts.
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)

#: The names of the buckets in a snapshot, in their order; the last one has no bound.
BUCKETS = (*map(str, BOUNDS), "inf")

#: Above so many requests a second one in EVERY is measured and counts for so many: then an estimate is good, and costs
#: 0.1 us a request where measuring each costs 0.4.
BUSY = 1000
EVERY = 16


class Latency:
    """A histogram: an observer of a server.

    Attributes:
        counts: requests by bucket.
        total: seconds of all of them.
        every: one request in so many is to be measured.
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
        """Called every so many seconds: how many are measured follows how many there were."""
        counted = sum(self.counts)
        self.every = EVERY if counted - self._counted > BUSY * seconds else 1
        self._counted = counted

    def snapshot(self) -> dict[str, float]:
        """Requests by bucket, not cumulated, and "sum", their seconds: numbers that can be added to another's."""
        return {**dict(zip(BUCKETS, self.counts, strict=True)), "sum": self.total}
