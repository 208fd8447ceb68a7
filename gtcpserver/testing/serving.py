"""serving: run a server during a ``with`` block, and report errors of its handlers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.logs import own_logger
from gtcpserver.plural import counted
from gtcpserver.server.outcome import is_client_error
from gtcpserver.server.server import Server
from gtcpserver.signatures import ConnectionT, Handler

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Unpack, overload  # which type checkers have

    from gtcpserver.address import ListenAddress
    from gtcpserver.signatures import ServerOptions

log = own_logger("gtcpserver.testing")

#: Seconds that handlers get to end after their clients left; then they are ended. Only a handler that waits for
#: something else takes this time, at the end of its test.
STOP_SECONDS = 1.0


class HandlerFailed(AssertionError):
    """A handler raised, or did not end. The first exception is the ``__cause__``, the others are in the log.

    Example::

        import pytest
        from gtcpserver.testing import HandlerFailed, connect, serving

        def test_a_broken_handler():
            with pytest.raises(HandlerFailed), serving(lambda conn: 1 / 0) as server:
                with connect(server) as client:
                    client.recv_all()
    """


class ServerUnderTest(Server):
    """A Server on a free port of 127.0.0.1 that keeps the exceptions of its handlers.

    Args:
        handler: as Server.
        address: as Server.
        **options: as Server.

    Attributes:
        errors: the exceptions that were faults of a handler, oldest first. A reset, a timeout or a line that is too
            long is the client's fault: not included (but counted, see ``stats()``).

    Example::

        from gtcpserver.testing import connect, serving

        with serving(lambda conn: 1 / 0, allow_errors=True) as server:
            with connect(server) as client:
                client.recv_all()
            print(server.errors)  # [ZeroDivisionError('division by zero')]
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self,
            handler: Handler[Connection],
            address: ListenAddress | list[Any] = ...,
            **options: Unpack[ServerOptions],
        ) -> None: ...
        @overload
        def __init__(
            self,
            handler: Handler[ConnectionT],
            address: ListenAddress | list[Any] = ...,
            *,
            connection_class: type[ConnectionT],
            **options: Unpack[ServerOptions[ConnectionT]],
        ) -> None: ...

    def __init__(
        self, handler: Handler[Any], address: ListenAddress | list[Any] = "127.0.0.1:0", **options: Any
    ) -> None:
        self.errors: list[BaseException] = []
        self._on_error_of_user: Callable[[Any, BaseException], Any] | None = options.pop("on_error", None)
        super().__init__(address, handler, on_error=self._note_error, **options)

    def _note_error(self, connection: Connection, error: BaseException) -> None:
        if not is_client_error(error, connection):
            self.errors.append(error)
            if self._on_error_of_user is None:
                log.error("handler for %s failed", connection.client_address, exc_info=error)
        if self._on_error_of_user is not None:
            self._on_error_of_user(connection, error)


if TYPE_CHECKING:

    @overload
    def serving(
        handler: Handler[Connection],
        address: ListenAddress | list[Any] = ...,
        *,
        allow_errors: bool = ...,
        stop_timeout: float = ...,
        **options: Unpack[ServerOptions],
    ) -> AbstractContextManager[ServerUnderTest]: ...
    @overload
    def serving(
        handler: Handler[ConnectionT],
        address: ListenAddress | list[Any] = ...,
        *,
        allow_errors: bool = ...,
        stop_timeout: float = ...,
        connection_class: type[ConnectionT],
        **options: Unpack[ServerOptions[ConnectionT]],
    ) -> AbstractContextManager[ServerUnderTest]: ...


@contextmanager
def serving(
    handler: Handler[Any],
    address: ListenAddress | list[Any] = "127.0.0.1:0",
    *,
    allow_errors: bool = False,
    stop_timeout: float = STOP_SECONDS,
    **options: Any,
) -> Iterator[ServerUnderTest]:
    """Run a server during the ``with`` block, whenever the block waits.

    It runs in the event loop of this thread: wait with ``connect()``'s clients, ``in_thread()`` or ``gevent.sleep()``,
    or with any call in a monkey-patched program. A plain socket's ``recv`` would deadlock: it blocks the server that it
    waits for.

    Args:
        handler: as Server.
        address: as Server; a free port by default.
        allow_errors: do not raise for errors of handlers; they are in ``server.errors``.
        stop_timeout: seconds for handlers to end at the end of the block; then they are ended by GreenletExit.
        **options: as Server.

    Raises:
        HandlerFailed: at the end of the block, if a handler raised, or did not end when told to.
        ConfigError, OSError: as Server.

    Example::

        from gtcpserver.testing import connect, serving

        def test_echo():
            with serving(echo, timeout=5) as server, connect(server) as client:
                client.sendall(b"hello")
                assert client.recv_exactly(5) == b"hello"
    """
    server = ServerUnderTest(handler, address, **options)
    server.start()
    try:
        yield server
    except BaseException:
        server.halt()
        raise
    report = server.stop(stop_timeout)
    endless = [str(connection) for connection in report.cut if not connection.ended]
    if allow_errors:
        return
    if endless:
        raise HandlerFailed(f"{counted(len(endless), 'handler')} would not end: {'; '.join(endless)}")
    if server.errors:
        first, more = server.errors[0], len(server.errors) - 1
        also = f" ({more} more exceptions)" if more else ""
        raise HandlerFailed(f"a handler raised {type(first).__name__}: {first}{also}") from first
