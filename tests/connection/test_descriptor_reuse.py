"""A connection that was closed never touches its descriptor again, which is another's by then."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import gevent
import pytest

from gtcpserver import Connection
from kit.waiting import wait_until

CLOSES: dict[str, Callable[[Connection], Any]] = {
    "close": Connection.close,
    "abort": Connection.abort,
    "detach": lambda conn: os.close(conn.detach()),
    "end": Connection.end,
}

WAITS: dict[str, Callable[[Connection], Any]] = {
    "recv": lambda conn: conn.recv(100),
    "recv_exactly": lambda conn: conn.recv_exactly(100),
    "recv_until": lambda conn: conn.recv_until(b"\n"),
    "sendall": lambda conn: [conn.sendall(b"INJECTED" * 5000) for _ in range(1000)],
}


def pair(descriptors: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        descriptors.callback(sock.close)
    return ours, theirs


def reuse(fd: int, descriptors: ExitStack) -> list[socket.socket]:
    """Return new sockets with input, one of them with the number ``fd``."""
    victims: list[socket.socket] = []
    while fd not in [victim.fileno() for victim in victims]:
        gevent.sleep(0)  # gevent closes what a greenlet waits on a little later
        assert len(victims) < 200, f"descriptor {fd} is still open"
        new = pair(descriptors)
        for one in new:
            one.send(b"SECRET")
        victims += new
    return victims


def said(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except OSError as error:
        return error.errno


@pytest.mark.parametrize("primed", [False, True], ids=["first wait", "later wait"])
@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("close", CLOSES)
def test_no_call_reaches_the_next_owner_of_the_descriptor(close: str, wait: str, primed: bool) -> None:
    with ExitStack() as descriptors:
        ours, peer = pair(descriptors)
        conn = Connection(ours.family, ours.type, 0, ours.detach())
        fd = conn.fileno()
        if primed:
            peer.send(b"x")
            assert conn.recv(10) == b"x"
        # The methods of a connection are kept by programs, and outlive its close.
        recv, sendall, recv_exactly, send = conn.recv, conn.sendall, conn.recv_exactly, conn.send
        waiting = gevent.spawn(said, lambda: WAITS[wait](conn))
        gevent.sleep(0)
        if wait == "recv":
            peer.send(b"late")  # the event is there, but the greenlet has not run
        CLOSES[close](conn)
        if close == "detach":
            victims = reuse(fd, descriptors)
        else:
            while said(lambda: os.fstat(fd)) != 9:
                gevent.sleep(0)
            victims = reuse(fd, descriptors)
        assert waiting.get(timeout=5) == 9
        calls: list[Callable[[], Any]] = [
            lambda: recv(100),
            lambda: sendall(b"INJECTED"),
            lambda: recv_exactly(3),
            lambda: send(b"INJECTED"),
            lambda: conn.recv_into(bytearray(10)),
            lambda: conn.shutdown(socket.SHUT_RDWR),
        ]
        assert [said(call) for call in calls] == [9] * len(calls)
        assert [victim.recv(100) for victim in victims] == [b"SECRET"] * len(victims)


def test_a_rejected_connection_does_not_reach_the_next_owner_of_its_descriptor(serve, connect, in_thread) -> None:
    """The lingerer closes its socket. A program that knows the connection, here by its class, still has it."""
    made: list[Connection] = []

    class Known(Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    hold = gevent.event.Event()
    server = serve(lambda conn: hold.wait(), pool=1, on_full="reject", connection_class=Known)
    connect(server)
    wait_until(lambda: server.active_connections == 1)
    rejected = connect(server)
    assert in_thread(rejected.recv, 10) == b""
    wait_until(lambda: server.stats().rejected == 1 and len(made) == 2)
    assert made[1].closed
    rejected.close()
    wait_until(lambda: server.stats().lingering == 0)
    assert [said(lambda: made[1].recv(10)), said(lambda: made[1].sendall(b"INJECTED"))] == [9, 9]
    alive = weakref.ref(made.pop())
    wait_until(lambda: alive() is None)
    hold.set()
