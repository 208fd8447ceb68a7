"""Remove the server from forked children of a serving process.

A fork copies all greenlets and the event loop that runs them. gevent lets them go on in the child (it is documented,
and programs rely on it: gevent's issues 2202 and 2203), as soon as anything there waits: an at-fork hook that sleeps
is enough. The copy of a server would be a second one, which accepts on the same sockets and answers the same clients.

So in a child of a process that serves, before ``fork`` returns there (os.register_at_fork):

- the copied event loop is destroyed. That closes its epoll(7) descriptor, which it shares with the parent, without
  changing anything in it; a new loop takes its place;
- only the greenlet that forked goes on, with those that the child itself starts. Copies of others are not killed
  either: their ``finally`` blocks would write to the parent's clients. Anything that switches to one (a lock that is
  released, the garbage collector, the end of the interpreter) gets control back at once, see `_make_guard`;
- listening sockets, connections and channels to other processes are closed, except the connection whose handler forked.
  The parent's stay open, and clients notice nothing;
- signal handlers of this library are removed, and so is the descriptor through which signals wake the parent;
- the end of the greenlet that forked (a handler that returns in both processes) is the end of the child.

Programs that do not serve fork as with plain gevent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NoReturn, Protocol
from weakref import WeakSet, WeakValueDictionary

from gevent import timeout as gevent_timeout
from gevent._hub_local import get_hub_if_exists, set_hub, set_loop
from gevent.exceptions import ConcurrentObjectUseError
from gevent.hub import Hub, get_hub
from gevent.monkey import get_original
from greenlet import GreenletExit, getcurrent, gettrace, greenlet, settrace

_get_ident: Callable[[], int] = get_original("_thread", "get_ident")
_signal: Callable[..., Any] = get_original("signal", "signal")
_getsignal: Callable[[int], Any] = get_original("signal", "getsignal")
_switch: Callable[..., Any] = greenlet.switch

#: Signals blocked from before a fork until the child has removed our handlers: Python forgets a signal that reaches a
#: child earlier, so that a ``Process.terminate()`` right after the start would have no effect.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

#: Modules that fork processes for future tasks: these outlive the handler whose first task created them.
POOLS = frozenset({"multiprocessing.pool", "concurrent.futures.process"})

#: Modules that fork to execute another program. That closes all our descriptors (they are close-on-exec), so they need
#: not be closed one by one: 3 us of CPU for each connection.
EXECUTING = frozenset({"subprocess", "gevent.subprocess"})

_get_frame = sys._getframe  # noqa: SLF001 - Python's name for it


class InChild(Protocol):
    """An object that has to let go in a forked child.

    One that runs handlers also has ``connection_of(greenlet)``, which returns the connection whose handler runs in that
    greenlet, or None. (The stack does not show it: what calls a handler may be compiled.)
    """

    def serves(self) -> bool:
        """Return whether a child of this process must leave the event loop."""
        ...

    def left_in_child(self, own: Any) -> None:
        """Close sockets and forget timers and watchers in the child: their event loop is gone. Must not wait.

        Args:
            own: the connection whose handler forked, which stays open; or None.
        """
        ...


# By ID: a subclass in the program need not be hashable.
_things: WeakValueDictionary[int, Any] = WeakValueDictionary()
_sockets: WeakSet[Any] = WeakSet()
_handlers: dict[CodeType, Callable[[Mapping[str, Any], bool], Any]] = {}
_exempt: set[int] = set()
_masks: dict[int, Any] = {}  # of the threads that are currently forking
_kept: list[Any] = []  # copies, which must not be collected


def register(thing: InChild) -> None:
    """Have a server, or another serving object, notified in every child of this process; as long as it lives."""
    _things[id(thing)] = thing


def close_in_children(sock: Any) -> None:
    """Have a gevent socket that belongs to no server closed in every child of a serving process. 0.5 us."""
    _sockets.add(sock)


def runs_handler(function: Callable[..., Any], find: Callable[[Mapping[str, Any], bool], Any]) -> None:
    """Treat a fork within a call of ``function`` as one of a handler.

    Args:
        find: called in both processes with the local variables of that call, and whether this is the child; returns
            the handler's connection, or None if the child must not have it.
    """
    _handlers[function.__code__] = find


@contextlib.contextmanager
def own_fork() -> Iterator[None]:
    """Mark this thread's forks in the block as those of our own processes, which handle everything themselves."""
    _exempt.add(_get_ident())
    try:
        yield
    finally:
        _exempt.discard(_get_ident())


