"""run_coroutine: use asyncio in a handler.

asyncio runs one event loop per thread, and all handlers share a thread: a second concurrent ``asyncio.run`` fails
("cannot be called from a running event loop") in a monkey-patched program, and an ``asyncio.run`` blocks all other
handlers in an unpatched one. So the process has one asyncio loop, in a separate native thread, and a handler waits for
it as for any other event. Unlike ``async_to_sync`` (asgiref) or a portal (anyio), a wait here blocks no thread.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import gevent
from gevent._hub_local import get_hub_if_exists
from gevent.hub import Waiter, get_hub
from gevent.monkey import get_original, is_module_patched
from greenlet import getcurrent

from .callables import name_of
from .checks import check_number
from .connection.poller import WAIT_IN_HUB
from .errors import GtcpServerError

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

log = logging.getLogger("gtcpserver")

#: Seconds that coroutines cancelled at the end of the process get for their ``finally`` blocks.
TIME_TO_END = 1.0

#: Native threads of ``asyncio.to_thread`` in a monkey-patched program; further calls queue. Equal to the maximum of the
#: standard library's executor.
MOST_THREADS = 32

#: Seconds until the event loop is run again after its selector failed: it may fail again at once.
PAUSE_AFTER_ERROR = 0.1

# The originals, also in a monkey-patched program.
_start_thread = get_original("_thread", "start_new_thread")
_native_lock = get_original("_thread", "allocate_lock")
_get_ident = get_original("_thread", "get_ident")
_native_sleep = get_original("time", "sleep")


def run_coroutine(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run an asyncio coroutine and wait for its result, while the other handlers run.

    All coroutines of the process run in one asyncio event loop, in a native thread that the first call starts: objects
    bound to a loop (an aiohttp session, an asyncpg pool) can be made by one call and used by others. Each coroutine
    gets its caller's ``contextvars``. Works with and without monkey patching, and in worker processes, each of which
    has its own loop.

    If the wait ends early (a timeout, a kill, a stop of the server), the coroutine is cancelled, without waiting for
    it. Coroutines that still run when the process ends are cancelled, and get a second.

    Args:
        coroutine: the coroutine object that a call of an ``async def`` function returns.
        timeout: seconds; None waits indefinitely.

    Returns:
        The result of the coroutine.

    Raises:
        TimeoutError: the coroutine was not done in time.
        Exception: any exception of the coroutine.
        asyncio.CancelledError: other code cancelled the coroutine.
        TypeError: ``coroutine`` is not a coroutine.
        ConfigError: ``timeout`` is not a number above 0.
        GtcpServerError: called in the thread of that event loop, where a coroutine can ``await`` instead.
        OSError, RuntimeError: the event loop, or its thread, could not be created.

    Example::

        import asyncio
        from gtcpserver import run_coroutine

        async def look_up(word):
            await asyncio.sleep(0.01)  # an asyncio library's work
            return word.upper()

        def handle(conn):
            conn.sendall(run_coroutine(look_up(conn.recv(100)), timeout=5))
    """
    if not isinstance(coroutine, Coroutine):
        hint = "; call it first" if callable(coroutine) else ""
        raise TypeError(f"coroutine must be what a call of an async function returns, got {coroutine!r}{hint}")
    try:
        check_number("timeout", timeout, above=0, none="to wait forever")
        if get_hub_if_exists() is None:
            _check_descriptors()  # the program's own native thread, which gets its event loop now
        hub = get_hub()
        if getcurrent() is hub:
            raise AssertionError(WAIT_IN_HUB)
        loop = _get_loop()
        if loop.thread == _get_ident():
            raise GtcpServerError("run_coroutine was called in the event loop that would run it: await the coroutine")
        waiter = Waiter(hub)
        awaker = hub.loop.async_()  # lets another thread wake gevent
        call = _Call(coroutine, awaker)
        late = TimeoutError(f"{name_of(coroutine)} was not done within {timeout} s")
    except BaseException:
        coroutine.close()
        raise
    try:
        awaker.start(waiter.switch, None)  # first: a stopped watcher wakes no greenlet
        loop.submit(call.start, call.context)
        try:
            with gevent.Timeout.start_new(timeout, late):
                waiter.get()
        except BaseException:
            loop.submit(call.cancel)
            raise
    finally:
        awaker.stop()
        awaker.close()
        del late  # it refers to this frame once it was raised, as does the error below: cycles
    error = call.error
    if error is None:
        return call.result  # type: ignore[no-any-return]
    try:
        raise error
    finally:
        del error, call


