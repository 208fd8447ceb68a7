"""What a server process does to itself, and says of itself: descriptors, the garbage collector, its counters."""

from __future__ import annotations

import dataclasses
import gc
import logging
import resource
import signal

import gevent

from gtcpserver.server.server import Server

log = logging.getLogger("gtcpserver")

GC_THRESHOLDS = (10_000, 20, 50)
"""Python's own (700, 10, 10) are for short programs: with thousands of connections open the collector would walk them
over and over, and find nothing, as a connection is not part of a cycle."""


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open files to the hard one, as Go's runtime does.

    The soft one is often 1024, and is that low for select(2) alone, which cannot take higher numbers; gevent's loop
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
    """Unblocks all signals.

    The program that starts us may have blocked some for itself, and the mask is inherited (signal(7)): without SIGTERM
    there is no stop, and without SIGCHLD gevent waits for a child process for ever.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def freeze_garbage_collector() -> None:
    """Takes what is there now out of the cyclic garbage collector's work, and makes it look less often.

    Modules, functions and classes stay until exit anyway. What refers to itself later is still collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def log_stats(server: Server, interval: float) -> None:
    """Logs the counters every so many seconds, for ever."""
    while True:
        gevent.sleep(interval)
        stats = dataclasses.asdict(server.stats())
        counters = " ".join(
            f"{name}={round(value, 3) if isinstance(value, float) else value}" for name, value in stats.items()
        )
        log.info("stats: %s", counters, extra={"stats": stats})
