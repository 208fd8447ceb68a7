"""Care: handles workers whose event loop is late or blocked, or whose start takes too long."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

from gtcpserver.diagnostics.logs import FaultLimiter, also

from .config import MAX_WORKERS
from .slots import WorkerProcess, WorkerState

if TYPE_CHECKING:
    from .fleet import Fleet

log = logging.getLogger("gtcpserver")

#: Seconds between two looks at the workers when no event wakes the master.
TICK_SECONDS = 0.25

#: Seconds that a worker may take to start, or twice the worker_timeout if that is more. Importing big programs takes
#: seconds.
START_SECONDS = 60.0

#: Seconds for a blocked worker to log its stacks. Python code is interrupted at once. A C function that does not return
#: is not interrupted; it gets SIGABRT, on which the faulthandler module prints what it can.
DUMP_SECONDS = 1.0

LEAVING = (WorkerState.RETIRING, WorkerState.STOPPING)


class Care:
    """Watches the workers' beats, and steers new connections away from late workers.

    Attributes:
        late: numbers of the slots that lag while most others do not.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._looked_at = fleet.system.monotonic()
        self.late: set[int] = set()
        # A machine that is short of CPU makes idle workers late for a moment, again and again.
        self._lags = FaultLimiter(interval=60.0, max_keys=MAX_WORKERS, clock=fleet.system.monotonic)
        self._told: set[int] = set()  # those of `late` that are in the log

    def look(self, now: float) -> None:
        """Note silent workers and end blocked ones. Call often."""
        fleet = self._fleet
        timeout = fleet.config.worker_timeout
        if now - self._looked_at > 4 * TICK_SECONDS:
            # This process stood still (SIGSTOP, a suspended machine): the workers' beats are still unread.
            for worker in fleet.workers.values():
                worker.last_beat = max(worker.last_beat, now - TICK_SECONDS)
        self._looked_at = now
        for worker in list(fleet.workers.values()):
            worker.note_silence(now)
            if (worker.channel.ended or worker.channel.unread) and worker.kill_at is None:
                worker.kill_at = now + DUMP_SECONDS  # it is ending, or has closed its end of the channel
            if worker.dump_asked_at is not None:
                self._end_blocked(worker, now)
            elif timeout is None or worker.kill_at is not None:
                pass  # a leaving worker has its own timeout, if any
            elif worker.state in (WorkerState.READY, *LEAVING) and now - worker.last_beat > timeout:
                log.error(
                    "worker %d (pid %d): event loop blocked for %.1f s; replacing it",
                    worker.slot,
                    worker.pid,
                    now - worker.last_beat,
                )
                self._begin_to_end(worker, now)
            elif worker.state is WorkerState.STARTING and now - worker.started_at > max(START_SECONDS, 2 * timeout):
                worker.failure = f"it was not ready after {now - worker.started_at:.0f} s"
                worker.signal(signal.SIGUSR2)
                worker.dump_asked_at = now

    def _begin_to_end(self, worker: WorkerProcess, now: float) -> None:
        slot = self._fleet.slots[worker.slot]
        slot.why = f"worker {worker.slot} (pid {worker.pid}) was replaced: its event loop was blocked"
        worker.dump_asked_at = now
        worker.signal(signal.SIGUSR2)
        self._fleet.fail_with(worker, slot.why)
        # Its slot is free now: the next worker need not wait for the dump.
        self._fleet.let_go(slot, worker)

    def _end_blocked(self, worker: WorkerProcess, now: float) -> None:
        assert worker.dump_asked_at is not None
        waited = now - worker.dump_asked_at
        if worker.dumped or waited > 2 * DUMP_SECONDS:
            if worker.state is WorkerState.STARTING:
                worker.signal(signal.SIGKILL)  # its end counts as a failed start
            elif worker.state is not WorkerState.KILLED:
                worker.kill()
        elif waited > DUMP_SECONDS:
            worker.signal(signal.SIGABRT)

    def steer(self) -> None:
        """Send new connections to slots that accept in time, if there are any."""
        fleet = self._fleet
        active = fleet.active()
        serving = [slot for slot in active if slot.serves()]
        late = {slot.number for slot in serving if slot.lags()}
        if len(late) * 2 > len(serving):
            # The whole machine is busy, not single workers: the others could not take more.
            late = set()
        self._tell(late)
        self.late = late
        wanted = {slot.number for slot in serving} - late or {slot.number for slot in active}
        cpus: dict[int, int] = {}
        for slot in active:
            cpu = fleet.cpu_of(slot.number)
            if cpu is not None:
                cpus.setdefault(cpu, slot.number)
        fleet.sockets.steer(wanted, cpus)

    def _tell(self, late: set[int]) -> None:
        for number in sorted(late - self.late):
            left_out = self._lags.allow(number)
            if left_out is not None:
                until = "new connections go to the others until it has caught up"
                log.warning("worker %d lags: %s%s", number, until, also(left_out))
                self._told.add(number)
        for number in sorted(self._told - late):
            log.info("worker %d has caught up", number)
        self._told &= late
