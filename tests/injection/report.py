"""The table of docs/reliability.md."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .clients import How, Outcome
from .phases import PHASES, Injection, Verdict

MARKERS = ("<!-- injection -->", "<!-- end of injection -->")


def as_json(injection: Injection, verdict: Verdict) -> dict[str, Any]:
    """One result, with the end of what was logged."""
    fields = {**asdict(injection), **asdict(verdict), "kind": verdict.kind, "log": verdict.log[-3000:]}
    fields["outcomes"] = [[one.client, one.how.name, one.detail] for one in verdict.outcomes]
    return fields


def read(path: Path) -> list[tuple[Injection, Verdict]]:
    """The results of a file of `as_json`'s."""
    found = []
    for one in json.loads(path.read_text()):
        injection = Injection(**{name: one[name] for name in ("subject", "phase", "call", "error", "when")})
        outcomes = [Outcome(client, How[how], detail) for client, how, detail in one["outcomes"]]
        found.append((injection, Verdict(one["failed"], one["faults"], outcomes, one["ended"], one["log"])))
    return found


def table(found: list[tuple[Injection, Verdict]]) -> str:
    """For each server and phase what became of the injections; those that no call met are left out."""
    reached = [(injection, verdict) for injection, verdict in found if verdict.failed]
    lines = [
        "| server | phase | calls | injections | all served | a client failed, visibly | process ended | faults |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for subject in dict.fromkeys(injection.subject for injection, _ in reached):
        for phase in PHASES:
            these = [one for one in reached if (one[0].subject, one[0].phase) == (subject, phase)]
            if these:
                lines.append(f"| {subject} | {phase} | {_cells(these)} |")
    lines.append(f"| **all** | | {_cells(reached)} |")
    when = ", ".join(dict.fromkeys(injection.when for injection, _ in reached))
    lines += ["", f"(Calls: {when}; Linux {platform.release()}, Python {platform.python_version()}, {_today()}.)"]
    return "\n".join(lines)


def _today() -> str:
    return time.strftime("%Y-%m-%d")


def _cells(found: list[tuple[Injection, Verdict]]) -> str:
    kinds = [verdict.kind for _, verdict in found]
    numbers = [len({injection.call for injection, _ in found}), len(found)]
    numbers += [kinds.count(kind) for kind in ("served", "failed", "ended", "fault")]
    return " | ".join(f"{number:,}" for number in numbers)


def write(page: Path, text: str) -> None:
    """Put the table between the markers of a page."""
    begin, end = MARKERS
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    before = page.read_text()
    after, number = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", before)
    if number != 1:
        raise ValueError(f"{page} must have {begin} and {end} once")
    page.write_text(after)
