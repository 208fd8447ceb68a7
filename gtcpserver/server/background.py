"""Background work at the end of a process: what handlers have begun and left to threads, greenlets and processes.

By itself, CPython waits for it without limit when it exits (``threading._shutdown``), and ``os._exit``, by which a
worker process ends, drops it without a word. Here one rule is for both: it gets what is left of the stop's time, and a
log line names what was cut.

Work is

- a thread that is no daemon, threading's word for one that may be dropped at the exit;
- a job of a ``concurrent.futures`` executor, begun or queued; its threads that wait for jobs are none;
- a job of gevent's native thread pools, begun or queued;
- a greenlet that a handler has spawned, or that such a greenlet has. One that the program spawns while it is loaded, or
  in a hook, is taken for a helper without an end of its own, and is dropped;
- a process of ``multiprocessing`` that is no daemon.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from time import monotonic
from types import CodeType, FrameType, MethodType
from typing import Any

import gevent
from gevent import monkey
from gevent.event import Event
from gevent.threadpool import _WorkerGreenlet

from gtcpserver.callables import name_of
from gtcpserver.diagnostics.frames import calls_of_program, frames_of_threads
from gtcpserver.pool.greenlets import HANDLER_ORIGIN, origins

log = logging.getLogger("gtcpserver")

#: Seconds between two looks: an event loop cannot wait for a thread.
LOOK_SECONDS = 0.02

#: Seconds of waiting until the log says for what.
TELL_SECONDS = 1.0

#: Seconds that greenlets get for their ``finally`` blocks, and processes to end by SIGTERM.
END_SECONDS = 0.25

#: Names in one log line; clients may have begun any number of jobs.
MOST_NAMED = 10


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: what it is and where it stands, for the log.
        greenlet: which runs it, unless a thread does.
        thread: which runs it.
        process: of multiprocessing.
    """

    name: str
    greenlet: Any = None
    thread: threading.Thread | None = None
    process: Any = None


def end_background_work(until: float | None, hurry: Event) -> tuple[str, ...]:
    """Wait for what runs in the background, then cut what is left, and log it.

    Greenlets are ended by GreenletExit and processes by SIGTERM. A thread cannot be ended, but the interpreter does not
    wait for it any more when it exits.

    Args:
        until: when to cut it, monotonic; None waits forever.
        hurry: when set, waits no longer.

    Returns:
        the name of each job that was cut.
    """
    try:
        jobs = _wait(until, hurry)
        if jobs:
            log.warning("cut %s", _listed(jobs))
            _end_greenlets(jobs)
            _end_processes(jobs)
            _leave_behind(jobs)
        return tuple(job.name for job in jobs)
    except Exception:  # it looks into others' objects, and nothing of that may keep a process from its end
        log.exception("background work could not be ended")
        return ()


def _wait(until: float | None, hurry: Event) -> list[Job]:
    """Wait until there is no work; return what is left at the end."""
    work = Work()
    tell_at: float | None = monotonic() + TELL_SECONDS
    was_idle = False
    while True:
        jobs = work.look()
        # A thread that has just taken a job from its queue looks idle: one look is not enough.
        if not jobs and (was_idle or not _futures_threads()):
            return []
        was_idle = not jobs
        now = monotonic()
        left = LOOK_SECONDS if until is None else min(LOOK_SECONDS, until - now)
        if jobs and (left <= 0 or hurry.is_set()):
            return work.look(thoroughly=True)
        if jobs and tell_at is not None and now >= tell_at:
            log.info("waiting for %s", _listed(jobs))
            tell_at = None
        gevent.sleep(max(left, 0.001))


