"""Background work at the end of a process: what handlers left to threads, greenlets and processes.

CPython waits for it without limit at its exit (``threading._shutdown``), and ``os._exit``, by which a worker process
ends, drops it silently. Here one rule holds for both: background work gets what is left of the stop's time, and a log
line names what was cut.

Background work is

- a thread that is no daemon (threading's word for one that may be dropped at the exit);
- a job of a ``concurrent.futures`` executor, begun or queued, but not a thread that waits for jobs;
- a job of gevent's native thread pools, begun or queued;
- a greenlet spawned by a handler, or by such a greenlet. One that the program spawns while it is loaded, or in a hook,
  counts as a helper that never ends, and is dropped;
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

#: Seconds of waiting until a log line names the work.
TELL_SECONDS = 1.0

#: Seconds that greenlets get for their ``finally`` blocks, and processes to end by SIGTERM.
END_SECONDS = 0.25

#: Most names in one log line: clients can cause any number of jobs.
MOST_NAMED = 10


@dataclass(frozen=True)
class Job:
    """One piece of background work.

    Attributes:
        name: what it is and where it stands, for the log.
        greenlet: the greenlet that runs it, if one does.
        thread: the thread that runs it, if one does.
        process: the process of multiprocessing, if it is one.
    """

    name: str
    greenlet: Any = None
    thread: threading.Thread | None = None
    process: Any = None


def end_background_work(until: float | None, hurry: Event) -> tuple[str, ...]:
    """Wait for background work, cut what is left, and log that.

    Greenlets are ended by GreenletExit and processes by SIGTERM. A thread cannot be ended, but the interpreter will not
    wait for it at its exit.

    Args:
        until: monotonic time at which to cut it; None waits forever.
        hurry: event that ends the wait.

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
    except (
        Exception
    ):  # this looks into objects of other libraries, and no surprise there may keep the process from ending
        log.exception("background work could not be ended")
        return ()


def _wait(until: float | None, hurry: Event) -> list[Job]:
    """Wait until there is no work, or no time; return what is left."""
    work = Work()
    tell_at: float | None = monotonic() + TELL_SECONDS
    was_idle = False
    while True:
        jobs = work.look()
        # A thread that has just taken a job from its queue looks unoccupied: one look is not enough.
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
    """The background work of this process."""

    def __init__(self) -> None:
        self._greenlets: list[Any] = []  # of handlers, found by the last search
        self._of_threads: dict[threading.Thread, Any] = {}

    def look(self, thoroughly: bool = False) -> list[Job]:
        """List what runs or is queued now.

        Args:
            thoroughly: search for greenlets even if there is other work; with a million objects that takes 0.1 s.
        """
        frames = frames_of_threads()
        jobs = self._look_at_threads(frames)
        jobs += [Job("job of gevent's thread pool")] * _unfinished_of_native_pools(frames)
        jobs += _processes()
        self._greenlets = [one for one in self._greenlets if not one.ready()]
        if thoroughly or not (jobs or self._greenlets):
            # In a patched program threads are greenlets, and a thread's ident is the id of its greenlet.
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
        """Return the greenlet that runs a thread; None for a native thread."""
        if not monkey.is_module_patched("threading"):
            return None
        if thread not in self._of_threads:
            self._of_threads.update(dict.fromkeys(threading.enumerate()) | _greenlets_of_threads())
        return self._of_threads.get(thread)


def _greenlets_of_threads() -> dict[threading.Thread, Any]:
    """Return the greenlet of each thread of a patched program: gevent has it run the thread's method _bootstrap."""
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
    """Unfreeze all objects in a block: the garbage collector does not see frozen ones."""
    was_frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        if was_frozen:
            gc.freeze()


_usual_init: Any = None


def threads_of_handlers_are_no_daemons() -> None:
    """Make threads that handlers start in a monkey-patched program non-daemons, as in any other program.

    A thread is a daemon if the thread that creates it is one. A handler is a greenlet, for which
    ``threading.current_thread()`` returns a stand-in that is a daemon; in a program that is not patched, it returns the
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
    queue = _futures_threads().get(thread)  # the interpreter waits for these even if they are daemons
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
    """Return the threads of all ThreadPoolExecutors, each with its queue."""
    module = sys.modules.get("concurrent.futures.thread")
    return dict(getattr(module, "_threads_queues", {}))


def _code_of_work_item() -> CodeType | None:
    item = getattr(sys.modules.get("concurrent.futures.thread"), "_WorkItem", None)
    return getattr(getattr(item, "run", None), "__code__", None)


def _frame_of(frame: FrameType | None, code: CodeType | None) -> FrameType | None:
    """Return the frame of a function among those that lead to ``frame``, or None."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _unfinished_of_native_pools(frames: dict[int, FrameType]) -> int:
    """Count the jobs of gevent's thread pools, found by the frames of their threads."""
    queues = {}
    for frame in frames.values():
        run = _frame_of(frame, _WorkerGreenlet.run.__code__)
        queue = getattr(run.f_locals.get("self"), "_task_queue", None) if run is not None else None
        if queue is not None:
            queues[id(queue)] = queue
    return sum(int(queue.unfinished_tasks) for queue in queues.values())


def _greenlets_of_handlers() -> list[Any]:
    """Return the unfinished greenlets that descend from handlers, except this library's own."""
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
    """List multiprocessing's processes, except daemons, and those of executors, whose jobs are counted."""
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
    """Return the processes of the ProcessPoolExecutor that this thread manages, if it manages one."""
    processes = getattr(thread, "processes", None)
    return list(processes.values()) if isinstance(processes, dict) else []


def _end_greenlets(jobs: list[Job]) -> None:
    gevent.killall([job.greenlet for job in jobs if job.greenlet is not None], timeout=END_SECONDS)


def _end_processes(jobs: list[Job]) -> None:
    processes = [job.process for job in jobs if job.process is not None]
    _terminate([*processes, *(process for job in jobs for process in _processes_of(job.thread))])


def end_executors() -> None:
    """End the processes of all ProcessPoolExecutors, when there is no work left and this process ends.

    multiprocessing's exit function waits for them: forever, unless the exit function of concurrent.futures told them to
    end.
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
    """Make the interpreter exit without waiting for these threads, but wait for all others.

    The interpreter calls ``threading._shutdown`` (Python/pylifecycle.c, wait_for_thread_shutdown). That runs the exit
    functions of concurrent.futures, which wait as well, and joins every thread that is no daemon.
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
    """Return where a job stands: the innermost line of the program itself, or "" if unknown."""
    calls = calls_of_program(frame)
    if not calls:
        return ""
    code, line = calls[-1]
    return f" at {os.path.basename(code.co_filename)}:{line} in {code.co_name}"
