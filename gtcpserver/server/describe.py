"""Descriptions of a connection for people: its client, and where its handler stands."""

from __future__ import annotations

import os
import socket
from time import monotonic
from types import CodeType
from typing import Any

from gtcpserver.address import format_sockaddr
from gtcpserver.connection.connection import Connection
from gtcpserver.diagnostics.frames import call_of_program, calls_of_program

from .stats import CutConnection


def describe(connection: Connection, greenlet: Any, ended: bool = True) -> CutConnection:
    """Describe a connection that is cut.

    Args:
        connection: the connection.
        greenlet: the greenlet of its handler; None: no handler has begun.
        ended: False if the handler would not end.
    """
    return CutConnection(
        peer=peer(connection),
        age=monotonic() - connection.accepted_at,
        bytes_received=connection.bytes_received,
        bytes_sent=connection.bytes_sent,
        where=_where(greenlet.gr_frame) if greenlet is not None else (),
        ended=ended,
    )


def peer(connection: Connection) -> str:
    """Return the client's address as text."""
    return printed(connection.client_address)


def printed(address: Any) -> str:
    """Return an address, as ``accept`` returns it, as text."""
    if not isinstance(address, tuple):
        return format_sockaddr(address, socket.AF_UNIX) if isinstance(address, (str, bytes)) else str(address)
    return format_sockaddr(address, socket.AF_INET if len(address) == 2 else socket.AF_INET6)


def place(greenlet: Any) -> str:
    """Return where a handler waits: the innermost of the program's own calls; "" if no handler has begun."""
    call = call_of_program(greenlet.gr_frame) if greenlet is not None else None
    return "" if call is None else _printed_call(*call)


def _where(frame: Any) -> tuple[str, ...]:
    """Return where a handler waits: the program's own frames, outermost first."""
    return tuple(_printed_call(code, line) for code, line in calls_of_program(frame))


def _printed_call(code: CodeType, line: int) -> str:
    return f"{os.path.basename(code.co_filename)}:{line} in {code.co_name}"
