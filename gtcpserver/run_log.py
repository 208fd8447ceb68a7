"""What a server program logs of itself: where it listens, and how it has stopped."""

from __future__ import annotations

import logging
import os

from .plural import counted
from .server.server import Server
from .server.stats import StopReport

log = logging.getLogger("gtcpserver")


def log_listening(server: Server) -> None:
    pool = "no limit" if server.pool.size is None else str(server.pool.size)
    log.info(
        "listening on %s (pid %d, %s, pool %s)",
        ", ".join(server.addresses),
        os.getpid(),
        counted(server.accept_loops, "accept loop"),
        pool,
    )


def log_report(report: StopReport) -> None:
    for cut in report.cut:
        log.warning("cut %s", cut, extra={"client": cut.peer})
    log.info("stopped: %s finished, %d cut", counted(report.finished, "connection"), report.ended)
