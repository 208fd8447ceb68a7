"""HandlerGreenlet: a greenlet that runs one handler after another.

On CPython 3.11 and newer a new greenlet maps and unmaps a 16 KiB stack of Python frames: 7 to 9 us, against 0.4 us for
switching into one that waits. So a greenlet whose handler has returned waits for the next connection.

Nothing of one connection may reach the next. Such a greenlet therefore

* runs the callbacks that were registered for "this greenlet has died" (gevent.local and a monkey-patched
  threading.local register there to drop their data),
* forgets its contextvars context and its attributes,
* is not used again while anybody else still holds a reference to it: a ``gevent.Timeout`` never cancelled, a greenlet
  kept in a list to be killed later. Such a reference means the finished connection, so the greenlet ends instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from gevent.exceptions import HubDestroyed
from gevent.greenlet import SpawnedLink
from gevent.hub import Waiter, get_hub
from gevent.timeout import Timeout
from greenlet import GreenletExit, greenlet

from gtcpserver.process.forked import end_process

if TYPE_CHECKING:
    from .pool import HandlerPool

#: A key in the ``spawn_tree_locals`` of greenlets that a handler has spawned, and of those that these spawn, and so on.
#: gevent hands that dictionary down, unless it is told not to (GEVENT_TRACK_GREENLET_TREE=0).
HANDLER_ORIGIN = "gtcpserver.handler"

_switch_to = greenlet.switch


class Origin:
    """Stands for one run of a handler that has spawned greenlets, while any of them exists."""

    __slots__ = ("__weakref__",)


origins: WeakSet[Origin] = WeakSet()


# By name, since type checkers would otherwise not know those of greenlet's class.
_SLOTS = ("_pool", "ends_process", "links", "loop", "runs", "seen", "working")


class HandlerGreenlet(greenlet):  # type: ignore[misc]
    """A greenlet that runs one function after another. To others it looks like a ``gevent.Greenlet`` that runs one.

    Attributes:
        links: called when the function that runs now has ended; None: nobody waits for it.
        working: a function runs.
        runs: functions run so far.
        seen: how many it were when the pool last looked.
        ends_process: it has forked, and this is the child: the process ends with the function.
    """

    __slots__ = _SLOTS

    #: gevent's waiting functions read these of a finished greenlet.
    exception = value = None

    gr_context: Any

    def __init__(self, pool: HandlerPool) -> None:
        hub = get_hub()
        super().__init__(None, hub)
        self.loop = hub.loop
        self._pool = pool
        self.links: list[Callable[[Any], Any]] | None = None
        self.working = False
        self.runs = 0
        self.seen = -1
        self.ends_process = False

    def run(self) -> None:
        hub = self.parent
        pool = self._pool
        function, argument = _wait_for_a_job(hub)
        try:
            while function is not None:
                self.working = True
                try:
                    # Not function(*arguments): CPython calls this one within the same C frame, 0.5 KiB less of C stack
                    # to put aside and to copy at each switch.
                    function(argument)
                except GreenletExit:
                    pass
                except BaseException:
                    _report(hub, self)
                function = argument = None
                self.working = False
                self.runs += 1
                if self.gr_context is not None:
                    self.gr_context = None
                attributes = self.__dict__
                if attributes:
                    attributes.clear()
                if self.ends_process:
                    end_process()
                pool.finished(self)
                try:
                    function, argument = _wait_for_a_job(hub)
                except BaseException:
                    # Something that outlived its connection (a Timeout, a kill) was meant for this greenlet.
                    pool.lost(self)
                    return
        except BaseException:
            # No memory, between one function and the next. Its place must not be lost with it.
            self.working = False
            pool.lost(self)
            raise

    def notify_links(self) -> None:
        links, self.links = self.links or [], None
        for link in links:
            try:
                link(self)
            except BaseException:
                self.parent.handle_error((link, self), *sys.exc_info())
        if not self.dead:  # killed meanwhile by somebody who meant its last connection
            self._pool.wait_for_work(self)

    # -- what gevent expects of a greenlet ---------------------------------------------------------------------------

    @property
    def spawn_tree_locals(self) -> dict[Any, Any]:
        """What greenlets share with those they spawn; asked for when the handler spawns one."""
        tree: dict[Any, Any] | None = self.__dict__.get("spawn_tree_locals")
        if tree is None:
            origin = Origin()
            origins.add(origin)
            tree = self.__dict__["spawn_tree_locals"] = {HANDLER_ORIGIN: origin}
        return tree

    def rawlink(self, callback: Callable[[Any], Any]) -> None:
        """Call ``callback(self)`` when the function that runs now has ended (at once if none runs)."""
        if not self.working:
            self.loop.run_callback(callback, self)
        elif self.links is None:
            self.links = [callback]
        else:
            self.links.append(callback)

    def link(self, callback: Callable[[Any], Any]) -> None:
        """As :meth:`rawlink`, in a greenlet of its own: the callback may wait."""
        self.rawlink(SpawnedLink(callback))

    def unlink(self, callback: Callable[[Any], Any]) -> None:
        if self.links is not None and callback in self.links:
            self.links.remove(callback)

    def ready(self) -> bool:
        return not self.working

    successful = ready

    def kill(self, exception: Any = GreenletExit, block: bool = True, timeout: float | None = None) -> None:
        """Raise ``exception`` in the function that runs now, if it still runs when the hub comes to it."""
        if self.working:
            # Until then the callback refers to this greenlet, so that it is not used again.
            self.loop.run_callback(self._throw_if_it_runs, exception)
            if block:
                self.join(timeout)

    def _throw_if_it_runs(self, exception: Any) -> None:
        if self.working:
            self.throw(exception)

    def throw(self, *error: Any) -> Any:
        # gevent.Timeout keeps this bound method and may call it when the greenlet has long ended.
        return None if self.dead else greenlet.throw(self, *error)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the function that runs now has ended."""
        if not self.working:
            return
        waiter = Waiter()
        self.rawlink(waiter.switch)
        try:
            with Timeout._start_new_or_dummy(timeout) as timer:  # noqa: SLF001 - as gevent's own join()
                waiter.get()
        except Timeout as expired:
            if expired is not timer:
                raise
        finally:
            self.unlink(waiter.switch)


def _report(hub: Any, context: HandlerGreenlet) -> None:
    """Print what a function has raised, if that can be done."""
    try:
        hub.handle_error(context, *sys.exc_info())
    except HubDestroyed:
        raise
    except BaseException:
        pass  # no memory to print with


def _wait_for_a_job(hub: Any) -> Any:
    # A function of its own: greenlet makes a frame object (240 bytes) of the frame that switches, and that frame keeps
    # it until it returns. Not hub.switch(): see stream.py.
    return _switch_to(hub)
