"""System calls of a running process that fail, by strace(1)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised import wait_until


def works() -> bool:
    """Whether strace is here, may attach to a process, and can make its system calls fail."""
    strace = shutil.which("strace")
    if strace is None or not sys.platform.startswith("linux"):
        return False
    command = [strace, "-qq", "-o", "/dev/null", "-e", "inject=getpid:error=EPERM", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not works(), reason="strace is missing, or may not trace")


class Injection:
    """What was injected.

    Attributes:
        trace: the file with the system calls that were looked at.
    """

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def count(self) -> int:
        """How many system calls have failed so far."""
        return self.trace.read_text().count("(INJECTED)")

    def wait(self, count: int = 1) -> None:
        wait_until(lambda: self.count() >= count)


@contextlib.contextmanager
def injected(pid: int, trace: Path, *rules: str) -> Iterator[Injection]:
    """Within the block system calls of the main thread of a process fail.

    Args:
        trace: a file for what strace writes.
        rules: such as "poll:error=ENOMEM:when=1+2", see strace(1).
    """
    calls = ",".join(rule.partition(":")[0] for rule in rules)
    command = ["strace", "-qq", "-p", str(pid), "-o", str(trace), "-e", f"trace={calls}"]
    for rule in rules:
        command += ["-e", f"inject={rule}"]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: process.poll() is not None or _tracer(pid) == process.pid)
            assert process.poll() is None, f"strace has ended with {process.returncode}"
            yield Injection(trace)
        finally:
            process.terminate()


def _tracer(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    return 0
