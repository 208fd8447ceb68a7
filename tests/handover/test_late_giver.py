"""A worker whose own event loop stood still, while the answer to its offers came."""

import gevent.socket as gevent_socket
from gevent.monkey import get_original

from kit.handing import Taker, mover_of
from kit.patience import SOON


def test_an_answer_that_waits_unread_counts_however_late_this_loop_is(serve, monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("gtcpserver.handover.sender.OFFER_SECONDS", 0.1)

    def echo(conn):
        while True:
            with conn.idle():
                data = conn.recv(100)
            conn.sendall(data)

    server = serve(echo, handover=True)
    with gevent_socket.create_connection(("127.0.0.1", server.port), SOON) as client:
        client.sendall(b"x")
        assert client.recv(100) == b"x"
        taker = Taker(server)
        mover_of(server).leave()
        (number,) = taker.offered()
        taker.say(ready=[number])
        get_original("time", "sleep")(0.3)
        packet = taker.hear()
        assert (packet.go, packet.withdrawn) == ([number], [])
        taker.say(serving=[number])
        taker.die()
