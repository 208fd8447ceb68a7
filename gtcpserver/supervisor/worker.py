"""A worker process: a Server on the sockets of a slot, controlled by the master.

The file reads in the order in which things happen: begin, serve, beat, obey, end.
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
from gtcpserver.handover.mover import Mover
from gtcpserver.linux import stay_on
from gtcpserver.monitoring.connection_table import MOST, look
from gtcpserver.monitoring.selection import Selection, end, rows_of
from gtcpserver.monitoring.watch import Watch, resident_bytes
from gtcpserver.plural import counted
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import end_process, register
from gtcpserver.process.signal_stack import enlarge_signal_stack
from gtcpserver.server.background import end_executors, threads_of_handlers_are_no_daemons
from gtcpserver.server.server import Server, State
from gtcpserver.shared.column import Column
from gtcpserver.shared.memory import SharedMemory
from gtcpserver.tls import ticket_keys

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

#: Seconds between two reports of counters. A worker killed by SIGKILL loses at most that much.
STATS_SECONDS = 1.0

#: Seconds between a failure of a repeated task and its next attempt, so that it does not spin.
FAILED_SECONDS = 0.25

#: Seconds for the last message to find room in the channel; the master reads at once, unless it is stopped.
LAST_WORDS_SECONDS = 2.0

#: Most bytes of the table of connections, which has to fit into a packet.
LARGEST_TABLE = MAX_BYTES * 3 // 4

#: Seconds for connections to finish when the master is gone: no process can stop or replace this one any more, and it
#: has the port that the next master needs.
ORPHAN_SECONDS = 1.0

#: Seconds after that until the process exits, whatever still runs.
ORPHAN_MARGIN = 0.5

_start_thread = monkey.get_original("_thread", "start_new_thread")
_native_sleep = monkey.get_original("time", "sleep")


class CannotStart(GtcpServerError):
    """A worker cannot begin to serve.

    Attributes:
        details: a traceback, or "".
        status: the exit status if no worker has ever started: 2 for a mistake of the caller, otherwise 3.

    Example::

        from gtcpserver.supervisor import CannotStart

        def started(worker):
            raise CannotStart("the database is not reachable", status=2)
    """

    def __init__(self, message: str, details: str = "", status: int = 3) -> None:
        super().__init__(message)
        self.details = details
        self.status = status


@dataclass(frozen=True)
class Hooks:
    """The user's functions, called in the workers.

    Attributes:
        worker_start: called with the Worker, before it reports that it is ready.
        worker_stop: called with the Worker, when its last connection has ended.
        worker_error: called with the Worker and a text when a worker has failed: in the worker itself if possible,
            otherwise in its replacement.

    Example::

        from gtcpserver import Server
        from gtcpserver.supervisor import Hooks

        def started(worker):
            print("worker", worker.number, "has process id", worker.pid)  # worker 0 has process id ...

        def build(sockets):
            return Server(sockets, handle), Hooks(worker_start=started)
    """

    worker_start: Callable[[Worker], None] | None = None
    worker_stop: Callable[[Worker], None] | None = None
    worker_error: Callable[[Worker, str], None] | None = None

    def __post_init__(self) -> None:
        for name, hook in vars(self).items():
            check_hook(name, hook)


@dataclass(frozen=True)
class Job:
    """What the master passes to a worker that it forks.

    Attributes:
        number: number of its slot, from 0.
        generation: number of reloads before it.
        build: returns the server on these sockets, not started, and the hooks. May raise anything.
        sockets: listening sockets, each with its use.
        channel: the channel to the master.
        config: the configuration of the master.
        log_style: how to log; None leaves logging as it is.
        cpu: CPU to run on; None: any.
        predecessor: why the last worker of the slot died; "" if it did not.
        master: process id of the master.
        folder: working directory.
        settle: called when the server has started.
        prepare: called first, with the master's rights.
        program: name of the program, for the title of the process.
        memory: the counts that all workers share; None: this one counts for itself.
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
    program: str = ""
    memory: SharedMemory | None = None


@dataclass
class Worker:
    """A worker process, as hooks and handlers see it (`gtcpserver.supervisor.current_worker`).

    Attributes:
        number: number of its slot, from 0; its successor has the same.
        generation: number of reloads of the master before it.
        pid: process id.
        server: the Server it runs; None before it is made.
        ready: whether connections are wanted, for health checks: False at the start, and from the beginning of a stop,
            drain delay included.

    Example::

        def started(worker):
            worker.server.context["worker"] = worker.number
    """

    number: int
    generation: int
    pid: int = field(default_factory=os.getpid)
    server: Server | None = None
    ready: bool = False


_current: Worker | None = None


