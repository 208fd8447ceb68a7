"""Names of servers, as clients ask for them and certificates have them."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from gtcpserver.errors import ConfigError

MAX_SERVER_NAME = 253  # RFC 1035 section 2.3.4, without the length bytes

# Underscores are not allowed in host names, but occur in practice.
_SERVER_NAME = re.compile(r"(\*\.)?(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")


def check_server_name(given: Any, expected: str) -> str:
    """Return a host name, or a wildcard such as "*.example.com", in lower case and without the final dot.

    Args:
        expected: beginning of the error message: the field, and what it must be.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(given, str):
        raise ConfigError(f"{expected}, got {given!r}")
    if not given.isascii():
        # Not translated here: IDNA 2003, which Python implements, and IDNA 2008 differ in the result.
        raise ConfigError(f'{expected}; write it as clients send it ("xn--..."), got {given!r}')
    name = given.lower().rstrip(".")
    if len(name) > MAX_SERVER_NAME or not _SERVER_NAME.fullmatch(name):
        raise ConfigError(f"{expected}, got {given!r}")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name
    raise ConfigError(f"{expected}; clients never ask for an IP address (RFC 6066 section 3), got {given!r}")
