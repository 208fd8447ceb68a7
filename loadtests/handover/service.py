"""A master with one worker, which is reloaded, and what its moves cost."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from gtcpserver.supervisor import ask

from ..local_servers import LocalServers

#: Seconds between readiness of the new worker and the move: its start is not counted.
PROBATION = 1.5


def cpu_of(pid: int) -> float | None:
    """Return the seconds of CPU of a process with one thread; None if there is none. (proc(5): in nanoseconds)"""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return None


class Service:
    """A master with one worker, which hands over.

    Args:
        command: of gtcpserver, without the options of this class.
    """

    def __init__(self, servers: LocalServers, *command: str) -> None:
        self.control = str(servers.log_folder / f"control-{command[0]}")
        host, _, port = servers.start(
            *(command[0], "-m", "gtcpserver", *command, "--control", self.control, "--max-connections", "none"),
            *("--workers", "1", "--handover", "--probation", str(PROBATION), "--pool", "none"),
        ).rpartition(":")
        self.address = host, int(port)

    def pids(self) -> list[int]:
        return [one["pid"] for one in ask(self.control, {"command": "status"}, 10.0)["workers"]]

    def reload(self) -> dict[str, float]:
        """Reload, and return wall and CPU seconds of the move; CPU in the old worker and in the new one."""
        (old,) = self.pids()
        answer: dict[str, Any] = {}
        thread = threading.Thread(target=lambda: answer.update(ask(self.control, {"command": "reload"}, 120.0)))
        thread.start()
        while len(pids := self.pids()) < 2:
            time.sleep(0.05)
        (new,) = (pid for pid in pids if pid != old)
        time.sleep(PROBATION / 2)  # it has started
        first_old, first_new = cpu_of(old) or 0.0, cpu_of(new) or 0.0
        began, idle, last_old = 0.0, first_old, first_old
        while os.path.exists(f"/proc/{old}"):
            now = cpu_of(old)
            # A beat takes a tenth of a millisecond: more is the move.
            if not began and now is not None and now - idle > 0.002:
                began = time.monotonic()
            idle, last_old = (now if now is not None else idle), (now or last_old)
            time.sleep(0.002)
        wall = time.monotonic() - began if began else 0.0
        thread.join()
        return {
            "wall_seconds": wall,
            "cpu_old_seconds": last_old - first_old,
            "cpu_new_seconds": (cpu_of(new) or 0.0) - first_new,
            "moved": answer.get("moved", 0),
        }
