"""Connections move along chains of servers at random moments, over real sockets: each request is answered once.

Clients write pieces of requests of any size, read, end their side, or reset, also in the very moment of a move.
`make move-schedules` has 10,000 schedules.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket

import gevent
import pytest
from gevent import socket as gevent_socket
from gevent.event import Event
from gevent.pool import Pool

from gtcpserver.handover.sender import PAUSING
from kit.handing import close_lines, join, leave
from kit.patience import SOON
from kit.tunnels import Reader, read, reset
from kit.waiting import wait_until

SCHEDULES = int(os.environ.get("GTCPSERVER_MOVE_SCHEDULES", "25"))

#: Servers of a chain.
LENGTH = 4

#: Sizes of requests, of the pieces in which they are written, and of what is read at once.
SIZES = (1, 2, 100, 5000, 70_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("gtcpserver.handover.mover.AGAIN_SECONDS", 0.1)
    monkeypatch.setitem(PAUSING, "full", 0.1)


def count_lines(conn):
    """Answer each line by its number and itself."""
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\n", 2 * max(SIZES))
        except EOFError:
            return
        number = conn.session["lines"] = conn.session.get("lines", 0) + 1
        conn.sendall(b"%d %b" % (number, line))


class Client(Reader):
    """A client that knows what it has to be answered."""

    def __init__(self, server, choose):
        self._choose = choose
        super().__init__(gevent_socket.create_connection(("127.0.0.1", server.port), SOON))
        self._unsent = b""
        self.sent = bytearray()
        self.ended = False

    @property
    def due(self):
        lines = self.sent.split(b"\n")[:-1]
        return b"".join(b"%d %b\n" % numbered for numbered in enumerate(lines, 1))

    def write(self):
        if self.ended:
            return
        if not self._unsent:
            line = self._choose.randbytes(self._choose.choice(SIZES)).replace(b"\n", b"")
            self._unsent = line + b"\n"
        with contextlib.suppress(BlockingIOError):
            size = self.sock.send(self._unsent[: self._choose.choice(SIZES)])
            self.sent += self._unsent[:size]
            self._unsent = self._unsent[size:]

    def end(self):
        if not self.ended:
            self.ended = True
            self.sock.shutdown(socket.SHUT_WR)


class Chain:
    """Servers, each of which leaves once the next one is there; `here` is the one that stays."""

    def __init__(self, servers):
        self.servers = servers
        self.here = 0
        self.stops = []

    def move(self, stop):
        if self.here + 1 == len(self.servers):
            return
        giver, self.here = self.servers[self.here], self.here + 1
        for one in self.servers[: self.here]:
            if one.active_connections or one is giver:
                join(one, self.servers[self.here])
        giver.mover.leave()
        if stop:
            self.stops.append(gevent.spawn(giver.stop, SOON, patient=True, leave_listening=True))


def move_at_random(seed, servers):
    choose = random.Random(seed)
    chain, client = Chain(servers), Client(servers[0], choose)
    try:
        for _ in range(choose.randint(5, 60)):
            what = choose.random()
            if what < 0.5:
                client.write()
            elif what < 0.65:
                client.read(choose.choice(SIZES))
            elif what < 0.67:
                client.end()
            elif what < 0.82:
                chain.move(stop=choose.random() < 0.5)
            else:
                gevent.sleep(choose.choice((0, 0, 0.001)))
        if choose.random() < 0.2:
            client.read_all()
            assert client.due.startswith(client.got)
            chain.move(stop=choose.random() < 0.5)
            reset(client.sock)  # at the same time
        else:
            client.end()
            wait_until(client.read_all)
            assert client.got == client.due
    finally:
        client.sock.close()
    wait_until(lambda: not any(server.active_connections for server in servers))
    gevent.joinall(chain.stops, timeout=SOON, raise_error=True)


def run_schedule(seed, serve):
    servers = [serve(count_lines, handover=True) for _ in range(LENGTH)]
    try:
        move_at_random(seed, servers)
        assert not any(server.stats().handler_errors for server in servers)
    except BaseException as error:
        raise AssertionError(f"schedule {seed}: {error!r}"[:1000]) from error
    for server in servers:
        server.halt()
        close_lines(server)


def test_random_schedules(serve):
    # At the same time: they mostly wait.
    Pool(25).map(lambda seed: run_schedule(seed, serve), range(SCHEDULES))


def test_binary_requests_that_were_read_ahead_go_along(serve):
    begun, goes_on = Event(), Event()

    def handle(conn):
        if not conn.resumed:
            assert conn.recv_until(b"\n", 10) == b"hello\n"  # and some of what follows
            begun.set()
            goes_on.wait()
        count_lines(conn)

    a, b = (serve(handle, handover=True) for _ in "ab")
    with gevent_socket.create_connection(("127.0.0.1", a.port), SOON) as client:
        client.settimeout(SOON)
        lines = [b"\xff" * 7_000 for _ in range(4)]
        client.sendall(b"\n".join([b"hello", *lines, b""]))
        begun.wait()
        leave(a, b, stop=True)
        gevent.sleep(0)
        goes_on.set()
        due = b"".join(b"%d %b\n" % numbered for numbered in enumerate(lines, 1))
        assert read(client, len(due)) == due
        wait_until(lambda: (a.active_connections, b.stats().taken_over) == (0, 1))
