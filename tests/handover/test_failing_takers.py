"""A new worker that cannot make a connection of what it is offered."""

import os

import gevent.socket as gevent_socket

from gtcpserver import Connection
from gtcpserver.handover.sender import PAUSING
from kit.handing import leave
from kit.patience import SOON
from kit.waiting import wait_until


def open_files():
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }


class Own(Connection):
    """A class of a program, which fails now and then."""

    failures = 0

    def __init__(self, *arguments):
        if Own.failures:
            Own.failures -= 1
            raise OSError("no descriptor for its file")
        super().__init__(*arguments)


def test_a_connection_that_cannot_be_made_is_served_on_and_the_others_move(serve, monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.1)
    monkeypatch.setitem(PAUSING, "full", 0.1)

    def echo(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            if not data:
                return
            conn.sendall(data + (b" there" if conn.resumed else b" here"))

    old, new = serve(echo, handover=True), serve(echo, handover=True, connection_class=Own)
    clients = [gevent_socket.create_connection(("127.0.0.1", old.port), SOON) for _ in range(3)]
    for client in clients:
        client.settimeout(SOON)
        client.sendall(b"x")
        assert client.recv(100) == b"x here"
    sockets = {os.readlink(f"/proc/self/fd/{conn.fileno()}") for conn in old.connections()}
    Own.failures = 1
    leave(old, new)
    wait_until(lambda: new.active_connections == 3)
    assert not Own.failures
    for client in clients:
        client.sendall(b"x")
        assert client.recv(100) == b"x there"
        client.close()
    wait_until(lambda: not sockets & open_files())  # no copy is left of what came with the one that failed
