"""What is measured without wrk: memory of idle connections, the first byte beside them, a crowd at the start."""

from __future__ import annotations

import random
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .answers import REQUEST, answer_of
from .measure import BenchError, Listening, allow_descriptors, memory_kib
from .results import Figures


def kind(which: str, quick: bool) -> tuple[Figures, Callable[[Listening], list[float]]]:
    """One of scenarios.OTHERS: an empty table, and what finds the figures of a server for it."""
    if which == "idle":
        # In whole hundreds of what the descriptors are enough for.
        count = 500 if quick else min(10_000, (allow_descriptors() - 100) // 100 * 100)
        title = f"Memory of {count:,} idle keep-alive connections"
        return Figures(title, ["KiB each"]), lambda server: [idle_memory(server, count)]
    if which == "first-byte":
        beside, times = (100, 200) if quick else (1000, 2000)
        title = f"First byte of {times:,} new connections, one after another, beside {beside:,} idle ones"
        columns = ["p50 ms", "p99 ms", "longest ms"]

        def first_byte(server: Listening) -> list[float]:
            found = first_bytes(server, beside, times)
            return [found[len(found) // 2], found[len(found) * 99 // 100], found[-1]]

        return Figures(title, columns), first_byte
    number = 200 if quick else 3000
    title = f"{number:,} clients at once, just after the start"
    return Figures(title, ["connections answered/s"], more_is_better=True), lambda server: [crowd(server, number)]


def idle_memory(server: Listening, connections: int) -> float:
    """KiB of server memory for each of many idle keep-alive connections which were served one request."""
    answer_of(server)
    time.sleep(0.5)
    before = memory_kib(server.pid)
    with idle_connections(server, connections):
        time.sleep(0.5)
        return (memory_kib(server.pid) - before) / connections


@contextmanager
def idle_connections(server: Listening, connections: int) -> Iterator[None]:
    """So many keep-alive connections that have been served one request."""
    limit = allow_descriptors()
    if limit < connections + 100:
        raise BenchError(
            f"{connections} connections need {connections + 100} descriptors, the limit is {limit}: ulimit -n"
        )
    socks = []
    try:
        for number in range(connections):
            socks.append(_connect(server, number))
        for sock in socks:
            sock.sendall(REQUEST)
        for sock in socks:
            if not sock.recv(65536):
                raise BenchError("the server closed an idle connection")
        yield
    finally:
        for sock in socks:
            sock.close()


def _connect(server: Listening, number: int) -> socket.socket:
    sock = socket.socket()
    # Many source addresses: ports that were used a minute ago are still in TIME-WAIT.
    sock.bind((f"127.0.{random.randrange(256)}.{2 + number % 250}", 0))
    sock.connect((server.host, server.port))
    return sock


def first_bytes(server: Listening, beside: int, times: int) -> list[float]:
    """Milliseconds until the first byte of an answer came, each on a new connection, beside so many idle ones."""
    found = []
    with idle_connections(server, beside):
        for number in range(times):
            began = time.perf_counter()
            with _connect(server, number) as sock:
                sock.sendall(REQUEST)
                if not sock.recv(1):
                    raise BenchError("the server closed without an answer")
                found.append((time.perf_counter() - began) * 1000)
    return sorted(found)


def crowd(server: Listening, number: int) -> float:
    """Connections a second of a crowd that comes all at once to a server that has just started, up to the answers."""
    allow_descriptors()
    socks = [socket.socket() for _ in range(number)]
    try:
        began = time.perf_counter()
        for place, sock in enumerate(socks):
            sock.bind((f"127.0.{random.randrange(256)}.{2 + place % 250}", 0))
            sock.setblocking(False)
            sock.connect_ex((server.host, server.port))
        left = set(socks)
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                selector.register(sock, selectors.EVENT_WRITE)
            while left:
                ready = selector.select(20)
                if not ready:
                    raise BenchError(f"{len(left)} of {number} connections were not answered in 20 seconds")
                for key, events in ready:
                    sock = key.fileobj  # type: ignore[assignment]
                    if events & selectors.EVENT_WRITE:
                        sock.send(REQUEST)
                        selector.modify(sock, selectors.EVENT_READ)
                    else:
                        if not sock.recv(65536):
                            raise BenchError("the server closed without an answer")
                        selector.unregister(sock)
                        left.discard(sock)
        return number / (time.perf_counter() - began)
    finally:
        for sock in socks:
            sock.close()
