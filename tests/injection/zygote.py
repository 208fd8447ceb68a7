"""A process that has imported this package and forks a server for each order, since Python's start is what costs.

Orders are lines of JSON on stdin, answers on stdout: ``{"run": [arguments], "folder": ..., "log": ...}`` gives a
process id; ``{"poll": pid}`` an exit status (negative: a signal) or null.

A server waits for SIGUSR1 before it begins, so that strace can be attached first; sigwait(3) is a call that the server
does not use.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

IMPORTS = ("cli.commands", "cli.serve", "cli.forward", "cli.files", "cli.supervise", "static_files", "forwarder", "run")

#: prctl(2): the process ends when this one does.
PR_SET_PDEATHSIG = 1


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(f"gtcpserver.{name}")
    with contextlib.suppress(ImportError):
        importlib.import_module("gtcpserver.cli.proxy")
        importlib.import_module("gtcpserver.proxy.build")
    for line in sys.stdin:
        order = json.loads(line)
        answer = _poll(order["poll"]) if "poll" in order else _fork(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _poll(pid: int) -> int | None:
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(order: dict[str, Any]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return pid
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        os.chdir(order["folder"])
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        os.closerange(3, 256)
        sys.stdin = open(0)  # noqa: SIM115
        signal.sigwait({signal.SIGUSR1})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        sys.argv = ["gtcpserver", *order["run"]]
        importlib.import_module("gtcpserver.cli").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        importlib.import_module("traceback").print_exc()
        status = 1
    else:
        status = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
