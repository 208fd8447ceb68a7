"""Owner: what a connection needs from its server. This folder uses nothing else of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gtcpserver.tls import Credentials, HandshakeFailure

    from .blocks import Idle
    from .connection import Connection
    from .lingering import Linger


class Owner(Protocol):
    """Implemented by Server. No member may wait."""

    @property
    def tls(self) -> Credentials | None:
        """Default credentials of ``start_tls``."""

    @property
    def lingerer(self) -> Linger:
        """The Linger that closes the sockets of its connections."""

    @property
    def draining(self) -> bool:
        """Whether clients should go elsewhere: a stop is near, or has begun."""

    def make_idle(self, connection: Connection) -> Idle:
        """Make the ``with`` block of :meth:`Connection.idle`; called once per connection."""

    def client_named(self, connection: Connection) -> None:
        """Count the client that a balancer has named (``client_limits``).

        Raises:
            ClientRefused: the client is over a limit. The connection was reset.
        """

    def count_failed_handshake(self, kind: HandshakeFailure) -> None:
        """Count a failed ``start_tls``."""

    def count_tls_flood(self, kind: str) -> None:
        """Count a client that sent too many TLS records without data, by kind of record."""
