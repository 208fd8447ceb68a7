"""Admission: what happens between accept and the handler, in its order.

1. The PROXY header is read, where a balancer is to name the client.
2. The limits of the client are asked.
3. The TLS handshake takes place.
4. The connection is handed over to be served.

Steps 1 and 3 wait for the client, each in a `Stage`. What fails is counted, gets its line in the access log, and is
closed, or reset where the client is to see that something went wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.tls import Credentials
from gtcpserver.tls.config import DEFAULT_MAX_HANDSHAKES

from .client_limits import ClientLimits, Refusal
from .proxy_header import HeaderStep, network_address
from .steps import Stage
from .tls_handshake import HandshakeStep

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection


class Admission:
    """The connections of a server that have something to do before a handler gets them.

    Args:
        balancers: from which PROXY headers come; None: from none.
        limits: of each client; None: none.
        tls: whose handshakes; None: plain text.
        admitted: called in the hub with a connection that has passed.
        left_unserved: called in the hub when one has left without being served.
        header_failures, handshake_failures: count by kind what failed.
        unserved: called with a connection that is about to be closed unserved, what the access log calls it, and why.
    """

    def __init__(
        self,
        balancers: ProxyProtocol | None,
        limits: ClientLimits | None,
        tls: Credentials | None,
        admitted: Callable[[Connection], Any],
        left_unserved: Callable[[], Any],
        header_failures: Counter[str],
        handshake_failures: Counter[str],
        unserved: Callable[[Connection, Any, str], Any] | None = None,
    ) -> None:
        self._balancers = balancers
        self._limits = limits
        self._admitted = admitted
        self._left_unserved = left_unserved
        self._unserved = unserved
        #: As whom the limits count a connection: its client address may be another one at its end.
        self._counted_as: dict[Connection, Any] = {}
        self._headers: Stage | None = None
        self._handshakes: Stage | None = None
        if balancers is not None:
            self._headers = Stage(
                "PROXY header",
                balancers.timeout,
                DEFAULT_MAX_HANDSHAKES,
                HeaderStep,
                self._ask_limits,
                self._header_failed,
                header_failures,
            )
        if tls is not None:
            self._handshakes = Stage(
                "TLS handshake",
                tls.handshake_timeout,
                tls.max_handshakes,
                lambda connection: HandshakeStep(connection, tls),
                self._hand_over,
                self._handshake_failed,
                handshake_failures,
            )

    # -- the way of a connection, in the hub -------------------------------------------------------------------------

    def enter(self, connection: Connection) -> None:
        """Take a connection that was accepted. Only from the hub.

        Raises:
            Exception: there is no memory to go on with. The connection is closed, and nothing of it is left here.
        """
        headers, balancers = self._headers, self._balancers
        if headers is not None and balancers is not None and balancers.trusts(connection.client_address):
            headers.begin(connection)  # and then _ask_limits
        else:
            self._ask_limits(connection)

    def _header_failed(self, connection: Connection, kind: str) -> None:
        self._fail(connection, "proxy_header", kind, reset=kind == "not_begun")

    def _ask_limits(self, connection: Connection) -> None:
        if self._limits is not None:
            address = network_address(connection)
            try:
                refusal = self._limits.enter(address)
            except BaseException:
                self._fail(connection, "client_denied", "no memory")
                raise
            if refusal is not None:
                # Reset, as a port that nobody listens on would: no state is kept for it.
                self._fail(connection, refusal, "", reset=True)
                return
            try:
                self._counted_as[connection] = address
            except BaseException:
                self._limits.leave(address)
                self._fail(connection, "client_denied", "no memory")
                raise
        if self._handshakes is not None:
            self._handshakes.begin(connection)  # and then _hand_over
        else:
            self._hand_over(connection)

    def _handshake_failed(self, connection: Connection, kind: str) -> None:
        self.left(connection)
        self._fail(connection, "handshake_failed", kind, reset=kind == "not_begun")

    def _hand_over(self, connection: Connection) -> None:
        try:
            self._admitted(connection)
        except BaseException:
            self.not_served(connection)
            raise

    def not_served(self, connection: Connection) -> None:
        """One that has passed could not be served, unless it was and has ended."""
        if not connection.closed:
            self.left(connection)
            self._fail(connection, "error", "no memory", reset=True)

    def _fail(self, connection: Connection, result: str, detail: str, reset: bool = False) -> None:
        try:
            if self._unserved is not None:
                self._unserved(connection, result, detail)
        finally:
            if reset:
                connection.abort()
            else:
                connection.close()
            self._left_unserved()

    # -- limits of clients -------------------------------------------------------------------------------------------

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

    # -- all of them -------------------------------------------------------------------------------------------------

    @property
    def headers(self) -> int:
        """PROXY headers that are waited for."""
        return len(self._headers) if self._headers is not None else 0

    @property
    def handshakes(self) -> int:
        """TLS handshakes under way."""
        return len(self._handshakes) if self._handshakes is not None else 0

    def __len__(self) -> int:
        return self.headers + self.handshakes

    def _stages(self) -> list[Stage]:
        return [stage for stage in (self._headers, self._handshakes) if stage is not None]

    def end_all(self) -> None:
        """Drop those that are under way."""
        for stage in self._stages():
            stage.end_all()

    def left_in_child(self) -> None:
        """In a forked child: close them there."""
        for stage in self._stages():
            stage.left_in_child()
