"""What happens once to each connection: it is made of an accepted descriptor, and it is closed.

Apart from connection.py so that it can be compiled: a Connection is a gevent socket, whose class is Python's.
"""

# ruff: noqa: SLF001 - these functions are parts of Connection

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from gevent.socket import cancel_wait_ex
from gevent.socket import socket as _Socket

from gtcpserver.process.descriptors import close_descriptor

try:
    import cython
except ImportError:
    from gtcpserver.c import cython
if not cython.compiled:
    # Compiled, these are C (lifecycle.pxd).
    from time import monotonic

    from .accepted import AcceptedSocket
    from .stream import Stream

from .stream import CHILD, CLOSED

if TYPE_CHECKING:
    if not cython.compiled:
        from gtcpserver.c import bound, get, instance_of, offset_of, put
    from .connection import Connection
    from .lingering import Linger
    from .owner import Owner

# Plain numbers: the socket module's enums cost 0.1 us a call.
_SOL_SOCKET, _SO_LINGER = int(socket.SOL_SOCKET), int(socket.SO_LINGER)
_SHUT_WR = int(socket.SHUT_WR)

_RawSocket = _Socket._gevent_sock_class
_drop_ref_on_close = _Socket._drop_ref_on_close
_new = object.__new__
_recv, _sendall = vars(Stream)["recv"], vars(Stream)["sendall"]

# Of the slots of Connection, which a subclass may have covered.
_set_recv: Any
_set_sendall: Any
_get_lingerer: Any

# Compiled: offsets of those that this module reads or writes once a connection.
_sock_at: int
_hub_at: int
_io_refs_at: int
_closed_at: int
_stream_at: int
_recv_at: int
_sendall_at: int
_idle_block_at: int
_address_at: int
_server_at: int
_context_at: int
_accepted_at_at: int

#: A class that has one of these itself, or a method of the second line, keeps something elsewhere.
_SLOTS = frozenset(
    {"_closed", "_io_refs", "_sock", "_stream", "accepted_at", "client_address", "context", "hub", "idle_block", "recv"}
    | {"sendall", "server"}
)
_SETTERS = frozenset({"__setattr__", "__getattribute__"})

_Connection: type[Connection]
#: Its subclasses that keep all of it in its slots.
_direct: set[type] = set()


def know(connection_class: type[Connection]) -> None:
    """Note where Connection keeps what only this module sets."""
    global _Connection, _set_recv, _set_sendall, _get_lingerer
    _Connection = connection_class
    slots = vars(connection_class)
    _set_recv, _set_sendall = slots["recv"].__set__, slots["sendall"].__set__
    _get_lingerer = slots["_lingerer"].__get__
    if cython.compiled:
        _know_offsets(connection_class)


def _know_offsets(connection_class: Any) -> None:
    global _sock_at, _hub_at, _io_refs_at, _closed_at, _stream_at, _recv_at, _sendall_at
    global _idle_block_at, _address_at, _server_at, _context_at, _accepted_at_at
    _sock_at = offset_of(connection_class._sock)
    _hub_at = offset_of(connection_class.hub)
    _io_refs_at = offset_of(connection_class._io_refs)
    _closed_at = offset_of(connection_class._closed)
    _stream_at = offset_of(connection_class._stream)
    _recv_at = offset_of(connection_class.recv)
    _sendall_at = offset_of(connection_class.sendall)
    _idle_block_at = offset_of(connection_class.idle_block)
    _address_at = offset_of(connection_class.client_address)
    _server_at = offset_of(connection_class.server)
    _context_at = offset_of(connection_class.context)
    _accepted_at_at = offset_of(connection_class.accepted_at)


def know_subclass(connection_class: type[Connection]) -> None:
    """Note a new subclass of Connection: whether it covers one of the slots."""
    own = [vars(one).keys() for one in connection_class.__mro__ if not issubclass(_Connection, one)]
    if not any(names & (_SLOTS | _SETTERS) for names in own):
        _direct.add(connection_class)


def _is_direct(connection: Connection) -> bool:
    return type(connection) is _Connection or type(connection) in _direct


def make(connection_class: type[Connection], kind: tuple[int, int, int], fd: int, hub: Any, timeout: Any) -> Connection:
    """Make a Connection of an accepted descriptor, which is closed if that fails.

    The shortest way, 1 us less than the constructor of a class that may do anything: the caller has checked that the
    class has none of its own.

    Args:
        kind: family, type and protocol of the socket. Compiled, the descriptor is non-blocking.
        hub: of this thread.
        timeout: of new sockets (`socket.setdefaulttimeout`), in seconds or None.
    """
    try:
        if cython.compiled:
            connection: Connection = instance_of(connection_class)
            accepted = AcceptedSocket.__new__(AcceptedSocket)
            accepted.set_up(kind[0], kind[1], kind[2], fd)
            sock = accepted
        else:
            connection = _new(connection_class)
            sock = _RawSocket(kind[0], kind[1], kind[2], fd)
            sock.setblocking(False)
    except BaseException:
        close_descriptor(fd)  # nobody has it yet
        raise
    begin(connection, sock, fd, hub, timeout)
    return connection


