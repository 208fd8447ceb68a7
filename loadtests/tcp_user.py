"""TcpUser: a locust user that speaks any protocol on TCP or TLS.

locust knows HTTP users. Requests on raw sockets do not appear in its statistics (locust issues 1609 and 2374) until
somebody fires its events. This does: derive from TcpUser and write the protocol, blocking, as one would with a socket.

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

It needs locust alone, so this one file can be copied next to any locustfile. docs/load-testing.md shows more.
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

#: What is asked of the kernel at once.
READ_SIZE = 64 * 1024

#: What a server does wrong; anything else that a task raises is a fault of the test.
FAILURES = (OSError, EOFError, AssertionError, ResponseError)

_T = TypeVar("_T")


class RequestFailed(RescheduleTask):
    """A request has failed, and locust's statistics have it already. ``__cause__`` is what went wrong.

    In a task it needs no handling: locust takes it for a ``return``, waits as between any two tasks, and goes on.
    """


class ClosedByServer(ConnectionError):
    """The server closed before the whole answer had come.

    Attributes:
        partial: what had come. Not in the message, since locust counts failures by their message.
    """

    def __init__(self, partial: bytes, begun: bool) -> None:
        where = "in the midst of an answer" if begun else "before an answer"
        super().__init__(f"the server closed the connection {where}")
        self.partial = partial


@dataclass(frozen=True)
class Address:
    """Where a user connects to, as "HOST:PORT", "[IPv6]:PORT", "unix:/PATH", or with "tcp://" or "tls://" before it.

    Attributes:
        tls: it said "tls://".
    """

    family: int
    host: str
    port: int = 0
    tls: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """
        Raises:
            ValueError: it is none of these; the message says so.
        """
        if text.startswith("unix:") and len(text) > len("unix:"):
            return cls(socket.AF_UNIX, text.removeprefix("unix:"))
        try:
            parts = urlsplit(text if "://" in text else f"tcp://{text}")
            if parts.scheme in ("tcp", "tls") and parts.hostname and parts.port and not (parts.path or parts.username):
                return cls(socket.AF_UNSPEC, parts.hostname, parts.port, parts.scheme == "tls")
        except ValueError:  # a port that is no number, or too large
            pass
        raise ValueError(f'must be "HOST:PORT", "tls://HOST:PORT" or "unix:/PATH", got {text!r}')


@dataclass(frozen=True)
class Reconnect:
    """When to connect again after a failure: at once would make a client that hammers a server which is down.

    Args:
        first: seconds before the first attempt.
        factor: how much longer each next wait is. The count begins anew when bytes come from the server.
        longest: seconds at most.
        jitter: share by which a wait is made shorter or longer at random, so that users do not come back all at once.
        attempts: failures in a row after which the user gives up (locust counts one user less); None: never.
    """

    first: float = 0.1
    factor: float = 2.0
    longest: float = 5.0
    jitter: float = 0.5
    attempts: int | None = None

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        exponent = min(failures - 1, 64)  # no number overflows, however long the server is down
        seconds = min(self.longest, self.first * self.factor**exponent)
        return seconds * random.uniform(1 - self.jitter, 1 + self.jitter)


class TcpClient:
    """One connection that is made when it is needed, and what goes over it reported to locust.

    Each of ``connect``, ``start_tls``, ``send`` and the ``receive`` methods is a request in locust's statistics, by the
    ``name`` it is given, with its time, the bytes it moved and its exception. Within :meth:`request` they are parts of
    that one. A call that fails closes the connection and raises :class:`RequestFailed`; the next one connects again.

    Attributes:
        user: whose it is; its attributes are the options.
        address: where it connects to.
        socket: the connection, gevent's socket or SSL socket, for what is not here; None while there is none.
        failures: in a row; :meth:`connect` waits after one.
        under_way: the request that is being measured.
    """

    def __init__(self, user: TcpUser, address: Address) -> None:
        self.user = user
        self.address = address
        self.socket: Any = None
        self.failures = 0
        self.under_way: Request | None = None
        self._kept = b""  # read, and not asked for yet

    # -- connecting --------------------------------------------------------------------------------------------------

    def connect(self, name: str = "connect") -> None:
        """Connect, unless it is connected; all other methods do this by themselves.

        After a failure it waits first, as the user's ``reconnect`` says; the wait is not part of the time reported.
        With TLS, the handshake is a request of its own. Then the user's ``on_connect`` is called.
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
        """Wait after a failure, as the user's ``reconnect`` says.

        Raises:
            StopUser: there were too many in a row.
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
        with gevent.Timeout(user.connect_timeout, late):  # of the look-up of the name, too
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
        """Encrypt the connection from here on; for protocols that ask for it in plain text first (STARTTLS)."""
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
        """``with client.request("GET") as request:`` makes one request of all that is sent and received in the block.

        An OSError, EOFError, AssertionError or locust's ResponseError that leaves the block is the request's failure,
        and goes on as RequestFailed; ``request.failure("why")`` marks one that leaves the connection usable. Any other
        exception is reported and goes on as it is: locust logs it, since it is likely a fault of the test.

        Args:
            name: in the statistics.
            connect: connect anew, and count the time of it (with TLS: and of the handshake). Otherwise a connection
                that has to be made is a request of its own, before this one begins.
            context: for listeners of locust's event, beside what ``User.context()`` says.
        """
        return Request(self, name, connect, context)

    def _measured(self, name: str, call: Callable[..., _T], *arguments: Any) -> _T:
        """A request of its own, or a part of the one under way."""
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
        """Send all of ``data``. It is done when the kernel has taken it, which says nothing about the server."""
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
        """Receive what there is, at least one byte and at most ``limit``."""
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
        # Joined once: to add to a large bytes object again and again would copy it each time.
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
        """Receive up to and including ``delimiter``; what came behind it is kept for the next call.

        Args:
            delimiter: one byte or more.
            limit: bytes, the delimiter included; more without it is a failure.
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
        """Receive until the server closes its side, ``limit`` bytes at most. The connection is closed then."""
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
        # Of a whole call: a server that drips cannot stretch it.
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
        """Tell the server that nothing more will be sent; answers can still be received. Not over TLS."""
        if self.socket is not None:
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection, if there is one. The next call connects again, at once."""
        if self.socket is not None:
            self.failures = 0
        self.drop()

    def reset(self) -> None:
        """Close with a reset, as a client does that crashes: the server gets ECONNRESET (SO_LINGER 0, socket(7))."""
        if self.socket is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def drop(self) -> None:
        """As :meth:`close`, but failures stay counted: for a connection that failed.

        What still comes on it would be taken for the answer to something else.
        """
        sock, self.socket, self._kept = self.socket, None, b""
        if sock is not None:
            sock.close()

    def __enter__(self) -> TcpClient:
        """``with self.client:`` connects, and closes at the end of the block."""
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Request:
    """What is measured: the block of :meth:`TcpClient.request`, or one call outside of such a block.

    Attributes:
        name: in the statistics; may be changed until the end of the block.
        response: for listeners of locust's event; the last bytes received, unless something else is assigned.
        response_length: for the column "Average size", bytes; None: those received, or sent where none were.
        context: for listeners of locust's event.
        exception: what the request is reported to have failed by; None: it has not.
        received, sent: bytes so far.
    """

    # A class with slots, not @contextmanager: that costs 1 us more a request.
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
        """Report the request as failed. Give equal messages to equal failures: locust counts them by message."""
        measured = self._client.under_way or self  # this one may be a part of another
        measured.exception = why if isinstance(why, BaseException) else CatchResponseError(why)

    def sleep(self, seconds: float) -> None:
        """Let the user pause in the midst of the request; the time reported is without it."""
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
    """A locust user with a TCP or TLS connection of its own, ``client``. Derive from it and write tasks.

    The connection is made when the first task needs it, and kept from task to task; close it in a task that wants a
    new one (``with self.client:``). Do not talk to the server in ``on_start``, where an exception ends the user for
    good: a greeting or a log-in belongs into :meth:`on_connect`, which is called for each new connection.

    Attributes:
        host: "HOST:PORT", "[IPv6]:PORT", "tls://HOST:PORT" or "unix:/PATH"; locust's --host replaces it.
        request_type: in the column "Type" of the statistics.
        connect_timeout: seconds to connect, the look-up of the name included; and seconds for the TLS handshake.
        timeout: seconds for each send and receive as a whole, however slowly its bytes drip; None waits for ever.
        tls: True encrypts, with the system's authorities; an ssl.SSLContext does as it says.
        tls_server_name: the name to ask for and to find in the certificate; None: the host's.
        reconnect: when to connect again after a failure; None: never, the user ends.
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
        """Called before ``sock`` connects: for socket options, or a ``bind`` to one of many source addresses."""

    def on_connect(self) -> None:
        """Called when a connection has been made, before its first use: greet, log in."""

    def start(self, group: Any) -> Any:
        greenlet = super().start(group)
        # Not on_stop, which a derived class may define without calling ours. Closing does not wait.
        greenlet.rawlink(lambda _: self.client.close())
        return greenlet


@events.init.add_listener
def check_hosts(environment: Any, **_: Any) -> None:
    """A host that cannot be one ends locust with a line and exit status 2, before anything begins."""
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
    # One for all users: reading the system's authorities takes 20 ms.
    global _context
    if _context is None:
        _context = ssl.create_default_context()
    return _context


def insecure_context() -> ssl.SSLContext:
    """For ``TcpUser.tls``: encrypts, and trusts every certificate; for servers with a self-signed one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
