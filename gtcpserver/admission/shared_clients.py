"""SharedClients: what `ClientLimits` counts in a worker process: the clients of all workers together."""

from __future__ import annotations

from typing import Literal

from gtcpserver.shared.column import Column, now

#: The last one: Redis is away, and nobody is to be admitted without it (`on_store_failure="refuse"`).
Refusal = Literal["client_denied", "client_connections", "client_rate", "store_failure"]


class SharedClients:
    """Connections and rates of clients, counted together by all processes that have a column.

    The processes do not wait for each other: of connections that come at the same moment, each may admit one too many.

    Args:
        column: the column of this process.
        connections: most connections a client may have open at once; None for no limit.
        rate: connections a client may open per second; None for no limit.
        burst: connections a client may open at once after a pause.
    """

    def __init__(self, column: Column, connections: int | None, rate: float | None, burst: float) -> None:
        self._column = column
        self._most = connections
        self._has_rate = rate is not None
        self._interval = 1e9 / rate if rate is not None else 0.0
        self._tolerance = (burst - 1) * self._interval
        #: What this process has open: for each client the number, its entry and its tag.
        self._open: dict[bytes, tuple[int, int, int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, key: bytes) -> Refusal | None:
        """Count a new connection of a client, or return the limit that refuses it. 3 us with four workers."""
        column, most, since, at = self._column, self._most, 0, now()
        found = column.find(key)
        if most is not None:
            mine = self._open[key][0] if key in self._open else 0
            if mine + found[4] >= most:
                return "client_connections"
        if self._has_rate:
            full_at, since = column.full_at(found, self._interval, at)
            if full_at > at + self._tolerance:
                if found[2] >= 0:
                    column.take(found, at)  # it was seen, and so stays in the table
                return "client_rate"
            if full_at <= at:
                since = at
        entry = column.take(found, at)
        if since:
            column.spend(entry, 1, since)
        if most is not None:
            self._open[key] = mine + 1, entry, found[0]
            column.set_open(entry, mine + 1)
        return None

    def resume(self, key: bytes) -> None:
        """Count a connection that moves here from another process, where it was admitted, and still counts for now."""
        if self._most is None:
            return
        entry, tag = self._column.take(found := self._column.find(key), now()), found[0]
        mine = self._open[key][0] if key in self._open else 0
        self._open[key] = mine + 1, entry, tag
        self._column.set_open(entry, mine + 1)

    def leave(self, key: bytes) -> None:
        """Stop counting a connection that has ended."""
        known = self._open.pop(key, None)
        if known is None:
            return
        count, entry, tag = known
        if count > 1:
            self._open[key] = count - 1, entry, tag
        if self._column.has(entry, tag):  # otherwise it had to go for another client
            self._column.set_open(entry, count - 1)

    def give_back(self, key: bytes) -> None:
        """Give back the token of a connection that turned out to be another client's."""
        own = self._column.find(key)[2]
        if own >= 0:
            self._column.give_back(own, 1)
