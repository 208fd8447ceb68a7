"""Plugin for pytest: which tests are slow, and which were skipped.

Environment:
    TEST_SKIPPED: a file for the tests that were skipped, one a line. .ci/run runs them as root.
    TEST_SLOW: a file for those that are slow: ``TEST_SLOW=tests/slow.txt make test``, on a quiet machine.
"""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

from .paths import ROOT

#: The tests that `make test-quick` leaves out.
LIST = ROOT / "tests" / "slow.txt"
#: Seconds that a test of this list takes, with all its parameters, as one of three at a time.
SLOW = 0.2


def _function(nodeid):
    return nodeid.partition("[")[0].removeprefix("tests/")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long, as tests/slow.txt says; not in `make test-quick`")


def pytest_collection_modifyitems(items):
    slow = set(LIST.read_text().split())
    for item in items:
        if _function(item.nodeid) in slow:
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter):
    if path := os.environ.get("TEST_SKIPPED"):
        _write(path, dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", [])))
    if path := os.environ.get("TEST_SLOW"):
        seconds = Counter()
        for report in chain.from_iterable(terminalreporter.stats.values()):
            seconds[_function(getattr(report, "nodeid", ""))] += getattr(report, "duration", 0)
        _write(path, sorted(name for name, spent in seconds.items() if spent >= SLOW))


def _write(path, lines):
    Path(path).write_text("".join(f"{line}\n" for line in lines))
