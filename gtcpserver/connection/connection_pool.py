"""Connections to a backend: a pool of them for handlers, and one that is made again whenever it is lost."""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent
from gevent.lock import Semaphore
from gevent.monkey import get_original

from gtcpserver.checks import check_number, check_whole_number
from gtcpserver.errors import CAPACITY_ERRNOS, ConfigError, GtcpServerError
from gtcpserver.linux import POLLRDHUP
from gtcpserver.process.forked import close_in_child, keep

from .back_off import BackOff, Dial
from .connection import Connection

if TYPE_CHECKING:
    from typing_extensions import Self  # which type checkers have

log = logging.getLogger("gtcpserver")

_poll: Callable[[], Any] = get_original("select", "poll")

#: Seconds of the longest pause between attempts to reach a backend: a handler's client waits for it.
LONGEST_PAUSE = 10.0

#: The same for :func:`stay_connected`, for which nobody waits.
LONGEST_PAUSE_ALONE = 30.0

#: Events that a connection between two requests must not have: it would be closed, or out of step.
_EVENTS = select.POLLIN | select.POLLPRI | POLLRDHUP


class ConnectionPool:
    r"""Connections to one backend, used by one handler at a time and kept open in between.

    A connection is reused if nothing has arrived on it since and the backend has not closed it; ``check`` can ask for
    more. One that was used in a block that raised, or with bytes left to read, is closed instead. The pool makes no
    connection ahead of time.

    If the backend cannot be reached, there is a pause before the next attempt, 0.1 s at first and at most 10 s, for all
    callers: with ``retry_for`` they wait for it, otherwise they get a ConnectionError at once.

    Args:
        address: as for :func:`connect`.
        size: most connections at once; None for no limit.
        wait_timeout: seconds to wait for a connection while ``size`` are in use; None waits forever.
        connect_timeout: seconds for each attempt to connect, with its TLS handshake.
        retry_for: seconds during which failed attempts are repeated; 0 is one attempt.
        timeout: ``settimeout`` of each connection when it is taken; None waits forever.
        idle_timeout: seconds after which an unused connection is closed. It should be shorter than the backend's own.
        max_age: seconds after which a connection is not reused; None: no limit.
        tls: True for TLS with verified certificates, or a ``gevent.ssl.SSLContext``. The connections are
            ``gevent.ssl.SSLSocket`` then (``Frames(conn, ...)`` reads messages of them); None: plain text.
        server_hostname: name to check the certificate against; None: the host of ``address``.
        check: called with a connection before it is reused; False, an OSError or an EOFError closes it,
            and another one is tried.
        connection_class: as for :func:`connect`.

    Attributes:
        connected: connections made.
        failed: attempts to connect that failed.
        reused: times that a connection was used again.

    Raises:
        ConfigError: an invalid argument.

    Example::

        from gtcpserver import ConnectionPool

        pool = ConnectionPool("10.0.0.5:7000", size=20, timeout=5)

        def handle(conn):
            question = conn.recv_until(b"\n", 1000)
            with pool.connection() as backend:
                backend.sendall(question + b"\n")
                conn.sendall(backend.recv_until(b"\n", 1000))
    """

    def __init__(
        self,
        address: str | tuple[Any, ...],
        *,
        size: int | None = 10,
        wait_timeout: float | None = 5.0,
        connect_timeout: float = 5.0,
        retry_for: float = 0.0,
        timeout: float | None = None,
        idle_timeout: float = 60.0,
        max_age: float | None = None,
        tls: Any = None,
        server_hostname: str | None = None,
        check: Callable[[Any], object] | None = None,
        connection_class: type[Connection] = Connection,
    ) -> None:
        check_whole_number("size", size, least=1, none="for no limit")
        check_number("wait_timeout", wait_timeout, least=0, none="to wait forever")
        check_number("retry_for", retry_for, least=0)
        check_number("idle_timeout", idle_timeout, above=0)
        check_number("max_age", max_age, above=0, none="for no limit")
        if check is not None and not callable(check):
            raise ConfigError(f"check must be a function that takes a connection, or None, got {check!r}")
        self._dial = Dial(address, connect_timeout, timeout, tls, server_hostname, connection_class)
        self._size = size
        self._wait_timeout = wait_timeout
        self._retry_for = retry_for
        self._idle_timeout = idle_timeout
        self._max_age = max_age
        self._check = check
        self._closed = False
        self.connected = self.failed = self.reused = 0
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._places = Semaphore(self._size) if self._size is not None else None
        #: Unused connections, the one unused for longest first; each with the times since when, and when it was made.
        self._idle: deque[tuple[Any, float, float]] = deque()
        self._made_at: dict[int, float] = {}  # by id of those in use
        self._closer: Any = None
        self._back_off = BackOff(LONGEST_PAUSE)

    @property
    def idle(self) -> int:
        """Number of unused connections."""
        return len(self._idle)

    @property
    def in_use(self) -> int:
        """Number of connections in use."""
        return len(self._made_at)

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """Take a connection for a block: ``with pool.connection() as conn: ...``.

        Raises:
            TimeoutError: all are in use for ``wait_timeout``, or the backend did not answer within
                ``connect_timeout``.
            OSError: the backend cannot be reached; socket.gaierror: it has no address.
            GtcpServerError: the pool is closed.
        """
        if os.getpid() != self._process:
            self._left_by_fork()
        places = self._places
        if places is not None and not places.acquire(timeout=self._wait_timeout):
            raise TimeoutError(
                f"all {self._size} connections to {self._dial.address} in use for {self._wait_timeout} s"
            )
        try:
            conn = self._take()
            try:
                yield conn
            except BaseException:
                self._made_at.pop(id(conn), None)
                conn.close()
                raise
            self._give_back(conn)
        finally:
            if places is not None:
                places.release()

    def close(self) -> None:
        """Close the unused connections, and those in use when their blocks end."""
        self._closed = True
        while self._idle:
            self._idle.pop()[0].close()
        if self._closer is not None:
            self._closer.kill(block=False)
            self._closer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # -- take --------------------------------------------------------------------------------------------------------

    def _take(self) -> Any:
        while not self._closed:
            found = self._reuse() if self._idle else self._connect()
            if found is None:
                continue
            conn, made_at = found
            if self._closed:  # meanwhile
                conn.close()
                break
            self._made_at[id(conn)] = made_at
            return conn
        raise GtcpServerError(f"the pool of connections to {self._dial.address} is closed")

    def _reuse(self) -> tuple[Any, float] | None:
        conn, _, made_at = self._idle.pop()
        good = False
        try:
            if self._is_quiet(conn) and not self._is_old(made_at):
                self._dial.set_timeout(conn)
                good = self._check is None or self._check(conn) is not False
        except (OSError, EOFError):
            pass  # of the check: the backend has gone
        finally:
            if not good:
                conn.close()
        self.reused += good
        return (conn, made_at) if good else None

    def _is_old(self, made_at: float) -> bool:
        return self._max_age is not None and monotonic() - made_at >= self._max_age

    @staticmethod
    def _is_quiet(conn: Any) -> bool:
        poll = _poll()
        poll.register(conn.fileno(), _EVENTS)
        return not poll.poll(0)

    def _connect(self) -> tuple[Any, float]:
        give_up = monotonic() + self._retry_for
        back_off = self._back_off
        while True:
            left = back_off.left()
            if left and monotonic() + left > give_up:
                raise ConnectionError(
                    f"not connected to {self._dial.address}: the next attempt is in {left:.1f} s; {back_off.error}"
                )
            gevent.sleep(left)
            failures = back_off.failures
            try:
                conn = self._dial()
            except OSError as error:
                if error.errno in CAPACITY_ERRNOS:
                    raise
                self.failed += 1
                back_off.failed(error, failures)
                if monotonic() + back_off.left() > give_up:
                    raise
                continue
            back_off.worked()
            self.connected += 1
            return conn, monotonic()

    # -- give back ---------------------------------------------------------------------------------------------------

    def _give_back(self, conn: Any) -> None:
        made_at = self._made_at.pop(id(conn), None)
        kept = False
        try:
            out_of_step = bool(getattr(conn, "peeked", b""))
            if not (self._closed or made_at is None or out_of_step or conn.fileno() < 0 or self._is_old(made_at)):
                if self._closer is None:
                    self._closer = gevent.spawn_later(self._idle_timeout, self._close_unused)
                self._idle.append((conn, monotonic(), made_at))
                kept = True
        finally:
            if not kept:
                conn.close()

    def _close_unused(self) -> None:
        self._closer = None
        now = monotonic()
        while self._idle and now - self._idle[0][1] >= self._idle_timeout:
            self._idle.popleft()[0].close()
        if self._idle:
            left = self._idle[0][1] + self._idle_timeout - now
            self._closer = gevent.spawn_later(max(0.01, left), self._close_unused)

    def _left_by_fork(self) -> None:
        """Let go of the parent's connections: both processes would write to them."""
        for conn, _, _ in self._idle:
            close_in_child(conn)
        keep(self._closer)
        self._begin()


