"""Pairing: the master joins each worker that leaves with those that stay, so that its connections can move (handover).

Only masters make these lines, and nobody else has an end: no other process can offer a connection, or take one. After
an upgrade the workers that stay are those of the next master, which gets the ends for them over its channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gtcpserver.process.descriptors import close_descriptor

from .messages import MASTER_KINDS
from .slots import WorkerProcess, WorkerState

if TYPE_CHECKING:
    from .fleet import Fleet

#: Most lines of one worker that leaves: a few spread its connections well enough, and each is two descriptors.
MOST_LINES = 16

#: Seconds between two times at which a worker that leaves gets new lines because it has lost all it had. It asks once a
#: second; one that was taken over might ask without end, and each line is work for this process and for others.
ALONE_SECONDS = 0.5

#: Stands for the workers of the next master in `WorkerProcess.paired`.
ELSEWHERE = 0


class Pairing:
    """Makes the lines of one fleet.

    Attributes:
        pass_on: after an upgrade: gives the next master an end for its worker of a slot, and tells it the process id of
            the worker that has the other end; returns False if not given.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.pass_on: Callable[[int, int, int], bool] | None = None

    def has_takers(self) -> bool:
        """Return whether there are workers that take the connections of one that leaves now."""
        return self.pass_on is not None or (not self._fleet.stopping and bool(self.staying()))

    def staying(self) -> list[WorkerProcess]:
        """Return the workers that take connections."""
        current = [slot.current for slot in self._fleet.active()]
        return [one for one in current if one is not None and one.handover and one.state is WorkerState.READY]

    def look(self) -> None:
        """Join workers that leave with those that have become ready. Call in every turn."""
        leaving = [one for one in self._fleet.workers.values() if one.handover and self._gives(one)]
        if not leaving:
            return
        if self.pass_on is not None:
            for worker in leaving:
                self._join_elsewhere(worker, self.pass_on)
        elif not self._fleet.stopping:
            staying = self.staying()
            for worker in leaving:
                for other in _takers(staying, worker.slot)[:MOST_LINES]:
                    self._join(worker, other)

    @staticmethod
    def _gives(worker: WorkerProcess) -> bool:
        return worker.state in (WorkerState.RETIRING, WorkerState.STOPPING) and not worker.ended

    def hear_alone(self, worker: WorkerProcess) -> None:
        """Give new lines to a worker that says that it has none."""
        now = self._fleet.system.monotonic()
        if self._gives(worker) and now >= worker.alone_until:
            worker.alone_until = now + ALONE_SECONDS
            worker.paired.clear()

    def _join(self, giver: WorkerProcess, taker: WorkerProcess) -> None:
        if taker.pid not in giver.paired and self.share(giver, taker):
            giver.paired.add(taker.pid)

    def _join_elsewhere(self, giver: WorkerProcess, pass_on: Callable[[int, int, int], bool]) -> None:
        if ELSEWHERE not in giver.paired and self._make_line(giver, lambda fd: pass_on(fd, giver.slot, giver.pid)):
            giver.paired.add(ELSEWHERE)

    def share(self, giver: WorkerProcess, taker: WorkerProcess, count: int | None = None) -> bool:
        """Have a worker give so many of its connections to another; return False if they cannot be told now.

        Args:
            count: how many; None: all, as it leaves.
        """
        share = {} if count is None else {"share": count}
        return self._make_line(giver, lambda fd: _tell_taker(taker, fd, giver.pid), **share)

    def _make_line(self, giver: WorkerProcess, give: Callable[[int], bool], **share: int) -> bool:
        """Give two workers the ends of a new line; return False if that must be tried again."""
        try:
            here, there = self._fleet.system.make_pair(MASTER_KINDS, MASTER_KINDS)
        except OSError:
            return False  # descriptors ran out
        try:
            # Now or not at all: a number that waits in an outbox may belong to another file later. A worker that has
            # got its end alone meets the end of the line.
            return give(here.fileno()) and giver.channel.send_if_clear("pair", there.fileno(), gives=True, **share)
        finally:
            here.close()
            there.close()

    def give(self, fd: int, slot: int, giver: int = 0) -> None:
        """Give the end of a line from a worker of the last master to one of ours.

        Args:
            fd: the descriptor, closed here. Without a worker for it, the other end meets the end of the line.
            slot: number of the slot whose worker should have it.
            giver: process id of the worker that has the other end; 0: the last master did not say.
        """
        try:
            takers = _takers(self.staying(), slot)
            if takers and not self._fleet.stopping:
                _tell_taker(takers[0], fd, giver)
            elif self.pass_on is not None:  # this master has been replaced, too
                self.pass_on(fd, slot, giver)
        finally:
            close_descriptor(fd)


def _tell_taker(taker: WorkerProcess, fd: int, giver: int) -> bool:
    return taker.channel.send_if_clear("pair", fd, gives=False, giver=giver)


def _takers(staying: list[WorkerProcess], slot: int) -> list[WorkerProcess]:
    # First its own slot, then those behind it: of more than MOST_LINES, the first ones would get nearly everything.
    return sorted(staying, key=lambda one: (one.slot < slot, one.slot))