def begin(connection: Connection, sock: Any, fd: int, hub: Any, timeout: Any) -> None:
    """Give a new Connection its state.

    Args:
        sock: the raw socket, non-blocking.
        fd: its descriptor.
        hub, timeout: as of `make`.
    """
    stream = Stream.__new__(Stream)
    stream.set_up(sock, fd, hub, timeout)
    if cython.compiled and _is_direct(connection):
        put(connection, _sock_at, sock)
        put(connection, _hub_at, hub)
        put(connection, _io_refs_at, 0)
        put(connection, _closed_at, False)
        put(connection, _stream_at, stream)
        put(connection, _recv_at, bound(_recv, stream))
        put(connection, _sendall_at, bound(_sendall, stream))
        put(connection, _idle_block_at, None)
        put(connection, _address_at, None)
        put(connection, _server_at, None)
        put(connection, _context_at, None)
        put(connection, _accepted_at_at, monotonic())
    else:
        connection._sock = sock
        connection.hub = hub
        connection._io_refs = 0
        connection._closed = False
        connection._stream = stream
        # The stream's own methods, not wrappers: 0.1 us a call. Writes the slots even if a subclass overrides them.
        methods: Any = stream  # compiled, a Stream's would be C functions
        _set_recv(connection, methods.recv)
        _set_sendall(connection, methods.sendall)
        connection.idle_block = None
        connection.client_address = connection.server = connection.context = None  # type: ignore[assignment]
        connection.accepted_at = monotonic()


def stream_of(connection: Connection) -> Stream:
    """Return the stream of a connection; its property of that name costs 0.5 % of a connection."""
    if cython.compiled and _is_direct(connection):
        stream: Stream = get(connection, _stream_at)
        return stream
    return connection._stream


def set_address(connection: Connection, address: Any) -> None:
    if cython.compiled and _is_direct(connection):
        put(connection, _address_at, address)
    else:
        connection.client_address = address


def set_owner(connection: Connection, server: Any, context: Any) -> None:
    if cython.compiled and _is_direct(connection):
        put(connection, _server_at, server)
        put(connection, _context_at, context)
    else:
        connection.server = server
        connection.context = context


def forget_idle_block(connection: Connection) -> None:
    """Leave no cycle for the garbage collector: the block refers to the connection."""
    if cython.compiled and _is_direct(connection):
        put(connection, _idle_block_at, None)
    else:
        connection.idle_block = None


def end(connection: Connection) -> None:
    """Close a connection, even if files of ``makefile`` are open."""
    stream: Stream
    owner: Owner | None
    if cython.compiled and _is_direct(connection):
        stream = get(connection, _stream_at)
        owner = get(connection, _server_at)
        put(connection, _closed_at, True)
    else:
        stream = connection._stream
        owner = connection.server
        connection._closed = True
    if stream.tls is not None:
        stream.tls.close_notify()
    sock = stream.sock
    if cython.compiled and _is_direct(connection):
        put(connection, _sock_at, CLOSED)
    else:
        connection._sock = CLOSED
    waiting = stream.close()
    if waiting is not None:
        connection.hub.cancel_waits_close_and_then(waiting, cancel_wait_ex, connection._drop_ref_on_close, sock)
    elif not _lingers(connection, stream, owner, sock):
        _close(connection, sock)


def drop(connection: Connection, sock: Any) -> None:
    """Close the socket of a connection on which no greenlet waits any more."""
    stream: Stream = connection._stream
    stream.sock = CLOSED
    if not _lingers(connection, stream, connection.server, sock):
        _close(connection, sock)


def _close(connection: Connection, sock: Any) -> None:
    if cython.compiled and type(sock) is AcceptedSocket:
        accepted: AcceptedSocket = sock
        if not accepted.shown:  # no watcher of others needs to be notified
            accepted.close()
            return
    _drop_ref_on_close(connection, sock)


def _lingers(connection: Connection, stream: Stream, owner: Owner | None, sock: Any) -> bool:
    # Lingering shuts down the write side, for every other process with the socket too. A peer that has closed its
    # side sends nothing more that could provoke a reset. An idle peer has received its last answer and may not
    # notice the end before its next request: no stop waits for it.
    if not (stream.at_eof or stream.shared):
        if owner is None:
            if _linger_alone(connection, stream, sock):
                return True
        else:
            lingerer: Linger = owner.lingerer
            if lingerer.take(sock, not stream.ended):
                return True
    return stream.shared == CHILD and _end_shared(connection, stream, owner, sock)


def _linger_alone(connection: Connection, stream: Stream, sock: Any) -> bool:
    """Close politely without a Server, if ``linger_with`` was called. False: close at once.

    A handler that has written nothing may have left the answer to another process that holds the socket; a shutdown
    would silence it. A handler that has set SO_LINGER has decided how its socket closes.
    """
    try:
        lingerer = _get_lingerer(connection)
        if not stream.bytes_sent or sock.getsockopt(_SOL_SOCKET, _SO_LINGER):
            return False
    except (AttributeError, OSError):
        return False
    return bool(lingerer.take(sock))


def _end_shared(connection: Connection, stream: Stream, owner: Owner | None, sock: Any) -> bool:
    """Signal the end to the peer although a forked child has the socket too. False: close it now."""
    try:
        if struct.unpack("ii", sock.getsockopt(_SOL_SOCKET, _SO_LINGER, 8))[0]:
            return False  # to be reset
        if not stream.at_eof:
            if owner is None:
                return _linger_alone(connection, stream, sock)
            return bool(owner.lingerer.take(sock, not stream.ended))
        if owner is not None or stream.bytes_sent:  # or the child may answer, see _linger_alone
            sock.shutdown(_SHUT_WR)
    except OSError:
        pass  # reset meanwhile
    return False
