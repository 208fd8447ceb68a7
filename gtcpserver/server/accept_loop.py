"""AcceptLoop: what an Acceptor does for each connection. Apart from it so that it can be compiled."""

# ruff: noqa: SLF001 - one class in two files

from __future__ import annotations

import os
import socket
from socket import getdefaulttimeout
from typing import TYPE_CHECKING, Any

import gevent.socket
from gevent import monkey
from gevent.hub import get_hub

from gtcpserver.connection.connection import Connection
from gtcpserver.process.descriptors import close_descriptor

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (accept_loop.pxd and lifecycle.pxd).
    from gtcpserver.connection.lifecycle import make, stream_of

    if TYPE_CHECKING:
        from gtcpserver.c import accept, accepted_address, socket_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from .acceptor import Acceptor

#: This many connections in a row count as fresh. Those behind them were queued for a while, as were those that waited
#: for a place: for these the loop asks whether the client is still there (0.5 us).
FRESH = 4

_SOL_SOCKET, _SO_ERROR = int(socket.SOL_SOCKET), int(socket.SO_ERROR)
_IP = frozenset({socket.AF_INET, socket.AF_INET6})
_USUAL = (gevent.socket.socket, monkey.get_original("socket", "socket"))

_RawSocket = Connection._gevent_sock_class


def _is_plain(connection_class: type[Connection]) -> bool:
    """Return whether instances are made as those of Connection are."""
    return (
        connection_class.__init__ is Connection.__init__
        and connection_class.__new__ is Connection.__new__
        and connection_class._gevent_sock_class is _RawSocket
    )


class AcceptLoop:
    """The accept loop of one acceptor.

    Attributes:
        behind: whether connections waited for a place, and the queue has not been empty since.
        failures: number of failed accepts in a row.
    """

    __slots__ = ("_acceptor", "_connection_class", "_is_direct", "_is_plain", "_kind", "_sock", "behind", "failures")

    def __init__(self, acceptor: Acceptor, sock: Any, connection_class: type[Connection]) -> None:
        self._acceptor = acceptor
        self._sock = sock
        # Plain numbers: the socket module's enums cost 1 us for each new connection.
        self._kind = (int(sock.family), int(sock.type), int(sock.proto))
        self._connection_class = connection_class
        self._is_plain = _is_plain(connection_class)
        # Not a socket that accepts in a way of its own.
        self._is_direct = sock.family in _IP and type(sock) in _USUAL
        self.behind = False
        self.failures = 0

    def accept(self) -> tuple[Connection, Any] | None:
        """Accept a connection; return it and its address, or None if none is queued.

        Raises:
            OSError: as accept(2).
        """
        return self._accept(get_hub(), getdefaulttimeout())

    def _accept(self, hub: Any, timeout: float | None) -> tuple[Connection, Any] | None:
        if cython.compiled and self._is_direct:
            fd = accept(self._sock)
            if fd < 0:
                return None
            try:
                address = accepted_address()
            except BaseException:
                close_descriptor(fd)  # nobody has it yet
                raise
        else:
            try:
                fd, address = self._sock._accept()  # the standard library's
            except BlockingIOError:
                return None
            if cython.compiled:
                try:
                    os.set_blocking(fd, False)
                except BaseException:
                    close_descriptor(fd)  # nobody has it yet
                    raise
        if self._is_plain:
            return make(self._connection_class, self._kind, fd, hub, timeout), address
        return self._acceptor._make(self._kind, fd), address

    def run(self) -> None:
        """The watcher's callback: accept until the queue is empty, the server full, or ``max_accept`` is reached."""
        acceptor = self._acceptor
        accepted: tuple[Any, ...] = ()
        full = acceptor.is_full or acceptor.full
        read_one: Callable[[], Any] | None = acceptor._read_muted or acceptor.do_read
        if read_one == acceptor._own_read:  # no subclass has another
            read_one = None
        handle = acceptor.hand_over or acceptor.do_handle
        hub, timeout = get_hub(), getdefaulttimeout()  # once for all of this turn
        # gevent stops the watcher of a callback that raises, and nothing would start it again.
        try:
            for number in range(acceptor.max_accept):
                accepted = ()
                if full():
                    if number:
                        # The watcher calls again if another connection is queued: only then is a place wanted.
                        return
                    acceptor.stop_accepting()
                    self.behind = True
                    acceptor._place_wanted()
                    return
                try:
                    read = self._accept(hub, timeout) if read_one is None else read_one()
                except OSError as error:
                    if acceptor._accept_failed(error):
                        return
                    continue
                if read is None:
                    self.behind = False
                    return
                if self.failures:
                    self.failures = 0
                    acceptor._works_again()
                accepted = connection, address = read
                if (number >= FRESH or self.behind) and self.has_left(connection):
                    continue
                handle(connection, address)
                if acceptor._watcher is None:
                    # The handler ran until its first wait, and may have stopped the server.
                    return
        except BaseException:
            acceptor._handle_failed(accepted)

    def throw(self, error: OSError) -> None:
        """The event loop cannot watch the listening socket: what a watcher's callback belongs to is told so."""
        self._acceptor.throw(error)

    def has_left(self, connection: Connection) -> bool:
        """Close a connection that was reset while it was queued, and return whether it was."""
        # 0.2 us. A client that closed in order may still want an answer, and is served.
        if cython.compiled:
            if not socket_error(stream_of(connection).fd):
                return False
        else:
            try:
                if not connection._sock.getsockopt(_SOL_SOCKET, _SO_ERROR):
                    return False
            except OSError:
                return False  # unknown
        self._acceptor.left_in_queue += 1
        connection.close()
        return True
