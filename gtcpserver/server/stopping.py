"""Stopping: how a server stops, in its steps.

Drain and close the listening sockets, wait for handlers, then end those that are left. state.py has the states.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event
from gevent.hub import get_hub
from gevent.lock import Semaphore
from greenlet import GreenletExit

from gtcpserver.connection.connection import Connection
from gtcpserver.connection.lingering import LOOK_SECONDS
from gtcpserver.errors import GtcpServerError
from gtcpserver.listening.listener import forget_member, steer
from gtcpserver.plural import counted
from gtcpserver.process.forked import keep

from .describe import describe
from .drain import LONGEST_DRAIN, LONGEST_DRAIN_OF_DEFERRED, Steps, drain_and_close
from .idle import end_if_idle
from .state import ServerState, State
from .stats import CutConnection, StopReport

if TYPE_CHECKING:
    from .acceptor import Acceptor
    from .options import Options
    from .server import Server
    from .tasks import Tasks
    from .time_limits import TimeLimits
    from .watchdog import Watchdog

log = logging.getLogger("gtcpserver")

#: Seconds that a killed greenlet gets to end before it is killed again.
KILL_SECONDS = 0.25

#: How often it is killed in all.
KILL_ATTEMPTS = 4

#: Seconds between two looks for open connections, should an event be lost while a stop waits.
LONGEST_WITHOUT_A_LOOK = 1.0

#: Seconds that the hook on_stop gets at least, even if the stop's time is used up.
ON_STOP_SECONDS = 1.0

#: Seconds after accept in which a stop spares a connection that has not sent a byte: its first request is on its way,
#: and closing would lose it. A round trip around the world takes 0.3 s; a TLS handshake takes two more.
FIRST_REQUEST = 1.0
FIRST_REQUEST_OVER_TLS = 2.0


class Stopping:
    """The stop of one server.

    Args:
        admit_drained: called with each connection from the kernel's queue, and its address.

    Attributes:
        ends_after_last: whether it begins after `max_accepts` connections; in a worker process the master sees to that.
        report: the report; None before the end of the stop.
        until: monotonic time at which handlers are ended; None: never, or the stop has not begun.
    """

    def __init__(
        self,
        server: Server,
        options: Options,
        state: ServerState,
        time_limits: TimeLimits,
        tasks: Tasks,
        admit_drained: Callable[[Connection, Any], Any],
    ) -> None:
        self._server = server
        self._options = options
        self._state = state
        self._time_limits = time_limits
        self._tasks = tasks
        self._admit_drained = admit_drained
        self._access_log = options.access_log
        self._steps = Steps()
        self._closing_loops = Semaphore()
        self._patient = False  # whether it waits for first requests however long they take
        self._greenlet: Any = None
        self.spawn: Callable[[], Any] = partial(gevent.spawn, int)
        self._signal_missed = 0  # a signal for which memory ran out
        self._signalled_early = 0
        self.watchdog: Watchdog | None = None
        self.ends_after_last = True
        self.until: float | None = None
        self.report: StopReport | None = None

    # -- begin -------------------------------------------------------------------------------------------------------

    def begin(self, timeout: float | None, leave_listening: bool = False, patient: bool = False) -> None:
        """Begin the stop; arguments as for :meth:`Server.stop`."""
        state = self._state
        self._patient = patient
        if self._server.mover is None:
            self._server.draining = True
        self.until = None if timeout is None else monotonic() + timeout
        # The report leaves out handlers that ended before the stop.
        ended_before = state.begun - len(state.connections)
        self.spawn = partial(gevent.spawn, self.run, timeout, leave_listening, ended_before)
        # In a greenlet of its own: the caller's may be killed, or stop waiting.
        self._greenlet = self.spawn()
        state.become(State.STOPPING)
        state.wants_idle = self._became_idle

    def by_signal(self, number: int, timeout: float | None) -> None:
        """Begin a stop at the first signal, end handlers at the second."""
        state = self._state
        name = signal.Signals(number).name
        if state.now is State.NEW:  # the server is looking up the address of a name
            if self._signalled_early:
                os._exit(128 + number)
            self._signalled_early = number
        elif state.now is State.STOPPING:
            log.warning("%s again: ending %s now", name, counted(len(state.connections), "handler"))
            state.hurry.set()
        elif state.now is State.STOPPED:
            log.warning("%s again: ending background work now", name)
            state.hurry.set()
        elif state.now is State.SERVING:
            log.info("%s: stopping, %s", name, counted(len(state.connections), "connection"))
            self._signal_missed = number
            self.begin(timeout)
            self._signal_missed = 0

    def obey_early_signal(self, timeout: float | None) -> None:
        """Obey a signal that arrived before the server had started."""
        if self._signalled_early:
            self.by_signal(self._signalled_early, timeout)

    def hasten(self) -> None:
        """Stop waiting for first requests that take long (a patient stop)."""
        self._patient = False
        if self._server.mover is not None:
            self._server.mover.hasten()
        self._end_idle_connections()

    def look(self) -> None:
        """Retry what failed because memory ran out. Called once a second."""
        if self._state.now is State.STOPPING and self._greenlet.dead and not self._state.stopped.is_set():
            self._greenlet = self.spawn()
        if self._signal_missed:
            self.by_signal(self._signal_missed, self._server.stop_timeout)
        if self._state.now is State.SERVING:
            most = self._options.max_accepts
            if self._server.fatal_error is not None:
                self.begin(self._server.stop_timeout)
            elif most is not None and self.ends_after_last and self._state.accepted >= most:
                self.begin(None)

    # -- the steps ---------------------------------------------------------------------------------------------------

    def run(self, timeout: float | None, leave_listening: bool, ended_before: int) -> None:
        """Do the steps of the stop, in a greenlet of its own. Each is done even if those before it failed."""
        state, steps, lingerer = self._state, self._steps, self._server.lingerer
        drain = not (leave_listening or state.hurry.is_set())
        until = None if timeout is None else monotonic() + timeout
        cut: list[CutConnection] = []
        unserved: list[CutConnection] = []
        try:
            if drain:
                for acceptor in state.acceptors:
                    steps.do("begin no new connections", acceptor.mute)
            steps.do("tell handlers", state.stopping_event.set)
            # Idle connections end now, the others when they become idle.
            steps.do("end idle connections", self._end_idle_connections)
            if drain:
                with self._closing_loops:
                    steps.do("drain", self._drain_and_close, state.acceptors, steps)
            # Also those that a failed drain left open.
            for acceptor in state.acceptors:
                steps.do("close the accept loop", acceptor.close)
                steps.do("close the listening socket", partial(acceptor.listener.close, keep_path=leave_listening))
            steps.do("tell that listening has ended", state.listening_ended.set)
            steps.do("wait for handlers", self._wait_until_nobody_is_connected, until)
            if self._server.mover is not None:
                steps.do("move no more", self._server.mover.stop)
                steps.do("end idle connections", self._end_idle_connections)
            if self._patient:
                steps.do("end silent connections", self._end_silent_connections)
            # Idle connections that were told to end do so in the loop's next turn, and are not cut.
            steps.do("let idle connections end", gevent.sleep, 0)
            self._end_unserved(steps, unserved)
            cut = steps.do("end handlers", end_handlers, state.connections, state.nobody_connected) or []
            steps.do("end tasks", self._tasks.end, until, state.hurry)
            if self._options.on_stop is not None:
                steps.do("call on_stop", self._call_on_stop, until)
            if not state.hurry.is_set():
                steps.do("wait for lingering connections", self._wait_for_lingering, until)
        finally:
            steps.do("close lingering connections", lingerer.close_all)
            steps.do("end the time limits", self._time_limits.stop)
            if self.watchdog is not None:
                steps.do("end the watchdog", self.watchdog.stop)
            if self._options.tls is not None:
                steps.do("end the watch of certificates", self._options.tls.stop_watching)
            steps.do("end greenlets", self._options.pool.retire_waiting)
            self._tell_handler()
            steps.do("leave the store of shared limits", self._server.leave_store)
            finished = state.begun - ended_before - len(cut)
            cut = unserved + cut
            self.report = StopReport(finished, len(cut), tuple(cut), tuple(steps.failures))
            state.become(State.STOPPED)
            state.stopped.set()

    def _end_unserved(self, steps: Steps, cut: list[CutConnection]) -> None:
        """End the connections that have no handler yet."""
        state = self._state
        while state.waiting:
            steps.do("end a connection", self._end_waiting, state.waiting.popleft()[0], cut)
        if state.admission is not None:
            steps.do("end handshakes", state.admission.end_all)

    def _end_waiting(self, connection: Connection, cut: list[CutConnection]) -> None:
        try:
            cut.append(describe(connection, None))
            if self._access_log is not None:
                self._access_log.write_unserved(connection, "stopped")
        finally:
            connection.abort()  # an orderly close would look like an empty answer
            if self._state.admission is not None:
                self._state.admission.left(connection)
            self._state.note_unserved()

    def _tell_handler(self) -> None:
        stopped = getattr(self._server.handler, "server_stopped", None)
        if stopped is not None:
            try:
                stopped()
            except BaseException:  # SystemExit, gevent.Timeout: the stop must be completed all the same
                log.exception("server_stopped() of the handler failed")

    def _call_on_stop(self, until: float | None) -> None:
        at_least = monotonic() + ON_STOP_SECONDS
        hurry = self._state.hurry
        called = gevent.spawn(self._guarded_on_stop)
        while not called.ready():
            hurried = hurry.is_set()
            end = at_least if hurried else max(at_least, inf if until is None else until)
            left = min(LONGEST_WITHOUT_A_LOOK, end - monotonic())
            if left <= 0:
                break
            gevent.wait([called] if hurried else [called, hurry], timeout=left, count=1)
        if not called.ready():
            log.error("on_stop did not end within the time of the stop and was cut")
            called.kill(timeout=KILL_SECONDS)

    def _guarded_on_stop(self) -> None:
        assert self._options.on_stop is not None
        process = os.getpid()
        try:
            self._options.on_stop(self._server)
        except GreenletExit:
            raise
        except BaseException:  # gevent would raise SystemExit in the main greenlet, which waits for the stop
            if os.getpid() != process:
                raise  # in a forked child, which ends by it
            log.exception("on_stop failed")

    # -- waiting -----------------------------------------------------------------------------------------------------

    def _wait_until_nobody_is_connected(self, until: float | None) -> None:
        # Look at the connections too, not only at the event: setting it may have failed.
        while self._state.somebody_is_connected() or self._somebody_moves():
            if not self._wait_a_little(self._state.nobody_connected, until):
                return

    def _somebody_moves(self) -> bool:
        """Return whether connections are on their way here, or from here and not served elsewhere yet."""
        moving, mover = self._server.moving, self._server.mover
        return (moving is not None and moving.expected > 0) or (mover is not None and mover.is_moving())

    def _wait_for_lingering(self, until: float | None) -> None:
        lingerer = self._server.lingerer
        while not lingerer.nobody_lingers.is_set():
            if not self._wait_a_little(lingerer.nobody_lingers, until, LOOK_SECONDS):
                return
            lingerer.let_silent_peers_be()

    def _wait_a_little(self, event: Event, until: float | None, longest: float | None = None) -> bool:
        """Wait for the event, at most ``longest`` seconds; return False when the stop has no time left."""
        hurry = self._state.hurry
        longest = LONGEST_WITHOUT_A_LOOK if longest is None else longest
        left = longest if until is None else min(longest, until - monotonic())
        if left <= 0 or hurry.is_set():
            return False
        if event.is_set():  # should not happen
            gevent.sleep(min(left, 0.05))
        else:
            gevent.wait([event, hurry], timeout=left, count=1)
        return True

    # -- idle connections --------------------------------------------------------------------------------------------

    def _became_idle(self, connection: Connection) -> None:
        mover = self._server.mover
        if mover is not None and mover.became_idle(connection):
            return
        if self._time_for_first_request(connection) > 0:
            self.end_idle(connection)
        else:
            connection.end_idle()

    def _end_idle_connections(self) -> None:
        mover = self._server.mover
        for connection in self._state.idle_connections():
            if mover is None or not mover.takes(connection):
                self._steps.do("end an idle connection", self.end_idle, connection)

    def _end_silent_connections(self) -> None:
        """End connections that never sent a request, at the end of a patient stop, without cutting them."""
        for connection in self._state.idle_connections():
            get_hub().loop.run_callback(end_if_idle, connection)

    def end_idle(self, connection: Connection) -> None:
        """End an idle connection, once it has had the time to send its first request."""
        left = self._time_for_first_request(connection)
        if left > 0 and not self._state.hurry.is_set():
            if left < inf:
                gevent.spawn_later(left, end_if_idle, connection)
        else:
            get_hub().loop.run_callback(end_if_idle, connection)

    def _time_for_first_request(self, connection: Connection) -> float:
        """Return the seconds left for a first byte. 0: one was received, or time is over; inf: all of the stop."""
        if connection.bytes_received:
            return 0.0
        if self._patient:
            return inf
        allowed = FIRST_REQUEST if connection.tls is None else FIRST_REQUEST_OVER_TLS
        return max(0.0, connection.accepted_at + allowed - monotonic())

    # -- listening sockets -------------------------------------------------------------------------------------------

    def close_accept_loop(self, index: int) -> None:
        """Close one accept loop; see :meth:`Server.close_accept_loop`."""
        acceptors = self._state.acceptors
        if not 0 <= index < len(acceptors):
            raise GtcpServerError(f"accept loop must be 0 to {len(acceptors) - 1}, got {index}")
        acceptor = acceptors[index]
        # One after another: each close renumbers the rest of the group.
        with self._closing_loops:
            if acceptor in acceptors and self._state.now is State.SERVING:
                self._close_accept_loop(acceptor)

    def _close_accept_loop(self, acceptor: Acceptor) -> None:
        listener = acceptor.listener
        group = next(group for group in self._state.groups if listener in group)
        if len(group) < 2:
            raise GtcpServerError(f"{listener.address} has one accept loop; use stop()")
        position = group.index(listener)
        if not steer(group, [i for i in range(len(group)) if i != position]):
            log.warning("cannot steer connections away from a socket of %s; some may be reset", listener.address)
        self._drain_and_close([acceptor])
        self._state.acceptors.remove(acceptor)
        forget_member(group, position)
        if len(group) > 1:
            # The kernel renumbered the group: the BPF program must use the new numbers.
            steer(group, range(len(group)))

    def _drain_and_close(self, acceptors: Sequence[Acceptor], steps: Steps | None = None) -> None:
        deferred = self._options.listen.defer_accept or any(acceptor.listener.muted_by_ttl for acceptor in acceptors)
        longest = LONGEST_DRAIN_OF_DEFERRED if deferred else LONGEST_DRAIN
        drain_and_close(acceptors, self._admit_drained, longest, self._state.hurry, steps)
        counters = self._state.counters
        for acceptor in acceptors:
            counters.accept_errors += acceptor.accept_errors
            counters.left_in_queue += acceptor.left_in_queue
            acceptor.accept_errors = acceptor.left_in_queue = 0

    # -- a fork (see process/forked.py) ------------------------------------------------------------------------------

    def left_in_child(self) -> None:
        """Let go of the stop: the server has stopped. Called in a forked child."""
        keep(self._greenlet)
        self._greenlet = self.watchdog = None
        self.report = StopReport(0, 0)


def end_handlers(connections: Mapping[Connection, Any], nobody_connected: Event) -> list[CutConnection]:
    """End every handler by GreenletExit. One that swallows it gets it again, and its socket is shut.

    Args:
        connections: open connections, each with its greenlet; handlers that end remove theirs.
        nobody_connected: set when ``connections`` is empty.

    Returns:
        a description of each handler when it was ended.
    """
    cut = {connection: _described(connection, greenlet) for connection, greenlet in connections.items()}
    for attempt in range(KILL_ATTEMPTS):
        if not connections:
            break
        for connection, greenlet in list(connections.items()):
            if attempt:
                _shut(connection)
            greenlet.kill(block=False)
        nobody_connected.wait(KILL_SECONDS)
    for connection, greenlet in list(connections.items()):
        cut[connection] = _described(connection, greenlet, ended=False)
        log.error("a handler would not end: %s", cut[connection])
    return list(cut.values())


def _described(connection: Connection, greenlet: Any, ended: bool = True) -> CutConnection:
    """Describe a connection; an error in that must not keep its handler from being ended."""
    try:
        return describe(connection, greenlet, ended)
    except Exception as error:
        return CutConnection("?", 0.0, 0, 0, (f"({str(error) or type(error).__name__})",), ended)


def _shut(connection: Connection) -> None:
    try:
        connection.stream.sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # closed already
