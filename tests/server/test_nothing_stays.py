"""A connection that has ended leaves nothing behind, nor does a request: not an object, not a reference.

Environment:
    GTCPSERVER_CONNECTIONS: how many in all (20,000); `make endure` has 100,000.
    GTCPSERVER_REQUESTS: the same for requests (10,000); `make endure` has 10 million.
"""

import contextlib
import gc
import os
import resource
import socket
import sys

import pytest
from gevent.hub import get_hub

from gtcpserver import Connection, connect, relay
from gtcpserver.connection.stream import Stream
from gtcpserver.pool.greenlets import HandlerGreenlet
from kit.handlers import echo
from kit.waiting import wait_until

#: Connections or requests before the first look: caches fill, and the interpreter specializes its code.
WARM = 2_000

#: Of each kind.
CONNECTIONS = int(os.environ.get("GTCPSERVER_CONNECTIONS", 20_000)) // 4
REQUESTS = int(os.environ.get("GTCPSERVER_REQUESTS", 10_000)) // 4

#: Memory blocks that may come and go by themselves: a list that grows, a cache of the event loop.
TOLERATED = 200

#: References to what stays.
TOLERATED_REFERENCES = 50

#: Bytes by which the process may grow meanwhile, for what allocates without Python.
GROWTH = 4 << 20


def answer_idle(conn):
    conn.settimeout(30)
    while True:
        with conn.idle():
            data = conn.recv(4096)
        if not data:
            return
        conn.sendall(data)


def leave(_conn):
    pass


def fail_to_read(conn):
    with conn.deadline(30):
        conn.recv_exactly(100)  # the client sends less: EarlyEOF


def visit(address, times):
    for _ in range(times):
        with socket.create_connection(address) as sock, contextlib.suppress(OSError):
            sock.sendall(b"hello")
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(100):
                pass


def state():
    gc.collect()
    references = [sys.getrefcount(thing) for thing in (None, True, b"", 0, (), get_hub(), Connection, HandlerGreenlet)]
    return sys.getallocatedblocks(), references, sum(isinstance(one, (Connection, Stream)) for one in gc.get_objects())


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("handler", [echo, answer_idle, leave, fail_to_read])
def test_connections_leave_no_object_and_no_reference(serve, in_thread, handler):
    server = serve(handler, linger=0 if handler is leave else 10)
    address = server.addresses[0].rsplit(":", 1)
    address = address[0], int(address[1])

    def visits(times):
        in_thread(visit, address, times)
        wait_until(lambda: not server.active_connections and not len(server.lingerer))

    leaves_nothing(visits, CONNECTIONS)


def leaves_nothing(act, times):
    act(WARM)
    blocks, references, kept = state()
    size = resident()
    act(times)
    blocks_after, references_after, kept_after = state()
    assert resident() - size < GROWTH
    assert kept_after <= kept
    assert blocks_after - blocks < TOLERATED
    for before, after in zip(references, references_after, strict=True):
        assert after - before < TOLERATED_REFERENCES, (references, references_after)


def answer_within_times(conn):
    conn.settimeout(30)
    while True:
        with conn.deadline(30):
            data = conn.recv_until(b"\n")
            conn.sendall(data)


#: Connections that have requests in turn: always some events in a turn of the event loop.
AT_ONCE = 16

# Another process, so that both have a CPU. Each number it reads is how many requests it makes.
CLIENT = f"""
    import socket, sys
    socks = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range({AT_ONCE})]
    for line in sys.stdin:
        for _ in range(int(line) // {AT_ONCE}):
            for sock in socks:
                sock.sendall(b"hello, you\\n")
            for sock in socks:
                assert sock.recv(100) == b"hello, you\\n"
        print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("handler", [echo, answer_idle, answer_within_times, "relay"])
def test_requests_leave_no_object_and_no_reference(serve, python, spawn_thread, handler):
    server = serve(echo if handler == "relay" else handler)
    if handler == "relay":
        address = server.address
        server = serve(lambda conn: relay(conn, connect(address)))
    client = python(CLIENT, *server.address.rsplit(":", 1))

    def requests(times):
        client.stdin.write(b"%d\n" % times)
        client.stdin.flush()
        assert spawn_thread(client.stdout.readline).get() == b"done\n"

    leaves_nothing(requests, REQUESTS)
