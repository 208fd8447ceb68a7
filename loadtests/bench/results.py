"""What was measured, what can be said of it, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import Run

OURS = "gtcpserver"

#: A server or client that uses less of its CPU could have gone faster.
BUSY = 0.9

#: Smaller differences are never called one: the ticks of the kernel's accounts, and what wrk's own start costs.
LEAST = 0.03

#: What chance makes of equal servers in 95 of 100 cases, for so many rounds (10: and more): how far the median of the
#: rounds' ratios is from 1, in their range; and how far two medians are apart, in half of the sum of their ranges.
#: As in Lord's test (Biometrika 34, 1947), here for medians: 60,000 draws from normal distributions.
PAIRED = {2: 6.4, 3: 1.33, 4: 0.74, 5: 0.56, 6: 0.43, 7: 0.38, 8: 0.32, 9: 0.30, 10: 0.27}
APART = {2: 3.43, 3: 1.37, 4: 0.86, 5: 0.71, 6: 0.55, 7: 0.50, 8: 0.43, 9: 0.40, 10: 0.35}


@dataclass
class Result:
    """The runs of each server under a load, in the order of the rounds; and why others have none."""

    title: str = ""
    runs: dict[str, list[Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    #: Those that ratios are computed with.
    against: Sequence[str] = ()
    #: The first column.
    what: str = "server"

    def median(self, server: str, figure: str) -> float:
        return float(statistics.median(getattr(run, figure) for run in self.runs[server]))

    def figures(self, server: str, figure: str) -> list[float]:
        return [float(getattr(run, figure)) for run in self.runs[server]]

    def ratio(self, server: str, peer: str) -> Ratio:
        """CPU of one for each of the other's."""
        return Ratio.of(a.cpu / b.cpu for a, b in zip(self.runs[server], self.runs[peer], strict=True))

    def limit(self, server: str) -> str:
        """Who could not go faster."""
        busy = {"server": self.median(server, "busy"), "client": self.median(server, "client")}
        return " and ".join(name for name, share in busy.items() if share >= BUSY) or "neither"

    def errors(self, server: str) -> int:
        return sum(run.errors for run in self.runs[server])

    def as_json(self) -> dict[str, Any]:
        runs = {server: [asdict(run) for run in runs] for server, runs in self.runs.items()}
        return {"title": self.title, "what": self.what, "against": self.against, "failed": self.failed, "runs": runs}

    def table(self) -> str:
        peers = [peer for peer in self.against if peer in self.runs]
        head = (
            f"{self.what} | user | system | CPU µs a request | spread | requests/s | limit | p50 ms | p99 ms | p99.9 ms"
        )
        lines = [_row([head, "errors", *(f"of {peer}" for peer in peers)]), "| --- |" + " ---: |" * (10 + len(peers))]
        for name in sorted(self.runs, key=lambda name: self.median(name, "cpu")):
            cells = [
                name,
                *(f"{self.median(name, figure):.1f}" for figure in ("user", "system", "cpu")),
                f"±{spread(self.figures(name, 'cpu')):.0%}",
                f"{self.median(name, 'rate'):,.0f}",
                self.limit(name),
                *(f"{self.median(name, figure):.2f}" for figure in ("p50", "p99", "p999")),
                str(self.errors(name)),
                *(str(self.ratio(name, peer)) if peer != name else "" for peer in peers),
            ]
            lines.append(_row(cells))
        return _page(self.title, lines if self.runs else [], self.failed)


@dataclass
class Figures:
    """Other figures of servers, one list a round; the first column is the one that is compared.

    Attributes:
        more_is_better: of the first column.
    """

    title: str
    columns: list[str]
    runs: dict[str, list[list[float]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    more_is_better: bool = False

    def first(self, server: str) -> list[float]:
        """The figures of the first column."""
        return [figures[0] for figures in self.runs[server]]

    def median(self, server: str) -> list[float]:
        return [statistics.median(column) for column in zip(*self.runs[server], strict=True)]

    def ratio(self, server: str, peer: str) -> Ratio:
        return Ratio.of(a / b if b else float("inf") for a, b in zip(self.first(server), self.first(peer), strict=True))

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("title", "columns", "more_is_better", "failed", "runs")}

    @property
    def peers(self) -> list[str]:
        return [name for name in self.runs if not name.startswith(OURS)]

    def table(self) -> str:
        ours = next((name for name in self.runs if name.startswith(OURS)), "")
        compared = [f"{OURS} of it"] if self.peers and ours else []
        lines = [_row(["server", self.columns[0], "spread", *self.columns[1:], *compared])]
        lines.append("| --- |" + " ---: |" * (len(self.columns) + 1 + len(compared)))
        for name in self.runs:
            first, *more = (significant(figure) for figure in self.median(name))
            ratio = [str(self.ratio(ours, name)) if name != ours else ""] if compared else []
            lines.append(_row([name, first, f"±{spread(self.first(name)):.0%}", *more, *ratio]))
        return _page(self.title, lines if self.runs else [], self.failed)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _page(title: str, lines: list[str], failed: dict[str, str]) -> str:
    text = "\n".join([f"### {title}", "", *lines]).rstrip()
    return text + "".join(f"\n\n{name}: {why}." for name, why in failed.items())


def significant(figure: float) -> str:
    """With three digits, or more before the point."""
    size = abs(figure)
    places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{figure:,.{places}f}"


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and how far chance alone takes it from 1."""

    median: float
    noise: float

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Ratio:
        found = list(ratios)
        by_chance = PAIRED[min(len(found), 10)] * (max(found) - min(found)) if len(found) > 1 else float("inf")
        return cls(statistics.median(found), max(LEAST, by_chance))

    @property
    def is_noise(self) -> bool:
        return abs(self.median - 1) <= self.noise

    def __str__(self) -> str:
        return f"{self.median:.2f}" + (" (noise)" if self.is_noise else "")


def spread(figures: Sequence[float]) -> float:
    """Half of the range, relative to the median."""
    middle = statistics.median(figures)
    return (max(figures) - min(figures)) / 2 / middle if middle else 0.0


def noise_between(before: Sequence[float], after: Sequence[float], least: float = LEAST) -> float:
    """How far chance alone takes the ratio of the medians of two runs from 1."""
    rounds = min(len(before), len(after), 10)
    return max(least, APART[rounds] * (spread(before) + spread(after))) if rounds > 1 else float("inf")


def facts(output: dict[str, Any]) -> str:
    """One line: what was measured on what, and how."""
    said = {**output["machine"], **output["settings"]}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def load_result(item: dict[str, Any]) -> Result:
    """Of what was written as JSON."""
    runs = {name: [Run(**run) for run in found] for name, found in item["runs"].items()}
    return Result(**{**item, "runs": runs})


def load_figures(item: dict[str, Any]) -> Figures:
    return Figures(**item)