class _Call:
    """A coroutine and the greenlet that waits for it.

    Attributes:
        context: contextvars for the coroutine.
        result, error: outcome of the coroutine.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], awaker: Any) -> None:
        self._coroutine: Any = coroutine
        self._awaker = awaker
        self._task: asyncio.Task[Any] | None = None
        self.context = copy_context()
        self.result: Any = None
        self.error: BaseException | None = None

    # -- in the thread of the event loop -----------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._task = loop.create_task(self._coroutine)
            self._task.add_done_callback(self._done)
        except BaseException as error:  # no memory
            self._end(error)
        self._coroutine = None

    def cancel(self, _loop: asyncio.AbstractEventLoop) -> None:
        if self._task is not None:
            self._task.cancel()

    def _done(self, task: asyncio.Task[Any]) -> None:
        try:
            self.result = task.result()
        except BaseException as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._task = None
        self.error = error
        try:
            self._awaker.send()
        except Exception:
            pass  # the caller's event loop is gone


class _Loop:
    """An event loop of asyncio in a thread.

    Attributes:
        thread: native id of the thread.

    Raises:
        RuntimeError: no thread could be started.
        OSError: no event loop could be created (no descriptors).
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed: BaseException | None = None
        self._ending = False
        self._executor: Any = None
        self._begun, self._ended = _native_lock(), _native_lock()
        self._begun.acquire()
        self._ended.acquire()
        _check_descriptors()
        self.thread: int = _start_thread(self._run, ())
        self._begun.acquire()  # once a process, 1 ms
        if self._failed is not None:
            raise self._failed

    def submit(self, function: Callable[[asyncio.AbstractEventLoop], object], context: Context | None = None) -> None:
        """Call a function with the loop, in its thread. Callable from any thread; keeps the order of the calls.

        Raises:
            RuntimeError: the loop ended, at the end of the process.
        """
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, self._loop, context=context)

    def end(self) -> None:
        """Cancel all running coroutines and end the thread. Blocks: call only at the end of the process."""
        self._ending = True
        self.submit(lambda loop: loop.stop())
        self._ended.acquire(timeout=2 * TIME_TO_END + 1)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            # Not at the top: every program that imports this package would pay for it (40 ms, 5 MiB).
            import asyncio

            # Made here: a patched loop belongs to the thread that made it (its selector is gevent's).
            self._loop = loop = asyncio.new_event_loop()
            if is_module_patched("threading"):
                self._executor = _make_executor()
                loop.set_default_executor(self._executor)
            asyncio.set_event_loop(loop)
        except BaseException as error:
            self._failed = error
            return
        finally:
            self._begun.release()
        try:
            while not self._ending:
                self._run_once(loop)
            loop.run_until_complete(_cancel_all())
        finally:
            loop.close()
            if self._executor is not None:
                self._executor.wait_for_threads(TIME_TO_END)
            self._ended.release()

    def _run_once(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            pass  # a task raised it, and the waiting caller got it
        except BaseException:
            log.exception("the event loop of asyncio failed; running it again")
            _native_sleep(PAUSE_AFTER_ERROR)


def _check_descriptors() -> None:
    """Raise OSError if descriptors are lacking for an event loop of gevent and one of asyncio, which need 6.

    libev retries endlessly to make its pipe (evpipe_init in its ev.c), and the thread would never start.
    """
    pipes: list[int] = []
    try:
        for _ in range(4):
            pipes += os.pipe()
    finally:
        for fd in pipes:
            os.close(fd)


def _make_executor() -> Any:
    """Return an executor of native threads for ``asyncio.to_thread`` and name look-ups in a patched program.

    The standard library's "threads" would be greenlets of the event loop's thread, and the end of the process would
    wait for them indefinitely: the main thread's greenlets cannot wake them.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    class Executor(ThreadPoolExecutor):  # asyncio takes nothing else
        def __init__(self) -> None:
            super().__init__(MOST_THREADS)
            self._native = _native_lock()
            self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
            self._running = 0  # threads that take jobs
            self._threads_left = 0  # those, and those that end

        def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            with self._native:
                self._jobs.append((future, partial(function, *args, **options)))
                if self._running < MOST_THREADS:
                    try:
                        _start_thread(self._work, ())
                        self._running += 1
                        self._threads_left += 1
                    except BaseException:
                        if not self._running:  # otherwise the running threads take it
                            self._jobs.pop()
                            raise
            return future

        def _work(self) -> None:
            while True:
                with self._native:
                    if not self._jobs:
                        self._running -= 1
                        break
                    future, function = self._jobs.popleft()
                _run_job(future, function)
                del future, function
            try:
                hub = get_hub_if_exists()
                if hub is not None:
                    hub.destroy(destroy_loop=True)
            finally:
                with self._native:
                    self._threads_left -= 1

        def wait_for_threads(self, timeout: float) -> None:
            """Wait until all threads have ended, at most `timeout` seconds. Blocks.

            Python ends a thread that asks for its lock after the interpreter's end by pthread_exit(3), which greenlet's
            frames do not survive: "terminate called without an active exception", and SIGABRT.
            """
            give_up = monotonic() + timeout
            while self._threads_left and monotonic() < give_up:
                _native_sleep(0.001)

    return Executor()


def _run_job(future: Any, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        _check_descriptors()  # a patched call makes an event loop
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


async def _cancel_all() -> None:
    import asyncio

    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=TIME_TO_END)


_loop: _Loop | None = None
_starting = _native_lock()
_left_behind: list[_Loop] = []
_ends_at_exit = True


def _get_loop() -> _Loop:
    global _loop, _ends_at_exit
    with _starting:  # nothing in this block switches greenlets
        if _loop is None:
            _loop = _Loop()
            if not _ends_at_exit:
                # A worker process starts without its master's exit functions.
                atexit.unregister(_end)
                atexit.register(_end)
                _ends_at_exit = True
        return _loop


def _end() -> None:
    if _loop is not None:
        _loop.end()


def _forget() -> None:
    # In a forked child, which has the thread's memory but not the thread. The copy is kept: closing it would make
    # epoll_ctl(2) remove descriptors from the parent's epoll instance, and asyncio complain about lost tasks.
    global _loop, _starting, _ends_at_exit
    _starting = _native_lock()
    _ends_at_exit = False
    if _loop is not None:
        _left_behind.append(_loop)
        _loop = None


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
