"""Answers to the authority's challenges, on the server's own port (tls-alpn-01, RFC 8737).

The authority connects with the protocol "acme-tls/1", and expects a self-signed certificate with a digest in it. The
ssl module's callback learns the name, and not the protocols; so the client's first message is read here, before OpenSSL
gets it, and such a handshake begins on a context of its own. Then neither tickets nor client certificates of the
server's own contexts matter.
"""

from __future__ import annotations

import os
import ssl

from ..client_hello import protocols_in, server_name_in
from ..contexts import SSLContext
from .folder import Folder
from .settings import ACMESettings

PROTOCOL = "acme-tls/1"  # RFC 8737 section 6.2

_MARK = PROTOCOL.encode()

#: Bytes of a first message that is looked at. Those of authorities are 300 to 1,800 bytes long, with the keys of
#: ML-KEM; ours costs at most 0.5 ms to read.
MAX_HELLO = 4096

_HEADER = 5  # of a record


class Answers:
    """What this server answers to challenges: what is in the folder.

    A file is read when it is asked for, so that a challenge is answered by every worker as soon as it is written.
    """

    def __init__(self, settings: ACMESettings) -> None:
        folder = Folder(settings)
        self._paths = {name: folder.challenge(name) for name in settings.names}
        self._made: dict[str, tuple[tuple[int, int], ssl.SSLContext]] = {}

    def find(self, record: bytes) -> ssl.SSLContext | None:
        """Return the context for a handshake that is a challenge; None: it is none, or none that we expect.

        Args:
            record: the client's first record. OpenSSL has not seen it. One whose first message goes on in the next
                record is no challenge: no authority sends such.
        """
        if _MARK not in record or len(record) > MAX_HELLO:
            return None
        hello = record[_HEADER:]
        # RFC 8737 section 3: this protocol alone, and the name.
        if protocols_in(hello) != [_MARK]:
            return None
        name = (server_name_in(hello) or "").lower()
        path = self._paths.get(name)
        return self._context(name, path) if path is not None else None

    def is_asked(self) -> bool:
        """Return whether an authority is about to ask: an order is under way. Costs a stat(2) per name."""
        return any(map(os.path.exists, self._paths.values()))

    def _context(self, name: str, path: str) -> ssl.SSLContext | None:
        try:
            found = os.stat(path)
            version = found.st_ino, found.st_mtime_ns
            kept = self._made.get(name)
            if kept is not None and kept[0] == version:
                return kept[1]
            context = _make_context(path)
        except OSError:  # also ssl.SSLError
            self._made.pop(name, None)
            return None
        self._made[name] = version, context
        return context


def _make_context(path: str) -> ssl.SSLContext:
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8737 section 3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols([PROTOCOL])
    context.load_cert_chain(path)
    return context
