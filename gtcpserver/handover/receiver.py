"""Receiver: the new worker's side of a line, as a state machine. No I/O.

offer --> HELD -- go --> GOING -- serving is sent --> begins
   |        |
   refused  withdrawn, end of the line --> dropped
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from . import messages
from .messages import Packet


class Coming(Protocol):
    """A connection that comes. It ends by `begin`, or by `drop`."""

    def begin(self) -> None:
        """Begin its handler. Raises nothing."""

    def drop(self) -> None:
        """Close only the descriptor, without a word to the peer. Raises nothing."""


#: Makes a connection of a state and a descriptor, which it owns from then on. Returns the reason instead if it cannot;
#: raises nothing, since other descriptors may have come with this one.
Take = Callable[[Mapping[str, Any], int], Coming | str]


class Receiver:
    """What was offered on one line.

    Args:
        send: sends a packet; returns False, and sends nothing, if there is no room now.
        take: takes a connection over.
        close: closes a descriptor.
    """

    def __init__(self, send: Callable[[bytes, list[int]], bool], take: Take, close: Callable[[int], Any]) -> None:
        self._send = send
        self._take = take
        self._close = close
        self._held: dict[int, Coming] = {}
        self._ready: list[int] = []
        self._refused: list[tuple[int, str]] = []
        self._serving: list[tuple[int, Coming]] = []  # not said yet

    def __len__(self) -> int:
        """Return the number of connections that are held."""
        return len(self._held)

    def hear(self, packet: Packet, fds: Sequence[int]) -> None:
        """Handle a packet of the old worker, and the descriptors that have come with it, all of which it owns."""
        self._hear_offers(packet, list(fds))
        for number in packet.withdrawn:
            dropped = self._held.pop(number, None)
            if dropped is not None:
                dropped.drop()
        for number in packet.go:
            coming = self._held.pop(number, None)
            if coming is not None:
                self._serving.append((number, coming))
        self.flush()

    def _hear_offers(self, packet: Packet, fds: list[int]) -> None:
        fds.reverse()
        for number, state in packet.offer:
            if not fds:
                self._refused.append((number, "descriptors"))  # this process had none left for it
            elif packet.version != messages.VERSION:
                self._close(fds.pop())
                self._refused.append((number, "version"))
            elif number in self._held:  # not by an honest worker; the one that is held must not be forgotten
                self._close(fds.pop())
                self._refused.append((number, "state"))
            else:
                found = self._take(state, fds.pop())
                if isinstance(found, str):
                    self._refused.append((number, found))
                else:
                    self._held[number] = found
                    self._ready.append(number)
        for fd in fds:
            self._close(fd)

    def flush(self) -> bool:
        """Send what waits; return False if some still has to wait.

        A handler begins only once "serving" is sent: from then on the old worker will never serve the connection, even
        if this one dies before it has answered what was read ahead.
        """
        if not (self._ready or self._refused or self._serving):
            return True
        numbers = [number for number, _ in self._serving]
        if not self._send(messages.encode(ready=self._ready, refused=self._refused, serving=numbers), []):
            return False
        self._ready, self._refused = [], []
        self._begin()
        return True

    def _begin(self) -> None:
        serving, self._serving = self._serving, []
        for _, coming in serving:
            coming.begin()

    def end(self) -> None:
        """The old worker is dead, or needs this line no more."""
        held, self._held = self._held, {}
        for one in held.values():
            one.drop()
        self._begin()  # what it gave away, and nobody else has
