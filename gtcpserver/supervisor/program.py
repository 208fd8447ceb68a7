"""Program: what a master needs to know about the program it runs, without importing it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gtcpserver.listening.listener import ListenConfig
from gtcpserver.server.server import Server

from .lending import NamedFiles
from .log_files import LogStyle
from .worker import Hooks


@dataclass(frozen=True)
class Program:
    """The program to serve.

    Attributes:
        addresses: where to listen, as for `open_listeners`.
        listen: options of the listening sockets.
        build: called in each new worker with its sockets: imports the user's program and returns the server, not
            started, and the hooks. If it raises, the worker cannot start.
        preload: called once in the master, before the first worker, if the configuration asks for it.
        preloaded: whether the calling process has loaded the program already.
        settle: called in each worker when its server has started.
        prepare: called before `build` in each new worker, while it still has the master's rights: reads the settings,
            and returns the files that the worker's user may not be able to open. Does not run the user's code.
        name: what it is, for the titles of processes: "app:handle".
        log_style: how master and workers log; None leaves the logging of the calling program as it is.

    Example::

        from gtcpserver import ListenConfig, Server
        from gtcpserver.supervisor import Hooks, Program

        def build(sockets):
            import app  # a reload reads it again

            return Server(sockets, app.handle), Hooks()

        program = Program(["127.0.0.1:5000"], ListenConfig(backlog=4096), build, name="app:handle")
    """

    addresses: Sequence[Any]
    listen: ListenConfig
    build: Callable[[list[socket.socket]], tuple[Server, Hooks]]
    preload: Callable[[], None] | None = None
    preloaded: bool = False
    settle: Callable[[], None] | None = None
    name: str = ""
    log_style: LogStyle | None = None
    prepare: Callable[[], NamedFiles] | None = None
