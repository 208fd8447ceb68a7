"""Buckets of tokens: how many bytes a connection or a user has moved, and when the next may be."""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from gtcpserver.shared.column import Column, now

#: Size of a bucket: for this many seconds a flow may go as fast as it can after it was silent.
BURST_SECONDS = 0.25
LEAST_BURST = 16 * 1024


class Bucket(Protocol):
    """What limits a rate."""

    __slots__ = ()

    def spend(self, size: int) -> float:
        """Account for `size` bytes moved; return the seconds until the next may be. 0 bytes: before the first piece."""
        ...


class TokenBucket:
    """Limits the bytes moved per second; connections that share one wait for each other.

    Args:
        rate: bytes per second.
        empty: begin without a burst.
    """

    __slots__ = ("__weakref__", "_burst", "_rate", "_since", "_tokens")

    def __init__(self, rate: float, empty: bool = False) -> None:
        self._rate = rate
        self._burst = _burst(rate)
        self._tokens = 0.0 if empty else self._burst
        self._since = monotonic()

    def spend(self, size: int) -> float:
        """As Bucket."""
        now = monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate) - size
        self._since = now
        return max(0.0, -self._tokens / self._rate)

    def change(self, rate: float) -> None:
        """Have another rate from now on."""
        self.spend(0)
        self._rate = rate
        self._burst = _burst(rate)


class SharedBucket:
    """A TokenBucket of a user that all processes with a column share. 3 us for each piece, with four workers.

    Args:
        column: the column of this process.
        key: names the user.
        rate: bytes per second.
    """

    __slots__ = ("__weakref__", "_column", "_interval", "_key", "_tolerance")

    def __init__(self, column: Column, key: bytes, rate: float) -> None:
        self._column = column
        self._key = key
        self._interval = 1e9 / rate
        self._tolerance = _burst(rate) * self._interval

    def spend(self, size: int) -> float:
        """As Bucket."""
        found, at = self._column.find(self._key), now()
        full_at, since = self._column.full_at(found, self._interval, at)
        if full_at <= at:
            full_at = since = at
        if size:
            self._column.spend(self._column.take(found, at), size, since)
        return max(0.0, full_at + size * self._interval - at - self._tolerance) / 1e9


def _burst(rate: float) -> float:
    return max(rate * BURST_SECONDS, min(rate, LEAST_BURST))
