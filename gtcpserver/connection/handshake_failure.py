"""Failed TLS handshakes: classify the failure, and answer a client that speaks no TLS."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from gtcpserver.errors import TLSFlood
from gtcpserver.tls import HandshakeFailure, classify_handshake_error
from gtcpserver.tls.info import ChallengeAnswered
from gtcpserver.transfer.ends import reset_on_close

if TYPE_CHECKING:
    from .connection import Connection

#: Answer to a client that speaks no TLS at all: the alert unexpected_message (RFC 8446 sections 5 and 6.2), in a
#: separate record. OpenSSL sends nothing to such a client.
NOT_TLS_ALERT = b"\x15\x03\x01\x00\x02\x02\x0a"

#: Answer to a client that speaks plain HTTP to a TLS port (RFC 9110 section 15.5.1).
PLAIN_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 43\r\n\r\n"
    b"This port speaks TLS. Use https:// instead."
)


def handshake_failed(connection: Connection, error: BaseException) -> HandshakeFailure:
    """Classify a failed handshake. Answer a client that speaks no TLS, and reset one that floods."""
    if isinstance(error, ChallengeAnswered):
        return "acme_challenge"
    if isinstance(error, TLSFlood):
        reset_on_close(connection)
        return "too_many_records"
    kind = _kind_of_failure(connection.stream.sock, error)
    _answer_plain_text(connection.stream.sock, kind)
    return kind


def _kind_of_failure(sock: Any, error: BaseException) -> HandshakeFailure:
    # Also looks at the bytes that followed the five that OpenSSL consumed.
    kind = classify_handshake_error(error)
    if kind == "not_tls":
        try:
            rest: bytes = sock.recv(1024, socket.MSG_PEEK)
        except OSError:
            return kind
        # OpenSSL 3.0 knows GET, POST, HEAD, PUT and CONNECT, 3.6 more. RFC 9112 section 3: method, target, version.
        if b" HTTP/" in rest.partition(b"\n")[0]:
            return "http_request"
    return kind


def _answer_plain_text(sock: Any, kind: str) -> None:
    """Tell a client that speaks no TLS what is wrong, if that is possible without waiting."""
    answer = {"http_request": PLAIN_HTTP_ANSWER, "not_tls": NOT_TLS_ALERT}.get(kind)
    if answer is not None:
        try:
            sock.send(answer)
            # A close with input unread would reset the connection, and the answer with it.
            sock.recv(64 * 1024)
        except OSError:
            pass