def keep(*copies: Any) -> None:
    """Keep references to greenlets of the parent: an exception would end them when they are collected."""
    _kept.extend(copies)


# -- around a fork ---------------------------------------------------------------------------------------------------


def _before() -> None:
    thread = _get_ident()
    if thread not in _exempt and any(thing.serves() for thing in list(_things.values())):
        _masks[thread] = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)


def _in_parent() -> None:
    mask = _masks.pop(_get_ident(), None)
    if mask is None:
        return
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    own, executes = _who_forks(in_child=False)
    if own is not None and not executes:
        own.shared_with_child()


def _in_child() -> None:
    mask = _masks.pop(_get_ident(), None)
    _masks.clear()
    if _get_ident() in _exempt:
        # The parent's serving objects do not concern children of this process.
        _things.clear()
        _sockets.clear()
    if mask is None:
        return
    try:
        own, executes = _who_forks(in_child=True)
        caught = _caught_signals()
        _leave_event_loop(caught)
        things = list(_things.values())
        _things.clear()
        if not executes:
            for thing in things:
                _guarded(thing.left_in_child, own)
            for sock in list(_sockets):
                if sock is not own:
                    _guarded(close_in_child, sock)
            if own is not None:
                own.taken_by_child()
        _sockets.clear()
        _guarded(_reset_signals, caught)
    except BaseException:
        # Copies of all handlers would run.
        traceback.print_exc()
        os._exit(1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _guarded(do: Callable[..., Any], *arguments: Any) -> None:
    try:
        do(*arguments)
    except Exception:
        traceback.print_exc()


def close_in_child(sock: Any) -> None:
    """Close a gevent socket in a forked child, and forget its references to the parent's event loop."""
    left = getattr(sock, "left_by_child", None)
    if left is not None:
        left()
    else:
        # Not its own close(), which would stop watchers of a loop that is gone.
        sock._sock.close()  # noqa: SLF001 - gevent's name for the socket beneath


def _who_forks(in_child: bool) -> tuple[Any, bool]:
    """Return the connection whose handler forked (None: no handler did, or a process pool), and whether the child will
    execute another program."""
    frame: FrameType | None = _get_frame()
    executes = False
    while frame is not None:
        find = _handlers.get(frame.f_code)
        if find is not None:
            return find(frame.f_locals, in_child), executes
        module = frame.f_globals.get("__name__")
        if module in POOLS:
            break
        executes = executes or module in EXECUTING
        frame = frame.f_back
    else:
        me = getcurrent()
        for thing in list(_things.values()):
            find_connection = getattr(thing, "connection_of", None)
            connection = find_connection(me) if find_connection is not None else None
            if connection is not None:
                return connection, executes
    return None, executes


def _reset_signals(caught: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        handler = _getsignal(number)
        if callable(handler) and str(getattr(handler, "__module__", "")).startswith("gtcpserver."):
            _signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        elif handler is signal.SIG_DFL and number in ENDING_SIGNALS and _is_among(number, caught):
            _signal(number, signal.SIG_DFL)  # gevent.signal_handler: its event loop is gone


def _caught_signals() -> int:
    """Return the signals that are caught, by Python or in C; as a mask, proc_pid_status(5)."""
    try:
        with open("/proc/self/status", "rb") as file:
            return next((int(line.split()[1], 16) for line in file if line.startswith(b"SigCgt:")), 0)
    except OSError:
        return 0


def _is_among(number: int, mask: int) -> bool:
    return bool(mask >> (number - 1) & 1)


# -- leaving the event loop --------------------------------------------------------------------------------------------


def _leave_event_loop(caught: int) -> None:
    hub, me = get_hub_if_exists(), getcurrent()
    if type(me).__name__ == "_WorkerGreenlet":
        # A thread of gevent's pool: it would wait for its next task forever.
        me._after_run_task = lambda *_: end_process()  # noqa: SLF001 - gevent's hook behind a task
    if hub is None:
        return  # another thread's greenlets cannot be switched to
    if me is hub:
        _end_with_callback()
        return
    set_hub(None)
    set_loop(None)
    # libev's default loop is a static structure: the next one would inherit the watcher count of this one, and so wait
    # forever where nothing can happen (gevent's LoopExit).
    for _ in range(hub.loop.activecnt):
        hub.loop.unref()
    is_default = hub.loop.default
    libev_reaps = not callable(_getsignal(signal.SIGCHLD)) and _is_among(signal.SIGCHLD, caught)
    hub.loop.destroy()
    hub.loop = loop = type(hub.loop)(hub.backend, is_default)
    if is_default and not libev_reaps:
        # gevent lets libev reap children once that has been requested, and only prevents it at the first start of the
        # default loop.
        _signal(signal.SIGCHLD, _getsignal(signal.SIGCHLD))
    set_loop(loop)  # the next hub takes it
    # Objects created before the fork that still refer to the old hub (locks, sockets) find the new one through it.
    hub.__class__ = type("_LeftHub", (_LeftHub, type(hub)), {})
    ours: WeakSet[Any] = WeakSet([me])
    if me.parent is not None:
        end = _End(loop)
        root = me
        while root.parent is not None:
            root = root.parent
        end.parent = root
        end.of = me
        _switch(end)
        ours.add(end)
        if hasattr(me, "unlink_all"):
            me.unlink_all()  # greenlets that wait for its end are copies
        me.parent = end
    settrace(_make_guard(ours, hub))
    keep(hub)
    _let_old_timeouts_end()


def _make_guard(ours: WeakSet[Any], old_hub: Any) -> Callable[[str, Any], None]:
    """Return a trace function that keeps copies of greenlets from running.

    greenlet calls a trace function in the greenlet that is switched to, before anything else runs there. This one
    switches back at once, out of greenlets from before the fork. They need not be known: one that the child has started
    has no Python frame before its first switch. It costs a child 0.3 us per switch.

    Args:
        ours: greenlets that may run; those that the child starts are added.
        old_hub: greenlets that switch to it in order to wait are made to wait in the new one.
    """

    was_bounced: dict[Any, Any] = {}  # a copy -> the greenlet that gets control back

    # Everything it needs is an argument: at the end of the interpreter, which ends greenlets, globals are gone.
    def guard(
        event: str,
        switch: Any,
        ours: Any = ours,
        bounced: Any = was_bounced,
        getframe: Any = _get_frame,
        is_tracer: Any = _is_tracer,
        get_hub: Any = get_hub,
        go: Any = _switch,
        raised: Any = BaseException,
    ) -> None:
        origin, target = switch
        if target in ours:
            return
        back = get_hub() if origin.dead or (target is old_hub and event == "switch") else origin
        if target in bounced:
            bounced[target] = back
            return  # to the loop below, in a call in progress in this greenlet
        frame = getframe()
        own = frame.f_code
        while frame.f_back is not None:
            frame = frame.f_back
        if frame.f_code is own or is_tracer(frame.f_code):
            ours.add(target)
            return
        bounced[target] = back
        while True:
            try:
                go(bounced[target])
            except raised:
                pass  # to end it

    return guard


def _is_tracer(code: CodeType, gettrace: Callable[[], Any] = gettrace) -> bool:
    """Return whether the code is a trace function that the program has set after ours, and that calls ours."""
    tracer = gettrace()
    return code in (getattr(tracer, "__code__", None), getattr(type(tracer).__call__, "__code__", None))


class _LeftHub(Hub):  # type: ignore[misc]
    """The class of the old hub after the fork, for locks, sockets and greenlets that refer to it."""

    #: Locks check this, and use the new hub.
    dead = True

    def switch(self, *_: Any) -> Any:
        return get_hub().switch()

    def wait(self, watcher: Any) -> None:
        if watcher.active:
            raise ConcurrentObjectUseError("a greenlet of the parent process waits for this")
        hub = get_hub()
        watcher.loop = hub.loop
        hub.wait(watcher)

    def cancel_wait(self, watcher: Any, error: Any, close_watcher: bool = False) -> None:
        pass

    def cancel_waits_close_and_then(self, watchers: Any, error: Any, then: Callable[..., Any], *arguments: Any) -> None:
        then(*arguments)

    def handle_error(self, *error: Any) -> None:
        get_hub().handle_error(*error)


class _End(Hub):  # type: ignore[misc]
    """The parent of the greenlet that forked: when that greenlet ends, so does the process.

    A hub, since gevent's greenlets ask their parent for a loop, and report errors to it.
    """

    of: Any
    _error: BaseException | None = None

    def run(self) -> None:
        try:
            _switch(self.of)
        except BaseException as error:
            end_process(error)
        end_process(self._error)

    def handle_error(self, context: Any, type: Any, value: Any, tb: Any) -> None:
        self._error = value


def end_process(error: BaseException | None = None) -> NoReturn:
    """End a forked child, like the end of a script.

    Neither exit handlers nor ``finally`` blocks of other greenlets run: what they undo belongs to the parent.

    Args:
        error: the exception that left the greenlet that forked.
    """
    status = 0
    try:
        if isinstance(error, SystemExit):
            code = error.code
            status = code if isinstance(code, int) else int(code is not None)
            if not isinstance(code, (int, type(None))):
                print(code, file=sys.stderr)
        elif error is not None and not isinstance(error, GreenletExit):
            status = 1
            traceback.print_exception(type(error), error, error.__traceback__)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
    finally:
        os._exit(status & 0xFF)


def _end_with_callback() -> None:
    """Handle a fork in a callback of the event loop itself. The loop cannot be left there: the child ends with it."""
    frame: FrameType | None = _get_frame()
    while frame is not None and not (frame.f_back is not None and frame.f_back.f_code is Hub.run.__code__):
        frame = frame.f_back
    if frame is None:
        return

    def trace(_frame: FrameType, event: str, argument: Any) -> Any:
        if event == "exception":
            errors.append(argument[1])
        elif event == "return":
            end_process(errors[-1] if errors and argument is None else None)
        else:
            errors.clear()
        return trace

    errors: list[BaseException] = []
    frame.f_trace = trace
    sys.settrace(lambda *_: None)


def _let_old_timeouts_end() -> None:
    """Let a ``with gevent.Timeout(...)`` in which the greenlet forked end normally; it ends nothing here."""
    Timeout = gevent_timeout.Timeout

    def tolerant(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def end(timeout: Any) -> None:
            try:
                method(timeout)
            except (ValueError, TypeError, AttributeError):  # its loop is destroyed
                timeout.timer = gevent_timeout._FakeTimer  # noqa: SLF001 - as gevent has it after a close

        return end

    if "close" in vars(Timeout) and not getattr(Timeout, "ends_in_child", False):
        Timeout.ends_in_child = True
        Timeout.close = tolerant(Timeout.close)
        Timeout.cancel = tolerant(Timeout.cancel)


def _install() -> None:
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
    # Before the hooks of the program and of other packages, which may wait.
    import gc

    for hooks in gc.get_referrers(_in_child):
        if type(hooks) is list and hooks[-1] is _in_child:
            hooks.insert(0, hooks.pop())


_install()
