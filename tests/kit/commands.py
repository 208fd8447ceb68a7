"""`gtcpserver` commands that end by themselves, in 20 ms instead of 400: forks of a process that has imported it all.

For wrong calls, of which there are hundreds. What depends on how Python starts is tested by ``python -m gtcpserver``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

#: Seconds for a command. (The process that forks knows nothing of the tests' kit.)
PATIENCE = 60

IMPORTS = ("commands", "serve", "forward", "files", "check", "config", "supervise", "proxy")


def run_command(
    *arguments: str, cwd: str | Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, and return what it wrote and its exit status; folder and environment: as they are."""
    helper = _helper()
    assert helper.stdin is not None
    assert helper.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        order = {"arguments": arguments, "cwd": str(cwd or os.getcwd()), "to": folder, "env": env or dict(os.environ)}
        helper.stdin.write(json.dumps(order) + "\n")
        helper.stdin.flush()
        status = int(helper.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("1", "2"))
    return subprocess.CompletedProcess(["gtcpserver", *arguments], status, out, err)


@functools.cache
def _helper() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


# -- in the helper -----------------------------------------------------------------------------------------------------


def _serve_orders() -> None:
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # without an extra
            importlib.import_module(f"gtcpserver.cli.{name}")
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    status: Any = 1
    try:
        signal.alarm(PATIENCE)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.path[0] = os.getcwd()  # as python -m does
        for target, path in enumerate((os.devnull, f"{order['to']}/1", f"{order['to']}/2")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
        warnings.filterwarnings("ignore", "Monkey-patching ssl after ssl")  # what is imported here already
        sys.argv = ["gtcpserver", *order["arguments"]]
        importlib.import_module("gtcpserver.cli").main()
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        importlib.import_module("traceback").print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    _serve_orders()
