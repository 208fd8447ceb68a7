"""What a change has done: two results of loadtests.bench, one before it and one after.

    python -m loadtests.compare OLD.json NEW.json

Exit status 1 if we cost more than before, beyond the noise: the machine's own change of speed is taken out by that of
the peers, and what is left must be more than the rounds spread. 2 if the files cannot be compared.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from .results import Result, load_result, spread

#: Changes below this are never called one: the ticks of the kernel's accounts, and what wrk's own start costs.
LEAST = 0.03


@dataclass(frozen=True)
class Change:
    """Of one server in one scenario.

    Attributes:
        ratio: its CPU a request now, for each of that before, with the machine's change taken out.
        noise: what a ratio may differ from 1 without meaning anything.
    """

    scenario: str
    server: str
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.noise:
            return "dearer"
        return "cheaper" if self.ratio < 1 - self.noise else "noise"


def compare(old: dict[str, Result], new: dict[str, Result]) -> list[Change]:
    """The changes of our own servers, in the scenarios that both have.

    Raises:
        ValueError: they have none in common.
    """
    changes = []
    for name in [name for name in old if name in new]:
        before, after = old[name], new[name]
        both = [server for server in before.runs if server in after.runs]
        peers = [server for server in both if not server.startswith("gtcpserver")]
        plain = {server: after.median(server, "cpu") / before.median(server, "cpu") for server in both}
        machine = statistics.median([plain[server] for server in peers]) if peers else 1.0
        of_peers = spread([plain[server] for server in peers]) if len(peers) > 1 else 0.0
        for server in both:
            if server.startswith("gtcpserver"):
                noise = max(LEAST, before.spread(server) + after.spread(server), of_peers)
                changes.append(Change(name, server, plain[server] / machine, noise))
    if not changes:
        raise ValueError("they have no scenario and server of ours in common")
    return changes


def read(path: str) -> dict[str, Result]:
    return {name: load_result(item["runs"]) for name, item in json.loads(Path(path).read_text())["scenarios"].items()}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m loadtests.compare OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        changes = compare(*map(read, arguments))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"python -m loadtests.compare: cannot compare {' and '.join(arguments)}: {error}", file=sys.stderr)
        return 2
    print("| scenario/clients | server | CPU now / before | noise | |\n| --- | --- | ---: | ---: | --- |")
    for change in changes:
        print(f"| {change.scenario} | {change.server} | {change.ratio:.2f} | ±{change.noise:.0%} | {change.verdict} |")
    return int(any(change.verdict == "dearer" for change in changes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
