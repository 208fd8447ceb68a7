"""HandlerGreenlet: a greenlet that runs one handler after another. Runner: gives it work.

On CPython 3.11 and newer, a new greenlet maps and unmaps a 16 KiB stack of Python frames. This costs 7 to 9 us;
switching into a waiting greenlet costs 0.4 us. So a greenlet whose handler has returned waits for the next connection.

No state of one connection may reach the next. Such a greenlet therefore

* runs the callbacks registered for "this greenlet has died" (gevent.local and a monkey-patched threading.local
  register there to drop their data),
* clears its contextvars context and its attributes,
* is not reused while other code still holds a reference to it: a ``gevent.Timeout`` never cancelled, a greenlet kept
  in a list to be killed later. Such a reference means the finished connection, so the greenlet ends instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from gevent.event import Event
from gevent.exceptions import HubDestroyed
from gevent.greenlet import SpawnedLink
from gevent.hub import Waiter, get_hub
from gevent.timeout import Timeout
from greenlet import GreenletExit

from gtcpserver.process.forked import end_process

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (greenlets.pxd).
    from sys import getrefcount

    from greenlet import greenlet

    from .places import Places

    switch_to = switch_with = greenlet.switch

    def has_attributes(greenlet: HandlerGreenlet) -> bool:
        return bool(greenlet.__dict__)

    if TYPE_CHECKING:
        from gtcpserver.c import import_greenlet
if cython.compiled:
    import_greenlet()

#: Seconds after which an unused greenlet ends. ultrapool's default; the next burst comes sooner or not at all.
IDLE_GREENLET_SECONDS = 5.0

#: Key in the ``spawn_tree_locals`` of greenlets that a handler spawned, directly or through other greenlets. gevent
#: passes that dictionary down, unless GEVENT_TRACK_GREENLET_TREE=0.
HANDLER_ORIGIN = "gtcpserver.handler"


class Origin:
    """One run of a handler that spawned greenlets; lives as long as any of them."""

    __slots__ = ("__weakref__",)


origins: WeakSet[Origin] = WeakSet()


# By name: type checkers do not know the slots of greenlet's class.
_SLOTS = ("_runner", "ends_process", "links", "loop", "runs", "seen", "working")


class Runner:
    """Runs functions in greenlets that it uses again: what a pool does for each connection.

    Args:
        greenlets: of the pool: those that run a function.
        dying: those of them that the pool kills.
        places: of the pool: each of ``greenlets`` takes one.

    Attributes:
        empty: an event that is set while ``greenlets`` is empty; None: nobody has asked for it.
        keep: most greenlets without work that do not end for that.
        waiting: greenlets without work, longest without first.
        retire_timer: runs while there are any.
    """

    __slots__ = ("_dying", "_greenlets", "_places", "_references", "empty", "keep", "retire_timer", "waiting")

    def __init__(self, greenlets: set[Any], dying: set[Any], places: Places) -> None:
        self._greenlets = greenlets
        self._dying = dying
        self._places = places
        self._references = 0
        self.empty: Event | None = None
        self.keep = 0
        self.waiting: list[HandlerGreenlet] = []
        self.retire_timer: Any = None

    def run_one(self, function: Callable[[Any], Any], argument: Any) -> None:
        """Run ``function(argument)`` at once in a greenlet, until it first waits. See :meth:`HandlerPool.run`."""
        waiting = self.waiting
        while waiting:
            greenlet = waiting.pop()
            if getrefcount(greenlet) <= (self._references or self._count_references()):
                break
            switch_with(greenlet, None, None)
        else:
            greenlet = HandlerGreenlet(self)
            # Run to its first wait: a greenlet keeps the arguments of its first switch as long as it lives.
            switch_to(greenlet)
        greenlets = self._greenlets
        if self.empty is not None:
            self.empty.clear()
        # Each greenlet in the set has a place. Add it only once the greenlet exists: creating it may fail for lack of
        # memory.
        greenlets.add(greenlet)
        self._places.taken += 1
        try:
            switch_with(greenlet, function, argument)
        except BaseException:
            if not greenlet.working:  # it was not switched to, or it ended
                self.lost(greenlet)
            raise

    def _count_references(self) -> int:
        """Count the references to a greenlet that only a runner holds, as :meth:`run_one` does."""
        self._references = references_of_a_waiting_one()
        return self._references

    def finished(self, greenlet: HandlerGreenlet) -> None:
        """Free the place of a greenlet that finished its function."""
        # Runs once per connection: release() and wait_for_work() are inlined.
        greenlets = self._greenlets
        greenlets.discard(greenlet)
        places = self._places
        places.taken -= 1
        if self.empty is not None and not greenlets:
            self.empty.set()
        if self._dying:
            self._dying.discard(greenlet)
        if places.links:
            places.tell()
        if greenlet.links is not None:
            if greenlet.ends_process:
                end_process()
            # In the hub, the only place where a gevent waiter may be woken; no reuse before that.
            greenlet.loop.run_callback(greenlet.notify_links)
        elif self.retire_timer is not None:
            self.waiting.append(greenlet)
        else:
            self.wait_for_work(greenlet)

    def lost(self, greenlet: HandlerGreenlet) -> None:
        """Remove a greenlet that will do nothing more: it could not be switched to, or died."""
        if greenlet in self.waiting:
            self.waiting.remove(greenlet)
        if greenlet in self._greenlets:
            self._greenlets.discard(greenlet)
            self._dying.discard(greenlet)
            self._places.taken -= 1
            if self.empty is not None and not self._greenlets:
                self.empty.set()
            self._places.tell()

    def wait_for_work(self, greenlet: HandlerGreenlet) -> None:
        """Offer a greenlet for reuse."""
        self.waiting.append(greenlet)
        if self.retire_timer is None:
            # ref=False: idle greenlets keep no program alive.
            timer = get_hub().loop.timer(IDLE_GREENLET_SECONDS, IDLE_GREENLET_SECONDS, ref=False)
            timer.start(self.retire_unused)
            self.retire_timer = timer

    def retire_unused(self) -> None:
        """End greenlets without work since the last call, which have waited for 5 to 10 s."""
        # The most recently used gets work first.
        waiting = self.waiting
        unused = 0
        most = len(waiting) - self.keep
        while unused < most and waiting[unused].seen == waiting[unused].runs:
            unused += 1
        self.retire(unused)
        for greenlet in waiting:
            greenlet.seen = greenlet.runs
        if not waiting:
            self.retire_timer.close()
            self.retire_timer = None

    def retire(self, count: int) -> None:
        """End ``count`` greenlets without work, longest without first."""
        leaving = self.waiting[:count]
        del self.waiting[:count]
        for greenlet in leaving:
            get_hub().loop.run_callback(greenlet.switch, None, None)


class HandlerGreenlet(greenlet):  # type: ignore[misc]
    """A greenlet that runs one function after another. Other code sees a ``gevent.Greenlet`` that runs one function.

    Attributes:
        links: callbacks for the end of the current function; None if there are none.
        working: whether a function is running.
        runs: number of functions run so far.
        seen: value of `runs` when the pool last looked.
        ends_process: True in a forked child: the process exits when the function ends.
    """

    __slots__ = _SLOTS

    #: gevent's waiting functions read these attributes of a finished greenlet.
    exception = value = None

    def __init__(self, runner: Runner) -> None:
        hub = get_hub()
        greenlet.__init__(self, None, hub)
        self.loop = hub.loop
        self._runner = runner
        self.links: list[Callable[[Any], Any]] | None = None
        self.working = False
        self.runs = 0
        self.seen = -1
        self.ends_process = False

    def run(self) -> None:
        hub = self.parent
        runner = self._runner
        function, argument = _wait_for_a_job(hub)
        try:
            while function is not None:
                self.working = True
                try:
                    # Not function(*arguments): CPython calls function(argument) within the same C frame, which leaves
                    # 0.5 KiB less of C stack to save and copy at each switch.
                    function(argument)
                except GreenletExit:
                    pass
                except BaseException:
                    _report(hub, self)
                function = argument = None
                self.working = False
                self.runs += 1
                if self.gr_context is not None:  # type: ignore[has-type]
                    self.gr_context = None
                if has_attributes(self):
                    self.__dict__.clear()
                runner.finished(self)
                try:
                    function, argument = _wait_for_a_job(hub)
                except BaseException:
                    # An exception meant for a finished connection (a Timeout, a kill) reached this greenlet.
                    runner.lost(self)
                    return
        except BaseException:
            # Out of memory between two functions. The greenlet's place must not be lost with it.
            self.working = False
            runner.lost(self)
            raise

    def end_process_after(self) -> None:
        """In a forked child, of the greenlet that forked: let the process exit when the function ends."""
        self.links = []  # the pool looks further where there are some; those of the parent are copies
        self.ends_process = True

    def notify_links(self) -> None:
        links, self.links = self.links or [], None
        for link in links:
            try:
                link(self)
            except BaseException:
                self.parent.handle_error((link, self), *sys.exc_info())
        if not self.dead:  # a kill meant for its last connection may have ended it
            self._runner.wait_for_work(self)

    # -- what gevent expects of a greenlet ---------------------------------------------------------------------------

    @property
    def spawn_tree_locals(self) -> dict[Any, Any]:
        """Return the dictionary shared with spawned greenlets; gevent reads it when the handler spawns one."""
        tree: dict[Any, Any] | None = self.__dict__.get("spawn_tree_locals")
        if tree is None:
            origin = Origin()
            origins.add(origin)
            tree = self.__dict__["spawn_tree_locals"] = {HANDLER_ORIGIN: origin}
        return tree

    def rawlink(self, callback: Callable[[Any], Any]) -> None:
        """Call ``callback(self)`` when the current function ends (at once if none is running)."""
        if not self.working:
            self.loop.run_callback(callback, self)
        elif self.links is None:
            self.links = [callback]
        else:
            self.links.append(callback)

    def link(self, callback: Callable[[Any], Any]) -> None:
        """Like :meth:`rawlink`, but run the callback in a new greenlet, so that it may wait."""
        self.rawlink(SpawnedLink(callback))

    def unlink(self, callback: Callable[[Any], Any]) -> None:
        if self.links is not None and callback in self.links:
            self.links.remove(callback)

    def ready(self) -> bool:
        return not self.working

    successful = ready

    def kill(self, exception: Any = GreenletExit, block: bool = True, timeout: float | None = None) -> None:
        """Raise ``exception`` in the current function, if it is still running when the hub gets to it."""
        if self.working:
            # The pending callback refers to this greenlet, which prevents its reuse.
            self.loop.run_callback(self._throw_if_it_runs, exception)
            if block:
                self.join(timeout)

    def _throw_if_it_runs(self, exception: Any) -> None:
        if self.working:
            self.throw(exception)

    def throw(self, *error: Any) -> Any:
        # gevent.Timeout keeps this bound method and may call it long after the greenlet ended.
        return None if self.dead else greenlet.throw(self, *error)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the current function ends."""
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
    """Print the current exception, if possible."""
    try:
        hub.handle_error(context, *sys.exc_info())
    except HubDestroyed:
        raise
    except BaseException:
        pass  # no memory to print with


def _wait_for_a_job(hub: Any) -> Any:
    # A separate function: greenlet makes a frame object (240 bytes) of the frame that switches, and that frame keeps it
    # until it returns. Not hub.switch(): see connection/stream.py.
    return switch_to(hub)


def references_of_a_waiting_one() -> int:
    """Count references to a greenlet without work as :meth:`Runner.run_one` does."""
    runner = Runner(set(), set(), Places(1))
    runner.retire_timer = True  # none is needed
    runner.run_one(len, ())
    waiting = runner.waiting
    greenlet = waiting.pop()
    references = getrefcount(greenlet)
    switch_with(greenlet, None, None)
    return references
