"""Fleet: all workers of a master. Starts them, replaces those that die, and lets successors take over.

Nothing in here waits: the master calls `receive`, `reap` and `look_after`, and the fleet does the work that is due.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gtcpserver.linux import cpus
from gtcpserver.plural import counted
from gtcpserver.server.server import DEFAULT_STOP_TIMEOUT
from gtcpserver.shared.memory import SharedMemory

from .care import Care
from .config import SupervisorConfig
from .lending import Loans
from .log_files import STDERR, log_with_details
from .messages import (
    MASTER_KINDS,
    WORKER_KINDS,
    Message,
    checked_counts,
    checked_rows,
    checked_stats,
    checked_table,
)
from .pairing import Pairing
from .program import Program
from .rebalance import Rebalance
from .relief import Relief
from .reload import Done, Reload
from .slots import Selected, Slot, WorkerProcess, WorkerState, back_off, describe_status
from .sockets import ListeningSockets
from .system import System
from .totals import Totals
from .worker import Job

log = logging.getLogger("gtcpserver")

#: A worker that dies within this time (seconds) after it was ready counts as a failed start, unless it was killed from
#: outside.
SHORT_LIFE = 1.0

#: Seconds beyond its timeout until a leaving worker is killed: it ends handlers that do not finish (up to 1 s, see
#: `stopping`), runs their `finally` blocks and the hook worker_stop.
KILL_MARGIN = 5.0

#: The same in seconds without a timeout.
HALT_SECONDS = 3.0

#: A replaced worker that is still there after this time (seconds) has connections that last. It is not told to hurry
#: before: other workers are gone by then, and a connection that has not sent anything yet would lose its first request.
LASTING_SECONDS = 1.0

#: Old generations, in multiples of the wanted workers, above which the log warns: with the one that serves, three times
#: the memory.
FEW_RETIRED = 2


@dataclass(frozen=True)
class Failure:
    """The reason why a worker could not start."""

    message: str
    details: str
    status: int


class Fleet:
    """All workers of a master.

    Args:
        folder: working directory of the workers.
        close: called in a new worker to close the master's descriptors.

    Attributes:
        slots: slots by number; a slot keeps its number and its sockets.
        target: wanted number of workers.
        up: every slot has had a ready worker once: the first start is complete.
        first_failure: the reason why the first start cannot complete.
        stopping: no worker is replaced any more.
        ending: the master waits for the end, also of replaced workers.
        restarts: number of workers started in place of dead ones.
        memory: the counts that all workers share; None: each counts for itself.
        deaths: number of workers that have ended.
        moved: how many connections the old workers of the last reload have moved, and why others stay.
        replaces: this is the fleet of an upgrade: the start is complete when every worker has survived its probation,
            and fails if one does not, as the previous fleet still serves.
    """

    def __init__(
        self,
        config: SupervisorConfig,
        sockets: ListeningSockets,
        program: Program,
        folder: str,
        close: Callable[[], None],
        slots: list[int],
        system: System,
    ) -> None:
        self.system = system
        self.config = config
        self.sockets = sockets
        self.program = program
        self.slots = {number: Slot(number) for number in slots}
        self.target = len(slots)
        self.generation = 1
        self.workers: dict[int, WorkerProcess] = {}
        self.totals = Totals()
        self.up = False
        self.first_failure: Failure | None = None
        self.stopping = False
        self.ending = False
        self.restarts = 0
        self.replaces = False
        self.moved: dict[str, Any] = {}
        self.rebalance: Rebalance | None = None
        self.finished = 0
        self.ended = 0
        self.reload: Reload | None = None
        self._reloads_wanted: list[Done] = []
        self._scaled: list[Done] = []
        self._warn_above = 0
        self._reload_waits = False  # for old workers; already logged
        self._folder = folder
        self._close_masters = close
        self._cpus = cpus() if config.pin_cpus else []
        self.care = Care(self)
        self.memory: SharedMemory | None = None
        self.deaths = 0
        self.pairing = Pairing(self)
        self._relief = Relief(self) if config.relieve_lagging else None
        #: Whether another child of the master holds the sockets of all slots: one just forked, for a moment, or a
        #: failed new master until it ends.
        self.others_have_sockets: Callable[[], bool] = lambda: False
        #: Called when the workers have accepted `max_accepts` connections: the service is to stop.
        self.enough: Callable[[], None] = lambda: None

    def active(self) -> list[Slot]:
        """Return the slots that stay."""
        return [slot for slot in self.slots.values() if not slot.closing]

    def cpu_of(self, slot: int) -> int | None:
        return self._cpus[slot % len(self._cpus)] if self._cpus else None

    # -- start -------------------------------------------------------------------------------------------------------

    def start(self, slot: Slot, generation: int) -> WorkerProcess | None:
        """Fork a worker for a slot; return None if the system refuses, which counts as a failed start."""
        number = slot.number
        try:
            ours, theirs = self.system.make_pair(WORKER_KINDS, MASTER_KINDS)
        except OSError as error:
            self._start_failed(slot, f"cannot start worker {number}: {error.strerror}")
            return None
        job = Job(
            number=number,
            generation=generation,
            build=self.program.build,
            prepare=self.program.prepare,
            program=self.program.name,
            sockets=self.sockets.of_slot(number),
            channel=theirs,
            config=self.config,
            log_style=self.program.log_style,
            cpu=self.cpu_of(number),
            predecessor=slot.why,
            master=self.system.pid(),
            folder=self._folder,
            settle=self.program.settle,
            memory=self.memory,
        )

        def close() -> None:
            ours.close()
            self.sockets.close_all_but(number)
            for worker in self.workers.values():
                worker.channel.close()
            self._close_masters()

        try:
            pid = self.system.start_worker(job, close)
        except OSError as error:
            ours.close()
            theirs.close()
            self._start_failed(slot, f"cannot start worker {number}: {error.strerror}")
            return None
        theirs.close()
        loans = Loans(complete=self.config.user is None or os.geteuid() != 0)  # it does not change its user
        worker = self.workers[pid] = WorkerProcess(number, pid, ours, generation, self.system, loans=loans)
        return worker

    def _start_failed(self, slot: Slot, what: str) -> None:
        delay = back_off(slot.failures)
        slot.failures += 1
        slot.failed_at = self.system.monotonic()
        slot.not_before = slot.failed_at + delay
        log.error("%s; trying again in %.1f s", what, delay)

    # -- messages from workers ---------------------------------------------------------------------------------------

    def receive(self, worker: WorkerProcess) -> None:
        """Read a worker's messages. Raises OSError if nothing can be read now."""
        try:
            messages = worker.channel.receive()
        except OSError:
            worker.last_beat = self.system.monotonic()  # the worker is not the silent one
            raise
        self._hear_all(worker, messages)

    def _hear_all(self, worker: WorkerProcess, messages: list[tuple[Message, int | None]]) -> None:
        """Hear each message, those behind one that fails, too; raise the last failure."""
        failure: Exception | None = None
        for message, _ in messages:
            try:
                self._hear(worker, message)
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure

    def _hear(self, worker: WorkerProcess, message: Message) -> None:
        if message.kind in ("stats", "stopped"):
            worker.stats = checked_stats(message.fields.get("stats")) or worker.stats
            worker.rss = message.count("rss") or worker.rss
            worker.reported = True
        if message.kind == "beat":
            worker.note_beat(max(0.0, message.number("lag")))
        elif message.kind == "ready":
            self._is_ready(worker, message)
        elif message.kind == "failed":
            worker.failure = message.text("error") or "no reason given"
            worker.details = message.text("details")
            worker.status = 2 if message.number("status") == 2 else 3
        elif message.kind == "retire":
            worker.wants_to_retire = message.text("why") or "asks for it"
        elif message.kind == "dumped":
            worker.dumped = True
        elif message.kind == "connections":
            worker.table = checked_table(message.fields.get("table"))
            worker.places = checked_counts(message.fields.get("places"))
        elif message.kind == "selected":
            number = message.count("number")
            if number in worker.selected:
                rows = checked_rows(message.fields.get("rows"))
                worker.selected[number] = Selected(rows, message.count("found"), message.count("ended"))
        elif message.kind == "reopen":
            worker.channel.send("reopen", fd=STDERR)
        elif message.kind in ("names", "unprivileged", "borrow"):
            worker.loans.hear(message, worker.channel)
        elif message.kind == "enough":
            worker.said_enough = True  # perhaps before it is ready
            self._end_if_enough(worker)
        elif message.kind == "moved":
            worker.settled = True
            worker.moved = message.count("moved")
            worker.staying = checked_counts(message.fields.get("staying"))
        elif message.kind == "shared":
            if self.rebalance is not None:
                self.rebalance.hear(worker, message)
            if self._relief is not None:
                self._relief.hear(worker)
        elif message.kind == "alone":
            self.pairing.hear_alone(worker)
        elif message.kind == "drained":
            worker.drained = True
        elif message.kind == "stopped":
            worker.ended = worker.settled = True
            worker.moved, worker.staying = int(worker.stats.get("moved", 0)), {}
            worker.fatal = message.text("error")
            self.finished += message.count("finished")
            self.ended += message.count("ended")

    def _is_ready(self, worker: WorkerProcess, message: Message) -> None:
        if not worker.has_begun:  # before it serves: what strangers make of it later does not count
            worker.has_begun = True
            worker.handover = message.fields.get("handover") is True
            worker.ends_service = message.fields.get("ends") is True
            self._end_if_enough(worker)
        if worker.state is not WorkerState.STARTING:
            return  # it was told to leave in the meantime
        worker.state = WorkerState.READY
        worker.ready_at = worker.last_beat = self.system.monotonic()
        slot = self.slots[worker.slot]
        slot.why = ""
        log.info(
            "worker %d (pid %d) is ready after %.2f s", slot.number, worker.pid, worker.ready_at - worker.started_at
        )

    def _end_if_enough(self, worker: WorkerProcess) -> None:
        if worker.ends_service and worker.said_enough:
            self.enough()

    def proven(self, worker: WorkerProcess) -> bool:
        """Return whether a new worker has survived its probation, so that the worker it replaces may leave."""
        over_at = worker.ready_at + self.config.probation
        if worker.state is not WorkerState.READY or worker.channel.ended or self.system.monotonic() < over_at:
            return False
        # A beat after it shows that the event loop runs. A blocked worker is waited for, and killed after the
        # worker_timeout; without a worker_timeout, nothing would end the wait.
        return worker.last_beat >= over_at or self.config.worker_timeout is None

    def promote(self, slot: Slot) -> None:
        """Give the slot to the successor; the previous worker finishes its connections."""
        before, slot.current, slot.next = slot.current, slot.next, None
        if before is not None:
            self.let_go(slot, before)

    def let_go(self, slot: Slot, worker: WorkerProcess, kind: str = "retire") -> None:
        """Make a worker leave its slot: "retire" leaves the sockets to a successor, "stop" drains them first."""
        if worker.leaving:
            return
        self._take_out(slot, worker)
        slot.gone_on.append(worker)
        worker.retired_at = self.system.monotonic()
        worker.state = WorkerState.RETIRING if kind == "retire" else WorkerState.STOPPING
        timeout = self.config.graceful_timeout if self.ending else self.config.retire_timeout
        moves = worker.handover and self.pairing.has_takers()
        worker.channel.send(kind, timeout=timeout, all=self.stopping, hurry=self.ending, moves=moves)
        self._kill_after(worker, timeout)

    def _kill_after(self, worker: WorkerProcess, timeout: float | None) -> None:
        if timeout is not None:
            kill_at = self.system.monotonic() + timeout + KILL_MARGIN
            worker.kill_at = kill_at if worker.kill_at is None else min(worker.kill_at, kill_at)

    @staticmethod
    def _take_out(slot: Slot, worker: WorkerProcess) -> None:
        if slot.current is worker:
            slot.current = None
        elif slot.next is worker:
            slot.next = None

    # -- workers that end --------------------------------------------------------------------------------------------

    def reap(self, pid: int, status: int) -> bool:
        """Handle the end of a child process; return False if it was not a worker."""
        worker = self.workers.get(pid)
        if worker is None:
            return False
        del self.workers[pid]
        self.deaths += 1
        try:
            self._hear_all(worker, worker.channel.receive_rest())
        finally:
            worker.channel.close()
            self._bury(worker, status)
        return True

    def _bury(self, worker: WorkerProcess, status: int) -> None:
        self.totals.forget_worker(worker.stats)
        slot = self.slots[worker.slot]
        was_next = slot.next is worker
        self._take_out(slot, worker)
        if worker in slot.gone_on:
            slot.gone_on.remove(worker)
        how = f"worker {slot.number} (pid {worker.pid}) {describe_status(status)}"
        if worker.leaving:
            self._left(worker, how, status)
        elif worker.state is WorkerState.STARTING:
            self._never_started(slot, worker, was_next, how)
        else:
            self._died(slot, worker, was_next, how, status)

    def _left(self, worker: WorkerProcess, how: str, status: int) -> None:
        if worker.state is WorkerState.KILLED or not status:
            log.info("worker %d (pid %d) has left", worker.slot, worker.pid)
        elif self.first_failure is None:  # first_failure is logged elsewhere, once
            why = worker.failure or worker.fatal
            log.error("%s while it was leaving%s", how, f": {why}" if why else "")

    def _never_started(self, slot: Slot, worker: WorkerProcess, was_next: bool, how: str) -> None:
        reason = worker.failure or how
        if not self.up:
            if self.first_failure is None and not self.stopping:
                self.first_failure = Failure(reason, worker.details, worker.status)
            return
        if worker.details:
            log_with_details(logging.ERROR, f"worker {slot.number} cannot start: {reason}", worker.details)
        if self.fail_with(worker, reason) and was_next:
            return
        slot.why = f"worker {slot.number} (pid {worker.pid}) could not start: {reason}"
        if not self.stopping:
            self._start_failed(slot, f"worker {slot.number} (pid {worker.pid}) could not start: {reason}")

    def _died(self, slot: Slot, worker: WorkerProcess, was_next: bool, how: str, status: int) -> None:
        active = worker.stats.get("active", 0)
        lived = self.system.monotonic() - worker.ready_at
        slot.why = how + (f": {worker.fatal}" if worker.fatal else "")
        log.error("%s; it had about %s", slot.why, counted(active, "connection"))
        how = f"{how}, {lived:.2f} s after it was ready"
        if self.fail_with(worker, how) and (was_next or not self.up):
            return
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (9, 15)
        if was_next or (not killed and lived < SHORT_LIFE):
            self._start_failed(slot, f"worker {slot.number} lived {lived:.2f} s")

    def fail_with(self, worker: WorkerProcess, how: str) -> bool:
        """End the reload or the upgrade that started a failed worker; return False if there is none."""
        if worker.leaving:  # started by an earlier reload, which has failed
            return False
        if self.reload is not None and self.reload.fails_with(worker):
            self.reload.abort(how)
            return True
        if not self.replaces or self.up:
            return False
        if self.first_failure is None and not self.stopping:
            self.first_failure = Failure(how, "", 3)
        return True

    # -- what is due -------------------------------------------------------------------------------------------------

    def look_after(self, now: float) -> None:
        """Do the work that is due. Call a few times a second and after every event."""
        for worker in list(self.workers.values()):
            worker.channel.flush()
            if worker.kill_at is not None and now >= worker.kill_at:
                if worker.state is not WorkerState.KILLED:
                    log.warning("worker %d (pid %d) does not end: killing it", worker.slot, worker.pid)
                if worker.channel.ended or worker.channel.unread:
                    worker.failure = worker.failure or "it has closed its channel to the master"
                worker.kill()
        self.care.look(now)
        self._bound_retired(now)
        self.pairing.look()
        if self.rebalance is not None and self.rebalance.is_over(now):
            over, self.rebalance = self.rebalance, None
            over.tell()
        if self.stopping:
            return
        self._complete_start()
        if self.reload is None:
            self._promote_proven()  # first, or a reload would wait until no worker needs recycling
        if self.reload is not None:
            self.reload.go_on()
        elif self._reloads_wanted and self.up and self._may_reload():
            done, self._reloads_wanted = self._reloads_wanted, []
            self._reload_waits = False
            self.reload = Reload(self, done)
            self.reload.go_on()
        elif self.up:
            self._scale_towards_target()
            if not self.too_many_retired():
                self._recycle(now)
        for slot in self.active():
            if slot.current is None and slot.next is None and now >= slot.not_before and self._may_start():
                self.restarts += self.up and bool(slot.why)
                slot.current = self.start(slot, self.generation)
        self._close_empty_slots()
        self._tell_scaled()
        self.pairing.look()  # at once for those that leave since
        self.care.steer()
        if self._relief is not None:
            self._relief.look(now, self.care.late)

    def next_due(self) -> float:
        """Return the latest time (monotonic) at which `look_after` has work that no event announces."""
        times = []
        if not self.stopping and self._may_start():
            times = [slot.not_before for slot in self.active() if slot.current is None and slot.next is None]
        times += [worker.kill_at for worker in self.workers.values() if worker.kill_at is not None]
        times += [worker.silent_at() for worker in self.workers.values() if not worker.lagging]
        return min(times, default=float("inf"))

    def _may_start(self) -> bool:
        return self.first_failure is None

    def _complete_start(self) -> None:
        if not self.up and all(map(self._is_complete, self.slots.values())):
            self.up = True
        now = self.system.monotonic()
        for slot in self.slots.values():
            current = slot.current
            if current is None or current.state is not WorkerState.READY or current.ready_at < slot.failed_at:
                continue  # its successor has failed since
            if now - current.ready_at >= SHORT_LIFE:
                slot.failures = 0

    def _is_complete(self, slot: Slot) -> bool:
        if not self.replaces:
            return slot.serves()
        return slot.current is not None and self.proven(slot.current)

    def _promote_proven(self) -> None:
        """Promote successors outside of a reload (recycling)."""
        for slot in self.slots.values():
            # If the previous worker has died, the slot has no other.
            if slot.next is not None and (
                self.proven(slot.next) or (slot.current is None and slot.next.state is WorkerState.READY)
            ):
                slot.failures = 0
                self.promote(slot)

    def changing(self) -> bool:
        """Return whether slots come or go, or a worker is being replaced by its successor."""
        return self._replacing() or not len(self.active()) == len(self.slots) == self.target

    def reloading(self) -> bool:
        """Return whether a reload is in progress, or requested and about to begin."""
        return self.reload is not None or bool(self._reloads_wanted)

    def _may_reload(self) -> bool:
        if self.too_many_retired():
            if not self._reload_waits:
                log.info("the reload waits for old workers to finish (--max-retired %d)", self.config.max_retired)
            self._reload_waits = True
            return False
        return not self._replacing()

    def _replacing(self) -> bool:
        return any(slot.next is not None for slot in self.slots.values())

    # -- replaced workers --------------------------------------------------------------------------------------------

    def retired(self) -> list[WorkerProcess]:
        """Return the workers that only finish their connections, the earliest replaced first."""
        found = [worker for slot in self.slots.values() for worker in slot.gone_on]
        return sorted(found, key=lambda worker: worker.retired_at)

    def too_many_retired(self) -> bool:
        most = self.config.max_retired
        return most is not None and sum(len(slot.gone_on) for slot in self.slots.values()) > most

    def _bound_retired(self, now: float) -> None:
        """Warn when old workers pile up; tell the oldest to finish if there are too many."""
        retired = self.retired()
        self._warn_of_retired(retired, now)
        most = self.config.max_retired
        if most is None or self.ending:
            return
        timeout = self.config.graceful_timeout
        if timeout is None:
            timeout = DEFAULT_STOP_TIMEOUT
        for worker in retired[: max(0, len(retired) - most)]:
            if worker.hastened or now - worker.retired_at < LASTING_SECONDS:
                continue
            worker.hastened = True
            log.warning(
                "worker %d (pid %d) has %g s to finish its %s: %s, at most %d may stay",
                worker.slot,
                worker.pid,
                timeout,
                counted(worker.stats.get("active", 0), "connection"),
                counted(len(retired), "retired worker"),
                most,
            )
            self._hasten(worker, timeout)

    def _hasten(self, worker: WorkerProcess, timeout: float | None) -> None:
        worker.channel.send("hasten", timeout=timeout)
        self._kill_after(worker, timeout)

    def _warn_of_retired(self, retired: list[WorkerProcess], now: float) -> None:
        if len(retired) <= self.target:
            self._warn_above = FEW_RETIRED * self.target
        elif len(retired) > self._warn_above:
            self._warn_above = 2 * len(retired)  # not at each further one
            log.warning(
                "%d retired workers still have connections, the oldest for %.0f s (--max-retired, --retire-timeout)",
                len(retired),
                now - retired[0].retired_at,
            )

    # -- reload, scale, recycle --------------------------------------------------------------------------------------

    def want_reload(self, done: Done) -> None:
        """Start new workers in every slot, then let old ones leave; all or nothing. `done` gets None or the error."""
        self._reloads_wanted.append(done)

    def want_scale(self, count: int, done: Done | None = None) -> None:
        """Change the number of workers."""
        self.target = count
        if done is not None:
            self._scaled.append(done)

    def _scale_towards_target(self) -> None:
        active = self.active()
        for _ in range(self.target - len(active)):
            number = next(n for n in range(len(self.slots) + 1) if n not in self.slots)
            try:
                self.sockets.add_slot(number)
            except OSError as error:
                why = f"cannot open a socket for worker {number}: {error.strerror}"
                log.error("%s", why)
                self.target = len(self.active())
                self._tell_all_scaled(why)
                return
            self.slots[number] = Slot(number)
            # Nothing accepts there yet.
            self.care.steer()
        for slot in sorted(active, key=lambda slot: slot.number, reverse=True)[: max(0, len(active) - self.target)]:
            slot.closing = True
            self.care.steer()
            for worker in (slot.current, slot.next):
                if worker is not None:
                    self.let_go(slot, worker, "stop")

    def _close_empty_slots(self) -> None:
        # A worker just forked holds the sockets of all slots for a moment, even if it was told to leave in the
        # meantime. The kernel removes a member from its group when the last copy of its socket is closed.
        if self.others_have_sockets() or not all(worker.ready_at for worker in self.workers.values()):
            return
        for slot in [slot for slot in self.slots.values() if slot.closing and not slot.workers()]:
            lost = self.sockets.remove_slot(slot.number)
            del self.slots[slot.number]
            log.log(logging.WARNING if lost else logging.INFO, "slot %d is closed, %d reset", slot.number, lost)

    def _tell_scaled(self) -> None:
        if not self._scaled:
            return
        active = self.active()
        failing = next((slot for slot in active if slot.failures and not slot.serves()), None)
        # Closing slots take their own time: their connections may be long.
        if failing is None and not (len(active) == self.target and all(slot.serves() for slot in active)):
            return
        self._tell_all_scaled(failing.why if failing is not None else None)

    def _tell_all_scaled(self, error: str | None) -> None:
        done, self._scaled = self._scaled, []
        for tell in done:
            tell(error)

    def _recycle(self, now: float) -> None:
        if self._replacing():
            return  # one after the other: memory for one more worker is enough
        for slot in self.active():
            worker = slot.current
            if worker is None or worker.state is not WorkerState.READY or now < slot.not_before:
                continue
            if worker.wants_to_retire:
                log.info("worker %d (pid %d) %s: replacing it", slot.number, worker.pid, worker.wants_to_retire)
                slot.next = self.start(slot, self.generation)
                return

    # -- the end -----------------------------------------------------------------------------------------------------

    def tell_all(self, kind: str, **fields: Any) -> None:
        for worker in self.workers.values():
            worker.channel.send(kind, **fields)

    def stop(self, leave: bool) -> None:
        """Tell every worker to finish; none is replaced.

        Args:
            leave: another master serves the same sockets: leave their queues to it. Otherwise drain them.
        """
        self._end_operations("the master stops")
        if not leave:
            self.sockets.mute_shared()
            self.hasten()
        for slot in self.slots.values():
            for worker in (slot.current, slot.next):
                if worker is not None:
                    self.let_go(slot, worker, "retire" if leave else "stop")
        if leave:
            self.sockets.close(keep_paths=True)
        else:
            self.close_drained()

    def hasten(self) -> None:
        """At a stop: limit replaced workers to the time that the others have."""
        if self.ending:
            return
        self.ending = True
        timeout = self.config.graceful_timeout
        for slot in self.slots.values():
            for worker in slot.gone_on:
                self._hasten(worker, timeout)

    def halt(self) -> None:
        """End everything now."""
        self._end_operations("the master stops")
        now = self.system.monotonic()
        for worker in self.workers.values():
            worker.channel.send("halt")
            worker.kill_at = now + HALT_SECONDS if worker.kill_at is None else min(worker.kill_at, now + HALT_SECONDS)
            if worker.state is not WorkerState.KILLED:
                worker.state = WorkerState.STOPPING

    def close_drained(self) -> None:
        """During a stop: close the sockets that workers have drained, so that new clients are refused at once."""
        draining = {w.slot for w in self.workers.values() if w.state is WorkerState.STOPPING and not w.drained}
        for slot in self.slots.values():
            if slot.number not in draining and (lost := self.sockets.close_slot(slot.number)):
                log.warning("%s of slot %d reset: it had no worker", counted(lost, "queued connection"), slot.number)
        if not draining:
            self.sockets.close_shared()

    def _end_operations(self, why: str) -> None:
        self.stopping = True
        if self.reload is not None:
            self.reload.abort(why)
        for tell in self._reloads_wanted + self._scaled:
            tell(why)
        self._reloads_wanted, self._scaled = [], []

    def stats(self) -> dict[str, Any]:
        """Return the counters of all workers, including those that are gone."""
        return self.totals.of(worker.stats for worker in self.workers.values())
