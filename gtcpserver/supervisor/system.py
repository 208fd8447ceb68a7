"""System: everything that a master asks of the operating system to run its workers.

The master, its fleet, its monitor, reloads and upgrades get a System when they are made, and use the clock, processes,
signals, channels and listening sockets only through it. `RealSystem` is Linux; tests pass a simulated one
(tests/kit/simulated.py), with a virtual clock and processes that die when the test says so.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import Any, Protocol

from gevent import monkey

from gtcpserver.linux import make_pipe
from gtcpserver.listening.listener import ListenConfig
from gtcpserver.monitoring.history import make_history
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.shared.memory import SharedMemory, make_memory

from . import channel, spawn, surroundings
from .channel import Channel
from .monitor_job import MonitorJob
from .sockets import ListeningSockets
from .worker import Job, run_worker

# The original functions, also in a monkey-patched program: the master has no event loop to wait in.
_poll: Callable[[], Any] = monkey.get_original("select", "poll")
_signal: Callable[..., Any] = monkey.get_original("signal", "signal")
_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")
_waitpid: Callable[[int, int], tuple[int, int]] = monkey.get_original("os", "waitpid")


class Signals(Protocol):
    """Caught signals, in order of arrival."""

    def fileno(self) -> int:
        """Return a descriptor that is readable after a signal."""

    def empty(self) -> None:
        """Make the descriptor unreadable again. Raises OSError: it is still readable."""

    def next(self) -> int | None:
        """Return the number of the oldest signal not returned yet; None if there is none."""

    def close(self) -> None:
        """Restore the earlier signal handlers."""

    def close_in_child(self) -> None:
        """Close the copies of the descriptors; keep the handlers."""


class System(Protocol):
    """The operating system as a master needs it."""

    # -- clock -------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        """Return the seconds of a clock that is never set."""

    def sleep(self, seconds: float) -> None:
        """Wait, without handling any event."""

    # -- processes and signals ---------------------------------------------------------------------------------------

    def pid(self) -> int:
        """Return the id of this process."""

    def start_worker(self, job: Job, close: Callable[[], None]) -> int:
        """Fork a worker and return its process id.

        Args:
            job: what the worker gets from the master.
            close: called first in the child.

        Raises:
            OSError: the limit of processes is reached, or memory ran out.
        """

    def start_monitor(self, job: MonitorJob, close: Callable[[], None]) -> int:
        """Fork a monitor and return its process id.

        Args:
            job: what the monitor gets from the master.
            close: called first in the child.

        Raises:
            OSError: the limit of processes is reached, or memory ran out.
        """

    def start_master(self, environment: Callable[[], Mapping[str, str]], fds: Iterable[int]) -> int:
        """Start the next master, a child with this process's own command line, and return its process id.

        Args:
            environment: called in the child, so that it can contain the child's process id.
            fds: descriptors to inherit, under the same numbers.

        Raises:
            OSError: the limit of processes is reached, or memory ran out.
        """

    def has_terminal(self) -> bool:
        """Return whether this process has a controlling terminal."""

    def who_ends_with_us(self) -> str:
        """Return why this process must not hand over to another: "" or a sentence."""

    def kill(self, pid: int, number: int) -> None:
        """Send a signal, kill(2). Raises OSError."""

    def wait(self, pid: int) -> tuple[int, int]:
        """Return (pid, status) of a child that has ended, or (0, 0); waitpid(2) with WNOHANG.

        Raises:
            ChildProcessError: there is no such child.
        """

    def catch_signals(self, numbers: Iterable[int]) -> Signals:
        """Catch signals from now on, also those that were blocked. Raises OSError: descriptors ran out."""

    # -- descriptors -------------------------------------------------------------------------------------------------

    def make_pair(self, kinds_here: frozenset[str], kinds_there: frozenset[str]) -> tuple[Channel, Channel]:
        """Return both ends of a new channel, the master's first (`channel.make_pair`). Raises OSError."""

    def make_line(self) -> tuple[socket.socket, socket.socket]:
        """Return two connected stream sockets, the master's first (`channel.make_line`). Raises OSError."""

    def listening_sockets(self, config: ListenConfig) -> ListeningSockets:
        """Return a `ListeningSockets` without sockets."""

    def shared_memory(self, workers: int, fd: int | None) -> SharedMemory | None:
        """Return the memory of the counts that all workers share; None: this system has none.

        Args:
            workers: number of workers to expect.
            fd: the memory of the last master, as it handed it over. One that cannot be used is closed.

        Raises:
            OSError: descriptors or memory ran out.
        """

    def history_memory(self, fd: int | None) -> int | None:
        """Return the descriptor of the memory of what monitors have seen; None: this system has none.

        Args:
            fd: that of the last master. One that cannot be used is closed.

        Raises:
            OSError: descriptors ran out.
        """

    def poll(self, watched: Mapping[int, int], seconds: float) -> Iterable[tuple[int, int]]:
        """Wait until descriptors are ready, and return these with their events; poll(2).

        Args:
            watched: descriptors, each with the events to wait for.
            seconds: most seconds to wait.

        Raises:
            OSError: ENOMEM, or EINVAL: more descriptors than RLIMIT_NOFILE allows now.
        """