class Work:
    """The work of this process."""

    def __init__(self) -> None:
        self._greenlets: list[Any] = []  # of handlers, found by the last search
        self._of_threads: dict[threading.Thread, Any] = {}

    def look(self, thoroughly: bool = False) -> list[Job]:
        """List what runs or waits for its turn now.

        Args:
            thoroughly: search for greenlets (which takes 0.1 s where there are a million objects) although there is
                other work.
        """
        frames = frames_of_threads()
        jobs = self._look_at_threads(frames)
        jobs += [Job("job of gevent's thread pool")] * _unfinished_of_native_pools(frames)
        jobs += _processes()
        self._greenlets = [one for one in self._greenlets if not one.ready()]
        if thoroughly or not (jobs or self._greenlets):
            # A patched program's threads are greenlets, whose ident is their id.
            threads = {thread.ident for thread in threading.enumerate()}
            self._greenlets = [one for one in _greenlets_of_handlers() if id(one) not in threads]
        return jobs + [Job(f"greenlet {name_of(one._run)}{_place(one.gr_frame)}", one) for one in self._greenlets]  # noqa: SLF001 - gevent's

    def _look_at_threads(self, frames: dict[int, FrameType]) -> list[Job]:
        jobs: list[Job] = []
        queues: dict[int, tuple[str, Any]] = {}
        futures = _futures_threads()
        for thread in threading.enumerate():
            if thread is threading.main_thread() or not thread.is_alive():
                continue
            own = self._greenlet_of(thread) if thread in futures or not thread.daemon else None
            jobs += _jobs_of_thread(thread, frames.get(thread.ident or 0) if own is None else own.gr_frame, queues)
        for name, queue in queues.values():
            jobs += [Job(f"job queued for {name}")] * queue.qsize()
        return jobs

    def _greenlet_of(self, thread: threading.Thread) -> Any:
        """The greenlet that is a thread; None of a native one."""
        if not monkey.is_module_patched("threading"):
            return None
        if thread not in self._of_threads:
            self._of_threads.update(dict.fromkeys(threading.enumerate()) | _greenlets_of_threads())
        return self._of_threads.get(thread)


def _greenlets_of_threads() -> dict[threading.Thread, Any]:
    """The greenlets of a patched program's threads, by what gevent has them run: the method _bootstrap of each."""
    with _nothing_frozen():
        methods = [one for one in gc.get_referrers(*threading.enumerate()) if type(one) is MethodType]
        attributes = [one for one in gc.get_referrers(*methods) if type(one) is dict and "_run" in one]
        found = gc.get_referrers(*attributes)
    return {
        one._run.__self__: one  # noqa: SLF001 - gevent's
        for one in found
        if issubclass(type(one), gevent.Greenlet) and isinstance(getattr(one._run, "__self__", None), threading.Thread)  # noqa: SLF001 - gevent's
    }


@contextmanager
def _nothing_frozen() -> Iterator[None]:
    """What is frozen is out of the garbage collector's sight."""
    was_frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        if was_frozen:
            gc.freeze()


_usual_init: Any = None


def threads_of_handlers_are_no_daemons() -> None:
    """Make the threads that handlers start in a monkey-patched program what they are in any other.

    A thread inherits from the one that makes it whether it is a daemon. A handler is a greenlet, for which
    ``threading.current_thread()`` gives a stand-in that is a daemon; in a program that is not patched, it gives the
    main thread, which is none.
    """
    global _usual_init
    if _usual_init is not None or not monkey.is_module_patched("threading"):
        return
    usual = _usual_init = threading.Thread.__init__

    @wraps(usual)
    def init(self: threading.Thread, *arguments: Any, daemon: bool | None = None, **named: Any) -> None:
        if daemon is None and isinstance(threading.current_thread(), threading._DummyThread):  # noqa: SLF001 - the standard library's
            tree = getattr(gevent.getcurrent(), "spawn_tree_locals", None)
            daemon = False if tree is not None and HANDLER_ORIGIN in tree else None
        usual(self, *arguments, daemon=daemon, **named)

    threading.Thread.__init__ = init  # type: ignore[method-assign]


def _jobs_of_thread(
    thread: threading.Thread, frame: FrameType | None, queues: dict[int, tuple[str, Any]]
) -> Iterator[Job]:
    pending = getattr(thread, "pending_work_items", None)
    if isinstance(pending, dict):  # it manages a ProcessPoolExecutor
        yield from [Job("job of a ProcessPoolExecutor", thread=thread)] * len(pending)
        return
    queue = _futures_threads().get(thread)  # the interpreter waits for these whether they are daemons or not
    if queue is None:
        if not thread.daemon:
            yield Job(f"thread {thread.name}{_place(frame)}", thread=thread)
        return
    queues[id(queue)] = thread.name.rpartition("_")[0] or thread.name, queue
    run = _frame_of(frame, _code_of_work_item())
    if run is not None:
        function = getattr(run.f_locals.get("self"), "fn", None)
        yield Job(f"job {name_of(function)} of {thread.name}{_place(frame)}", thread=thread)


def _futures_threads() -> dict[Any, Any]:
    """The threads of all ThreadPoolExecutors, each with its queue."""
    module = sys.modules.get("concurrent.futures.thread")
    return dict(getattr(module, "_threads_queues", {}))


def _code_of_work_item() -> CodeType | None:
    item = getattr(sys.modules.get("concurrent.futures.thread"), "_WorkItem", None)
    return getattr(getattr(item, "run", None), "__code__", None)


