"""Child processes that are started by posix_spawn(3).

Neither by gevent's Popen, with which the event loop reaps every child process, even those of other code; nor by
Python's, which fails in a monkey-patched program (gevent takes its _fork_exec away).
"""

from __future__ import annotations

import os
from typing import Any

from gevent import monkey

_waitpid: Any = monkey.get_original("os", "waitpid")


def is_reaped(process: int, options: int = os.WNOHANG) -> bool:
    """Reap a child process if it has ended (waitpid(2)); return whether it has."""
    try:
        return bool(_waitpid(process, options)[0])
    except ChildProcessError:
        return True  # by other code
