"""Owner: what a connection asks of the server that it belongs to. Nothing else of a server is used in this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gtcpserver.tls import Credentials, HandshakeFailure

    from .connection import Connection, Idle
    from .lingering import Linger


class Owner(Protocol):
    """A Server is one. None of it may wait."""

    @property
    def tls(self) -> Credentials | None:
        """What ``start_tls`` uses unless it is given something else."""

    @property
    def lingerer(self) -> Linger:
        """Closes the sockets of its connections."""

    def make_idle(self, connection: Connection) -> Idle:
        """Make the ``with`` block of :meth:`Connection.idle`; once a connection."""

    def client_named(self, connection: Connection) -> None:
        """Count the client that a balancer has named (``client_limits``).

        Raises:
            ClientRefused: it is beyond a limit. The connection has been reset.
        """

    def count_failed_handshake(self, kind: HandshakeFailure) -> None:
        """Count a ``start_tls`` that has failed."""

    def count_tls_flood(self, kind: str) -> None:
        """Count a client that has sent too many TLS records without data, by their kind."""
