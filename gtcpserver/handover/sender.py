"""Sender: the old worker's side of a line, as a state machine. No I/O and no clock of its own.

offer() -> OFFERED -- ready --> GONE -- serving --> arrived
              |                   |
              refused,            end of the line --> returned
              time, a touch,
              end of the line --> stays
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any, Protocol

from . import messages
from .messages import Packet

#: Seconds until an offer is withdrawn that the new worker has not answered: its client may have asked meanwhile. A loop
#: that lags takes no further offers for as long.
OFFER_SECONDS = 1.0

#: Most connections that are offered or gone at once on one line: their descriptors are in flight, of which a user may
#: have RLIMIT_NOFILE (unix(7), ETOOMANYREFS), and their clients wait.
MOST_UNDER_WAY = 128

#: Reasons of the new worker that concern every connection, and seconds until it is asked again.
PAUSING = {"full": 1.0, "descriptors": 1.0, "stopping": inf, "version": inf}

#: Reasons to stay: what the program has put into the session is no JSON value (an explanation follows), or too much.
UNWRITABLE, LARGE = "session", "session too large"


class Leaving(Protocol):
    """A connection that leaves. Each ends by one of `stays`, `arrived` and `returned`; none of them raises."""

    @property
    def state(self) -> Mapping[str, Any]:
        """Its state, values of JSON as far as the program did its part."""

    def descriptors(self) -> list[int]:
        """Return its descriptors, as many as its state says (`messages.count_of`)."""

    def give_away(self) -> bool:
        """Give it up for its handler here; return False if it no longer waits, and stays."""

    def tell(self) -> None:
        """Tell its handler that it has moved. Called once "go" is under way."""

    def stays(self, why: str) -> None:
        """Go on here, as if nothing had happened: it was not given away."""

    def arrived(self) -> None:
        """Close the descriptors: another worker serves it."""

    def returned(self) -> None:
        """Serve it here again: it was given away, and nobody has it."""


class Sender:
    """The offers of one line.

    Args:
        send: sends a packet with descriptors; returns False, and sends nothing, if there is no room now.
        now: returns the seconds of a clock.
    """

    def __init__(self, send: Callable[[bytes, list[int]], bool], now: Callable[[], float]) -> None:
        self._send = send
        self._now = now
        self._next = 0
        self._offered: dict[int, tuple[Leaving, float]] = {}
        self._gone: dict[int, Leaving] = {}
        self._unsent: list[int] = []  # of _offered
        self._go: list[int] = []
        self._withdrawn: list[int] = []
        self._untold: list[Leaving] = []  # given away
        self.ended = False
        self.paused_until = 0.0

    def __len__(self) -> int:
        """Return the number of connections under way."""
        return len(self._offered) + len(self._gone)

    def room(self) -> int:
        """Return the number of connections that may be offered now."""
        if self.ended or self._unsent or self._now() < self.paused_until:
            return 0
        return max(0, min(messages.MAX_OFFERS, MOST_UNDER_WAY - len(self)))

    def is_useless(self) -> bool:
        """Return whether the new worker takes nothing any more, and nothing is under way."""
        return self.paused_until == inf and not len(self)

    def offer(self, leaving: Iterable[Leaving]) -> list[int]:
        """Offer frozen connections, at most `room` of them; return their numbers."""
        until = self._now() + OFFER_SECONDS
        numbers = []
        for one in leaving:
            number = self._next
            self._next += 1
            self._offered[number] = (one, until)
            numbers.append(number)
        self._unsent += numbers
        self.flush()
        return numbers

    def withdraw(self, number: int) -> None:
        """Withdraw an offer whose connection goes on here already; do nothing if it is none any more."""
        if self._offered.pop(number, None) is not None:
            self._forget(number)

    def flush(self) -> bool:
        """Send what waits; return False if some still has to wait."""
        while not self.ended:
            if self._go or self._withdrawn:
                if not self._send(messages.encode(go=self._go, withdrawn=self._withdrawn), []):
                    return False
                self._go, self._withdrawn = [], []
            elif self._unsent:
                if not self._send_offers():
                    return False
            else:
                return True
        return True

    def _send_offers(self) -> bool:
        numbers = self._unsent[: messages.MAX_OFFERS]
        try:
            # All at once: a third of the time.
            data = messages.encode_offers([(number, self._offered[number][0].state) for number in numbers])
        except (TypeError, ValueError, RecursionError):
            data = b""
        if not 0 < len(data) <= messages.MAX_STATE:
            data, numbers = self._encode_some(numbers)
        if numbers:
            fds = [fd for number in numbers for fd in self._offered[number][0].descriptors()]
            if not self._send(data, fds):
                return False
        self._unsent = [number for number in self._unsent if number not in numbers]
        return True

    def _encode_some(self, numbers: list[int]) -> tuple[bytes, list[int]]:
        """Encode the first of these, as many as fit into a packet. Those that cannot be written stay."""
        good: list[tuple[int, Mapping[str, Any]]] = []
        size = 0
        for number in numbers:
            one = self._offered[number][0]
            try:
                own = len(messages.encode_offers([(number, one.state)]))
                why = LARGE if own > messages.MAX_STATE else ""
            except (TypeError, ValueError, RecursionError) as error:
                why = f"{UNWRITABLE}: {error}"
            if why:
                self._unsent.remove(number)
                del self._offered[number]
                one.stays(why)
            elif size + own > messages.MAX_BYTES:
                break
            else:
                size += own
                good.append((number, one.state))
        return messages.encode_offers(good), [number for number, _ in good]

    def hear(self, packet: Packet) -> None:
        """Handle a packet of the new worker. After a MemoryError, it is to be called again with the same packet."""
        for number, why in packet.refused:
            entry = self._answered(number)
            if why in PAUSING:
                self.paused_until = self._now() + PAUSING[why]
            if entry is not None:
                entry[0].stays(why)
        for number in packet.ready:
            self._hear_ready(number)
        for number in packet.serving:
            arrived = self._gone.pop(number, None)
            if arrived is not None:
                arrived.arrived()
        self.flush()
        while self._untold:
            self._untold[0].tell()
            del self._untold[0]

    def _hear_ready(self, number: int) -> None:
        """Give a connection away, if it still waits. If it was withdrawn meanwhile, the new worker hears so."""
        if number in self._unsent or number not in self._offered:
            return
        one = self._offered[number][0]
        # What needs memory comes first: a connection that was given away, and then forgotten, would be nobody's.
        go, withdrawn, untold = [*self._go, number], [*self._withdrawn, number], [*self._untold, one]
        self._gone[number] = one
        del self._offered[number]
        if one.give_away():
            self._go, self._untold = go, untold
        else:
            del self._gone[number]
            self._withdrawn = withdrawn
            one.stays("busy")

    def _answered(self, number: int) -> tuple[Leaving, float] | None:
        # A worker that was taken over may answer what was not sent yet: the offer must not end before it.
        return None if number in self._unsent else self._offered.pop(number, None)

    def look(self) -> None:
        """Withdraw the offers that were not answered in time. Call a few times a second."""
        now = self._now()
        for number, (one, until) in list(self._offered.items()):
            if until > now:
                break  # the others are later
            del self._offered[number]
            self._forget(number)
            self.paused_until = now + OFFER_SECONDS
            one.stays("time")
        self.flush()

    def _forget(self, number: int) -> None:
        if number in self._unsent:
            self._unsent.remove(number)
        else:
            self._withdrawn.append(number)

    def withdraw_all(self, why: str) -> None:
        """Withdraw all offers; those that were given away go on."""
        offered, self._offered = self._offered, {}
        for number, (one, _) in offered.items():
            self._forget(number)
            one.stays(why)
        self.flush()

    def end(self) -> None:
        """The new worker is dead: nobody has what it did not report. After a MemoryError, it is called again."""
        self.ended = True
        while self._offered:
            self._offered.popitem()[1][0].stays("gone")
        while self._gone:
            self._gone.popitem()[1].returned()
