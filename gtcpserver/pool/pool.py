"""HandlerPool: the greenlets that run handlers, limited in number, resizable, and used again.

On CPython 3.11 and newer a new greenlet maps and unmaps a 16 KiB stack of Python frames: 7 to 9 us, against 0.4 us for
switching into one that waits. So a worker that has finished a connection waits for the next one.

Nothing of one connection may reach the next. A worker therefore

* runs the callbacks that were registered for "this greenlet has died" (gevent.local and a monkey-patched
  threading.local register there to drop their data),
* forgets its contextvars context and its attributes,
* is not used again while anybody else still holds a reference to it: a ``gevent.Timeout`` never cancelled, a greenlet
  kept in a list to be killed later. Such a reference means the finished connection, so the worker ends instead.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from gevent import pool as gevent_pool
from gevent.exceptions import HubDestroyed
from gevent.greenlet import SpawnedLink
from gevent.hub import Waiter, get_hub
from gevent.timeout import Timeout
from greenlet import GreenletExit, getcurrent, greenlet

from gtcpserver.process.forked import end_process, keep

#: Workers in no use for so long end, seconds. ultrapool's default; a burst comes back sooner or not at all.
IDLE_WORKER_SECONDS = 5.0

#: The default number of handlers at once: ten thousand blocked handlers take about 100 MiB with their sockets, and
#: most systems allow more descriptors than that once asked. Above it the kernel's queue holds new connections.
DEFAULT_SIZE = 10_000

#: A key in the ``spawn_tree_locals`` of greenlets that a handler has spawned, and of those that these spawn, and so on.
#: gevent hands that dictionary down, unless it is told not to (GEVENT_TRACK_GREENLET_TREE=0).
HANDLER_ORIGIN = "gtcpserver.handler"

_NO_LIMIT = sys.maxsize

_switch_to = greenlet.switch


class HandlerPool(gevent_pool.Pool):  # type: ignore[misc]
    """A ``gevent.pool.Pool`` that can change its size and uses its greenlets again.

    The whole of gevent's API works (``spawn`` makes a new ``gevent.Greenlet`` that counts here like a handler);
    servers use :meth:`run`.

    Args:
        size: how many handlers may run at once; None for no limit.

    Raises:
        ValueError: size is negative or not a whole number.
    """

    def __init__(self, size: int | None = DEFAULT_SIZE) -> None:
        check_size(size)
        super().__init__(None)
        self.size = size
        self._semaphore = self.places = Places(size)
        self._waiting_workers: list[Worker] = []
        self._retire_timer: Any = None

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Run ``function(*args)`` at once in a worker, until it first waits. Only from the hub (an event's callback).

        The caller has seen that there is a place (``full()`` is false). What the function raises is reported through
        gevent's hub; a server's function lets nothing out.

        Raises:
            MemoryError: the function was not begun, and no place is taken.
        """
        if len(args) == 1:
            self.run_one(function, args[0])
        else:
            self.run_one(_call, (function, args))

    def run_one(self, function: Callable[[Any], Any], argument: Any) -> None:
        """:meth:`run` with one argument, which is what a server does with each connection."""
        waiting = self._waiting_workers
        while waiting:
            worker = waiting.pop()
            if sys.getrefcount(worker) <= (self._references or self._count_references()):
                break
            worker.switch(None, None)
        else:
            worker = Worker(self)
            # To its first wait: what a greenlet is started with, it keeps as long as it lives.
            worker.switch()
        greenlets = self.greenlets
        if not greenlets:
            self._empty_event.clear()
        # Who is among the greenlets has a place. Neither is taken before there is a worker: it may be refused memory.
        greenlets.add(worker)
        self.places.taken += 1
        try:
            worker.switch(function, argument)
        except BaseException:
            if not worker._working:  # it was not switched to, or it has ended
                self._lost(worker)
            raise

    #: References to a worker that only the pool knows, as counted in :meth:`run`; 0: not counted yet.
    _references = 0

    @classmethod
    def _count_references(cls) -> int:
        HandlerPool._references = sys.maxsize  # the pool that counts must not count again
        try:
            HandlerPool._references = _references_of_a_waiting_worker()
        except BaseException:
            HandlerPool._references = 0
            raise
        return HandlerPool._references

    def resize(self, size: int | None) -> None:
        """Allow ``size`` handlers at once from now on (None: no limit).

        More: those that wait for a place go on. Fewer: nobody is killed; no handler starts until enough have ended.
        """
        check_size(size)
        self.size = size
        self.places.resize(size)

    def full(self) -> bool:
        """True while no further handler may start."""
        places = self.places
        return places.taken >= places.size

    def free_count(self) -> int:
        """How many further handlers may start now (at least 1 where there is no limit)."""
        return max(0, self.places.size - self.places.taken) if self.size is not None else 1

    def retire_waiting_workers(self, count: int | None = None) -> None:
        """End workers that wait for work, those longest without work first. Only from the hub or while it may wait."""
        waiting = self._waiting_workers
        leaving = waiting[:count] if count is not None else waiting[:]
        del waiting[: len(leaving)]
        for worker in leaving:
            get_hub().loop.run_callback(worker.switch, None, None)

    def left_in_child(self) -> None:
        """In a forked child of the process: all its greenlets are copies, which do not run."""
        keep(self._waiting_workers, self.greenlets, self.places)
        self._waiting_workers = []
        self.greenlets: set[Any] = set()
        # The one that has forked holds none, and waits for none.
        self._semaphore = self.places = Places(None)
        self._retire_timer = None
        forker, finished = getcurrent(), self._finished
        self._finished = lambda worker: end_process() if worker is forker else finished(worker)  # type: ignore

    # A worker has finished its function. Once a connection: what release() and _wait_for_work() do is written out.
    def _finished(self, worker: Worker) -> None:
        greenlets = self.greenlets
        greenlets.discard(worker)
        places = self.places
        places.taken -= 1
        if not greenlets:
            self._empty_event.set()
        if self.dying:
            self.dying.discard(worker)
        if places.links:
            places.tell()
        if worker._links is not None:
            # In the hub, where alone a gevent waiter may be woken; not used again before that.
            worker.loop.run_callback(worker._notify_links)
        elif self._retire_timer is not None:
            self._waiting_workers.append(worker)
        else:
            self._wait_for_work(worker)

    def _lost(self, worker: Worker) -> None:
        """A worker will do nothing more: it could not be switched to, or died."""
        if worker in self._waiting_workers:
            self._waiting_workers.remove(worker)
        if worker in self.greenlets:
            self.greenlets.discard(worker)
            self.dying.discard(worker)
            self.places.taken -= 1
            if not self.greenlets:
                self._empty_event.set()
            self.places.tell()

    def _wait_for_work(self, worker: Worker) -> None:
        self._waiting_workers.append(worker)
        if self._retire_timer is None:
            # ref=False: workers without work keep no program alive.
            timer = get_hub().loop.timer(IDLE_WORKER_SECONDS, IDLE_WORKER_SECONDS, ref=False)
            timer.start(self._retire_unused)
            self._retire_timer = timer

    def _retire_unused(self) -> None:
        # Who has had no work since the last time has waited for 5 to 10 s. The last to come is the first to get work.
        waiting = self._waiting_workers
        unused = 0
        while unused < len(waiting) and waiting[unused]._seen == waiting[unused]._number:
            unused += 1
        self.retire_waiting_workers(unused)
        for worker in waiting:
            worker._seen = worker._number
        if not waiting:
            self._retire_timer.close()
            self._retire_timer = None


