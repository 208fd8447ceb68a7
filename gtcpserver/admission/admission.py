"""Lobby: where connections are between accept and their handler, if there is something to do first or no place yet.

First the PROXY header, then the limits of the client that it names, then the TLS handshake; then they wait until the
pool has a place. Headers and handshakes have a lane each.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.tls import Credentials
from gtcpserver.tls.config import DEFAULT_MAX_HANDSHAKES

from .client_limits import ClientLimits, Refusal
from .proxy_header import HeaderStep, network_address
from .steps import Lane
from .tls_handshake import HandshakeStep

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection


class Lobby:
    """The lanes of a server, and those who have passed them.

    Args:
        balancers: from which PROXY headers come; None: from none.
        limits: of each client; None: none.
        tls: whose handshakes; None: plain text.
        ready: called in the hub when somebody has begun to wait in :attr:`waiting`.
        empty: called in the hub when somebody has left without being served.
        header_failures, handshake_failures: count by kind who failed.
        unserved: called with a connection that is about to be closed unserved, what the access log calls it, and why.

    Attributes:
        waiting: connections that only want for a place, in their order.
        failed: how many have failed.
    """

    def __init__(
        self,
        balancers: ProxyProtocol | None,
        limits: ClientLimits | None,
        tls: Credentials | None,
        ready: Callable[[Connection], Any],
        empty: Callable[[], Any],
        header_failures: Counter[str],
        handshake_failures: Counter[str],
        unserved: Callable[[Connection, Any, str], Any] | None = None,
    ) -> None:
        self._balancers = balancers
        self._limits = limits
        self._ready = ready
        self._empty = empty
        self._unserved = unserved
        #: As whom the limits count a connection: its client address may be another one at its end.
        self._counted_as: dict[Connection, Any] = {}
        self.waiting: deque[Connection] = deque()
        self.failed = 0
        self._headers: Lane | None = None
        self._handshakes: Lane | None = None
        if balancers is not None:
            self._headers = Lane(
                "PROXY header",
                balancers.timeout,
                DEFAULT_MAX_HANDSHAKES,
                HeaderStep,
                self._header_done,
                self._header_failed,
                header_failures,
            )
        if tls is not None:
            self._handshakes = Lane(
                "TLS handshake",
                tls.handshake_timeout,
                tls.max_handshakes,
                lambda connection: HandshakeStep(connection, tls),
                self._pass_on,
                self._handshake_failed,
                handshake_failures,
            )

    @property
    def headers(self) -> int:
        """PROXY headers that are waited for."""
        return len(self._headers) if self._headers is not None else 0

    @property
    def handshakes(self) -> int:
        """TLS handshakes under way."""
        return len(self._handshakes) if self._handshakes is not None else 0

    def __len__(self) -> int:
        return self.headers + self.handshakes + len(self.waiting)

    def enter(self, connection: Connection) -> None:
        """Take a connection that was accepted. Only from the hub.

        Raises:
            Exception: there is no memory to go on with. The connection is closed, and nothing of it is left here.
        """
        if (
            self._headers is not None
            and self._balancers is not None
            and self._balancers.trusts(connection.client_address)
        ):
            self._headers.begin(connection)
        else:
            self._header_done(connection)

    def _header_done(self, connection: Connection) -> None:
        address = network_address(connection)
        try:
            refusal = self._limits.enter(address) if self._limits is not None else None
        except BaseException:
            self._fail(connection, "client_denied", "no memory")
            raise
        if refusal is not None:
            # Reset, as a port that nobody listens on would: no state is kept for it.
            self._fail(connection, refusal, "", reset=True)
            return
        if self._limits is not None:
            try:
                self._counted_as[connection] = address
            except BaseException:
                self._limits.leave(address)
                self._fail(connection, "client_denied", "no memory")
                raise
        if self._handshakes is not None:
            self._handshakes.begin(connection)
        else:
            self._pass_on(connection)

    def _pass_on(self, connection: Connection) -> None:
        try:
            self._ready(connection)
        except BaseException:
            self.not_served(connection)
            raise

    def not_served(self, connection: Connection) -> None:
        """One that has passed could not be served, unless it was and has ended."""
        if not connection.closed:
            self.left(connection)
            self._fail(connection, "error", "no memory", reset=True)

    def _header_failed(self, connection: Connection, kind: str) -> None:
        self._fail(connection, "proxy_header", kind, reset=kind == "not_begun")

    def _fail(self, connection: Connection, result: str, detail: str, reset: bool = False) -> None:
        self.failed += 1
        try:
            if self._unserved is not None:
                self._unserved(connection, result, detail)
        finally:
            if reset:
                connection.abort()
            else:
                connection.close()
            self._empty()

    def _handshake_failed(self, connection: Connection, kind: str) -> None:
        self.left(connection)
        self._fail(connection, "handshake_failed", kind, reset=kind == "not_begun")

    def named(self, connection: Connection) -> Refusal | None:
        """Count the client that a header has named, if the connection was let in before as the balancer's.

        Returns:
            The limit that it is beyond; None: it may stay.
        """
        counted_as, address = self._counted_as.get(connection), network_address(connection)
        if self._limits is None or counted_as is None or counted_as == address:
            return None
        del self._counted_as[connection]
        refusal = self._limits.move(counted_as, address)
        if refusal is None:
            self._counted_as[connection] = address
        return refusal

    def left(self, connection: Connection) -> None:
        """A connection that was let in has ended."""
        counted_as = self._counted_as.pop(connection, None)
        if counted_as is not None and self._limits is not None:
            self._limits.leave(counted_as)

    def left_in_child(self) -> None:
        """In a forked child: close them there."""
        for connection in self.waiting:
            connection.left_by_child()
        self.waiting.clear()
        for lane in (self._headers, self._handshakes):
            if lane is not None:
                lane.left_in_child()

    def end_all(self) -> None:
        """Drop those who have something to do yet."""
        for lane in (self._headers, self._handshakes):
            if lane is not None:
                lane.end_all()
