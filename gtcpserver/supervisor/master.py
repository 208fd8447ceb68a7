"""Master: opens the sockets, starts workers that serve them, and obeys signals. It serves no connection itself.

| signal | does |
| --- | --- |
| TERM, INT | graceful stop; a second one of either ends everything at once |
| QUIT | end everything at once |
| HUP | reload: new workers, then the old ones leave; if the terminal was closed: graceful stop |
| USR2 | upgrade: a new master with the same sockets, then this one leaves |
| USR1 | reopen the log file |
| TTIN, TTOU | one worker more, one fewer |

The loop is a poll(2) on a pipe for signals and on the workers' channels. It has no event loop of gevent's, which a fork
would share, no locks, and nothing else that could wait.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.errors import ConfigError, GtcpServerError
from gtcpserver.files.trusted_path import UntrustedPath
from gtcpserver.plural import counted
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import register
from gtcpserver.process.signal_stack import enlarge_signal_stack
from gtcpserver.shared.memory import SharedMemory

from . import systemd
from .agent import AgentCheck
from .care import TICK_SECONDS
from .channel import RETRY_SECONDS, Channel
from .commands import Commands
from .config import MAX_WORKERS, SupervisorConfig
from .control import ControlSocket
from .fleet import HALT_SECONDS, Failure, Fleet
from .log_files import STDERR, log_in_master, open_log_file, write_stderr_to
from .monitor import MonitorProcess
from .pid_file import PidFile
from .program import Program
from .reload import Done
from .slots import WorkerProcess
from .sockets import ListeningSockets
from .spawn import MASTER_SIGNALS
from .surroundings import Terminal
from .system import REAL_SYSTEM, Signals, System
from .upgrade import Handover, Upgrade, say_failed, say_ready, take_handover
from .worker import LAST_WORDS_SECONDS, CannotStart, end_child

log = logging.getLogger("gtcpserver")

#: Seconds between two looks for ended children, should SIGCHLD be lost.
REAP_SECONDS = 1.0


class MasterState(Enum):
    """The states of a master; none is entered twice."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"  # not ready any more, but still accepting: balancers call it so
    STOPPING = "stopping"
    STOPPED = "stopped"


#: Every change of state, and when it happens. docs/architecture.md draws this table, and a test keeps it true.
MASTER_CHANGES = {
    (MasterState.STARTING, MasterState.SERVING): "every slot has a ready worker; after an upgrade, a proven one",
    (MasterState.STARTING, MasterState.DRAINING): "TERM or INT",
    (MasterState.STARTING, MasterState.STOPPING): "no worker can start, or QUIT",
    (MasterState.SERVING, MasterState.DRAINING): "TERM or INT",
    (MasterState.SERVING, MasterState.STOPPING): "the next master is ready, or QUIT",
    (MasterState.DRAINING, MasterState.STOPPING): "`--drain-delay` is over, or a second signal",
    (MasterState.STOPPING, MasterState.STOPPED): "no worker is left, and the monitor has ended",
}


