"""TLS on a Connection as the client's side: to another server, such as the next proxy."""

from __future__ import annotations

from typing import Any

from gtcpserver.errors import StartTLSError

from .connection import Connection
from .tls_layer import TLSLayer


def start_client_tls(connection: Connection, context: Any, hostname: str) -> None:
    """Start TLS with a server; blocks for the handshake.

    Args:
        context: an ssl.SSLContext for clients; it decides whether the certificate is checked.
        hostname: the name, or address, that the certificate must have; a name is also sent (SNI).

    Raises:
        StartTLSError: TLS is started already, or bytes have arrived before the handshake. Close the connection.
        OSError: the handshake failed (ssl.SSLError).
    """
    stream = connection.stream
    if stream.tls is not None:
        raise StartTLSError("TLS has been started on this connection already")
    if stream.kept:
        raise stream.note(StartTLSError(f"{len(stream.kept)} unencrypted bytes came before the TLS handshake"))
    layer = TLSLayer(connection, context, hostname=hostname)
    try:
        layer.handshake()
    except OSError as error:
        stream.note(error)
        raise
    stream.io = stream.tls = layer
    stream.drained = False
