"""PlainPoller: how greenlets wait for input on systems without epoll(7), such as macOS.

Each descriptor has a watcher of the event loop's own kind (kqueue), which is started for each wait and stops at its
first event. It costs about what gevent's sockets cost.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gtcpserver.process.watcher import stop_watcher, watch

from .poller import FREE, Poller

_READ = 1

#: As an event of epoll(7): EPOLLIN.
_INPUT = 0x1


class PlainPoller(Poller):
    """A poller without epoll(7). Args as Poller."""

    __slots__ = ()

    def _open(self) -> None:
        self._epoll = Watchers(self.hub, self.run)
        self._poll = self._epoll.poll

    def start_watcher(self) -> None:
        # It gets no events: as long as it is started, the loop has something to wait for.
        self._watcher = self.hub.loop.async_()
        self._watcher.ref = self._watched > 0
        self._watcher.start(self.run)

    def wait(self, fd: int) -> bool:
        if self._states[fd] is FREE:
            self._epoll.start(fd)
        return super().wait(fd)

    def forget(self, fd: int) -> None:
        self._epoll.drop(fd)
        super().forget(fd)

    def leave_parent(self) -> None:
        # The loop's watchers go on in a child that goes on with the loop.
        self._at = self._count = 0


class Watchers:
    """What select.epoll is for a poller.

    Args:
        tell: called in the hub when an event has come.
    """

    def __init__(self, hub: Any, tell: Callable[[], None]) -> None:
        self._loop = hub.loop
        self._tell = tell
        self._came: list[tuple[int, int]] = []
        #: Of each descriptor its watcher, and which socket it was.
        self._watched: dict[int, tuple[Any, tuple[int, int]]] = {}

    def register(self, fd: int, _events: int) -> None:
        if self._is_known(fd):
            raise FileExistsError
        self.drop(fd)
        found = os.fstat(fd)
        self._watched[fd] = watch(self._loop, fd, _READ), (found.st_dev, found.st_ino)
        self.start(fd)

    def modify(self, fd: int, _events: int) -> None:
        if not self._is_known(fd):
            raise FileNotFoundError
        self.start(fd)

    def unregister(self, fd: int) -> None:
        self.drop(fd)

    def poll(self, _seconds: float, most: int) -> list[tuple[int, int]]:
        came, self._came = self._came[:most], self._came[most:]
        return came

    def start(self, fd: int) -> None:
        """Have the next input, or what is there already, be an event."""
        kept = self._watched.get(fd)
        if kept is not None and not kept[0].active:
            kept[0].start(self._ready, fd)

    def drop(self, fd: int) -> None:
        """Stop to watch a descriptor, if it is watched."""
        kept = self._watched.pop(fd, None)
        if kept is not None:
            stop_watcher(kept[0])
            kept[0].close()

    def _ready(self, fd: int) -> None:
        kept = self._watched.get(fd)
        if kept is None:
            return
        stop_watcher(kept[0])
        self._came.append((fd, _INPUT))
        self._tell()

    def _is_known(self, fd: int) -> bool:
        """Return whether the descriptor is still that of the socket that is watched, as the kernel would know."""
        if fd not in self._watched:
            return False
        try:
            found = os.fstat(fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._watched[fd][1]
