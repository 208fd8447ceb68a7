"""What a server program logs of itself: where it listens, and how it has stopped."""

from __future__ import annotations

import logging
import os

from .server import Server
from .stats import StopReport

log = logging.getLogger("gtcpserver")


def log_listening(server: Server) -> None:
    loops = len(server._acceptors)
    pool = "no limit" if server.pool.size is None else str(server.pool.size)
    log.info(
        "listening on %s (pid %d, %d accept loop%s, pool %s)",
        ", ".join(server.addresses),
        os.getpid(),
        loops,
        "" if loops == 1 else "s",
        pool,
    )


def log_report(report: StopReport) -> None:
    for cut in report.cut:
        log.warning("cut %s", cut, extra={"client": cut.peer})
    log.info("stopped: %d connections finished, %d cut", report.finished, report.ended)