class RealSystem:
    """The system that this process runs on."""

    def monotonic(self) -> float:
        return monotonic()

    def sleep(self, seconds: float) -> None:
        _sleep(seconds)

    def pid(self) -> int:
        return os.getpid()

    def start_worker(self, job: Job, close: Callable[[], None]) -> int:
        return spawn.fork_worker(lambda: run_worker(job), close, f"worker {job.number}", job.program)

    def start_monitor(self, job: MonitorJob, close: Callable[[], None]) -> int:
        def begin() -> int:
            # Imported only in the child: the master stays small.
            process = importlib.import_module("gtcpserver.supervisor.monitor_process")
            status: int = process.run_monitor(job)
            return status

        return spawn.fork_worker(begin, close, "monitor", job.program)

    def start_master(self, environment: Callable[[], Mapping[str, str]], fds: Iterable[int]) -> int:
        return spawn.fork_and_exec([sys.executable, *sys.orig_argv[1:]], environment, fds)

    def has_terminal(self) -> bool:
        return surroundings.has_terminal()

    def who_ends_with_us(self) -> str:
        return surroundings.who_ends_with_us()

    def kill(self, pid: int, number: int) -> None:
        os.kill(pid, number)

    def wait(self, pid: int) -> tuple[int, int]:
        return _waitpid(pid, os.WNOHANG)

    def catch_signals(self, numbers: Iterable[int]) -> Signals:
        return SignalPipe(numbers)

    def make_pair(self, kinds_here: frozenset[str], kinds_there: frozenset[str]) -> tuple[Channel, Channel]:
        return channel.make_pair(kinds_here, kinds_there)

    def make_line(self) -> tuple[socket.socket, socket.socket]:
        return channel.make_line()

    def listening_sockets(self, config: ListenConfig) -> ListeningSockets:
        return ListeningSockets(config)

    def shared_memory(self, workers: int, fd: int | None) -> SharedMemory | None:
        return make_memory(workers, fd)

    def history_memory(self, fd: int | None) -> int | None:
        return make_history(fd)

    def poll(self, watched: Mapping[int, int], seconds: float) -> Iterable[tuple[int, int]]:
        poll = _poll()
        for fd, events in watched.items():
            poll.register(fd, events)
        ready: list[tuple[int, int]] = poll.poll(1000 * seconds)
        return ready


class SignalPipe:
    """Signals caught by Python's handlers, which record the number, and a pipe that wakes poll(2)."""

    def __init__(self, numbers: Iterable[int]) -> None:
        numbers = tuple(numbers)
        self._caught: deque[int] = deque()
        self._pipe = make_pipe()
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._before = [(number, _signal(number, self._note)) for number in numbers]
        # The program that started us may have blocked them, and the mask is inherited (signal(7)).
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _note(self, number: int, _frame: Any) -> None:
        # Not the numbers that set_wakeup_fd writes: they are lost while the pipe is full.
        self._caught.append(number)

    def fileno(self) -> int:
        return self._pipe[0]

    def empty(self) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except BlockingIOError:
            pass

    def next(self) -> int | None:
        return self._caught.popleft() if self._caught else None

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before:
            _signal(number, handler)
        self.close_in_child()

    def close_in_child(self) -> None:
        pipe, self._pipe = self._pipe, (-1, -1)
        for fd in pipe:
            if fd >= 0:
                close_descriptor(fd)


REAL_SYSTEM = RealSystem()
