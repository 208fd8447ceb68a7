"""Start processes: a worker by fork, the next master by fork and exec.

A worker is a fork of a master that has never imported the user's program (unless told to preload it), so each worker
reads the code that is on disk at that moment. The fork costs 2 ms; a fresh interpreter would import gevent and this
library again. The master has no event loop of gevent's: a fork would share its epoll(7).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import gevent
from gevent import monkey

from gtcpserver.process.forked import own_fork
from gtcpserver.process.title import set_title

log = logging.getLogger("gtcpserver")

_fork: Callable[[], int] = monkey.get_original("os", "fork")
_signal = monkey.get_original("signal", "signal")

MASTER_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)

IGNORED_BY_WORKERS = (
    signal.SIGINT,  # a terminal sends it to every process; the master decides what it means
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


def fork_worker(begin: Callable[[], int], close: Callable[[], None], role: str, program: str = "") -> int:
    """Fork a worker process.

    Args:
        begin: runs the worker and returns its exit status. It is called with all signals blocked, and unblocks them
            when it is ready for them.
        close: called first in the child; closes the master's own descriptors.
        role: what the child does, for its title (process/title.py), such as "worker 0".
        program: what it runs, for its title.

    Returns:
        The child's process id.

    Raises:
        OSError: the limit of processes is reached, or memory ran out.
    """
    return _in_child(lambda: _be_worker(begin, close, role, program))


def fork_and_exec(arguments: list[str], environment: Callable[[], Mapping[str, str]], fds: Iterable[int]) -> int:
    """Start another program that inherits descriptors.

    Args:
        arguments: the command line.
        environment: called in the child, so that it can contain the child's process id.
        fds: descriptors to inherit, under the same numbers.
    """

    def execute() -> NoReturn:
        for number in MASTER_SIGNALS:
            _signal(number, signal.SIG_DFL)
        for fd in fds:
            os.set_inheritable(fd, True)
        # The mask is inherited too.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(arguments[0], arguments, dict(environment()))

    return _in_child(execute)


def _in_child(what: Callable[[], int]) -> int:
    # Until the child has its own handlers, a signal would be written into the pipe it shares with its parent.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with own_fork():
            pid = _fork()
        if pid:
            return pid
        status = 3
        try:
            signal.set_wakeup_fd(-1)
            status = what()
        except BaseException:
            log.exception("a new process failed")
        finally:
            # Nothing of the master's stack may run here: no `finally`, no handler at exit.
            os._exit(status)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_worker(begin: Callable[[], int], close: Callable[[], None], role: str, program: str) -> int:
    atexit._clear()  # noqa: SLF001 (there is no public way)
    _forget_processes()
    for number in MASTER_SIGNALS:
        if number in IGNORED_BY_WORKERS:
            _ignore(number)
        else:
            _signal(number, signal.SIG_DFL)
    close()
    # A preloaded program, or one that called `run`, may have made an event loop.
    gevent.reinit()
    set_title(role, program)
    status = begin()
    # The exit functions that the program registered in this process.
    atexit._run_exitfuncs()  # noqa: SLF001 (os._exit does not call them)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass
    return status


def _forget_processes() -> None:
    """Make multiprocessing, if loaded already, manage this process's children only.

    It would take the master's children for ours. Its exit function, which ends daemons, was dropped with the others.
    """
    process, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
    if process is not None:
        process._children.clear()  # noqa: SLF001 (it has no other way to forget them)
    if util is not None:
        atexit.register(util._exit_function)  # noqa: SLF001 (as its import does)


def _ignore(number: int) -> None:
    # Not SIG_IGN, which execve(2) keeps (signal(7)): programs started by a handler would ignore the signal too.
    _signal(number, _do_nothing)
    signal.siginterrupt(number, False)  # as with SIG_IGN, no system call of a C library fails with EINTR


def _do_nothing(_number: int, _frame: Any) -> None:
    pass
