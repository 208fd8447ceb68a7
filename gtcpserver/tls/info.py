"""The result of a handshake, and why one failed."""

from __future__ import annotations

import ssl
from typing import Any, Literal, NamedTuple

HandshakeFailure = Literal[
    "http_request",
    "not_tls",
    "version",
    "no_shared_cipher",
    "client_certificate",
    "server_certificate",
    "unknown_name",
    "too_many_records",
    "acme_challenge",
    "timeout",
    "reset",
    "eof",
    "other",
]

# OpenSSL's names of reasons (include/openssl/sslerr.h). Those that begin with SSLV3_ALERT_ or TLSV1_ALERT_ are alerts
# from the client.
_BY_REASON: dict[str, HandshakeFailure] = {
    "HTTP_REQUEST": "http_request",
    "HTTPS_PROXY_REQUEST": "http_request",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "version",  # a hello in the form of SSL 2
    "UNSUPPORTED_PROTOCOL": "version",
    "VERSION_TOO_LOW": "version",
    "INAPPROPRIATE_FALLBACK": "version",
    "TLSV1_ALERT_PROTOCOL_VERSION": "version",
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "NO_SHARED_GROUPS": "no_shared_cipher",
    "NO_SUITABLE_GROUPS": "no_shared_cipher",
    "NO_SUITABLE_KEY_SHARE": "no_shared_cipher",
    "NO_SHARED_SIGNATURE_ALGORITHMS": "no_shared_cipher",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "no_shared_cipher",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "no_shared_cipher",
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": "no_shared_cipher",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "client_certificate",
    "CERTIFICATE_VERIFY_FAILED": "client_certificate",
    "NO_CERTIFICATE_RETURNED": "client_certificate",
    "SSLV3_ALERT_NO_CERTIFICATE": "client_certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "server_certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "server_certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "server_certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "server_certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "server_certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "server_certificate",
    "CALLBACK_FAILED": "unknown_name",  # the server-name callback refused it
}

# RFC 9110 section 9, RFC 5789; and PRI, with which HTTP/2 begins (RFC 9113 section 3.4). OpenSSL 3.0 knows five itself.
_HTTP_METHODS = (
    b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"CONNECT ", b"OPTIONS ", b"TRACE ", b"PATCH ", b"PRI ",
)  # fmt: skip


class ChallengeAnswered(ConnectionError):
    """The handshake was an authority's question (RFC 8737), and nothing is to follow."""


class Cipher(NamedTuple):
    """A cipher suite: OpenSSL's name, and the key size in bits.

    Example::

        def handle(conn):
            cipher = conn.tls.cipher
            print(cipher.name, cipher.bits)  # TLS_AES_256_GCM_SHA384 256
    """

    name: str
    bits: int


class ConnectionTLS:
    """A connection's TLS. Everything is looked up when it is accessed.

    Args:
        tls_object: the ``_ssl._SSLSocket`` (or an ssl.SSLSocket) whose handshake is done.
        server_name: see below.

    Attributes:
        server_name: the name the client asked for (SNI, RFC 6066 section 3), in lower case; "" if it has unprintable
            characters; None if the client asked for none.

    Example::

        def handle(conn):
            tls = conn.tls
            print(tls.version, tls.alpn, tls.server_name)  # TLSv1.3 None localhost
    """

    __slots__ = ("_object", "server_name")

    def __init__(self, tls_object: Any, server_name: str | None = None) -> None:
        self._object = tls_object
        self.server_name = server_name

    @property
    def version(self) -> str | None:
        """ "TLSv1.3" or "TLSv1.2"; None when OpenSSL has given up the connection after an error."""
        version: str | None = self._object.version()
        return version

    @property
    def cipher(self) -> Cipher | None:
        """The cipher suite; None before the handshake is done."""
        found = self._object.cipher()
        return Cipher(found[0], found[2]) if found is not None else None

    @property
    def alpn(self) -> str | None:
        """The negotiated protocol (RFC 7301), such as "h2"; None for none."""
        protocol: str | None = self._object.selected_alpn_protocol()
        return protocol

    @property
    def session(self) -> Any:
        """The ssl.SSLSession, which ``ssl.SSLSocket`` has under this name: ``conn.session`` is the program's data."""
        return self._object.session

    @property
    def session_reused(self) -> bool:
        """Whether the client resumed an earlier session."""
        return bool(self._object.session_reused)

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The client certificate, decoded as by ``ssl.SSLSocket.getpeercert``; None if there is none."""
        # {}: there is one, but it was not verified.
        return self._peer_certificate(False) or None

    @property
    def peer_certificate_der(self) -> bytes | None:
        """The client certificate in DER form; None if there is none."""
        return self._peer_certificate(True)  # type: ignore[no-any-return]

    def _peer_certificate(self, binary: bool) -> Any:
        try:
            return self._object.getpeercert(binary)
        except ValueError:
            return None  # OpenSSL has given up the connection after an error

    def __repr__(self) -> str:
        cipher = self.cipher
        return (
            f"<ConnectionTLS {self.version} {cipher.name if cipher is not None else None} "
            f"server_name={self.server_name!r} alpn={self.alpn!r} session_reused={self.session_reused}>"
        )


def is_unannounced_end(error: BaseException) -> bool:
    """Return True if the peer ended the connection without a close_notify (RFC 8446 section 6.1).

    OpenSSL 3 reports it differently than OpenSSL 1.1. Some Python versions turn that into a plain SSLError, such as
    Debian 12's 3.11.2.
    """
    return isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


def classify_handshake_error(error: BaseException, first_bytes: bytes = b"") -> HandshakeFailure:
    """Classify a failed handshake.

    Args:
        error: exception raised by ``do_handshake``, or a TimeoutError.
        first_bytes: the first bytes from the client, if known: they reveal HTTP methods that OpenSSL does not
            recognize.

    Returns:
        "http_request" (plain HTTP on a TLS port), "not_tls", "version" (none in common), "no_shared_cipher" (or key
        exchange, or signature), "client_certificate" (missing or invalid), "server_certificate" (the client does not
        trust ours), "unknown_name" (strict_sni), "timeout", "reset", "eof" (the client closed) or "other".
        A server also counts "too_many_records", and "acme_challenge": an authority has asked for a proof, and got it.

    Example::

        from gtcpserver.tls import classify_handshake_error

        print(classify_handshake_error(TimeoutError()))  # timeout
    """
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, (ssl.SSLZeroReturnError, EOFError)) or is_unannounced_end(error):
        return "eof"
    if isinstance(error, ConnectionError):
        return "reset"
    kind = _BY_REASON.get(getattr(error, "reason", None) or "", "other")
    if first_bytes.startswith(_HTTP_METHODS):
        return "http_request"
    return kind
