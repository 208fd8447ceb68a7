"""Connection: the socket that a handler gets.

A Connection is a gevent socket, so any code that takes a socket takes it. stream.py has how it waits and moves bytes.
The order below: construct, read, write, bound, idle, close.
"""

from __future__ import annotations

import os
import socket as _stdlib_socket
from collections.abc import Callable
from functools import wraps
from io import RawIOBase
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast
from weakref import ref

from gevent._socket3 import _closedsocket
from gevent.hub import get_hub
from gevent.socket import cancel_wait_ex

from gtcpserver import transfer
from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.errors import ConfigError, EarlyEOF, LimitExceeded, StartTLSError
from gtcpserver.framing import DEFAULT_LIMIT, Framing, LengthPrefix
from gtcpserver.framing.formats import PrefixSize
from gtcpserver.plural import counted
from gtcpserver.process.clock import wall_time
from gtcpserver.process.forked import close_in_children
from gtcpserver.proxy_protocol.header import Transport
from gtcpserver.tls import ConnectionTLS, Credentials
from gtcpserver.tls.info import ChallengeAnswered
from gtcpserver.transfer.ends import HasStream, reset_on_close

from .blocks import Deadline, Idle
from .frames import Frames
from .handshake_failure import handshake_failed
from .lifecycle import begin, drop, end, know, know_subclass
from .session import Session
from .ssl_methods import SSLMethods, refuse
from .stream import CHILD, CLOSED, SHARED, Stream
from .tls_layer import TLSLayer

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Buffer, Self  # which type checkers have

    from gtcpserver.address import SocketAddress
    from gtcpserver.proxy_protocol.header import ProxyHeader
    from gtcpserver.server.server import Server  # what `server` is to its readers; we use it as an Owner
    from gtcpserver.tls import TLSConfig
    from gtcpserver.transfer.files import Readable, Writable

    from .lingering import Linger
    from .owner import Owner

    class _Socket(_stdlib_socket.socket):
        """gevent's class, which is untyped: typeshed's stubs of gevent also declare it as this one.

        The members below are those that gevent's class adds, and the private ones that we use.
        """

        _gevent_sock_class: ClassVar[type[Any]]
        _closed: bool
        _io_refs: int
        _sock: Any
        hub: Any

        @property
        def closed(self) -> bool: ...
        def _drop_ref_on_close(self, sock: Any) -> None: ...
else:
    from gevent.socket import socket as _Socket

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

log = own_logger("gtcpserver.tls")

#: Bytes that ``recv_until`` asks the kernel for at once when the bytes it kept are not enough.
READ_AHEAD = 16 * 1024

# By name: type checkers do not know the slots of gevent's untyped classes.
_SLOTS = (
    "_lingerer",
    "_log_fields",
    "_proxied",
    "_readers",
    "_session",
    "_stream",
    "accepted_at",
    "client_address",
    "context",
    "idle_block",
    "recv",
    "sendall",
    "server",
)

#: Undocumented attributes of a connection that the package uses: a subclass that redefines one of them would break its
#: connections in a distant place.
_OWN_NAMES = frozenset(
    {"accepted_at", "end", "end_idle", "idle_block", "is_idle", "note_relay", "peeked", "stream", "take_resumption"}
)


