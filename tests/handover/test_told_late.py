"""A handler that could not be told at once that its connection has moved, since memory ran out, and has gone on."""

import gevent
import pytest
from gevent import socket as gevent_socket
from gevent.event import Event

from gtcpserver import connect, relay
from gtcpserver.handover import messages
from kit.handing import Taker, mover_of
from kit.patience import SOON
from kit.tunnels import Destination
from kit.waiting import wait_until


class Left(Exception):
    """What the program throws into a handler."""


@pytest.mark.parametrize("kind", ["idle", "tunnel"])
def test_its_cleanup_is_not_interrupted(serve, monkeypatch, kind):
    monkeypatch.setattr("gtcpserver.handover.line.AGAIN_SECONDS", 0.01)
    told, seen, goes_on = [], [], Event()

    def handle(conn):
        try:
            if kind == "tunnel":
                with connect(destination.address) as other:
                    relay(conn, other, handover=True)
            else:
                with conn.idle():
                    conn.recv(1)
        except Left:
            seen.append("left")
            goes_on.wait(SOON)  # such as a last statement to its database
            seen.append("cleaned up")

    destination = Destination()
    server = serve(handle, handover=True)
    with gevent_socket.create_connection(("127.0.0.1", server.port), SOON) as client:
        wait_until(lambda: any(mover_of(server).moving.may_move(conn) for conn in server.connections()))
        ((conn, worker),) = server.moving._state.connections.items()  # noqa: SLF001
        taker = Taker(server)
        server.mover.leave()
        (number,) = taker.offered()
        encode = messages.encode

        def fail_while_the_handler_waits(**lists):
            if lists.get("go"):
                told.append(1)
                if len(seen) < 1:
                    if len(told) == 1:
                        gevent.get_hub().loop.run_callback(worker.throw, Left)
                    raise MemoryError
            return encode(**lists)

        monkeypatch.setattr(messages, "encode", fail_while_the_handler_waits)
        taker.say(ready=[number])
        assert taker.hear().go == [number]
        assert conn.closed
        goes_on.set()
        wait_until(lambda: not server.active_connections)
        assert seen == ["left", "cleaned up"]
        taker.say(serving=[number])
        taker.die()
        del client
    destination.sock.close()
