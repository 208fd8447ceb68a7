"""Plugin for pytest: which tests were skipped, and which have the wrong mark for the time that they took.

Environment:
    TEST_SKIPPED: a file for the tests that were skipped, one a line. .ci/test runs them as root.
    TEST_SLOW: a file for those to mark as slow, and those that are no longer: ``TEST_SLOW=marks make test JOBS=3``, on
        a quiet machine.
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

#: Seconds from which on a test is slow: with all its parameters, as one of three at a time.
SLOW = 0.2


def pytest_terminal_summary(terminalreporter):
    if path := os.environ.get("TEST_SKIPPED"):
        _write(path, dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", [])))
    if path := os.environ.get("TEST_SLOW"):
        seconds, marked = Counter(), set()
        for report in chain.from_iterable(terminalreporter.stats.values()):
            if hasattr(report, "duration"):
                function = report.nodeid.partition("[")[0]
                seconds[function] += report.duration
                if "slow" in report.keywords:
                    marked.add(function)
        unmarked = [f"slow: {name}" for name, spent in seconds.items() if spent >= SLOW and name not in marked]
        needless = [f"quick: {name}" for name, spent in seconds.items() if spent < SLOW / 2 and name in marked]
        _write(path, sorted(unmarked + needless))


def _write(path, lines):
    Path(path).write_text("".join(f"{line}\n" for line in lines))
