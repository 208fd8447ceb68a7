"""Serving: a connection from accept to close. Admit it, run its handler, name its outcome, end it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from greenlet import GreenletExit

from gtcpserver.connection.blocks import Idle
from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import FaultLimiter
from gtcpserver.errors import ClientRefused
from gtcpserver.linux import TCP_INFO
from gtcpserver.process.forked import end_process
from gtcpserver.transfer.ends import reset_on_close

from .idle import PlacelessIdle
from .observers import Observers
from .outcome import COUNTER, Result, log_client_error, log_fault, outcome_of, system_has_failed
from .state import State
from .timed_idle import TimedIdle

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (serving.pxd).
    from greenlet import getcurrent

    from gtcpserver.connection.lifecycle import end, forget_idle_block, set_address, set_owner, stream_of

    from .capacity import Capacity
    from .state import ServerState

    if TYPE_CHECKING:
        from gtcpserver.c import import_greenlet
if cython.compiled:
    import_greenlet()

if TYPE_CHECKING:
    from .options import Options
    from .server import Server

#: The time in the queue is measured for one accepted connection in this many: getsockopt(TCP_INFO) costs 0.8 us.
QUEUE_WAIT_EVERY = 64
_QUEUE_WAIT_EVERY = QUEUE_WAIT_EVERY  # compiled, a number in C


class Serving:
    """Serves the connections of one server.

    Attributes:
        handler: called with each connection.
        observers: objects that are told how long requests take.
    """

    def __init__(self, server: Server, options: Options, state: ServerState, capacity: Capacity) -> None:
        self._server = server
        self._state = state
        self._counters = state.counters
        self._connections = state.connections
        self._capacity = capacity
        self._pool = options.pool
        self.handler = options.handler
        self._on_connect = options.on_connect
        self._on_disconnect = options.on_disconnect
        self._on_error = options.on_error
        self._access_log = options.access_log
        self._context = options.context
        self._timeout = options.timeout
        self._max_accepts = options.max_accepts
        self._max_connections = options.max_connections
        self._rejects = options.on_full == "reject"
        self._limits_clients = options.client_limits is not None
        self.observers = Observers()
        self._faults = FaultLimiter()
        self._in_child = False
        # One bound method for all connections: 64 bytes each.
        self._serve: Callable[[Connection], None] = self.serve
        #: Does the last steps of a connection: without an access log, with one, or in a forked child.
        self._finish: Callable[[Connection], Any] = self._end if self._access_log is None else self._end_and_log

    # -- admit a connection (in the hub) -----------------------------------------------------------------------------

    def admit(self, connection: Connection, address: Any, drained: bool = False) -> None:
        """Hand an accepted connection to a greenlet, which runs until its handler first waits.

        Args:
            connection: the connection.
            address: the client's, as ``accept`` returned it.
            drained: True for a connection that a stop took out of the kernel's queue: it waits for room in ours.
        """
        state = self._state
        if self._max_accepts is not None and self._has_accepted(self._max_accepts):
            connection.close()  # accepted between the last one and the end of the loop
            return
        if self._rejects and not drained and not self._capacity.has_room() and state.now is State.SERVING:
            if not self._capacity.is_asking():
                self._reject(connection, address)
                return
            drained = True  # until Redis has answered
        state.accepted = number = state.accepted + 1
        if not number % _QUEUE_WAIT_EVERY:
            self._measure_queue_wait(connection)
        set_address(connection, address)
        try:
            if drained:
                self._wait_for_room(connection)
            else:
                self.begin(connection)
        finally:
            if self._max_accepts is not None:
                self._note_accepted(number)

    def _wait_for_room(self, connection: Connection) -> None:
        self._state.note_somebody_comes()
        try:
            self._capacity.wait(connection, self.begin)
        except BaseException:
            self._cannot_serve(connection)
            raise

    def _cannot_serve(self, connection: Connection) -> None:
        # Memory ran out. A reset tells the client; an orderly close would look like an empty answer.
        if not connection.closed:  # neither closed by admission, nor served to its end
            try:
                connection.abort()
            finally:
                self._state.note_unserved()

    def begin(self, connection: Connection) -> None:
        """Admit or serve a connection that has room. Call in the hub only."""
        set_owner(connection, self._server, self._context)
        if self._timeout is not None:
            connection.timeout = self._timeout
        try:
            admission = self._state.admission
            if admission is None:
                self._pool.run_one(self._serve, connection)
            else:
                self._state.note_somebody_comes()
                admission.enter(connection)
        except BaseException:
            self._cannot_serve(connection)
            raise

    def admitted(self, connection: Connection) -> None:
        """Serve a connection that passed admission, as soon as there is room."""
        capacity = self._capacity
        if not self._state.waiting and capacity.has_room():
            self._pool.run_one(self._serve, connection)
        else:
            capacity.wait(connection, self._serve_admitted)

    def _serve_admitted(self, connection: Connection) -> None:
        try:
            self._pool.run_one(self._serve, connection)
        except BaseException:
            assert self._state.admission is not None
            self._state.admission.not_served(connection)
            raise

    def _reject(self, connection: Connection, address: Any) -> None:
        self._counters.rejected += 1
        connection.client_address = address
        connection.server = self._server  # whose lingerer closes it
        try:
            if self._access_log is not None:
                self._access_log.write_unserved(connection, "rejected")
            self._server.note_rejected(connection)
        finally:
            end(connection)

    def fleet_answered(self) -> None:
        """Let in what waits, now that it is known whether other machines have left room. Call in the hub only."""
        self._capacity.let_in()
        if self._rejects and self._state.now is State.SERVING and not self._capacity.is_asking():
            for connection in self._capacity.take_out(self.begin):
                try:
                    self._reject(connection, connection.client_address)
                finally:
                    self._state.note_unserved()

    def _has_accepted(self, most: int) -> bool:
        service = self._capacity.service
        return self._state.accepted >= most if service is None else service.has_accepted_all()

    def _note_accepted(self, number: int) -> None:
        service = self._capacity.service
        if service is not None:
            service.note_accepted()
        elif number == self._max_accepts:
            self._stop_after_last()

    def _stop_after_last(self) -> None:
        for acceptor in self._state.acceptors:
            acceptor.leaving = True
            acceptor.stop_accepting()
        gevent.spawn(self._server.stop, None)

    def _measure_queue_wait(self, connection: Connection) -> None:
        # tcpi_last_data_sent (linux/tcp.h, milliseconds): nothing was sent yet, so it is the time since the handshake.
        try:
            info = connection.stream.sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 48)
        except OSError:
            return  # not TCP
        waited = struct.unpack_from("=I", info, 44)[0] / 1000
        counters = self._counters
        counters.queue_wait_samples += 1
        counters.queue_wait_total += waited
        counters.queue_wait_max = max(counters.queue_wait_max, waited)

    # -- serve it (in its greenlet) ----------------------------------------------------------------------------------

    def serve(self, connection: Connection) -> None:
        """Run the handler, and end the connection."""
        connections = self._connections
        state = self._state
        if self._access_log is not None:
            self._begin_line(connection)
        try:
            if not connections:
                state.note_somebody_comes()
            connections[connection] = getcurrent()
            if len(connections) > state.peak:
                state.peak = len(connections)
            if self._capacity.service is not None:
                self._capacity.service.tell()  # before the client hears anything
            try:
                if self._on_connect is None or self._on_connect(connection) is not False:
                    self.handler(connection)
                else:
                    self._counters.refused += 1
                    self.note_end(connection, "refused")
            except BaseException as error:
                self._handler_raised(connection, error)
            try:
                if self._on_disconnect is not None:
                    self._on_disconnect(connection)
            except BaseException as error:
                self._handler_raised(connection, error)
        finally:
            # Hooks and log handlers may wait, and a greenlet that waits can be killed.
            self._finish(connection)

    def _begin_line(self, connection: Connection) -> None:
        assert self._access_log is not None
        try:
            self._access_log.begin(connection)
        except BaseException:
            self._end(connection)
            raise

    def _end(self, connection: Connection) -> None:
        """Do the last steps of a connection. Nothing here waits, so no kill can come in between; memory may run out."""
        state = self._state
        stream = stream_of(connection)
        state.bytes_received += stream.bytes_received
        state.bytes_sent += stream.bytes_sent
        if self.observers.all:
            self._observe_end(connection)
        forget_idle_block(connection)
        connections = self._connections
        was_full = self._max_connections is not None and (
            self._capacity.service is not None
            or self._capacity.fleet is not None
            or len(connections) >= self._max_connections
        )
        try:
            if not stream.closed:
                end(connection)
        finally:
            if self._limits_clients and state.admission is not None:
                state.admission.left(connection)
            try:
                del connections[connection]
            except KeyError:
                pass  # memory ran out before it was added
            try:
                if not connections:
                    state.note_if_nobody_is_connected()
            finally:
                if was_full:
                    self._capacity.made_room()

    def _end_and_log(self, connection: Connection) -> None:
        access_log = self._access_log
        assert access_log is not None
        try:
            fields = access_log.end(connection)
        finally:
            self._end(connection)
        access_log.write(fields)

    def _observe_end(self, connection: Connection) -> None:
        """Tell observers of the last request, or of the whole connection where the handler used no idle block."""
        idle = connection.idle_block
        try:
            if idle is None:
                self.observers.request_ended(monotonic() - connection.accepted_at)
            elif isinstance(idle, TimedIdle):
                idle.end_of_request()
        except BaseException:
            pass  # lose a figure, but finish the connection

    # -- how it ended --------------------------------------------------------------------------------------------

    def note_end(self, connection: Connection, result: Result, detail: str = "") -> None:
        """Record how a connection ends, for its line in the access log; only the first call counts."""
        if self._access_log is not None:
            self._access_log.note(connection, result, detail)

    def _handler_raised(self, connection: Connection, error: BaseException) -> None:
        """Count an exception that left the handler; log it only if it is a fault of the handler."""
        if self._in_child:
            end_process(error)
        if isinstance(error, GreenletExit):
            self.note_end(connection, "stopped" if self._state.stopping else "killed")
            return
        if system_has_failed(error):
            # The client is there and waits for the rest. An orderly close would make a part look like the whole.
            reset_on_close(connection)
        result, said = outcome_of(error, connection)
        counters = self._counters
        setattr(counters, COUNTER[result], getattr(counters, COUNTER[result]) + 1)
        self.note_end(connection, result, said)
        if self._on_error is not None:
            try:
                self._on_error(connection, error)
                return
            except GreenletExit:
                return
            except BaseException as own:
                error, result = own, outcome_of(own, connection)[0]
        if result == "error":
            log_fault(self._faults, connection, error)
        else:
            log_client_error(connection, error)

    # -- what a connection asks of its server (connection/owner.py) --------------------------------------------------

    def make_idle(self, connection: Connection) -> Idle:
        observers = self.observers
        if observers.all:
            return TimedIdle(connection, self._state, self._capacity, observers)
        return PlacelessIdle(connection, self._state, self._capacity)

    def client_named(self, connection: Connection) -> None:
        """Count the client that a balancer named.

        Raises:
            ClientRefused: the client exceeds a limit. The connection was reset.
        """
        admission = self._state.admission
        refusal = admission.named(connection) if admission is not None else None
        if refusal is not None:
            self.note_end(connection, refusal)
            connection.abort()
            raise ClientRefused(refusal)

    # -- a fork in a handler (see process/forked.py) -----------------------------------------------------------------

    def left_in_child(self) -> None:
        """End the process when the handler that forked returns. Called in a forked child."""
        self._connections = self._state.connections
        self.handler = lambda _connection: end_process()
        self._on_disconnect = None
        self._in_child = True
        self._finish = lambda _connection: end_process()
