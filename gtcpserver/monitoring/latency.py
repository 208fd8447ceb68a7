"""How long handlers take, as a histogram.

Where a handler uses ``conn.idle()``, a request lasts from the end of one such block to the begin of the next, or to the
end of the connection; where it does not, the whole connection counts as one. The wait for a place in the pool, after
the request has come, is part of it.

A server that nobody watches does not measure: `watch_latency` gives one server's instance other methods than its class
has, so the hot path of all others stays as it is.
"""

from __future__ import annotations

from bisect import bisect_left
from time import monotonic
from types import TracebackType
from typing import Any

from gtcpserver.connection.connection import Connection, Idle
from gtcpserver.server.idle import PlacelessIdle
from gtcpserver.server.server import Server

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
    """A histogram.

    Attributes:
        counts: requests by bucket.
        total: seconds of all of them.
        every: one request in so many is measured.
        left: requests to leave out until the next is measured.
    """

    __slots__ = ("_counted", "counts", "every", "left", "total")

    def __init__(self) -> None:
        self.counts = [0] * len(BUCKETS)
        self.total = 0.0
        self.every = 1
        self.left = 0
        self._counted = 0

    def add(self, seconds: float, times: int = 1) -> None:
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


class TimedIdle(PlacelessIdle):
    """An idle block that measures the time between two of them."""

    __slots__ = ("_began", "_latency", "_times")

    def __init__(self, connection: Connection, server: Server, latency: Latency) -> None:
        super().__init__(connection, server)
        self._latency = latency
        self._began = 0.0
        self._times = 1

    # The bodies are those of PlacelessIdle, where it has to do no more than that: to call it costs as much as its work.

    def __enter__(self) -> None:
        if self._began:
            self.end_of_request()
        self.active = True
        server = self._server
        places = server.places
        places.taken -= 1
        if places.links:
            places.tell()
        if server._idle_wanted:
            server._became_idle(self.connection)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        stream = self._stream
        if stream.ending or stream.at_eof or kind is not None:  # no request has come
            PlacelessIdle.__exit__(self, kind, error, where)
            return
        latency = self._latency
        if latency.left:
            latency.left -= 1
        else:
            self._began = monotonic()
            self._times = every = latency.every
            latency.left = every - 1
        places = self._server.places
        if places.taken < places.size and not places.links:
            self.active = False
            places.taken += 1
        else:
            PlacelessIdle.__exit__(self, kind, error, where)

    def end_of_request(self) -> None:
        """The request is answered, or its connection ends. Does nothing where none was being measured."""
        began, self._began = self._began, 0.0
        if began:
            self._latency.add(monotonic() - began, self._times)


def watch_latency(server: Server) -> Latency:
    """Begins to measure the connections of a server, those that are idle for the first time from now on."""
    latency = Latency()
    forget = server._forget

    def make_idle(connection: Connection) -> Idle:
        return TimedIdle(connection, server, latency)

    def measure_and_forget(connection: Connection) -> None:
        idle: Any = connection.idle_block
        if idle is None:
            latency.add(monotonic() - connection.accepted_at)
        elif type(idle) is TimedIdle:
            idle.end_of_request()
        forget(connection)

    server.make_idle = make_idle  # type: ignore[method-assign]
    server._forget = measure_and_forget  # type: ignore[method-assign]
    return latency
