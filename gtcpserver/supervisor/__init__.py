"""Worker processes: use every core, and lose no connection.

    Master ─▶ Fleet ─▶ Slot ─▶ worker process: Server

The master opens one listening socket per worker slot and TCP address, keeps it for life, and hands it to each
successive
worker of that slot: a queue outlives its worker. `master` has the loop and the signals, `fleet` starts and replaces
workers, `worker` runs in the worker processes, `sockets` holds the listening sockets.
"""

from .config import SupervisorConfig
from .control import ControlError, ask
from .log_files import LogStyle
from .master import Master, WorkersCannotStart
from .program import Program
from .worker import CannotStart, Hooks, Worker, current_worker

__all__ = [
    "CannotStart",
    "ControlError",
    "Hooks",
    "LogStyle",
    "Master",
    "Program",
    "SupervisorConfig",
    "Worker",
    "WorkersCannotStart",
    "ask",
    "current_worker",
]
