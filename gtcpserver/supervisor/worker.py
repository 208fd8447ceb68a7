"""What runs in a worker process: a Server on the slot's sockets, that does what the master says.

Reads in the order things happen: begin, build, serve, beat, obey, end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import logging
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

import gevent
from gevent import monkey
from gevent.hub import get_hub

from gtcpserver.callables import check_hook
from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.errors import GtcpServerError
from gtcpserver.files import lent as lent_files
from gtcpserver.monitoring.connection_table import MOST, table_of
from gtcpserver.monitoring.watch import Watch, resident_bytes
from gtcpserver.plural import counted
from gtcpserver.process.forked import end_process, register
from gtcpserver.server.background import end_executors, threads_of_handlers_are_no_daemons
from gtcpserver.server.server import Server, State

from .channel import Channel
from .config import SupervisorConfig
from .dump import format_stacks
from .lending import Borrower, NamedFiles
from .log_files import LogStyle, log_in_worker, log_with_details, write_stderr_to
from .messages import MAX_BYTES, Message
from .privileges import become, die_with_parent
from .sockets import Use
from .spawn import IGNORED_BY_WORKERS

log = logging.getLogger("gtcpserver")

#: Seconds between two beats, which show that the loop runs. The master notices a lag within three of them.
BEAT_SECONDS = 0.25

STATS_SECONDS = 1.0  # between two reports of counters; a worker killed by -9 takes less than that with it

#: Seconds between a failure of a repeated task and its next attempt, so that it does not spin.
FAILED_SECONDS = 0.25

LAST_WORDS_SECONDS = 2.0  # for the last message to find room; the master reads at once, unless it is stopped

LARGEST_TABLE = MAX_BYTES * 3 // 4  # of the rows of connections, which have to fit into a packet

#: Seconds for connections to go on when the master is gone: no process can stop or replace this one any more, and it
#: has the port that the next master wants.
ORPHAN_SECONDS = 1.0

ORPHAN_MARGIN = 0.5  # until it ends itself, whatever still runs

_start_thread = monkey.get_original("_thread", "start_new_thread")
_native_sleep = monkey.get_original("time", "sleep")


class CannotStart(GtcpServerError):
    """A worker cannot begin to serve.

    Attributes:
        details: a traceback, or "".
        status: the exit status if no worker has ever started: 2 where the call was wrong, otherwise 3.
    """

    def __init__(self, message: str, details: str = "", status: int = 3) -> None:
        super().__init__(message)
        self.details = details
        self.status = status


@dataclass(frozen=True)
class Hooks:
    """Functions of the user's, called in the workers.

    Attributes:
        worker_start: with the Worker, before it says that it is ready.
        worker_stop: with the Worker, when its last connection has ended.
        worker_error: with the Worker and a text, when a worker has failed: in the worker itself if it still can, or
            else in the one that takes its place.
    """

    worker_start: Callable[[Worker], None] | None = None
    worker_stop: Callable[[Worker], None] | None = None
    worker_error: Callable[[Worker, str], None] | None = None

    def __post_init__(self) -> None:
        for name, hook in vars(self).items():
            check_hook(name, hook)


@dataclass(frozen=True)
class Job:
    """What a new worker is told by the master it was forked from.

    Attributes:
        number: of its slot, from 0.
        generation: counts the reloads.
        build: makes the server on these sockets, not started, and the hooks. May raise anything.
        prepare: called first, with the master's rights.
        sockets: each with who accepts from it.
        predecessor: why the last worker of the slot died; "" if it did not.
        folder: to work in.
        settle: called when the server has started.
    """

    number: int
    generation: int
    build: Callable[[list[socket.socket]], tuple[Server, Hooks]]
    sockets: list[tuple[socket.socket, Use]]
    channel: Channel
    config: SupervisorConfig
    log_style: LogStyle | None
    cpu: int | None
    predecessor: str
    master: int
    folder: str
    settle: Callable[[], None] | None
    prepare: Callable[[], NamedFiles] | None = None


@dataclass
class Worker:
    """A worker process, as hooks and handlers see it (`gtcpserver.supervisor.current_worker`).

    Attributes:
        number: of its slot, from 0; its successor has the same.
        generation: counts the reloads of the master.
        pid: process id.
        server: the Server it runs; None as long as there is none.
        ready: connections are wanted: False at the start, and from the beginning of a stop, drain delay included. For
            health checks.
    """

    number: int
    generation: int
    pid: int = field(default_factory=os.getpid)
    server: Server | None = None
    ready: bool = False


_current: Worker | None = None


def current_worker() -> Worker | None:
    """Return the worker this process is; None outside of one."""
    return _current


def run_worker(job: Job) -> int:
    """Run a worker from the fork on; return its exit status."""
    return _Life(job).run()


class _Life:
    def __init__(self, job: Job) -> None:
        global _current
        self.job = job
        self.channel = job.channel
        self.worker = _current = Worker(job.number, job.generation)
        self.hooks = Hooks()
        self.watch: Watch | None = None  # if metrics are served
        self.wants_to_retire = ""
        self.asked_to_retire = False
        self.orphaned = False
        self.faults = FaultLimiter()
        self.left_out = False  # the handler's counters, of which the log knows
        self.unread: list[tuple[Message, int | None]] = []
        self.order: Callable[[], gevent.Greenlet] | None = None  # to end, from the master; it begins to obey
        self.obeying: gevent.Greenlet | None = None
        self.borrower: Borrower | None = None
        # Commands that come while there is no server yet.
        self.early: list[Message] = []
        self.in_child = False  # a program has forked this process: it is no worker
        self.limit_of_accepts = _with_jitter(job.config)
        self.limit_of_memory = job.config.recycle_memory and job.config.recycle_memory * (1 + random.random() / 10)

    # -- begin -------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        register(self)
        try:
            server = self.start()
        except BaseException as error:
            self.end_child(error)
            self.fail(error)
            return 3
        helpers = [gevent.spawn(self.beat), gevent.spawn(self.report), gevent.spawn(self.tell_when_drained, server)]
        server.wait_stopped()
        report = server.stop()
        for cut in report.cut:
            log.warning("cut %s", cut, extra={"client": cut.peer})
        self.call_hook("worker_stop")
        # The beats go on meanwhile, or the master would take this worker for one that is blocked.
        server.end_background_work()
        end_executors()
        gevent.killall(helpers, block=False)
        fatal = f"the listening socket was lost: {server.fatal_error}" if server.fatal_error is not None else ""
        if fatal:
            self.call_hook("worker_error", fatal)
        elif report.failures:
            fatal = f"the stop was not complete: {'; '.join(report.failures)}"
        self.channel.send(
            "stopped",
            finished=report.finished,
            ended=report.ended,
            error=fatal,
            **self.measured(server),
        )
        self.channel.finish(LAST_WORDS_SECONDS)
        return 1 if fatal else 0

    def start(self) -> Server:
        job = self.job
        signal.signal(signal.SIGTERM, self.on_term)
        signal.signal(signal.SIGUSR2, self.on_dump)
        faulthandler.enable(file=sys.__stderr__ if sys.__stderr__ is not None else 2)  # for SIGABRT
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _work_in(job.folder)
        if job.cpu is not None:
            os.sched_setaffinity(0, {job.cpu})
        files = job.prepare() if job.prepare is not None else NamedFiles()
        self.become_unprivileged(files)
        # After the change of user, which takes it away (prctl(2)).
        die_with_parent(signal.SIGTERM)
        if os.getppid() != job.master:
            raise CannotStart("the master is gone")
        if job.log_style is not None:
            log_in_worker(job.log_style)
        self.commands = get_hub().loop.io(self.channel.fileno(), 1, ref=False)
        self.commands.start(self.on_command)
        threads_of_handlers_are_no_daemons()
        importlib.invalidate_caches()
        server, self.hooks = job.build([sock for sock, _ in job.sockets])
        self.end_child()
        self.worker.server = server
        if server.access_log is not None:
            server.access_log.worker = job.number
        if job.predecessor:
            self.call_hook("worker_error", job.predecessor)
        if server.state is not State.NEW:
            raise CannotStart(f"the server must not be started before its worker starts it, it is {server.state.value}")
        if job.config.metrics is not None:
            self.watch = Watch(server)
        server.stop_timeout = job.config.graceful_timeout
        server.start()
        if job.settle is not None:
            job.settle()
        if self.hooks.worker_start is not None:
            self.hooks.worker_start(self.worker)
            self.end_child()
        self.worker.ready = True
        self.channel.send("ready")
        for message in self.early:
            self.obey(message)
        return server

    def become_unprivileged(self, files: NamedFiles) -> None:
        was_root = os.geteuid() == 0
        if was_root and self.job.config.user is not None:
            self.borrower = Borrower(self.channel)
            self.borrower.name(files, LAST_WORDS_SECONDS)
        become(self.job.config)
        if self.borrower is not None:
            self.channel.send("unprivileged")
            if not self.channel.finish(LAST_WORDS_SECONDS):
                raise CannotStart("the master does not hear that this worker has another user")
            lent_files.borrow_from(self.borrower)

    def fail(self, error: BaseException) -> None:
        if isinstance(error, CannotStart):
            message, details, status = str(error), error.details, error.status
        else:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            details, status = "".join(traceback.format_exception(error)), 3
        self.call_hook("worker_error", message)
        self.channel.send("failed", error=message, details=details, status=status)
        self.channel.finish(LAST_WORDS_SECONDS)

    def call_hook(self, name: str, *arguments: Any) -> None:
        hook = getattr(self.hooks, name)
        if hook is None:
            return
        try:
            hook(self.worker, *arguments)
        except (Exception, SystemExit) as error:  # this process ends in its own way
            self.end_child(error)
            log.exception("the hook %s failed", name)
        self.end_child()

    # -- a fork in this process (see process/forked.py) --------------------------------------------------------------

    def serves(self) -> bool:
        return True

    def left_in_child(self, _own: Any) -> None:
        global _current
        _current = None
        self.in_child = True
        self.channel.close()
        for sock, _ in self.job.sockets:
            sock.close()
        for number in IGNORED_BY_WORKERS:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def end_child(self, error: BaseException | None = None) -> None:
        """After code of the user's has run: if it has forked and come back here in the child, end that."""
        if self.in_child:
            end_child(error)

    # -- serve -------------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say four times a second that the loop runs and how late it is; ask for a successor when one is due.

        Whatever fails in here, it goes on: a worker that falls silent is killed with all its connections. So nothing
        of the user's is called in here either, which might wait.
        """
        due = monotonic() + BEAT_SECONDS
        while True:
            with self.going_on("a beat"):
                gevent.sleep(max(0.0, due - monotonic()))
                now = monotonic()
                lag = max(0.0, now - due)
                due = now + BEAT_SECONDS
                self.channel.flush()
                self.channel.send_if_clear("beat", lag=round(lag, 4))
                self.look_whether_due()
                self.look_whether_obeyed()

    def report(self) -> None:
        """Send counters once a second, as far as they can be had."""
        while True:
            with self.going_on("a report of counters"):
                gevent.sleep(STATS_SECONDS)
                self.send_stats()

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What is done over and over does not end by an exception; it is logged, now and then."""
        try:
            yield
        except Exception as error:
            left_out = self.faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("worker %d: %s failed%s", self.job.number, what, also(left_out))
            try:
                gevent.sleep(FAILED_SECONDS)
            except Exception:  # no memory for a timer
                _native_sleep(FAILED_SECONDS)

    def send_stats(self) -> None:
        if self.worker.server is not None:
            self.channel.send("stats", **self.measured(self.worker.server))

    def measured(self, server: Server) -> dict[str, Any]:
        """Counters and memory; without what cannot be had, or does not fit into a message."""
        fields: dict[str, Any] = {"rss": resident_bytes()}
        try:
            # The handler's own are an attribute of the user's, which may wait for something.
            with gevent.Timeout(STATS_SECONDS):
                stats = self.watch.stats() if self.watch is not None else dataclasses.asdict(server.stats())
            if len(json.dumps(stats["handler_counters"])) > LARGEST_TABLE:
                if not self.left_out:
                    log.error("worker %d: the handler's counters are too many, and left out", self.job.number)
                self.left_out = True
                stats["handler_counters"] = {}
            fields["stats"] = stats
        except gevent.GreenletExit:
            raise
        except BaseException as error:  # gevent.Timeout, SystemExit: whatever a program's counters raise
            left_out = self.faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("worker %d cannot count%s", self.job.number, also(left_out))
        return fields

    def send_connections(self, server: Server, workers: int) -> None:
        rows = table_of(server, max(1, MOST // workers))
        while len(json.dumps(rows)) > LARGEST_TABLE:
            rows = rows[: len(rows) // 2]
        self.channel.send("connections", table=rows)

    def look_whether_due(self) -> None:
        server = self.worker.server
        if self.asked_to_retire or server is None or server.state is not State.SERVING:
            return
        why = self.wants_to_retire
        if not why and self.limit_of_accepts is not None and server.accepted_connections >= self.limit_of_accepts:
            why = f"has accepted {counted(server.accepted_connections, 'connection')}"
        if not why and self.limit_of_memory and resident_bytes() > self.limit_of_memory * 2**20:
            why = f"uses {resident_bytes() >> 20} MiB"
        if why:
            self.asked_to_retire = True
            self.channel.send("retire", why=why)

    def end_by(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin what ends this worker. It is noted first: there may be no memory to start a greenlet."""
        self.worker.ready = False
        self.order = partial(gevent.spawn, function, *arguments)
        self.obeying = self.order()

    def look_whether_obeyed(self) -> None:
        """Obey an order now that could not be obeyed before; it would not be given again."""
        server = self.worker.server
        if self.order is None or server is None or server.state is State.STOPPED:
            return
        if self.obeying is None or self.obeying.dead:
            self.obeying = self.order()

    def tell_when_drained(self, server: Server) -> None:
        server.listening_ended.wait()
        self.channel.send("drained")

    # -- obey --------------------------------------------------------------------------------------------------------

    def on_command(self) -> None:
        """In the event loop, when the master has sent something or is gone."""
        try:
            self.read_channel()
        except Exception as error:
            left_out = self.faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("worker %d cannot obey%s", self.job.number, also(left_out))
            # An exception that leaves a callback stops its watcher for good: this worker would be deaf. And what cannot
            # be read now is there still.
            self.commands.stop()
            self.commands_again = get_hub().loop.timer(FAILED_SECONDS, ref=False)
            self.commands_again.start(self.commands.start, self.on_command)

    def read_channel(self) -> None:
        self.unread += self.channel.receive()
        while self.unread:
            message, fd = self.unread.pop(0)
            if message.kind == "reopen":
                self.use_log_file(fd)
            elif message.kind == "lent":
                if self.borrower is not None:
                    self.borrower.hear(message, fd)
            elif self.worker.server is None or self.worker.server.state is State.NEW:
                self.early.append(message)
            else:
                self.obey(message)
        if self.channel.ended:
            self.be_orphaned()

    def use_log_file(self, fd: int | None) -> None:
        if fd is not None:
            write_stderr_to(fd)
        else:  # there was no descriptor left for it
            gevent.spawn_later(STATS_SECONDS, self.channel.send, "reopen")

    def obey(self, message: Message) -> None:
        server = self.worker.server
        assert server is not None
        if message.kind == "unready":
            self.worker.ready = False
        elif message.kind == "report":
            gevent.spawn(self.send_stats)
        elif message.kind == "connections":
            gevent.spawn(self.send_connections, server, max(1, int(message.number("of"))))
        elif message.kind == "halt":
            self.end_by(server.halt)
        elif message.kind == "hasten":
            timeout = message.seconds("timeout")
            if timeout is not None:
                gevent.spawn(server.hasten, timeout)  # after the stop that a message just before began
        elif message.kind == "retire":
            self.end_by(self.stop, message.seconds("timeout"), (), message.fields.get("hurry") is not True)
        elif message.kind == "stop":
            last_of_all = message.fields.get("all") is True
            drained = (Use.SLOT, Use.SHARED) if last_of_all else (Use.SLOT,)
            self.end_by(self.stop, message.seconds("timeout"), drained, message.fields.get("hurry") is not True)

    def stop(self, timeout: float | None, drained: Collection[Use], patient: bool = False) -> None:
        """Finish. Sockets of the uses in ``drained`` have no other owner: drain them before closing."""
        server = self.worker.server
        assert server is not None
        numbers = {sock.fileno() for sock, use in self.job.sockets if use in drained}
        for listener in server.listeners():
            # Only the owner may stop new connections on it.
            listener.owned = listener.fileno() in numbers
        server.stop(timeout, leave_listening=not numbers, patient=patient)

    def on_term(self, _number: int, _frame: FrameType | None) -> None:
        if os.getppid() != self.job.master:
            self.be_orphaned()
        else:
            # `kill` of this process only: leave when a successor is there. A stop of all of us (systemd and others
            # signal every process of a service) comes by the channel.
            self.wants_to_retire = "got SIGTERM"

    def on_dump(self, _number: int, frame: FrameType | None) -> None:
        message = f"all stacks of worker {self.job.number} (pid {os.getpid()})"
        try:
            log_with_details(logging.WARNING, message, format_stacks(frame))
        except Exception:  # it would be raised in whatever runs now
            log.exception("worker %d cannot print its stacks", self.job.number)
        self.channel.send_if_clear("dumped")

    def be_orphaned(self) -> None:
        if self.orphaned:
            return
        self.orphaned = True
        _start_thread(_end_later, ())
        log.error("the master (pid %d) is gone: ending within %.1f s", self.job.master, ORPHAN_SECONDS)
        self.worker.ready = False
        server = self.worker.server
        if server is None or server.state is State.NEW:
            os._exit(3)
        get_hub().loop.run_callback(gevent.spawn, self.stop, ORPHAN_SECONDS, (Use.SLOT, Use.SHARED))
        get_hub().loop.run_callback(gevent.spawn_later, ORPHAN_SECONDS, server.halt)


def end_child(error: BaseException | None) -> NoReturn:
    """End a child that the program has forked; ``error``: what has left the program, or what was made of it here."""
    if isinstance(error, CannotStart):
        while error.__context__ is not None:
            error = error.__context__
    end_process(error)


def _end_later() -> None:
    _native_sleep(ORPHAN_SECONDS + ORPHAN_MARGIN)
    os._exit(1)


def _with_jitter(config: SupervisorConfig) -> int | None:
    if config.recycle_after is None:
        return None
    jitter = config.recycle_jitter if config.recycle_jitter is not None else config.recycle_after // 10
    return config.recycle_after + random.randint(0, jitter)


def _work_in(folder: str) -> None:
    """Go to the master's start folder, by its name at the start: that link may point to another release by now."""
    before = os.getcwd() if os.path.isdir(".") else ""
    try:
        os.chdir(folder)
    except OSError as error:
        raise CannotStart(f"cannot work in {folder}: {error.strerror}") from None
    now = os.getcwd()
    if now != before:
        sys.path[:] = [now if entry == before else entry for entry in sys.path]
