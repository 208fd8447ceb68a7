"""TcpUser: a locust user that speaks any protocol over TCP or TLS.

locust knows HTTP users. Requests on raw sockets do not appear in its statistics (locust issues 1609 and 2374) unless
its events are fired. This module does that: derive from TcpUser and write the protocol with blocking calls, as with a
socket.

    from locust import task
    from tcp_user import TcpUser

    class Store(TcpUser):
        host = "127.0.0.1:5000"

        @task
        def get(self):
            with self.client.request("GET") as request:
                self.client.send(b"GET name\\n")
                answer = self.client.receive_until(b"\\n")
                if answer.startswith(b"ERROR"):
                    request.failure("the server says ERROR")

It only needs locust, so this one file can be copied next to any locustfile. docs/load-testing.md shows more.
"""

from __future__ import annotations

import random
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import gevent
from locust import User, events
from locust.exception import CatchResponseError, RescheduleTask, ResponseError, StopTest, StopUser

#: Bytes to ask the kernel for at once.
READ_SIZE = 64 * 1024

#: Errors of the server; anything else that a task raises is a bug in the test.
FAILURES = (OSError, EOFError, AssertionError, ResponseError)

_T = TypeVar("_T")


class RequestFailed(RescheduleTask):
    """A request has failed, and is already in locust's statistics. ``__cause__`` is the reason.

    A task need not handle it: locust treats it like a ``return``, waits as between any two tasks, and continues.
    """


class ClosedByServer(ConnectionError):
    """The server closed before the whole response had arrived.

    Attributes:
        partial: bytes received so far. Not in the message, since locust counts failures by message.
    """

    def __init__(self, partial: bytes, begun: bool) -> None:
        where = "in the midst of an answer" if begun else "before an answer"
        super().__init__(f"the server closed the connection {where}")
        self.partial = partial


@dataclass(frozen=True)
class Address:
    """The address of a server: "HOST:PORT", "[IPv6]:PORT", "unix:/PATH", optionally preceded by "tcp://" or "tls://".

    Attributes:
        tls: it began with "tls://".
    """

    family: int
    host: str
    port: int = 0
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """
        Raises:
            ValueError: an invalid address; the message says so.
        """
        if text.startswith("unix:") and len(text) > len("unix:"):
            return cls(socket.AF_UNIX, text.removeprefix("unix:"))
        try:
            parts = urlsplit(text if "://" in text else f"tcp://{text}")
            if parts.scheme in ("tcp", "tls") and parts.hostname and parts.port and not (parts.path or parts.username):
                return cls(socket.AF_UNSPEC, parts.hostname, parts.port, parts.scheme == "tls")
        except ValueError:  # a port that is not a number, or too large
            pass
        raise ValueError(f'must be "HOST:PORT", "tls://HOST:PORT" or "unix:/PATH", got {text!r}')


