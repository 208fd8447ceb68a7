"""Column: what one process counts, and what all of them have counted together.

An entry stands for a client (or a user, or an address with wrong passwords) in one column. Its words:

| word | is |
| --- | --- |
| SEEN | when its process saw the client last; nanoseconds of the monotonic clock, which all processes share |
| OPEN | connections that its process has open, and in the upper half the epoch of the column in which it had them |
| START, SPENT | what its process has counted since START, the beginning of a busy time of the client |

A column has WAYS entries in each set. Where all are taken, the client that was seen longest ago goes, one without open
connections first: its process still knows its own count.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import Struct
from time import monotonic_ns as now

from .memory import CLAIMED, KEY_BYTES, WAYS, WORDS, SharedMemory

__all__ = ["Column", "Found", "now"]

SEEN, OPEN, START, SPENT = range(WORDS)

#: Largest count. More is damage, which must not grow until it is no word of 8 bytes any more: storing that would fail
#: for each connection of the client, in all later processes.
MOST_SPENT = 2**48

_COUNT = 2**32 - 1

#: Of a digest: the tag, and a number for the set.
_split = Struct("=qI4x").unpack

#: Clients whose digests are remembered: to compute one takes 0.6 us.
MOST_DIGESTS = 4096

#: The entries of one client: its tag; the index of its set's first entry among all entries; the index of the first word
#: of the entry in this process's column, -1 if there is none; the same of those in other columns; and the connections
#: that other processes have open. A plain tuple: a named one costs a connection 0.3 us.
Found = tuple[int, int, int, list[int], int]


class Column:
    """The column of this process.

    Args:
        memory: the memory of the service.
        number: the column, as claimed.

    Attributes:
        take_turn, end_turn: as of the memory.
        digests: what was computed of the clients seen lately, at most MOST_DIGESTS.
    """

    def __init__(self, memory: SharedMemory, number: int) -> None:
        self._memory = memory
        self.take_turn, self.end_turn = memory.take_turn, memory.end_turn
        self._number = number
        self._data = memory.data
        self._words = memory.words
        self._key = memory.data[memory.key_at : memory.key_at + KEY_BYTES]
        self._epochs_at = memory.epochs_at
        self._stamp = memory.words[memory.epochs_at + number] << 32
        self._columns = memory.columns
        self._row = memory.columns * WAYS
        self._tags_at = memory.tags_at
        self._entries_at = memory.entries_at
        self._mask = memory.sets - 1
        self.digests: dict[bytes, tuple[int, int, int, bytes]] = {}

    # -- entries -----------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> Found:
        """Return the entries of a client. 1.5 us with four workers."""
        tag, first, begin, tag_bytes = self.digests.get(key) or self._digest(key)
        claimed = self._words[CLAIMED]
        end = begin + 8 * WAYS * (claimed if 0 <= claimed <= self._columns else self._columns)
        own, others, elsewhere = -1, [], 0
        find = self._data.find
        at = find(tag_bytes, begin, end)
        while at >= 0:
            if at & 7:  # the end of one tag and the beginning of the next
                at = find(tag_bytes, at + 1, end)
                continue
            place = (at - begin) >> 3
            entry = self._entries_at + (first + place) * WORDS
            column = place // WAYS
            if column == self._number:
                own = entry
            else:
                others.append(entry)
                value = self._words[entry + OPEN]
                if value and value >> 32 == self._words[self._epochs_at + column]:
                    elsewhere += value & _COUNT
            at = find(tag_bytes, at + 8, end)
        return tag, first, own, others, elsewhere

    def _digest(self, key: bytes) -> tuple[int, int, int, bytes]:
        digest = blake2b(key, digest_size=16, key=self._key).digest()
        tag, number = _split(digest)
        first = (number & self._mask) * self._row
        begin = 8 * (self._tags_at + first)
        if len(self.digests) >= MOST_DIGESTS:
            self.digests.clear()
        known = self.digests[key] = tag, first, begin, digest[:8]
        return known

    def take(self, found: Found, seen: int) -> int:
        """Return this process's entry of a client, which was just seen; make one if there is none."""
        words = self._words
        tag, first, own, _, _ = found
        if own >= 0:
            words[own + SEEN] = seen
            return own
        place = first + self._number * WAYS
        way = min(range(WAYS), key=lambda way: self._use(place + way))
        entry = self._entries_at + (place + way) * WORDS
        words[self._tags_at + place + way] = 0  # first: nobody shall take its words for the other client's
        words[entry + OPEN] = words[entry + SPENT] = words[entry + START] = 0
        words[entry + SEEN] = seen
        words[self._tags_at + place + way] = tag
        return entry

    def _use(self, place: int) -> tuple[bool, bool, int]:
        if not self._words[self._tags_at + place]:
            return False, False, 0
        entry = self._entries_at + place * WORDS
        value = self._words[entry + OPEN]
        is_open = value & _COUNT != 0 and value & ~_COUNT == self._stamp
        return True, is_open, self._words[entry + SEEN]

    def has(self, entry: int, tag: int) -> bool:
        """Return whether an entry is still that of the client with this tag."""
        return self._words[self._tags_at + (entry - self._entries_at) // WORDS] == tag

    # -- what is open ------------------------------------------------------------------------------------------------

    def set_open(self, entry: int, count: int) -> None:
        """Tell how many connections of a client this process has open."""
        self._words[entry + OPEN] = self._stamp | count

    def set_number(self, name: str, count: int) -> None:
        """Set one of NUMBERS of this process."""
        self._words[self._memory.number_at(name) + self._number] = count

    def add(self, name: str, count: int) -> None:
        """Add to one of NUMBERS of this process."""
        at = self._memory.number_at(name) + self._number
        value = self._words[at] + count
        self._words[at] = value if 0 <= value < MOST_SPENT else max(0, count)

    def number(self, name: str) -> int:
        """Return the sum of one of NUMBERS over all columns."""
        at = self._memory.number_at(name)
        return sum(self._words[at : at + self._columns])

    def number_elsewhere(self, name: str) -> int:
        """Return the sum of one of NUMBERS over all other columns."""
        return self.number(name) - self._words[self._memory.number_at(name) + self._number]

    # -- a rate ------------------------------------------------------------------------------------------------------

    def full_at(self, found: Found, interval: float, until: int) -> tuple[float, int]:
        """Return when the token bucket of a client will be full again, and since when it has not been full.

        All that each process has spent since a START is taken as spent then. That is exact as long as the bucket was
        not full in between, and then its process begins with a new START.

        Args:
            interval: nanoseconds that one token takes to come back.
            until: the time now, in nanoseconds. Later entries are damage.
        """
        words = self._words
        _, _, own, others, _ = found
        if others:
            entries = others if own < 0 else [own, *others]
            known = sorted([(words[entry + START], words[entry + SPENT]) for entry in entries])
        elif own >= 0:
            known = [(words[own + START], words[own + SPENT])]
        else:
            return 0.0, 0
        at, since = 0.0, 0
        for start, spent in known:
            if 0 < start <= until and 0 < spent < MOST_SPENT:
                if start > at:
                    at, since = start, start
                at += spent * interval
        return at, since

    def spend(self, entry: int, amount: int, since: int) -> None:
        """Count tokens that this process has given a client in the busy time that began at `since`."""
        words = self._words
        if since <= words[entry + START] <= words[entry + SEEN]:  # not later than now: that is damage
            spent = words[entry + SPENT] + amount
            words[entry + SPENT] = spent if -MOST_SPENT < spent < MOST_SPENT else amount
        else:
            words[entry + SPENT] = amount  # first: with the old START it counts for nothing
            words[entry + START] = since

    def give_back(self, entry: int, amount: int) -> None:
        """Undo `spend`, as far as the busy time still lasts."""
        self._words[entry + SPENT] = max(0, self._words[entry + SPENT] - amount)

    # -- a series of events ------------------------------------------------------------------------------------------

    def series(self, found: Found, window: int, until: int) -> tuple[int, int]:
        """Return the number of events in a client's current series, and when that began; 0, 0 if there is none.

        A series ends when nothing was added to it for some time.

        Args:
            window: this time, in nanoseconds.
            until: the time now, in nanoseconds. Later entries are damage.
        """
        words = self._words
        _, _, own, others, _ = found
        entries = others if own < 0 else [own, *others]
        known = [entry for entry in entries if 0 < words[entry + START] <= until]
        since = max([words[entry + START] for entry in known], default=0)
        if not since or until - max([words[entry + SEEN] for entry in known]) > window:
            return 0, 0
        return self.events(found, since), since

    def events(self, found: Found, since: int) -> int:
        """Return the number of events in a client's series that began at `since`."""
        words = self._words
        _, _, own, others, _ = found
        entries = others if own < 0 else [own, *others]
        count = sum([words[entry + SPENT] for entry in entries if words[entry + START] == since])
        return max(0, min(count, MOST_SPENT))

    def add_event(self, found: Found, since: int, at: int) -> None:
        """Add an event to the series that began at `since`, or begin one (`since` is now)."""
        self.spend(self.take(found, at), 1, since)

    def take_back_events(self, found: Found, count: int, since: int) -> None:
        """Take events out of a series, whichever process added them. It lasts no longer by that."""
        own = found[2]
        entry = self.take(found, since if own < 0 else max(since, self._words[own + SEEN]))
        self.spend(entry, -count, since)
