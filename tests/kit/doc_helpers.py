"""For the code in `<!-- then: -->` comments of the docs."""

import gevent
from gevent import socket

from gtcpserver import Server
from kit.patience import SOON


def talk(handler, *exchange, address="127.0.0.1:0", wrap=lambda sock: sock, **options):
    """Serves with a handler, sends and expects in turn, and stops. Bytes to send and bytes to expect; None: the end."""
    server = Server(address, handler, **options)
    server.start()
    with gevent.Timeout(SOON), wrap(socket.create_connection(("127.0.0.1", server.port))) as client:
        for request, answer in zip(exchange[::2], exchange[1::2], strict=True):
            client.sendall(request)
            got = b""
            while len(got) < (len(answer) if answer is not None else 1):
                data = client.recv(65536)
                if not data:
                    break
                got += data
            # One answer may be longer than what is said of it.
            assert got[: len(answer)] == answer if answer else not got, f"expected {answer!r}, got {got!r}"
    return server.stop(timeout=SOON)
