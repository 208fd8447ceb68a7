"""Mutants: small bugs planted one at a time in a copy of the package, to see whether the tests notice.

    python tests/mutants.py                     all of them
    python tests/mutants.py pool-* no-linger    some, by name or pattern

`mutants.toml` lists them. The checkout is never changed. Exit status: 0 if the tests saw every mutant, 1 if one
survived, 2 if the list or the call is wrong, or a test fails without a mutant.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")

#: Seconds for the tests of one mutant; one that makes them hang longer is seen. A single test has 30 s.
LIMIT = 240.0

#: Seconds for all named tests without a mutant.
LIMIT_OF_ALL = 1800.0

#: What a copy needs: the tests read some of it, and run it as a user would.
COPIED = ("gtcpserver", "tests", "docs", "examples", "loadtests")
COPIED_FILES = ("pyproject.toml", "pytest_gtcpserver.py", "README.md", "Makefile", "constraints.txt")


class ListError(Exception):
    """An entry of the list is wrong, or no longer fits the source."""


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        file: path within the package.
        old, new: source text, and what replaces it. Where `old` has white space, or two tokens meet, the source may
            have any white space; lines of `new` after the first are indented as the line where `old` begins.
        harm: what a user would suffer.
        tests: arguments for pytest: files in tests/, or single tests.
    """

    name: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """Return the source with the bug. Raises ListError unless `old` is there exactly once."""
        found = list(re.finditer(_loosely(self.old), source))
        if len(found) != 1:
            raise ListError(f"{self.name}: {self.file} must have `old` exactly once, it is there {len(found)} times")
        begin, end = found[0].span()
        line = source[source.rfind("\n", 0, begin) + 1 : begin]
        indent = line[: len(line) - len(line.lstrip())]
        return source[:begin] + self.new.strip().replace("\n", "\n" + indent) + source[end:]


def _loosely(text: str) -> str:
    """A pattern for source text, however it is wrapped and indented; a trailing comma may come or go."""
    tokens = re.findall(r"\w+|[^\w\s]", text)
    pattern = re.escape(tokens[0])
    for before, token in itertools.pairwise(tokens):
        both_words = before[-1].isidentifier() and token[0].isidentifier()
        pattern += r"\s+" if both_words else r"\s*"
        if token in ")]}" and before not in ",([{":
            pattern += r"(?:,\s*)?"
        pattern += re.escape(token)
    # A whole word at both ends: `taken` is not `mistaken`.
    return (r"\b" if tokens[0][0].isidentifier() else "") + pattern + (r"\b" if tokens[-1][-1].isidentifier() else "")


