"""Kernel TLS: whether the kernel encrypts what is written to a socket (Linux, Documentation/networking/tls.rst).

OpenSSL does it where it was built for it, the context asks for it (ssl.OP_ENABLE_KTLS), the kernel has the tls module
and the negotiated cipher suits. Any of them may be missing without an error, so the socket itself is asked.
"""

from __future__ import annotations

from typing import Any

_SOL_TLS = 282
_TLS_TX = 1


def kernel_encrypts(sock: Any) -> bool:
    """Whether plain bytes written to the descriptor (so also by sendfile) leave it encrypted."""
    try:
        # The first four bytes are enough: version and cipher; the kernel wants room for them at least.
        return any(sock._sock.getsockopt(_SOL_TLS, _TLS_TX, 4))
    except OSError:
        return False
