"""Tell a client's protocol by its first bytes. No I/O."""

from __future__ import annotations

import re
from typing import Literal

from gtcpserver.http1.head import MOST_EMPTY_LINES

from . import socks4, socks5
from .errors import ProtocolError

Protocol = Literal["socks4", "socks5", "http"]

TLS_HANDSHAKE = 0x16  # RFC 8446 section 5.1

_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def sniff(data: bytes) -> Protocol | None:
    """Name the protocol; None if nothing has arrived yet.

    Raises:
        ProtocolError: not a supported protocol.
    """
    # An empty line may come before an HTTP request (RFC 9112 section 2.2).
    first = data.lstrip(b"\r\n")
    if not first:
        if len(data) > 2 * MOST_EMPTY_LINES:
            raise ProtocolError("the client sends empty lines")
        return None
    if first[0] == socks5.VERSION:
        return "socks5"
    if first[0] == socks4.VERSION:
        return "socks4"
    if first[0] == TLS_HANDSHAKE:
        raise ProtocolError("the client speaks TLS, this listener does not")
    if _METHOD.match(first[:1]):
        return "http"
    raise ProtocolError(f"the client speaks neither SOCKS nor HTTP: its first byte is {first[0]:#04x}")