@dataclass(frozen=True)
class Reconnect:
    """When to reconnect after a failure: doing so at once would hammer a server that is down.

    Args:
        first: seconds before the first attempt.
        factor: how much longer each next wait is. Starts over when bytes arrive from the server.
        longest: maximum seconds.
        jitter: random share by which a wait is made shorter or longer, so that users do not come back all at once.
        attempts: consecutive failures after which the user gives up (locust counts one user less); None: never.
    """

    first: float = 0.1
    factor: float = 2.0
    longest: float = 5.0
    jitter: float = 0.5
    attempts: int | None = None

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after this many consecutive failures."""
        exponent = min(failures - 1, 64)  # avoids overflow, however long the server is down
        seconds = min(self.longest, self.first * self.factor**exponent)
        return seconds * random.uniform(1 - self.jitter, 1 + self.jitter)


class TcpClient:
    """A connection that is opened on demand, and whose traffic is reported to locust.

    Each of ``connect``, ``start_tls``, ``send`` and the ``receive`` methods is a request in locust's statistics, named
    by its argument ``name``, with its time, bytes and exception. Within :meth:`request` they are parts of that request.
    A call that fails closes the connection and raises :class:`RequestFailed`; the next one reconnects.

    Attributes:
        user: the user it belongs to; its attributes are the options.
        address: address to connect to.
        socket: the connection, gevent's socket or SSL socket, for everything else; None while there is none.
        failures: consecutive failures; :meth:`connect` waits after one.
        under_way: the request being measured.
    """

    def __init__(self, user: TcpUser, address: Address) -> None:
        self.user = user
        self.address = address
        self.socket: Any = None
        self.failures = 0
        self.under_way: Request | None = None
        self._kept = b""  # read, but not asked for yet

    # -- connecting --------------------------------------------------------------------------------------------------

    def connect(self, name: str = "connect") -> None:
        """Connect, unless already connected; all other methods do this on demand.

        After a failure it waits first, according to the user's ``reconnect``; the wait is not part of the reported
        time. With TLS, the handshake is a separate request. Then the user's ``on_connect`` is called.
        """
        if self.socket is not None:
            return
        if self.under_way is None:
            self.wait_to_reconnect()
        self._measured(name, self._open)
        try:
            if self.address.tls or self.user.tls:
                self.start_tls()
            self.user.on_connect()
        except BaseException:
            self.drop()
            self.failures = self.failures or 1
            raise

    def wait_to_reconnect(self) -> None:
        """Wait after a failure, according to the user's ``reconnect``.

        Raises:
            StopUser: there were too many consecutive failures.
        """
        if not self.failures:
            return
        policy = self.user.reconnect
        if policy is None or (policy.attempts is not None and self.failures >= policy.attempts):
            raise StopUser(f"gave up after {self.failures} failures in a row")
        gevent.sleep(policy.wait(self.failures))

    def _open(self) -> None:
        user, address = self.user, self.address
        late = TimeoutError(f"not connected within {user.connect_timeout} s")
        with gevent.Timeout(user.connect_timeout, late):  # includes looking up the name
            if address.family == socket.AF_UNIX:
                targets: list[Any] = [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", address.host)]
            else:
                targets = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            failed: OSError = OSError(f"no address found for {address.host}")
            for family, kind, protocol, _, target in targets:
                sock = socket.socket(family, kind, protocol)
                try:
                    if family != socket.AF_UNIX:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    user.prepare_socket(sock)
                    sock.connect(target)
                except BaseException as error:
                    sock.close()
                    if error is late or not isinstance(error, OSError):
                        raise
                    failed = error
                else:
                    self.socket = sock
                    return
        raise failed

    def start_tls(self, name: str = "TLS handshake") -> None:
        """Encrypt the connection from here on; for protocols that begin in plain text (STARTTLS)."""
        self._measured(name, self._start_tls)

    def _start_tls(self) -> None:
        if self._kept:
            raise ResponseError("unencrypted bytes came before the TLS handshake")  # RFC 3207 section 6
        user = self.user
        context = user.tls if isinstance(user.tls, ssl.SSLContext) else _default_context()
        with gevent.Timeout(user.connect_timeout, TimeoutError(f"no TLS within {user.connect_timeout} s")):
            self.socket.settimeout(None)
            name = user.tls_server_name or self.address.host
            self.socket = context.wrap_socket(self.socket, server_hostname=name)

    # -- one request of several steps --------------------------------------------------------------------------------

    def request(self, name: str, *, connect: bool = False, context: dict[str, Any] | None = None) -> Request:
        """Make one request of everything that is sent and received in ``with client.request("GET") as request:``.

        An OSError, EOFError, AssertionError or locust's ResponseError that leaves the block is the request's failure,
        and becomes RequestFailed; ``request.failure("why")`` reports a failure that leaves the connection usable. Any
        other exception is reported and passed on: locust logs it, since it is likely a bug in the test.

        Args:
            name: name in the statistics.
            connect: use a new connection, and include its setup in the time (with TLS: and the handshake). Otherwise,
                opening a connection is a separate request, before this one begins.
            context: for listeners of locust's event, in addition to ``User.context()``.
        """
        return Request(self, name, connect, context)

    def _measured(self, name: str, call: Callable[..., _T], *arguments: Any) -> _T:
        """Measure a call as a request of its own, or as a part of the current one."""
        if self.under_way is not None:
            return call(*arguments)
        if self.socket is None and call != self._open:
            self.connect()
        request = Request(self, name)
        request.begin()
        with request:
            return call(*arguments)

    # -- sending and receiving ---------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview, name: str = "send") -> None:
        """Send all of ``data``. Returns when the kernel has taken it, which says nothing about the server."""
        self._measured(name, self._send, data)

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        sock = self._connected()
        sock.settimeout(self.user.timeout)
        try:
            sock.sendall(data)
        except TimeoutError:
            raise TimeoutError(f"the server did not take it within {self.user.timeout} s") from None
        self._count.sent += len(data)

    def receive(self, limit: int = READ_SIZE, name: str = "receive") -> bytes:
        """Receive what has arrived, at least one byte and at most ``limit``."""
        return self._measured(name, self._receive, limit)

    def _receive(self, limit: int) -> bytes:
        data = self._kept or self._read(self._deadline(), limit)
        if not data:
            raise self._closed(b"")
        self._kept = data[limit:]
        return self._take(data[:limit])

    def receive_exactly(self, size: int, name: str = "receive") -> bytes:
        """Receive ``size`` bytes."""
        return self._measured(name, self._receive_exactly, size)

    def _receive_exactly(self, size: int) -> bytes:
        deadline = self._deadline()
        # Joined once: adding to a large bytes object repeatedly would copy it each time.
        pieces, missing = [self._kept], size - len(self._kept)
        self._kept = b""
        while missing > 0:
            pieces.append(self._read(deadline, READ_SIZE))
            if not pieces[-1]:
                raise self._closed(b"".join(pieces))
            missing -= len(pieces[-1])
        data = b"".join(pieces)
        self._kept = data[size:]
        return self._take(data[:size])

    def receive_until(self, delimiter: bytes = b"\n", limit: int = READ_SIZE, name: str = "receive") -> bytes:
        """Receive up to and including ``delimiter``; keep surplus bytes for the next call.

        Args:
            delimiter: one byte or more.
            limit: maximum bytes, including the delimiter; more without it is a failure.
        """
        if not delimiter:
            raise ValueError("delimiter must be one byte or more, got b''")
        return self._measured(name, self._receive_until, delimiter, limit)

    def _receive_until(self, delimiter: bytes, limit: int) -> bytes:
        deadline = self._deadline()
        data, searched = self._kept, 0
        while (found := data.find(delimiter, searched)) < 0 and len(data) < limit:
            searched = max(0, len(data) - len(delimiter) + 1)
            more = self._read(deadline, READ_SIZE)
            if not more:
                raise self._closed(data)
            data += more
        end = found + len(delimiter)
        if found < 0 or end > limit:
            raise ResponseError(f"no {delimiter!r} within {limit} bytes")
        self._kept = data[end:]
        return self._take(data[:end])

    def receive_to_end(self, limit: int = 1 << 30, name: str = "receive") -> bytes:
        """Receive until the server closes its side, at most ``limit`` bytes. Then close the connection."""
        return self._measured(name, self._receive_to_end, limit)

    def _receive_to_end(self, limit: int) -> bytes:
        deadline = self._deadline()
        pieces, size = [self._kept], len(self._kept)
        while size <= limit and (piece := self._read(deadline, READ_SIZE)):
            pieces.append(piece)
            size += len(piece)
        if size > limit:
            raise ResponseError(f"more than {limit} bytes")
        self.close()
        return self._take(b"".join(pieces))

    def _connected(self) -> Any:
        if self.socket is None:  # closed within a request
            self.connect()
        return self.socket

    def _deadline(self) -> float | None:
        # For a whole call: a server that trickles bytes cannot extend it.
        seconds = self.user.timeout
        return None if seconds is None else time.monotonic() + seconds

    def _read(self, deadline: float | None, size: int) -> bytes:
        sock = self._connected()
        try:
            if deadline is None:
                sock.settimeout(None)
            else:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                sock.settimeout(left)
            data: bytes = sock.recv(size)
        except TimeoutError:
            raise TimeoutError(f"no whole answer within {self.user.timeout} s") from None
        if data:
            self.failures = 0  # it works again
        return data

    def _closed(self, partial: bytes) -> ClosedByServer:
        return ClosedByServer(partial, begun=bool(partial or self._count.received))

    @property
    def _count(self) -> Request:
        assert self.under_way is not None  # see _measured
        return self.under_way

    def _take(self, data: bytes) -> bytes:
        request = self._count
        request.received += len(data)
        request.response = data
        return data

    # -- the end -----------------------------------------------------------------------------------------------------

    def half_close(self) -> None:
        """Tell the server that nothing more will be sent; responses can still be received. Not over TLS."""
        if self.socket is not None:
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection, if there is one. The next call reconnects, at once."""
        if self.socket is not None:
            self.failures = 0
        self.drop()

    def reset(self) -> None:
        """Close with a reset, like a client that crashes: the server gets ECONNRESET (SO_LINGER 0, socket(7))."""
        if self.socket is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def drop(self) -> None:
        """Close a connection that failed: like :meth:`close`, but the failures stay counted.

        Bytes that still arrive on it would be taken for the response to something else.
        """
        sock, self.socket, self._kept = self.socket, None, b""
        if sock is not None:
            sock.close()

    def __enter__(self) -> TcpClient:
        """Connect in ``with self.client:``, and close at the end of the block."""
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Request:
    """A measured request: the block of :meth:`TcpClient.request`, or one call outside such a block.

    Attributes:
        name: name in the statistics; may be changed until the end of the block.
        response: for listeners of locust's event; the last bytes received, unless something else is assigned.
        response_length: for the column "Average size", bytes; None: those received, or sent if none were.
        context: for listeners of locust's event.
        exception: the reported failure; None: none.
        received, sent: bytes so far.
    """

    # A class with slots instead of @contextmanager, which costs 1 us more per request.
    __slots__ = (
        "_began",
        "_client",
        "_connect",
        "_paused",
        "_started",
        "context",
        "exception",
        "name",
        "received",
        "response",
        "response_length",
        "sent",
    )

    def __init__(
        self, client: TcpClient, name: str, connect: bool = False, context: dict[str, Any] | None = None
    ) -> None:
        self._client = client
        self._connect = connect
        self._began: float | None = None
        self._paused = 0.0
        self.exception: BaseException | None = None
        self.name = name
        self.context = context
        self.response: Any = None
        self.response_length: int | None = None
        self.received = self.sent = 0

    def failure(self, why: str | BaseException) -> None:
        """Report the request as failed. Use equal messages for equal failures: locust counts them by message."""
        measured = self._client.under_way or self  # this one may be a part of another
        measured.exception = why if isinstance(why, BaseException) else CatchResponseError(why)

    def sleep(self, seconds: float) -> None:
        """Let the user pause in the middle of the request; the reported time excludes the pause."""
        began = time.perf_counter()
        gevent.sleep(seconds)
        self._paused += time.perf_counter() - began

    def begin(self) -> None:
        """Start the clock."""
        self._client.under_way = self
        self._started = time.time()
        self._began = time.perf_counter()

    def __enter__(self) -> Request:
        client = self._client
        if client.under_way is not None:
            return self  # a part of another: of one that connects and calls on_connect; or _measured has begun it
        if not self._connect:
            client.connect()
            self.begin()
            return self
        client.close()
        client.wait_to_reconnect()
        self.begin()
        try:
            client.connect()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._began is None:
            return
        seconds = time.perf_counter() - self._began - self._paused
        client = self._client
        client.under_way = None
        if error is not None:
            client.drop()
            if not isinstance(error, Exception) or isinstance(error, (StopUser, StopTest)):
                return  # locust ends this user; nothing has failed
            client.failures += 1
            self.exception = error
        user = client.user
        length = self.response_length
        user.environment.events.request.fire(
            request_type=user.request_type,
            name=self.name,
            response_time=seconds * 1000,
            response_length=(self.received or self.sent) if length is None else length,
            response=self.response,
            context={**user.context(), **(self.context or {})},
            exception=self.exception,
            start_time=self._started,
        )
        if isinstance(error, FAILURES):
            raise RequestFailed(f"{self.name}: {error}") from error


