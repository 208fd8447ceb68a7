"""How all benchmarks go: servers take turns, a bar tells how far it is, and what was found is kept in files."""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..local_servers import ROOT
from .machine import machine
from .measure import BenchError
from .publish import publish_all
from .results import Figures, Result, facts

RESULTS = ROOT / "loadtests" / "results"

T = TypeVar("T")


class Progress:
    """A line that tells how far it is, where ``stream`` is a terminal; and the order of the turns.

    Args:
        steps: there are in all.
        seed: of the order.
    """

    def __init__(self, steps: int, seed: int, stream: Any = None) -> None:
        self.random = random.Random(seed)
        self._stream = stream or sys.stderr
        self._steps = max(1, steps)
        self._done = 0
        self._began = time.monotonic()

    def show(self, text: str) -> None:
        share = min(1.0, self._done / self._steps)
        filled = round(share * 20)
        spent = time.monotonic() - self._began
        left = f"{spent / share - spent:4.0f} s left" if share else ""
        line = f"[{'=' * filled}{' ' * (20 - filled)}] {share:4.0%} {left} {text}"
        self._write(line[:110])

    def step(self, count: int = 1) -> None:
        self._done += count

    def clear(self) -> None:
        self._write("")

    def _write(self, line: str) -> None:
        if self._stream.isatty():
            print(f"\r\x1b[K{line}", end="", file=self._stream, flush=True)


def take_turns(
    names: Iterable[str], rounds: int, run: Callable[[str], T], progress: Progress, label: str
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Run all, in random order within each of the rounds.

    Returns:
        what ``run`` returned, one a round, of each; and why others have none.
    """
    found: dict[str, list[T]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in progress.random.sample(list(found), len(found)):
            progress.show(f"{label}: round {number + 1} of {rounds}, {name}")
            try:
                found[name].append(run(name))
                progress.step()
            except BenchError as problem:
                failed[name] = str(problem)
                del found[name]
                progress.step(rounds - number)
    return found, failed


class Recording:
    """The results of one run of a program: printed, and written as JSON and Markdown after each.

    Args:
        program: as "bench".
        settings: what must be the same in a run that this one is compared with.
        file: of the JSON; None: a new one in loadtests/results.
    """

    def __init__(self, program: str, settings: dict[str, Any], file: str | None, seed: int, steps: int) -> None:
        self.output: dict[str, Any] = {
            "program": program,
            "machine": machine(seed),
            "settings": settings,
            "scenarios": {},
            "figures": {},
        }
        self.progress = Progress(steps, seed)
        self.ours_failed = False
        if file is None:
            RESULTS.mkdir(exist_ok=True)
            file = str(RESULTS / f"{program}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json")
        self.path = Path(file)
        self._texts: list[str] = []
        self._write()  # a path that cannot be written is told before anything is measured
        print(facts(self.output) + "\n", flush=True)

    def load(self, key: str, result: Result) -> None:
        self._take("scenarios", key, result)

    def figures(self, key: str, figures: Figures) -> None:
        self._take("figures", key, figures)

    def _take(self, kind: str, key: str, found: Result | Figures) -> None:
        self.output[kind][key] = found.as_json()
        self.ours_failed |= any(name.startswith("gtcpserver") for name in found.failed)
        self.progress.clear()
        print(found.table() + "\n", flush=True)
        self._texts.append(found.table())
        self._write()

    def _write(self) -> None:
        self.path.write_text(json.dumps(self.output, indent=1))
        self.path.with_suffix(".md").write_text("\n\n".join(self._texts) + "\n")

    def end(self, publish: bool) -> int:
        """The exit status: 1 if one of our own servers could not be measured."""
        print(self.path)
        if publish:
            publish_all([self.path])
        return int(self.ours_failed)


def parser_of(module: str, document: str | None, rounds: int) -> argparse.ArgumentParser:
    """With the arguments that all benchmarks have.

    Args:
        module: as "loadtests.bench".
        document: its docstring; the first line describes it.
        rounds: unless one asks for others.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(document or "").split("\n")[0])
    parser.add_argument("--rounds", type=positive, default=rounds, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="of the order of the servers")
    parser.add_argument("--json", metavar="FILE", help="where to write the results; default: loadtests/results")
    parser.add_argument("--publish", action="store_true", help="put the results into the documentation")
    return parser


def record(
    program: str,
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    settings: dict[str, Any],
    steps: int,
    measure: Callable[[Recording], None],
) -> int:
    """Measure, and keep what was found.

    Args:
        program, settings, steps: as Recording's and Progress's.
        parser, options: `parser_of`'s, and what it has found.
        measure: called with the recording, which it fills.

    Returns:
        the exit status: 1 if something, or one of our own servers, could not be measured, which is told on stderr.
    """
    try:
        recording = Recording(program, settings, options.json, seed_of(options), steps)
        measure(recording)
        return recording.end(options.publish)
    except (BenchError, OSError, subprocess.CalledProcessError) as problem:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
        return 1


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def seed_of(options: argparse.Namespace) -> int:
    return options.seed if options.seed is not None else random.randrange(1_000_000)
