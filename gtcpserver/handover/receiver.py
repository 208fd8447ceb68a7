"""Receiver: the new worker's side of a line, as a state machine. No I/O.

offer --> HELD -- go --> GOING -- serving is sent --> begins
   |        |
   refused  withdrawn, end of the line --> dropped
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from . import messages
from .messages import Packet


class Coming(Protocol):
    """A connection that comes. It ends by `begin`, or by `drop`."""

    def begin(self) -> None:
        """Begin its handler. Raises nothing."""

    def drop(self) -> None:
        """Close only the descriptors, without a word to the peer. Raises nothing."""


#: Most that a line may hold, or leave unsaid: twice of what an honest worker has under way (sender.py).
MOST_HELD = 256

#: Makes a connection of a state and its descriptors, which it owns from then on. Returns the reason instead if it
#: cannot; raises nothing, since other descriptors may have come with these.
Take = Callable[[Mapping[str, Any], list[int]], Coming | str]


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

    def hear(self, packet: Packet, fds: list[int]) -> None:
        """Handle a packet of the old worker.

        After a MemoryError, it is to be called again with the same packet: what was done is not done twice.

        Args:
            fds: the descriptors that have come with it, all of which are taken out and owned.
        """
        try:
            self._hear_outcomes(packet)
            self._hear_offers(packet, fds)
        finally:
            while fds:
                self._close(fds.pop())
        self.flush()

    def _hear_outcomes(self, packet: Packet) -> None:
        for number in packet.withdrawn:
            dropped = self._held.pop(number, None)
            if dropped is not None:
                dropped.drop()
        going = {number: self._held[number] for number in packet.go if number in self._held}
        self._serving += list(going.items())  # all or none: a "go" that is lost leaves its connection to nobody
        for number in going:
            del self._held[number]

    def _hear_offers(self, packet: Packet, fds: list[int]) -> None:
        for number, state in packet.offer:
            if number in self._held and not fds:
                continue  # heard before, and memory ran out behind it
            count = messages.count_of(state)
            own = fds[:count]
            del fds[:count]
            why = self._why_not(number, packet.version, len(own) < count)
            if not why:
                self._hear_offer(number, state, own)
                continue
            while own:
                self._close(own.pop())
            self._refuse(number, why)

    def _hear_offer(self, number: int, state: Mapping[str, Any], fds: list[int]) -> None:
        found = self._take(state, fds)
        if isinstance(found, str):
            self._refuse(number, found)
            return
        try:
            self._held[number] = found
        except MemoryError:
            found.drop()
            raise
        self._ready.append(number)  # last: one that was not said to be ready is withdrawn

    def _refuse(self, number: int, why: str) -> None:
        if len(self._refused) < MOST_HELD:  # the old worker withdraws what is not answered
            self._refused.append((number, why))

    def _why_not(self, number: int, version: int, incomplete: bool) -> str:
        if incomplete:
            return "descriptors"  # this process had none left for it
        if version != messages.VERSION:
            return "version"
        # Not by an honest worker; the one that is held must not be forgotten.
        if number in self._held:
            return "state"
        return "full" if len(self._held) >= MOST_HELD else ""

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
        while self._serving:
            self._serving[0][1].begin()
            del self._serving[0]

    def end(self) -> None:
        """The old worker is dead, or needs this line no more."""
        while self._held:
            self._held.popitem()[1].drop()
        self._begin()  # what it gave away, and nobody else has