def read_list() -> list[Mutant]:
    """All mutants. Raises ListError for an entry with other fields than a Mutant has."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    mutants = []
    for name, fields in toml.loads(LIST.read_text()).items():
        if sorted(fields) != ["file", "harm", "new", "old", "tests"]:
            raise ListError(f"{name}: expected file, old, new, harm and tests, got {', '.join(fields)}")
        mutants.append(Mutant(name, **{**fields, "tests": tuple(fields["tests"])}))
    return mutants


def choose(mutants: Sequence[Mutant], patterns: Sequence[str]) -> list[Mutant]:
    """Those that a name or pattern asks for; all without one. Raises ListError for a pattern that fits none."""
    chosen: dict[str, Mutant] = {}
    for pattern in patterns or ["*"]:
        fitting = [one for one in mutants if fnmatch.fnmatch(one.name, pattern)]
        if not fitting:
            raise ListError(f"no mutant is called {pattern!r}")
        chosen.update((one.name, one) for one in fitting)
    return list(chosen.values())


@dataclass(frozen=True)
class Outcome:
    """How the tests of a mutant ended: seen, and by which test."""

    seen: bool
    by: str
    seconds: float
    output: str


class Copies:
    """Copies of the project under a temporary folder, each for one run of tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: set[int] = set()
        self._ended = False
        self._original = folder / "original"
        # A worker that has become another user reads the package too.
        folder.chmod(0o755)
        self._original.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "_build", "results", "*.pyc")
        for name in COPIED:
            shutil.copytree(ROOT / name, self._original / name, ignore=ignored)
        for name in COPIED_FILES:
            shutil.copy2(ROOT / name, self._original / name)
        # Programs that the tests start need not compile it each time.
        subprocess.run(
            [sys.executable, "-m", "compileall", "-q", "gtcpserver", "pytest_gtcpserver.py"],
            cwd=self._original,
            check=True,
        )

    def run(self, name: str, mutant: Mutant | None, tests: Sequence[str], limit: float) -> Outcome:
        """Run tests until the first that fails, in a copy of its own. Raises KeyboardInterrupt after `end`."""
        if self._ended:
            raise KeyboardInterrupt
        copy = self._folder / name
        shutil.copytree(self._original, copy)
        try:
            if mutant is not None:
                path = copy / "gtcpserver" / mutant.file
                path.write_text(mutant.apply(path.read_text()))
                for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
                    stale.unlink()
            return self._run_tests(copy, tests, limit)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def end(self) -> None:
        """End the tests that run, and run no more."""
        self._ended = True
        for pid in list(self._running):
            _kill_group(pid)

    def _run_tests(self, copy: Path, tests: Sequence[str], limit: float) -> Outcome:
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-o", "timeout=30"]  # less patience, here and below: what a mutant breaks is waited for in vain
        command += [f"--basetemp={copy / 't'}", *(f"tests/{test}" for test in tests)]
        # Before the installed package, also in programs that the tests start.
        environment = {
            **os.environ,
            "PYTHONPATH": str(copy),
            "GTCPSERVER_PURE": "1",  # bugs are planted in what would be compiled, too
            "COLUMNS": "200",
            "TEST_PATIENCE": "15",
            "GTCPSERVER_NO_SHRINK": "1",
        }
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=copy,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            self._running.add(process.pid)
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(process.pid)  # and whatever the tests have left
                process.wait()
                self._running.discard(process.pid)
            if self._ended:
                raise KeyboardInterrupt
            output.seek(0)
            text = output.read()
        return _judge(status, time.monotonic() - began, text)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _judge(status: int | None, seconds: float, text: str) -> Outcome:
    """Say whether tests that ended with this status (None: by force) and this output have seen a mutant."""
    if not status and status is not None and not re.search(r"\d+ (?:passed|skipped)", text):
        status = -1  # something has ended pytest in order
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", text, re.MULTILINE)
    begun = re.findall(r"^tests/(\S+::\S+)", text, re.MULTILINE)
    by = failed[0] if failed else begun[-1] if begun else text.strip().rpartition("\n")[2]
    if status is None:
        by += " (hangs)"
    elif status and not failed:
        by += " (ends the tests)"
    return Outcome(status != 0, by if status != 0 else "", seconds, text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant small bugs one at a time, and see whether the tests notice.")
    parser.add_argument("names", nargs="*", help="names or patterns of mutants; none: all")
    parser.add_argument("-j", type=int, default=2, dest="jobs", metavar="N", help="so many at once (2)")
    parser.add_argument("--list", action="store_true", help="print names and what each one does to a user")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a mutant first")
    parser.add_argument("--output", action="store_true", help="print what the tests printed for each mutant")
    arguments = parser.parse_args()
    try:
        mutants = choose(read_list(), arguments.names)
        for one in mutants:
            one.apply((ROOT / "gtcpserver" / one.file).read_text())
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.list:
        for one in mutants:
            print(f"{one.name:28} {one.file:24} {one.harm}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mut") as folder:
        copies = Copies(Path(folder))
        if not arguments.unchecked:
            tests = list(dict.fromkeys(test for one in mutants for test in one.tests))
            without = copies.run("none", None, tests, LIMIT_OF_ALL)
            if without.seen:
                print(f"{without.output}\nfails without a mutant: {without.by}", file=sys.stderr)
                return 2
            print(f"without a mutant the tests pass, {without.seconds:.0f} s", flush=True)
        return _plant(mutants, copies, max(1, arguments.jobs), arguments.output)


def _plant(mutants: Sequence[Mutant], copies: Copies, jobs: int, verbose: bool) -> int:
    def run(number: int) -> Outcome:
        one = mutants[number]
        outcome = copies.run(str(number), one, one.tests, LIMIT)
        word = "seen" if outcome.seen else "SURVIVED"
        print(f"{word:8} {one.name:28} {outcome.seconds:5.0f} s  {outcome.by}", flush=True)
        if verbose:
            print(outcome.output, flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as threads:
        try:
            outcomes = list(threads.map(run, range(len(mutants))))
        except KeyboardInterrupt:
            copies.end()
            raise
    survivors = [one for one, outcome in zip(mutants, outcomes, strict=True) if not outcome.seen]
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} mutants were seen")
    for one in survivors:
        print(f"survived: {one.name} ({one.file}): {one.harm}")
    return 1 if survivors else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
