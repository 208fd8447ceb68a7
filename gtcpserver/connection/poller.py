# cython: boundscheck=False, wraparound=False
"""Poller: how greenlets wait for input. One for each hub, with an epoll(7) instance of its own.

gevent has a watcher for each socket: its event enters the hub, which switches to the greenlet that waits, which
switches back to the hub for its next wait. Here the hub has one watcher, that of the epoll instance. Its callback
fetches up to MOST events at once and switches to the first greenlet. When that one waits again, it switches to the
next, and the last one to the hub. So a request costs one switch in place of two, and no Python callback: 3,200 of 8,100
instructions are saved.

Events are edge-triggered (EPOLLET): one tells that input has come, not that input is there. So a descriptor is in one
of five states:

* None: not watched;
* FREE: no event since the last wait;
* INPUT: an event, while no greenlet waited; the next wait returns at once;
* ENDED: every wait returns at once, until a read finds nothing: the peer has closed its side, and no event may follow;
  or it has sent urgent bytes, at which a read stops short (tcp(7));
* a greenlet, which waits.

An event may be that of another socket: one that had this number before, and lives on in a copy (dup(2), fork(2)), or
whose event was fetched before its close. So every state but that of a greenlet is only a hint.

A wait may return although there is nothing to read: INPUT may have been read meanwhile. For a wait to end when it must,
its caller has found the socket empty, or has seen a read return less than it asked for; others call `ask_again` before.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from gevent.exceptions import ConcurrentObjectUseError
from greenlet import error as GreenletError

from gtcpserver.linux import make_alarm
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.watcher import cannot_watch, watch

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (poller.pxd).
    from gevent.monkey import get_original
    from greenlet import getcurrent, greenlet

    from gtcpserver.linux import make_epoll

    get_ident = get_original("_thread", "get_ident")

    # greenlet's own switch enters the hub: gevent's Hub.switch first looks for a ``switch_out`` hook on the current
    # greenlet, which costs 0.3 us a wait. Our waits do not call that hook on a greenlet class that defines it.
    switch_to = greenlet.switch

    if TYPE_CHECKING:
        from gtcpserver.c import control, create, fetch, import_greenlet
if cython.compiled:
    import_greenlet()

WAIT_IN_HUB = "Impossible to call blocking function in the event loop callback"  # gevent's words

#: Events that one turn of the event loop serves at most. The others come in its next turn, after timers and accepts.
MOST = 256

#: Seconds until the hub tries again to watch the epoll instance, where the kernel has refused it.
AGAIN_SECONDS = 0.1

_IN, _PRI, _HUP, _RDHUP, _ET = 0x1, 0x2, 0x10, 0x2000, 0x80000000  # include/uapi/linux/eventpoll.h
_END = _HUP | _RDHUP | _PRI  # not _ERR: it does not mean that every read returns at once
_WATCHED = _IN | _RDHUP | _PRI | _ET
_ADD, _DEL, _MOD = 1, 2, 3

# Of gevent's event masks.
_READ = 1


class _State:
    """A state of a descriptor on which no greenlet waits."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


FREE, INPUT, ENDED = _State("FREE"), _State("INPUT"), _State("ENDED")