class WorkersCannotStart(GtcpServerError):
    """The first start failed.

    Attributes:
        details: a traceback from the worker, or "".
        status: the exit status: 2 for a mistake of the caller, otherwise 3.

    Example::

        from gtcpserver import run
        from gtcpserver.supervisor import WorkersCannotStart

        try:
            run("app:handle", "127.0.0.1:5000", workers=2)
        except WorkersCannotStart as error:
            print(error)
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.details = failure.details
        self.status = failure.status


class Master:
    """A master; `run` runs it from start to end.

    Args:
        program: the program to serve.
        config: number of workers, time limits, files.
        system: access to the operating system; tests pass a simulated one.

    Example::

        from gtcpserver import ListenConfig, Server
        from gtcpserver.supervisor import Hooks, Master, Program, SupervisorConfig

        def build(sockets):
            return Server(sockets, handle), Hooks()

        program = Program(["127.0.0.1:5000"], ListenConfig(), build)
        Master(program, SupervisorConfig(workers=2, control="app.control")).run()
    """

    def __init__(self, program: Program, config: SupervisorConfig, system: System = REAL_SYSTEM) -> None:
        self.program = program
        self.config = config
        self.system = system
        self.state = MasterState.STARTING
        self.started_at = self.system.monotonic()
        self.addresses: list[str] = []
        self.fleet: Fleet
        self._folder = logical_folder()
        self._handover: Handover | None = None
        self._upgrade = Upgrade(system, self._leave_to)
        self._left_to: int | None = None  # process id of the new master that took over
        self._predecessor: Channel | None = None  # the channel to the old master, whose workers' connections may come
        self._control: ControlSocket | None = None
        self._commands = Commands(self)
        self.monitor: MonitorProcess | None = None
        self._memory: SharedMemory | None = None
        self._agent: AgentCheck | None = None
        self.in_maintenance = False
        self._pid_file = PidFile(config.pid_file) if config.pid_file is not None else None
        self._signals: Signals | None = None
        self._stop_at: float | None = None
        self._said = ""
        self._notifier = systemd.Notifier()
        self._watchdog = systemd.watchdog_interval()
        self._watchdog_at = 0.0
        self._listen_fds = 0
        self._first_stderr = -1
        self._faults = FaultLimiter()
        self._failed = self._in_child = False
        self._pid_file_due = False
        self._child_ended = True
        self._reap_at = self._clear_at = 0.0
        self._deaths = 0
        self._terminal = Terminal(system.has_terminal)

    @property
    def ready(self) -> bool:
        """Whether connections are wanted: the answer to load balancers."""
        serving = self.state is MasterState.SERVING and not self.in_maintenance
        return serving and any(slot.serves() for slot in self.fleet.slots.values())

    @property
    def stopping(self) -> bool:
        """Whether the master has begun to stop, or has stopped."""
        return self.state not in (MasterState.STARTING, MasterState.SERVING)

    @property
    def owns_metrics(self) -> bool:
        """Whether this master's monitor answers, and not that of the master before or after it."""
        return not self._not_ours()

    def status_for_monitor(self) -> dict[str, Any]:
        return self._commands.status(in_full=True)

    def run(self, listen_fds: int = 0) -> Fleet:
        """Start, serve until told to stop, and return the fleet, which has the counters.

        Args:
            listen_fds: number of descriptors passed by systemd, for the next master.

        Raises:
            ConfigError, OSError: an address, the PID file, the log file or the control socket cannot be used.
            WorkersCannotStart: no worker could be started.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("workers need the main thread, for its signals, and no greenlet in it")
        enlarge_signal_stack()
        self._listen_fds = listen_fds
        self._handover = take_handover()
        try:
            return self._run()
        except (GtcpServerError, OSError) as error:
            if self._handover is not None:
                say_failed(self._handover, str(error))
            if self._first_stderr >= 0:
                log.error("not started: %s", error)
            raise
        finally:
            self._give_stderr_back()

    def _run(self) -> Fleet:
        config, handover = self.config, self._handover
        if config.umask is not None:
            os.umask(config.umask)
        if self._pid_file is not None and handover is None:
            self._pid_file.check()
        if config.log_file is not None:
            log_file = open_log_file(config.log_file)
            self._first_stderr = os.dup(STDERR)
            write_stderr_to(log_file)
        if self.program.log_style is not None:
            log_in_master(self.program.log_style)
        if config.preload and self.program.preload is not None:
            self._preload(self.program.preload)
        slots = handover.slots if handover is not None else list(range(config.worker_count()))
        sockets = self.system.listening_sockets(self.program.listen)
        sockets.open(self.program.addresses, slots, handover.sockets if handover is not None else ())
        self.addresses = sockets.addresses
        self._memory = self._make_memory(len(slots))
        self.fleet = Fleet(config, sockets, self.program, self._folder, self._close_in_worker, slots, self.system)
        self.fleet.memory = self._memory
        self.fleet.replaces = handover is not None
        self.fleet.others_have_sockets = self._others_have_sockets
        self.fleet.enough = lambda: self.begin_stop("max_accepts reached")
        try:
            self._open_agent()
            self._open_monitor()
        except BaseException:
            sockets.close(keep_paths=self._not_ours())
            if self._agent is not None:
                self._agent.close(keep_paths=self._not_ours())
            raise
        try:
            signals = self._signals = self.system.catch_signals(MASTER_SIGNALS)
            self._open_control()
            if self._pid_file is not None and handover is None:
                self._pid_file.write()
            while self.state is not MasterState.STOPPED:
                self._turn(signals)
        finally:
            self._close(sockets)
            if self._signals is not None:
                self._signals.close()
        if self.fleet.first_failure is not None:
            raise WorkersCannotStart(self.fleet.first_failure)
        log.info("stopped: %s finished, %d cut", counted(self.fleet.finished, "connection"), self.fleet.ended)
        return self.fleet

    def _close(self, sockets: ListeningSockets) -> None:
        """End and close everything; a failed step does not prevent the others."""
        keep = self._not_ours()
        for worker in self.fleet.workers.values():
            worker.kill()
        self._guarded(sockets.close, keep_paths=keep)
        if self._control is not None:
            self._guarded(self._control.close, remove=not keep)
        if self.monitor is not None:
            self._guarded(self.monitor.close, keep_paths=keep)
        if self._agent is not None:
            self._guarded(self._agent.close, keep_paths=keep)
        if self._pid_file is not None:
            self._guarded(self._pid_file.remove)
        if self._memory is not None:
            self._guarded(self._memory.close)
        give_up = self.system.monotonic() + LAST_WORDS_SECONDS
        while not self._notifier.flush() and self.system.monotonic() < give_up:
            self.system.sleep(RETRY_SECONDS)

    def _preload(self, load: Callable[[], None]) -> None:
        register(self)
        try:
            load()
            self._end_child()
        except BaseException as error:
            self._end_child(error)
            if not isinstance(error, CannotStart):
                raise
            raise WorkersCannotStart(Failure(str(error), error.details, error.status)) from None
        if _has_other_threads():
            log.warning("the program starts threads while it is loaded: the workers will not have them")
        # The garbage collector of a worker would write into every object, and so copy every page.
        gc.collect()
        gc.freeze()

    def _give_stderr_back(self) -> None:
        # Report to the caller's standard error why the start failed.
        if self._first_stderr >= 0:
            write_stderr_to(self._first_stderr)
            self._first_stderr = -1

    def _not_ours(self) -> bool:
        """Return whether another master has the sockets too: the one before us, or the one after."""
        return self._handover is not None or self._left_to is not None

    def _open_control(self) -> None:
        path, handover = self.config.control, self._handover
        if handover is not None and handover.control is not None:
            fd, _, identity = handover.control
            if path is None:
                close_descriptor(fd)
            else:
                self._control = ControlSocket(path, self._commands.answer, (fd, identity))
        elif path is not None:
            self._control = ControlSocket(path, self._commands.answer)

    def _make_memory(self, workers: int) -> SharedMemory | None:
        fd = self._handover.memory if self._handover is not None else None
        try:
            return self.system.shared_memory(workers, fd)
        except OSError as error:
            log.warning("each worker counts its own clients: no memory that workers share: %s", error)
            return None

    def _open_agent(self) -> None:
        inherited = self._handover.agent if self._handover is not None else []
        self.in_maintenance = self._handover is not None and self._handover.in_maintenance
        if self.config.agent_check is not None:
            self._agent = AgentCheck(self, self.config.agent_check, inherited)
            return
        for one in inherited:
            close_descriptor(one.fd)

    def _open_monitor(self) -> None:
        inherited = self._handover.metrics if self._handover is not None else []
        history = self._handover.history if self._handover is not None else None
        if self.config.metrics is None:
            for fd in (*(one.fd for one in inherited), *([] if history is None else [history])):
                close_descriptor(fd)
            return
        self.monitor = MonitorProcess(self, self.config.metrics, inherited, history)

    def _others_have_sockets(self) -> bool:
        return not self._upgrade.gone() or (self.monitor is not None and self.monitor.starting)

    def _close_in_worker(self) -> None:
        self._close_in_child()
        if self.monitor is not None:
            self.monitor.close_in_child(sockets=True)

    def close_in_monitor(self) -> None:
        """Close the master's descriptors, except the monitor's listening sockets. Called in a new monitor."""
        self._close_in_child()
        if self.monitor is not None:
            self.monitor.close_in_child(sockets=False)
        self.fleet.sockets.close_copies()
        if self._memory is not None:
            self._memory.close()
        for worker in self.fleet.workers.values():
            worker.channel.close()

    def serves(self) -> bool:
        return True

    def left_in_child(self, _own: Any) -> None:
        """Close everything. Called in a child forked by the program during or after preload (process/forked.py)."""
        self._in_child = True
        if hasattr(self, "fleet"):
            self.close_in_monitor()
            if self.monitor is not None:
                self.monitor.close_in_child(sockets=True)
        else:
            self._close_in_child()
            if self._handover is not None:
                for fd in self._handover.fds():
                    close_descriptor(fd)

    def _end_child(self, error: BaseException | None = None) -> None:
        if self._in_child:
            end_child(error)

    def _close_in_child(self) -> None:
        if self._signals is not None:
            self._signals.close_in_child()
        if self._control is not None:
            self._control.close(remove=False)
        if self._pid_file is not None:
            self._pid_file.close()
        if self._agent is not None:
            self._agent.close_in_child()
        self._upgrade.close_in_child()
        if self._handover is not None:
            close_descriptor(self._handover.channel)
        if self._predecessor is not None:
            self._predecessor.close()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _turn(self, signals: Signals) -> None:
        """Wait for the next event and do the work that is due. Whatever fails here, the master goes on.

        The parts are independent: one that fails every time (a worker's channel, the monitor, poll itself) does not
        prevent the others.
        """
        self._failed = False
        self._guarded(self._wait, signals)
        while (number := signals.next()) is not None:
            self._guarded(self._obey_signal, number)
        self._guarded(self._reap)
        for look_after in self._parts():
            self._guarded(look_after, self.system.monotonic())
        if self._failed:
            # A part that fails every time must not make the master spin.
            self.system.sleep(TICK_SECONDS)

    def _guarded(self, do: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            do(*arguments, **options)
        except Exception as error:
            self._failed = True
            left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("the master failed at something, and goes on%s", also(left_out))

    def _wait(self, signals: Signals) -> None:
        watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        watched[signals.fileno()] = (select.POLLIN, lambda _: signals.empty())
        for worker in self.fleet.workers.values():
            if not worker.channel.ended:
                watched[worker.channel.fileno()] = (select.POLLIN, self._receiver(worker))
        if self._upgrade.channel is not None:
            watched[self._upgrade.channel.fileno()] = (select.POLLIN, lambda _: self._upgrade.hear())
        if self._predecessor is not None:
            watched[self._predecessor.fileno()] = (select.POLLIN, lambda _: self._hear_predecessor())
        control = self._control
        if control is not None:
            if not self._not_ours() and control.accepts(self.system.monotonic()):
                watched[control.sock.fileno()] = (select.POLLIN, lambda _: control.accept())
            for client in control.clients:
                if not client.closed:
                    watched[client.fileno()] = (client.events(), client.handle)
        monitor = self.monitor
        if monitor is not None and monitor.fileno() >= 0:
            watched[monitor.fileno()] = (monitor.events(), monitor.handle)
        if self._agent is not None:
            for fd, handle in self._agent.watched(self.system.monotonic()):
                watched[fd] = (select.POLLIN, handle)
        due = min(self.fleet.next_due(), self._stop_at or float("inf")) - self.system.monotonic()
        for fd, events in self._poll(watched, max(0.0, min(TICK_SECONDS, due))):
            self._guarded(watched[fd][1], events)

    def _poll(
        self, watched: Mapping[int, tuple[int, Callable[[int], None]]], seconds: float
    ) -> Iterable[tuple[int, int]]:
        try:
            return self.system.poll({fd: events for fd, (events, _) in watched.items()}, seconds)
        except OSError as error:  # ENOMEM, or EINVAL: more descriptors than RLIMIT_NOFILE allows now
            self._failed = True
            left_out = self._faults.allow("poll")
            if left_out is not None:
                log.error("poll failed, looking at every descriptor instead: %s%s", error.strerror, also(left_out))
            # Reading each of them does not wait.
            return [(fd, events) for fd, (events, _) in watched.items()]

    def _hear_predecessor(self) -> None:
        """Give lines from the old master's workers to ours."""
        channel = self._predecessor
        if channel is None:
            return
        for message, fd in channel.receive():
            if fd is not None:
                self._guarded(self.fleet.pairing.give, fd, message.count("slot"), message.count("giver"))
        if channel.ended:
            channel.close()
            self._predecessor = None

    def _receiver(self, worker: WorkerProcess) -> Callable[[int], None]:
        return lambda _: self.fleet.receive(worker)

    def _reap(self) -> None:
        now = self.system.monotonic()
        # SIGCHLD triggers this; also poll, in case the program replaced its handler.
        if not self._child_ended and now < self._reap_at:
            return
        self._child_ended = False
        self._reap_at = now + REAP_SECONDS
        # Process 1 of a container reaps orphans too; elsewhere a caller of `run` may have children of its own.
        while self.system.pid() == 1 and self._bury(-1):
            pass
        monitors = self.monitor.pids() if self.monitor is not None else []
        for pid in (*self.fleet.workers, *self._upgrade.pids(), *monitors):
            self._bury(pid)

    def _bury(self, pid: int) -> bool:
        try:
            gone, status = self.system.wait(pid)
        except ChildProcessError:
            gone, status = (pid, 0) if self._was_buried(pid) else (0, 0)
        if gone and not self.fleet.reap(gone, status):
            self._upgrade.ended(gone, status)
            if self.monitor is not None:
                self.monitor.ended(gone, status)
        return bool(gone)

    def _parts(self) -> list[Callable[[float], None]]:
        """Return the functions to call in each turn, in this order."""
        parts: list[Callable[[float], None]] = [self._stop_if_due, self.fleet.look_after, self._upgrade.look_after]
        if self._control is not None:
            parts += [self._commands.look_after, self._control.look_after]
        parts.append(self._go_on)
        if self._memory is not None:
            parts.append(self._look_after_memory)
        if self.monitor is not None:
            parts.append(self.monitor.look_after)
        if self._agent is not None:
            parts.append(self._agent.look_after)
        return [*parts, self._write_pid_file, self._tell_systemd, self._terminal.look]

    def _look_after_memory(self, now: float) -> None:
        """Have clients of dead workers count no more: at once; after a while those of another master's workers.

        Rotate the keys of TLS tickets when they are due.
        """
        assert self._memory is not None
        if self._deaths != self.fleet.deaths or now >= self._clear_at:
            self._deaths = self.fleet.deaths
            self._clear_at = now + REAP_SECONDS
            self._memory.clear_dead()
            if self.config.rotate_tickets is not None:
                self._memory.rotate_tickets(self.config.rotate_tickets)

    def _was_buried(self, pid: int) -> bool:
        """Return whether a child that waitpid does not know is gone: the program may wait for children too."""
        worker, monitor = self.fleet.workers.get(pid), self.monitor
        if worker is not None:
            # Its number may belong to another process by now.
            return worker.channel.ended or not self._exists(pid)
        return monitor is not None and pid in monitor.pids() and (monitor.fileno() < 0 or not self._exists(pid))

    def _exists(self, pid: int) -> bool:
        """Return whether there is such a process, ours or not."""
        try:
            self.system.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True

    def _stop_if_due(self, now: float) -> None:
        if self._stop_at is not None and now >= self._stop_at and self.state is MasterState.DRAINING:
            self._stop()

    def _go_on(self, _now: float) -> None:
        fleet = self.fleet
        if self.state is MasterState.STARTING:
            if fleet.first_failure is not None:
                self._stop()
            elif fleet.up:
                self._serving()
        if self.state is MasterState.STOPPING:
            if self._left_to is None and not self._not_ours():
                fleet.close_drained()
            # A new master whose upgrade was given up has the listening sockets until it ends.
            if not fleet.workers and self._upgrade.gone() and self._monitor_has_left():
                self.state = MasterState.STOPPED

    def _monitor_has_left(self) -> bool:
        # The monitor ends last: until then it answers that this service is draining.
        if self.monitor is not None:
            self.monitor.leave()
        return self.monitor is None or self.monitor.gone()

    def _serving(self) -> None:
        self.state = MasterState.SERVING
        if self._first_stderr >= 0:
            first_stderr, self._first_stderr = self._first_stderr, -1
            with contextlib.suppress(OSError):
                close_descriptor(first_stderr)
        if self._handover is not None:
            self._pid_file_due = self._pid_file is not None
            self._write_pid_file(self.system.monotonic())
            handover, self._handover = self._handover, None
            told, self._predecessor = say_ready(handover, bool(self.fleet.pairing.staying()))
            if not told:
                log.error("the old master (pid %d) cannot be told that this one is ready", handover.pid)
        log.info(
            "listening on %s (pid %d, %s)",
            ", ".join(self.addresses),
            self.system.pid(),
            counted(self.fleet.target, "worker"),
        )

    def _tell_systemd(self, now: float) -> None:
        serving = sum(slot.serves() for slot in self.fleet.slots.values())
        status = f"STATUS={self.state.value}: {serving} of {counted(self.fleet.target, 'worker')} ready"
        if self.state is MasterState.SERVING and not self.fleet.reloading():
            status += f"\nREADY=1\nMAINPID={self.system.pid()}"
        elif self.stopping and self._left_to is None:
            status += "\nSTOPPING=1"
        if status != self._said and self._left_to is None and self._handover is None:
            self._said = status
            self._notifier.say(status)
        if self._watchdog is not None and now >= self._watchdog_at and systemd.notify("WATCHDOG=1"):
            self._watchdog_at = now + self._watchdog
        self._notifier.flush()

    def _write_pid_file(self, _now: float) -> None:
        """Write the PID file after an upgrade; try again until that succeeds."""
        if not self._pid_file_due or self._pid_file is None:
            return
        try:
            self._pid_file.write()
        except (OSError, UntrustedPath) as error:
            left_out = self._faults.allow("PID file")
            if left_out is not None:
                log.error("cannot write the PID file: %s%s", error, also(left_out))
        else:
            self._pid_file_due = False

    # -- signals -----------------------------------------------------------------------------------------------------

    def _obey_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        graceful = number in (signal.SIGTERM, signal.SIGINT)  # INT is Ctrl-C
        if graceful and self._left_to is not None and not self.fleet.ending:
            workers = counted(len(self.fleet.workers), "worker")
            log.info("%s: ending %s within the time of a stop", name, workers)
            self.fleet.hasten()
        elif number == signal.SIGQUIT or (graceful and self.stopping):
            self.halt(name)
        elif graceful:
            self.begin_stop(name)
        elif number == signal.SIGUSR1:
            self.reopen_log()
        elif number == signal.SIGCHLD:
            self._child_ended = True
        elif self.stopping:
            log.info("%s: too late, this master stops", name)
        elif number == signal.SIGHUP:
            self._obey_hangup(name)
        elif number == signal.SIGUSR2:
            self.begin_upgrade(name, _nobody)
        elif number == signal.SIGTTIN:
            self.scale(min(MAX_WORKERS, self.fleet.target + 1))
        elif number == signal.SIGTTOU:
            self.scale(max(1, self.fleet.target - 1))

    def _obey_hangup(self, name: str) -> None:
        of_terminal = self._terminal.hung_up(self.system.monotonic())
        if of_terminal is None:
            log.info("%s: the terminal is gone; going on, as nohup(1) asks", name)
        elif of_terminal:
            # The terminal's user can no longer stop the service, and would find the port taken.
            self.begin_stop(f"{name} of the terminal, which is gone")
        else:
            self.begin_reload(name, _nobody)

    # -- commands ---------------------------------------------------------------------------------------

    def begin_reload(self, why: str, done: Done) -> None:
        """Replace all workers by new ones. `done` is called with None, or with the reason of a failure."""
        log.info("%s: reload", why)
        if self._upgrade.under_way:
            log.error("no reload: an upgrade is under way")
            done("an upgrade is under way")
            return
        if self.config.preload or self.program.preloaded:
            log.warning("the program was loaded before the workers, which get it unchanged; an upgrade loads it again")
        if self.state is MasterState.SERVING:
            self._notifier.say(systemd.reloading())
            self._said = ""
        self.fleet.want_reload(done)

    def scale(self, count: int, done: Done = lambda _: None) -> None:
        """Change the number of workers."""
        if self._upgrade.under_way:
            done("an upgrade is under way")
            return
        log.info("from %d to %s", self.fleet.target, counted(count, "worker"))
        self.fleet.want_scale(count, done)

    def reopen_log(self) -> str | None:
        """Reopen the log file, for all workers too: they may lack the permission. Return the error, if there is one."""
        path = self.config.log_file
        if path is None:
            log.info("there is no log file to reopen (--log-file)")
            return None
        try:
            fd = open_log_file(path)
        except (OSError, UntrustedPath) as error:
            return _cannot_reopen(str(error))
        try:
            write_stderr_to(fd)
        except OSError as error:
            close_descriptor(fd)
            return _cannot_reopen(error.strerror)
        for worker in self.fleet.workers.values():
            worker.channel.send("reopen", fd=STDERR)
        if self.monitor is not None:
            self.monitor.renew()
        log.info("log file %s reopened", path)
        return None

    def set_maintenance(self, on: bool) -> None:
        """Tell balancers to send no connections, or to send them again. Those that come are served."""
        log.info("maintenance: %s", "on" if on else "off")
        self.in_maintenance = on

    def rotate_tickets(self) -> str | None:
        """Have the workers use new keys for TLS tickets. Return the error, if there is one."""
        if self._memory is None:
            return "the workers have no keys of tickets in common"
        try:
            done = self._memory.rotate_tickets()
        except OSError as error:
            return f"no new keys for tickets: {error.strerror}"
        if not done:
            return "no new keys for tickets: another master makes some just now"
        log.info("new keys for TLS session tickets")
        return None

    def begin_upgrade(self, why: str, done: Done) -> None:
        """Start a new master from the code on disk. `done` is called with None, or with the reason of a failure."""
        log.info("%s: upgrade", why)
        error = ""
        if self._upgrade.under_way:
            error = "an upgrade is under way already"
        elif self.state is not MasterState.SERVING or self.fleet.reloading() or self.fleet.changing():
            error = "a start, a reload or a change of the number of workers is under way"
        else:
            error = self.system.who_ends_with_us()
        if error:
            log.error("no upgrade: %s", error)
            done(error)
            return
        control = self._control
        handover = Handover(
            pid=self.system.pid(),
            channel=-1,
            slots=list(self.fleet.slots),
            sockets=self.fleet.sockets.handover(),
            control=None if control is None else (control.sock.fileno(), control.path, control.identity),
            listen_fds=self._listen_fds,
            metrics=self.monitor.handover() if self.monitor is not None else [],
            memory=self._memory.fd if self._memory is not None else None,
            agent=self._agent.handover() if self._agent is not None else [],
            in_maintenance=self.in_maintenance,
            history=self.monitor.history if self.monitor is not None else None,
        )
        self._upgrade.begin(handover, self._folder, done)

    def _leave_to(self, pid: int) -> None:
        self._left_to = pid
        if self._upgrade.successor_channel is not None:
            self.fleet.pairing.pass_on = self._upgrade.pass_on
        if self.monitor is not None:
            self.monitor.leave()
        # The service manager accepts messages from its main process only.
        self._notifier.say(f"MAINPID={pid}")
        self.state = MasterState.STOPPING
        self.fleet.stop(leave=True)

    def begin_stop(self, why: str) -> None:
        """Begin a graceful stop: not ready from now on, and after the drain delay no more connections."""
        if self.stopping:
            return
        log.info("%s: stopping", why)
        self._upgrade.stop()
        delay = self.config.drain_delay if self.state is MasterState.SERVING else 0.0
        self.state = MasterState.DRAINING
        self.fleet.tell_all("unready")
        self._stop_at = self.system.monotonic() + delay

    def _stop(self) -> None:
        self._stop_at = None
        self.state = MasterState.STOPPING
        self.fleet.stop(leave=self._not_ours())

    def halt(self, why: str) -> None:
        """End everything now."""
        log.warning("%s: ending %s now", why, counted(len(self.fleet.workers), "worker"))
        self._upgrade.stop(HALT_SECONDS)
        self._stop_at = None
        self.state = MasterState.STOPPING
        self.fleet.halt()
        if not self._not_ours():
            self.fleet.sockets.close()


def logical_folder() -> str:
    """Return the working directory by the name the shell knows.

    If it is a link to the current release, and the link changes, a reload must find the new release.
    """
    real, named = os.getcwd(), os.environ.get("PWD", "")
    try:
        same = os.path.samefile(real, named)
    except OSError:
        same = False
    return named if same and os.path.isabs(named) else real


def _has_other_threads() -> bool:
    """Return whether there are threads, which a fork does not copy. In a monkey-patched program they are greenlets."""
    ours = threading.main_thread().native_id
    # None: a thread that has not begun to run, or a greenlet.
    return any(thread.native_id not in (ours, None) for thread in threading.enumerate())


def _cannot_reopen(why: str | None) -> str:
    error = f"cannot reopen the log file: {why}"
    log.error("%s", error)
    return error


def _nobody(_error: str | None) -> None:
    pass
