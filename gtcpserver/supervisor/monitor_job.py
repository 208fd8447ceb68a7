"""MonitorJob: what a monitor process gets from its master, which does without the libraries of `monitor_process`."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from gtcpserver.address import Address

from .config import SupervisorConfig
from .log_files import LogStyle


@dataclass(frozen=True)
class MonitorJob:
    """What the master passes to a monitor that it forks.

    Attributes:
        address: the address asked for.
        sockets: the sockets that listen there.
        line: the line to the master.
        config: the configuration of the master.
        log_style: how to log; None leaves logging as it is.
        master: process id of the master.
        program: name of the program, for the title of the process.
        history: descriptor of the memory of what monitors have seen (`monitoring.history`); None: there is none.
    """

    address: Address
    sockets: list[socket.socket]
    line: socket.socket
    config: SupervisorConfig
    log_style: LogStyle | None
    master: int
    program: str = ""
    history: int | None = None
