"""The TLS handshake as a step of admission, without a greenlet."""

from __future__ import annotations

from ssl import SSLWantReadError, SSLWantWriteError
from typing import TYPE_CHECKING, Any

from gtcpserver.connection.handshake_failure import handshake_failed
from gtcpserver.connection.tls_layer import TLSLayer
from gtcpserver.tls import Credentials
from gtcpserver.tls.info import ChallengeAnswered

from .steps import Step

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection


class HandshakeStep(Step):
    """A TLS handshake under way, in a stage."""

    __slots__ = ("_layer",)

    def __init__(self, connection: Connection, credentials: Credentials) -> None:
        super().__init__(connection)
        self._layer = TLSLayer(
            connection, credentials.context, credentials.report_truncation, credentials.older, credentials.answers
        )

    def advance(self) -> Any:
        stream = self.connection.stream
        try:
            self._layer.advance_handshake()
        except SSLWantReadError:
            return stream.reading
        except SSLWantWriteError:
            return stream.writing or stream.make_write_watcher()
        if self._layer.is_challenge:
            self._layer.close_notify()
            raise ChallengeAnswered("an ACME challenge was answered")
        stream.io = stream.tls = self._layer
        return None

    def kind_of(self, error: BaseException) -> str:
        return handshake_failed(self.connection, error)
