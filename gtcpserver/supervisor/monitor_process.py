"""What runs in the monitor process of a master: the pages, told by the master. See `monitor` for the why."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from types import FrameType

import gevent
import gevent.socket

from gtcpserver.address import Address
from gtcpserver.monitoring import web  # noqa: F401 as long as this is who may read all of the installation
from gtcpserver.monitoring.monitor import make_pages
from gtcpserver.supervisor.config import SupervisorConfig
from gtcpserver.supervisor.log_files import LogStyle, log_in_worker
from gtcpserver.supervisor.privileges import become, die_with_parent

from .monitor_source import FromMaster

#: Seconds that answers under way get when it is to leave.
LEAVE_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What a monitor is told by the master it was forked from.

    Attributes:
        address: as it was asked for.
        sockets: that listen there.
        line: to the master.
        master: its process id.
    """

    address: Address
    sockets: list[socket.socket]
    line: socket.socket
    config: SupervisorConfig
    log_style: LogStyle | None
    master: int


def run_monitor(job: Job) -> int:
    """The whole life of a monitor, from the fork on; returns its exit status."""

    def on_term(_number: int, _frame: FrameType | None) -> None:
        # Service managers signal every process of a service at a stop, during which balancers ask whether it is ready.
        # It ends with its master.
        if os.getppid() != job.master:
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Who speaks HTTP with strangers has no more rights than a worker.
    become(job.config)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != job.master:
        return 0
    if job.log_style is not None:
        log_in_worker(job.log_style)
    source = FromMaster(gevent.socket.socket(fileno=job.line.detach()))
    pages = make_pages(source, job.address, job.sockets)
    # Those who wait already are not told that it starts, where it does not.
    gevent.wait([source.knows, source.ended], count=1)
    pages.start()
    source.say("started")
    source.ended.wait()
    pages.stop(LEAVE_SECONDS, leave_listening=True)
    return 0
