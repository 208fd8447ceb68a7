"""Proxy auto-configuration: the script that tells browsers when to use this proxy. No I/O.

The format is Netscape's, which all browsers and systems read: FindProxyForURL returns "PROXY host:port", "HTTPS",
"SOCKS5" or "DIRECT". Only functions that look up no names are used: browsers block while they do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from ipaddress import IPv4Network, ip_network

from gtcpserver.errors import ConfigError

from .errors import BadTarget
from .target import canonical_name

#: Paths at which a client may ask for it; the second is that of WPAD.
PATHS = (b"/proxy.pac", b"/wpad.dat")

CONTENT_TYPE = b"application/x-ns-proxy-autoconfig"

_ADDRESS = re.compile(r"[0-9.]+")


def pac_script(way: str, direct: Sequence[str]) -> bytes:
    """Return the script.

    Args:
        way: how to reach the proxy, such as "PROXY proxy.example:1080".
        direct: destinations without a proxy: names, ".domain", IPv4 networks; checked by `check_direct`.
    """
    lines = ["function FindProxyForURL(url, host) {", "    host = host.toLowerCase();"]
    conditions = ["isPlainHostName(host)"]
    for one in direct:
        if _is_network(one):
            network = IPv4Network(one)
            addresses = f'/^[0-9.]+$/.test(host) && isInNet(host, "{network.network_address}", "{network.netmask}")'
            conditions.append(f"({addresses})")
        elif one.startswith("."):
            conditions.append(f"host == {json.dumps(one[1:])} || dnsDomainIs(host, {json.dumps(one)})")
        else:
            conditions.append(f"host == {json.dumps(one)}")
    lines.append("    if (")
    lines.append("        " + " ||\n        ".join(conditions))
    lines += ['    ) return "DIRECT";', f"    return {json.dumps(way)};", "}", ""]
    return "\n".join(lines).encode()


def check_direct(direct: Sequence[str]) -> None:
    """Raise ConfigError for what is neither a name, nor a domain, nor an IPv4 network."""
    for one in direct:
        try:
            if _is_network(one):
                ip_network(one)
            elif canonical_name(one.removeprefix(".")) != one.removeprefix("."):
                raise BadTarget("it must be in lower case, without a final dot")
        except (ValueError, BadTarget) as error:
            raise ConfigError(
                f"pac_direct must have names, .domains and IPv4 networks, got {one!r} ({error})"
            ) from None


def _is_network(text: str) -> bool:
    return _ADDRESS.fullmatch(text.partition("/")[0]) is not None
