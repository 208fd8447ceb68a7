"""Memory runs out in the moment in which a connection is frozen."""

import gevent.socket as gevent_socket
import pytest

from gtcpserver.connection import moving
from kit.handing import leave
from kit.patience import SOON
from kit.waiting import wait_until


@pytest.mark.parametrize("call", [1, 2])
def test_a_connection_that_cannot_be_frozen_is_served_on_and_moves_later(serve, monkeypatch, call):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.3)
    make, calls = vars(moving)["_Guard"], []

    def guard(freeze):
        calls.append(freeze)
        if len(calls) == call:
            raise MemoryError
        return make(freeze)

    def echo(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            conn.sendall(data + (b" there" if conn.resumed else b" here"))

    old, new = serve(echo, handover=True), serve(echo, handover=True)
    with gevent_socket.create_connection(("127.0.0.1", old.port), SOON) as client:
        client.settimeout(SOON)
        client.sendall(b"x")
        assert client.recv(100) == b"x here"
        monkeypatch.setattr(moving, "_Guard", guard)
        leave(old, new)
        wait_until(lambda: len(calls) >= call)
        client.sendall(b"x")
        assert client.recv(100) == b"x here"
        wait_until(lambda: new.active_connections)
        client.sendall(b"x")
        assert client.recv(100) == b"x there"
