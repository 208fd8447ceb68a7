"""Questions about names: shared by the clients that ask for the same, bounded, and remembered.

A question that no client waits for any more when its turn comes is not asked. Questions about one domain have only
some of the places, so that its silent name servers do not delay those of other domains.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, Literal, TypeVar

import gevent
from gevent.event import Event
from gevent.lock import Semaphore

from .target import IPAddress

#: What came of a question: addresses; none, but the name exists; no such name; the name servers failed; they were
#: silent; this host lacked a resource, which is not remembered.
Outcome = Literal["found", "no-address", "no-name", "failed", "silent", "broken"]

#: Seconds for which addresses are kept, whatever their TTL. A TTL of 0 costs one lookup per second, not one per
#: connection; an address that was changed in a hurry is used everywhere an hour later.
LEAST_TTL = 1.0
MOST_TTL = 3600.0

#: The same for "there is none" (RFC 2308: up to three hours; users who add a missing record try again at once).
MOST_NEGATIVE_TTL = 60.0

#: Seconds for which a failure is kept (RFC 9520 section 3.2: 1 second to 5 minutes). Silence costs clients more.
KEEP_FAILED = 1.0
KEEP_SILENT = 5.0

#: Answers, and names, that are remembered; beyond that, the one longest not asked for is forgotten. 400 bytes each.
MOST_REMEMBERED = 20_000

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(slots=True)
class Answer:
    """The answer to a question, and the time (``time.monotonic``) until which it holds."""

    outcome: Outcome
    found: tuple[IPAddress, ...]
    until: float


def answer_for(outcome: Outcome, found: tuple[IPAddress, ...] = (), ttl: float | None = None) -> Answer:
    """Return an answer that holds for its TTL, within bounds. None: the TTL is not known."""
    if outcome == "found":
        keep = min(max(LEAST_TTL if ttl is None else ttl, LEAST_TTL), MOST_TTL)
    elif outcome in ("no-address", "no-name"):
        keep = min(max(LEAST_TTL if ttl is None else ttl, LEAST_TTL), MOST_NEGATIVE_TTL)
    else:
        keep = {"failed": KEEP_FAILED, "silent": KEEP_SILENT}.get(outcome, 0.0)
    return Answer(outcome, found, monotonic() + keep)


class Remembered(Generic[_K, _V]):
    """A dictionary of bounded size. Entries have an attribute `until`, after which they are forgotten."""

    def __init__(self) -> None:
        self._entries: OrderedDict[_K, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: _K) -> _V | None:
        entry: Any = self._entries.get(key)
        if entry is None:
            return None
        if entry.until <= monotonic():
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        value: _V = entry
        return value

    def put(self, key: _K, value: _V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > MOST_REMEMBERED:
            self._entries.popitem(last=False)

    def forget(self, key: _K) -> None:
        self._entries.pop(key, None)


class Shares(Generic[_K]):
    """Give each key only so many places at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: dict[_K, tuple[Semaphore, list[int]]] = {}

    @contextmanager
    def hold(self, key: _K, timeout: float | None = None) -> Iterator[bool]:
        """Hold a place of a key while in the block, which gets False if none became free in time."""
        share = self._keys.setdefault(key, (Semaphore(self._most), [0]))
        free, users = share
        users[0] += 1
        held = False
        try:
            held = bool(free.acquire(timeout=timeout))
            yield held
        finally:
            if held:
                free.release()
            users[0] -= 1
            if not users[0]:
                del self._keys[key]


class Question:
    """A question that is being asked, or will be when there is a place."""

    __slots__ = ("answer", "answered", "asker", "began", "waiting")

    asker: Any

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.answered = Event()
        self.began = monotonic()
        self.waiting = 0  # clients


def domain_of(name: str) -> str:
    """Return the domain whose name servers, presumably, know a name: its last two labels, three below "co.uk"."""
    labels = name.removesuffix(".").rsplit(".", 3)
    return ".".join(labels[-3:] if len(labels) > 2 and len(labels[-2]) <= 3 else labels[-2:])


class Questions(Generic[_K]):
    """All questions of a resolver.

    Args:
        look_up: returns the answer about a name, of some kind (type of record); may wait.
        most: questions at once.
        most_of_domain: of these, the ones about names of one domain (`domain_of`).
    """

    def __init__(self, look_up: Callable[[str, _K], Answer], most: int, most_of_domain: int) -> None:
        self._look_up = look_up
        self._places = Semaphore(most)
        self._domains: Shares[str] = Shares(most_of_domain)
        self._known: Remembered[tuple[str, _K], Answer] = Remembered()
        self.under_way: dict[tuple[str, _K], Question] = {}

    def known(self, name: str, kind: _K) -> Answer | None:
        """Return the answer that is remembered."""
        return self._known.get((name, kind))

    def ask(self, name: str, kind: _K) -> Question:
        """Return the question, asked by now. The caller counts itself as `waiting` while it waits."""
        key = name, kind
        asked = self.under_way.get(key)
        if asked is None or asked.asker.dead:  # dead and not answered: memory ran out when it started
            asked = Question()
            asked.asker = gevent.spawn(self._ask, name, kind, asked)
            self.under_way[key] = asked
        return asked

    def _ask(self, name: str, kind: _K, asked: Question) -> None:
        key = name, kind
        try:
            # In this order: one that waits for its domain does not occupy a place that others could use.
            with self._domains.hold(domain_of(name)), self._places:
                if asked.waiting:
                    asked.answer = self._look_up(name, kind)
                    if asked.answer.outcome != "broken":
                        self._known.put(key, asked.answer)
        finally:
            if self.under_way.get(key) is asked:
                del self.under_way[key]
            asked.answered.set()

    def forget(self, name: str, kind: _K) -> None:
        """Ask anew about a name whose addresses failed; not within a second (LEAST_TTL)."""
        answer = self._known.get((name, kind))
        if answer is not None and answer.outcome == "found":
            answer.until = min(answer.until, monotonic() + LEAST_TTL)

    def close(self) -> None:
        """End the questions under way."""
        gevent.killall([asked.asker for asked in self.under_way.values()], block=False)
