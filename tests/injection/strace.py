"""System calls of a running process that fail, by ``strace -e inject`` (strace(1)): the call is not done."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from kit.patience import SOON


@functools.cache
def can_trace() -> bool:
    """Whether strace is here and may attach to a process of ours."""
    strace = shutil.which("strace")
    if strace is None:
        return False
    with subprocess.Popen(["sleep", "60"]) as process:
        command = [strace, "-qq", "-o", os.devnull, "-e", "inject=getppid:error=EPERM", "-p", str(process.pid)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tracer:
            try:
                return _wait_attached(tracer, process.pid)
            finally:
                tracer.terminate()
                tracer.wait()
                process.kill()


def rule(call: str, error: str, when: str = "") -> str:
    """An injection: ``call`` fails with errno ``error``; ``when``: "3" the third time, "3+" from then on, "3..5", ""
    always. Each thread has its own count."""
    return f"{call}:error={error}" + (f":when={when}" if when else "")


class Trace:
    """The calls that strace has looked at.

    Attributes:
        path: the file it writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def failed(self) -> int:
        """How many calls were made to fail so far."""
        try:
            return self.path.read_bytes().count(b"(INJECTED)")
        except FileNotFoundError:
            return 0

    def wait(self, count: int = 1) -> None:
        """Wait until so many have failed."""
        give_up = time.monotonic() + SOON
        while self.failed() < count:
            assert time.monotonic() < give_up, f"{self.failed()} instead of {count} calls have failed in {SOON} s"
            time.sleep(0.005)

    def counts(self) -> dict[str, int]:
        """How often each call was made."""
        found: dict[str, int] = {}
        for name in re.findall(r"^(?:\d+ +)?([a-z_0-9]+)\(", self.path.read_text(errors="replace"), re.MULTILINE):
            found[name] = found.get(name, 0) + 1
        return found


def command(rules: Sequence[str], trace: Path, follow: bool = True) -> list[str]:
    """strace's command line without what it traces. Without rules it counts all calls."""
    words = ["strace", "-qq", "-o", str(trace), "-e", "signal=none", *(["-f"] if follow else [])]
    if rules:
        words += ["-e", "trace=" + ",".join(dict.fromkeys(one.partition(":")[0] for one in rules))]
        words += [word for one in rules for word in ("-e", f"inject={one}")]
    return words


@contextlib.contextmanager
def injecting(pid: int, trace: Path, *rules: str, follow: bool = True) -> Iterator[Trace]:
    """Within the block system calls of a process fail; the counts begin with it.

    Args:
        trace: a file for what strace writes.
        rules: as `rule` makes them; none: nothing fails, all calls are counted.
        follow: threads and child processes too.
    """
    tracer = subprocess.Popen([*command(rules, trace, follow), "-p", str(pid)], stderr=subprocess.PIPE)
    try:
        if not _wait_attached(tracer, pid):
            raise AssertionError(f"strace cannot attach: {tracer.communicate()[1].decode()}")
        yield Trace(trace)
    finally:
        tracer.send_signal(signal.SIGTERM)
        try:
            tracer.communicate(timeout=SOON)
        except subprocess.TimeoutExpired:
            tracer.kill()
            tracer.communicate()


def _wait_attached(tracer: subprocess.Popen[bytes], pid: int) -> bool:
    give_up = time.monotonic() + SOON
    while tracer.poll() is None:
        if _tracer_of(pid) == tracer.pid:
            return True
        if time.monotonic() > give_up:
            return False
        time.sleep(0.002)
    return False


def _tracer_of(pid: int) -> int:
    """Of its last thread: strace attaches to one after the other."""
    try:
        last = max(map(int, os.listdir(f"/proc/{pid}/task")))
        status = Path(f"/proc/{pid}/task/{last}/status").read_text()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0
    found = re.search(r"TracerPid:\s+(\d+)", status)
    return int(found[1]) if found else 0


needs_strace = pytest.mark.skipif(not can_trace(), reason="strace is missing or may not trace")
