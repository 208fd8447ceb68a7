"""Signals that come faster than they are handled."""

import subprocess
import sys

import pytest

PROGRAM = """
import faulthandler, os, signal, sys, threading
from gtcpserver.process.signal_stack import enlarge_signal_stack

faulthandler.enable()
if sys.argv[1] == "enlarged":
    enlarge_signal_stack()
# SIGCONT is forgotten when one comes that stops.
OURS = sorted(set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT, signal.SIGSEGV, signal.SIGABRT})
seen = []
for number in OURS:
    signal.signal(number, lambda number, frame: seen.append(number))
signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
for number in OURS:
    os.kill(os.getpid(), number)
signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
assert sorted(seen) == OURS, seen
if sys.argv[1:] == ["enlarged", "crash"]:
    faulthandler._sigsegv()
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], timeout=60, check=False, capture_output=True, text=True
    )


def test_all_signals_at_once_end_no_process():
    ended = run("enlarged")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_crash_is_reported_on_the_larger_stack():
    ended = run("enlarged", "crash")
    assert ended.returncode == -11
    assert "Fatal Python error: Segmentation fault" in ended.stderr


@pytest.mark.parametrize("limit", ["RLIMIT_AS"])
def test_without_memory_nothing_changes(limit):
    program = f"""
import resource
from gtcpserver.process.signal_stack import enlarge_signal_stack

resource.setrlimit(resource.{limit}, (1, 1))
enlarge_signal_stack()
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
