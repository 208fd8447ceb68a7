"""Selection: connections of a server that `gtcpserver ctl connections` shows and `ctl end` ends."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from time import monotonic
from typing import Any

import gevent
from greenlet import GreenletExit

from gtcpserver.connection.connection import Connection, log_fields_of
from gtcpserver.errors import ConfigError
from gtcpserver.networks import IPNetwork, parse_network, unmapped
from gtcpserver.server.describe import peer, printed
from gtcpserver.server.server import Server

#: Connections looked at without a pause: 10 us each, during which the event loop does nothing else.
AT_ONCE = 50

#: What a handler may tell of a connection: in the fields of its log line, or by `connection_fields()` of an object in
#: `connection.context`.
TOLD = ("user", "listener", "destination", "upstream")

#: Characters of one of these.
LONGEST = 255


#: The form of an ID (`id_of`).
ID = re.compile(r"[0-9]{1,10}\.[0-9]{1,10}\.[0-9a-f]{1,8}")


class EndedByOperator(GreenletExit):  # type: ignore[misc]  # greenlet is untyped
    """The connection was ended by `gtcpserver ctl end`."""

    def __str__(self) -> str:
        return "by ctl end"


@dataclass(frozen=True)
class Selection:
    """Which connections are meant; what is None does not matter.

    Attributes:
        user: name of the user.
        client: network of the client.
        destination: host, host:port, or .domain with all names below it.
        ids: ids of connections, from an earlier list.
    """

    user: str | None = None
    client: IPNetwork | None = None
    destination: str | None = None
    ids: Collection[str] | None = None

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Selection:
        """Make one of the fields of a request. Raise ConfigError."""
        for name in ("user", "client", "destination"):
            if not isinstance(fields.get(name), (str, type(None))):
                raise ConfigError(f"{name} must be a text, got {fields[name]!r}")
        ids, client = fields.get("ids"), fields.get("client")
        if ids is not None and not (isinstance(ids, list) and all(isinstance(one, str) for one in ids)):
            raise ConfigError(f"ids must be a list of texts, got {ids!r}")
        try:
            network = None if client is None else parse_network(client)
        except ValueError as error:
            raise ConfigError(f"client must be an address or a network, got {client!r} ({error})") from None
        return cls(fields.get("user"), network, fields.get("destination"), None if ids is None else frozenset(ids))

    @property
    def is_everything(self) -> bool:
        """Whether it excludes no connection."""
        return self == Selection()

    def has(self, connection: Connection, told: dict[str, str | None]) -> bool:
        """Return whether a connection is meant, if its ID is.

        Args:
            told: what its handler tells of it.
        """
        return (
            (self.user is None or told["user"] == self.user)
            and (self.client is None or _is_in(connection.client_address, self.client))
            and (self.destination is None or _leads_to(told["destination"], self.destination.lower()))
        )


def id_of(connection: Connection) -> str:
    """Return an id of a connection, unique on this host."""
    return f"{os.getpid()}.{connection.fileno()}.{int(connection.accepted_at * 1e6) & 0xFFFFFFFF:x}"


def told_of(connection: Connection) -> dict[str, str | None]:
    """Return what the handler tells of its connection."""
    try:
        tell = getattr(connection.context, "connection_fields", None)
        fields = tell() if callable(tell) else log_fields_of(connection)
        found = {name: fields.get(name) for name in TOLD}
        return {name: None if value is None else str(value)[:LONGEST] for name, value in found.items()}
    except Exception:  # the handler's own code: the others are shown all the same
        return dict.fromkeys(TOLD)


def _is_in(address: Any, network: IPNetwork) -> bool:
    if not isinstance(address, tuple):
        return False
    try:
        ip = unmapped(ip_address(address[0].partition("%")[0]))
    except ValueError:
        return False  # a handler has assigned something else
    return ip.version == network.version and ip in network


def _leads_to(destination: str | None, asked: str) -> bool:
    if destination is None:
        return False
    host = destination.rpartition(":")[0]
    if asked.startswith("."):
        return f".{host}".endswith(asked)
    return asked in (destination, host, host.strip("[]"))


def selected(server: Server, selection: Selection) -> Iterator[tuple[Connection, Any, dict[str, str | None]]]:
    """Yield the connections that are meant, oldest first, with their handlers' greenlets and what these tell.

    Yields to the event loop regularly, so that the server goes on.
    """
    connections, ids = server.connections(), selection.ids
    for number, connection in enumerate(list(connections), 1):
        greenlet = connections.get(connection)
        if greenlet is not None and (ids is None or id_of(connection) in ids):  # it has not ended during a pause
            told = told_of(connection)
            if selection.has(connection, told):
                yield connection, greenlet, told
        if not number % AT_ONCE:
            gevent.sleep(0)


def rows_of(server: Server, selection: Selection, most: int) -> tuple[list[dict[str, Any]], int]:
    """Return the first rows of the table of `gtcpserver ctl connections`, and how many there are in all."""
    rows: list[dict[str, Any]] = []
    number = 0
    for connection, _, told in selected(server, selection):
        number += 1
        if len(rows) < most:
            rows.append(_row(connection, told))
    return rows, number


def _row(connection: Connection, told: dict[str, str | None]) -> dict[str, Any]:
    return {
        "id": id_of(connection),
        "client": peer(connection),
        **told,
        "listener": told["listener"] or _listener_of(connection),
        "age": round(monotonic() - connection.accepted_at, 3),
        "bytes_received": connection.bytes_received,
        "bytes_sent": connection.bytes_sent,
        "idle": connection.is_idle,
    }


def _listener_of(connection: Connection) -> str:
    try:
        return printed(connection.server_address)
    except OSError:  # the handler has closed it
        return ""


def end(server: Server, selection: Selection) -> int:
    """End the connections that are meant; return their number."""
    number = 0
    for _, greenlet, _ in selected(server, selection):
        greenlet.kill(EndedByOperator, block=False)
        number += 1
    return number
