"""Tasks: greenlets that run beside a server's handlers and end with the server (`Server.spawn`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from greenlet import GreenletExit, getcurrent

from gtcpserver.callables import name_of
from gtcpserver.errors import GtcpServerError
from gtcpserver.process.forked import keep

log = logging.getLogger("gtcpserver")

#: Seconds that tasks get at least for their ``finally`` blocks, even if the stop's time is used up.
END_SECONDS = 1.0

#: Seconds that a task gets when it is ended for the second time: it has swallowed GreenletExit, or takes too long.
AGAIN_SECONDS = 0.25

#: Seconds between two looks whether tasks have ended, should an event be lost.
LOOK_SECONDS = 1.0


class Tasks:
    """The tasks of one server."""

    def __init__(self) -> None:
        self._running: dict[Any, str] = {}  # greenlets and the names of their functions
        self._ended = False

    def spawn(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Start a task; see :meth:`Server.spawn`."""
        if self._ended:
            raise GtcpServerError("a server that has stopped spawns no tasks")
        if not callable(function):
            raise GtcpServerError(f"spawn needs a function, got {function!r}")
        task = gevent.Greenlet(self._run, function, *arguments, **named)
        self._running[task] = name_of(function)
        task.rawlink(self._has_ended)  # also if it is ended before it has begun
        task.start()
        return task

    def _run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        process = os.getpid()
        try:
            return function(*arguments, **named)
        except GreenletExit:
            return None
        except BaseException:  # gevent would raise SystemExit in the main greenlet
            if os.getpid() != process:
                raise  # in a forked child, which ends by it
            log.exception("task %s failed", name_of(function))
            return None

    def _has_ended(self, task: gevent.Greenlet) -> None:
        self._running.pop(task, None)

    def end(self, until: float | None, hurry: Event, *, for_good: bool = True) -> None:
        """End all tasks by GreenletExit, once, so that it does not interrupt their ``finally`` blocks; wait for them.

        Args:
            until: monotonic time at which the wait ends, at least `END_SECONDS` from now; None waits forever.
            hurry: event that ends the wait, after `END_SECONDS`.
            for_good: spawn no more.
        """
        self._ended = for_good
        tasks = [task for task in self._running if task is not getcurrent()]
        gevent.killall(tasks, block=False)
        at_least = monotonic() + END_SECONDS
        while tasks:
            hurried = hurry.is_set()
            end = at_least if hurried else max(at_least, inf if until is None else until)
            left = min(LOOK_SECONDS, end - monotonic())
            if left <= 0:
                break
            gevent.wait(tasks if hurried else [*tasks, hurry], timeout=left, count=1)
            tasks = [task for task in tasks if not task.ready()]
        if tasks:
            names = ", ".join(sorted(self._running.get(task, "") for task in tasks))
            log.error("tasks did not end within the time of the stop and were cut: %s", names)
            gevent.killall(tasks, timeout=AGAIN_SECONDS)

    def left_in_child(self) -> None:
        """Let go of the tasks, which do not go on in a forked child."""
        keep(*self._running)
        self._running.clear()
