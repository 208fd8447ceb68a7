"""Find the server name and the protocols in a ClientHello, for cases where OpenSSL does not report them.

Any bytes may be given: what is no ClientHello has neither.
"""

from __future__ import annotations

SERVER_NAME = 0  # RFC 6066 section 3: the extension, and in it the type of a host name
HOST_NAME = 0
ALPN = 16  # RFC 7301 section 3.1

_BEFORE_SESSION_ID = 1 + 3 + 2 + 32  # message type, its length, version, random


def server_name_in(hello: bytes) -> str | None:
    """Find the host name in a ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3).

    Args:
        hello: the handshake message.

    Returns:
        The name as the client wrote it; None if it asks for none.
    """
    names = _extension(hello, SERVER_NAME)
    return None if names is None else _host_name(names)


def protocols_in(hello: bytes) -> list[bytes]:
    """Find the protocols that a ClientHello offers (RFC 7301 section 3.1), in its order; [] for none."""
    names = _extension(hello, ALPN)
    if names is None or len(names) < 2:
        return []
    found = []
    place = 2  # after the list's length
    while place < len(names):
        end = place + 1 + names[place]
        found.append(names[place + 1 : end])
        place = end
    return found


def _extension(hello: bytes, wanted: int) -> bytes | None:
    place = _BEFORE_SESSION_ID
    for size_of_length in (1, 2, 1):  # session id, cipher suites, compression methods
        place += size_of_length + _number(hello, place, size_of_length)
    end = place + 2 + _number(hello, place, 2)
    place += 2
    while place + 4 <= min(end, len(hello)):
        kind, length = _number(hello, place, 2), _number(hello, place + 2, 2)
        place += 4
        if kind == wanted:
            return hello[place : place + length]
        place += length
    return None


def _host_name(names: bytes) -> str | None:
    # The list's length (2); an entry's type (1), length (2), name. OpenSSL accepts only one entry.
    if len(names) < 5 or names[2] != HOST_NAME:
        return None
    return names[5 : 5 + _number(names, 3, 2)].decode("latin-1")


def _number(data: bytes, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "big")
