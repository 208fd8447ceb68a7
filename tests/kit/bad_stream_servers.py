"""A program with a StreamServer of each kind of spawn, plain and encrypted; nothing has set up logging.

    python bad_stream_servers.py CERTIFICATE

Prints their addresses and, when its standard input ends, how many faults of clients were counted.
"""

import sys

import gevent
import gevent.pool
from gevent.os import tp_read

from gtcpserver import StreamServer


def echo(sock, address):
    with gevent.Timeout(5):
        while data := sock.recv(4096):
            sock.sendall(data)


def answer(sock, address):
    sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


def main(certificate: str) -> None:
    servers = [StreamServer(("127.0.0.1", 0), answer, spawn=None)]
    for spawn in ("default", gevent.spawn, gevent.spawn_raw, gevent.pool.Pool(50), 50):
        for tls in ({}, {"certfile": certificate}, {"certfile": certificate, "suppress_ragged_eofs": False}):
            servers.append(StreamServer(("127.0.0.1", 0), echo, spawn=spawn, **tls))
    for server in servers:
        server.start()
    print(*(f"127.0.0.1:{server.server_port}" for server in servers), flush=True)
    while tp_read(0, 100):
        pass
    gevent.sleep(0.1)
    counted = [server.stats() for server in servers]
    print(sum(stats["resets"] + stats["timeouts"] + sum(stats["handshake_failures"].values()) for stats in counted))
    assert not any(stats["handler_errors"] for stats in counted)


if __name__ == "__main__":
    main(*sys.argv[1:])
