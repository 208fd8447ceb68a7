"""What moves a connection to another process: freeze it, describe it, give its socket away, make it again elsewhere.

A frozen connection still has its socket, but neither reads nor writes it: the poller has left it, and a guard stands in
for the socket. So whatever wakes its handler meanwhile (a timeout, a kill, another handler that writes to it) is served
by the first call that needs the socket: it ends the freeze, and the connection stays.
"""

# ruff: noqa: SLF001 - these functions are parts of Connection

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gevent.hub import get_hub
from gevent.socket import cancel_wait_ex

from gtcpserver.proxy_protocol.header import parse_header
from gtcpserver.strict_json import to_json
from gtcpserver.transfer.flow import Flow
from gtcpserver.transfer.foreign import forbid_linger, note_foreign

from .accepted import AcceptedSocket
from .connection import log_fields_of, readers_of, session_of
from .stream import CLOSED

if TYPE_CHECKING:
    from .connection import Connection
    from .session import Session

#: A message lists the reasons: docs/how-to/moving-connections.md.
TLS, FILE, SHARED, BUSY, GREENLET = "tls", "makefile", "shared", "busy", "another greenlet"
RELAY = "relay without handover"


def why_not(connection: Connection, worker: Any) -> str:
    """Return why an idle connection cannot move now; "" if it can.

    Args:
        worker: the greenlet of its handler, which alone may wait for it.
    """
    stream = connection._stream
    why = why_never(connection)
    if why:
        return why
    reader, writer = stream.reader(), stream.writer()
    if isinstance(reader, Flow) or isinstance(writer, Flow):
        return RELAY
    if connection._closed or stream.at_eof or stream.ending or writer is not None:
        return BUSY
    if reader is not None and reader is not worker:
        return GREENLET
    return ""


def why_never(connection: Connection) -> str:
    """Return why a connection cannot move whatever its handler does; "" if it can."""
    stream = connection._stream
    if stream.tls is not None:
        return TLS  # its keys are in this process's memory
    if stream.shared:
        return SHARED  # a second object, or a forked child, would go on reading
    if readers_of(connection) and connection._is_read_by_file():
        return FILE  # which may have read ahead
    return ""


class _Guard:
    """Stands in for the socket of a frozen connection."""

    __slots__ = ("_freeze",)

    def __init__(self, freeze: Freeze) -> None:
        self._freeze = freeze

    def __getattr__(self, name: str) -> Any:
        return getattr(self._freeze.touched(), name)


class Freeze:
    """A frozen connection, until `thaw`, `give_away`, or a touch.

    Args:
        connection: an open connection for which `why_not` has no reason.
        touched: called after something needed the socket, which ended the freeze.

    Attributes:
        over: it has ended.
        reader: the greenlet that waits to read; None: none waits.
    """

    __slots__ = ("_fd", "_poller", "_touched", "_where", "connection", "over", "reader", "sock")

    def __init__(self, connection: Connection, touched: Callable[[], Any]) -> None:
        stream = connection._stream
        self.connection = connection
        self.over = False
        self.sock = _make_foreign(connection)  # whether it is taken there or not
        self.reader = stream.reader()
        self._where = _where(self.reader)
        self._poller, self._fd = stream.poller, stream.fd
        self._touched = touched
        # First: without memory for them, nothing has changed. Two of them: compiled code calls the kernel directly
        # where both are one.
        guard, guard_of_io = _Guard(self), _Guard(self)
        if stream.poller is not None:
            stream.poller.leave(stream.fd)  # no event wakes the greenlet any more
        # A read must ask the socket, which is the guard.
        stream.drained = False
        stream.sock = connection._sock = guard
        stream.io = guard_of_io

    def still_waits(self) -> bool:
        """Return whether the greenlet that waited to read does so still: nothing has woken it."""
        # What has woken it may wait elsewhere by now. If it has come back here, it has touched the guard.
        return self.reader is None or _where(self.reader) == self._where

    def may_be_told(self) -> bool:
        """Return whether its handler, once the connection is given away, still waits where it did.

        Without memory it is not told at once; what has ended the wait meanwhile must not be interrupted.
        """
        return self.still_waits()

    def tell(self, worker: Any, error: BaseException) -> None:
        """Raise an error in its handler, which may be told. Call in the hub."""
        if self._poller is not None and self.reader is worker:
            self._poller.throw_into(worker, self._fd, error)
        else:
            worker.throw(error)

    def touched(self) -> Any:
        """Return the socket to what needs it now."""
        if not self.over:
            self.thaw()
            self._touched()
        return self.sock

    def thaw(self) -> None:
        """Let the connection go on here, as if nothing had happened."""
        connection = self.connection
        stream = connection._stream
        self.over = True
        closed = stream.closed or connection._closed
        if not closed:
            forbid_linger(self.sock)
            connection._sock = stream.sock = stream.io = self.sock
        if self.reader is not None:
            get_hub().loop.run_callback(self._wake, cancel_wait_ex() if closed else None)

    def _wake(self, error: BaseException | None) -> None:
        """Let the reader look at the socket again: a wait may return although there is nothing to read."""
        reader, where, self.reader = self.reader, self._where, None
        if _where(reader) != where:
            return
        if error is None:
            reader.switch()
        else:
            reader.throw(error)

    def descriptors(self) -> list[int]:
        """Return its descriptor."""
        return [self.sock.fileno()]

    def left_in_child(self) -> None:
        """Close the child's copy. Called in a forked child."""
        self.sock.close()

    def give_away(self) -> list[int]:
        """Close the connection for its handler, and return its descriptor, which stays open. Nothing is sent."""
        connection = self.connection
        session_made(connection).moved = True  # first: there may be no memory for it
        self.over = True
        connection._closed = True
        connection._sock = CLOSED
        connection._stream.close()
        return [self.sock.detach()]


