"""StopSignals: SIGTERM and SIGINT as calls in the event loop, from before a server listens until it has stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gevent.hub import get_hub
from gevent.monkey import get_original

from gtcpserver.linux import make_pipe
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import register
from gtcpserver.process.signal_stack import enlarge_signal_stack
from gtcpserver.process.watcher import watch

_native_id: Callable[[], int] = get_original("threading", "get_native_id")


class StopSignals:
    """A ``with`` block in which each SIGTERM and SIGINT calls ``told(number)`` in the hub.

    In process 1, SIGQUIT too: the kernel has no default action there (pid_namespaces(7)), so a container with
    STOPSIGNAL SIGQUIT would have to be killed. Elsewhere SIGQUIT dumps core, as always.

    The block works in any greenlet of the main thread; if several greenlets have one, all of them are called. In other
    threads it does nothing: Python allows signal handlers in the main thread only.
    """

    def __init__(self, told: Callable[[int], Any]) -> None:
        self._told = told
        self._handlers: _Handlers | None = None

    def __enter__(self) -> None:
        global _handlers
        if not in_main_thread():
            return
        if _handlers is None or _handlers.process != os.getpid():  # a forked child inherits those of its parent
            _handlers = _Handlers()
        self._handlers = _handlers
        self._handlers.told.append(self._told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        global _handlers
        handlers, self._handlers = self._handlers, None
        if handlers is None:
            return
        handlers.told.remove(self._told)
        if not handlers.told:
            if _handlers is handlers:
                _handlers = None
            handlers.restore()


class _Handlers:
    """The signal handlers of a process, from the first StopSignals block to the end of the last."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.told: list[Callable[[int], Any]] = []
        self._loop = get_hub().loop
        self._missed = 0
        self._waker: Waker | None = Waker(self._tell_missed)
        register(self)
        enlarge_signal_stack()  # the program may have enabled faulthandler, or `-X dev`
        numbers = [signal.SIGTERM, signal.SIGINT] + [signal.SIGQUIT] * (self.process == 1)
        self._before = [(number, signal.signal(number, self._on_signal)) for number in numbers]

    def _on_signal(self, number: int, _frame: Any) -> None:
        # A signal handler runs between any two bytecodes: leave the work to the loop.
        try:
            self._loop.run_callback(self._tell, number)
        except MemoryError:
            self._missed = number  # the same signal wakes the waker, which calls _tell_missed

    def _tell_missed(self) -> None:
        number, self._missed = self._missed, 0
        if number:
            self._tell(number)

    def _tell(self, number: int) -> None:
        failed: Exception | None = None
        for told in self.told:
            try:
                told(number)
            except Exception as error:  # the others are called all the same
                failed = error
        if failed is not None:
            raise failed

    def restore(self) -> None:
        for number, before in self._before:
            signal.signal(number, before)
        if self._waker is not None:
            self._waker.close()

    def serves(self) -> bool:
        return False  # only its server serves

    def left_in_child(self, _own: Any) -> None:
        """Restore the signal handlers from before the block. Called in a forked child (see process/forked.py)."""
        global _handlers
        for number, handler in self._before:
            signal.signal(number, handler)
        self._before = []
        if self._waker is not None:
            self._waker.left_in_child()
            self._waker = None
        _handlers = None


_handlers: _Handlers | None = None


def in_main_thread() -> bool:
    # In a monkey-patched program threading.current_thread() returns greenlets. On Linux the main thread has the id of
    # its process, gettid(2).
    return _native_id() == os.getpid()


class Waker:
    """Wakes the event loop at a signal, so that Python runs the signal handler.

    gevent checks for signals before it runs its callbacks. A signal that arrives after that and before epoll_wait(2)
    would wait for the next event, which may never come on a server without clients. signal.set_wakeup_fd solves this.
    """

    def __init__(self, woken: Callable[[], Any]) -> None:
        self._woken = woken
        self._pipe = make_pipe()
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher = watch(get_hub().loop, self._pipe[0], 1)
        self._watcher.ref = False
        self._watcher.start(self._empty)

    def _empty(self) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except OSError:
            pass  # the watcher calls again. An error raised here would stop it for good.
        self._woken()

    def loop_is_gone(self) -> bool:
        return not self._watcher.loop.ptr

    def left_in_child(self) -> None:
        """Close the pipe. Called in a forked child, whose event loop does not know the watcher."""
        signal.set_wakeup_fd(-1)
        self._close_pipe()

    def close(self) -> None:
        now = signal.set_wakeup_fd(self._before)
        if now not in (-1, self._pipe[1]):
            signal.set_wakeup_fd(now, warn_on_full_buffer=False)  # the program set one of its own
        self._watcher.stop()
        self._watcher.close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        for fd in self._pipe:
            try:
                close_descriptor(fd)
            except OSError:
                pass  # the descriptor is closed all the same (close(2)), and a stop must not fail because of it