def current_worker() -> Worker | None:
    """Return the worker that this process is; None if it is none.

    Example::

        from gtcpserver.supervisor import current_worker

        worker = current_worker()
        print("one process" if worker is None else f"worker {worker.number}")  # one process
    """
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
        self.left_out = False  # whether the log says that the handler's counters are left out
        self.unread: list[tuple[Message, int | None]] = []
        self.order: Callable[[], gevent.Greenlet] | None = None  # begins to obey the master's order to end
        self.obeying: gevent.Greenlet | None = None
        self.borrower: Borrower | None = None
        self.mover: Mover | None = None  # if its connections may move to other workers
        # Commands that arrived before there was a server.
        self.early: list[Message] = []
        self.in_child = False  # whether the program forked this process: it is no worker
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
        # The beats go on meanwhile, or the master would think that this worker is blocked.
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
        enlarge_signal_stack()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _work_in(job.folder)
        if job.cpu is not None:
            stay_on({job.cpu})
        files = job.prepare() if job.prepare is not None else NamedFiles()
        self.become_unprivileged(files)
        # After the change of user, which clears it (prctl(2)).
        die_with_parent(signal.SIGTERM)
        if os.getppid() != job.master:
            raise CannotStart("the master is gone")
        if job.log_style is not None:
            log_in_worker(job.log_style)
        self.commands = get_hub().loop.io(self.channel.fileno(), 1, ref=False)
        self.commands.start(self.on_command)
        threads_of_handlers_are_no_daemons()
        ticket_keys.share(job.memory)
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
        self.share_limits(server)
        server.stop_timeout = job.config.graceful_timeout
        server.start()
        self.end_child()
        if job.settle is not None:
            job.settle()
        if self.hooks.worker_start is not None:
            self.hooks.worker_start(self.worker)
            self.end_child()
        if server.moving is not None:
            self.mover = Mover(server, self.tell_moved, partial(self.channel.send, "alone"), self.tell_shared)
        self.worker.ready = True
        self.channel.send("ready", handover=self.mover is not None, ends=server.max_accepts is not None)
        for message in self.early:
            self.obey(message)
        return server

    def share_limits(self, server: Server) -> None:
        """Have the limits of the server hold for all workers together."""
        memory = self.job.memory
        if memory is None:
            return  # the master has said why
        column = memory.claim()
        if column is None:
            others = memory.columns
            log.warning("worker %d counts its clients alone: there are %d workers already", self.job.number, others)
            return
        server.share(Column(memory, column), lambda: self.channel.send("enough"))

    def become_unprivileged(self, files: NamedFiles) -> None:
        was_root = os.geteuid() == 0
        if was_root and self.job.config.user is not None:
            self.borrower = Borrower(self.channel)
            self.borrower.name(files, LAST_WORDS_SECONDS)
        become(self.job.config)
        if self.borrower is not None:
            self.channel.send("unprivileged")
            if not self.channel.finish(LAST_WORDS_SECONDS):
                raise CannotStart("the master does not read that this worker is another user now")
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
        if self.job.memory is not None:
            self.job.memory.close()
        for number in IGNORED_BY_WORKERS:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def end_child(self, error: BaseException | None = None) -> None:
        """End the process if it is a child forked by the user's code. Call after such code returns."""
        if self.in_child:
            end_child(error)

    # -- serve -------------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Tell the master four times a second that the loop runs, and how late it is; ask for a successor when due.

        Whatever fails here, the beats go on: a worker that falls silent is killed with all its connections. So the
        user's code, which might wait, is not called here.
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
        """Send counters once a second, as far as available."""
        while True:
            with self.going_on("a report of counters"):
                gevent.sleep(STATS_SECONDS)
                self.send_stats()

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Keep a repeated task going in spite of exceptions; log them now and then."""
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
        """Return counters and memory; leave out what is not available, or does not fit into a message."""
        fields: dict[str, Any] = {"rss": resident_bytes()}
        try:
            # The counters of the handler are an attribute of the user's, which may wait.
            with gevent.Timeout(STATS_SECONDS):
                stats = self.watch.stats() if self.watch is not None else dataclasses.asdict(server.stats())
            for name in ("handler_gauges", "handler_counters"):
                if len(json.dumps([stats["handler_gauges"], stats["handler_counters"]])) > LARGEST_TABLE:
                    if not self.left_out:
                        log.error("worker %d: the handler has too many counters; leaving them out", self.job.number)
                    self.left_out = True
                    stats[name] = {}
            fields["stats"] = stats
        except gevent.GreenletExit:
            raise
        except BaseException as error:  # gevent.Timeout, SystemExit: whatever a program's counters raise
            left_out = self.faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("worker %d cannot count%s", self.job.number, also(left_out))
        return fields

    def send_connections(self, server: Server, workers: int) -> None:
        table = look(server, max(1, MOST // workers))
        rows = table.rows
        while len(json.dumps([rows, table.places])) > LARGEST_TABLE:
            rows = rows[: len(rows) // 2]
        self.channel.send("connections", table=rows, places=table.places)

    def select(self, server: Server, message: Message) -> None:
        """Send, or end, the connections that the master asks for."""
        selection = Selection.of(message.fields)
        ended = end(server, selection) if message.fields.get("end") is True else 0
        rows, found = ([], ended) if ended else rows_of(server, selection, max(1, message.count("most")))
        while len(json.dumps(rows)) > LARGEST_TABLE:
            rows = rows[: len(rows) // 2]
        self.channel.send("selected", number=message.count("number"), rows=rows, found=found, ended=ended)

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
        """Begin the end of this worker. The order is stored first: there may be no memory to start a greenlet."""
        self.worker.ready = False
        self.order = partial(gevent.spawn, function, *arguments)
        self.obeying = self.order()

    def look_whether_obeyed(self) -> None:
        """Obey an order that could not be obeyed before: the master does not repeat it."""
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
        """Read what the master sent, or notice that it is gone. Called in the hub."""
        try:
            self.read_channel()
        except Exception as error:
            left_out = self.faults.allow(fault_key(type(error), error.__traceback__))
            if left_out is not None:
                log.exception("worker %d cannot obey%s", self.job.number, also(left_out))
            # An exception that leaves a callback stops its watcher for good: this worker would be deaf. What cannot be
            # read now can be read later.
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
            elif message.kind == "pair":
                self.use_line(message, fd)
            elif self.worker.server is None or self.worker.server.state is State.NEW:
                self.early.append(message)
            else:
                self.obey(message)
        if self.channel.ended:
            self.be_orphaned()

    def use_log_file(self, fd: int | None) -> None:
        if fd is not None:
            write_stderr_to(fd)
        else:  # this process had no descriptor left
            gevent.spawn_later(STATS_SECONDS, self.channel.send, "reopen")

    def use_line(self, message: Message, fd: int | None) -> None:
        if fd is None:
            return  # this process had no descriptor left; the other end is told by the end of the line
        if self.mover is None:
            close_descriptor(fd)
        elif message.fields.get("gives") is True:
            self.mover.send_on(fd, message.count("share") if "share" in message.fields else None)
        else:
            self.mover.receive_on(fd, message.count("giver"))

    def tell_moved(self) -> None:
        server, mover = self.worker.server, self.mover
        if server is not None and mover is not None:
            self.channel.send("moved", moved=mover.moving.moved, staying=mover.staying())

    def tell_shared(self) -> None:
        if self.mover is not None:
            self.channel.send("shared", moved=self.mover.moving.moved)

    def obey(self, message: Message) -> None:
        server = self.worker.server
        assert server is not None
        if message.kind == "unready":
            self.worker.ready = False
            server.draining = True
        elif message.kind == "report":
            gevent.spawn(self.send_stats)
        elif message.kind == "connections":
            gevent.spawn(self.send_connections, server, max(1, int(message.number("of"))))
        elif message.kind == "select":
            gevent.spawn(self.select, server, message)
        elif message.kind == "halt":
            self.end_by(server.halt)
        elif message.kind == "hasten":
            timeout = message.seconds("timeout")
            if timeout is not None:
                gevent.spawn(server.hasten, timeout)  # after a stop that the message before began
        elif message.kind == "retire":
            self.leave(message)
            self.end_by(self.retire, message.seconds("timeout"), message.fields.get("hurry") is not True)
        elif message.kind == "stop":
            last_of_all = message.fields.get("all") is True
            self.leave(message)
            drained = (Use.SLOT, Use.SHARED) if last_of_all else (Use.SLOT,)
            self.end_by(self.stop, message.seconds("timeout"), drained, message.fields.get("hurry") is not True)

    def retire(self, timeout: float | None, patient: bool) -> None:
        """Tell the handler that a successor serves new connections, and stop the server."""
        server = self.worker.server
        assert server is not None
        replaced = getattr(server.handler, "worker_replaced", None)
        if callable(replaced):
            try:
                # The successor has read the same files moments ago.
                with gevent.Timeout(LAST_WORDS_SECONDS, TimeoutError("timed out")):
                    replaced()
            except Exception as error:
                log.warning("worker %d serves its connections by the old settings: %s", self.job.number, error)
        self.stop(timeout, (), patient)

    def leave(self, message: Message) -> None:
        """Move connections from now on, if there are workers that take them."""
        if self.mover is not None and message.fields.get("moves") is True:
            self.mover.leave()

    def stop(self, timeout: float | None, drained: Collection[Use], patient: bool = False) -> None:
        """Stop the server.

        Args:
            timeout: seconds; None waits forever.
            drained: uses of sockets that have no other owner: drain them before closing.
            patient: as for `Server.stop`.
        """
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
            # Someone killed only this process: leave when a successor is ready. If all of us are to stop (systemd and
            # others signal every process of a service), the master says so.
            self.wants_to_retire = "got SIGTERM"

    def on_dump(self, _number: int, frame: FrameType | None) -> None:
        message = f"all stacks of worker {self.job.number} (pid {os.getpid()})"
        try:
            log_with_details(logging.WARNING, message, format_stacks(frame))
        except Exception:  # it would be raised in the code that runs now
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
    """End a child that the program forked.

    Args:
        error: the exception that left the program, or a CannotStart made from it; None if there was none.
    """
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
    """Change to the folder in which the master was started, by name: the link may point to another release by now."""
    before = os.getcwd() if os.path.isdir(".") else ""
    try:
        os.chdir(folder)
    except OSError as error:
        raise CannotStart(f"cannot work in {folder}: {error.strerror}") from None
    now = os.getcwd()
    if now != before:
        sys.path[:] = [now if entry == before else entry for entry in sys.path]