def session_made(connection: Connection) -> Session:
    """Return its session, made if need be."""
    session = session_of(connection)
    return session if session is not None else connection._new_session()


def _make_foreign(connection: Connection) -> Any:
    """Have no call of its socket wait, whatever another process does that has it; return the socket object."""
    stream = connection._stream
    sock = stream.sock
    if isinstance(sock, AcceptedSocket):
        sock = sock.made()
        connection._sock = stream.sock = stream.io = sock
    note_foreign(sock)
    return sock


def _where(waiter: Any) -> tuple[Any, int] | None:
    """Return where a greenlet waits: its frame, which this keeps alive, and the position there."""
    frame = waiter.gr_frame if waiter is not None else None
    return None if frame is None else (frame, frame.f_lasti)


def drop(connection: Connection) -> None:
    """Close the descriptor of a connection that another process serves: no shutdown, no lingering."""
    sock = connection._sock
    connection._closed = True
    connection._sock = CLOSED
    connection._stream.close()
    sock.close()


# -- its state, as JSON values -----------------------------------------------------------------------------------------


def state_of(connection: Connection) -> dict[str, Any]:
    """Return what another process needs besides the socket."""
    stream = connection._stream
    proxied = connection._behind_balancer()
    state: dict[str, Any] = {
        "client": _address_out(connection.client_address),
        "accepted_at": connection.accepted_at,
        "received": stream.bytes_received,
        "sent": stream.bytes_sent,
        "timeout": stream.timeout,
    }
    if connection.session:
        state["session"] = connection.session
    if stream.kept:
        # JSON's escapes would take six times its size: 16 KiB that were read ahead would be too large to move.
        state["kept"] = b64encode(stream.kept).decode()
    if stream.shut_for_writing:
        state["shut"] = True
    if proxied is not None:
        header, peer = proxied
        state["proxied"] = [header.to_bytes().decode("latin-1"), _address_out(peer)]
    fields = log_fields_of(connection)
    if fields:
        state["log_fields"] = json.loads(to_json(fields))  # what is no JSON value becomes text, as in the log
    return state


def give_state(connection: Connection, state: Mapping[str, Any]) -> None:
    """Give a new connection the state of the one that it continues.

    Raises:
        KeyError, TypeError, ValueError: the state is none of `state_of`.
    """
    stream = connection._stream
    forbid_linger(_make_foreign(connection))
    timeout = state["timeout"]
    stream.timeout = None if timeout is None else float(timeout)
    stream.bytes_received, stream.bytes_sent = _count(state["received"]), _count(state["sent"])
    stream.kept = b64decode(str(state.get("kept", "")), validate=True)
    stream.shut_for_writing = state.get("shut") is True
    connection.accepted_at = float(state["accepted_at"])
    connection.client_address = _address_in(state["client"])
    if (proxied := state.get("proxied")) is not None:
        found = parse_header(proxied[0].encode("latin-1"))
        if found is None:
            raise ValueError("half a PROXY header")
        connection._proxied = (found[0], _address_in(proxied[1]))
    if (fields := state.get("log_fields")) is not None:
        connection._log_fields = dict(fields)
    session = connection._new_session()
    session.resumed = True
    dict.update(session, state.get("session", ()))  # the values of JSON


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"not a number of bytes: {value!r}")
    return value


def _address_out(address: Any) -> Any:
    if isinstance(address, bytes):  # of a unix socket without a path
        return {"bytes": address.decode("latin-1")}
    return list(address) if isinstance(address, tuple) else address


def _address_in(value: Any) -> Any:
    if isinstance(value, dict):
        return str(value["bytes"]).encode("latin-1")
    return tuple(value) if isinstance(value, list) else value
