"""A relay as it is usually written on gevent: recv and sendall, a greenlet for each direction."""

from __future__ import annotations

import argparse
import socket as constants
from typing import Any

import gevent
from gevent import socket
from gevent.server import StreamServer

SIZE = 256 * 1024

parser = argparse.ArgumentParser()
parser.add_argument("listen", type=int)
parser.add_argument("target", type=int)
given = parser.parse_args()


def copy(source: Any, sink: Any) -> None:
    try:
        while data := source.recv(SIZE):
            sink.sendall(data)
        sink.shutdown(constants.SHUT_WR)
    except OSError:
        return


def relay(client: Any, _address: Any) -> None:
    client.setsockopt(constants.IPPROTO_TCP, constants.TCP_NODELAY, 1)
    with client, socket.create_connection(("127.0.0.1", given.target)) as upstream:
        upstream.setsockopt(constants.IPPROTO_TCP, constants.TCP_NODELAY, 1)
        back = gevent.spawn(copy, upstream, client)
        copy(client, upstream)
        back.join()


StreamServer(("127.0.0.1", given.listen), relay, backlog=4096).serve_forever()
