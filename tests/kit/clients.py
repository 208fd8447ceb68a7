"""Plain clients: where they come from, what they read, how they leave. They block: run them in a native thread."""

from __future__ import annotations

import errno
import socket
import struct


def ask(client, data=b"hello"):
    """Send and read back as many bytes, in a native thread."""
    client.sendall(data)
    answer = b""
    while len(answer) < len(data) and (more := client.recv(65536)):
        answer += more
    return answer


def reset(client):
    """Close with a RST instead of a FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def client_from(server, source):
    """Connects from an address of this host."""
    sock = socket.socket()
    sock.settimeout(60)
    sock.bind((source, 0))
    sock.connect(("127.0.0.1", server.port))
    return sock


def is_served(sock, in_thread):
    try:
        sock.sendall(b"x")
        return in_thread(sock.recv, 10) == b"x"
    except ConnectionError:
        return False


def read(sock, size):
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def read_all(client):
    """Everything until the peer's end, and what ended it."""
    data = bytearray()
    try:
        while more := client.recv(65536):
            data += more
    except OSError as error:
        return bytes(data), errno.errorcode[error.errno]
    return bytes(data), "end"


def converse(client, data):
    """Send, end, and return all that comes."""
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    return b"".join(iter(lambda: client.recv(65536), b""))
