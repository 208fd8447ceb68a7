"""History: the last hour by the second and the last day by the minute, for the status page.

All of it is one block of memory of a fixed size (`BYTES`): a header, then for each grain a ring of 32-bit floats for
each of SERIES. NaN stands for "not known". A slot is a second (or minute) of CLOCK_MONOTONIC, which all processes of a
boot share and nobody sets: so the next monitor of a master, or that of the next master, goes on in the same memory
(memfd_create(2)), and two that overlap for a moment write the same slots.

What it says comes from a process that speaks HTTP with strangers, and is only ever read as numbers for a picture.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gtcpserver.linux import memory_file, reserve
from gtcpserver.process.descriptors import close_descriptor

from .latency import BUCKETS

#: Counters, as counts per second: what clients do, errors, what happens to processes, and the requests of each bucket
#: of `Latency`, of which any percentile of any span can be had.
TRAFFIC = ("accepted", "bytes_received", "bytes_sent")
ERRORS = (
    *("handler_errors", "accept_errors", "rejected", "handler_timeouts", "blocked", "resets", "timeouts"),
    *("limits_exceeded", "slow_clients", "refused", "clients_refused", "handshake_failures", "proxy_header_failures"),
    *("tls_floods", "left_in_queue"),
)
EVENTS = ("died", "reloaded", "started")
LATENCY = (*(f"latency_{bucket}" for bucket in BUCKETS), "latency_sum")

#: Values of the moment. A minute keeps their mean, of WORST the largest and of LEAST the smallest.
GAUGES = ("active", "idle", "handlers", "cpu", "memory")
WORST = ("lag", "pool_used", "wanted")
LEAST = ("ready",)

SERIES = (*TRAFFIC, *ERRORS, *EVENTS, *LATENCY, *GAUGES, *WORST, *LEAST)

#: Seconds of a slot, and number of slots: an hour, and a day.
GRAINS = {"second": (1, 3600), "minute": (60, 1440)}

_HEADER = 64
_FLOAT = 4

#: Size of the memory: 987,904 bytes.
BYTES = _HEADER + _FLOAT * len(SERIES) * sum(slots for _, slots in GRAINS.values())

#: Another version with other series begins with an empty history.
_LAYOUT = int.from_bytes(hashlib.sha256(repr((SERIES, GRAINS, sys.byteorder)).encode()).digest()[:7], "little")

NAN = math.nan


@dataclass(frozen=True)
class Slots:
    """Some consecutive slots of a ring.

    Attributes:
        step: seconds of a slot.
        first: number of the first slot, in steps since the boot.
        values: of each series, its floats in the machine's byte order.
    """

    step: int
    first: int
    values: list[bytes]

    @property
    def count(self) -> int:
        return len(self.values[0]) // _FLOAT


class Ring:
    """A ring of slots of one grain; `number` counts slots since the boot."""

    def __init__(self, words: memoryview[int], word: int, values: memoryview[float], step: int, slots: int) -> None:
        self._words = words
        self._word = word
        self._values = values
        self.step = step
        self.slots = slots

    @property
    def last(self) -> int:
        """Number of the newest slot; 0 if there is none."""
        last: int = self._words[self._word]
        return max(0, last)

    def put(self, number: int, row: Sequence[float], covers: int = 1) -> None:
        """Write a slot.

        Args:
            number: its number. Slots since the last one that the row does not cover are not known.
            row: a value for each of SERIES.
            covers: number of slots that it is the average of: this one and those before it.
        """
        last = self.last
        if not last or number < last:  # it is empty, or damaged: no clock of this boot goes back
            last = number - covers
        for one in range(max(min(last + 1, number), number - self.slots + 1), number + 1):
            known = one > number - covers
            for index, value in enumerate(row):
                self._values[index * self.slots + one % self.slots] = value if known else NAN
        self._words[self._word] = number

    def rows(self, first: int, stop: int) -> list[list[float]]:
        """Return the slots of these numbers that the ring has, each with a value for each of SERIES."""
        numbers = range(max(first, self.last - self.slots + 1), min(stop, self.last + 1))
        return [
            [self._values[index * self.slots + one % self.slots] for index in range(len(SERIES))] for one in numbers
        ]

    def since(self, number: int, now: int) -> Slots:
        """Return the slots after this number, at most those that a ring has which ends now."""
        first, end = max(number + 1, now - self.slots + 1, 1), min(self.last, now) + 1
        count = max(0, end - first)
        at = first % self.slots
        pieces = [(at, min(self.slots, at + count)), (0, at + count - self.slots)]
        values = [
            b"".join(
                self._values[index * self.slots + begin : index * self.slots + stop].tobytes()
                for begin, stop in pieces
                if stop > begin
            )
            for index in range(len(SERIES))
        ]
        return Slots(self.step, first, values)


class History:
    """Both rings.

    Args:
        fd: descriptor of the memory (`make_history`), which the caller keeps; None: memory of this process alone.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, fd: int | None = None) -> None:
        memory = memoryview(bytearray(BYTES) if fd is None else mmap.mmap(fd, BYTES))
        words, values = memory[:_HEADER].cast("q"), memory[_HEADER:].cast("f")
        self._rings: dict[str, Ring] = {}
        at = 0
        for word, (grain, (step, slots)) in enumerate(GRAINS.items(), 1):
            self._rings[grain] = Ring(words, word, values[at : at + len(SERIES) * slots], step, slots)
            at += len(SERIES) * slots
        if words[0] != _LAYOUT:
            values[:] = memoryview(array("f", [NAN]) * len(values))
            words[1] = words[2] = 0
            words[0] = _LAYOUT

    def add(self, now: float, row: Sequence[float], covers: float = 1.0) -> None:
        """Add what was measured, and sum up the minute that ended.

        Args:
            now: end of the measurement, monotonic time.
            row: a value for each of SERIES.
            covers: seconds that it is the average of.
        """
        seconds, minutes = self._rings["second"], self._rings["minute"]
        number = int(now)
        seconds.put(number, row, max(1, round(covers)))
        last = minutes.last if minutes.last < number // 60 else 0  # else damaged: no clock of this boot goes back
        for minute in range(max(last + 1, number // 60 - seconds.slots // 60), number // 60):
            minutes.put(minute, summed_up(seconds.rows(60 * minute, 60 * minute + 60)))

    def since(self, grain: str, number: int, now: float) -> Slots:
        """Return the slots of a grain after this number, at most those that a ring has which ends now.

        Raises:
            KeyError: there is no such grain.
        """
        ring = self._rings[grain]
        return ring.since(number, int(now) // ring.step)


def summed_up(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return one row for many: the mean of each series, of WORST the largest, of LEAST the smallest."""
    return [
        _WAYS.get(name, fmean)(known) if (known := [row[index] for row in rows if not math.isnan(row[index])]) else NAN
        for index, name in enumerate(SERIES)
    ]


_WAYS = {**dict.fromkeys(WORST, max), **dict.fromkeys(LEAST, min)}


def make_history(fd: int | None = None) -> int:
    """Return the descriptor of a memory for `History`: this one, or a new one.

    Args:
        fd: the memory of the last master, which is closed if it is of another size; None: there is none.

    Raises:
        OSError: descriptors or memory ran out.
    """
    if fd is not None:
        if os.fstat(fd).st_size == BYTES:
            os.set_inheritable(fd, False)
            return fd
        close_descriptor(fd)
    # Sealed: a monitor that was taken over must not make the next one read where there is nothing.
    made = memory_file("gtcpserver-history", BYTES, sealed=True)
    try:
        reserve(made, BYTES)
    except BaseException:
        close_descriptor(made)
        raise
    return made
