"""Rebalance: spread the connections evenly over all workers: those that have too many give idle ones to the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gtcpserver.plural import counted

from .messages import Message
from .slots import WorkerProcess

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger("gtcpserver")

#: Seconds until it counts as done, whatever is still under way: 10,000 connections take two.
REBALANCE_SECONDS = 30.0


class Rebalance:
    """One rebalance, from the newest counts of the workers on.

    Args:
        done: called at the end with the answer for the operator.
    """

    def __init__(self, fleet: Fleet, done: Callable[[dict[str, Any]], Any]) -> None:
        self._fleet = fleet
        self._done = done
        self._give_up_at = fleet.system.monotonic() + REBALANCE_SECONDS
        self._before: dict[WorkerProcess, int] = {}  # of those that give: how many they had given before
        self._moved = 0
        workers = fleet.pairing.staying()
        for giver, taker, count in shares([max(0, int(worker.stats.get("active", 0))) for worker in workers]):
            if fleet.pairing.share(workers[giver], workers[taker], count):
                self._before[workers[giver]] = workers[giver].stats.get("moved", 0)

    def hear(self, worker: WorkerProcess, message: Message) -> None:
        """A worker has given what it had to."""
        before = self._before.pop(worker, None)
        if before is not None:
            self._moved += max(0, message.count("moved") - before)

    def is_done(self, now: float) -> bool:
        """Return whether it is over, and then tell the operator."""
        gone = [worker for worker in self._before if self._fleet.workers.get(worker.pid) is not worker]
        for worker in gone:
            del self._before[worker]
        if self._before and now < self._give_up_at:
            return False
        log.info("rebalanced: %s moved", counted(self._moved, "connection"))
        self._done({"ok": True, "moved": self._moved})
        return True


def shares(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return who gives how many to whom, as indexes, so that all have the same number, or one more."""
    low, more = divmod(sum(counts), len(counts)) if counts else (0, 0)
    # The busiest keep the odd ones: fewer move.
    order = sorted(range(len(counts)), key=lambda index: -counts[index])
    surplus = {index: counts[index] - low - (place < more) for place, index in enumerate(order)}
    givers = [index for index in order if surplus[index] > 0]
    found = []
    for taker in [index for index in order if surplus[index] < 0]:
        while surplus[taker] < 0:
            giver = givers[0]
            count = min(surplus[giver], -surplus[taker])
            found.append((giver, taker, count))
            surplus[giver] -= count
            surplus[taker] += count
            if not surplus[giver]:
                givers.pop(0)
    return found
