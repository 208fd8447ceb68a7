"""What a soak test has seen, whether it is good, and how it looks. No locust in here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Shares of the run that are compared: behind the warm-up, and at the end.
EARLY = (0.2, 0.4)
LATE = (0.8, 1.0)


@dataclass(frozen=True)
class Sample:
    """One look at all processes of the server together.

    Attributes:
        at: seconds since the load began.
        processes: of the server, alive.
        memory: resident, MiB (what processes share is counted in each).
        descriptors: open.
        greenlets: in all workers; those that wait in the pool for work are among them.
        connections: open.
        users: of the load.
        requests, failures: so far, as the clients count.
        p50, p99: response times since the last look, ms.
    """

    at: float
    processes: int
    memory: float
    descriptors: int
    greenlets: int
    connections: int
    users: int
    requests: int
    failures: int
    p50: float
    p99: float


@dataclass(frozen=True)
class Limits:
    """How much may be added between the early part of the run and its end.

    Args:
        memory: MiB.
        descriptors, greenlets: of all processes together; what connections need is not growth.
    """

    memory: float = 32.0
    descriptors: int = 16
    greenlets: int = 32


@dataclass
class Soak:
    """A run.

    Attributes:
        options: as it was started.
        machine: what it ran on.
        limits: of growth.
        before, after: samples with no load, before and when all connections had gone.
        reloads: when, seconds.
        errors: whatever went wrong, once each kind.
        requests: name -> count, failures, p50, p99 and the longest, ms.
        counters: the server's.
        tolerated: connections that a reload has ended while they were idle, and whose request was sent again.
    """

    options: dict[str, Any]
    machine: dict[str, str]
    limits: Limits
    before: Sample | None = None
    after: Sample | None = None
    samples: list[Sample] = field(default_factory=list)
    reloads: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: dict[str, dict[str, float]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    tolerated: int = 0
    verdict: list[str] = field(default_factory=list)

    def judge(self) -> list[str]:
        """What is wrong, a line each; also kept as ``verdict``."""
        faults = list(self.errors)
        done = sum(int(figures["count"]) for figures in self.requests.values())
        if not done:
            faults.append("not one request was made")
        for name, figures in self.requests.items():
            if figures["failures"]:
                faults.append(f"{name}: {figures['failures']:g} of {figures['count']:g} failed")
        if self.counters.get("handler_errors"):
            faults.append(f"{self.counters['handler_errors']} exceptions in handlers; server.log has them")
        for name, unit in (("memory", " MiB"), ("descriptors", ""), ("greenlets", "")):
            allowed = getattr(self.limits, name)
            grown = self.growth(name)
            if grown > allowed:
                faults.append(f"{name} grew by {grown:.1f}{unit} under load, allowed: {allowed:g}{unit}")
        faults += self._left_over()
        self.verdict = faults
        return faults

    def growth(self, name: str) -> float:
        """Of a figure, from the early part of the run to its end: medians, since a look may fall into a reload.

        A connection is a descriptor, and a greenlet or two: those that came with connections are subtracted.
        """
        early, late = self._part(*EARLY), self._part(*LATE)
        if not early or not late:
            return 0.0

        def figure(sample: Sample) -> float:
            value = float(getattr(sample, name))
            return value - sample.connections if name == "descriptors" else value

        return statistics.median(map(figure, late)) - statistics.median(map(figure, early))

    def _part(self, begin: float, end: float) -> list[Sample]:
        if not self.samples:
            return []
        length = self.samples[-1].at
        return [sample for sample in self.samples if begin * length <= sample.at <= end * length]

    def _left_over(self) -> list[str]:
        """Without load, all must be as it was before, but for what is kept for the next one."""
        if self.before is None or self.after is None:
            return []
        faults = []
        if self.after.connections:
            faults.append(f"{self.after.connections} connections are open, though all clients have left")
        left = self.after.descriptors - self.before.descriptors
        if left > self.limits.descriptors:
            faults.append(f"{left} more descriptors are open than before the load, allowed: {self.limits.descriptors}")
        return faults

    def write(self, folder: Path) -> list[Path]:
        """soak.json, soak.png and soak.svg.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "soak.json"
        data.write_text(json.dumps({"passed": not self.verdict, **asdict(self)}, indent=1) + "\n")
        return [data, *self._plot(folder)]

    def _plot(self, folder: Path) -> list[Path]:
        if not self.samples:
            return []
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "soak"  # the same figures make the same file
        from matplotlib import pyplot

        minutes = self.samples[-1].at > 300
        scale, unit = (60.0, "minutes") if minutes else (1.0, "seconds")
        times = [sample.at / scale for sample in self.samples]
        figure, rows = pyplot.subplots(5, 1, figsize=(10, 12), sharex=True, layout="constrained")
        state = "FAILED: " + self.verdict[0] if self.verdict else "passed"
        figure.suptitle(f"Soak test, {self.samples[-1].users} users: {state}"[:110], fontsize=13)

        def line(axes: Any, label: str, values: Sequence[float], colour: str) -> None:
            axes.plot(times, values, label=label, color=colour, linewidth=1.4)

        def column(get: Callable[[Sample], float]) -> list[float]:
            return [get(sample) for sample in self.samples]

        line(rows[0], "memory, MiB", column(lambda sample: sample.memory), "#4477aa")
        line(rows[1], "descriptors", column(lambda sample: sample.descriptors), "#4477aa")
        line(rows[1], "connections", column(lambda sample: sample.connections), "#ee7733")
        line(rows[2], "greenlets", column(lambda sample: sample.greenlets), "#4477aa")
        line(rows[2], "users", column(lambda sample: sample.users), "#999999")
        line(rows[3], "requests a second", self._rates(lambda sample: sample.requests), "#4477aa")
        line(rows[3], "failures a second", self._rates(lambda sample: sample.failures), "#cc3311")
        line(rows[4], "response time, p50, ms", column(lambda sample: sample.p50), "#4477aa")
        line(rows[4], "p99, ms", column(lambda sample: sample.p99), "#ee7733")
        for axes in rows:
            for number, when in enumerate(self.reloads):
                axes.axvline(when / scale, color="#228833", linestyle=":", label=None if number else "reload")
            axes.set_ylim(bottom=0)
            axes.margins(x=0.01)
            axes.grid(alpha=0.25)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        rows[-1].set_xlabel(f"{unit} since the load began")
        paths = [folder / "soak.png", folder / "soak.svg"]
        for path in paths:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
        return paths

    def _rates(self, get: Callable[[Sample], float]) -> list[float]:
        rates = [0.0]
        for last, sample in zip(self.samples, self.samples[1:], strict=False):
            elapsed = sample.at - last.at
            rates.append((get(sample) - get(last)) / elapsed if elapsed > 0 else math.nan)
        return rates


def table(soak: Soak) -> str:
    """What was asked, in text."""
    lines = [f"{'request':34} {'count':>9} {'failed':>7} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}"]
    for name, figures in sorted(soak.requests.items()):
        lines.append(
            f"{name[:34]:34} {figures['count']:>9,.0f} {figures['failures']:>7,.0f} {figures['p50']:>8,.0f} "
            f"{figures['p99']:>8,.0f} {figures['max']:>8,.0f}"
        )
    growth = ", ".join(f"{name} {soak.growth(name):+.1f}" for name in ("memory", "descriptors", "greenlets"))
    lines.append(f"growth under load (memory in MiB): {growth}")
    if soak.before is not None and soak.after is not None:
        left = soak.after.descriptors - soak.before.descriptors
        lines.append(f"after the load: {soak.after.connections} connections, {left:+d} descriptors against before it")
    if soak.reloads:
        lines.append(f"{len(soak.reloads)} reloads, {soak.tolerated} connections ended by them, and used again")
    return "\n".join(lines)