class Poller:
    """The waits for input of one hub.

    Args:
        hub: the hub of this thread.

    Raises:
        OSError: EMFILE, ENFILE: there is no descriptor for it.
    """

    __slots__ = (
        "__weakref__",
        "_alarm",
        "_at",
        "_count",
        "_epoll",
        "_events",
        "_fd",
        "_poll",
        "_states",
        "_thread",
        "_thrown",
        "_watched",
        "_watcher",
        "hub",
    )

    def __init__(self, hub: Any) -> None:
        self._fd = -1  # for __del__, if this fails
        self.hub = hub
        self._thread = get_ident()
        self._states: list[Any] = []
        self._at = self._count = self._watched = 0
        self._alarm = -1
        if cython.compiled:
            self._fd = create()
        else:
            self._events: Any = ()
            self._open()
        self._thrown: BaseException | None = None  # what throw_into is about to raise
        self._watcher: Any = None
        self.start_watcher()
        _pollers.add(self)

    def _open(self) -> None:
        """Open what the form that is not compiled has in place of a number."""
        if not cython.compiled:
            assert make_epoll is not None
            self._epoll = make_epoll()
            self._poll = self._epoll.poll
            self._fd = self._epoll.fileno()

    def start_watcher(self) -> None:
        self._watcher = watch(self.hub.loop, self._fd, _READ)
        self._watcher.ref = self._watched > 0
        self._watcher.start(self.run)

    def throw(self, _error: BaseException) -> None:
        """Try again later: the event loop cannot watch the epoll instance (called by process/watcher.py as well)."""
        self._watcher = timer = self.hub.loop.timer(AGAIN_SECONDS)
        timer.start(self.start_watcher)

    def __del__(self) -> None:
        if cython.compiled and self._fd >= 0:
            close_descriptor(self._fd)

    # -- descriptors -------------------------------------------------------------------------------------------------

    def add(self, fd: int) -> None:
        """Watch a descriptor. Input that is there already is an event, too.

        Raises:
            OSError: EIO: epoll_ctl(2) has failed (ENOMEM; ENOSPC: fs.epoll.max_user_watches).
        """
        if self._alarm >= 0:
            self._watch_again()
        self._make_room(fd)
        is_new = self._register(fd)
        if self._states[fd] is None:
            self._watched += 1
            if self._watched == 1:
                self._watcher.ref = True  # the loop has something to wait for: otherwise gevent raises LoopExit
        elif not is_new and self.waiter(fd) is not None:
            return  # by way of another object: its wait goes on
        self._states[fd] = FREE

    def _make_room(self, fd: int) -> None:
        # Each descriptor that an event can name has an element: compiled code does not look (the first line above).
        states = self._states
        if fd >= len(states):
            states.extend([None] * (fd + 64 - len(states)))

    def forget(self, fd: int) -> None:
        """Forget a descriptor that is about to be closed: then the kernel forgets it, too."""
        states = self._states
        if 0 <= fd < len(states) and states[fd] is not None:
            states[fd] = None
            self._watched -= 1
            if not self._watched:
                try:
                    self._watcher.ref = False
                except ValueError:
                    pass  # the loop is destroyed

    def leave(self, fd: int) -> None:
        """Forget a descriptor that stays open."""
        states = self._states
        if 0 <= fd < len(states) and states[fd] is not None:
            self.forget(fd)
            try:
                self._control(_DEL, fd)
            except OSError:
                pass  # what comes is not for anybody

    def forget_dropped(self, fd: int) -> None:
        """Forget a descriptor that was closed some time ago, unless another socket with this number is watched."""
        try:
            self._control(_MOD, fd)
        except OSError:
            self.forget(fd)

    def ask_again(self, fd: int) -> None:
        """Make input that is there an event again, for a wait behind a read that may have left some."""
        state = self._states[fd]
        try:
            self._control(_MOD, fd)
        except OSError:
            if state is FREE or state is INPUT or state is ENDED:
                self.forget(fd)  # the next wait adds it, or says what is wrong
        else:
            if state is INPUT or state is ENDED:
                self._states[fd] = FREE  # if there is nothing, the next wait waits

    def note_empty(self, fd: int) -> None:
        """Note that a read has just found nothing: the peer's side has not ended. What comes is an event."""
        if self._states[fd] is ENDED:
            self._states[fd] = FREE

    def note_input(self, fd: int) -> None:
        """Make the next wait return at once."""
        if self._states[fd] is FREE:
            self._states[fd] = INPUT

    def waiter(self, fd: int) -> Any:
        """Return the greenlet that waits, or None."""
        states = self._states
        state = states[fd] if 0 <= fd < len(states) else None
        return None if state is FREE or state is INPUT or state is ENDED else state

    def _register(self, fd: int) -> bool:
        """Return False if it was watched before, as that of another object."""
        try:
            try:
                self._control(_ADD, fd)
                return True
            except FileExistsError:
                self._control(_MOD, fd)
                return False
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            raise cannot_watch(f"epoll_ctl(2): {error.strerror}") from error

    def _control(self, operation: int, fd: int) -> None:
        if cython.compiled:
            control(self._fd, operation, fd, _WATCHED)
        elif operation == _ADD:
            self._epoll.register(fd, _WATCHED)
        elif operation == _MOD:
            self._epoll.modify(fd, _WATCHED)
        else:
            self._epoll.unregister(fd)

    # -- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, fd: int) -> bool:
        """Wait until input comes; return at once if some has come since the last wait.

        Returns:
            False: the descriptor is not watched.

        Raises:
            ConcurrentObjectUseError: another greenlet waits.
            greenlet.error: the connection is another thread's.
            BaseException: what is thrown into this greenlet.
        """
        # Hot path.
        states = self._states
        state = states[fd]
        if state is not FREE:
            if state is None:
                return False
            if state is ENDED:
                return True
            if state is not INPUT:
                raise ConcurrentObjectUseError(f"another greenlet reads from this connection: {state!r}")
            states[fd] = FREE
            return True
        me = getcurrent()
        if me is self.hub:
            raise AssertionError(WAIT_IN_HUB)
        if get_ident() != self._thread:  # not left to the switch: next() has taken an event of that thread by then
            raise GreenletError("cannot switch to a different thread")
        states[fd] = me
        try:
            switch_to(self._next())
        except BaseException:
            if states[fd] is me:
                states[fd] = FREE
            raise
        if states[fd] is me:
            states[fd] = FREE  # another greenlet has switched here, not an event
            if self._thrown is not None:
                states[fd] = None
                error, self._thrown = self._thrown, None
                raise error
        return True

    def throw_into(self, waiter: Any, fd: int, error: BaseException) -> None:
        """Raise an error in a greenlet that waited when `leave` forgot the descriptor. Call in the hub.

        A tenth of what ``waiter.throw(error)`` takes, which raises two C++ exceptions: 39,000 instructions.
        """
        self._states[fd] = waiter
        self._thrown = error
        try:
            waiter.switch()
        finally:
            if self._thrown is not None:  # it waits elsewhere
                self._states[fd] = self._thrown = None
                waiter.throw(error)

    def _next(self) -> Any:
        """Return the greenlet that the next event of this turn is for, or the hub."""
        states = self._states
        while self._at < self._count:
            if cython.compiled:
                fd, events = self._events[self._at].data.fd, self._events[self._at].events
            else:
                fd, events = self._events[self._at]
            self._at += 1
            state = states[fd]
            if state is None:
                continue
            states[fd] = ENDED if events & _END else INPUT
            if state is not FREE and state is not INPUT and state is not ENDED:
                if states[fd] is INPUT:
                    states[fd] = FREE
                return state
        return self.hub

    def run(self) -> None:
        """Serve what has come. Called in the hub."""
        try:
            self._serve()
        except BaseException as error:
            # gevent stops the watcher of a callback that raises: nobody would get input any more.
            if self._at < self._count:
                self.hub.loop.run_callback(self.run)
            else:  # epoll_wait(2) has failed, and may fail again at once
                self._watcher.stop()
                self.throw(error)
            self.hub.loop.run_callback(_raise, error)

    def _serve(self) -> None:
        if self._alarm >= 0:
            self._watch_again()
        if self._at >= self._count:
            self._at = self._count = 0
            if cython.compiled:
                self._count = fetch(self._fd, self._events, MOST)
            else:
                self._events = self._poll(0, MOST)
                self._count = len(self._events)
        hub = self.hub
        while True:
            waiter = self._next()
            if waiter is hub:
                return
            try:
                switch_to(waiter)
            except BaseException:
                # As gevent does for a callback. Here, since the other events of this turn do not come again.
                hub.handle_error(waiter, *sys.exc_info())

    # -- a fork ------------------------------------------------------------------------------------------------------

    def leave_parent(self) -> None:
        """Get, in a forked child, an epoll instance that the parent does not share; called before anything else there.

        All that is watched is added to it in the child's first turn of the event loop: most children have none.
        """
        number = self._fd
        # First: if there is no descriptor for another, the parent's must not be used either.
        if cython.compiled:
            self._fd = -1
            close_descriptor(number)
            fd = create()
        else:
            self._epoll.close()
            self._open()
            fd = self._fd
        if fd != number:
            os.dup2(fd, number, inheritable=False)
            if cython.compiled:
                close_descriptor(fd)
        self._fd = number
        self._at = self._count = 0
        if self._watched:
            try:
                self._alarm = make_alarm()
            except OSError:
                self._watch_again()
                return
            self._make_room(self._alarm)
            self._control(_ADD, self._alarm)

    def _watch_again(self) -> None:
        alarm, self._alarm = self._alarm, -1
        if alarm >= 0:
            close_descriptor(alarm)
        for fd, state in enumerate(self._states):
            if state is None:
                continue
            try:
                self._register(fd)
            except OSError:
                self.hub.loop.run_callback(self._give_up, fd)

    def _give_up(self, fd: int) -> None:
        # The next wait adds it, or says what is wrong.
        waiter = self.waiter(fd)
        self.forget(fd)
        if waiter is not None:
            switch_to(waiter)


_pollers: WeakSet[Poller] = WeakSet()
_last: Poller | None = None


def poller_of(hub: Any) -> Poller:
    """Return the poller of a hub, made by the first call."""
    global _last
    last = _last  # of another thread in a moment
    if last is not None and last.hub is hub:
        return last
    poller: Poller | None = hub.__dict__.get("_gtcpserver_poller")
    if poller is None:
        poller = hub.__dict__["_gtcpserver_poller"] = _make(hub)
    _last = poller
    return poller


def _make(hub: Any) -> Poller:
    if not cython.compiled and make_epoll is None:
        from .plain_poller import PlainPoller

        return PlainPoller(hub)
    return Poller(hub)


def _raise(error: BaseException) -> None:
    raise error


def _leave_parent() -> None:
    for poller in list(_pollers):
        try:
            poller.leave_parent()
        except Exception:
            sys.excepthook(*sys.exc_info())


os.register_at_fork(after_in_child=_leave_parent)
