"""Mover: moves the connections of one worker, both those that leave it and those that come."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

from gevent.hub import Waiter, get_hub
from greenlet import getcurrent

from gtcpserver.connection.connection import Connection, session_of
from gtcpserver.connection.moving import BUSY, session_made
from gtcpserver.diagnostics.logs import FaultLimiter, also, fault_key
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import register
from gtcpserver.server.moving import FOR_NOW, FULL, Moving, Refused
from gtcpserver.server.server import Server

from .leaving import LeavingConnection
from .line import Line
from .messages import Packet
from .receiver import Receiver
from .sender import Sender

log = logging.getLogger("gtcpserver")

#: Seconds until a connection is offered again that was refused for now, and between two looks for those that can move
#: by now. A new worker with a full pool is not helped by more.
AGAIN_SECONDS = 1.0

#: Seconds between two looks for offers that were not answered.
LOOK_SECONDS = 0.1

#: Most lines at once from one worker that leaves: one is used, and another one for each rebalance. A worker that was
#: taken over, and asks the master for more and more of them, must not fill this one's table of descriptors.
MOST_FROM_ONE = 4

#: Seconds without a line to any worker after which connections no longer wait for one, and drain. The master replaces a
#: dead worker within this time.
PATIENCE_SECONDS = 10.0


class Mover:
    """The handovers of one worker.

    Args:
        server: its server, with ``handover``.
        when_settled: called once after `leave`, when every connection that was idle has moved, or stays.
        when_shared: called when all shares are given.
        when_alone: called now and then after `leave`, while there are connections, but no line to a worker.
    """

    def __init__(
        self,
        server: Server,
        when_settled: Callable[[], Any] = lambda: None,
        when_alone: Callable[[], Any] = lambda: None,
        when_shared: Callable[[], Any] = lambda: None,
    ) -> None:
        assert server.moving is not None
        self.moving: Moving = server.moving
        self._when_settled: Callable[[], Any] | None = when_settled
        self._when_alone = when_alone
        self._when_shared = when_shared
        self._senders: list[tuple[Sender, Line]] = []
        self._shares: dict[Sender, deque[LeavingConnection]] = {}  # of the lines that get no more than these
        self._receivers: list[tuple[Receiver, Line, int]] = []  # the last is the giver
        self._queue: deque[LeavingConnection] = deque()
        self._under_way: dict[Connection, LeavingConnection] = {}
        self._pump_is_due = False
        self._timers: list[Any] = []
        self._leaving = self._hurries = self._stopped = self._is_sharing = False
        self._alone_since = self._looked_at = 0.0
        self._given: set[LeavingConnection] = set()  # not reported as served yet
        self._faults = FaultLimiter(burst=1, interval=60.0)
        register(self)
        server.mover = self

    # -- lines, which the master makes -------------------------------------------------------------------------------

    def send_on(self, fd: int, share: int | None = None) -> None:
        """Use a line to a worker that stays.

        Args:
            fd: its descriptor, which belongs to the line from now on.
            share: give it so many idle connections or tunnels, and close the line; None: all, once this worker leaves.
        """
        sender: Sender
        line = Line(fd, lambda packet, fds: self._hear(sender, packet, fds), lambda: self._lost(sender), self._pump)
        try:
            sender = Sender(line.send, monotonic)
            self._start_looking()
            if share is not None:
                self._shares[sender] = self._chosen(share)
                self._is_sharing = True
            self._senders.append((sender, line))
        except BaseException:  # memory ran out: the other end meets the end of the line
            line.close()
            raise
        self._want_pump()

    def _chosen(self, count: int) -> deque[LeavingConnection]:
        """Return idle connections and tunnels that may move, the oldest first."""
        chosen: deque[LeavingConnection] = deque()
        for connection in self.moving.connections():
            if len(chosen) >= count:
                break
            if connection not in self._under_way and self.moving.may_move(connection):
                leaving = self._under_way[connection] = LeavingConnection(self, connection)
                chosen.append(leaving)
        return chosen

    def receive_on(self, fd: int, giver: int = 0) -> None:
        """Use a line from a worker that leaves.

        Args:
            fd: its descriptor, which belongs to the line from now on.
            giver: process id of that worker; 0: unknown. One that has MOST_FROM_ONE lines gets no more.
        """
        if sum(other == giver for _, _, other in self._receivers) >= MOST_FROM_ONE:
            close_descriptor(fd)
            return
        receiver: Receiver
        line = Line(
            fd,
            lambda packet, fds: receiver.hear(packet, fds),
            lambda: self._no_more_from(receiver),
            lambda: receiver.flush(),
        )
        try:
            receiver = Receiver(line.send, self._take, close_descriptor)
            self._receivers.append((receiver, line, giver))
        except BaseException:
            line.close()
            raise

    def _hear(self, sender: Sender, packet: Packet, _fds: list[int]) -> None:
        # The line closes the descriptors: nobody sends any in this direction.
        sender.hear(packet)
        self._pump()

    def _lost(self, sender: Sender) -> None:
        self._senders = [pair for pair in self._senders if pair[0] is not sender]
        if not self._senders:
            self._alone_since = monotonic()
        sender.end()
        self._drop_share(sender, "gone")
        self._pump()

    def _drop_share(self, sender: Sender, why: str) -> None:
        for leaving in self._shares.pop(sender, ()):
            leaving.stays(why)

    def _end_shares(self) -> None:
        """Close the lines on which everything was given that had to be, and tell when these were the last."""
        if not self._is_sharing:
            return
        for sender, line in list(self._senders):
            if sender in self._shares and not self._shares[sender] and not len(sender):
                del self._shares[sender]
                line.close()
                self._senders = [pair for pair in self._senders if pair[0] is not sender]
        if not self._shares:
            self._is_sharing = False
            self._when_shared()

    def _no_more_from(self, receiver: Receiver) -> None:
        self._receivers = [one for one in self._receivers if one[0] is not receiver]
        receiver.end()

    # -- connections that come ---------------------------------------------------------------------------------------

    def _take(self, state: Mapping[str, Any], fds: list[int]) -> _Coming | str:
        try:
            return _Coming(self.moving, self.moving.take(state, fds))
        except Refused as refused:
            return refused.why
        except Exception as error:  # memory ran out, or the program's class failed; the descriptor is closed
            self._note_failure(error)
            return FULL

    # -- connections that leave --------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Move every connection from now on, as soon as it is idle. The server's stop is about to begin."""
        if self._leaving or self._stopped:
            return
        self._leaving = self.moving.leaves = True
        self._alone_since = monotonic()
        self._start_looking()
        self._look_for_more()

    def _start_looking(self) -> None:
        if self._timers:
            return
        for seconds, do in ((LOOK_SECONDS, self._look), (AGAIN_SECONDS, self._look_for_more)):
            timer = get_hub().loop.timer(seconds, seconds, ref=False)
            timer.start(self._go_on, do)
            self._timers.append(timer)

    def _go_on(self, do: Callable[[], Any]) -> None:
        # gevent stops the timer of a callback that raises.
        try:
            do()
        except Exception as error:
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        left_out = self._faults.allow(fault_key(type(error), error.__traceback__))
        if left_out is not None:
            log.error("a handover failed%s", also(left_out), exc_info=error)

    def _look(self) -> None:
        now = monotonic()
        # This loop stood still, perhaps for longer than offers have time: their answers are still unread.
        punctual, self._looked_at = now - self._looked_at < 5 * LOOK_SECONDS, now
        for sender, line in list(self._senders):
            if punctual:
                sender.look()
            if sender.is_useless():
                line.close()
                self._lost(sender)
        if self._leaving and not self._has_hope():
            self._give_up_all()
        self._pump()
        self._end_shares()
        self._tell_if_settled()
        if not (self._senders or self._leaving):
            self._stop_looking()

    def _stop_looking(self) -> None:
        for timer in self._timers:
            timer.close()
        self._timers = []

    def _look_for_more(self) -> None:
        """Queue the idle connections, and the tunnels, that may move now."""
        if not self._leaving or self._stopped:
            return
        now = monotonic()
        if not self._senders and now > self._alone_since and self._has_hope():
            self._when_alone()
        for connection in self.moving.connections():
            if connection not in self._under_way and self.moving.may_move(connection):
                session = session_of(connection)
                if session is None or session.not_before <= now:
                    self._enqueue(LeavingConnection(self, connection))
        self._want_pump()

    def _enqueue(self, leaving: LeavingConnection, first: bool = False) -> None:
        self._under_way[leaving.connection] = leaving
        if first:
            self._queue.appendleft(leaving)
        else:
            self._queue.append(leaving)

    def _want_pump(self) -> None:
        if not self._pump_is_due:
            get_hub().loop.run_callback(self._pump_when_due)
            self._pump_is_due = True  # last: after a MemoryError nothing is due

    def _pump_when_due(self) -> None:
        self._pump_is_due = False
        self._pump()

    def _pump(self) -> None:
        """Offer what waits, as far as the lines have room."""
        for sender, _ in list(self._senders):
            sender.flush()
            queue = self._shares.get(sender, self._queue)
            room = min(sender.room(), -(-len(queue) // len(self._senders)))
            batch: list[LeavingConnection] = []
            try:
                while queue and len(batch) < room:
                    leaving = queue.popleft()
                    if leaving.freeze():
                        batch.append(leaving)
            finally:
                numbers = sender.offer(batch)  # what is frozen must not stay so, whatever has failed
            if batch:
                for leaving, number in zip(batch, numbers, strict=True):
                    leaving.note_offer(sender, number)
                self._senders.append(self._senders.pop(0))  # the next ones go to the next worker
        if any(self._shares.get(sender, self._queue) and sender.room() for sender, _ in self._senders):
            self._want_pump()

    def done(self, leaving: LeavingConnection) -> None:
        """Forget a connection that stays."""
        self._under_way.pop(leaving.connection, None)

    def given(self, leaving: LeavingConnection) -> None:
        """Note that a connection was given away, whose socket is still here."""
        self.done(leaving)
        self._given.add(leaving)

    def settled(self, leaving: LeavingConnection) -> None:
        """Note that its socket is closed, or its own again."""
        self._given.discard(leaving)

    def put_off(self, leaving: LeavingConnection, why: str) -> None:
        """Note why a connection stays, and whether for now."""
        self.done(leaving)
        connection = leaving.connection
        if connection.closed:
            return
        session = session_made(connection)
        if why != BUSY:  # otherwise it moves at its next idle point
            session.not_before = monotonic() + AGAIN_SECONDS
        if why not in FOR_NOW:
            session.stays, _, details = why.partition(": ")
            if details:
                self._note_fault(details)
        if self._leaving and (session.stays or self._hurries) and not leaving.waits:
            get_hub().loop.run_callback(self._end_if_idle, connection)

    def _end_if_idle(self, connection: Connection) -> None:
        if connection.is_idle and not connection.closed and connection not in self._under_way:
            self.moving.end_idle(connection)

    def _note_fault(self, details: str) -> None:
        """Log that the program has put something into a session that is no JSON value."""
        left_out = self._faults.allow("session")
        if left_out is not None:
            log.error("a session cannot be handed over, its connection stays: %s%s", details, also(left_out))

    def come_back(self, state: Mapping[str, Any], fds: list[int]) -> None:
        """Serve a connection here again that was given away."""
        connection = self.moving.take(state, fds, returns=True)
        self.moving.begin(connection, returns=True)

    # -- what a stop asks (server/moving.py) -------------------------------------------------------------------------

    def began_relay(self, connection: Connection) -> None:
        if self._has_hope() and connection not in self._under_way:
            session = session_of(connection)
            if session is None or session.not_before <= monotonic():
                self._enqueue(LeavingConnection(self, connection))
                self._want_pump()

    def takes(self, connection: Connection) -> bool:
        if not self._has_hope():
            return False
        if connection in self._under_way:
            return True
        return not self._hurries and self.moving.why_not(connection) in ("", BUSY)

    def became_idle(self, connection: Connection) -> bool:
        me = getcurrent()
        if not self._has_hope():
            return False
        if connection in self._under_way:
            return True  # it waits in the queue since its last idle block
        why = self.moving.why_not(connection, me)
        if why:
            return why == BUSY and not self._hurries
        session = session_of(connection)
        if session is not None and session.not_before > monotonic():
            return not self._hurries
        leaving = LeavingConnection(self, connection, Waiter())
        self._enqueue(leaving, first=True)
        self._want_pump()
        leaving.wait()
        return leaving.connection.closed or self.takes(connection)

    def _has_hope(self) -> bool:
        """Return whether some worker may take connections."""
        if not self._leaving or self._stopped:
            return False
        return bool(self._senders) or monotonic() - self._alone_since < PATIENCE_SECONDS

    def _give_up_all(self) -> None:
        queue, self._queue = self._queue, deque()
        for leaving in queue:
            leaving.stays("nobody")
        for connection in self.moving.connections():
            if connection.is_idle and connection not in self._under_way and not connection.stream.ending:
                self.moving.end_idle(connection)

    def _tell_if_settled(self) -> None:
        if self._leaving and self._when_settled is not None and not (self._queue or self._under_way or self._given):
            when_settled, self._when_settled = self._when_settled, None
            when_settled()

    def staying(self) -> dict[str, int]:
        if not self._leaving:
            return {}
        why: Counter[str] = Counter()
        for connection in self.moving.connections():
            session = session_of(connection)
            if connection in self._under_way:
                why["moving"] += 1
            elif not (session is not None and session.moved):
                why[self.moving.why_not(connection) or "refused"] += 1
        return dict(why)

    def is_moving(self) -> bool:
        return bool(self._given)

    def hasten(self) -> None:
        self._hurries = True

    def stop(self) -> None:
        self._stopped = True
        self._stop_looking()
        for sender in list(self._shares):
            self._drop_share(sender, "stopping")
        queue, self._queue = self._queue, deque()
        for leaving in queue:
            leaving.stays("stopping")
        for sender, _ in self._senders:
            sender.withdraw_all("stopping")

    # -- a fork in this process (see process/forked.py) --------------------------------------------------------------

    def serves(self) -> bool:
        return bool(self._senders or self._receivers)

    def left_in_child(self, _own: Any) -> None:
        """Close the child's copies. Called in a forked child."""
        for line in (*(line for _, line in self._senders), *(line for _, line, _ in self._receivers)):
            line.left_in_child()
        for leaving in (*self._under_way.values(), *self._given):
            leaving.left_in_child()
        self._senders, self._receivers, self._timers = [], [], []
        self._stopped = True


class _Coming:
    """A connection that comes, for the Receiver."""

    __slots__ = ("_connection", "_moving")

    def __init__(self, moving: Moving, connection: Connection) -> None:
        self._moving = moving
        self._connection = connection

    def begin(self) -> None:
        get_hub().loop.run_callback(self._moving.begin, self._connection)

    def drop(self) -> None:
        self._moving.drop(self._connection)
