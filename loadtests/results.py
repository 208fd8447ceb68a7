"""What was measured, and what can be said of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .measure import Run

#: A server that uses less of its CPU was not the limit: the client was.
BUSY = 0.9


@dataclass
class Result:
    """The runs of each server, in the order of the rounds; and why others have none."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, server: str, figure: str) -> float:
        return float(statistics.median(getattr(run, figure) for run in self.runs[server]))

    def spread(self, server: str) -> float:
        """Half of the range of the CPU figures, relative to the median."""
        return spread([run.cpu for run in self.runs[server]])

    def ratio(self, server: str, peer: str) -> Ratio:
        """CPU of one for each of the other's, from the rounds in which both ran."""
        return Ratio.of(a.cpu / b.cpu for a, b in zip(self.runs[server], self.runs[peer], strict=True))

    def limit(self, server: str) -> str:
        """Who could not go faster."""
        return "server" if self.median(server, "busy") >= BUSY else "client"

    def errors(self, server: str) -> int:
        return sum(run.errors for run in self.runs[server])


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and what they lie between."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Ratio:
        found = list(ratios)
        return cls(statistics.median(found), min(found), max(found))

    @property
    def is_noise(self) -> bool:
        """In some round the one was better, in some the other."""
        return self.least <= 1 <= self.most

    def __str__(self) -> str:
        return f"{self.median:.2f}" + (" (noise)" if self.is_noise else "")


def spread(figures: list[float]) -> float:
    middle = statistics.median(figures)
    return (max(figures) - min(figures)) / 2 / middle if middle else 0.0


def load_result(runs: dict[str, list[dict[str, Any]]]) -> Result:
    """Of what was written as JSON."""
    return Result({name: [Run(**run) for run in found] for name, found in runs.items()})
