"""Admission: what happens between accept and the handler, in order.

1. Read the PROXY header, if the connection comes from a balancer.
2. Check the limits of the client: those of this machine, and then, with ``shared_limits``, those of all machines.
3. Do the TLS handshake.
4. Hand the connection over to be served.

Steps 1 and 3 wait for the client, each in a `Stage`; step 2 may wait for Redis, within its time-out. A connection that
fails is counted, gets a line in the access log, and is closed, or reset where the client must see that something went
wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from gtcpserver.proxy_protocol.trust import ProxyProtocol
from gtcpserver.tls import Credentials
from gtcpserver.tls.config import DEFAULT_MAX_HANDSHAKES

from .client_limits import ClientLimits
from .proxy_header import HeaderStep, network_address
from .shared_clients import Refusal
from .steps import Stage
from .tls_handshake import HandshakeStep

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection


class Admission:
    """The connections of a server that a handler cannot have yet.

    Args:
        balancers: trusted senders of PROXY headers; None: nobody sends one.
        limits: limits for each client; None: no limits.
        tls: certificates for TLS handshakes; None: plain text.
        admitted: called in the hub with each connection that passed every step.
        left_unserved: called in the hub after a connection was closed unserved.
        header_failures, handshake_failures: counters of failures, by kind.
        unserved: called before a connection is closed unserved, with the connection, its result, and the detail for the
            access log.
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
        #: The address that the limits count a connection under: its client address may change later.
        self._counted_as: dict[Connection, Any] = {}
        #: Connections that Redis is asked about.
        self._asked_about: set[Connection] = set()
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
        #: The step behind the limits.
        self._go_on = self._hand_over if self._handshakes is None else self._handshakes.begin
        #: Takes an accepted connection; call in the hub only. Without balancers it is a call less: 400 instructions.
        #: If memory runs out it raises, and the connection is closed, and nothing of it is left here.
        self.enter: Callable[[Connection], object] = self._ask_limits if balancers is None else self._ask_balancers

    # -- the way of a connection, in the hub -------------------------------------------------------------------------

    def _ask_balancers(self, connection: Connection) -> None:
        headers, balancers = self._headers, self._balancers
        if headers is not None and balancers is not None and balancers.trusts(connection.client_address):
            headers.begin(connection)  # and then _ask_limits
        else:
            self._ask_limits(connection)

    def _header_failed(self, connection: Connection, kind: str) -> None:
        self._fail(connection, "proxy_header", kind, reset=kind == "not_begun")

    def _ask_limits(self, connection: Connection) -> None:
        if self._limits is not None:
            address = connection.client_address
            if not isinstance(address, tuple):
                address = network_address(connection)
            try:
                refusal = self._limits.enter(address)
            except BaseException:
                self._fail(connection, "client_denied", "no memory")
                raise
            if refusal is not None:
                # A reset, as from a port that nobody listens on: the kernel keeps no state for it.
                self._fail(connection, refusal, "", reset=True)
                return
            try:
                self._counted_as[connection] = address
            except BaseException:
                self._limits.undo_enter(address)
                self._fail(connection, "client_denied", "no memory")
                raise
            if self._limits.asks_store:
                self._ask_store(self._limits, connection, address)  # and then _go_on
                return
        self._go_on(connection)

    def _ask_store(self, limits: ClientLimits, connection: Connection, address: Any) -> None:
        try:
            self._asked_about.add(connection)
            known, refusal = limits.confirm(address, partial(self._confirmed, connection, address))
        except BaseException:
            self._asked_about.discard(connection)
            del self._counted_as[connection]
            limits.undo_enter(address)
            self._fail(connection, "client_denied", "no memory")
            raise
        if known:
            self._confirmed(connection, address, refusal)

    def _confirmed(self, connection: Connection, address: Any, refusal: Refusal | None) -> None:
        if connection not in self._asked_about:  # a stop has ended it
            if refusal is None and self._limits is not None:
                self._limits.leave(address)
            return
        self._asked_about.remove(connection)
        if refusal is None:
            self._go_on(connection)
        else:
            del self._counted_as[connection]
            self._fail(connection, refusal, "", reset=True)

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
        """Reset an admitted connection that could not be served. Does nothing if it was served and has ended."""
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
        """Count a connection as that of the client its header named, if it was counted as the balancer's before.

        Returns:
            The limit that the client exceeds; None: it may stay.
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
        """Stop counting a connection that has ended."""
        counted_as = self._counted_as.pop(connection, None)
        if counted_as is not None and self._limits is not None:
            self._limits.leave(counted_as)

    def counted_as(self, connection: Connection) -> Any:
        """Return the address that the limits count a connection under; None: they do not."""
        return self._counted_as.get(connection)

    def resume(self, connection: Connection, address: Any, returns: bool = False) -> Refusal | None:
        """Count a connection that another worker has admitted, without asking for its rate.

        Args:
            address: the client's, as `counted_as` returned it there; None: take that of the connection.
            returns: it was counted here before, and must stay.

        Returns:
            The limit that refuses it; None: call `left` when it ends.
        """
        if self._limits is None:
            return None
        address = network_address(connection) if address is None else tuple(address)
        refusal = self._limits.resume(address, returns)
        if refusal is None:
            self._counted_as[connection] = address
        return refusal

    # -- all connections ---------------------------------------------------------------------------------------------

    @property
    def headers(self) -> int:
        """Number of connections whose PROXY header has not arrived yet."""
        return len(self._headers) if self._headers is not None else 0

    @property
    def handshakes(self) -> int:
        """Number of TLS handshakes under way."""
        return len(self._handshakes) if self._handshakes is not None else 0

    def __len__(self) -> int:
        return self.headers + self.handshakes + len(self._asked_about)

    def _stages(self) -> list[Stage]:
        return [stage for stage in (self._headers, self._handshakes) if stage is not None]

    def end_all(self) -> None:
        """Fail every connection whose header or handshake is unfinished, or that Redis has not answered about."""
        for stage in self._stages():
            stage.end_all()
        for connection in list(self._asked_about):
            self._asked_about.discard(connection)
            self._counted_as.pop(connection, None)  # `_confirmed` ends the count
            self._fail(connection, "stopped", "", reset=True)

    def left_in_child(self) -> None:
        """Close the child's copies of the connections. Called in a forked child."""
        for stage in self._stages():
            stage.left_in_child()
        for connection in self._asked_about:
            connection.left_by_child()
        self._asked_about = set()
