"""A connection that has ended leaves nothing behind: not an object, not a reference to one that stays."""

import contextlib
import gc
import socket
import sys

import pytest
from gevent.hub import get_hub

from gtcpserver import Connection
from gtcpserver.connection.stream import Stream
from gtcpserver.pool.greenlets import HandlerGreenlet
from kit.handlers import echo
from kit.waiting import wait_until

#: Connections before the first look: caches fill, and the interpreter specializes its code.
WARM = 2_000

#: Of each kind; 100,000 in all.
COUNTED = 25_000

#: Memory blocks that may come and go by themselves: a list that grows, a cache of the event loop.
TOLERATED = 200


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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("handler", [echo, answer_idle, leave, fail_to_read])
def test_connections_leave_no_object_and_no_reference(serve, in_thread, handler):
    server = serve(handler, linger=0 if handler is leave else 10)
    address = server.addresses[0].rsplit(":", 1)
    address = address[0], int(address[1])

    def visits(times):
        in_thread(visit, address, times)
        wait_until(lambda: not server.active_connections and not len(server.lingerer))

    visits(WARM)
    blocks, references, kept = state()
    visits(COUNTED)
    blocks_after, references_after, kept_after = state()
    assert kept_after <= kept
    assert blocks_after - blocks < TOLERATED
    for before, after in zip(references, references_after, strict=True):
        assert after - before < TOLERATED, (references, references_after)
