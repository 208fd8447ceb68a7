"""Behind a balancer: who the client is, by the PROXY protocol (proxy_protocol.py), and only where it is trusted.

Whoever may write the header may claim any address, so it is read from listed networks alone. From those it is wanted:
a balancer that has forgotten it is a mistake, and guessing would make its own address the client's. What others send is
theirs from the first byte on, whatever it looks like.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from gtcpserver.checks import check_number
from gtcpserver.errors import ConfigError, DeadlineExceeded
from gtcpserver.networks import IPNetwork, as_ip, is_in, parse_network
from gtcpserver.plural import counted
from gtcpserver.proxy_protocol.header import (
    LONGEST_V2,
    TLS,
    TLV,
    ProxyHeader,
    ProxyProtocolError,
    Transport,
    Type,
    parse_header,
)

from .steps import Step

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection
    from gtcpserver.tls import ConnectionTLS


@dataclass(frozen=True)
class ProxyProtocol:
    """Clients come by balancers that tell who they are (HAProxy's PROXY protocol, versions 1 and 2).

    Attributes:
        trusted: networks and addresses of the balancers, such as "10.0.0.0/8"; "unix": those that come by a unix
            socket. From these a header must come; others are clients of their own, and send none.
        timeout: seconds in which the header must have come.

    Raises:
        ConfigError: a network that is none, none at all, or a time-out that cannot be.
    """

    trusted: Sequence[str]
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.trusted, str):
            object.__setattr__(self, "trusted", (self.trusted,))
        if not self.trusted:
            raise ConfigError("trusted must name at least one network of balancers, got none")
        networks: list[IPNetwork] = []
        for text in self.trusted:
            if text == "unix":
                continue
            try:
                networks.append(parse_network(text))
            except ValueError as error:
                raise ConfigError(f'trusted must be networks, addresses or "unix", got {text!r} ({error})') from None
        check_number("timeout", self.timeout, above=0)
        object.__setattr__(self, "_networks", tuple(networks))

    def trusts(self, address: Any) -> bool:
        """Whether a peer, as ``accept`` names it, is a balancer."""
        if not isinstance(address, tuple):
            return "unix" in self.trusted
        networks: tuple[IPNetwork, ...] = self._networks  # type: ignore[attr-defined]
        return is_in(as_ip(address[0]), networks)


def network_address(connection: Connection) -> Any:
    """Return the address by which limits, rules and trust know a client, as ``accept`` names it.

    It is the client's, except where a balancer names one by a unix socket: that is a process on the balancer's host,
    and not on this one, so it is known by the balancer's address.
    """
    address = connection.client_address
    return address if isinstance(address, tuple) else connection.peer_address


class HeaderReader:
    """Reads a header from a non-blocking socket, and not a byte more: what follows may be a TLS handshake, which
    OpenSSL reads from the socket itself.
    """

    def __init__(self) -> None:
        self._data = b""

    def read(self, sock: Any) -> ProxyHeader | None:
        """Read what has come.

        Returns:
            The header; None: more must come.

        Raises:
            ProxyProtocolError: it is none, or the peer closed before its end.
            OSError: of the socket.
        """
        while True:
            try:
                more = sock.recv(LONGEST_V2, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            if not more:
                raise ProxyProtocolError(f"the peer closed after {counted(len(self._data), 'byte')} of a PROXY header")
            found = parse_header(self._data + more)
            # All of it belongs to the header as long as that has not ended.
            size = len(more) if found is None else found[1] - len(self._data)
            self._data += sock.recv(size)
            if found is not None:
                return found[0]


class HeaderStep(Step):
    """A PROXY header that is read, in a lane."""

    __slots__ = ("_reader",)

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._reader = HeaderReader()

    def advance(self) -> Any:
        header = self._reader.read(self.connection._sock)
        if header is None:
            return self.connection._stream.reading
        self.connection.note_proxy_header(header)
        return None

    def kind_of(self, error: BaseException) -> str:
        return "proxy_header_timeout" if isinstance(error, TimeoutError) else "proxy_header"


def read_proxy_header(connection: Connection, balancers: ProxyProtocol) -> None:
    """Read the header of a connection, if it comes from a balancer; afterwards ``connection.client_address`` is the
    client's.

    Raises:
        ProxyProtocolError: there is none, or it cannot be understood. The connection must be closed.
        ClientRefused: the client is beyond a limit of the server. The connection has been reset.
        DeadlineExceeded: it has not come in time.
        OSError: of the connection.
    """
    if not balancers.trusts(network_address(connection)):
        return
    reader = HeaderReader()
    stream = connection._stream
    try:
        with connection.deadline(balancers.timeout):
            while (header := reader.read(connection._sock)) is None:
                stream.wait_readable(True)
    except DeadlineExceeded:
        text = f"no PROXY header within {balancers.timeout:g} seconds"
        raise stream.note(DeadlineExceeded(text)) from None
    except (ProxyProtocolError, OSError) as error:
        stream.note(error)
        raise
    connection.note_proxy_header(header)


# -- the other way: we are the balancer ------------------------------------------------------------------------------

ProxyVersion = Literal["v1", "v2"]


def header_of(connection: Connection, version: ProxyVersion) -> ProxyHeader:
    """The header that tells somebody behind us whose connection this is.

    What a balancer before us has said goes on; otherwise it is the client's address and the one it has connected to,
    with what is known of its TLS (version 2: server name, ALPN, version, cipher, and the common name of the client's
    certificate, which haproxy calls ``send-proxy-v2-ssl-cn``). Clients by a unix socket have none: UNKNOWN.
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
    """What is known of a client's TLS (sections 2.2.1, 2.2.2 and 2.2.6)."""
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
