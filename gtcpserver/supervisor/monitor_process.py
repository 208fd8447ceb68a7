"""The monitor process of a master, which serves the pages. See `monitor` for the reasons."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

import gevent
import gevent.socket

from gtcpserver.monitoring import web  # noqa: F401 (loaded while this process may read all of the installation)
from gtcpserver.monitoring.history import History
from gtcpserver.monitoring.monitor import make_pages
from gtcpserver.monitoring.recorder import Recorder
from gtcpserver.process.descriptors import close_descriptor

from .log_files import log_in_worker
from .monitor_job import MonitorJob
from .monitor_source import FromMaster
from .privileges import become, die_with_parent

log = logging.getLogger("gtcpserver")

#: Seconds for answers under way when the monitor leaves.
LEAVE_SECONDS = 1.0


def run_monitor(job: MonitorJob) -> int:
    """Run a monitor from the fork on; return its exit status."""

    def on_term(_number: int, _frame: FrameType | None) -> None:
        # At a stop, service managers signal every process of a service, while balancers still ask whether it is
        # ready. So the monitor ends with its master, and not before.
        if os.getppid() != job.master:
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # The monitor speaks HTTP with strangers, so it gets no more rights than a worker.
    become(job.config)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != job.master:
        return 0
    if job.log_style is not None:
        log_in_worker(job.log_style)
    source = FromMaster(gevent.socket.socket(fileno=job.line.detach()))
    history = open_history(job.history)
    recorder = Recorder(source, history)
    pages = make_pages(source, history, job.address, job.sockets)
    # Clients that wait in the queue must not hear "starting" from a service that has long started.
    gevent.wait([source.knows, source.ended], count=1)
    pages.start()
    recorder.start()
    source.say("started")
    source.ended.wait()
    recorder.stop()
    pages.stop(LEAVE_SECONDS, leave_listening=True)
    return 0


def open_history(fd: int | None) -> History:
    """Return the history in the master's memory, or one that ends with this process."""
    if fd is None:
        return History()
    try:
        return History(fd)
    except (OSError, ValueError) as error:  # no memory, or a master of another version
        log.warning("the status page forgets what was before: %s", error)
        return History()
    finally:
        close_descriptor(fd)
