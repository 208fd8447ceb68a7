"""What a change did: two results of the same benchmark, one before it and one after.

    python -m loadtests.bench.compare OLD.json NEW.json

Exit status 1 if one of our servers is worse than before, beyond the noise: dearer, slower, with more errors, or it can
no longer be measured. The machine's own change of speed is taken out by that of the peers, and what is left must be
more than chance makes of the rounds' spread. 2 if the files cannot be compared.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import LEAST, Figures, Result, load_figures, load_result, noise_between, spread

#: Of a load: figure -> (what it is called, more is better, the least change that is called one). Of the rate and the
#: latency the client has its part, which the peers' change does not take out.
OF_A_LOAD = {
    "cpu": ("CPU", False, LEAST),
    "rate": ("requests/s", True, 0.1),
    "p99": ("p99", False, 0.25),
}

#: Errors that may come beside those of before: none, or half as many again.
MORE_ERRORS = 1.5


@dataclass(frozen=True)
class Change:
    """Of one server of ours in one scenario.

    Attributes:
        ratio: the figure now, for each of that before, with the machine's change taken out.
        noise: what a ratio may differ from 1 without meaning anything.
    """

    scenario: str
    server: str
    figure: str
    ratio: float
    noise: float
    more_is_better: bool = False

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.noise:
            return "noise"
        return "better" if (self.ratio > 1) == self.more_is_better else "worse"

    def __str__(self) -> str:
        noise = f"±{self.noise:.0%}" if self.noise < float("inf") else "one round"
        return f"{self.scenario} | {self.server} | {self.figure} | {self.ratio:.2f} | {noise} | {self.verdict}"


@dataclass(frozen=True)
class Broken:
    """A server of ours that got worse in a way that needs no statistics."""

    scenario: str
    server: str
    why: str
    verdict: str = "worse"

    def __str__(self) -> str:
        return f"{self.scenario} | {self.server} | {self.why} | | | {self.verdict}"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change | Broken]:
    """The changes of our own servers, in the scenarios that both have.

    Raises:
        ValueError: they are of different benchmarks or settings, or have nothing in common.
    """
    for name in ("program", "settings"):
        if _same(old[name]) != _same(new[name]):
            raise ValueError(f"they have another {name}: {old[name]} and {new[name]}")
    changes: list[Change | Broken] = []
    for kind in ("scenarios", "figures"):
        for name in old[kind]:
            if name in new[kind]:
                changes += _of_one(kind, name, old[kind][name], new[kind][name])
    if not changes:
        raise ValueError("they have no scenario and server of ours in common")
    return changes


def _same(said: Any) -> Any:
    """What must be the same: not the number of rounds."""
    return {name: value for name, value in said.items() if name != "rounds"} if isinstance(said, dict) else said


def _of_one(kind: str, name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change | Broken]:
    if old["title"] != new["title"]:
        raise ValueError(f"they are of different loads: {old['title']!r} and {new['title']!r}")
    load = load_result if kind == "scenarios" else load_figures
    before, after = load(old), load(new)
    ours = [server for server in before.runs if server.startswith("gtcpserver")]
    for server in ours:
        if server not in after.runs:
            yield Broken(name, server, f"missing: {after.failed.get(server, 'it took no part')}")
        elif isinstance(before, Result) and isinstance(after, Result):
            earlier, errors = before.errors(server), after.errors(server)
            if errors > earlier * MORE_ERRORS * len(after.runs[server]) / len(before.runs[server]):
                yield Broken(name, server, f"{errors} errors, {earlier} before")
    for title, more_is_better, least, was, now in _figures(before, after):
        both = [server for server in was if server in now]
        change = {server: statistics.median(now[server]) / (statistics.median(was[server]) or 1e-9) for server in both}
        peers = [server for server in both if not server.startswith("gtcpserver")]
        machine = statistics.median(change[peer] for peer in peers) if peers else 1.0
        # Several peers tell by their differences how well they know the machine's change, one by its rounds.
        of_peers = spread([change[peer] for peer in peers]) if peers else 0.0
        if len(peers) == 1:
            of_peers = noise_between(was[peers[0]], now[peers[0]], least)
        for server in [server for server in ours if server in both]:
            noise = max(noise_between(was[server], now[server], least), of_peers)
            yield Change(name, server, title, change[server] / (machine or 1.0), noise, more_is_better)


Series = dict[str, list[float]]


def _figures(before: Result | Figures, after: Result | Figures) -> Iterator[tuple[str, bool, float, Series, Series]]:
    if isinstance(before, Result) and isinstance(after, Result):
        for figure, (title, more_is_better, least) in OF_A_LOAD.items():
            was, now = ({name: each.figures(name, figure) for name in each.runs} for each in (before, after))
            yield title, more_is_better, least, was, now
    elif isinstance(before, Figures) and isinstance(after, Figures):
        was, now = ({name: each.first(name) for name in each.runs} for each in (before, after))
        yield before.columns[0], before.more_is_better, LEAST, was, now


def read(path: str) -> dict[str, Any]:
    found = json.loads(Path(path).read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no result of a benchmark")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m loadtests.bench.compare OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = map(read, arguments)
        changes = compare(old, new)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        print(f"python -m loadtests.bench.compare: cannot compare {' and '.join(arguments)}: {why}", file=sys.stderr)
        return 2
    for fact in ("cpu", "kernel", "python", "gevent"):
        was, now = (file.get("machine", {}).get(fact) for file in (old, new))
        if was != now:
            print(f"{fact}: {was} before, now {now}")
    for kind in ("scenarios", "figures"):
        if gone := [name for name in old[kind] if name not in new[kind]]:
            print(f"not measured again: {', '.join(gone)}")
    print("| scenario/clients | server | figure | now / before | noise | |\n| --- | --- | --- | ---: | ---: | --- |")
    for change in changes:
        print(f"| {change} |")
    return int(any(change.verdict == "worse" for change in changes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
