"""TLS for a server: configuration, certificates that are replaced while it runs, and the result of a handshake."""

from .config import TLSConfig
from .credentials import Credentials, build_context
from .info import Cipher, ConnectionTLS, HandshakeFailure, classify_handshake_error
from .self_signed import CertificateFiles, self_signed

__all__ = [
    "CertificateFiles",
    "Cipher",
    "ConnectionTLS",
    "Credentials",
    "HandshakeFailure",
    "TLSConfig",
    "build_context",
    "classify_handshake_error",
    "self_signed",
]
