"""Moving: what goes along when a client moves to another worker (``handover``), and how it is served there.

Clients move in two places: in a tunnel, and between two HTTP requests, which needs nothing but the connection. Where
the new worker has other rules, open tunnels go on or end as after any reload (`succession`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gtcpserver.admission.proxy_header import network_address
from gtcpserver.connection.connection import Connection
from gtcpserver.networks import as_ip

from .errors import Cut
from .gate import Gate
from .permission import Opened
from .record import AccessRecord
from .resolve import Found
from .target import Target, parse_authority
from .visitor import Visitor

#: Name of the state in a session.
_STATE = "tunnel"

_RECORD = tuple(field.name for field in fields(AccessRecord) if field.name != "moved")


def note_tunnel(visitor: Visitor) -> None:
    """Note what another worker needs of a tunnel, if its client may move."""
    conn = visitor.conn
    if conn.server is None or conn.server.moving is None:
        return
    conn.session[_STATE] = {
        "record": {name: getattr(visitor.record, name) for name in _RECORD},
        "opened": None if visitor.opened is None else _opened_out(visitor.opened),
        "users": list(visitor.entered_users),
    }


def was_intercepted(conn: Connection) -> bool:
    """Return whether a connection of another worker has come to a transparent listener there."""
    state = conn.session.get(_STATE)
    record = state.get("record") if isinstance(state, dict) else None
    return isinstance(record, dict) and bool(record.get("original"))


def take_over(gate: Gate, conn: Connection) -> Visitor:
    """Register a client that another worker has admitted; `Visitor.leave` must be called at its end.

    Between two requests it is judged by the rules of this one, as by those of a reload. Limits count it, and do not
    refuse it.
    """
    address = network_address(conn)
    client, text, decision = gate.decide_client(address)
    bucket = gate.limits.make_bucket(empty=True)
    visitor = Visitor(gate, client, AccessRecord(text, gate.listener), decision.auth, conn, address, _bucket=bucket)
    if conn.relayed_to is None and not decision.allowed:
        visitor.turn_away("client_denied", decision.rule)
        return visitor
    gate.limits.resume(address)
    visitor.entered = True
    gate.tenure.enter()
    if conn.relayed_to is not None:
        try:
            _take_over_tunnel(visitor, conn.relayed_to, conn.session[_STATE])
        except BaseException:
            visitor.leave()
            raise
    return visitor


def _take_over_tunnel(visitor: Visitor, upstream: Connection, state: Mapping[str, Any]) -> None:
    visitor.record = record = AccessRecord(**state["record"])
    if record.original:
        original = parse_authority(record.original)
        visitor.original = as_ip(original.host), original.port
    for user in state["users"]:
        visitor.gate.limits.resume_user(user)
        visitor.entered_users.add(user)
    if state["opened"] is not None:
        visitor.opened = _opened_in(state["opened"])
    for group in visitor.gate.groups:
        group.add(visitor.record.upstream, upstream)


def check_tunnel(visitor: Visitor) -> None:
    """Judge a tunnel that has moved by the rules here, if they end what they forbid.

    Raises:
        Cut: they forbid it.
    """
    gate = visitor.gate
    if not gate.tenure.end_forbidden:
        return
    decision = gate.decide_client(visitor.address)[2]
    if not decision.allowed:
        raise Cut("client_denied", decision.rule)
    why = visitor.why_forbidden()
    if why is not None:
        raise why


def _opened_out(opened: Opened) -> list[Any]:
    target, ip, found = opened
    names = [found.name, found.also, found.key] if isinstance(found, Found) else None
    target_out = [target.host, target.port, target.ip is not None]
    return [target_out, None if ip is None else str(ip), [str(one) for one in found], names]


def _opened_in(state: Any) -> Opened:
    (host, port, is_ip), ip, addresses, names = state
    found: tuple[Any, ...] = tuple(as_ip(one) for one in addresses)
    if names is not None:
        found = known = Found(found)
        known.name, known.also, key = names[0], tuple(names[1]), names[2]
        known.key = tuple(key) if isinstance(key, list) else key
    return Target(host, port, as_ip(host) if is_ip else None), None if ip is None else as_ip(ip), found
