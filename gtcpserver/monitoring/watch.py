"""Watch: measures one server from inside its process, for a monitor."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from time import monotonic, process_time
from typing import Any

from gevent.hub import get_hub

from gtcpserver.server.certificates import credentials_of
from gtcpserver.server.server import Server

from .latency import Latency

#: Interval in seconds at which the event loop's lag is measured, and the number of measurements to take the worst of.
LAG_SECONDS = 0.25
LAGS = 8

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Measure latency, CPU and memory of a server and its process, and the lag of its event loop.

    Costs a timer four times a second, and what `latency` costs. Create it in the process that serves.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._latency = Latency()
        server.add_observer(self._latency)
        self._lags: deque[float] = deque([0.0], LAGS)
        self._looked_at = monotonic()
        self._timer = get_hub().loop.timer(LAG_SECONDS, LAG_SECONDS, ref=False)
        self._timer.start(self._look)

    def _look(self) -> None:
        now = monotonic()
        since = now - self._looked_at
        self._looked_at = now
        self._lags.append(max(0.0, since - LAG_SECONDS))
        self._latency.adapt(since)

    @property
    def lag(self) -> float:
        """Largest lag of the event loop in the last two seconds, in seconds."""
        return max(self._lags)

    def stats(self) -> dict[str, Any]:
        """Return the server's counters and more.

        That is "latency" (see `Latency.snapshot`), "cpu_seconds", "certificates" (their number), and if there are any,
        "certificate_expires_at": when the first of them expires, seconds since the epoch.
        """
        return {
            **dataclasses.asdict(self._server.stats()),
            "latency": self._latency.snapshot(),
            "cpu_seconds": process_time(),
            **certificates_of(self._server),
        }

    def close(self) -> None:
        """Stop measuring."""
        self._timer.close()
        self._server.remove_observer(self._latency)


def certificates_of(server: Server) -> dict[str, float]:
    """Return the number of a server's certificates, and when the first of them expires."""
    known = [one for one in (server.tls, *credentials_of(server.handler)) if one is not None]
    ends = [one.expires_at for one in known if one.expires_at is not None]
    found: dict[str, float] = {"certificates": sum(one.certificates for one in known)}
    return {**found, "certificate_expires_at": min(ends)} if ends else found


_resident_bytes = 0


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM, in bytes (statm in proc(5)).

    If it cannot be read, for example without a free descriptor, return the last figure; 0 if there is none.
    """
    global _resident_bytes
    try:
        with open("/proc/self/statm", "rb") as file:
            _resident_bytes = int(file.read().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        pass
    return _resident_bytes
