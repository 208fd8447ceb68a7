"""Reads the PROXY header of a connection that comes from a balancer, before anything else of it is read."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from gtcpserver.errors import DeadlineExceeded
from gtcpserver.plural import counted
from gtcpserver.proxy_protocol.header import LONGEST_V2, ProxyHeader, ProxyProtocolError, parse_header
from gtcpserver.proxy_protocol.trust import ProxyProtocol

from .steps import Step

if TYPE_CHECKING:
    from gtcpserver.connection.connection import Connection


def network_address(connection: Connection) -> Any:
    """Return the address by which limits, rules and trust know a client, as ``accept`` names it.

    It is the client's, except where a balancer names one by a unix socket: that is a process on the balancer's host,
    and not on this one, so it is known by the balancer's address.
    """
    address = connection.client_address
    return address if isinstance(address, tuple) else connection.peer_address


class HeaderReader:
    """Read a header from a non-blocking socket, and not a byte more: what follows may be a TLS handshake."""

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
    """A PROXY header that is read, in a stage."""

    __slots__ = ("_reader",)

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._reader = HeaderReader()

    def advance(self) -> Any:
        stream = self.connection.stream
        header = self._reader.read(stream.sock)
        if header is None:
            return stream.reading
        self.connection.note_proxy_header(header)
        return None

    def kind_of(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return "timeout"
        return "reset" if isinstance(error, ConnectionError) else "invalid"


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
    stream = connection.stream
    try:
        with connection.deadline(balancers.timeout):
            while (header := reader.read(stream.sock)) is None:
                stream.wait_readable(True)
    except DeadlineExceeded:
        text = f"no PROXY header within {balancers.timeout:g} seconds"
        raise stream.note(DeadlineExceeded(text)) from None
    except (ProxyProtocolError, OSError) as error:
        stream.note(error)
        raise
    connection.note_proxy_header(header)