def stay_connected(
    address: str | tuple[Any, ...],
    use: Callable[[Any], object],
    *,
    connect_timeout: float = 5.0,
    timeout: float | None = None,
    tls: Any = None,
    server_hostname: str | None = None,
    connection_class: type[Connection] = Connection,
) -> None:
    """Call ``use`` with a connection, and again with a new one whenever it has ended. Does not return.

    For a subscriber, or a stream of events: ``server.spawn(stay_connected, "10.0.0.5:4222", subscribe)``. A connection
    has ended when ``use`` returns, or raises an OSError or EOFError of the connection itself; any other exception ends
    this function. Between two attempts there is a pause, 0.1 s at first, twice as long each time, at most 30 s. Once
    a connection has lasted for 30 s, they begin anew.

    Args:
        address: as for :func:`connect`.
        use: called with the connection, which is closed afterwards.
        connect_timeout: seconds for each attempt to connect, with its TLS handshake.
        timeout: ``settimeout`` of each connection; None waits forever.
        tls, server_hostname: as for :class:`ConnectionPool`.
        connection_class: as for :func:`connect`.

    Raises:
        ConfigError: an invalid argument.

    Example::

        from gtcpserver import Lines, Server, stay_connected

        def subscribe(backend):
            for line in backend.frames(Lines()):
                print(line)

        def begin(server):
            server.spawn(stay_connected, "10.0.0.5:7000", subscribe)

        server = Server("127.0.0.1:5000", handle, on_start=begin)
    """
    dial = Dial(address, connect_timeout, timeout, tls, server_hostname, connection_class)
    back_off = BackOff(LONGEST_PAUSE_ALONE)
    while True:
        connected_at: float | None = None
        conn: Any = None
        error: OSError | EOFError | None = None
        try:
            conn = dial()
            connected_at = monotonic()
            if back_off.failures:
                log.info("connected to %s again", dial.address)
            with closing(conn):
                use(conn)
        except (OSError, EOFError) as caught:
            if isinstance(conn, Connection) and not conn.stream.has_raised(caught):
                raise  # of something else that `use` does
            error = caught
        if connected_at is not None and monotonic() - connected_at >= LONGEST_PAUSE_ALONE:
            back_off.worked()
        if not back_off.failures:
            log.warning("connection to %s lost, connecting again: %s", dial.address, error or "it was closed")
        back_off.failed(error)
        error = None  # its traceback has this frame: a cycle
        gevent.sleep(back_off.left())
