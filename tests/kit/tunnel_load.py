"""Tunnels in use for a long time: idle, half-closed, and at full speed. Each byte is checked by a checksum."""

from __future__ import annotations

import hashlib
import random
import selectors
import socket
import threading
import time
from typing import Literal

from kit.worker_tunnels import Tunnel, read

Kind = Literal["idle", "half-closed", "full speed"]

#: Of so many tunnels, one is at full speed; of the others, half are half-closed.
ONE_FAST_OF = 25

#: Seconds between two pieces of a half-closed tunnel.
PAUSE = 1.0

PIECE = 64 * 1024


def kind_of(number: int) -> Kind:
    if number % ONE_FAST_OF == 0:
        return "full speed"
    return "half-closed" if number // 2 % 2 else "idle"


class TunnelError(Exception):
    """A tunnel has lost or changed bytes, or has ended."""


class Used:
    """A tunnel in use.

    Attributes:
        source, sink: bytes go from one to the other, in some tunnels from the client, in others to it.
        bytes: number of those that have arrived.
    """

    def __init__(self, number: int, tunnel: Tunnel) -> None:
        self.kind = kind_of(number)
        self.tunnel = tunnel
        self.source, self.sink = (tunnel.client, tunnel.far)[:: 1 if number // 4 % 2 else -1]
        self._sent, self._got = hashlib.sha256(), hashlib.sha256()
        self.bytes = 0
        if self.kind == "half-closed":
            self.sink.shutdown(socket.SHUT_WR)
            if self.source.recv(1):
                raise TunnelError("bytes before the end of one side")

    def send(self, piece: memoryview) -> None:
        self._sent.update(piece[: self.source.send(piece)])

    def receive(self) -> bool:
        """Read some; return False at the end.

        Raises:
            TunnelError: an idle tunnel has bytes, or an end.
        """
        piece = self.sink.recv(1 << 20)
        if self.kind == "idle":
            raise TunnelError(f"an idle tunnel has {piece[:100]!r}")
        self._got.update(piece)
        self.bytes += len(piece)
        return bool(piece)

    def end(self) -> None:
        """End it in order.

        Raises:
            TunnelError, OSError: what has arrived is not what was sent.
        """
        self.source.setblocking(True)
        self.sink.setblocking(True)
        if self.kind == "idle" and not self.tunnel.talks():
            raise TunnelError("an idle tunnel does not carry what is said")
        self.source.shutdown(socket.SHUT_WR)
        if self.kind == "idle":
            if read(self.sink, 1):
                raise TunnelError("bytes behind the last")
        else:
            while self.receive():
                pass
        if self._sent.digest() != self._got.digest():
            raise TunnelError(f"{self.kind}: wrong checksum after {self.bytes} bytes")


class TunnelLoad(threading.Thread):
    """Uses tunnels until the end.

    Args:
        tunnels: in groups of any ways to make them; each group has all kinds.
        rest: seconds after each round, if full speed need not be that fast.

    Attributes:
        failure: what went wrong; None: nothing.
    """

    def __init__(self, *tunnels: list[Tunnel], rest: float = 0.0) -> None:
        super().__init__()
        self._rest = rest
        self.tunnels = [Used(number, one) for group in tunnels for number, one in enumerate(group)]
        self.fast = [one for one in self.tunnels if one.kind == "full speed"]
        self._slow = [one for one in self.tunnels if one.kind == "half-closed"]
        self._pieces = memoryview(random.randbytes(1 << 20))
        self._end = threading.Event()
        self.failure: Exception | None = None

    def piece(self, size: int) -> memoryview:
        begin = random.randrange(len(self._pieces) - size)
        return self._pieces[begin : begin + size]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.tunnels)

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._register(selector)
                self._use(selector)
            for one in self.tunnels:
                one.end()
        except (OSError, TunnelError) as error:
            self.failure = error

    def _register(self, selector: selectors.BaseSelector) -> None:
        for one in self.tunnels:
            for sock in (one.source, one.sink):
                sock.setblocking(False)
            selector.register(one.sink, selectors.EVENT_READ, one)
            if one.kind == "full speed":
                selector.register(one.source, selectors.EVENT_WRITE, one)

    def _use(self, selector: selectors.BaseSelector) -> None:
        due = 0.0
        while not self._end.is_set():
            if time.monotonic() >= due:
                due = time.monotonic() + PAUSE
                for one in self._slow:
                    one.send(self.piece(100))
            for key, events in selector.select(0.05):
                if events & selectors.EVENT_WRITE:
                    key.data.send(self.piece(PIECE))
                elif not key.data.receive():
                    raise TunnelError(f"{key.data.kind}: an end")
            time.sleep(self._rest)

    def end(self) -> None:
        self._end.set()
        self.join()