class TcpUser(User):
    """A locust user with its own TCP or TLS connection, ``client``. Derive from it and write tasks.

    The connection is opened when the first task needs it, and kept from task to task; close it in a task that wants a
    new one (``with self.client:``). Do not talk to the server in ``on_start``, where an exception ends the user for
    good: a greeting or a login belongs in :meth:`on_connect`, which is called for each new connection.

    Attributes:
        host: "HOST:PORT", "[IPv6]:PORT", "tls://HOST:PORT" or "unix:/PATH"; locust's --host overrides it.
        request_type: value of the column "Type" in the statistics.
        connect_timeout: seconds to connect, including looking up the name; and seconds for the TLS handshake.
        timeout: seconds for each send and receive as a whole, no matter how slowly bytes trickle in; None: no limit.
        tls: True encrypts, verified by the system's CAs; or an ssl.SSLContext.
        tls_server_name: the name to request and to find in the certificate; None: the host's.
        reconnect: when to reconnect after a failure; None: never, the user ends.
    """

    abstract = True

    request_type: str = "TCP"
    connect_timeout: float = 5.0
    timeout: float | None = 10.0
    tls: bool | ssl.SSLContext = False
    tls_server_name: str | None = None
    reconnect: Reconnect | None = Reconnect()

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        if self.host is None:
            raise StopTest(f'{type(self).__name__} needs a host: --host HOST:PORT, or host = "HOST:PORT" in the class')
        try:
            address = Address.parse(self.host)
        except ValueError as mistake:
            raise StopTest(f"host of {type(self).__name__} {mistake}") from None
        self.client = TcpClient(self, address)

    def prepare_socket(self, sock: socket.socket) -> None:
        """Prepare ``sock`` before it connects: set socket options, or ``bind`` to one of many source addresses."""

    def on_connect(self) -> None:
        """Prepare a new connection before its first use: greet, log in."""

    def start(self, group: Any) -> Any:
        greenlet = super().start(group)
        # Not on_stop, which a derived class may define without calling ours. Closing does not wait.
        greenlet.rawlink(lambda _: self.client.close())
        return greenlet


@events.init.add_listener
def check_hosts(environment: Any, **_: Any) -> None:
    """End locust with a line and exit status 2 if a host is invalid, before anything begins."""
    for user_class in environment.user_classes:
        host = environment.host or user_class.host
        if issubclass(user_class, TcpUser) and host:
            try:
                Address.parse(host)
            except ValueError as mistake:
                print(f"host of {user_class.__name__} {mistake}", file=sys.stderr)
                sys.exit(2)


_context: ssl.SSLContext | None = None


def _default_context() -> ssl.SSLContext:
    # One for all users: loading the system's CAs takes 20 ms.
    global _context
    if _context is None:
        _context = ssl.create_default_context()
    return _context


def insecure_context() -> ssl.SSLContext:
    """Return a context for ``TcpUser.tls`` that encrypts and trusts every certificate, such as a self-signed one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
