"""Tunnels through a forwarder: idle ones, and one at full speed, which is timed."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable

from ..local_servers import LocalServers
from .clients import PATIENCE, ClientError, need_descriptors
from .service import Service

#: Seconds of full speed before and after a move.
SECONDS = 1.5

PIECE = 1 << 20


class Tunnel:
    """Both far ends of a tunnel."""

    def __init__(self, address: tuple[str, int], destination: socket.socket) -> None:
        self.client = socket.create_connection(address, PATIENCE)
        self.far = destination.accept()[0]
        self.far.settimeout(PATIENCE)

    def check(self, number: int) -> None:
        """Say something at each end.

        Raises:
            ClientError: the other one does not hear it.
        """
        for source, sink in ((self.client, self.far), (self.far, self.client)):
            said = b"tunnel %d\n" % number
            source.sendall(said)
            if (heard := sink.recv(1000)) != said:
                raise ClientError(f"tunnel {number}: {heard!r}")

    def close(self) -> None:
        self.client.close()
        self.far.close()


class Bulk:
    """Sends through a tunnel as fast as it can.

    Args:
        rest: seconds after each piece, where it need not be that fast.

    Attributes:
        bytes: number of those that have arrived.
        longest: seconds between two arrivals, at most, since it was set to 0.
    """

    def __init__(self, tunnel: Tunnel, rest: float = 0.0) -> None:
        self._rest = rest
        self._tunnel = tunnel
        self._ends = threading.Event()
        self._sent, self._got = hashlib.sha256(), hashlib.sha256()
        self._error: Exception | None = None
        self.bytes = 0
        self.longest = 0.0
        self._threads = [threading.Thread(target=self._guarded, args=(one,)) for one in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except OSError as error:
            self._error = error
            self._tunnel.client.close()

    def _send(self) -> None:
        piece = os.urandom(PIECE)
        while not self._ends.is_set():
            self._tunnel.client.sendall(piece)
            self._sent.update(piece)
            time.sleep(self._rest)
        self._tunnel.client.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        at = time.monotonic()
        while piece := self._tunnel.far.recv(PIECE):
            now = time.monotonic()
            self.longest, at = max(self.longest, now - at), now
            self._got.update(piece)
            self.bytes += len(piece)

    def rate(self) -> float:
        """Return its bytes a second in the next SECONDS."""
        began, before = time.monotonic(), self.bytes
        time.sleep(SECONDS)
        return (self.bytes - before) / (time.monotonic() - began)

    def end(self) -> None:
        """End it.

        Raises:
            ClientError: bytes were lost or changed.
        """
        self._ends.set()
        for thread in self._threads:
            thread.join()
        if self._error is not None or self._sent.digest() != self._got.digest():
            raise ClientError(f"the tunnel at full speed: {self._error or 'wrong checksum'}")


def measure(servers: LocalServers, count: int, bulk_rest: float) -> dict[str, float]:
    """Move so many idle tunnels, then all of them with one at full speed; return the figures.

    Raises:
        ClientError: bytes are lost or changed, or a tunnel did not move.
    """
    need_descriptors(2 * count)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as destination:
        destination.settimeout(PATIENCE)
        target = f"127.0.0.1:{destination.getsockname()[1]}"
        service = Service(servers, "forward", "127.0.0.1:0", target)
        tunnels = [Tunnel(service.address, destination) for _ in range(count)]
        try:
            idle = _reload(service, tunnels)
            bulk = Bulk(tunnels[0], bulk_rest)
            try:
                before = bulk.rate()
                usual, bulk.longest = bulk.longest, 0.0
                service.reload()
                pause = bulk.longest
                after = bulk.rate()
            finally:
                bulk.end()
            for number, one in enumerate(tunnels[1:]):
                one.check(number)
        finally:
            for one in tunnels:
                one.close()
    return {
        "tunnels_wall_seconds": idle["wall_seconds"],
        "tunnel_cpu_old_us": idle["cpu_old_seconds"] / count * 1e6,
        "tunnel_cpu_new_us": idle["cpu_new_seconds"] / count * 1e6,
        "bulk_longest_wait": usual,
        "bulk_pause": pause,
        "bulk_rate": before,
        "bulk_rate_after": after,
    }


def _reload(service: Service, tunnels: list[Tunnel]) -> dict[str, float]:
    for number, one in enumerate(tunnels):
        one.check(number)
    figures = service.reload()
    if figures["moved"] != len(tunnels):
        raise ClientError(f"{figures['moved']} of {len(tunnels)} tunnels moved")
    for number, one in enumerate(tunnels):
        one.check(number)
    return figures
