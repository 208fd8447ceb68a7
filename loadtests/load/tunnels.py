"""What a client says to a proxy to be led to a destination. No I/O."""

from __future__ import annotations

import ipaddress
import struct


def socks5_request(host: str, port: int) -> bytes:
    """CONNECT of SOCKS 5, RFC 1928 sections 4 and 5.

    Raises:
        ValueError: the name is longer than 255 bytes, or none.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = encoded(host)
        if len(name) > 255:
            raise ValueError(f"a name for SOCKS 5 has 255 bytes at most, got {len(name)}: {host!r}") from None
        where = b"\x03%c%b" % (len(name), name)
    else:
        where = (b"\x01" if address.version == 4 else b"\x04") + address.packed
    return b"\x05\x01\x00" + where + struct.pack(">H", port)


def connect_request(host: str, port: int) -> bytes:
    """CONNECT of HTTP, RFC 9110 section 9.3.6.

    Raises:
        ValueError: the name is none.
    """
    target = b"%b:%d" % (b"[%b]" % host.encode() if ":" in host else encoded(host), port)
    return b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, target)


def encoded(host: str) -> bytes:
    """A name as DNS has it, RFC 3490. Raises UnicodeError, a ValueError, if it is none."""
    return host.encode("idna")


def http_url(address: str) -> str:
    """Of "HOST:PORT", or the same behind "tcp://" or "tls://"; URLs of HTTP stay as they are.

    Raises:
        ValueError: it is a Unix socket, which locust's HTTP client does not know.
    """
    if address.startswith("unix:"):
        raise ValueError(f"HTTP users need HOST:PORT, got {address!r}")
    if address.startswith(("http://", "https://")):
        return address
    scheme, _, rest = address.rpartition("://")
    return f"{'https' if scheme == 'tls' else 'http'}://{rest}"