def _call(function_and_arguments: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    function, arguments = function_and_arguments
    function(*arguments)


class Origin:
    """Stands for one run of a handler that has spawned greenlets, while any of them exists."""

    __slots__ = ("__weakref__",)


origins: WeakSet[Origin] = WeakSet()


# By name, since type checkers would otherwise not know those of greenlet's class.
_WORKER_SLOTS = ("_links", "_number", "_pool", "_seen", "_working", "loop")


class Worker(greenlet):  # type: ignore[misc]
    """A greenlet that runs one function after another. To others it looks like a ``gevent.Greenlet`` that runs one."""

    __slots__ = _WORKER_SLOTS

    #: gevent's waiting functions read these of a finished greenlet.
    exception = value = None

    gr_context: Any

    def __init__(self, pool: HandlerPool) -> None:
        hub = get_hub()
        super().__init__(None, hub)
        self.loop = hub.loop
        self._pool = pool
        self._links: list[Callable[[Any], Any]] | None = None
        self._working = False
        self._number = 0  # functions run so far
        self._seen = -1  # how many it were when the pool last looked

    def run(self) -> None:
        hub = self.parent
        pool = self._pool
        function, argument = _wait_for_a_job(hub)
        try:
            while function is not None:
                self._working = True
                try:
                    # Not function(*arguments): CPython calls this one within the same C frame, 0.5 KiB less of C stack
                    # to put aside and to copy at each switch.
                    function(argument)
                except GreenletExit:
                    pass
                except BaseException:
                    _report(hub, self)
                function = argument = None
                self._working = False
                self._number += 1
                if self.gr_context is not None:
                    self.gr_context = None
                attributes = self.__dict__
                if attributes:
                    attributes.clear()
                pool._finished(self)
                try:
                    function, argument = _wait_for_a_job(hub)
                except BaseException:
                    # Something that outlived its connection (a Timeout, a kill) was meant for this greenlet.
                    pool._lost(self)
                    return
        except BaseException:
            # No memory, between one function and the next. Its place must not be lost with it.
            self._working = False
            pool._lost(self)
            raise

    def _notify_links(self) -> None:
        links, self._links = self._links or [], None
        for link in links:
            try:
                link(self)
            except BaseException:
                self.parent.handle_error((link, self), *sys.exc_info())
        if not self.dead:  # killed meanwhile by somebody who meant its last connection
            self._pool._wait_for_work(self)

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
        if not self._working:
            self.loop.run_callback(callback, self)
        elif self._links is None:
            self._links = [callback]
        else:
            self._links.append(callback)

    def link(self, callback: Callable[[Any], Any]) -> None:
        """As :meth:`rawlink`, in a greenlet of its own: the callback may wait."""
        self.rawlink(SpawnedLink(callback))

    def unlink(self, callback: Callable[[Any], Any]) -> None:
        if self._links is not None and callback in self._links:
            self._links.remove(callback)

    def ready(self) -> bool:
        return not self._working

    successful = ready

    def kill(self, exception: Any = GreenletExit, block: bool = True, timeout: float | None = None) -> None:
        """Raise ``exception`` in the function that runs now, if it still runs when the hub comes to it."""
        if self._working:
            # Until then the callback refers to this worker, so that it is not used again.
            self.loop.run_callback(self._throw_if_working, exception)
            if block:
                self.join(timeout)

    def _throw_if_working(self, exception: Any) -> None:
        if self._working:
            self.throw(exception)

    def throw(self, *error: Any) -> Any:
        # gevent.Timeout keeps this bound method and may call it when the worker has long ended.
        return None if self.dead else greenlet.throw(self, *error)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the function that runs now has ended."""
        if not self._working:
            return
        waiter = Waiter()
        self.rawlink(waiter.switch)
        try:
            with Timeout._start_new_or_dummy(timeout) as timer:
                waiter.get()
        except Timeout as expired:
            if expired is not timer:
                raise
        finally:
            self.unlink(waiter.switch)


def _report(hub: Any, worker: Worker) -> None:
    """Print what a function has raised, if that can be done."""
    try:
        hub.handle_error(worker, *sys.exc_info())
    except HubDestroyed:
        raise
    except BaseException:
        pass  # no memory to print with


def _wait_for_a_job(hub: Any) -> Any:
    # A function of its own: greenlet makes a frame object (240 bytes) of the frame that switches, and that frame keeps
    # it until it returns. Not hub.switch(): see stream.py.
    return _switch_to(hub)


class Places:
    """The places of a pool: a counter with the face of a ``gevent.lock.Semaphore``, whose size can change.

    gevent's servers register with ``rawlink`` to hear once of a free place; greenlets wait for one in ``acquire``.
    Whoever came first is told first.
    """

    def __init__(self, size: int | None) -> None:
        self.size = _NO_LIMIT if size is None else size
        self.taken = 0
        self.links: deque[Callable[[Any], Any]] = deque()
        self._notifying = False

    def resize(self, size: int | None) -> None:
        self.size = _NO_LIMIT if size is None else size
        self.tell()

    def locked(self) -> bool:
        return self.taken >= self.size

    @property
    def counter(self) -> int:
        return max(0, self.size - self.taken)

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a place; False when there is none (in time)."""
        # Those who wait already come first, unless the caller would not wait anyway.
        if self.taken < self.size and not self.links:
            self.taken += 1
            return True
        if not blocking:
            if self.taken < self.size:
                self.taken += 1
                return True
            return False
        if not self._wait(timeout):
            return False
        self.taken += 1
        return True

    def release(self) -> None:
        """Give a place back."""
        self.taken -= 1
        if self.links:
            self.tell()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until there is a place, without taking it; returns how many there are."""
        if self.locked():
            self._wait(timeout)
        return self.counter

    def rawlink(self, callback: Callable[[Any], Any]) -> None:
        """Call ``callback(self)`` once, in the hub, when there is a place."""
        self.links.append(callback)
        self.tell()

    def unlink(self, callback: Callable[[Any], Any]) -> None:
        if callback in self.links:
            self.links.remove(callback)

    def _wait(self, timeout: float | None) -> bool:
        waiter = Waiter()
        self.rawlink(waiter.switch)
        try:
            with Timeout._start_new_or_dummy(timeout) as timer:
                waiter.get()
                return True
        except Timeout as expired:
            if expired is not timer:
                raise
            return False
        finally:
            self.unlink(waiter.switch)

    def tell(self) -> None:
        """There may be a place: tell those who registered, soon."""
        if self.links and not self._notifying and self.taken < self.size:
            get_hub().loop.run_callback(self._notify)
            self._notifying = True

    def _notify(self) -> None:
        self._notifying = False
        # A link that takes a place does so before it returns here; one that does not leaves it to the next.
        while self.links and self.taken < self.size:
            link = self.links.popleft()
            try:
                link(self)
            except BaseException:
                get_hub().handle_error(link, *sys.exc_info())


def check_size(size: int | None) -> None:
    """Raise ValueError unless ``size`` is None or a whole number from 0."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise ValueError(f"pool size must be a whole number from 0, or None for no limit, got {size!r}")


def _references_of_a_waiting_worker() -> int:
    """How many references a worker has while it waits, counted as :meth:`HandlerPool.run` does. Only from the hub."""
    pool = HandlerPool(1)
    pool.run(len, ())
    worker = pool._waiting_workers.pop()
    references = sys.getrefcount(worker)
    worker.switch(None, None)
    pool._retire_unused()
    return references
