"""Every kind of `spawn` of a StreamServer."""

from __future__ import annotations

import gevent
import gevent.pool
import gevent.socket
import pytest

from gtcpserver import HandlerPool
from kit.clients import read_all

SPAWNS = {
    "default": lambda: "default",
    "spawn": lambda: gevent.spawn,
    "raw": lambda: gevent.spawn_raw,
    "none": lambda: None,
    "number": lambda: 100,
    "pool": lambda: gevent.pool.Pool(100),
    "handler_pool": lambda: HandlerPool(100),
}

any_spawn = pytest.mark.parametrize("make_spawn", SPAWNS.values(), ids=SPAWNS)

WAITING = {name: make for name, make in SPAWNS.items() if name != "none"}

waiting_spawn = pytest.mark.parametrize("make_spawn", WAITING.values(), ids=WAITING)


def answer_of(client):
    with client:
        return read_all(client)