def _noted(method: MethodT) -> MethodT:
    """Mark the errors that a method raises as this connection's (:meth:`Stream.note`)."""

    @wraps(method)
    def noted(self: Connection, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except OSError as error:
            self._stream.note(error)
            raise

    return cast("MethodT", noted)


class Connection(SSLMethods, HasStream, _Socket):
    r"""A client's connection: a blocking, cooperative socket with the extra methods that handlers need.

    All of the socket API works. Timeouts count the time without progress: ``settimeout(30)`` ends a ``recv`` or a
    ``sendall`` after 30 seconds without a byte, not a ``sendall`` that makes progress (the standard library's bounds
    the whole call; :meth:`deadline` does that here).

    Attributes:
        client_address: the peer as ``accept`` gave it: (host, port) for IPv4, (host, port, flow, scope) for IPv6,
            "" or a path for a unix socket. Behind a balancer that sends PROXY headers (``proxy_protocol``) it is the
            client's, and :attr:`peer_address` is the balancer's. Assigning another address changes the logs, not the
            client that ``client_limits`` count the connection for. None for a connection that was not accepted.
        server: the Server it belongs to; None for a connection created without one.
        context: the server's ``context`` argument; assign to it to keep data with the connection.
        recv: ``recv(bufsize, flags=0) -> bytes``: at most ``bufsize`` bytes; b"" when the peer has closed its side.
            Raises TimeoutError when nothing arrived for ``settimeout`` seconds, DeadlineExceeded inside
            :meth:`deadline`, OSError as recv(2); EBADF when another greenlet closed the connection meanwhile.
        sendall: ``sendall(data, flags=0) -> None``: sends all of ``data`` (any contiguous buffer). Raises TimeoutError
            when the peer took nothing for ``settimeout`` seconds (some of the data may be sent), otherwise as ``recv``.

    Example::

        def handle(conn):
            conn.settimeout(60)  # seconds without a byte
            name = conn.recv_until(b"\n", 100)
            conn.sendall(b"Hello, " + name + b"!\n")
    """

    __slots__ = _SLOTS

    _lingerer: Any
    _log_fields: Any
    _proxied: Any
    _readers: Any
    _session: Session
    _stream: Stream
    accepted_at: float
    client_address: SocketAddress
    context: Any
    idle_block: Idle | None
    server: Server | None

    if TYPE_CHECKING:
        # Slots, which _begin fills.
        def recv(self, bufsize: int, flags: int = 0, /) -> bytes: ...
        def sendall(self, data: Buffer, flags: int = 0, /) -> None: ...

        @property
        def stream(self) -> Stream: ...  # type: ignore[override]  # for this package; set below the class

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        taken = _OWN_NAMES & (vars(cls).keys() | vars(cls).get("__annotations__", {}).keys())
        if taken:
            raise TypeError(f"{cls.__name__} must not define {min(taken)!r}: gtcpserver uses this name of a Connection")
        know_subclass(cls)

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        # gevent's constructor makes two io watchers (0.5 us each); ours are made at the first wait.
        if fileno is None:
            family = _stdlib_socket.AF_INET if family == -1 else family
            type = _stdlib_socket.SOCK_STREAM if type == -1 else type
            proto = 0 if proto == -1 else proto
        sock = self._gevent_sock_class(family, type, proto, fileno)
        try:
            sock.setblocking(False)
            begin(self, sock, sock.fileno(), get_hub(), _stdlib_socket.getdefaulttimeout())
            # The server keeps track of the ones it accepts.
            close_in_children(self)
        except BaseException:
            sock.close()  # at once: the caller may keep the error, and its traceback refers to the socket
            raise

    @property
    def started_at(self) -> float:
        """Time of the accept in seconds since the epoch, by the clock as it is set now."""
        return wall_time(self.accepted_at)

    if not TYPE_CHECKING:

        @_noted
        def getpeername(self):  # ENOTCONN when the client has reset the connection
            return super().getpeername()

    @property
    def server_address(self) -> SocketAddress:
        """Address that the client connected to, as ``getsockname`` returns it."""
        address: SocketAddress = self._sock.getsockname()
        return address

    @property
    def peer_address(self) -> SocketAddress:
        """Address at the other end of the socket: the client's, or that of the balancer in front."""
        proxied = self._behind_balancer()
        return self.client_address if proxied is None else proxied[1]

    @property
    def proxy_header(self) -> ProxyHeader | None:
        """Header that the balancer sent about the client (PROXY protocol); None without one."""
        proxied = self._behind_balancer()
        return None if proxied is None else proxied[0]

    def _behind_balancer(self) -> tuple[ProxyHeader, SocketAddress] | None:
        # Set only for connections with a header: setting the slot for all would cost each of them.
        try:
            proxied: tuple[ProxyHeader, SocketAddress] = _get_proxied(self)
        except AttributeError:
            return None
        return proxied

    def note_proxy_header(self, header: ProxyHeader) -> None:
        """Take the client's address from a balancer's header, and count that client (``client_limits``).

        A header without an address (LOCAL, UNKNOWN, UNSPEC) changes nothing: the client is the peer of the connection.
        Nor does a header for datagrams, whose sources can be forged: this is a stream (haproxy and nginx do the same).

        Raises:
            ClientRefused: the client is over a limit. The connection was reset.
        """
        self._proxied = (header, self.client_address)
        source = header.source
        if source is None or header.transport is not Transport.STREAM:
            return
        if isinstance(source, bytes):
            self.client_address = os.fsdecode(source)
        else:
            ip, port = source
            self.client_address = (str(ip), port) if ip.version == 4 else (str(ip), port, 0, 0)
        owner: Owner | None = self.server
        if owner is not None:
            owner.client_named(self)

    @property
    def log_fields(self) -> dict[str, Any]:
        """Extra fields of this connection's line in the access log: ``conn.log_fields["user"] = "ada"``.

        Values are printed (text) or encoded as JSON. Names that the log itself uses keep the log's values.
        """
        try:
            fields: dict[str, Any] = _get_log_fields(self)
        except AttributeError:
            # Made only for connections that use it, as for _proxied.
            fields = self._log_fields = {}
        return fields

    @property
    def session(self) -> dict[str, Any]:
        """Data that go along when the connection moves to another worker (``handover``): ``conn.session["db"] = 3``.

        Values are those of JSON; any other is a TypeError.
        """
        try:
            return _get_session(self)
        except AttributeError:
            return self._new_session()

    def _new_session(self) -> Session:
        session = self._session = Session()
        return session

    @property
    def resumed(self) -> bool:
        """Whether the connection has come from another worker (``handover``): its handler began elsewhere."""
        session = session_of(self)
        return session is not None and session.resumed

    @property
    def relayed_to(self) -> Connection | None:
        """The other connection of a relay in which this one has come from another worker (``handover``).

        None for any other connection, and once :func:`relay` has begun. A handler uses it in place of a new one::

            with conn.relayed_to or connect("db:5432") as upstream:
                relay(conn, upstream, handover=True)
        """
        session = session_of(self)
        resumption = session.resumption if session is not None else None
        return None if resumption is None else resumption.other

    def note_relay(self, relay: Any) -> None:
        """Note the relay that moves with this connection; None: none any more. For this package.

        :meta private:
        """
        moving = getattr(self.server, "moving", None)
        if moving is not None:
            session = session_of(self)
            if session is None:
                session = self._new_session()
            before, session.relay = session.relay, relay
            moving.note_relay(self, before, relay)

    def take_resumption(self, other: Any) -> Any:
        """Return what a relay with another connection has to go on from; None: it begins anew. For this package.

        :meta private:
        """
        session = session_of(self)
        if session is None or session.resumption is None or session.resumption.other is not other:
            return None
        resumption, session.resumption = session.resumption, None
        return resumption

    @property
    def bytes_received(self) -> int:
        """Number of bytes read through this object."""
        return self._stream.bytes_received

    @property
    def bytes_sent(self) -> int:
        """Number of bytes written through this object."""
        return self._stream.bytes_sent

    # -- timeouts ---------------------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """Seconds without progress until TimeoutError, as ``settimeout`` set it."""
        return self._stream.timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        stream = self._stream
        stream.timeout = seconds
        if seconds is None and stream.deadline is None:
            stream.forget_bounds()

    def settimeout(self, seconds: float | None) -> None:
        """Raise TimeoutError from a read or write that makes no progress for ``seconds``; None waits indefinitely.

        0 makes the socket non-blocking: BlockingIOError instead of waiting.
        """
        if seconds is not None:
            seconds = float(seconds)
            if not seconds >= 0:
                raise ValueError("Timeout value out of range")
        self.timeout = seconds

    def gettimeout(self) -> float | None:
        """Return the timeout that ``settimeout`` set, in seconds, or None."""
        return self._stream.timeout

    def deadline(self, seconds: float) -> Deadline:
        """Bound the total time of all calls on this connection within a ``with`` block.

        ``settimeout`` restarts with each byte; a deadline does not, so a client that drips cannot stretch it. Blocks
        nest; the earlier deadline applies. It bounds only this connection's calls: to interrupt any other wait, use
        ``gevent.Timeout``.

        Args:
            seconds: from now; more than 0.

        Raises (from the calls inside):
            DeadlineExceeded: a TimeoutError.
        """
        if not seconds > 0:
            raise ValueError(f"seconds must be more than 0, got {seconds!r}")
        return Deadline(self._stream, seconds)

    # -- waiting, as gevent's methods ask for it ---------------------------------------------------------------------

    @property
    def _read_event(self) -> Any:
        stream = self._stream
        return stream.reading or (None if self._closed else stream.make_read_watcher())

    @property
    def _write_event(self) -> Any:
        stream = self._stream
        return stream.writing or (None if self._closed else stream.make_write_watcher())

    def _wait(self, watcher: Any, timeout_exc: Any = None) -> None:
        # gevent's own methods (recvfrom, recvmsg, connect, sendmsg ...) come here after an EAGAIN.
        if watcher is None:
            raise cancel_wait_ex()
        if watcher is self._stream.writing:
            self._stream.wait_writable()
        else:
            self._stream.wait_for_input()

    # -- reading -----------------------------------------------------------------------------------------------------

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a writable buffer; return the number of bytes, 0 at the peer's end. Errors as ``recv``."""
        return self._stream.recv_into(buffer, nbytes, flags)

    def recv_exactly(self, n: int) -> bytes:
        """Receive exactly ``n`` bytes.

        Raises:
            EarlyEOF: the peer closed first; ``partial`` holds the bytes received.
            TimeoutError, DeadlineExceeded, OSError: as ``recv``.
        """
        return self._stream.recv_exactly(n)

    def recv_until(self, separator: bytes = b"\n", limit: int = 64 * 1024) -> bytes:
        """Receive up to and including the next ``separator``.

        Bytes after the separator are kept for the next call of ``recv``, :meth:`recv_into`, :meth:`recv_exactly`, this
        method, or a file made by ``makefile`` (not for reads from the bare descriptor).

        Args:
            separator: bytes that end a message, for instance b"\\r\\n".
            limit: largest message, separator included, in bytes.

        Raises:
            LimitExceeded: no separator within ``limit`` bytes. The stream is out of sync: close the connection.
            EarlyEOF: the peer closed before a separator; ``partial`` holds the bytes received, possibly b"".
            TimeoutError, DeadlineExceeded, OSError: as ``recv``.
        """
        if not separator:
            raise ValueError("separator must not be empty")
        stream = self._stream
        data = stream.kept
        while True:
            found = data.find(separator)
            if found >= 0:
                end = found + len(separator)
                if end > limit:
                    break
                stream.kept = data[end:]
                return data[:end]
            if len(data) >= limit:
                break
            # Empty while more is read: recv would hand out the kept bytes again.
            stream.kept = b""
            try:
                more = stream.recv(READ_AHEAD)
            except BaseException:
                stream.kept = data
                raise
            if not more and not (data and stream.goes_on()):
                raise stream.note(_no_separator(data, separator))
            if data:
                return self._recv_until_in_pieces(separator, limit, bytearray(data), more)
            data = more
        stream.kept = data
        raise stream.note(LimitExceeded(f"no {separator!r} within {limit} bytes"))

    def _recv_until_in_pieces(self, separator: bytes, limit: int, data: bytearray, more: bytes) -> bytes:
        """Continue ``recv_until`` from the second piece on.

        The cost grows with the bytes, not with the pieces: when a peer drips, no byte is copied or searched twice.
        """
        stream = self._stream
        try:
            while True:
                searched = max(0, len(data) - len(separator) + 1)
                data += more
                found = data.find(separator, searched)
                end = found + len(separator)
                if found >= 0 and end <= limit:
                    message = bytes(memoryview(data)[:end])
                    del data[:end]
                    return message
                if found >= 0 or len(data) >= limit:
                    raise stream.note(LimitExceeded(f"no {separator!r} within {limit} bytes"))
                more = stream.recv(READ_AHEAD)
                if not more and not stream.goes_on():
                    early = stream.note(_no_separator(bytes(data), separator))
                    data.clear()
                    raise early
        finally:
            stream.kept = bytes(data)

    def frames(
        self, framing: Framing | None = None, *, prefix: PrefixSize | None = None, limit: int = DEFAULT_LIMIT
    ) -> Frames:
        """Return an object that receives and sends whole messages: ``for message in conn.frames(prefix=4): ...``.

        Args:
            framing: the format: :class:`LengthPrefix`, :class:`Netstrings`, :class:`Lines` or one of your own.
            prefix: instead of it, the bytes of a length prefix in network byte order, 1, 2, 4 or 8; or "varint".
            limit: with ``prefix``, most bytes of a message.

        Raises:
            ConfigError: an invalid argument.
        """
        if (framing is None) == (prefix is None):
            raise ConfigError("frames needs a framing or a prefix")
        return Frames(self, LengthPrefix(prefix, limit) if prefix is not None else framing)  # type: ignore[arg-type]

    if not TYPE_CHECKING:

        def makefile(self, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = super().makefile(mode, *arguments, **options)
            # The buffer beneath a text file reads ahead; the text file may be detached from it.
            reader = getattr(file, "buffer", file)
            if "r" in mode and not isinstance(reader, RawIOBase):
                self._readers = [*(one for one in readers_of(self) if one() is not None), ref(reader)]
            return file

    def _is_read_by_file(self) -> bool:
        """Return whether a file of :meth:`makefile` that may have read ahead is open."""
        return any(is_open(one()) for one in readers_of(self))

    @property
    def peeked(self) -> bytes:
        """Bytes that ``recv_until`` read ahead or :meth:`unread` gave back. For this package.

        :meta private:
        """
        return self._stream.kept

    @property
    def should_leave(self) -> bool:
        """Whether an answer should be the last: the server is draining, and no further request is here yet.

        For this package.

        :meta private:
        """
        owner: Owner | None = self.server
        return owner is not None and owner.draining and not self._stream.kept

    def unread(self, data: bytes) -> None:
        """Give back bytes already read: the next read, or a relay, gets them first."""
        self._stream.kept = b"".join((data, self._stream.kept))  # bytes, whatever data is

    # -- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Send some of ``data``; return the number of bytes the kernel took (at least one; waits if necessary)."""
        return self._stream.send(data, flags)

    # -- files (transfer/) -------------------------------------------------------------------------------------------

    if TYPE_CHECKING:

        def sendfile(self, file: Readable, offset: int = 0, count: int | None = None) -> int: ...
        def recv_to_file(self, file: Writable, count: int | None = None) -> int: ...
    else:
        sendfile = transfer.sendfile
        recv_to_file = transfer.recv_to_file

    # -- TLS ---------------------------------------------------------------------------------------------------------

    @property
    def tls(self) -> ConnectionTLS | None:
        """Result of the handshake (version, cipher, server name, ALPN, peer certificate); None without TLS."""
        layer = self._stream.tls
        return None if layer is None else ConnectionTLS(layer.object, layer.server_name)

    def start_tls(
        self,
        tls: TLSConfig | ssl.SSLContext | Credentials | None = None,
        *,
        timeout: float | None = None,
        answers: bool = False,
    ) -> ConnectionTLS:
        """Start TLS on this connection as the server side: SMTP's STARTTLS, PostgreSQL's SSLRequest.

        Args:
            tls: a TLSConfig or ssl.SSLContext; None: the server's.
            timeout: seconds for the handshake; None: the configuration's.
            answers: answer an ACME authority (`TLSConfig.acme`): TLS begins with the connection, and no plain text came
                before.

        Raises:
            StartTLSError: no TLS configuration is available; TLS is already started; a buffered file of ``makefile`` is
                open for reading; or bytes that followed the client's request for TLS, before the handshake, were read
                already: a man in the middle may have injected them to pass for encrypted ones (RFC 3207 section 6).
                Close the connection.
            OSError: the handshake failed (ssl.SSLError), or took too long (TimeoutError). ConnectionError: an ACME
                authority has asked, and is answered.
        """
        stream = self._stream
        if stream.tls is not None:
            raise StartTLSError("TLS has been started on this connection already")
        if stream.kept:
            raise stream.note(StartTLSError(f"{len(stream.kept)} unencrypted bytes came before the TLS handshake"))
        if self._is_read_by_file():
            raise StartTLSError(
                "a file of makefile() is open for reading, and may hold unencrypted bytes: close it before, and make "
                "another afterwards"
            )
        owner: Owner | None = self.server
        if tls is None and owner is not None:
            tls = owner.tls
        if tls is None:
            raise StartTLSError("no TLS configuration: give start_tls() one, or the server")
        credentials = tls if isinstance(tls, Credentials) else Credentials(tls)
        questions = credentials.answers if answers else None
        layer = TLSLayer(self, credentials.context, credentials.report_truncation, credentials.older, questions)
        seconds = credentials.handshake_timeout if timeout is None else timeout
        try:
            with self.deadline(seconds):
                layer.handshake()
            if layer.is_challenge:
                layer.close_notify()
                raise ChallengeAnswered("an ACME challenge was answered")
        except OSError as error:
            self._note_failed_handshake(error)
            raise
        stream.io = stream.tls = layer
        stream.drained = False
        return ConnectionTLS(layer.object, layer.server_name)

    def _note_failed_handshake(self, error: OSError) -> None:
        self._stream.note(error)
        kind = handshake_failed(self, error)
        owner: Owner | None = self.server
        if owner is not None:
            owner.count_failed_handshake(kind)
        log.debug("TLS handshake with %s failed (%s): %s", self.client_address, kind, error)

    def stop_tls(self) -> None:
        """Return to plain text: send close_notify and wait for the peer's.

        Raises:
            StartTLSError: the connection is not encrypted.
            OSError: the peer closed or sent something else instead; timeouts as ``recv``.
        """
        stream = self._stream
        if stream.tls is None:
            raise StartTLSError("the connection is not encrypted")
        try:
            stream.kept += stream.tls.unwrap()
        except OSError as error:
            stream.note(error)
            raise
        stream.io, stream.tls = stream.sock, None
        stream.drained = stream.at_eof = False  # only the encrypted part ended

    def unwrap(self) -> Self:
        """Call ``stop_tls``, under its name in ``ssl.SSLSocket``; return this connection."""
        self._ssl_object()
        self.stop_tls()
        return self

    # -- the rest of the socket's methods, counted -------------------------------------------------------------------

    @_noted
    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        if self._stream.tls is not None:
            refuse(self, "recvfrom", ValueError)
        data, address = super().recvfrom(bufsize, flags)
        return self._count_received(data, len(data), flags), address

    @_noted
    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        if self._stream.tls is not None:
            refuse(self, "recvfrom_into", ValueError)
        size, address = super().recvfrom_into(buffer, nbytes, flags)
        return self._count_received(size, size, flags), address

    @_noted
    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Any:
        if self._stream.tls is not None:
            refuse(self, "recvmsg", NotImplementedError)
        message = super().recvmsg(bufsize, ancbufsize, flags)
        return self._count_received(message, len(message[0]), flags)

    @_noted
    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0) -> Any:
        if self._stream.tls is not None:
            refuse(self, "recvmsg_into", NotImplementedError)
        message = super().recvmsg_into(buffers, ancbufsize, flags)
        return self._count_received(message, message[0], flags)

    def _count_received(self, result: Any, size: int, flags: int) -> Any:
        if not flags & _stdlib_socket.MSG_PEEK:
            self._stream.bytes_received += size
        return result

    @_noted
    def sendto(self, *args: Any) -> int:
        if self._stream.tls is not None:
            refuse(self, "sendto", ValueError)
        return self._count_sent(super().sendto(*args))

    @_noted
    def sendmsg(self, *args: Any) -> int:
        if self._stream.tls is not None:
            refuse(self, "sendmsg", NotImplementedError)
        return self._count_sent(super().sendmsg(*args))

    def _count_sent(self, size: int) -> int:
        self._stream.bytes_sent += size
        return size

    # -- idle --------------------------------------------------------------------------------------------------------

    def idle(self) -> Idle:
        """Mark the wait between two requests: ``with conn.idle(): data = conn.recv(4096)``.

        An idle connection holds no place in the server's pool. When the server stops, its ``recv`` returns b"" at once,
        as if the peer had closed, unless a request has already arrived. Without a server this does nothing.
        """
        return self.idle_block or self._make_idle()

    def _make_idle(self) -> Idle:
        owner: Owner | None = self.server
        self.idle_block = block = Idle(self) if owner is None else owner.make_idle(self)
        return block

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits between two requests (:meth:`idle`). For this package.

        :meta private:
        """
        block = self.idle_block
        return block is not None and block.active

    def end_idle(self) -> None:
        """Make the idle read return b"", as if the peer had closed, unless data has arrived. For this package.

        Call only from the hub.

        :meta private:
        """
        stream = self._stream
        stream.ending = True
        stream.drained = False
        reader = stream.reader()
        if reader is not None:
            reader.switch()

    # -- the end -----------------------------------------------------------------------------------------------------

    @_noted
    def shutdown(self, how: int) -> None:
        """Shut down one or both sides, as ``shutdown(2)``. Over TLS, send close_notify first.

        The kernel wakes a greenlet that waits on that side: a reader gets b"", a writer EPIPE.
        """
        if self._stream.tls is not None and how != _stdlib_socket.SHUT_RD:
            self._stream.tls.close_notify_and_read_on()
        self._sock.shutdown(how)
        if how != _stdlib_socket.SHUT_RD:
            self._stream.shut_for_writing = True

    def abort(self) -> None:
        """Close with a reset: the peer learns that something went wrong, and unsent data is dropped.

        For a proxy whose other side failed; SO_LINGER with a time of 0, socket(7). Does nothing if already closed.
        """
        if not self._closed:
            reset_on_close(self)
            self.close()

    def _real_close(self) -> None:
        # gevent's close() calls this when no file made by makefile() is open any more.
        if self._sock:
            self.end()

    def end(self) -> None:
        """Close the connection even if files of :meth:`makefile` are open. For this package: handlers call ``close``.

        :meta private:
        """
        end(self)

    # -- a fork in its handler (see process/forked.py) ---------------------------------------------------------------

    def shared_with_child(self) -> None:
        """Note, in the parent, that a forked child has the socket too."""
        self._stream.shared = self._stream.shared or CHILD

    def taken_by_child(self) -> None:
        """Take over reading and writing in the child, without a server; the close there signals nothing to the peer."""
        stream = self._stream
        stream.leave_event_loop()
        stream.shared = SHARED
        if stream.tls is not None:
            stream.tls.broken = True
        self.server = None
        self.idle_block = None

    def left_by_child(self) -> None:
        """Close, in the child, a connection of another handler."""
        self._stream.left_by_child()
        self._sock = CLOSED
        self._closed = True

    def linger_with(self, lingerer: Linger) -> None:
        """Let ``lingerer`` close the socket of a connection that has no Server."""
        self._lingerer = lingerer

    def _detach_socket(self, reason: str) -> None:
        # gevent's version first asks the kernel for the socket's family, type and protocol, for a later repr (0.6 us).
        if self._sock:
            self._drop_events_and_close(closefd=reason == "closed")
            self._sock = _closedsocket(-1, -1, -1, None, reason)

    def dup(self) -> Self:
        """Return a second Connection on the same socket; it stays open when this one is closed (even by its server)."""
        if self._stream.tls is not None:
            refuse(self, "dup", NotImplementedError)
        self._stream.shared = SHARED
        copy = super().dup()
        copy.stream.share_mark(self._stream)
        return copy

    def _drop_events_and_close(self, closefd: bool = True, error: Any = cancel_wait_ex) -> None:
        # gevent's detach() calls this.
        if not closefd:
            self._stream.shared = SHARED  # it lives on
        waiting = self._stream.close()
        if waiting is not None:
            self.hub.cancel_waits_close_and_then(waiting, error, self._drop_ref_on_close if closefd else id, self._sock)
        elif closefd:
            self._drop_ref_on_close(self._sock)

    def _drop_ref_on_close(self, sock: Any) -> None:
        # Called when no greenlet waits on the socket any more.
        drop(self, sock)


know(Connection)
# For an unset slot Python calls gevent's __getattr__, which raises EBADF when the connection is closed.
_get_proxied = vars(Connection)["_proxied"].__get__
#: A property implemented in C, 30 ns: its readers read it once per connection. Assigning to it raises AttributeError.
Connection.stream = property(vars(Connection)["_stream"].__get__, doc=":meta private:")  # type: ignore[assignment]
_get_log_fields = vars(Connection)["_log_fields"].__get__
_get_readers = vars(Connection)["_readers"].__get__
_get_session: Callable[[Connection], Session] = vars(Connection)["_session"].__get__


def check_connection_class(value: Any) -> None:
    """Raise ConfigError unless an option ``connection_class`` is Connection or a class derived from it."""
    if not (isinstance(value, type) and issubclass(value, Connection)):
        raise ConfigError(f"connection_class must be a subclass of Connection, got {value!r}")


def readers_of(connection: Connection) -> list[Any]:
    """Return references to the files of ``makefile`` that may read ahead."""
    try:
        return _get_readers(connection)  # type: ignore[no-any-return]
    except AttributeError:
        return []


def is_open(file: Any) -> bool:
    """Return whether a file (or None) can still be read from."""
    try:
        return file is not None and not file.closed
    except ValueError:
        return False  # its read-ahead bytes were lost when its raw file was detached


def _no_separator(data: bytes, separator: bytes) -> EarlyEOF:
    return EarlyEOF(f"the peer closed after {counted(len(data), 'byte')}, before {separator!r}", data)


def log_fields_of(connection: Connection) -> dict[str, Any]:
    """Return its :attr:`Connection.log_fields` without creating the dict."""
    try:
        fields: dict[str, Any] = _get_log_fields(connection)
    except AttributeError:
        return {}
    return fields


def session_of(connection: Connection) -> Session | None:
    """Return its :attr:`Connection.session` without creating it."""
    try:
        return _get_session(connection)
    except AttributeError:
        return None