def _frame_of(frame: FrameType | None, code: CodeType | None) -> FrameType | None:
    """The frame of a function among those that lead to ``frame``, or None."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _unfinished_of_native_pools(frames: dict[int, FrameType]) -> int:
    """Count the jobs of gevent's thread pools, which their threads lead to."""
    queues = {}
    for frame in frames.values():
        run = _frame_of(frame, _WorkerGreenlet.run.__code__)
        queue = getattr(run.f_locals.get("self"), "_task_queue", None) if run is not None else None
        if queue is not None:
            queues[id(queue)] = queue
    return sum(int(queue.unfinished_tasks) for queue in queues.values())


def _greenlets_of_handlers() -> list[Any]:
    """The greenlets that descend from handlers and have not ended, except this library's own."""
    if not origins:  # most programs: the garbage collector need not look at every object
        return []
    with _nothing_frozen():
        trees = [one for one in gc.get_referrers(*origins) if type(one) is dict and HANDLER_ORIGIN in one]
        found = gc.get_referrers(*trees)
    return [
        one
        for one in found
        if issubclass(type(one), gevent.Greenlet) and one.started and not one.ready() and not _is_ours(one)
    ]


def _is_ours(greenlet: Any) -> bool:
    function = greenlet._run  # noqa: SLF001 - gevent's
    while isinstance(function, partial):
        function = function.func
    return greenlet is gevent.getcurrent() or str(getattr(function, "__module__", "")).startswith("gtcpserver.")


def _processes() -> list[Job]:
    """multiprocessing's, without daemons, and without those of executors, whose jobs are counted."""
    module = sys.modules.get("multiprocessing.process")
    if module is None:
        return []
    of_executors = {process.pid for thread in threading.enumerate() for process in _processes_of(thread)}
    return [
        Job(f"process {one.name} (pid {one.pid})", process=one)
        for one in module.active_children()
        if not one.daemon and one.pid not in of_executors and one._parent_pid == os.getpid()  # noqa: SLF001 - the standard library's
    ]


def _processes_of(thread: threading.Thread | None) -> list[Any]:
    """Those of the ProcessPoolExecutor that this thread manages, if it does."""
    processes = getattr(thread, "processes", None)
    return list(processes.values()) if isinstance(processes, dict) else []


def _end_greenlets(jobs: list[Job]) -> None:
    gevent.killall([job.greenlet for job in jobs if job.greenlet is not None], timeout=END_SECONDS)


def _end_processes(jobs: list[Job]) -> None:
    processes = [job.process for job in jobs if job.process is not None]
    _terminate([*processes, *(process for job in jobs for process in _processes_of(job.thread))])


def end_executors() -> None:
    """End the processes of all ProcessPoolExecutors, when there is no work and this process ends.

    multiprocessing's exit function waits for them: forever, where that of concurrent.futures, which tells them to end,
    was not called.
    """
    _terminate([process for thread in threading.enumerate() for process in _processes_of(thread)])


def _terminate(processes: list[Any]) -> None:
    for process in processes:
        process.terminate()
    give_up = monotonic() + END_SECONDS
    while any(process.is_alive() for process in processes):
        gevent.sleep(LOOK_SECONDS)
        if monotonic() > give_up:
            for process in processes:
                process.kill()
            return


def _leave_behind(jobs: list[Job]) -> None:
    """Make the interpreter exit without waiting for these threads, but for all others.

    It calls ``threading._shutdown`` (Python/pylifecycle.c, wait_for_thread_shutdown), which runs the exit functions of
    concurrent.futures, which wait as well, and joins every thread that is no daemon.
    """
    left = {job.thread for job in jobs if job.thread is not None}
    if not left:
        return
    usual = threading._shutdown  # type: ignore[attr-defined]  # noqa: SLF001 - the standard library's

    def shutdown() -> None:
        if not any(thread.is_alive() for thread in left):
            usual()
            return
        work = Work()
        while any(job.thread is not None and job.thread not in left for job in work.look()):
            gevent.sleep(LOOK_SECONDS)
        end_executors()

    threading._shutdown = shutdown  # type: ignore[attr-defined]  # noqa: SLF001 - the standard library's


def _listed(jobs: list[Job]) -> str:
    named = ", ".join(job.name for job in jobs[:MOST_NAMED])
    more = f", and {len(jobs) - MOST_NAMED} more" if len(jobs) > MOST_NAMED else ""
    return f"{len(jobs)} background job{'' if len(jobs) == 1 else 's'}: {named}{more}"


def _place(frame: FrameType | None) -> str:
    """Where it stands: the innermost line of the program's own, or "" where it is unknown."""
    calls = calls_of_program(frame)
    if not calls:
        return ""
    code, line = calls[-1]
    return f" at {os.path.basename(code.co_filename)}:{line} in {code.co_name}"
