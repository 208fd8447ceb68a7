"""The benchmark of handovers runs, and tells its figures."""

import json
import subprocess
import sys

import pytest

from kit.paths import ROOT
from kit.patience import SOON
from loadtests.handover.publish import PAGE, put, table

FEW = ("--connections", "200", "--asking", "20", "--tunnels", "20", "--bulk-rest", "0.05")


@pytest.mark.slow
def test_it_moves_every_connection_and_tells_its_figures():
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.handover", *FEW, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SOON,
    )
    figures = json.loads(done.stdout)
    assert figures["moved"] == 200
    assert set(figures) >= {"wall_seconds", "cpu_us", "added_latency_p99", "tunnel_cpu_old_us", "bulk_pause"}
    assert "| 200 idle connections: until all have moved |" in put(PAGE.read_text(), table(figures, 200, 20))


def test_it_refuses_numbers_that_cannot_be():
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.handover", "--connections", "5", "--asking", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SOON,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "python -m loadtests.handover: error: --asking must be from 1 to --connections",
    )
