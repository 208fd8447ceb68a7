"""SIGTERM in a program that leaves it at its default: finish the work under way, then die of the signal as usual."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gevent
from gevent.hub import get_hub

from gtcpserver.server.signals import Waker, in_main_thread


class DieGracefully:
    """Handles SIGTERM while a :meth:`caught` block is open in the main thread.

    The first SIGTERM calls ``finish`` in a greenlet and then ends the process by the same signal, so that its exit
    status is that of a program that does not catch it. A second SIGTERM ends the process at once.

    A program keeps its own handler, whether set by ``signal.signal``, ``gevent.signal_handler`` (unknown to Python) or
    C code. A forked child dies at once as usual: ``multiprocessing`` ends its processes by SIGTERM, and they need not
    run an event loop. Linux only, where /proc lists the caught signals.

    Args:
        finish: called in a greenlet; may wait.
    """

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish = finish
        self._blocks = 0
        self._loop: Any = None
        self._waker: Waker | None = None
        self._told = False
        self._dying: Any = None
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._forked)

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch SIGTERM within the block. After a signal, the block does not end before the process does."""
        if not in_main_thread():
            yield
            return
        self._begin()
        try:
            yield
            if self._dying is not None:
                self._dying.join()
        finally:
            self._end()

    def _begin(self) -> None:
        self._blocks += 1
        if self._waker is None and _has_no_wakeup_fd():
            # Also helps the program's own handlers: gevent may not notice a signal before the next event.
            with suppress(OSError):  # out of descriptors: the signal may be late, as without it
                self._waker = Waker(self._woken)
        if self._loop is None and _is_default(signal.SIGTERM):
            self._loop = get_hub().loop
            signal.signal(signal.SIGTERM, self._on_signal)

    def _end(self) -> None:
        self._blocks -= 1
        if self._blocks <= 0 and self._dying is None:
            self._leave_off()

    def _leave_off(self) -> None:
        self._blocks = 0
        self._loop = None
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._waker is not None:
            self._waker.close()
            self._waker = None

    def _on_signal(self, number: int, _frame: Any) -> None:
        # A signal handler runs between any two bytecodes: only note it and let the loop act. A second signal must not
        # wait for a blocked loop.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._told = True
        with suppress(MemoryError):  # then the waker, woken by the same signal, does it
            self._loop.run_callback(self._woken)

    def _woken(self) -> None:
        if self._told and self._dying is None:
            try:
                self._dying = gevent.spawn(self._die)
            except MemoryError:
                self._end_process(os.getpid())

    def _die(self) -> None:
        process = os.getpid()
        try:
            self._finish()
        finally:
            self._end_process(process)

    def _end_process(self, process: int) -> None:
        if os.getpid() == process:  # not in a child forked meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            # The first process of a container does not die of an uncaught signal, pid_namespaces(7).
            os._exit(128 + signal.SIGTERM)

    def _block(self) -> None:
        # Python forgets a signal that reaches the child before `_forked` runs.
        if self._loop is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _unblock(self) -> None:
        if self._loop is not None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _forked(self) -> None:
        caught = self._loop is not None
        self._dying = None
        self._told = False
        if self._waker is not None and self._waker.loop_is_gone():
            self._waker.left_in_child()
            self._waker = None
        self._leave_off()
        if caught:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _is_default(number: int) -> bool:
    """Return whether this process neither catches, ignores nor blocks (for sigwait) the signal."""
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    try:
        with open("/proc/self/status", "rb") as file:  # proc_pid_status(5)
            names = (b"SigBlk:", b"SigIgn:", b"SigCgt:")
            masks = [int(line.split()[1], 16) for line in file if line.startswith(names)]
    except OSError:
        return False
    return len(masks) == 3 and not any(mask >> (number - 1) & 1 for mask in masks)


def _has_no_wakeup_fd() -> bool:
    descriptor = signal.set_wakeup_fd(-1)
    if descriptor != -1:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    return descriptor == -1
