"""StopSignals: SIGTERM and SIGINT as calls in the event loop, from before a server listens until it has stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gevent.hub import get_hub

from .descriptors import close_descriptor
from .watcher import watch


class StopSignals:
    """Within a ``with`` block, in the main thread: calls ``told(number)`` in the hub for each SIGTERM and SIGINT.

    In another thread it does nothing: Python lets only the main thread have signal handlers.
    """

    def __init__(self, told: Callable[[int], Any]) -> None:
        self._told = told
        self._restore: list[tuple[int, Any]] = []
        self._waker: Waker | None = None
        self._missed = 0

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        loop = get_hub().loop

        def on_signal(number: int, _frame: Any) -> None:
            # A signal handler runs between any two bytecodes: only note it and let the loop act.
            try:
                loop.run_callback(self._told, number)
            except MemoryError:
                self._missed = number  # the waker, which the same signal wakes, tells it

        self._waker = Waker(self._tell_missed)
        self._restore = [(number, signal.signal(number, on_signal)) for number in (signal.SIGTERM, signal.SIGINT)]

    def _tell_missed(self) -> None:
        number, self._missed = self._missed, 0
        if number:
            self._told(number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, before in self._restore:
            signal.signal(number, before)
        if self._waker is not None:
            self._waker.close()


class Waker:
    """Wakes the event loop at a signal, so that Python runs its handler.

    gevent looks for signals before it runs its callbacks. One that comes after that and before epoll_wait(2) would be
    noticed at the next event, which on an idle server may never come (signal.set_wakeup_fd is made for this).
    """

    def __init__(self, woken: Callable[[], Any]) -> None:
        self._woken = woken
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher = watch(get_hub().loop, self._pipe[0], 1)
        self._watcher.ref = False
        self._watcher.start(self._empty)

    def _empty(self) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except OSError:
            pass  # it is tried again. An error raised here would end the watch.
        self._woken()

    def close(self) -> None:
        now = signal.set_wakeup_fd(self._before)
        if now not in (-1, self._pipe[1]):
            signal.set_wakeup_fd(now, warn_on_full_buffer=False)  # the program has set one of its own
        self._watcher.stop()
        self._watcher.close()
        for fd in self._pipe:
            try:
                close_descriptor(fd)
            except OSError:
                pass  # it is closed all the same (close(2)), and a stop does not fail by it
