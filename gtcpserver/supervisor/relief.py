"""Relief: a worker whose event loop stays late gives idle connections and tunnels to others (``relieve_lagging``).

New connections go to the others at once (`care`). Those that are connected already would meet the late loop with each
request, perhaps for hours: some client keeps it busy. The busy ones stay, and with them what makes it late.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from gtcpserver.plural import counted

from .rebalance import REBALANCE_SECONDS
from .slots import WorkerProcess

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger("gtcpserver")

#: Seconds for which a worker must lag before it gives connections away, and until it gives more. A single block of the
#: event loop counts as a lag for a second (slots.BEATS_TO_RETURN), which no move could shorten.
RELIEF_SECONDS = 3.0

#: Part of its idle connections and tunnels that it gives each time: the others must not be late in their turn.
PART = 0.5


class Relief:
    """Relieves the workers of one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._since: dict[int, float] = {}  # process id -> since when it lags, or the last step
        self._giving: dict[int, float] = {}  # process id -> until when it is waited for

    def hear(self, worker: WorkerProcess) -> None:
        """A worker has given what it had to."""
        self._giving.pop(worker.pid, None)

    def look(self, now: float, late: Collection[int]) -> None:
        """Relieve the workers that have lagged for long. Call in every turn.

        Args:
            late: numbers of the slots that lag while most others do not.
        """
        fleet = self._fleet
        workers = [slot.current for slot in fleet.active() if slot.number in late and slot.current is not None]
        self._since = {one.pid: self._since.get(one.pid, now) for one in workers}
        self._giving = {pid: until for pid, until in self._giving.items() if pid in self._since and now < until}
        if not workers or fleet.rebalance is not None or fleet.reloading() or fleet.changing():
            return
        staying = fleet.pairing.staying()
        takers = sorted((one for one in staying if not one.lagging), key=_active)
        for worker in workers:
            due = worker in staying and now - self._since[worker.pid] >= RELIEF_SECONDS
            if due and takers and worker.pid not in self._giving:
                self._since[worker.pid] = now
                self._relieve(worker, takers, now)

    def _relieve(self, worker: WorkerProcess, takers: list[WorkerProcess], now: float) -> None:
        tunnels = max(0, int(worker.stats.get("tunnels", 0)))
        idle = _active(worker) - max(0, int(worker.stats.get("handlers", 0))) + tunnels
        each, more = divmod(int(max(0, idle) * PART + 0.5), len(takers))
        given = 0
        for place, taker in enumerate(takers):  # those that have the fewest get the odd ones
            count = each + (place < more)
            if count and self._fleet.pairing.share(worker, taker, count):
                given += count
        if given:
            self._giving[worker.pid] = now + REBALANCE_SECONDS
            log.info("worker %d lags: it gives %s to the others", worker.slot, counted(given, "connection"))


def _active(worker: WorkerProcess) -> int:
    return max(0, int(worker.stats.get("active", 0)))
