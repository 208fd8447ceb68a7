"""The compiled form and the pure one answer unusual calls alike: sizes, flags, buffers, time-outs, kills, closes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import gtcpserver
from kit.paths import ROOT

pytestmark = pytest.mark.skipif(not gtcpserver.compiled, reason="nothing is compiled")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    forms = {}
    for pure in ("1", ""):
        environment = {**os.environ, "GTCPSERVER_PURE": pure, "PYTHONPATH": str(ROOT / "tests")}
        command = [sys.executable, "-X", "faulthandler", "-m", "kit.form_cases"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        said = json.loads(run.stdout)
        forms["compiled" if said["compiled"] else "pure"] = said["found"]
    return forms


def _without_form(said: str) -> str:
    """Leave out what is known to differ: full names of classes, annotations of results."""
    return re.sub(r"gtcpserver\.\w+\.\w+\.(?=\w+' object)| -> [\w\[\], |]+(?=')", "", said)


def test_unusual_calls_are_answered_alike(found: dict[str, dict[str, str]]) -> None:
    assert set(found) == {"compiled", "pure"}
    assert len(found["pure"]) > 150
    differ = {
        name: (found["compiled"].get(name), said)
        for name, said in found["pure"].items()
        if _without_form(found["compiled"].get(name, "")) != _without_form(said)
    }
    assert differ == {}


@pytest.mark.parametrize("form", ["compiled", "pure"])
def test_the_answers_are_those_of_a_socket(found: dict[str, dict[str, str]], form: str) -> None:
    said = found[form]
    assert said["recv(-1)"] == """('ValueError: negative buffersize in recv', "b'0123'")"""
    assert said["recv(1.5)"] == """('TypeError', "b'0123'")"""
    assert said["recv(9223372036854775808)"] == """('OverflowError', "b'0123'")"""
    assert said["sendall, flags=1.5"].startswith("('TypeError'")
    assert said["sendall(bytearray bytearray(b'bytearray'))"] == """('None', "b'bytearray'", 9)"""
    assert said["recv within time-outs"].count("TimeoutError") == 2
    assert "ConcurrentObjectUseError" in said["two_readers"]
    assert said["in_the_hub"].count("AssertionError: Impossible to call blocking function") >= 15
