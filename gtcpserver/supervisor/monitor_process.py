"""The monitor process of a master, which serves the pages. See `monitor` for the reasons."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from types import FrameType

import gevent
import gevent.socket

from gtcpserver.address import Address
from gtcpserver.monitoring import web  # noqa: F401 (loaded while this process may read all of the installation)
from gtcpserver.monitoring.monitor import make_pages
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.supervisor.log_files import LogStyle, log_in_worker
from gtcpserver.supervisor.privileges import become, die_with_parent

from .monitor_source import FromMaster

#: Seconds for answers under way when the monitor leaves.
LEAVE_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What the master passes to a monitor that it forks.

    Attributes:
        address: the address asked for.
        sockets: the sockets that listen there.
        line: the line to the master.
        config: the configuration of the master.
        log_style: how to log; None leaves logging as it is.
        master: process id of the master.
    """

    address: Address
    sockets: list[socket.socket]
    line: socket.socket
    config: SupervisorConfig
    log_style: LogStyle | None
    master: int


def run_monitor(job: Job) -> int:
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
    pages = make_pages(source, job.address, job.sockets)
    # Clients that wait in the queue must not hear "starting" from a service that has long started.
    gevent.wait([source.knows, source.ended], count=1)
    pages.start()
    source.say("started")
    source.ended.wait()
    pages.stop(LEAVE_SECONDS, leave_listening=True)
    return 0
