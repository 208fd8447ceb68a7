"""Transparent mode: clients that know nothing of the proxy, whose connections the firewall sends here.

Nothing is said to the client, so a refusal is a reset. Where it goes is known from the kernel (`original_destination`);
what it calls that is a claim (`claimed_name`), which a client can make up: how far rules believe it is decided in
`Permission.believe`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from gtcpserver.checks import check_number
from gtcpserver.connection.connection import READ_AHEAD, Connection
from gtcpserver.errors import ConfigError, DeadlineExceeded

from .claimed_name import NameReader
from .errors import Cut, Denied
from .original_destination import original_destination
from .socks_session import tunnel
from .target import IPAddress, Target
from .visitor import Visitor

ConnectTo = Literal["address", "name"]

#: Default of `name_timeout`. Where the server speaks first each connection waits for it; a client that speaks first
#: needs a round trip, and 0.2 s more if a packet is lost (TCP's least retransmission timeout). sing-box waits 0.3 s.
NAME_TIMEOUT = 0.5

#: For the access log.
PROTOCOL = "transparent"


@dataclass(frozen=True, kw_only=True)
class Interception:
    """How a listener serves intercepted connections.

    Attributes:
        connect_to: "address": the original destination, whatever name the client claims; "name": the addresses of the
            name that it claims, if it claims one, as if it had asked for it by SOCKS.
        tproxy: connections may come by TPROXY, to sockets with IP_TRANSPARENT; otherwise by REDIRECT alone.
        name_timeout: seconds to wait for a client's first bytes, which may name the destination: the server may be the
            one to speak first. 0: do not look for a name.

    Raises:
        ConfigError: one of them is invalid.
    """

    connect_to: ConnectTo = "address"
    tproxy: bool = False
    name_timeout: float = NAME_TIMEOUT

    def __post_init__(self) -> None:
        if self.connect_to not in get_args(ConnectTo):
            raise ConfigError(f'connect_to must be "address" or "name", got {self.connect_to!r}')
        check_number("name_timeout", self.name_timeout, least=0)

    def negotiate(self, conn: Connection, visitor: Visitor) -> Callable[[], None]:
        """Find out where a client wants to go.

        Returns:
            A function that serves it.

        Raises:
            Cut: it is refused. OSError: its connection failed.
        """
        record = visitor.record
        record.protocol, record.command = PROTOCOL, "CONNECT"
        (ip, port), was_replaced = original_destination(conn.stream.sock)
        if not was_replaced and not (self.tproxy and self._is_elsewhere(visitor, ip, port)):
            raise Cut("not_redirected", "the client has connected to the listener itself")
        visitor.original = ip, port
        target = Target(str(ip), port, ip)
        record.asked = record.original = str(target)
        return partial(self._serve, conn, visitor, target)

    @staticmethod
    def _is_elsewhere(visitor: Visitor, ip: IPAddress, port: int) -> bool:
        gate = visitor.gate
        if port not in gate.own_ports and 0 not in gate.own_ports:
            return True
        try:
            return not gate.this_host.has(ip)
        except OSError as error:  # descriptors or memory ran out
            raise Cut("failed", error.strerror or str(error)) from None

    def _serve(self, conn: Connection, visitor: Visitor, target: Target) -> None:
        assert target.ip is not None
        client, destination = (visitor.client, visitor.address[1]), (target.ip, target.port)
        loops = visitor.gate.loops
        with loops.entered(client, destination):
            name = self._read_name(conn, visitor.gate.timeouts.negotiate) if self.name_timeout else ""
            visitor.follow()
            if not visitor.admitted or visitor.needs_password:  # after a reload
                raise Cut("client_denied", visitor.record.detail or "a password is needed")
            visitor.record.note_negotiated()
            upstream = self._open(conn, visitor, target, name)
            if upstream is None:
                return
            with upstream, loops.opened(client, destination, upstream):
                tunnel(conn, upstream, visitor)

    def _open(self, conn: Connection, visitor: Visitor, target: Target, name: str) -> Connection | None:
        presence = visitor.presence
        presence.probe = b""  # nothing to send it: half-closed, it waits for a server that speaks first
        named = Target(name, target.port) if name else target
        try:
            with presence:
                if self.connect_to == "name":
                    return visitor.open(named)
                if name:
                    visitor.believe(target, named)
                return visitor.open(target)
        except (Denied, OSError):
            conn.abort()
            return None
        finally:
            visitor.record.asked = str(named)

    def _read_name(self, conn: Connection, seconds: float) -> str:
        """Return the name in the client's first bytes, which stay to be read; "": it has none, or is silent."""
        reader = NameReader()
        name: str | None = None
        try:
            with conn.deadline(self.name_timeout):
                more = conn.recv(READ_AHEAD)
            with conn.deadline(seconds):
                while more and (name := reader.add(more)) is None:
                    more = conn.recv(READ_AHEAD)
        except DeadlineExceeded:
            pass  # the rest of a name that was begun is the destination's to wait for
        if reader.data:
            conn.unread(reader.data)
        return name or ""
