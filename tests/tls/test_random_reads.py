"""Reads of all kinds in a random order, plain and over TLS, against a model: no byte differs, and no wait hangs.

GTCPSERVER_RANDOM_READS=300 runs that many connections, GTCPSERVER_SEED=7 those of another seed.
"""

import os
import random
import socket
import ssl
import tempfile
import threading
import time

import gevent
import pytest

from gtcpserver import Connection
from kit.patience import SOON

NUMBER = int(os.environ.get("GTCPSERVER_RANDOM_READS", "30"))
SEED = int(os.environ.get("GTCPSERVER_SEED", "1"))


def sockets(kind):
    if kind == "unix":
        return socket.socketpair()
    family, host = (socket.AF_INET6, "::1") if kind == "tcp6" else (socket.AF_INET, "127.0.0.1")
    with socket.create_server((host, 0), family=family) as listener:
        peer = socket.create_connection(listener.getsockname()[:2])
        return listener.accept()[0], peer


def feed(peer, data, chances, context):
    """Send in pieces, and end: over TLS, too, by the end of TCP alone."""
    with peer if context is None else context.wrap_socket(peer) as sock:
        largest = max(chances.choice([1, 7, 1000, 16640, 40_000]), len(data) // 100)
        while data:
            size = chances.randint(1, largest)
            sock.sendall(data[:size])
            data = data[size:]
            if chances.random() < 0.2:
                time.sleep(0.0005)


def read_within(conn, size, seconds):
    with gevent.Timeout(seconds, False):
        return conn.recv(size)
    return None


def read_and_kill(conn, size):
    got = []
    reader = gevent.spawn(lambda: got.append(conn.recv(size)))
    gevent.sleep(0)
    reader.kill()
    return got[0] if got else None


def read_into(conn, size):
    buffer = bytearray(size)
    return bytes(buffer[: conn.recv_into(buffer)])


def read_to_file(conn, size):
    with tempfile.TemporaryFile(buffering=0) as file:
        conn.recv_to_file(file, size)
        file.seek(0)
        return file.read()


def read_now(conn, size):
    conn.settimeout(0)
    try:
        return conn.recv(size)
    except BlockingIOError:
        return None
    finally:
        conn.settimeout(None)


def peek(conn, size):
    conn.recv(size, socket.MSG_PEEK)


ENCRYPTED = [
    lambda conn, size: conn.recv(size),
    lambda conn, size: conn.recv(size),
    read_into,
    read_to_file,
    read_now,
    read_and_kill,
    lambda conn, size: read_within(conn, size, 0.0003),
    lambda _conn, _size: gevent.sleep(0),
    lambda _conn, _size: gevent.sleep(0.001),
]
PLAIN = [
    *ENCRYPTED,
    peek,
    lambda conn, size: conn.recv(size, socket.MSG_WAITALL),
    lambda conn, size: conn.recvfrom(size)[0],
    lambda conn, size: conn.recvmsg(size)[0],
]


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("kind", ["tcp", "tcp6", "unix"])
def test_reads_of_all_kinds(kind, encrypted, shared):
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(*shared.server)
    server_side.num_tickets = 0  # a client that closes with tickets unread resets the connection
    client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE
    for number in range(NUMBER // 6):
        chances = random.Random(f"{SEED} {kind} {encrypted} {number}")
        data = chances.randbytes(chances.choice([0, 1, 500, 20_000, 300_000]))
        ours, peer = sockets(kind)
        sender = threading.Thread(
            target=feed, args=(peer, data, random.Random(number), client_side if encrypted else None), daemon=True
        )
        sender.start()
        conn = Connection(ours.family, ours.type, fileno=ours.detach())
        done = []
        received = bytearray()
        with gevent.Timeout(SOON, AssertionError(f"a hang: seed {SEED}, number {number}, {done[-5:]}")):
            if encrypted:
                conn.start_tls(server_side)
            while True:
                read = chances.choice(ENCRYPTED if encrypted else PLAIN)
                done.append(read)
                got = read(conn, chances.choice([1, 100, 4096, 16384, 70_000]))
                if got == b"":
                    break
                received += got or b""
        conn.close()
        assert received == data, (number, done[-5:])
        sender.join()
