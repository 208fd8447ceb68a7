"""The PROXY header of a connection from a balancer, read before anything else on it."""

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
    """Return the address that limits, rules and trust apply to, as ``accept`` returns it.

    It is the client's, unless the balancer names a client on a unix socket: that is a process on the balancer's host,
    not on this one, so the balancer's address counts.
    """
    address = connection.client_address
    return address if isinstance(address, tuple) else connection.peer_address


class HeaderReader:
    """Reads a header from a non-blocking socket, and not a byte more: a TLS handshake may follow."""

    def __init__(self) -> None:
        self._data = b""

    def read(self, sock: Any) -> ProxyHeader | None:
        """Read what has arrived.

        Returns:
            The header; None: it is not complete yet.

        Raises:
            ProxyProtocolError: the bytes are no PROXY header, or the peer closed before its end.
            OSError: the socket failed.
        """
        while True:
            try:
                more = sock.recv(LONGEST_V2, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            if not more:
                raise ProxyProtocolError(f"the peer closed after {counted(len(self._data), 'byte')} of a PROXY header")
            found = parse_header(self._data + more)
            # Until the header is complete, everything belongs to it.
            size = len(more) if found is None else found[1] - len(self._data)
            self._data += sock.recv(size)
            if found is not None:
                return found[0]


class HeaderStep(Step):
    """A PROXY header being read, in a stage."""

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
    """Read the PROXY header of a connection from a balancer, and set ``connection.client_address``.

    Does nothing if the connection does not come from a trusted balancer.

    Raises:
        ProxyProtocolError: the header is missing or malformed. The caller must close the connection.
        ClientRefused: the client exceeds a limit of the server. The connection was reset.
        DeadlineExceeded: the header did not arrive in time.
        OSError: the connection failed.
    """
    if not balancers.trusts(network_address(connection)):
        return
    reader = HeaderReader()
    stream = connection.stream
    try:
        with connection.deadline(balancers.timeout):
            while (header := reader.read(stream.sock)) is None:
                stream.wait_readable()
    except DeadlineExceeded:
        text = f"no PROXY header within {balancers.timeout:g} seconds"
        raise stream.note(DeadlineExceeded(text)) from None
    except (ProxyProtocolError, OSError) as error:
        stream.note(error)
        raise
    connection.note_proxy_header(header)
