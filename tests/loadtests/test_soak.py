"""The soak test: short runs against good and bad servers, and how figures are judged. No figures of time."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kit.paths import ROOT

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # loadtests is not installed with the package

from loadtests.soak.report import Limits, Sample, Soak, table

needs_locust = pytest.mark.skipif(
    find_spec("locust") is None or find_spec("matplotlib") is None,
    reason="locust or matplotlib is missing: pip install '.[load]'",
)


def start(folder, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "loadtests.soak", "--out", str(folder / "out"), "--users", "20", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def soak(folder, *options):
    """`python -m loadtests.soak`; returns exit status, what it says, and soak.json."""
    process = start(folder, *options)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    path = folder / "out/soak.json"
    return process.returncode, output + errors, json.loads(path.read_text()) if path.exists() else None


# -- runs --------------------------------------------------------------------------------------------------------------


@needs_locust
def test_a_good_server_passes(tmp_path):
    status, said, result = soak(tmp_path, "--run-time", "2s")
    assert status == 0, said
    assert "\npassed\n" in said
    assert result["passed"] is True
    assert result["requests"].keys() >= {"small", "new connection", "connect"}
    assert sum(figures["count"] for figures in result["requests"].values()) > 100
    samples = result["samples"]
    assert len(samples) >= 5
    assert samples[-1]["users"] == 20
    assert max(sample["connections"] for sample in samples) > 5
    assert all(sample["memory"] > 10 and sample["greenlets"] > 0 and sample["p50"] >= 0 for sample in samples)
    assert result["after"]["connections"] == 0
    assert result["counters"]["resets"] > 0  # the faults were real
    assert (tmp_path / "out/soak.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- greenlets -->" in (tmp_path / "out/soak.svg").read_text()


@needs_locust
def test_reloads_fail_nothing(tmp_path):
    # Workers that were replaced stay until their last connection ends, and two more are 80 MiB and have 15 descriptors
    # each: that is no leak.
    more = ("--max-memory-growth", "200", "--max-descriptor-growth", "60")
    options = ("--run-time", "3s", "--workers", "2", "--reload-every", "1s", *more)
    status, said, result = soak(tmp_path, *options)
    assert status == 0, said
    assert len(result["reloads"]) >= 1
    assert result["samples"][-1]["processes"] >= 3
    assert sum(figures["failures"] for figures in result["requests"].values()) == 0


BAD = """
import os
import gevent
from loadtests.soak.app import handle as good

kept = []

def leaks(conn):
    kept.append((os.open("/dev/null", os.O_RDONLY), b"x" * 200_000, gevent.spawn(gevent.sleep, 1000)))
    good(conn)
    raise RuntimeError("a fault of the handler")

def lies(conn):
    while data := conn.recv(65536):
        conn.sendall(b"OK\\n" * 100_000)

def dies(conn):
    kept.append(1)
    if len(kept) > 50:
        os._exit(7)
    good(conn)
"""


@needs_locust
@pytest.mark.parametrize(
    ("handler", "options", "faults"),
    [
        (
            "leaks",
            ["--max-memory-growth", "3"],
            [
                "memory grew by",
                "descriptors grew by",
                "greenlets grew by",
                "more descriptors are open than before",
                r"\d+ exceptions in handlers",
                r"errors in the server's log, server.log, first: .* ERROR ",
            ],
        ),
        ("lies", [], [r"times small: .*the answer is not what was stored", r"small: \d+ of \d+ failed"]),
        ("dies", [], ["the server ended under load, exit status 7"]),
    ],
)
def test_a_bad_server_is_found_out(tmp_path, handler, options, faults):
    (tmp_path / "bad.py").write_text(BAD)
    status, said, result = soak(tmp_path, "--run-time", "2s", "--handler", f"bad:{handler}", *options)
    assert status == 1, said
    assert result["passed"] is False
    for fault in faults:
        assert re.search(f"^FAILED: .*{fault}", said, re.MULTILINE), said


@needs_locust
def test_a_signal_ends_it_early_and_it_still_judges(tmp_path):
    process = start(tmp_path, "--run-time", "10m")
    try:
        line = process.stderr.readline()  # comes a second after the load has begun
        assert re.match(r"1 of 600 s: [1-9]\d* requests, 0 failed, ", line), line
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output + errors
    assert output.endswith("passed\n")


@needs_locust
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--run-time", "never"], "argument --run-time: must be a time such as 90s, 30m or 4h, got 'never'"),
        (["--users", "0"], "argument --users: must be a whole number, 1 or more, got '0'"),
        (["--out", "/dev/null/x"], "--out: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, options, says):
    status, said, _ = soak(tmp_path, *options)
    assert status == 2
    assert said.startswith(f"python -m loadtests.soak: {says}")
    assert said.count("\n") == 1


@needs_locust
def test_a_server_that_does_not_start_is_told(tmp_path):
    status, said, _ = soak(tmp_path, "--handler", "no_such_module:handle")
    assert status == 1
    assert "did not start; it said: " in said
    assert "no_such_module" in said
    assert "Traceback" not in said


# -- judging -----------------------------------------------------------------------------------------------------------


def sample(at=0.0, **figures):
    usual = {"processes": 1, "memory": 50.0, "descriptors": 30, "greenlets": 20, "connections": 20, "users": 20}
    usual |= {"requests": int(at * 100), "failures": 0, "p50": 1.0, "p99": 2.0}
    return Sample(at=at, **{**usual, **figures})


def run_of(samples, **fields):
    requests = {"small": {"count": 100, "failures": 0, "p50": 1, "p99": 2, "max": 3}}
    return Soak(options={}, machine={}, limits=Limits(), **{"samples": samples, "requests": requests, **fields})


def test_what_stays_the_same_passes():
    soak = run_of([sample(at) for at in range(100)], before=sample(connections=0), after=sample(connections=0))
    assert soak.judge() == []
    assert "growth under load (memory in MiB): memory +0.0" in table(soak)


def test_warm_up_is_not_growth():
    soak = run_of([sample(at, memory=10.0 + min(at, 20) * 10, greenlets=min(at, 20) * 10) for at in range(100)])
    assert soak.judge() == []


def test_descriptors_of_connections_are_not_growth():
    soak = run_of([sample(at, connections=at, descriptors=10 + at) for at in range(100)])
    assert soak.judge() == []


def test_a_peak_is_not_growth():
    soak = run_of([sample(at, memory=500.0 if at % 10 == 9 else 50.0) for at in range(100)])
    assert soak.judge() == []


@pytest.mark.parametrize(("name", "text"), [("memory", "40.0 MiB"), ("descriptors", "40.0"), ("greenlets", "40.0")])
def test_growth_is_a_fault(name, text):
    soak = run_of([sample(at, **{name: 100 + (40 if at >= 60 else 0)}) for at in range(100)])
    (fault,) = soak.judge()
    assert fault.startswith(f"{name} grew by {text} under load, allowed: ")


def test_what_is_left_over_is_a_fault():
    soak = run_of([], before=sample(descriptors=10), after=sample(descriptors=27, connections=1))
    assert soak.judge() == [
        "1 connections are open, though all clients have left",
        "17 more descriptors are open than before the load, allowed: 16",
    ]


def test_failures_and_errors_are_faults():
    soak = run_of([], requests={"small": {"count": 9, "failures": 2}}, errors=["x"], counters={"handler_errors": 3})
    assert soak.judge() == [
        "x",
        "small: 2 of 9 failed",
        "3 exceptions in handlers; server.log has them",
    ]


def test_a_run_without_a_request_does_not_pass():
    assert run_of([], requests={}).judge() == ["not one request was made"]
