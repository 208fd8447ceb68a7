"""What a server process does to itself, and reports: descriptors, its counters."""

from __future__ import annotations

import dataclasses
import logging
import resource
import signal

import gevent

from gtcpserver.server.server import Server

log = logging.getLogger("gtcpserver")


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard limit, as Go's runtime does.

    The soft limit is often 1024, which is that low only for select(2), which cannot take higher numbers; gevent's loop
    uses epoll(7).
    """
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError as error:  # prlimit(2), refused by a seccomp filter
        log.warning("cannot read the limit of open files: %s", error)
        return
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        log.warning("cannot raise the limit of open files from %d to %d: %s", soft, hard, error)


def unblock_signals() -> None:
    """Unblock all signals.

    The program that starts us may have blocked some for itself, and the mask is inherited (signal(7)): without SIGTERM
    there is no stop, and without SIGCHLD gevent waits for a child process forever.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def log_stats(server: Server, interval: float) -> None:
    """Log the counters every `interval` seconds, forever."""
    while True:
        gevent.sleep(interval)
        stats = dataclasses.asdict(server.stats())
        counters = " ".join(
            f"{name}={round(value, 3) if isinstance(value, float) else value}" for name, value in stats.items()
        )
        log.info("stats: %s", counters, extra={"stats": stats})
