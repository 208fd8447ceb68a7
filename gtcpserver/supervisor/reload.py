"""Reload: replace all workers by new ones, all or none; one by one, as many as work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

from gtcpserver.plural import counted

from .slots import Slot, WorkerProcess, WorkerState

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger("gtcpserver")

#: Seconds that old workers may take to stop accepting; then the reload counts as done, since one may be blocked. One by
#: one, also the seconds that the next worker waits for the memory of the one replaced before.
LET_GO_SECONDS = 5.0

#: Called when an operation has ended, with None or the reason of its failure.
Done = Callable[[str | None], None]


class ReloadStage(Enum):
    """The stages of a reload."""

    FIRST = "first worker"  # one new worker starts ahead of the others
    OTHERS = "other workers"
    LETTING_GO = "letting go"  # the old ones are told to leave, and still accept
    DONE = "done"
    FAILED = "failed"


#: Every change of stage, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
RELOAD_CHANGES = {
    (ReloadStage.FIRST, ReloadStage.OTHERS): "the first new worker is proven",
    (ReloadStage.FIRST, ReloadStage.LETTING_GO): "it is proven, and was the only one",
    (ReloadStage.OTHERS, ReloadStage.LETTING_GO): "all new workers are proven",
    (ReloadStage.LETTING_GO, ReloadStage.DONE): "the old ones accept no more and have handed over, or 5 s are over",
    (ReloadStage.FIRST, ReloadStage.FAILED): "a new worker fails, or a stop begins",
    (ReloadStage.OTHERS, ReloadStage.FAILED): "a new worker fails, or a stop begins",
}


class Reload:
    """One reload. The first new worker starts before the others: broken code fails once, and not in every slot.

    New workers accept as soon as they are ready, beside the old ones, on the same sockets. From then on each is on
    probation: if one dies, or its event loop is blocked, the reload fails. When all new workers are proven, the old
    ones are let go. So every queue is served by the old code too until the new code has proved itself. The reload is
    done when the old workers accept no more: every later connection meets the new code.

    One by one (`SupervisorConfig.reload_one_by_one`) each old worker is let go before the next new one starts. The old
    code may be gone from the disk by then, so what was replaced stays replaced if a later one fails.
    """

    def __init__(self, fleet: Fleet, done: list[Done]) -> None:
        self._fleet = fleet
        self._done = done
        self.generation = fleet.generation + 1
        self._slots = fleet.active()
        self._one_by_one = fleet.config.reload_one_by_one
        first, rest = self._slots[:1], self._slots[1:]
        #: Groups of slots that get their new workers at the same time, when the workers of the group before are proven.
        steps = [first, *([slot] for slot in rest)] if self._one_by_one else [first, rest]
        self._steps = [step for step in steps if step]
        self._started: list[WorkerProcess] = []  # by the last step, and on probation
        self._all_started: set[WorkerProcess] = set()
        self._replaced = 0
        self._leaving: list[WorkerProcess] = []
        self.stage = ReloadStage.FIRST
        self._give_up_at = 0.0
        log.info("reload %d begins: %s", self.generation - 1, counted(len(self._slots), "worker"))

    def go_on(self) -> None:
        """Take the next step if the last one is done."""
        if self.stage is ReloadStage.LETTING_GO:
            self._end_when_they_have_let_go()
            return
        if not all(map(self._fleet.proven, self._started)):
            return
        if self._one_by_one:
            self._promote([slot for slot in self._slots if slot.next is not None])
            if self._steps and not self._has_room():
                return
        if self._steps:
            if self._started or self._replaced:
                self.stage = ReloadStage.OTHERS
            self._start(self._steps.pop(0))
            return
        if not self._one_by_one:
            self._promote(self._slots)
        self.stage = ReloadStage.LETTING_GO

    def _promote(self, slots: list[Slot]) -> None:
        if not slots:
            return
        fleet = self._fleet
        fleet.generation = self.generation
        self._leaving += [slot.current for slot in slots if slot.current is not None]
        self._give_up_at = fleet.system.monotonic() + LET_GO_SECONDS
        for slot in slots:
            slot.failures = 0
            fleet.promote(slot)
        self._replaced += len(slots)
        self._started = []

    def _has_room(self) -> bool:
        """Return whether, one by one, there is memory for the next worker: the one replaced last is gone, or lasts."""
        if self._fleet.too_many_retired():
            return False  # the oldest are told to finish, and have a time for it
        return self._fleet.system.monotonic() >= self._give_up_at or not any(map(self._is_there, self._leaving))

    def _is_there(self, worker: WorkerProcess) -> bool:
        return self._fleet.workers.get(worker.pid) is worker

    def _end_when_they_have_let_go(self) -> None:
        there = [one for one in self._leaving if self._is_there(one)]
        accepting = any(not one.drained or (one.handover and not one.settled) for one in there)
        if accepting and self._fleet.system.monotonic() < self._give_up_at:
            return
        self._fleet.reload = None
        self.stage = ReloadStage.DONE
        told = describe_moves(self._leaving) or "the old workers finish their connections"
        log.info("reload %d is done; %s", self.generation - 1, told)
        self._fleet.moved = count_moves(self._leaving) if any(one.handover for one in self._leaving) else {}
        self._tell(None)

    def _start(self, slots: list[Slot]) -> None:
        for slot in slots:
            worker = self._fleet.start(slot, self.generation)
            if worker is None:
                self.abort(f"worker {slot.number} could not be started")
                return
            slot.next = worker
            self._started.append(worker)
            self._all_started.add(worker)

    def fails_with(self, worker: WorkerProcess) -> bool:
        """Return whether the reload fails if this worker ends.

        One by one, that includes workers that have replaced an old one: what killed it may kill the others.
        """
        return worker in self._all_started and self.stage is not ReloadStage.LETTING_GO

    def abort(self, why: str) -> None:
        """Keep the old workers that were not replaced yet, and tell the new ones in their slots to leave."""
        fleet = self._fleet
        if fleet.reload is not self:
            return
        fleet.reload = None
        if self.stage is ReloadStage.LETTING_GO:  # the new ones serve already
            self.stage = ReloadStage.DONE
            self._tell(None)
            return
        self.stage = ReloadStage.FAILED
        for slot in self._slots:
            worker = slot.next
            # A worker whose predecessor has died meanwhile is needed.
            if worker is None or (slot.current is None and worker.state is WorkerState.READY and not fleet.stopping):
                if worker is not None:
                    fleet.promote(slot)
                continue
            if not fleet.stopping:
                fleet.let_go(slot, worker)
        if fleet.stopping:
            log.info("reload %d is given up: %s", self.generation - 1, why)
            self._tell(why)
            return
        if not self._replaced:
            log.error("reload %d failed, the old workers serve on: %s", self.generation - 1, why)
            self._tell(why)
            return
        how_far = f"{self._replaced} of {counted(len(self._slots), 'worker')} have the new code"
        log.error("reload %d failed, %s, the others serve on: %s", self.generation - 1, how_far, why)
        self._tell(f"{why}; {how_far}")

    def _tell(self, error: str | None) -> None:
        for done in self._done:
            done(error)


def count_moves(workers: Iterable[WorkerProcess]) -> dict[str, Any]:
    """Return how many connections workers that leave have moved to others, and how many stay, by reason."""
    staying: Counter[str] = Counter()
    for worker in workers:
        staying.update(worker.staying)
    return {"moved": sum(worker.moved for worker in workers), "staying": dict(staying)}


def describe_moves(workers: list[WorkerProcess]) -> str:
    """Return the same in words; "" if they do not hand over."""
    if not any(worker.handover for worker in workers):
        return ""
    moves = count_moves(workers)
    text = f"{counted(moves['moved'], 'connection')} moved"
    if moves["staying"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(moves["staying"].items()))
        text += f", {sum(moves['staying'].values())} finish in the old workers ({reasons})"
    return text
