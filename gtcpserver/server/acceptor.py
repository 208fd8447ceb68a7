"""Acceptor: one accept loop on one listening socket."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent.server
from gevent._hub_local import get_loop
from gevent.event import Event

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import CAPACITY_ERRNOS, GtcpServerError
from gtcpserver.listening.draining import accept_any_ttl
from gtcpserver.process.descriptors import close_descriptor
from gtcpserver.process.forked import keep, register
from gtcpserver.process.watcher import watch

from .accept_loop import AcceptLoop

if TYPE_CHECKING:
    from gtcpserver.listening.listener import Listener

log = own_logger("gtcpserver.accept")

#: The listening socket is closed, or is none. Every other error concerns a single connection, which is lost already
#: (accept(2), "Error handling": treat like EAGAIN), so the next accept follows without a pause.
FATAL_ERRNOS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})

#: This many failures in a row are not the fault of single connections: the loop backs off instead of spinning.
FAILURES_IN_A_ROW = 100

#: Seconds of the first pause; each failure in a row doubles it.
FIRST_DELAY = 0.01

#: Seconds of the longest pause, after which a recovered system is noticed.
LONGEST_DELAY = 1.0

#: Seconds between two log lines about failing accepts.
LOG_INTERVAL = 1.0


class Acceptor(gevent.server.StreamServer):  # type: ignore[misc]
    """An accept loop: makes Connections from accepted sockets and calls ``handle(connection, address)`` in the hub.

    Args:
        listener: a non-blocking listening socket, or anything ``gevent.server.StreamServer`` takes.
        handle: called in the hub for each connection; it must not wait.
        full: called before each accept; while it returns True, nothing is accepted. Its owner calls :meth:`resume`
            afterwards. None: gevent's pool decides.
        place_wanted: called when the server is full and a connection is queued.
        on_fatal: called with the OSError when the listening socket cannot accept any more.

    Example::

        import gevent
        from gtcpserver import Acceptor

        def admit(connection, address):  # in the hub: it must not wait
            gevent.spawn(serve, connection)

        acceptor = Acceptor(("127.0.0.1", 5000), admit)
        acceptor.start()
    """

    connection_class: type[Connection] = Connection
    #: Called instead of `full` and `do_handle`, the methods of a gevent server: saves 20 ns each.
    is_full: Callable[[], bool] | None = None
    hand_over: Callable[[Any, Any], Any] | None = None
    _on_full: Callable[[], Any] | None = None
    _on_fatal: Callable[[OSError], None] | None = None
    #: Called instead of `do_read` once the TTL of the listening socket mutes it.
    _read_muted: Callable[[], tuple[Any, Any] | None] | None = None
    _last_logged = -LOG_INTERVAL
    #: Number of failed accepts so far.
    accept_errors = 0
    #: Number of connections whose clients reset them while they were queued; no handler saw them.
    left_in_queue = 0
    _accept_loop: AcceptLoop
    _drain_failed = False
    _watcher: Any
    _timer: Any
    _stop_event: Any
    loop: Any
    #: Whether the socket is being drained, or its owner stopped accepting for another reason.
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
        """Return an acceptor on a :class:`~gtcpserver.listening.listener.Listener`, kept as ``acceptor.listener``."""
        acceptor = cls(listener.socket, handle, **options)
        acceptor.listener = listener
        acceptor.hand_over = handle
        return acceptor

    listener: Listener

    def init_socket(self) -> None:
        super().init_socket()
        register(self)
        self._accept_loop = AcceptLoop(self, self.socket, self.connection_class)

    def do_read(self) -> tuple[Any, Any] | None:
        return self._accept_loop.accept()

    _own_read = do_read

    def _make(self, kind: tuple[int, int, int], fd: int) -> Connection:
        return make(self.connection_class, kind, fd)

    def do_handle(self, *args: Any) -> None:
        self._handle(*args)

    def _works_again(self) -> None:
        """accept(2) has succeeded after failures."""
        self.delay = FIRST_DELAY

    def start_accepting(self) -> None:
        if self._watcher is None:
            watcher = watch(self.loop, self.socket.fileno(), 1)
            watcher.start(self._accept_loop.run)
            self._watcher = watcher

    def throw(self, error: OSError) -> None:
        """Back off: the event loop cannot watch the listening socket (called by process/watcher.py)."""
        self.accept_errors += 1
        self._log_and_back_off(error)

    def is_deaf(self) -> bool:
        """Return whether nothing will ever be accepted again, without a reason for it."""
        waits = self._timer is not None and self._timer.active
        watches = self._watcher is not None and self._watcher.active
        return not (watches or waits or self.closed or self.leaving or (self.is_full or self.full)())

    def _place_wanted(self) -> None:
        """Ask for a place for a queued connection; :meth:`resume` is called when there is one."""
        if self._on_full is not None:
            self._on_full()

    def resume(self, _who: Any = None) -> None:
        """Accept again after the server was full."""
        self._start_accepting_if_started()

    def _accept_failed(self, error: OSError) -> bool:
        """Count and log an error of accept; return True if the loop must pause now."""
        self.accept_errors += 1
        if error.errno in FATAL_ERRNOS:
            log.critical("the listening socket %s is gone: %s", self.address, error)
            self.close()
            if self._on_fatal is not None:
                self._on_fatal(error)
            return True
        loop = self._accept_loop
        loop.failures += 1
        if error.errno not in CAPACITY_ERRNOS and loop.failures < FAILURES_IN_A_ROW:
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
        # The timer first: if it cannot be made, the watcher goes on.
        timer = self.loop.timer(self.delay)
        timer.start(self._start_accepting_if_started)
        self.stop_accepting()
        self._timer = timer
        self._accept_loop.behind = True
        self._accept_loop.failures = self._accept_loop.failures or 1
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
        """Close the child's copy of the listening socket. Called in a forked child; does nothing before the start."""
        if self.closed or not self.serves():
            return
        keep(self._stop_event)  # greenlets that wait for it are copies
        self._watcher = self._timer = None
        self._stop_event = Event()
        self._stop_event.set()
        self.loop = get_loop() or self.loop
        self.socket.close()
        self.close()

    def mute(self) -> bool:
        """Have the kernel begin no new connections; handshakes under way are completed. See `Listener.mute`."""
        muted = self.listener.mute()
        if self.listener.muted_by_ttl:
            # Set only here, so that accepting costs nothing more before.
            self._read_muted = self._read_with_any_ttl
        return muted

    def _read_with_any_ttl(self) -> tuple[Any, Any] | None:
        accepted = self.do_read()
        if accepted is not None:
            accept_any_ttl(accepted[0])
        return accepted

    def drain(self, accept: Callable[[Any, Any], Any]) -> int:
        """Accept what the kernel has queued, even on a full server; call ``accept(connection, address)`` for each.

        Returns:
            the number of connections accepted.
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
                    if not self._drain_failed:  # the drain is repeated many times a second
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
            if not self._accept_loop.has_left(accepted[0]):
                taken += 1
                accept(*accepted)


def make(connection_class: type[Connection], kind: tuple[int, int, int], fd: int) -> Connection:
    """Make a Connection of a class that may do anything. Its descriptor is closed if that fails."""
    connection = connection_class.__new__(connection_class, *kind, fd)  # type: ignore[call-arg]
    try:
        connection_class.__init__(connection, *kind, fd)
    except BaseException as error:
        try:
            # Not getattr: gevent's sockets look up what they miss in their _sock.
            connection_class._sock.__get__(connection).close()  # noqa: SLF001 - gevent's
        except AttributeError:
            close_descriptor(fd)  # it failed before the socket was made
        if isinstance(error, Exception):
            # An OSError of the constructor must not be mistaken for one of accept.
            raise GtcpServerError(f"{connection_class.__name__} could not be made") from error
        raise
    return connection
