"""Acceptor: one accept loop on one listening socket."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent.server
from gevent._hub_local import get_loop
from gevent.event import Event

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import GtcpServerError
from gtcpserver.listening.draining import accept_any_ttl
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import keep, register
from gtcpserver.process.watcher import watch

if TYPE_CHECKING:
    from gtcpserver.listening.listener import Listener

log = own_logger("gtcpserver.accept")

#: The system is out of descriptors or memory: trying again at once would fail again, so the loop backs off.
CAPACITY_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: The listening socket itself is gone or was never one. Everything else concerns one connection that is lost already
#: (accept(2), "Error handling": treat like EAGAIN), so the next accept follows without a pause.
FATAL_ERRNOS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})

#: This many failures in a row are not the fault of single connections: the loop backs off instead of spinning.
FAILURES_IN_A_ROW = 100

FIRST_DELAY = 0.01  # seconds; doubles with each failure in a row
LONGEST_DELAY = 1.0  # seconds; the longest time until a recovered system is noticed

#: This many connections in a row count as fresh. Those behind them have been queued for a while, as have those that
#: waited for a place: of them it is asked whether the client is still there (0.5 us).
FRESH = 4

#: Seconds between two log lines about failing accepts.
LOG_INTERVAL = 1.0


_new = object.__new__
_RawSocket = Connection._gevent_sock_class  # noqa: SLF001 - gevent's


def _is_plain(connection_class: type[Connection]) -> bool:
    """Whether instances are made as those of Connection are."""
    return (
        connection_class.__init__ is Connection.__init__
        and connection_class.__new__ is Connection.__new__
        and connection_class._gevent_sock_class is _RawSocket  # noqa: SLF001
    )


class Acceptor(gevent.server.StreamServer):  # type: ignore[misc]
    """An accept loop: makes a Connection of each accepted socket and calls ``handle(connection, address)`` in the hub.

    Args:
        listener: a listening socket, non-blocking, or whatever ``gevent.server.StreamServer`` takes.
        handle: called for each connection, in the event loop: it must not wait.
        full: asked before each accept; while it is true nothing is accepted. Who made it true calls
            :meth:`resume`. None: as gevent's pool says.
        place_wanted: called when it was full and a connection is queued.
        on_fatal: called with the OSError when the listening socket cannot accept any more.
    """

    connection_class: type[Connection] = Connection
    #: Functions in the place of `full` and `do_handle`, the methods that a gevent server has: a hop of 20 ns less each.
    is_full: Callable[[], bool] | None = None
    hand_over: Callable[[Any, Any], Any] | None = None
    _on_full: Callable[[], Any] | None = None
    _on_fatal: Callable[[OSError], None] | None = None
    #: Reads in the place of `do_read`, once new connections are kept away by their TTL.
    _read_muted: Callable[[], tuple[Any, Any] | None] | None = None
    _last_logged = -LOG_INTERVAL
    #: Errors of accept so far.
    accept_errors = 0
    #: Connections whose clients had left (by a reset) while they were queued; nobody has seen them.
    left_in_queue = 0
    #: Connections have waited for a place, and the queue has not been empty since.
    _behind = False
    _failures = 0
    _drain_failed = False
    _watcher: Any
    _timer: Any
    _stop_event: Any
    loop: Any
    #: Its socket is being drained, or accepts no more for another reason of its owner's.
    leaving = False

    def __init__(
        self,
        listener: Any,
        handle: Callable[[Any, Any], Any] | None = None,
        *,
        full: Callable[[], bool] | None = None,
        place_wanted: Callable[[], Any] | None = None,
        on_fatal: Callable[[OSError], None] | None = None,
        connection_class: type[Connection] = Connection,
    ) -> None:
        super().__init__(listener, handle=handle, spawn=None)
        self.is_full = full
        self._on_full = place_wanted
        self._on_fatal = on_fatal
        self.connection_class = connection_class

    @classmethod
    def on(cls, listener: Listener, handle: Callable[[Any, Any], Any], **options: Any) -> Acceptor:
        """An acceptor on a :class:`~gtcpserver.listening.listener.Listener`, kept as ``acceptor.listener``."""
        acceptor = cls(listener.socket, handle, **options)
        acceptor.listener = listener
        acceptor.hand_over = handle
        return acceptor

    listener: Listener

    def init_socket(self) -> None:
        super().init_socket()
        sock = self.socket
        # Plain numbers: the socket module's enums cost 1 us for each new connection.
        self._kind = (int(sock.family), int(sock.type), int(sock.proto))
        register(self)
        self._make = self._make_plain if _is_plain(self.connection_class) else self._make_any

    def do_read(self) -> tuple[Any, Any] | None:
        try:
            fd, address = self.socket._accept()  # noqa: SLF001 - the standard library's
        except BlockingIOError:
            return None
        return self._make(fd), address

    def _make_plain(self, fd: int) -> Connection:
        """A Connection by the shortest way: 1 us less than the constructor of a class that may do anything."""
        family, kind, protocol = self._kind
        try:
            connection: Connection = _new(self.connection_class)
            sock = _RawSocket(family, kind, protocol, fd)
        except BaseException:
            close_descriptor(fd)  # nobody has it yet
            raise
        connection._begin(sock)  # noqa: SLF001 - a subclass may well have a method `begin`
        return connection

    def _make_any(self, fd: int) -> Connection:
        connection_class = self.connection_class
        connection = connection_class.__new__(connection_class, *self._kind, fd)  # type: ignore[call-arg]
        try:
            connection_class.__init__(connection, *self._kind, fd)
        except BaseException as error:
            try:
                # Not getattr: gevent's sockets look up what they miss in their _sock.
                connection_class._sock.__get__(connection).close()  # noqa: SLF001 - gevent's
            except AttributeError:
                close_descriptor(fd)  # it failed before the socket was made
            if isinstance(error, Exception):
                # An OSError of its own must not be taken for one of accept.
                raise GtcpServerError(f"{connection_class.__name__} could not be made") from error
            raise
        return connection

    def do_handle(self, *args: Any) -> None:
        self._handle(*args)

    def _do_read(self) -> None:
        """The watcher's callback: accept until the queue is empty, the server full, or ``max_accept`` is reached."""
        accepted: tuple[Any, ...] = ()
        full = self.is_full or self.full
        read_one = self._read_muted or self.do_read
        handle = self.hand_over or self.do_handle
        # gevent stops the watcher of a callback that raises, and nobody would start it again.
        try:
            for number in range(self.max_accept):
                accepted = ()
                if full():
                    if number:
                        # The watcher calls again if another one is queued: only then is a place wanted.
                        return
                    self.stop_accepting()
                    self._behind = True
                    self._place_wanted()
                    return
                try:
                    read = read_one()
                except OSError as error:
                    if self._accept_failed(error):
                        return
                    continue
                if read is None:
                    self._behind = False
                    return
                if self._failures:
                    self._failures = 0
                    self.delay = FIRST_DELAY
                accepted = connection, address = read
                if (number >= FRESH or self._behind) and self._has_left(connection):
                    continue
                handle(connection, address)
                if self._watcher is None:
                    # The handler has run until its first wait, and may have stopped the server.
                    return
        except BaseException:
            self._handle_failed(accepted)

    def start_accepting(self) -> None:
        if self._watcher is None:
            watcher = watch(self.loop, self.socket.fileno(), 1)
            watcher.start(self._do_read)
            self._watcher = watcher

    def throw(self, error: OSError) -> None:
        """The event loop cannot watch the listening socket."""
        self.accept_errors += 1
        self._log_and_back_off(error)

    def is_deaf(self) -> bool:
        """Nothing will ever be accepted again, and there is no reason for it."""
        waits = self._timer is not None and self._timer.active
        watches = self._watcher is not None and self._watcher.active
        return not (watches or waits or self.closed or self.leaving or (self.is_full or self.full)())

    def _has_left(self, connection: Connection) -> bool:
        # A reset that came while the connection was queued (0.4 us). One that was closed in order may still want its
        # answer: that one is served.
        try:
            if not connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # noqa: SLF001 - gevent's
                return False
        except OSError:
            return False  # it could not be asked
        self.left_in_queue += 1
        connection.close()
        return True

    def _place_wanted(self) -> None:
        """The server is full and a connection is queued. Who gives the place calls :meth:`resume`."""
        if self._on_full is not None:
            self._on_full()

    def resume(self, _who: Any = None) -> None:
        """Accept again after the server was full."""
        self._start_accepting_if_started()

    def _accept_failed(self, error: OSError) -> bool:
        """Note the error; True if the loop must leave off now."""
        self.accept_errors += 1
        if error.errno in FATAL_ERRNOS:
            log.critical("the listening socket %s is gone: %s", self.address, error)
            self.close()
            if self._on_fatal is not None:
                self._on_fatal(error)
            return True
        self._failures += 1
        if error.errno not in CAPACITY_ERRNOS and self._failures < FAILURES_IN_A_ROW:
            log.debug("accept on %s: %s", self.address, error)
            return False
        self._log_and_back_off(error)
        return True

    def _log_and_back_off(self, error: OSError) -> None:
        now = monotonic()
        if now - self._last_logged >= LOG_INTERVAL:
            self._last_logged = now
            log.error("cannot accept on %s: %s; new connections wait in the kernel's queue", self.address, error)
        self._back_off()

    def _back_off(self) -> None:
        # The timer first: without it, the watcher goes on.
        timer = self.loop.timer(self.delay)
        timer.start(self._start_accepting_if_started)
        self.stop_accepting()
        self._timer = timer
        self._behind = True
        self._failures = self._failures or 1
        self.delay = min(LONGEST_DELAY, self.delay * 2)

    def _handle_failed(self, accepted: tuple[Any, ...]) -> None:
        error = sys.exc_info()
        try:
            self._back_off()
        finally:
            self.loop.handle_error((accepted[1:], self), *error)

    def serves(self) -> bool:
        return self._watcher is not None or self._timer is not None

    def left_in_child(self, _own: Any = None) -> None:
        """In a forked child: close the listening socket there. One that does not accept yet is the child's as well."""
        if self.closed or not self.serves():
            return
        keep(self._stop_event)  # who waits for it is a copy
        self._watcher = self._timer = None
        self._stop_event = Event()
        self._stop_event.set()
        self.loop = get_loop() or self.loop
        self.socket.close()
        self.close()

    def mute(self) -> bool:
        """Begin no new connections; those whose handshake is under way are accepted as ever. See `Listener.mute`."""
        muted = self.listener.mute()
        if self.listener.muted_by_ttl:
            # In this one place, so that accepting costs nothing more as long as nothing is muted.
            self._read_muted = self._read_with_any_ttl
        return muted

    def _read_with_any_ttl(self) -> tuple[Any, Any] | None:
        accepted = self.do_read()
        if accepted is not None:
            accept_any_ttl(accepted[0])
        return accepted

    def drain(self, accept: Callable[[Any, Any], Any]) -> int:
        """Take what the kernel has queued now, whether full or not; call ``accept(connection, address)`` for each.

        Returns:
            the number of connections taken.
        """
        taken = failures = 0
        if self.closed:
            return taken  # after a fatal error
        while True:
            try:
                accepted = (self._read_muted or self.do_read)()
            except OSError as error:
                failures += 1
                if error.errno in CAPACITY_ERRNOS | FATAL_ERRNOS or failures >= FAILURES_IN_A_ROW:
                    if not self._drain_failed:  # it is tried again, many times a second
                        self._drain_failed = True
                        log.error("cannot drain %s: %s", self.address, error)
                    return taken
                continue
            except GtcpServerError:
                self.loop.handle_error(self, *sys.exc_info())
                continue
            if accepted is None:
                return taken
            failures = 0
            if not self._has_left(accepted[0]):
                taken += 1
                accept(*accepted)
