"""The test suite itself: a test that hangs fails, and the others still run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

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


def test_tests_that_hang_fail_and_the_others_run(tmp_path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    options = [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
        "-p",
        "conftest",
        "-n",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert "2 failed, 1 passed" in done.stdout
    assert "in spin" in done.stdout + done.stderr  # where it hangs
