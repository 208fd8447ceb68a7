"""The sources of a monitor's data: a server of this process (here), or a master (`supervisor.monitor_source`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from gevent.lock import Semaphore

from gtcpserver.callables import full_name_of, name_of
from gtcpserver.server.server import Server, State

from .connection_table import MOST, look
from .watch import Watch, resident_bytes

Status = dict[str, Any]

#: A worker whose event loop is later than this many seconds keeps its clients waiting. A healthy one is a millisecond
#: or two late.
LAG_SECONDS = 0.25

#: Seconds for which an answer is reused: the server's cost stays bounded however often clients ask.
FRESH_SECONDS = 0.2


@dataclass(frozen=True)
class Health:
    """The result of a health check.

    Attributes:
        alive: whether the process that accepts connections, or its supervisor, is working.
        ready: whether connections are wanted.
        word: "ready", "starting", "draining", or the name of another state.
    """

    alive: bool
    ready: bool
    word: str


class Source(Protocol):
    """What `web` asks for. Each method may wait, and raise `SourceError`."""

    def health(self) -> Health: ...

    def status(self) -> Status:
        """Return the state and the counters, total and by worker: all that `gtcpserver ctl status` prints, and more."""

    def connections(self) -> Status:
        """Return what is known of the connections.

        {"connections": rows, "places": number of connections by where their handlers stand, "total": their number,
        "missing": workers that did not answer}.
        """


class SourceError(Exception):
    """No answer is available."""


class FromServer:
    """One server in this process, described like a master with one worker."""

    def __init__(self, server: Server, watch: Watch, name: str = "") -> None:
        self._server = server
        self._watch = watch
        handler = server.handler
        self._name = name or (full_name_of(handler) if hasattr(handler, "__qualname__") else name_of(handler))
        self._made_at = monotonic()

    def health(self) -> Health:
        state = self._server.state
        if state is State.SERVING and self._server.draining:
            return Health(True, False, "draining")
        words = {State.NEW: "starting", State.SERVING: "ready", State.STOPPING: "draining", State.STOPPED: "stopped"}
        return Health(True, state is State.SERVING, words[state])

    def status(self) -> Status:
        server, stats = self._server, self._watch.stats()
        health = self.health()
        state = "starting" if server.state is State.NEW else server.state.value
        uptime = round(monotonic() - self._made_at, 3)
        lag = round(self._watch.lag, 4)
        worker = {
            "number": 0,
            "pid": os.getpid(),
            "state": "ready" if health.ready else state,
            "generation": 1,
            "uptime": uptime,
            "lag": lag,
            "lagging": lag > LAG_SECONDS,
            "rss": resident_bytes(),
            "accepted": stats["accepted"],
            "active": stats["active"],
            "stats": stats,
        }
        return {
            "name": self._name,
            "state": state,
            "ready": health.ready,
            "pid": os.getpid(),
            "uptime": uptime,
            "addresses": list(server.addresses),
            "target": 1,
            "generation": 1,
            "reloading": False,
            "restarts": 0,
            "retired": 0,
            "workers": [worker],
            "stats": stats,
        }

    def connections(self) -> Status:
        table = look(self._server, MOST)
        total = self._server.active_connections
        return {"connections": table.rows, "places": table.places, "total": total, "missing": []}


class Fresh:
    """An answer computed once for all clients that ask at about the same time."""

    def __init__(self, make: Callable[[], Any], seconds: float = FRESH_SECONDS) -> None:
        self._make = make
        self._seconds = seconds
        self._lock = Semaphore()
        self._until = 0.0
        self._value: Any = None

    def get(self) -> Any:
        with self._lock:
            if monotonic() >= self._until:
                self._value = self._make()
                self._until = monotonic() + self._seconds
            return self._value
