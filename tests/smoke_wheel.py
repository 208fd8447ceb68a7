"""Whether an installed wheel works, compiled. It needs no pytest: cibuildwheel runs it in each environment."""

import socket
import sys

import gevent
from gevent import get_hub

import gtcpserver


def echo(conn: gtcpserver.Connection) -> None:
    while data := conn.recv(8192):
        with conn.idle():
            gevent.sleep(0)
        conn.sendall(data)


def exchange(address: tuple[str, int], sent: bytes) -> bytes:
    with socket.create_connection(address, 20) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def main() -> None:
    if gtcpserver.why_pure is not None:
        sys.exit(f"not compiled: {gtcpserver.why_pure}")
    with gtcpserver.Server("127.0.0.1:0", echo, timeout=20) as server:
        host, _, port = server.address.rpartition(":")
        for size in (1, 1000, 1_000_000):
            sent = b"x" * size
            if get_hub().threadpool.apply(exchange, ((host, int(port)), sent)) != sent:
                sys.exit(f"{size} bytes came back as others")
    print(f"gtcpserver {gtcpserver.__version__}: compiled, and works")


main()
