"""Report descriptors that the event loop failed to watch, instead of staying silent.

When epoll_ctl(2) fails (ENOMEM, or ENOSPC: fs.epoll.max_user_watches), libev stops every watcher of that descriptor and
signals each with one event (fd_kill in its ev.c, EV_ERROR | EV_READ | EV_WRITE). To the callback it looks like any
other event: nothing to read, so it waits on, and gevent then forgets the stopped watcher (gevent_stop in its
callbacks.c): the waiting greenlet would wait forever. gevent calls the watcher's ``stop`` for that, which is where it
is noticed: the descriptor is watched once more, and the second time the waiting greenlet gets an error. (The event
comes in the loop's next turn, for which a server has a timer.)
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import gevent
from gevent.hub import Hub

_HUB_RUN = Hub.run.__code__
_get_frame = sys._getframe  # noqa: SLF001 - Python's name for it

_loop: Any = None
_io: Any = object

if gevent.config.loop.__module__ == "gevent.libev.corecext":
    from gevent.libev import corecext

    _loop, _io = corecext.loop, corecext.io


# By name, since type checkers would otherwise not know the attributes of gevent's class.
_SLOTS = ("_was_lost",)


class _Watcher(_io):  # type: ignore[misc]
    __slots__ = _SLOTS

    _was_lost: bool
    events: Any

    def is_lost_again(self) -> bool:
        """Note that libev has stopped it; return whether it had done so before."""
        # libev believes that it has registered the descriptor. Setting the events again makes the next start try again
        # (EV__IOFDSET in its ev.c).
        self.events = self.events & 3
        try:
            return self._was_lost
        except AttributeError:
            self._was_lost = True
            return False

    def stop(self) -> None:
        callback, arguments = self.callback, self.args
        # Called by the loop itself, not because the callback has failed (then the watcher would be active).
        lost = callback is not None and not self.active and _get_frame(1).f_code is _HUB_RUN
        stop_watcher(self)
        if not lost:
            return
        if not self.is_lost_again():
            self.start(callback, *arguments)
            return
        throw = getattr(getattr(callback, "__self__", None), "throw", None)
        if throw is not None:
            throw(cannot_watch())


def watch(loop: Any, fd: int, events: int) -> Any:
    """Return a watcher like that of ``loop.io``; its callback is a greenlet's ``switch``, or a method of an object with
    a ``throw``.

    Raises:
        OSError: EIO: it cannot be watched; EBADF: the descriptor is closed.
    """
    try:
        # A loop of another class has its own watchers, which are used as they are.
        return _Watcher(loop, fd, events) if type(loop) is _loop else loop.io(fd, events)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        # gevent asks fcntl(2) whether the descriptor is open. The answer of a seccomp(2) filter, even EAGAIN, says
        # nothing about the peer.
        raise cannot_watch(f"fcntl(2): {error.strerror}") from error


def _stop(watcher: Any) -> None:
    watcher.stop()


#: Stop a watcher in any state: for our own code. gevent's ``close`` does nothing else.
stop_watcher: Callable[[Any], None] = _stop if _loop is None else _io.stop


def check_watched(watcher: Any) -> None:
    """Raise OSError if an event reported, for the second time, that the descriptor is not being watched."""
    if not watcher.active and isinstance(watcher, _Watcher) and watcher.is_lost_again():
        raise cannot_watch()


def cannot_watch(why: str = "epoll_ctl(2) failed") -> OSError:
    return OSError(errno.EIO, f"the event loop cannot watch this descriptor: {why}")
