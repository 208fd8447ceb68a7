"""What locust, the soak and the benchmarks share: where the repository is, and server processes of a test's own."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for a server to say that it listens: an import of everything takes 0.3 s on an idle machine.
START_SECONDS = 20.0

#: What a server is given to finish what it does. The users have gone by then.
STOP_SECONDS = 10.0

PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None)


class StartError(Exception):
    """A server that did not start; the message has what it said."""


class LocalServers:
    """Server processes for as long as a test takes. They end with this process, even when it is killed.

    Args:
        log_folder: where each writes NAME.log; None: a temporary one.
    """

    def __init__(self, log_folder: str | None = None) -> None:
        self._temporary = None if log_folder else tempfile.mkdtemp(prefix="gtcpserver-load-")
        self.log_folder = Path(log_folder or self._temporary or "")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> str:
        """Start ``python COMMAND``, which must print "listening on ADDRESS".

        Returns:
            the address.

        Raises:
            StartError: it ended, or says something else for START_SECONDS.
        """
        path = self.log_folder / f"{name}.log"
        with path.open("wb") as log:  # a file, not a pipe: nobody would empty that while the test runs
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )
        self.processes[name] = process
        give_up = time.monotonic() + START_SECONDS
        while True:
            ended = process.poll() is not None
            said = path.read_text(errors="replace")
            found = re.search(r"listening on (\S+:\d+)", said)
            if found:
                return found[1]
            if ended or time.monotonic() > give_up:
                raise StartError(f"{' '.join(command)} did not start; it said: {said.strip()[-2000:] or 'nothing'}")
            time.sleep(0.02)

    def log_of(self, name: str) -> str:
        return (self.log_folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> dict[str, int]:
        """Stop all.

        Returns:
            name -> exit status, -9 for one that had to be killed.
        """
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)  # one that has ended already is left alone
        statuses = {}
        give_up = time.monotonic() + STOP_SECONDS
        for name, process in self.processes.items():
            try:
                statuses[name] = process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        self.processes.clear()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return statuses


def _end_with_parent() -> None:
    # Between fork and exec.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.setsid()  # a Ctrl-C is for locust, which stops the servers when its users have gone
