"""A server driven at random by a model: whatever clients and operators do, in whatever order, the books balance.

Clients connect (plain or TLS), ask, ask for much and do not read it, send half a request, half-close, reset and close;
the operator resizes the pool and stops the server. Every byte of every answer is compared with the model, and whenever
nothing moves every counter is; at the end no place in the pool is taken and no descriptor is open that was not before.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import gevent
import gevent.socket
import gevent.ssl
import pytest
import trustme
from gevent.hub import get_hub
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gtcpserver import EarlyEOF, HandlerPool, Server
from kit.patience import SOON
from kit.waiting import wait_until

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset

MOST_CLIENTS = 8

#: More than the sender's buffer (tcp_wmem) and the receiver's take, so that who sends it waits for the reader.
MUCH = 8 << 20
RECEIVE_BUFFER = 64 << 10

#: For more: GTCPSERVER_MACHINE_EXAMPLES=1000.
EXAMPLES = int(os.environ.get("GTCPSERVER_MACHINE_EXAMPLES", "12"))

CLIENT = st.integers(0, MOST_CLIENTS - 1)

T = TypeVar("T")

_AUTHORITY = trustme.CA()
_CERTIFICATE = _AUTHORITY.issue_cert("localhost")


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _CERTIFICATE.configure_cert(context)
    return context


def client_context() -> Any:
    context = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _AUTHORITY.configure_trust(context)
    return context


def handle(conn: Any) -> None:
    """``SIZE ANSWER`` in a line and SIZE bytes are a request; the answer is the line, and ANSWER bytes."""
    while True:
        try:
            with conn.idle():
                line = conn.recv_until(b"\n", 64)
        except EarlyEOF as early:
            if early.partial:
                raise
            return
        size, answer = map(int, line.split())
        body = conn.recv_exactly(size)
        conn.sendall(answer_to(line, body, answer))


def request_of(size: int, answer: int) -> tuple[bytes, bytes]:
    """A request and its answer."""
    line, body = b"%d %d\n" % (size, answer), os.urandom(size)
    return line + body, answer_to(line, body, answer)


def answer_to(line: bytes, body: bytes, size: int) -> bytes:
    pattern = line + body[:100]
    return line + (pattern * (size // len(pattern) + 1))[:size]


@dataclass(eq=False)
class Book:
    """What a server must have counted.

    Attributes:
        sent: bytes; at least so many where a client that owes reading has left.
    """

    server: Server
    accepted: int = 0
    received: int = 0
    sent: int = 0
    sent_is_exact: bool = True
    resets: int = 0


@dataclass(eq=False)
class Client:
    """One connection, as the model knows it.

    Attributes:
        unsent: the rest of a request that was begun.
        expected: bytes that the server owes it, in order.
        stalled: it has asked for more than the buffers take, and does not read.
        silent: it has sent nothing yet.
    """

    sock: Any
    book: Book
    unsent: bytes = b""
    expected: bytearray = field(default_factory=bytearray)
    stalled: bool = False
    silent: bool = True

    @property
    def busy(self) -> bool:
        """Its handler holds a place."""
        return self.stalled or bool(self.unsent)

    @property
    def is_plain(self) -> bool:
        return self.book.server.tls is None


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []
        self.pool = HandlerPool(10)
        self.sockets = open_sockets()
        self.books = [self.open_book(tls=False), self.open_book(tls=True)]

    def open_book(self, tls: bool) -> Book:
        server = Server("127.0.0.1:0", handle, pool=self.pool, tls=server_context() if tls else None)
        server.start()
        return Book(server)

    # -- clients -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < MOST_CLIENTS)
    @rule(tls=st.booleans())
    def connect(self, tls: bool) -> None:
        self.make_room()
        book = self.books[tls]
        sock = gevent.socket.socket()
        sock.settimeout(SOON)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        sock.connect(("127.0.0.1", book.server.port))
        if tls:
            sock = client_context().wrap_socket(sock, server_hostname="localhost")
        book.accepted += 1
        self.clients.append(Client(sock, book))

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=3))
    def ask(self, number: int, sizes: list[int]) -> None:
        client = self.pick(number)
        self.finish(client)
        self.make_room()
        for size in sizes:
            asked, answer = request_of(size, size // 2)
            client.expected += answer
            self.send(client, asked)
        self.read(client)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT, size=st.integers(1, 5000), share=st.floats(0, 0.99))
    def begin_a_request(self, number: int, size: int, share: float) -> None:
        client = self.pick(number)
        self.finish(client)
        self.make_room()
        asked, answer = request_of(size, 10)
        # The line at least: before it has come the connection is idle.
        cut = max(asked.index(b"\n") + 1, int(len(asked) * share))
        client.expected += answer
        client.unsent = asked[cut:]
        self.send(client, asked[:cut])

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT)
    def ask_for_much_and_do_not_read(self, number: int) -> None:
        client = self.pick(number)
        self.finish(client)
        self.make_room()
        asked, answer = request_of(10, MUCH)
        client.expected += answer
        client.stalled = True
        self.send(client, asked)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT)
    def finish_what_was_begun(self, number: int) -> None:
        self.finish(self.pick(number))

    # -- how clients leave -------------------------------------------------------------------------------------------

    @precondition(lambda self: any(client.is_plain for client in self.clients))
    @rule(number=CLIENT)
    def half_close(self, number: int) -> None:
        plain = [client for client in self.clients if client.is_plain]
        client = plain[number % len(plain)]
        client.sock.shutdown(socket.SHUT_WR)
        if client.unsent:
            client.expected.clear()  # half a request is none
            client.book.resets += 1
        client.book.sent += len(client.expected)
        assert read_to_end(client.sock) == bytes(client.expected)
        self.leave(client)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT)
    def close(self, number: int) -> None:
        client = self.pick(number)
        self.finish(client)
        # The session tickets of TLS 1.3 have come, and a close with input unread is a reset.
        client.book.resets += client.silent and not client.is_plain
        self.leave(client)

    @precondition(lambda self: self.clients)
    @rule(number=CLIENT)
    def reset(self, number: int) -> None:
        client = self.pick(number)
        client.book.resets += 1
        if client.stalled:
            client.book.sent_is_exact = False
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.leave(client)

    # -- the operator ------------------------------------------------------------------------------------------------

    @rule(size=st.integers(1, 20))
    def resize(self, size: int) -> None:
        self.pool.resize(size)
        self.make_room(beside=0)

    @rule(tls=st.booleans())
    def stop(self, tls: bool) -> None:
        book = self.books[tls]
        clients = [client for client in self.clients if client.book is book]
        idle_closed = len([client for client in clients if not client.busy])
        stopping = gevent.spawn(book.server.stop, None, patient=True)
        wait_until(book.server.listening_ended.is_set)
        for client in clients:
            if client.silent:  # its first request is served, however late
                asked, answer = request_of(100, 100)
                client.expected += answer
                self.send(client, asked)
            self.finish(client)
            assert client.sock.recv(1) == b""
            client.sock.close()
            self.clients.remove(client)
        report = stopping.get(timeout=SOON)
        assert (report.finished, report.ended) == (len(clients), 0)
        # Those that were busy have become idle once they were served, and were closed then.
        assert book.server.stats().idle_closed == len(clients) >= idle_closed
        self.balance(book)
        self.books[tls] = self.open_book(tls)

    @rule(tls=st.booleans())
    def halt(self, tls: bool) -> None:
        book = self.books[tls]
        clients = [client for client in self.clients if client.book is book]
        report = book.server.halt()
        assert report.finished + report.ended == len(clients)
        assert report.ended <= sum(client.busy for client in clients)
        for client in clients:
            client.sock.close()
            self.clients.remove(client)
        book.sent_is_exact = False
        self.balance(book)
        self.books[tls] = self.open_book(tls)

    # -- the books ---------------------------------------------------------------------------------------------------

    @invariant()
    def every_book_balances(self) -> None:
        for book in self.books:
            self.balance(book)
        busy = sum(client.busy for client in self.clients)
        settle(lambda: {"taken": self.pool.places.taken}, {"taken": busy})
        assert len(self.pool.greenlets) == len(self.clients)

    def balance(self, book: Book) -> None:
        server = book.server
        clients = [client for client in self.clients if client.book is book]
        expected = {
            "accepted": book.accepted,
            "active": len(clients),
            "idle": sum(not client.busy for client in clients),
            "lingering": 0,
            "received": book.received,
            "resets": book.resets,
            "others": 0,
            "sent": book.sent if book.sent_is_exact else None,
        }

        def found() -> dict[str, int | None]:
            stats = server.stats()
            return {
                "accepted": stats.accepted,
                "active": stats.active,
                "idle": stats.idle,
                "lingering": stats.lingering,
                "received": stats.bytes_received,
                "resets": stats.resets,
                "others": stats.handler_errors + stats.timeouts + stats.limits_exceeded + stats.left_in_queue,
                # What a client that does not read has been sent so far depends on the kernel's buffers.
                "sent": stats.bytes_sent if book.sent_is_exact and not any(c.stalled for c in clients) else None,
            }

        if any(client.stalled for client in clients):
            expected["sent"] = None
        settle(found, expected)

    def teardown(self) -> None:
        for client in self.clients:
            client.sock.close()
        for book in self.books:
            book.server.stop(SOON)
        assert self.pool.places.taken == 0
        assert not self.pool.greenlets
        settle(open_sockets, self.sockets)

    # -- helpers of the rules ----------------------------------------------------------------------------------------

    def pick(self, number: int) -> Client:
        return self.clients[number % len(self.clients)]

    def make_room(self, beside: int = 1) -> None:
        """Give the pool a place for what comes: to wait until another client reads would be no fault."""
        least = sum(client.busy for client in self.clients) + beside
        if self.pool.size < max(1, least):
            self.pool.resize(max(1, least))

    def send(self, client: Client, data: bytes) -> None:
        client.silent = False
        client.book.received += len(data)
        client.sock.sendall(data)

    def finish(self, client: Client) -> None:
        if client.unsent:
            self.send(client, client.unsent)
            client.unsent = b""
        self.read(client)
        client.stalled = False

    def read(self, client: Client) -> None:
        answer = read_exactly(client.sock, len(client.expected))
        assert answer == client.expected
        client.book.sent += len(answer)
        client.expected.clear()

    def leave(self, client: Client) -> None:
        client.sock.close()
        self.clients.remove(client)


def read_exactly(sock: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"the server closed after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def read_to_end(sock: Any) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def open_sockets() -> int:
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return count


def settle(found: Callable[[], T], expected: T) -> None:
    """Wait until it is as expected; then, or when that has not come, compare."""
    give_up = monotonic() + SOON
    while (now := found()) != expected and monotonic() < give_up:
        gevent.sleep(0.002)
    assert now == expected, f"{now} is not {expected}"


@pytest.mark.slow
def test_whatever_clients_and_operators_do_the_books_of_a_server_balance() -> None:
    get_hub()  # its own descriptors are no leak
    run_state_machine_as_test(Machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=30))
