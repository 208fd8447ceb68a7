"""Loops of intercepted connections: ours that the firewall sends back to us, and proxies that lead through each other.

An intercepted connection says nothing but its two addresses, so there is no count of hops in it. Two things are known:

- The client's address is that of a connection that we have made ourselves. This is certain, and found by the worker
  that has made it: with several workers, after some turns.
- In a loop of several proxies, or behind address translation, each turn is one more connection from the same client to
  the same destination that nobody answers, since there is nobody at its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from gtcpserver.connection.connection import Connection
from gtcpserver.networks import as_ip

from .errors import Cut
from .target import IPAddress

#: The last connections of a client to one destination that all are open, unanswered and young, until another one is
#: refused: of an office behind one address, dozens may connect at the same moment, and are answered soon.
MOST_UNANSWERED = 64

#: Seconds that they are young. A loop whose client is silent makes a turn with each `name_timeout` (0.5 s).
YOUNG = 60.0

_Address = tuple[IPAddress, int]


class Loops:
    """Finds loops among the intercepted connections of one process."""

    def __init__(self) -> None:
        self._clients: set[_Address] = set()
        self._ours: set[_Address] = set()
        self._last: dict[tuple[IPAddress, _Address], deque[tuple[Connection, float]]] = {}

    @contextmanager
    def entered(self, client: _Address, destination: _Address) -> Iterator[None]:
        """Look at a client, and note it for the block. Raise Cut: it is a loop."""
        if client in self._ours:
            raise Cut("loop", "it is this proxy's own connection")
        last = self._last.get((client[0], destination), ())
        if len(last) >= MOST_UNANSWERED:
            since = monotonic() - YOUNG
            if all(at > since and not upstream.bytes_received for upstream, at in last):
                raise Cut("loop", f"{MOST_UNANSWERED} connections of this client to it, and none is answered")
        self._clients.add(client)
        try:
            yield
        finally:
            self._clients.discard(client)

    @contextmanager
    def opened(self, client: _Address, destination: _Address, upstream: Connection) -> Iterator[None]:
        """Look at the connection that was made for a client, and note it for the block. Raise Cut: it is a loop."""
        here = upstream.stream.sock.getsockname()
        ours = (as_ip(here[0]), here[1]) if isinstance(here, tuple) else None  # a Unix socket's
        if ours in self._clients:  # accepted before it was noted
            raise Cut("loop", "it leads back to this proxy")
        key, entry = (client[0], destination), (upstream, monotonic())
        last = self._last.setdefault(key, deque(maxlen=MOST_UNANSWERED))
        last.append(entry)
        if ours is not None:
            self._ours.add(ours)
        try:
            yield
        finally:
            if ours is not None:
                self._ours.discard(ours)
            if entry in last:
                last.remove(entry)
            if not last:
                self._last.pop(key, None)
