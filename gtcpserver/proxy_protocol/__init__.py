"""HAProxy's PROXY protocol, versions 1 and 2: parse and write the header without I/O.

https://www.haproxy.org/download/3.1/doc/proxy-protocol.txt
"""

from .header import TLS, TLV, ProxyHeader, ProxyProtocolError, Transport, Type, crc32c, parse_header
from .trust import ProxyProtocol

__all__ = [
    "TLS",
    "TLV",
    "ProxyHeader",
    "ProxyProtocol",
    "ProxyProtocolError",
    "Transport",
    "Type",
    "crc32c",
    "parse_header",
]
