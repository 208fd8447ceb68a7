"""What moves a tunnel to another process: a connection, the one it is relayed to, and the relay between them.

transfer/resumption.py has the steps.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import gevent.ssl
from gevent.hub import get_hub

from gtcpserver.process.forked import close_in_children
from gtcpserver.transfer import resumption

from .connection import Connection, session_of
from .lifecycle import make
from .moving import BUSY, GREENLET, TLS, Freeze, drop, give_state, session_made, state_of, why_never

if TYPE_CHECKING:
    from gtcpserver.transfer.relay import Relay

#: Reasons to stay: the other side is no Connection, or one of another kind; a `deadline` is in effect.
SOCKET, DEADLINE = "socket", "deadline"

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def relay_of(connection: Connection) -> Relay | None:
    """Return the relay that would move with a connection."""
    session = session_of(connection)
    return None if session is None else session.relay


def why_not(connection: Connection, relay: Relay, worker: Any) -> str:
    """Return why a tunnel cannot move now; "" if it can.

    Args:
        worker: the greenlet of the connection's handler, which alone may have begun the relay.
    """
    other = relay.other_side(connection)
    if not isinstance(other, Connection):
        return TLS if isinstance(other, gevent.ssl.SSLSocket) else SOCKET
    for side in (connection, other):
        why = why_never(side)
        if why:
            return why
        if side.stream.deadline is not None:
            return DEADLINE
    if relay.greenlet is not worker or other.server is not None:
        return GREENLET
    return BUSY if relay.finished or connection.closed or other.closed else ""


class TunnelFreeze:
    """A frozen tunnel; the same interface as `Freeze`.

    Args:
        relay: the relay, paused.
        touched: as for `Freeze`.
    """

    def __init__(self, connection: Connection, relay: Relay, touched: Callable[[], Any]) -> None:
        self.over = False
        self._connection = connection
        self._relay = relay
        self._touched = touched
        self._resumption = relay.resumption(connection)
        self._freezes: list[Freeze] = []
        try:
            for side in (connection, self._resumption.other):
                self._freezes.append(Freeze(side, self.touched))
        except BaseException:
            self.over = True
            for freeze in self._freezes:
                freeze.thaw()
            raise
        relay.freeze = self

    def still_waits(self) -> bool:
        return not self._relay.finished and not any(freeze.connection.closed for freeze in self._freezes)

    def may_be_told(self) -> bool:
        return relay_of(self._connection) is self._relay

    def tell(self, worker: Any, error: BaseException) -> None:
        worker.throw(error)

    def touched(self) -> None:
        """Go on here: something needs one of the sockets, or the relay has ended."""
        if not self.over:
            self.thaw()
            self._touched()

    def thaw(self) -> None:
        self.over = True
        self._relay.freeze = None
        for freeze in self._freezes:
            if not freeze.over:
                freeze.thaw()
        self._relay.go_on()

    def descriptors(self) -> list[int]:
        """Return the descriptors of both sockets, and of the pipes."""
        sockets = [fd for freeze in self._freezes for fd in freeze.descriptors()]
        return sockets + resumption.descriptors(self._resumption)

    def give_away(self) -> list[int]:
        """End the tunnel here, and return its descriptors, which stay open. Nothing is sent."""
        # What needs memory comes first.
        fds = self.descriptors()
        for freeze in self._freezes:
            session_made(freeze.connection)
        self.over = True
        self._relay.freeze = None
        self._relay.give_away()
        for freeze in self._freezes:
            freeze.give_away()
        return fds

    def left_in_child(self) -> None:
        """Close the child's copies. Called in a forked child."""
        for freeze in self._freezes:
            freeze.left_in_child()


# -- its state, as JSON values -----------------------------------------------------------------------------------------


def kind_of(connection: Connection) -> list[int]:
    """Return family, type and protocol of a socket that is not frozen."""
    sock = connection.stream.sock
    return [int(sock.family), int(sock.type), int(sock.proto)]


def kind_in(value: Any) -> tuple[int, int, int]:
    """Read what `kind_of` wrote. Raise TypeError, ValueError."""
    family, kind, protocol = value
    for number in value:
        if type(number) is not int or not 0 <= number < 1 << 16:  # C's int, wherever they go
            raise ValueError(f"not a kind of socket: {value!r}")
    return family, kind, protocol


def add_relay(state: dict[str, Any], connection: Connection, relay: Relay) -> None:
    """Add what another process needs of a paused relay to the state of its connection."""
    paused = relay.resumption(connection)
    other = paused.other
    state["timeout"] = relay.timeout_of(connection)
    state["at_eof"] = connection.stream.at_eof
    state["other"] = state_of(other) | {
        "kind": kind_of(other),
        "timeout": relay.timeout_of(other),
        "at_eof": other.stream.at_eof,
    }
    state["relay"] = resumption.write(paused)
    state["descriptors"] = 2 + len(resumption.descriptors(paused))


def give_relay(connection: Connection, state: Mapping[str, Any], fds: list[int]) -> None:
    """Give a new connection the relay of the one that it continues.

    Args:
        fds: the other descriptors that have come; those in use are taken out of this list.

    Raises:
        KeyError, IndexError, TypeError, ValueError, OSError: the state is none of `add_relay`.
    """
    theirs = state["other"]
    family, kind, protocol = kind_in(theirs["kind"])
    if family not in _FAMILIES or kind != socket.SOCK_STREAM:
        raise ValueError(f"not a stream: {theirs['kind']}")
    other = make(Connection, (family, kind, protocol), fds.pop(0), get_hub(), socket.getdefaulttimeout())
    try:
        give_state(other, theirs)
        close_in_children(other)
        session = session_made(connection)
        at_eof = state["at_eof"] is True, theirs["at_eof"] is True
        paused = resumption.read(state["relay"], other, fds)  # last: it owns the pipes
    except BaseException:
        drop(other)
        raise
    connection.stream.at_eof, other.stream.at_eof = at_eof
    session.resumption = paused


def drop_relay(connection: Connection) -> None:
    """Let go of a relay that was taken over, and is served by another process: close only the descriptors."""
    session = session_of(connection)
    if session is not None and session.resumption is not None:
        paused, session.resumption = session.resumption, None
        paused.discard()
        drop(paused.other)


def end_relay(connection: Connection) -> None:
    """Reset both sides if the handler has not gone on with the relay: bytes that were under way are lost."""
    session = session_of(connection)
    if session is not None and session.resumption is not None:
        paused, session.resumption = session.resumption, None
        paused.discard()
        for side in (connection, paused.other):
            if not side.closed:
                side.abort()
