"""Reload: a new worker in every slot, then the old ones leave. All of it happens, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from gtcpserver.supervisor.slots import Slot, WorkerProcess, WorkerState

if TYPE_CHECKING:
    from gtcpserver.supervisor.fleet import Fleet

log = logging.getLogger("gtcpserver")

LET_GO_SECONDS = 5.0
"""How long old workers may take to stop accepting until a reload counts as done all the same: one may be blocked."""

Done = Callable[[str | None], None]
"""Called when an operation has ended, with None or why it failed."""


class Reload:
    """One reload. The first new worker goes ahead alone: code that cannot start fails once, and not in every slot.

    New workers accept as soon as they are ready, beside the old ones, on the same sockets; the old ones are let go when
    every new one is ready. It is done when they accept no more: whoever connects then meets the new code.
    """

    def __init__(self, fleet: Fleet, done: list[Done]) -> None:
        self._fleet = fleet
        self._done = done
        self.generation = fleet.generation + 1
        self._slots = fleet.active()
        self._started: dict[int, WorkerProcess] = {}
        self._leaving: list[WorkerProcess] | None = None
        self._give_up_at = 0.0
        log.info("reload %d begins: %d workers", self.generation - 1, len(self._slots))

    def go_on(self) -> None:
        """Takes the next step if the last one is done."""
        if self._leaving is not None:
            self._end_when_they_have_let_go(self._leaving)
            return
        if not self._started:
            self._start(self._slots[:1])
            return
        if not all(worker.state is WorkerState.READY for worker in self._started.values()):
            return
        if len(self._started) < len(self._slots):
            self._start(self._slots[1:])
            return
        fleet = self._fleet
        fleet.generation = self.generation
        self._leaving = [slot.current for slot in self._slots if slot.current is not None]
        self._give_up_at = monotonic() + LET_GO_SECONDS
        for slot in self._slots:
            slot.failures = 0
            fleet.promote(slot)

    def _end_when_they_have_let_go(self, leaving: list[WorkerProcess]) -> None:
        running = self._fleet.workers
        if any(one.pid in running and not one.drained for one in leaving) and monotonic() < self._give_up_at:
            return
        self._fleet.reload = None
        log.info("reload %d is done; the old workers finish their connections", self.generation - 1)
        self._tell(None)

    def _start(self, slots: list[Slot]) -> None:
        for slot in slots:
            worker = self._fleet.start(slot, self.generation)
            if worker is None:
                self.abort(f"worker {slot.number} could not be started")
                return
            slot.next = self._started[slot.number] = worker

    def abort(self, why: str) -> None:
        """The old workers stay, the new ones leave."""
        fleet = self._fleet
        if fleet.reload is not self:
            return
        fleet.reload = None
        if self._leaving is not None:  # the new ones have their places already
            self._tell(None)
            return
        for slot in self._slots:
            worker = slot.next
            # One whose predecessor has died meanwhile is needed.
            if worker is None or (slot.current is None and worker.state is WorkerState.READY and not fleet.stopping):
                if worker is not None:
                    fleet.promote(slot)
                continue
            if not fleet.stopping:
                fleet.let_go(slot, worker)
        log.error("reload %d failed, the old workers serve on: %s", self.generation - 1, why)
        self._tell(why)

    def _tell(self, error: str | None) -> None:
        for done in self._done:
            done(error)
