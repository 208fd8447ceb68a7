"""Rebalance: spread the connections evenly over all workers: those that have too many give idle ones to the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gtcpserver.plural import counted

from .messages import Message
from .slots import WorkerProcess, WorkerState

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger("gtcpserver")

#: Seconds until it counts as over, whatever is still under way: 10,000 connections take two.
REBALANCE_SECONDS = 30.0

#: Seconds within which workers must be told: no descriptors, or a channel without room.
TELL_SECONDS = 2.0


class Rebalance:
    """One rebalance, from the newest counts of the workers on.

    Args:
        done: called at the end with the answer for the operator.
    """

    def __init__(self, fleet: Fleet, done: Callable[[dict[str, Any]], Any]) -> None:
        self._fleet = fleet
        self._done = done
        now = fleet.system.monotonic()
        self._tell_until, self._give_up_at = now + TELL_SECONDS, now + REBALANCE_SECONDS
        self._before: dict[WorkerProcess, int] = {}  # of those that give: how many they had given before
        self._after: dict[WorkerProcess, int] = {}  # of those that have given
        self._moved = 0
        workers = fleet.pairing.staying()
        counts = [max(0, int(worker.stats.get("active", 0))) for worker in workers]
        self._untold = [(workers[giver], workers[taker], count) for giver, taker, count in shares(counts)]
        self._tell_workers()

    def _tell_workers(self) -> None:
        """Tell the workers that were not told yet what to give."""
        untold, self._untold = self._untold, []
        busy = set(self._before)  # a report of theirs could be of what they give now
        for giver, taker, count in untold:
            if not (self._is_there(giver) and self._is_there(taker)):
                continue
            if giver not in busy and self._fleet.pairing.share(giver, taker, count):
                self._before.setdefault(giver, self._after.get(giver, giver.stats.get("moved", 0)))
            else:
                self._untold.append((giver, taker, count))

    def _is_there(self, worker: WorkerProcess) -> bool:
        return self._fleet.workers.get(worker.pid) is worker and worker.state is WorkerState.READY

    def hear(self, worker: WorkerProcess, message: Message) -> None:
        """A worker has given what it had to."""
        before = self._before.pop(worker, None)
        if before is not None:
            self._after[worker] = message.count("moved")
            self._moved += max(0, self._after[worker] - before)
            self._tell_until = self._fleet.system.monotonic() + TELL_SECONDS

    def is_over(self, now: float) -> bool:
        """Return whether it is over: then `tell`."""
        for worker in [one for one in self._before if self._fleet.workers.get(one.pid) is not one]:
            del self._before[worker]
        if self._untold and now < self._tell_until:
            self._tell_workers()
        return now >= self._give_up_at or not (self._before or (self._untold and now < self._tell_until))

    def tell(self) -> None:
        """Tell the operator what has come of it."""
        moved = f"{counted(self._moved, 'connection')} moved"
        wrong = [
            f"worker {giver.slot} cannot be told to give {count} to worker {taker.slot}"
            for giver, taker, count in self._untold
        ]
        wrong += [f"worker {worker.slot} has not finished in {REBALANCE_SECONDS:g} s" for worker in self._before]
        if not wrong:
            log.info("rebalanced: %s", moved)
            self._done({"ok": True, "moved": self._moved})
            return
        more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
        log.warning("rebalanced in part: %s; %s%s", moved, wrong[0], more)
        self._done({"error": f"rebalanced in part: {moved}; {wrong[0]}{more}"})


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
