"""The PROXY header that tells the next server the client's address, when we are the balancer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from gtcpserver.errors import ConfigError
from gtcpserver.networks import as_ip
from gtcpserver.proxy_protocol.header import TLS, TLV, ProxyHeader, Transport, Type

if TYPE_CHECKING:
    from gtcpserver.tls import ConnectionTLS

    from .connection import Connection

ProxyVersion = Literal["v1", "v2"]


def header_of(connection: Connection, version: ProxyVersion) -> ProxyHeader:
    """Return the header that tells the next server the client's address.

    A header from a balancer in front of us is passed on; otherwise it has the client's address and the one it connected
    to, with the known facts about its TLS (version 2: server name, ALPN, version, cipher, and the common name of the
    client's certificate, which haproxy calls ``send-proxy-v2-ssl-cn``). Clients by a unix socket have none: UNKNOWN.
    """
    number: Literal[1, 2] = 1 if version == "v1" else 2
    told = connection.proxy_header
    if told is not None and told.source is not None:
        return replace(told, version=number, tlvs=told.tlvs if number == 2 else ())
    source, destination = connection.client_address, connection.server_address
    if not isinstance(source, tuple) or not isinstance(destination, tuple):
        return ProxyHeader(transport=Transport.UNSPECIFIED, version=number)
    tlvs = _tlvs_of(connection.tls) if connection.tls is not None and number == 2 else ()
    return ProxyHeader(
        (as_ip(source[0]), source[1]), (as_ip(destination[0]), destination[1]), version=number, tlvs=tlvs
    )


def _tlvs_of(tls: ConnectionTLS) -> tuple[TLV, ...]:
    """Return the known facts about a client's TLS (sections 2.2.1, 2.2.2 and 2.2.6)."""
    tlvs = []
    if tls.server_name:
        tlvs.append(TLV(Type.AUTHORITY, tls.server_name.encode()))
    if tls.alpn:
        tlvs.append(TLV(Type.ALPN, tls.alpn.encode()))
    about = []
    if tls.version:
        about.append(TLV(Type.SSL_VERSION, tls.version.encode()))
    if tls.cipher is not None:
        about.append(TLV(Type.SSL_CIPHER, tls.cipher.name.encode()))
    client, verify = 1, 1  # "non-zero otherwise", which is also where there is no certificate
    certificate = tls.peer_certificate  # checked: the handshake would have failed
    if certificate is not None:
        client, verify = client | (4 if tls.session_reused else 6), 0
        names = (value for name in certificate.get("subject", ()) for key, value in name if key == "commonName")
        if common_name := next(names, None):
            about.append(TLV(Type.SSL_CN, common_name.encode()))
    tlvs.append(TLS(client, verify, tuple(about)).to_tlv())
    return tuple(tlvs)


def check_version(name: str, version: str | None) -> None:
    if version is not None and version not in get_args(ProxyVersion):
        raise ConfigError(f'{name} must be "v1" or "v2", or None for no header, got {version!r}')
