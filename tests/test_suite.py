"""The test suite itself: whatever a test does, the others still run."""

import os
import re
import subprocess
import sys

import pytest

from kit.paths import ROOT
from kit.patience import SOON

HANGING = """
import gevent
import pytest
from gevent.hub import get_hub

def spin():
    while True:
        pass

@pytest.mark.timeout(0.5)
def test_that_hangs_in_the_hub():
    get_hub().loop.run_callback(spin)
    gevent.sleep(1)

@pytest.mark.timeout(0.5)
def test_that_swallows_every_exception():
    while True:
        try:
            gevent.sleep(1)
        except BaseException:
            pass

def test_that_passes():
    pass
"""


UNSENDABLE = """
import pytest

def test_that_fails():
    raise ValueError("message \\udca0")

def test_that_prints():
    print("output \\udca1")
    raise ValueError

@pytest.mark.skip(reason="reason \\udca2")
def test_that_is_skipped():
    pass

def test_that_passes():
    pass
"""


def run_suite(folder, source, *options, **environment):
    """pytest on a file of its own, in two processes, with nothing but what is looked at: it is slow enough."""
    (folder / "test_it.py").write_text(source)
    plugins = [f"-p{name}" for name in ("xdist", "pytest_timeout", "kit.watchdog", "no:cacheprovider")]
    where = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    environment |= {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *plugins, *where, *options, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2 * SOON)


@pytest.mark.slow
def test_tests_that_hang_fail_and_the_others_run(tmp_path):
    done = run_suite(tmp_path, HANGING)
    assert "2 failed, 1 passed" in done.stdout
    assert "in spin" in done.stdout + done.stderr  # where it hangs


@pytest.mark.slow
def test_tests_whose_report_cannot_be_sent_fail_and_the_others_run(tmp_path):
    done = run_suite(tmp_path, UNSENDABLE)
    assert "2 failed, 1 passed, 1 skipped" in done.stdout
    assert {"message \\udca0", "output \\udca1", "reason \\udca2"} <= set(re.findall(r"[a-z]+ \\udca.", done.stdout))


MARKS = """
import time
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_that_is_slow(number):
    time.sleep(0.1)

@pytest.mark.slow
def test_that_is_quick_and_marked():
    pass

def test_that_is_quick():
    pass

@pytest.mark.slow
def test_that_is_slow_and_marked():
    time.sleep(0.2)
"""


def test_wrong_marks_of_slow_tests_are_told(tmp_path):
    run_suite(tmp_path, MARKS, "-pkit.selection", TEST_SLOW=str(tmp_path / "marks"))
    assert (tmp_path / "marks").read_text().splitlines() == [
        "quick: test_it.py::test_that_is_quick_and_marked",
        "slow: test_it.py::test_that_is_slow",
    ]
