"""ProxyHandler: the handler of a proxy's listener."""

from __future__ import annotations

from typing import Literal, get_args

from greenlet import GreenletExit

from ..connection import READ_AHEAD, Connection
from ..errors import ConfigError, DeadlineExceeded
from .errors import ProtocolError
from .gate import Gate, Visitor
from .sniff import Protocol, sniff
from .socks_session import serve_socks4, serve_socks5

Speaks = Literal["socks"]


class ProxyHandler:
    """Serve the clients of a proxy: ``Server("127.0.0.1:1080", ProxyHandler(Gate(...)))``.

    Args:
        gate: who may come in, and where to.
        speaks: the protocols of this listener.
        log_style: of the access log, which is the logger "gtcpserver.access": one line a connection.
        redact: leave out of it where clients go.
    """

    def __init__(
        self, gate: Gate, speaks: Speaks = "socks", *, log_style: Literal["text", "json"] = "text", redact: bool = False
    ) -> None:
        if speaks not in get_args(Speaks):
            raise ConfigError(f"speaks must be one of {', '.join(get_args(Speaks))}, got {speaks!r}")
        self.gate = gate
        self._speaks = speaks
        self._log_style: Literal["text", "json"] = log_style
        self._redact = redact

    def __call__(self, conn: Connection) -> None:
        """Serve one client."""
        visitor = self.gate.admit(conn)
        try:
            self._serve(conn, visitor)
        except GreenletExit:
            visitor.record.result = "stopped"
            raise
        except ConnectionError as error:
            if visitor.record.result == "failed":
                visitor.record.result, visitor.record.detail = "reset", error.strerror or str(error)
        finally:
            visitor.record.write(self._log_style, self._redact)

    def _serve(self, conn: Connection, visitor: Visitor) -> None:
        record = visitor.record
        try:
            with conn.deadline(self.gate.timeouts.negotiate):
                protocol = self._first_bytes(conn)
        except ProtocolError as error:
            record.result, record.detail = "bad_request", str(error)
            return
        except DeadlineExceeded:
            record.result = "negotiation_timeout"
            return
        if protocol is None:
            record.result, record.detail = "bad_request", "the client left"
        elif protocol == "socks5":
            serve_socks5(conn, visitor)
        elif protocol == "socks4":
            serve_socks4(conn, visitor)
        else:
            record.result, record.detail = "bad_request", "the client speaks HTTP, this listener does not"

    def _first_bytes(self, conn: Connection) -> Protocol | None:
        data = b""
        while (protocol := sniff(data)) is None:
            more = conn.recv(READ_AHEAD)
            if not more:
                return None
            data += more
        conn.unread(data)
        return protocol
